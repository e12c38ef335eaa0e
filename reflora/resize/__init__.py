"""The rank of a saved adapter, cut or raised: in each layer, the nearest B A of that rank."""

from .cut import Choice, Cut, Resized, resize
from .picture import draw
from .table import outcome, table

__all__ = ["Choice", "Cut", "Resized", "draw", "outcome", "resize", "table"]
