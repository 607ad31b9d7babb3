"""Dibit: train graph neural networks on a fraction of the memory."""

from dibit.codec import Packed, decode, encode
from dibit.compress import compress, decompress, track
from dibit.config import Config, Project, Sample, recipe

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Packed",
    "Project",
    "Sample",
    "__version__",
    "compress",
    "decode",
    "decompress",
    "encode",
    "recipe",
    "track",
]
