"""The deliberate faults of mutants.py."""

from . import adapters, core, invariant, kernels, package
from .fault import Fault

FAULTS = (*core.FAULTS, *kernels.FAULTS, *invariant.FAULTS, *package.FAULTS, *adapters.FAULTS)

__all__ = ["FAULTS", "Fault"]
