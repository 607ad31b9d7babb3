"""The random generators of this process, for a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def state(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators on the CPU ("rng") and the device ("cuda_rng"), and of NumPy's and Python's."""
    version, words, gauss = random.getstate()
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": _numpy_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
    }


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Go on where `state` was taken; on another device its generator goes on from where it is."""
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"], device)
    if saved["numpy"] is not None:
        state = {**saved["numpy"], "state": {**saved["numpy"]["state"]}}
        state["state"]["key"] = state["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state(state)  # noqa: NPY002  the global one is meant
    python = saved["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


def _numpy_state() -> dict[str, Any] | None:
    """`None` where someone has put another kind of generator in NumPy's place."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    if state["bit_generator"] != "MT19937":
        return None
    words, position = state["state"]["key"], state["state"]["pos"]
    own = {"key": torch.from_numpy(words.astype(np.int64)), "pos": int(position)}
    return {
        "bit_generator": "MT19937",
        "state": own,
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }
