"""Numbers to bytes and back. Knows tensors, configs and seeds, and nothing of autograd, modules or training.

    packed = encode(x, dibit.Config(bits=2), seed=1)   # a `Packed`: codes, ranges, seed
    y = decode(packed)                                 # an unbiased estimate of x

Where to look:

- `encode`: the two functions above, and what they do on the way. `packed`: what is kept, and products with it.
- `projection`, `row_sampling`, `keep_probabilities`: fewer columns or rows before fewer bits. `normal_levels`: levels
  of least variance. `layout`: how many blocks and bytes there are.
- `rng`: the random number of an element is a hash of (seed, element). `seed_stream`: where seeds come from; it alone
  asks autograd something, namely whether a backward pass is running.
- `ops`: the operators as torch knows them. `dispatch`: which kernels run them. `backends`: the kernels; the definition
  in plain torch, which the others must reproduce code for code, is `backends.reference`.
- `fingerprint`: whether a tensor has changed. `numpy_views`: a tensor's memory as an array.
"""

from dibit.codec.encode import Affine, decode, encode, encoded_bytes, norm_scores, reduced
from dibit.codec.packed import Packed
from dibit.codec.rng import mix, seed_tensor

__all__ = ["Affine", "Packed", "decode", "encode", "encoded_bytes", "mix", "norm_scores", "reduced", "seed_tensor"]
