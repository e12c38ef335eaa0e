"""A LoRA adapter out of two checkpoints: the nearest to what a fine-tuning has changed."""

from .checkpoints import Checkpoint
from .difference import Extraction, extract
from .table import outcome, table

__all__ = ["Checkpoint", "Extraction", "extract", "outcome", "table"]
