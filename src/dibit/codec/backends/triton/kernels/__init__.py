"""Triton kernels. Arguments in capitals choose the code; `T`, `B`, `R`, `C`, `D` are the sizes of a program's tile."""
