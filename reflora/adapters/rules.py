"""What PEFT's configuration says about the factors: is the update B A, at which scale, and which layers are experts.

What `integrations/peft.py` knows about live modules, for files on disk. Anything unknown is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import fail

CONFIG = "adapter_config.json"
# fields of LoraConfig, PEFT 0.14 to 0.21, that leave the update B A at any value. DoRA, QALoRA, aLoRA and VeLoRA read
# A and B only through their product in the forward pass
HARMLESS = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "use_dora", "velora_config", "alora_invocation_tokens", "use_qalora",
    "qalora_group_size", "layer_replication", "runtime_config", "lora_bias", "target_parameters", "use_bdlora",
    "ensure_weight_tying",
)  # fmt: skip
REFUSED = {
    "kasa_config": "KaSA, whose lora_diag stands between B and A",
    "monteclora_config": "MonteCLoRA, whose noise is learnt for the entries of A",
    "arrow_config": "an Arrow router, which has no trained factors of its own",
    "megatron_config": "factors that Megatron has cut between processes",
    "enable_lora": "factors of a merged linear layer, in groups",
}
# values of init_lora_weights; only the first training step could tell them apart
STARTS = re.compile(r"gaussian|eva|olora|pissa(_niter_\d+)?|corda|loftq|orthogonal|mica|lora_ga", re.IGNORECASE)


Patterns = tuple[tuple[re.Pattern[str], Any], ...]


@dataclass(frozen=True)
class Rules:
    """What a LoRA configuration says about its layers; `default_rank` is its r."""

    default_rank: int
    rank_pattern: Patterns
    target_modules: frozenset[str] | None
    target_parameters: tuple[str, ...]
    block_diagonal: tuple[str, ...]
    default_alpha: float = 8.0
    alpha_pattern: Patterns = ()
    rslora: bool = False
    alphas = False  # PEFT reads no tensor of that name

    def rank(self, key: str) -> int:
        return _first(self.rank_pattern, key, self.default_rank)

    def alpha(self, key: str) -> float:
        return _first(self.alpha_pattern, key, self.default_alpha)

    def scale(self, key: str) -> float:
        """s of `W + s B A`."""
        return self.alpha(key) / self.divisor(self.rank(key))

    def divisor(self, rank: int) -> float:
        """What alpha is divided by."""
        return math.sqrt(rank) if self.rslora else rank

    def wrong(self, name: str, rows: int) -> str:
        """Why A cannot have that many rows, or ""; of a layer that has no experts."""
        return "" if rows == self.rank(name) else f"A has {rows} rows, not {self.rank(name)}"

    def keys(self, name: str) -> tuple[list[str], list[str]]:
        """What PEFT may look up the rank of the layer at `name` by: names of modules, and of parameters."""
        path = name.replace(".base_layer", "")  # PEFT nests the wrappers of the parameters of one module
        parameters = [f"{path}.{target.rpartition('.')[2]}" for target in self.target_parameters]
        parameters = [
            key
            for key, target in zip(parameters, self.target_parameters)
            if key == target or key.endswith(f".{target}")
        ]
        # a module inside another LoRA layer (attention's out_proj) has the rank of the outer one
        may_be = self._may_be_module(name, bool(parameters))
        return [name, name.partition(".base_layer.")[0]] if may_be else [], parameters

    def experts(self, name: str, rows: int) -> tuple[int, tuple[str, ...]] | str:
        """How many experts the `rows` of A of the layer at `name` make up, and by which names PEFT may look up its
        rank; or why that is unknown.
        """
        modules, parameters = self.keys(name)
        found = [(1, key) for key in modules if self.rank(key) == rows]
        found += [(rows // self.rank(key), key) for key in parameters if rows % self.rank(key) == 0]
        if len({number for number, _ in found}) == 1:
            return found[0][0], tuple(dict.fromkeys(key for _, key in found))
        ranks = sorted({self.rank(key) for key in modules[:1] + parameters})
        if found:
            return f"rank {' or '.join(map(str, ranks))}, and the file does not say which"
        return f"A has {rows} rows, not {' or '.join(map(str, ranks))}" if ranks else "no target of the configuration"

    def _may_be_module(self, name: str, parameter: bool) -> bool:
        if name.endswith(".base_layer"):
            return False
        if not parameter or self.target_modules is None:
            return True
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)


def _first(patterns: Patterns, key: str, default: Any) -> Any:
    """As PEFT's get_pattern_key: the first pattern that matches the end of `key`, from a dot on."""
    return next((value for pattern, value in patterns if pattern.match(key)), default)


