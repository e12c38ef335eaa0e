"""The deliberate faults of mutants.py."""

from . import core, invariant, kernels, package
from .fault import Fault

FAULTS = (*core.FAULTS, *kernels.FAULTS, *invariant.FAULTS, *package.FAULTS)

__all__ = ["FAULTS", "Fault"]
