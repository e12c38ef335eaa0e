"""The LoRA pairs of a model, found by module: never by parameter order or by the spelling of a parameter's name.

PEFT itself is not imported: a LoRA layer is a module with `lora_A` and `lora_B` (or `lora_embedding_A` and `_B`)
dictionaries keyed by adapter, which holds for PEFT 0.14 to 0.21 and for every base layer, quantised ones included; or,
as in the networks of kohya's sd-scripts and LyCORIS, one with modules `lora_down` and `lora_up`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checks import fail
from ..optim.membership import FoundPairs, listed, say_plain
from ..pairs import LoRAPair, as_pairs, is_dtensor, is_split

PLAIN_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
# what torch.compile, activation checkpointing and FSDP put between a module and its name
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# dictionaries of a layer whose update is B diag(x) A, not B A: AdaLoRA, KaSA
SCALED_INSIDE = ("lora_E", "lora_diag")
# the adapter of a layer that has only one
UNNAMED = "default"


@dataclass(frozen=True)
class Site:
    """Where a pair lives: the adapter called `adapter` of the LoRA layer `module`."""

    module: nn.Module
    adapter: str
    pair: LoRAPair
    factors: tuple[Any, Any]


def find_pairs(model: nn.Module, adapter: str | None = None) -> list[LoRAPair]:
    """Every LoRA pair of `model`, named by its module's path and its adapter.

    Supports PEFT LoRA on linear (DoRA's magnitude is left alone), Conv1D, embedding, convolution and attention layers,
    on quantised base layers, on Megatron's parallel layers and on `target_parameters` (layout "experts(E)"), and the
    LoRA layers of kohya's sd-scripts and of LyCORIS, through DDP, PeftModel and torch.compile wrappers. Layers whose
    factors are tied to an earlier layer's, grouped convolutions, layers with a scaling between B and A (AdaLoRA, KaSA)
    and layers with one factor frozen (LoRA-FA) are not pairs: a warning names them, and they take plain steps. An
    optimizer given this list searches the model again whenever it is given further parameters.

    Args:
        model: The model, wrapped or not.
        adapter: None takes each pair whose factors are both trainable, whatever its adapter; a name takes that
            adapter's pairs, trainable or not.

    Raises:
        ValueError: No pair is left; factors that were flattened, or are unsupported for another reason.
    """
    return found_in(model, [site.pair for site in find_sites(model, adapter)], adapter)


def found_in(model: nn.Module, pairs: list[LoRAPair], adapter: str | None = None) -> FoundPairs:
    """These pairs of the model, which can be searched again while it lives."""
    seen = weakref.ref(model)

    def again() -> list[LoRAPair]:
        still = seen()
        return [] if still is None else [site.pair for site in _scan(still, adapter)[0]]

    return FoundPairs(pairs, again)


def find_sites(model: nn.Module, adapter: str | None = None) -> list[Site]:
    """As `find_pairs`, with the module and the adapter of each pair."""
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", type(model).__name__, "Pass the model, not its parameters.", TypeError)
    sites, left_out, others = _scan(model, adapter)
    if not sites:
        _fail_empty(model, adapter, left_out, others)
    for reason in sorted(set(left_out.values())):
        say_plain([name for name, why in left_out.items() if why == reason], reason, stacklevel=4)
    as_pairs([site.pair for site in sites], sharded=True)
    return sites


def _scan(model: nn.Module, adapter: str | None) -> tuple[list[Site], dict[str, str], set[str]]:
    """(supported sites, why each other layer is not supported, adapters that were not asked for)."""
    sites: list[Site] = []
    owners: dict[int, str] = {}
    left_out: dict[str, str] = {}
    others: set[str] = set()
    for site in _sites(model):
        pair = site.pair
        trained = [side for side, factor in (("A", pair.A), ("B", pair.B)) if factor.requires_grad]
        if not (trained if adapter is None else site.adapter == adapter):
            others.add(site.adapter)
            continue
        reason = f"only {trained[0]} is trained" if adapter is None and len(trained) == 1 else _unfit(site, owners)
        if reason is not None:
            left_out[pair.name] = reason
            continue
        owners.update({_address(t): pair.name for t in (pair.A, pair.B)})
        sites.append(site)
    return sites, left_out, others


def _sites(model: nn.Module) -> Iterator[Site]:
    """Each adapter of each LoRA layer; a module that is registered twice comes once."""
    for wrapped_path, module in model.named_modules():
        path = _own_path(wrapped_path)
        for left, right in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            factors_A, factors_B = _by_adapter(module, left), _by_adapter(module, right)
            for adapter in (name for name in factors_A if name in factors_B):
                A, B = (_weight(factors[adapter], path) for factors in (factors_A, factors_B))
                layout = _layout(module, A, left.startswith("lora_embedding"))
                pair = LoRAPair(f"{path}.{adapter}" if path else adapter, A, B, layout)
                yield Site(module, adapter, pair, (factors_A[adapter], factors_B[adapter]))
        yield from _kohya_sites(module, path)


def _kohya_sites(module: nn.Module, path: str) -> Iterator[Site]:
    """Of a layer with `lora_down` and `lora_up`: a module each, or lists of them where a fused projection is split."""
    downs, ups = (_modules(getattr(module, name, None)) for name in ("lora_down", "lora_up"))
    if len(downs) != len(ups):
        return
    for place, (down, up) in enumerate(zip(downs, ups)):
        name = path if len(downs) == 1 else f"{path}.{place}"
        A, B = _weight(down, path), _weight(up, path)
        yield Site(module, UNNAMED, LoRAPair(name or UNNAMED, A, B, _layout(module, A, False)), (down, up))


def _modules(found: Any) -> list[nn.Module]:
    if isinstance(found, nn.ModuleList):
        return list(found)
    return [found] if isinstance(found, nn.Module) else []


def _own_path(path: str) -> str:
    """A module's path without wrappers: the same name, compiled or not."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _by_adapter(module: nn.Module, name: str) -> Mapping[str, Any]:
    found = getattr(module, name, None)
    return dict(found.items()) if isinstance(found, (nn.ModuleDict, nn.ParameterDict, Mapping)) else {}


def _weight(factor: Any, path: str) -> Tensor:
    weight = getattr(factor, "weight", factor)
    if not isinstance(weight, nn.Parameter):
        remedy = "FSDP1 and parametrisations replace parameters by views: use FSDP2 or DDP instead."
        fail(path, "LoRA factors that are parameters", type(weight).__name__, remedy)
    return weight


def _layout(module: nn.Module, A: Tensor, embedding: bool) -> str:
    experts = getattr(module, "num_experts", 1)
    if embedding:
        return "embedding"
    if isinstance(experts, int) and experts > 1:
        return f"experts({experts})"
    return "conv" if A.dim() > 2 else "linear"


def _unfit(site: Site, owners: Mapping[int, str]) -> str | None:
    """Why this is not a `dW = scaling * B @ A` with memory of its own, or None."""
    pair = site.pair
    for factor in site.factors:
        if isinstance(factor, nn.Module) and not (isinstance(factor, PLAIN_FACTORS) or is_split(_weight(factor, ""))):
            return f"{type(factor).__name__} factors"  # such as BD-LoRA's: the weight is not the matrix
    for name in SCALED_INSIDE:
        if site.adapter in _by_adapter(site.module, name):
            return f"{name} stands between B and A"
    if isinstance(getattr(site.module, "lora_mid", None), nn.Module):
        return "lora_mid stands between B and A"
    if pair.layout == "conv" and pair.B.dim() == pair.A.dim() and pair.A.shape[0] != pair.B.shape[1]:
        return "grouped convolution"
    if any(t.numel() and _address(t) in owners for t in (pair.A, pair.B)):
        return "tied to another layer"
    return None


def _address(tensor: Tensor) -> int:
    # this process may hold nothing of a sharded one
    return id(tensor) if is_dtensor(tensor) else tensor.data_ptr()


def _fail_empty(model: nn.Module, adapter: str | None, left_out: Mapping[str, str], others: set[str]) -> None:
    got = f"{type(model).__name__} without any"
    remedy = "Use peft.get_peft_model(model, LoraConfig(...)) first, or pass pairs=[(A, B), ...] to RefLoRAAdamW."
    if left_out:
        name, reason = next(iter(left_out.items()))
        got = f"{len(left_out)} that are not supported ({listed([name])}: {reason})"
        remedy = "Train both factors of plain LoRA in at least one layer; torch.optim.AdamW trains the others."
    elif others and adapter is None:
        got = f"only frozen ones (adapters {listed(sorted(others))})"
        remedy = "Load with is_trainable=True or call model.set_adapter(name); adapter=name finds frozen pairs too."
    elif others:
        got = f"none of adapter {adapter!r} (adapters {listed(sorted(others))})"
        remedy = "Pass the name of one of these."
    wanted = "lora_A/lora_B parameter pairs" + (", both trainable" if adapter is None else "")
    fail("model", wanted, got, remedy)