def shown(text: Any, limit: int = 60) -> str:
    """The end of a path or of a layer's name, on one line."""
    whole = "".join(c if c.isprintable() else "?" for c in str(text))
    return whole if len(whole) <= limit else f"...{whole[3 - limit :]}"


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dictionary; raises ValueError if it is not one."""
    path, remedy = folder / CONFIG, "Save the adapter again with PeftModel.save_pretrained."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        fail(shown(path), "JSON in UTF-8", "bytes that are not UTF-8", remedy)
    except OSError as error:
        fail(shown(path), "a file that can be read", error.strerror, "Check its permissions.", OSError)
    except (ValueError, RecursionError) as error:
        fail(shown(path), "JSON", f"text that is not ({error})", remedy)
    if not isinstance(found, dict):
        fail(shown(path), "a JSON object", type(found).__name__, remedy)
    return found


def read_rules(config: Mapping[str, Any], where: str) -> Rules:
    """Raises ValueError for every kind of adapter whose update is not known to be B A, and for values of a wrong type.

    where: The file's name, for messages.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        remedy = "Others do not change a layer by B A alone; peft.save_as_lora converts some to LoRA."
        fail(f"{where}, peft_type", "'LORA'", repr(kind), remedy)
    for key, value in config.items():
        off = not value and not isinstance(value, dict)  # PEFT turns {} into a configuration of defaults
        if not off and key not in HARMLESS:
            got = REFUSED.get(key, f"{shown(repr(value), 50)}, about which reflora knows nothing")
            fail(f"{where}, {shown(key, 40)}", "null, for an update B A", got, "Leave this adapter as it is.")
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or (isinstance(start, str) and STARTS.fullmatch(start))):
        fail(f"{where}, init_lora_weights", "a start PEFT 0.21 has", shown(repr(start)), "A later reflora may know it.")
    r, alpha = config.get("r"), config.get("lora_alpha", 8)
    remedy = "Save the adapter again with PeftModel.save_pretrained."
    if not _is_rank(r):
        fail(f"{where}, r", "an integer > 0", shown(repr(r)) if "r" in config else "none", remedy)
    if not _is_alpha(alpha):
        fail(f"{where}, lora_alpha", "a finite number", shown(repr(alpha)), remedy)
    blocks = config.get("use_bdlora") or {}
    if not isinstance(blocks, dict):
        fail(f"{where}, use_bdlora", "an object", shown(repr(blocks)), remedy)
    modules = config.get("target_modules")
    return Rules(
        r,  # type: ignore[arg-type]  # _is_rank has seen it
        _patterns(config, "rank_pattern", _is_rank, "integers > 0", where),
        None if modules is None or isinstance(modules, str) else frozenset(_names(modules, f"{where}, target_modules")),
        _names(config.get("target_parameters"), f"{where}, target_parameters"),
        sum((_names(blocks.get(f"target_modules_bd_{side}"), f"{where}, use_bdlora") for side in "ab"), ()),
        float(alpha),
        _patterns(config, "alpha_pattern", _is_alpha, "finite numbers", where),
        bool(config.get("use_rslora")),
    )


def _patterns(config: Mapping[str, Any], field: str, fits: Callable[[Any], bool], wanted: str, where: str) -> Patterns:
    given = config.get(field) or {}
    remedy = "Save the adapter again with PeftModel.save_pretrained."
    if not isinstance(given, dict) or not all(map(fits, given.values())):
        fail(f"{where}, {field}", f"names with {wanted}", shown(repr(given)), remedy)
    try:
        return tuple((re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in given.items())
    except re.error as error:
        fail(f"{where}, {field}", "regular expressions", f"{shown(error.pattern)} ({error})", remedy)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        fail(what, "a list of names", shown(repr(value)), "Save the adapter again with PeftModel.save_pretrained.")
    return tuple(value)
