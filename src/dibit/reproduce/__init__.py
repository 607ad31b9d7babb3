"""`dibit reproduce`: the measurements of EXACT and i-EXACT, repeated."""
