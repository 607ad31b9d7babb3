"""A gather that has not been made: a tensor with a shape, a dtype and a place in autograd's graph, and without memory.

Dibit's own functions read what it stands for (`PendingCall`). Everything else makes it: functions of torch that the
mode sees (`dibit.edges.functions`), those that it does not see by `Deferred.__torch_function__`, and code of C++ by
`Deferred.__torch_dispatch__`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.tensors import natively, without_memory
from dibit._torch.spellings import torch_functions
from dibit._torch.storage_identity import storage_key, version

Run = Callable[[Any, Any, Any], Any]
# A function and its arguments; calls may be among them.
Call = tuple[Any, tuple[Any, ...]]


class GradientPath:
    """What to run again if the backward pass reaches the deferred tensor itself. Held by its node in autograd's graph.

    Attributes:
        call: the call to run again; `None` as long as no gradient can arrive.
        roots: the tensors that the call starts from.
        versions: of all tensors in the call.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.roots: tuple[Tensor, ...] = ()
        self.versions: list[int] = []

    def secure(self, storage: int) -> None:
        """Somebody is about to write to this storage: what the call reads of it becomes a copy."""
        if self.call is None or not any(storage_key(x) == storage for x in _tensors(self.call)):
            return
        copies: dict[int, Tensor] = {}

        def own(x: Any) -> Any:
            if type(x) is tuple:
                return x[0], tuple(map(own, x[1]))
            if not isinstance(x, Tensor) or storage_key(x) != storage:
                return x
            return copies.setdefault(id(x), x.detach().clone().requires_grad_(x.requires_grad))

        self.call, self.roots = own(self.call), tuple(map(own, self.roots))
        self.versions = [version(x) for x in _tensors(self.call)]


class PendingCall:
    """What a deferred tensor stands for.

    Attributes:
        function, args: the call of torch that makes it; deferred tensors may be among the arguments.
        roots: the tensors that it is made of, which are not deferred, each once.
        run: runs a call as the pass does.
        value: the result of the call; `None` as long as it was not needed.
        used: a sum was computed without the result, so that a gradient may bypass it.
        counted: it is in the ledger as something that plain torch keeps.
        program: it is a part of a program (`dibit.edges.programs`); `shape`: that of its result.
        lossless: the recipe of its module keeps no rounded residual.
        size: of the program, in calls, each as often as it is used.
        again: called if the tensor is needed after its sum was computed without it.
    """

    def __init__(self, function: Any, args: tuple[Any, ...], roots: tuple[Tensor, ...], run: Run) -> None:
        self.function, self.args, self.run = function, args, run
        self.roots = tuple({id(root): root for root in roots}.values())
        self.value: Tensor | None = None
        self.path = GradientPath()
        self.used = self.making = self.counted = self.program = self.lossless = False
        self.size: int = 1 + sum(x.pending.size for x in args if type(x) is Deferred)
        self.shape: tuple[int, ...] = ()
        self.again: Callable[[], None] | None = None
        self.dependents: list[weakref.ref[PendingCall]] = []
        self._versions = [(x, version(x)) for x in args if isinstance(x, Tensor) and type(x) is not Deferred]
        for x in args:
            if type(x) is Deferred:
                x.pending.dependents.append(weakref.ref(self))

    def lost(self) -> bool:
        """Whether code that Dibit does not see, such as TorchScript, has written to what the call reads."""
        own = (x.pending for x in self.args if type(x) is Deferred)
        return self.value is None and (any(x.lost() for x in own) or any(version(x) != at for x, at in self._versions))

    def check(self) -> None:
        """Check that what the call reads has not changed since the call was recorded.

        Raises:
            RuntimeError: it has.
        """
        if self.lost():
            raise RuntimeError(
                "node features, edges or weights were changed after a gather had read them and before it was used, by "
                "code that Dibit does not see, such as a TorchScript function or another thread; leave that module "
                "uncompressed."
            )

    def make(self) -> Tensor:
        """Run the call, at most once, with gradients recorded as where the call was made; returns its result."""
        if self.value is None:
            self.check()
            self.making = True
            if self.used and self.again is not None:
                self.again()
            for x in self.args:
                if self.used and type(x) is Deferred:
                    x.pending.again = None  # made for this alone
            with torch.enable_grad():
                self.value = self.run(self.function, materialized(self.args), {})
            for reference in self.dependents:  # whoever gets the value may write to it
                if (dependent := reference()) is not None and not dependent.making:
                    dependent.make()
        return self.value

    def make_below(self) -> Tensor:
        """The same below autograd."""
        if self.value is None:
            self.check()
            self.value = natively(self.function, materialized(self.args, below=True), {})  # else it is deferred again
        self.remember()
        return self.value

    def remember(self) -> None:
        """Prepare for a gradient of the deferred tensor itself, which code that reads it below autograd may send."""
        if self.path.call is None:
            self.path.call, self.path.roots = self.whole(), self.roots
            self.path.versions = [version(x) for x in _tensors(self.path.call)]

    def whole(self) -> Call:
        """The call, with the calls that make its arguments."""
        return self.function, tuple(x.pending.whole() if type(x) is Deferred else x for x in self.args)


