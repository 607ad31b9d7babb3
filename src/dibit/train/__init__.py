"""Training from the command line: settings, data, models and the loop behind ``dibit train``.

Importing this package loads neither PyTorch Geometric nor what the extra ``train`` brings.
"""

from dibit.tools.errors import Interrupted, TrainingError, UserError
from dibit.train.settings import (
    CompressionSettings,
    DataSettings,
    ModelSettings,
    OptimisationSettings,
    RunSettings,
    Settings,
)

__all__ = [
    "CompressionSettings",
    "DataSettings",
    "Interrupted",
    "ModelSettings",
    "OptimisationSettings",
    "RunSettings",
    "Settings",
    "TrainingError",
    "UserError",
]
