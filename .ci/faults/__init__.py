"""The deliberate faults of mutants.py."""

from . import core, kernels, package
from .fault import Fault

FAULTS = (*core.FAULTS, *kernels.FAULTS, *package.FAULTS)

__all__ = ["FAULTS", "Fault"]
