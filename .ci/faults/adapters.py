"""Faults in what reads and writes saved adapters, and in optimizers of many."""

from __future__ import annotations

from .fault import files, python

KINDS, COPIES = files("integration", "adapter_kinds"), files("integration", "adapter_copies")
RESIZE, LONE, EXTRACT = (files("integration", name) for name in ("resize", "lone_files", "extract"))

FAULTS = (
    python(
        "doctor knows one rank",
        "adapters/rules.py",
        "if pattern.match(key)), default)",
        "if False), default)",
        KINDS,
    ),
    python(
        "a copy that moves is written",
        "doctor/balanced.py",
        "if not apart <= allowed(",
        "if 0 > allowed(",
        COPIES,
    ),
    python(
        "alpha stays while the rank is cut",
        "adapters/ranks.py",
        "_plain(rules.scale(key) * rules.divisor(rank))",
        "_plain(rules.alpha(key))",
        RESIZE,
    ),
    python(
        "a tensor of alpha stays while the rank is cut",
        "adapters/ranks.py",
        "one.scale * ranks[one.name])\n        for one in adapter.stored",
        "one.scale * one.pair.rank)\n        for one in adapter.stored",
        LONE,
    ),
    python(
        "a pattern catches layers whose names end alike",
        "adapters/ranks.py",
        'any(name.endswith(f".{other}") for other in others)',
        "False",
        RESIZE,
    ),
    python(
        "one direction too few is kept",
        "lowrank.py",
        ".int().argmax()) + 1 if",
        ".int().argmax()) if",
        files("unit", "lowrank"),
    ),
    python(
        "a cut keeps the smallest directions",
        "lowrank.py",
        "self.u[:, :k] * root",
        "self.u[:, -k:] * root",
        files("unit", "lowrank"),
    ),
    python(
        "an output layer that shares the embedding is left out",
        "extract/difference.py",
        "ranks |= {OUTPUT: ranks[tied]} if tied in ranks else {}",
        "pass",
        EXTRACT,
    ),
    python(
        "GPT-2's matrices are read as Linear's",
        "extract/difference.py",
        "embedding or (transposed and D.dim() == 2)",
        "embedding",
        EXTRACT,
    ),
    python(
        "a slot that starts over keeps its step counts",
        "optim/reset.py",
        "kept.zero_()",
        'kept.zero_() if name != "step" else None',
        files("integration", "many_adapters"),
    ),
    python(
        "a slot that starts over keeps old master weights",
        "optim/reset.py",
        "kept.copy_(param.detach())",
        "pass",
        files("integration", "many_adapters"),
    ),
)
