"""Units in which results are given."""

MB = 2**20  # bytes
