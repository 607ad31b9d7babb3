"""The former name of `dibit.train.layerwise`, for one release."""

from dibit.train.layerwise import layerwise

__all__ = ["layerwise"]
