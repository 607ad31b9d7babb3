"""Kernels of the codec's operators: the definition in plain torch, and what is faster on a type of device.

    reference/   the definition, for any device: plain torch
    cpu/         Numba, for "cpu" tensors
    triton/      Triton, for "cuda" tensors (NVIDIA, and AMD where Triton allows)

Each holds an operator in the file of the same name: `blocks` (numbers to codes and back), `products` (with what was
encoded), `elementwise` (masks, dropout, signs, a fingerprint), `sampling` (which rows are kept), `edges` (sums over
edges).

To add a backend:

1. Write a module with a function for each operator that you have a kernel for, of the same name, with the arguments
   and results of the definition in `reference`. The others run the definition.
2. Decorate a function with `dibit.codec.dispatch.kernel` for the dtypes that it serves: `@kernel(x=torch.float32)`.
   For others, and where the function returns `NotImplemented`, the definition runs. `dibit.codec.layout` has the
   numbers of blocks and bytes.
3. Name the module for its type of device: in your own package by an entry point (`dibit.codec.dispatch` shows it), in
   Dibit by a line in the table there.
4. Hold it against the definition: `tests/gpu/cases.py` lists calls with the results that it must give, bit for bit but
   for sums. Random numbers are those of `dibit.codec.rng`, a function of (seed, element); nothing may be contracted
   or reordered on the way to a code; NaN must survive.

A function must not wait for its device, and reads a seed on the device, so that it can be captured in a CUDA graph.
"""
