"""Numba kernels: one pass a block, no fast-math (backends must agree and NaN must survive).

Their inner loops run over slices of 32-bit numbers without a branch: what LLVM vectorises.
"""
