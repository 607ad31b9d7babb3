"""What watches or changes operations beside Dibit: function modes, autocast, Dynamo and tracers."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from dibit._torch.private.registry import find
from dibit._torch.user_objects import is_a

F = TypeVar("F", bound=Callable[..., Any])

# -- function modes -----------------------------------------------------------------------------------------------


def _pop() -> TorchFunctionMode:
    top: TorchFunctionMode = _stack()[-1]
    TorchFunctionMode.__exit__(top, None, None, None)
    return top


_found_pop = find("torch.overrides._pop_mode", "take function modes off the stack")
_stack = find(
    "torch.overrides._get_current_function_mode_stack",
    "see which function modes are on the stack",
    needed=_found_pop is None,
)
_count = find(
    "torch._C._len_torch_function_stack", "see how many function modes are on the stack", needed=_stack is None
)
# Put a mode on this thread's stack; take the innermost off and return it; the number of modes there.
push_mode: Any = find("torch.overrides._push_mode", "put function modes on the stack") or TorchFunctionMode.__enter__
pop_mode: Any = _found_pop or _pop
mode_count: Any = _count or (lambda: len(_stack()))


def may_have_mode(mode: TorchFunctionMode) -> bool:
    """Whether a mode is on this thread's stack; yes where torch does not tell."""
    return _stack is None or any(other is mode for other in _stack())


def is_innermost(mode: TorchFunctionMode) -> bool:
    """Whether a mode is the first to see this thread's calls; no where torch does not tell."""
    return _stack is not None and any(other is mode for other in _stack()[-1:])


# -- autocast -----------------------------------------------------------------------------------------------------

_MULTIPLIES = "time: a product of two numbers is computed to see it"
_autocasts = find("torch.is_autocast_enabled", "see whether autocast is on", _MULTIPLIES)
_autocast_dtype = find("torch.get_autocast_dtype", "see to which dtype autocast casts", _MULTIPLIES)
_caches = find(
    "torch.is_autocast_cache_enabled",
    "see whether autocast casts each parameter once",
    "the bytes of plain training in dibit.track, where autocast's cache is off",
)


def _of_product(device: str) -> torch.dtype:
    """The dtype of a product of matrices in single precision: autocast's where it is on."""
    if device == "cuda" and not torch.cuda.is_available():
        return torch.float32
    x = torch.ones(1, 1, dtype=torch.float32, device=device)
    return torch.mm(x, x).dtype


# Of a type of device: whether autocast is on, and to which dtype it casts then; whether it casts a parameter only once.
autocasts: Any = _autocasts or (lambda device: _of_product(device) != torch.float32)
autocast_dtype: Any = _autocast_dtype or _of_product
autocast_caches: Any = _caches or (lambda: True)


# -- Dynamo -------------------------------------------------------------------------------------------------------

_EXACT = "compression under torch.compile: compiled models are plain"
_frames = "torch._C._dynamo.eval_frame."


def _skipping() -> Callable[[CodeType], None]:
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    if not hasattr(frames, "set_code_exec_strategy"):
        return frames.skip_code  # type: ignore[no-any-return]  # torch 2.6
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    return lambda code: frames.set_code_exec_strategy(code, strategy)


_set_callback = find(_frames + "set_eval_frame", "switch torch.compile off in Dibit's own code", _EXACT)
_skip = find(_frames + "set_code_exec_strategy", "keep torch.compile from Dibit's own code", _EXACT, look=_skipping)
DYNAMO = None not in (_set_callback, _skip)
# Let Dynamo compile what this thread calls by this callback, `None` for nothing; returns the callback before.
set_callback: Any = _set_callback if DYNAMO else lambda callback: None


def not_alone(code: CodeType) -> None:
    """Let Dynamo not compile this code on its own; where it compiles the caller, it traces the code."""
    if DYNAMO:
        _skip(code)


def uncompiled(function: F) -> F:
    """A function that switches Dynamo off by `set_callback`; where it cannot, torch does it around each call."""
    if DYNAMO:
        return function
    disabled = functools.cache(lambda: torch.compiler.disable(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


@functools.cache
def _compiled_kind() -> type[torch.nn.Module]:
    return type(torch.compile(torch.nn.Identity(), backend="eager"))  # type: ignore[return-value]


def compiled_from(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model of which `torch.compile` has made this one; `None` of any other module."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        return None
    kind = _compiled_kind()
    return next(module.children(), None) if kind is not torch.nn.Identity and is_a(module, kind) else None


# -- tracers ------------------------------------------------------------------------------------------------------


def _asks_fx() -> Callable[[], bool]:
    tracer: Any = importlib.import_module("torch.fx._symbolic_trace")
    # Later versions warn in the second one, which torch 2.6 alone has.
    return getattr(tracer, "is_fx_symbolic_tracing", None) or tracer.is_fx_tracing  # type: ignore[no-any-return]


_fx_traces = find(
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing",
    "leave tracers of torch.fx alone",
    "make_fx on a compressed model, which has to be decompressed before",
    look=_asks_fx,
)


def written_down(args: Any, kwargs: Any) -> bool:
    """Whether a module's call is written down to be run elsewhere: by `torch.jit.trace`, ONNX or `torch.fx`."""
    if torch.jit.is_tracing():
        return True
    if _fx_traces is not None:
        return bool(_fx_traces())
    return any(is_a(x, Proxy) for x in (*args, *(kwargs or {}).values()))
