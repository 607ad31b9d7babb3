"""The former name of `dibit.train.neighbor_sampler`, for one release."""

from dibit.train.neighbor_sampler import NumbaSampler

__all__ = ["NumbaSampler"]
