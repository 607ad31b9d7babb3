"""Loss and quality of a prediction, for one label a node and for several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dibit.tools.errors import require

TITLES = {"accuracy": "accuracy", "f1": "micro-F1", "rocauc": "ROC-AUC"}


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, or binary cross-entropy of logits for several labels a node.

    Shapes:
        logits: (n, C); y: int64 (n,) or float32 (n, C); output: ().
    """
    return F.cross_entropy(logits, y) if y.dim() == 1 else F.binary_cross_entropy_with_logits(logits, y)


def score(metric: str, logits: Tensor, y: Tensor) -> float:
    """Return accuracy, micro-F1 or mean ROC-AUC, from 0 to 1.

    Shapes:
        logits: (n, C); y: int64 (n,) or float32 (n, C).
    """
    if metric == "accuracy":
        return float((logits.argmax(dim=1) == y).double().mean())
    functions = require("torchmetrics.functional.classification")
    if metric == "f1":
        return float(functions.multilabel_f1_score(logits.sigmoid(), y.long(), y.shape[1], average="micro"))
    return float(functions.multilabel_auroc(logits.sigmoid(), y.long(), y.shape[1], average="macro"))
