"""Making a tensor again in the backward pass instead of keeping it: the tape, cuts of it, and programs."""
