"""The table of pointers, and that the core is built on the same columns."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import served

from reflora import columns as col
from reflora import constants
from reflora.backends import cpp_backend
from reflora.columns import A_SIDE, B_SIDE
from reflora.kernels.routes import class_of
from reflora.pairs import LoRAPair, as_pairs
from reflora.plan import Plan

ROOT = Path(__file__).parents[2]


def test_the_core_is_built_on_these_columns():
    """-S: where it is built there may be no torch."""
    command = [sys.executable, "-I", "-S", str(ROOT / "reflora" / "columns.py")]
    header = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", header)} == col.NUMBERS


@pytest.mark.skipif(not served("cpp"), reason="there is no core")
def test_a_core_of_other_columns_is_not_used(monkeypatch):
    """It would read and write at wrong addresses."""
    with monkeypatch.context() as patch:
        patch.setitem(col.NUMBERS, "SAVED", 0)
        found = importlib.reload(cpp_backend).unavailable(torch.device("cpu"))
    assert found == "the C++ core was built on another table of columns; run pip install -e . again"
    assert importlib.reload(cpp_backend).unavailable(torch.device("cpu")) is None


def test_the_core_counts_storage_types_alike():
    names = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
    body = re.search(r"enum DType \{(.*?)\}", (ROOT / "csrc" / "table.h").read_text())[1]
    assert [names[name] for name in re.findall(r"\w+", body)] == list(constants.STORAGE_DTYPES)


def test_rank_classes():
    assert [class_of(n) for n in (1, 16, 17, 64, 65, 128, 129)] == [16, 16, 32, 64, 128, 128, 0]


def read(row, side, i, k, tensor):
    """Element (i, k) of a side, by the table's own pointer arithmetic."""
    offset = (row[side + col.P] - tensor.data_ptr()) // tensor.element_size()
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return flat[tensor.storage_offset() + offset + i * row[side + col.P_SR] + k * row[side + col.P_SN]]


def test_rows_address_every_layout():
    pairs = as_pairs(
        [
            (torch.randn(4, 10), torch.randn(6, 4)),
            (torch.randn(10, 4).mT, torch.randn(4, 12).mT[::2]),
            LoRAPair(
                "conv", torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(6, 4, 1, 1), "conv"
            ),
            LoRAPair("moe", torch.randn(12, 10), torch.randn(6, 12), "experts(3)"),
            LoRAPair("moe 3-D", torch.randn(3, 4, 10), torch.randn(6, 4, 3), "experts(3)"),
        ]
    )
    plan = Plan(pairs)
    assert len(plan.rows) == 3 + 3 + 3
    for number, owner in enumerate(plan.rows):
        row, pair = plan.table[number], pairs[owner.pair]
        assert row[col.R] == 4 and row[A_SIDE + col.N] == owner.A.shape[1] and row[B_SIDE + col.N] == owner.B.shape[0]
        for i in range(4):
            for k in range(owner.A.shape[1]):
                assert read(row, A_SIDE, i, k, pair.A) == owner.A[i, k]
            for k in range(owner.B.shape[0]):
                assert read(row, B_SIDE, i, k, pair.B) == owner.B[k, i]


def test_bindings_follow_experts_and_strides():
    pair = LoRAPair("moe", torch.randn(12, 10), torch.randn(6, 12), "experts(3)")
    plain = LoRAPair("plain", torch.randn(4, 10), torch.randn(6, 4))
    plan = Plan([pair, plain])
    grads = [(torch.randn(12, 10), torch.randn(6, 12)), (torch.randn(10, 4).mT, None)]
    plan.bind_grads(grads)
    assert plan.table[:, col.ACTIVE].tolist() == [1, 1, 1, 0]
    grads[1] = (torch.randn(10, 4).mT, torch.randn(6, 4))
    plan.bind_grads(grads)
    assert plan.table[:, col.ACTIVE].tolist() == [1, 1, 1, 1]
    for expert in range(3):
        gA, gB = pair.views_A(grads[0][0])[expert], pair.views_B(grads[0][1])[expert]
        assert plan.table[expert, A_SIDE + col.G] == gA.data_ptr()
        assert plan.table[expert, B_SIDE + col.G] == gB.data_ptr()
    assert plan.table[3, A_SIDE + col.G_SR : A_SIDE + col.G_SN + 1].tolist() == [1, 4]
    steps = [torch.zeros(3), torch.zeros(())]
    plan.bind_once(col.PHASE, steps)
    assert plan.table[:, col.PHASE].tolist() == [steps[0].data_ptr() + 4 * e for e in range(3)] + [steps[1].data_ptr()]


def test_a_moved_factor_is_seen():
    pair = LoRAPair("x", torch.randn(4, 10), torch.randn(6, 4))
    plan = Plan([pair])
    assert not plan.moved()
    pair.A.data = pair.A.data.clone()
    assert plan.moved()
    plan.rebuild()
    assert not plan.moved() and plan.table[0, A_SIDE + col.P] == pair.A.data_ptr()


def test_conv_gradients_keep_the_memory_order_of_their_factor():
    pair = LoRAPair("conv", torch.randn(4, 3, 2, 2), torch.randn(6, 4, 1, 1), "conv")
    plan = Plan([pair])
    plan.bind_grads([(torch.randn(4, 3, 2, 2), torch.randn(6, 4, 1, 1).to(memory_format=torch.channels_last))])
    with pytest.raises(ValueError, match="memory format of their parameter"):
        plan.bind_grads([(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(6, 4, 1, 1))])
