"""Compressed models under `torch.compile`: a mode that Dynamo traces, and operators that no compiler looks into."""
