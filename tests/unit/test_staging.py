"""What a capture may do to the tables on the device, without a GPU: its copies are recorded, not run."""

import pytest
import torch

from reflora.kernels import staging
from reflora.kernels.staging import OnDevice
from reflora.kernels.step import launch
from reflora.pairs import LoRAPair
from reflora.plan import Plan

META = torch.device("meta")


@pytest.fixture
def capture(monkeypatch):
    """Turns "a stream is being captured" on and off; pinned memory is plain memory."""
    monkeypatch.setattr(staging, "to_device", lambda tensor, device: tensor.to(device))
    monkeypatch.setattr(staging, "pinned_like", torch.empty_like)
    state = {"on": False, "stream": 1}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["stream"])
    return state


def test_sent_only_when_changed(capture):
    table = OnDevice(META)
    first = table(torch.arange(4))
    assert table(torch.arange(4)) is first and table(torch.ones(4)) is not first


def test_a_table_that_a_capture_has_sent_is_not_trusted_outside_it(capture):
    table = OnDevice(META)
    before = table(torch.arange(4))
    capture["on"] = True
    recorded = table(torch.ones(4))
    assert recorded is not before
    capture["on"] = False
    assert table(torch.arange(4)) is before
    after = table(torch.ones(4))
    assert after is not recorded and after is not before


def test_an_unchanged_table_needs_no_copy_in_a_capture_and_outlives_it(capture):
    table = OnDevice(META)
    before = table(torch.arange(4))
    capture["on"] = True
    assert table(torch.arange(4)) is before
    capture["on"] = False
    table(torch.ones(4))
    assert any(kept is before for kept in table._captured)


def test_each_capture_needs_a_step_before_it(capture):
    table = OnDevice(META)
    capture["on"] = True
    with pytest.raises(RuntimeError, match="Take a step outside the graph before each capture"):
        table(torch.arange(4))
    capture["on"] = False
    table(torch.arange(4)), table(torch.arange(6))
    capture["on"] = True
    table(torch.ones(6))
    with pytest.raises(RuntimeError, match="Take a step outside the graph before each capture"):
        table(torch.zeros(6))


def test_a_table_that_another_stream_reads_is_kept_for_it(capture, monkeypatch):
    held = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: held.append((tensor, stream)))
    table = OnDevice(META)
    made = table(torch.arange(4))
    assert table(torch.arange(4)) is made and not held
    capture["stream"] = 2
    assert table(torch.arange(4)) is made
    assert [(tensor is made, stream) for tensor, stream in held] == [(True, 2)]


def test_buffers_that_another_stream_reads_are_kept_for_it(capture, monkeypatch):
    held = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: held.append((tensor, stream)))
    plan = Plan([LoRAPair("pair", torch.randn(4, 30), torch.randn(20, 4))])
    plan.device = META
    prepared = launch.prepare(plan)
    (group,) = prepared.groups
    made = [prepared.oversized_index, *prepared.rerouted_index.values()]
    made += [group.workspace, group.headers, group.arrivals, group.entries, group.items]
    launch.prepare(plan)
    assert not held
    capture["stream"] = 2
    launch.prepare(plan)
    assert {id(tensor) for tensor, _ in held} == set(map(id, made)) and {stream for _, stream in held} == {2}


def test_what_was_never_prepared_is_refused_in_a_capture(monkeypatch):
    """Before memory is pinned, which would end the capture in an error of CUDA's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail("pinned"))
    plan = Plan([LoRAPair("pair", torch.randn(4, 30), torch.randn(20, 4))])
    plan.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="Take a step outside the graph before each capture"):
        launch.prepare(plan)
