"""Bad input gets one clear error: what was expected, what came, what to do."""

import numpy
import pytest
import torch
from refusals import OF_ARGUMENTS, each_refused, refused

import reflora
from reflora.backends import resolve
from reflora.checks import check_count
from reflora.pairs import LoRAPair, as_pairs


def pair(r=4, n_in=10, n_out=6, **kw):
    return torch.randn(r, n_in, **kw), torch.randn(n_out, r, **kw)


def overlapping():
    storage = torch.randn(200)
    return [(storage[:40].view(4, 10), torch.randn(6, 4)), (storage[39:79].view(4, 10), torch.randn(6, 4))]


BAD_PAIRS = {
    "shapes do not match": ([(torch.randn(4, 10), torch.randn(6, 5))], ValueError, r"A \[r, n_in\] and B \[n_out, r\]"),
    "A and B swapped": ([pair()[::-1]], ValueError, "Check the order"),
    "flattened": ([(torch.randn(40), torch.randn(24))], ValueError, "FSDP1 flattens parameters"),
    "integer dtype": ([(torch.ones(4, 10, dtype=torch.int64), torch.randn(6, 4))], TypeError, "got torch.int64"),
    "two dtypes": ([(torch.randn(4, 10).double(), torch.randn(6, 4))], ValueError, "Cast both factors"),
    "two devices": ([(torch.randn(4, 10, device="meta"), torch.randn(6, 4))], ValueError, "materialise"),
    "overlap": (overlapping(), ValueError, "memory shared with pair 0, A"),
    "same tensor twice": ([(t := torch.randn(4, 10), torch.randn(6, 4)), (t, torch.randn(6, 4))], ValueError, "shared"),
    "expanded": ([(torch.randn(1, 10).expand(4, 10), torch.randn(6, 4))], ValueError, "Call .clone"),
    "a bare pair": (torch.randn(4, 10), TypeError, "Wrap a single pair"),
    "not tensors": ([(1, 2)], TypeError, "torch.Tensor"),
    "three things": ([(1, 2, 3)], TypeError, "LoRAPair or"),
    "empty": ([(torch.randn(4, 0), torch.randn(6, 4))], ValueError, "at least one element"),
    "no list": ({"q": pair()}, TypeError, "a list of .A, B. pairs, got dict"),
    "a list of tensors": ([torch.randn(2, 4, 4)], TypeError, "LoRAPair or .A, B., got Tensor"),
    "no layout": ([LoRAPair("x", *pair(), layout=None)], TypeError, "pair 0, layout: expected text, got NoneType"),
    "no name": ([LoRAPair(7, *pair())], TypeError, "pair 0, name: expected text, got int"),
    "unknown layout": ([LoRAPair("x", *pair(), "experts")], ValueError, "experts"),
    "too many experts": ([LoRAPair("x", *pair(), f"experts({'9' * 5000})")], ValueError, r"got 'experts\(999"),
    "experts that are no number": ([LoRAPair("x", *pair(), "experts(\u00b2)")], ValueError, "layout 'linear'"),
    "no view": (
        [LoRAPair("x", torch.randn(4, 3, 5, 2).permute(0, 3, 1, 2)[..., :3], torch.randn(6, 4, 1, 1), "conv")],
        ValueError,
        r"that can be viewed as matrices.*\.contiguous",
    ),
    "expert count": ([LoRAPair("x", *pair(), "experts(3)")], ValueError, r"A \[3 \* r, n_in\]"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
@pytest.mark.parametrize("op", ["refactor_", "precondition_", "RefLoRAAdamW"])
def test_bad_pairs(case, op):
    pairs, error, message = BAD_PAIRS[case]
    with refused(message, error=error):
        if op == "RefLoRAAdamW":
            reflora.RefLoRAAdamW([torch.zeros(2, requires_grad=True)], pairs=pairs)
        else:
            getattr(reflora, op)(pairs)


@pytest.mark.gpu
def test_two_devices_in_a_pair():
    with refused("B on cpu like A"):
        as_pairs([(torch.randn(4, 10), torch.randn(6, 4, device="cuda"))])


NO_GRADS = {
    "none": ([], "one .gA, gB. for each of 1 pairs"),
    "another shape": ([(torch.randn(4, 10), torch.randn(6, 5))], "gradient of B"),
    "another dtype": ([(torch.randn(4, 10).double(), torch.randn(6, 4))], "gradient of A"),
    "one": ([pair()[:1]], r"pair 0, gradients: expected \(gA, gB\), got 1 things"),
    "three": ([(*pair(), 1)], "got 3 things"),
    "None for both": ([None], r"got NoneType. Use \(None, None\)"),
    "one tensor for both": ([torch.randn(2, 4, 10)], "got Tensor"),
    "numbers": ([(1, 2)], "gradient of A: expected a torch.Tensor or None, got int"),
    "a dict": ({0: pair()}, "grads: expected a list of .gA, gB., got dict"),
    "a tensor": (torch.randn(1, 2), "grads: expected a list of .gA, gB., got Tensor"),
    "text": ("g", "grads: expected a list of .gA, gB., got str"),
    "a number": (3, "grads: expected a list of .gA, gB., got int"),
}


@pytest.mark.parametrize("case", NO_GRADS)
def test_gradients_that_do_not_match(case):
    grads, message = NO_GRADS[case]
    with refused(message, error=OF_ARGUMENTS):
        reflora.precondition_([pair()], grads)


def test_gradients_of_an_iterator():
    pairs = [pair(), pair()]
    assert reflora.precondition_(iter(pairs), (pair() for _ in range(2))).refactored == 2


@pytest.mark.parametrize("value", ["no", 1, 0, None, numpy.True_, torch.tensor(True)], ids=repr)
def test_scalar_is_true_or_false(fast_backend, value):
    for call in (reflora.refactor_, lambda pairs, **options: reflora.precondition_(pairs, pairs, **options)):
        with refused("scalar: expected True or False, got .*None|type|Tensor", error=TypeError):
            call([pair()], scalar=value, backend=fast_backend)


@pytest.mark.parametrize(
    "value", [3, True, numpy.array(["cpp", "torch"]), torch.randn(3), ["cpp"], "x" * 10_000], ids=type
)
def test_backend_and_precision_are_words(value):
    for name in ("backend", "precision"):
        with refused(f"{name}: expected .*, got "):
            reflora.refactor_([pair()], **{name: value})
    with refused("precision: expected 'float64' or 'float32', got None"):
        reflora.refactor_([pair()], precision=None)


@pytest.mark.parametrize("value", [numpy.int64(3), numpy.uint8(3), torch.tensor(3), True, 3.0, "3", None], ids=repr)
def test_counts_are_ints(value):
    """numpy's integers have no place in a kernel or a checkpoint."""
    with refused("n: expected an integer >= 1, got .*(type|None|Tensor)") as told:
        check_count("n", value, 1)
    assert ("Pass an int." in str(told.value)) == hasattr(value, "__index__")
    for right in (1, 3, 2**31 - 1):
        check_count("n", right, 1)


def test_errors_are_as_short_for_any_model():
    many = [pair() for _ in range(3000)]
    wrong = [
        lambda: reflora.precondition_(many, [pair()] * 2999), lambda: reflora.refactor_([*many, many[0]]),
        lambda: reflora.precondition_(many, [tuple(torch.randn_like(t) for t in one) for one in many[1:]] + [many[0]]),
        lambda: reflora.refactor_({i: one for i, one in enumerate(many)}),
    ]  # fmt: skip
    for call in wrong:
        with refused("", error=OF_ARGUMENTS):
            call()


def test_backends_and_precisions():
    each_refused({
        "ValueError: one of triton, cpp, torch, got 'cuda'": lambda: reflora.refactor_([pair()], backend="cuda"),
        "ValueError: 'float64' or 'float32', got 'double'": lambda: reflora.refactor_([pair()], precision="double"),
        "RuntimeError: works on CPU tensors": lambda: resolve("cpp", torch.device("cuda")),
    })  # fmt: skip
    assert resolve(None, torch.device("cpu")).NAME in ("cpp", "torch")
    assert resolve(None, torch.device("mps")).NAME == "torch"


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refused("backend 'triton': expected one that can serve cpu, got .*GPU|CUDA", error=RuntimeError):
        reflora.refactor_([pair()], backend="triton")


def test_optimizer_needs_to_know_the_pairs():
    parameters = [t.requires_grad_() for t in pair()]
    with refused("find_pairs"):
        reflora.RefLoRAAdamW(parameters)
    with refused("either parameters or pairs", error=TypeError):
        reflora.RefLoRAAdamW([tuple(parameters)], pairs=[tuple(parameters)])


def test_layouts_are_views():
    conv = LoRAPair(
        "conv", torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(6, 4, 1, 1), "conv"
    )
    experts = LoRAPair("moe", torch.randn(3 * 4, 10), torch.randn(6, 4 * 3), "experts(3)")
    as_pairs([conv, experts])
    assert conv.views_A(conv.A)[0].shape == (4, 12) and conv.views_A(conv.A)[0].data_ptr() == conv.A.data_ptr()
    assert conv.rank == experts.rank == 4 and experts.experts == 3
    A1, B1 = experts.views_A(experts.A)[1], experts.views_B(experts.B)[1]
    assert torch.equal(A1, experts.A[4:8]) and torch.equal(B1, experts.B[:, 1::3])
    assert A1._base is not None and B1._base is not None


def test_import_loads_names_lazily():
    assert set(reflora.__all__) <= set(dir(reflora))
    with pytest.raises(AttributeError, match="no_such_name"):
        reflora.no_such_name  # noqa: B018
