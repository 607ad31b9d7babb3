"""Says once of a compressed model that nothing was compressed."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dibit.compile import compiled_mode
from dibit.engine.model_state import ModelState, state_of

# Models of which nothing was compressed yet, and whether they had no gradients then.
_waiting: dict[int, tuple[weakref.ref[ModelState], bool]] = {}
_handle: Any = None


def expect(state: ModelState) -> None:
    """A model was compressed: an optimiser that steps its parameters expects that something of it was."""
    global _handle
    key = id(state)
    _waiting[key] = weakref.ref(state, lambda _: _forget(key)), not _has_gradient(state)
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_stepped)


def passed(state: ModelState, seen: int, whole: bool) -> None:
    """A training forward pass of the model (or, not `whole`, of a part of it) has ended; `seen`: what rules took over.

    A part may well have nothing to compress. It is said of parts when a backward pass has come by all the same.
    """
    if seen:
        _forget(id(state))
    elif whole:
        _say(state, "a training forward pass of", "had no operation that Dibit knows")
    elif id(state) in _waiting and _waiting[id(state)][1] and _has_gradient(state):
        _say(state, "the training forward passes of the parts of", "had no operation that Dibit knows")


def _has_gradient(state: ModelState) -> bool:
    return any(p.grad is not None for p in state.root.parameters())


def _forget(key: int) -> None:
    global _handle
    _waiting.pop(key, None)
    if not _waiting and _handle is not None:
        _handle.remove()
        _handle = None


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    """An optimiser has stepped its parameters, be it those of a model none of whose modules was called."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for key, (ref, _clean) in list(_waiting.items()):
        state = ref()
        if state is None or state_of(state.root) is not state or compiled_mode.local.mode.used:
            _forget(key)
        elif any(id(p) in own for p in state.root.parameters()):
            _say(
                state,
                "an optimiser has stepped",
                "of which no module's call in training mode had an operation that Dibit knows (a direct call of "
                "`forward` or of another method is not seen)",
                stacklevel=4,
            )


def _say(state: ModelState, before: str, after: str, stacklevel: int = 8) -> None:
    _forget(id(state))
    if not state.warned:
        state.warned = True
        warnings.warn(
            f"dibit: {before} the compressed {type(state.root).__name__} {after}, so nothing was compressed; "
            "dibit.track(model) lists what is kept.",
            stacklevel=stacklevel,  # where the model is called
        )
