"""Adapters on disk: what their tensors are, in which layers the update is B A, and copies with other factors."""

from .adapter import Adapter, Copied
from .folder import DIFFUSERS, WEIGHTS, below_a_file
from .rules import CONFIG, shown
from .stored import Stored

__all__ = ["CONFIG", "DIFFUSERS", "WEIGHTS", "Adapter", "Copied", "Stored", "below_a_file", "shown"]