class Deferred(Tensor):
    """A tensor without memory that stands for the result of `pending`; made by `defer`."""

    pending: PendingCall

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            return natively(func, args, kwargs or {})
        return func(*materialized(args), **materialized(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*materialized(args, below=True), **materialized(kwargs or {}, below=True))


class Defer(torch.autograd.Function):
    """The place of a deferred tensor in autograd's graph. Only what Dibit does not see sends a gradient here."""

    @staticmethod
    def forward(ctx: Any, pending: PendingCall, shape: torch.Size, like: Tensor, *roots: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.path, ctx.needed = pending.path, [root.requires_grad for root in roots]
        return _wrapper(pending, shape, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        none = (None,) * 3
        if grad is None:
            return *none, *(None for _ in ctx.needed)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "node features that were gathered by edges were handed to somebody else's function, and have no second "
                "derivatives, but create_graph=True asks for them; leave that module uncompressed."
            )
        found = iter(_again(ctx.path, grad))
        return *none, *(next(found) if needed else None for needed in ctx.needed)


def _again(path: GradientPath, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the roots that need one, by running the call again."""
    if path.call is None:
        raise RuntimeError(
            "a gradient arrived at gathered node features that no function of torch has used; use them through "
            "functions of torch, or leave that module uncompressed."
        )
    if path.versions != [version(x) for x in _tensors(path.call)]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            "that was gathered by edges."
        )
    with torch.enable_grad():
        leaves = {id(x): x.detach().requires_grad_(x.requires_grad) for x in path.roots}
        value = _run_again(path.call, leaves)
        wanted = [leaves[id(x)] for x in path.roots if x.requires_grad]
        return torch.autograd.grad(value, wanted, grad, allow_unused=True)


def _run_again(call: Call, leaves: dict[int, Tensor]) -> Tensor:
    function, args = call
    given = [_run_again(x, leaves) if type(x) is tuple else leaves.get(id(x), x) for x in args]
    return natively(function, given, {})  # type: ignore[no-any-return]


def _tensors(call: Call) -> list[Tensor]:
    """All tensors in a call."""
    nested = [_tensors(x) if type(x) is tuple else [x] for x in call[1]]
    return [x for part in nested for x in part if isinstance(x, Tensor)]


class Reveal(torch.autograd.Function):
    """Connects the content of a deferred tensor to its node in autograd's graph, so that gradients pass through it."""

    @staticmethod
    def forward(ctx: Any, deferred: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


def _wrapper(pending: PendingCall, shape: torch.Size, like: Tensor) -> Deferred:
    made: Deferred = without_memory(Deferred, shape, like.dtype, like.device)
    made.pending = pending
    return made


def defer(pending: PendingCall, shape: torch.Size, like: Tensor) -> Deferred:
    """A deferred tensor of this shape, with the dtype and device of another."""
    if torch.is_grad_enabled() and any(root.requires_grad for root in pending.roots):
        return Defer.apply(pending, shape, like.detach(), *pending.roots)
    return _wrapper(pending, shape, like)


def watch(deferred: Deferred) -> None:
    """Somebody asks for the gradient of a deferred tensor itself: from now on all goes through its node.

    Raises:
        RuntimeError: a sum has gone past it already.
    """
    pending = deferred.pending
    if pending.used:
        raise RuntimeError(
            "the gradient of node features that were gathered by edges was asked for after they had been summed up; "
            "ask right after the gather (register_hook or retain_grad), or leave that module uncompressed."
        )
    value = pending.make()
    if value.requires_grad:
        pending.remember()
        with torch.enable_grad():
            pending.value = Reveal.apply(deferred, value.detach())


def materialized(value: Any, below: bool = False) -> Any:
    """Arguments with deferred tensors made; `below` autograd, within a kernel."""
    if type(value) is Deferred:
        return value.pending.make_below().detach() if below else _materialized(value)
    if type(value) in (tuple, list):
        return type(value)(materialized(item, below) for item in value)
    if type(value) is dict:
        return {name: materialized(item, below) for name, item in value.items()}
    return value


def _materialized(deferred: Deferred) -> Tensor:
    """What it stands for, with a gradient also where it was made below autograd."""
    pending = deferred.pending
    value = pending.make()
    if natively(_REQUIRES_GRAD, (deferred,), {}):
        if not torch.is_grad_enabled():
            pending.remember()  # somebody's own Function may be running
        if not value.requires_grad:
            with torch.enable_grad():
                pending.value = value = Reveal.apply(deferred, value)
    return value


def first_deferred(args: Any, kwargs: Any = None) -> Deferred | None:
    """The first deferred tensor among arguments, or in a list among them."""
    for x in args:
        if type(x) is Deferred:
            return x
        if type(x) in (tuple, list):
            for item in x:
                if type(item) is Deferred:
                    return item
    return None if not kwargs else first_deferred(tuple(kwargs.values()))


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cpu is_cuda is_sparse is_quantized is_meta "
    "is_nested is_mkldnn itemsize nbytes"
)
_METHODS = "size dim numel element_size is_floating_point is_complex is_contiguous stride __len__"
# What can be asked of a tensor without reading its elements.
METADATA = torch_functions(_METHODS) | {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}
# Functions that ask for the gradient of a tensor.
ASKS_GRADIENT = frozenset((Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook))
