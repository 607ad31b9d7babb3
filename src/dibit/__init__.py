"""Dibit: train graph neural networks on a fraction of the memory."""

from types import ModuleType

from dibit.api import compress, decompress, scores, track
from dibit.codec import Packed, decode, encode
from dibit.config import Config, Project, Rows, Sample
from dibit.engine.batch_info import batch
from dibit.gradient_noise import Noise, noise
from dibit.recipes import recipe

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Noise",
    "Packed",
    "Project",
    "Rows",
    "Sample",
    "__version__",
    "batch",
    "compress",
    "decode",
    "decompress",
    "encode",
    "noise",
    "recipe",
    "scores",
    "track",
]


def __getattr__(name: str) -> ModuleType:
    """`dibit.study`, and `dibit.functions`, the former name of `dibit.rules`: loaded when they are first asked for."""
    if name in ("functions", "study"):
        import importlib

        return importlib.import_module(f"dibit.{name}")
    raise AttributeError(f"module 'dibit' has no attribute {name!r}")
