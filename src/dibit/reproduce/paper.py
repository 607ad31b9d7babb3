"""What the two papers report. A number that was read in a source is quoted; a remembered one says so.

EXACT: Liu et al., ICLR 2022. i-EXACT: Eliassen and Selvan, arXiv 2309.11856, and the public result log of the second.
"""

from __future__ import annotations

from typing import Any

# Saved MB (2^20 bytes) on ogbn-arxiv, INT2, D/R = 8: the authors' result log.
LOG_MB = {
    "EXACT": 30.47,
    "G/R = 8": 25.95,
    "G/R = 16": 25.72,
    "G/R = 32": 25.60,
    "G/R = 64": 25.56,
    "EXACT + VM": 30.47,
}

# Accuracy % and epochs/s on ogbn-arxiv, 3-layer GraphSAGE. Remembered, not confirmed in a source.
REMEMBERED = [
    ("FP32", "71.95 ± 0.16", "13.07"),
    ("EXACT", "71.16 ± 0.21", "10.03"),
    ("G/R = 64", "71.28 ± 0.25", "10.54"),
    ("EXACT + VM", "71.20 ± 0.19", "9.16"),
]

# i-EXACT against EXACT, INT2 (its abstract).
CLAIMS = {"less_memory": "> 15 %", "faster": "about 5 %"}

# Expected variance under CN[1/D] for 2 bits, computed from i-EXACT's formula:
# D -> sigma, uniform levels, optimal alpha, optimal levels, reduction
VARIANCE = {
    8: (1.304, 0.1258, 1.030, 0.1250, 0.0061),
    16: (0.978, 0.1469, 1.050, 0.1442, 0.0184),
    32: (0.805, 0.1573, 1.069, 0.1514, 0.0378),
    64: (0.696, 0.1623, 1.086, 0.1521, 0.0633),
    128: (0.620, 0.1647, 1.102, 0.1493, 0.0934),
    256: (0.564, 0.1659, 1.116, 0.1449, 0.1266),
    512: (0.520, 0.1667, 1.128, 0.1398, 0.1616),
    1024: (0.484, 0.1675, 1.139, 0.1345, 0.1971),
}


def remembered() -> list[dict[str, Any]]:
    """The remembered rows, each with its mark."""
    return [
        {"setting": setting, "accuracy": accuracy, "epochs_per_second": speed, "mark": "remembered"}
        for setting, accuracy, speed in REMEMBERED
    ]
