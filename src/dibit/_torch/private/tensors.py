"""Tensors and the memory they lie in: identity, weak references, who else holds it, and which tensors have none."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from dibit._torch.private.registry import find
from dibit._torch.user_objects import attributes, defines, is_a, static

_SLOWER = "time, and a Ctrl-C that comes while one of torch's own weak references dies"
_cdata = find("torch.UntypedStorage._cdata", "tell memory apart", _SLOWER)
_weak_ref = find("torch.UntypedStorage._weak_ref", "hold memory weakly", _SLOWER)
_free_weak_ref = find("torch.UntypedStorage._free_weak_ref", "let go of memory that was held weakly", _SLOWER)
_new_with_weak_ptr = find(
    "torch.UntypedStorage._new_with_weak_ptr",
    "look at memory that is held weakly",
    "memory: tensors whose content is compared in the backward pass are held until then",
)
_POINTERS = None not in (_cdata, _weak_ref, _free_weak_ref)
_StorageWeakRef = find(
    "torch.multiprocessing.reductions.StorageWeakRef", "hold memory weakly without those three", needed=not _POINTERS
)
_LOOKS = _POINTERS and _new_with_weak_ptr is not None

if _POINTERS:

    def storage_key(x: Tensor) -> int:
        """Identity of a live storage. Only valid while the tensor is held, or an `Alive` holds its storage weakly."""
        return x.untyped_storage()._cdata

else:

    def storage_key(x: Tensor) -> int:
        return _StorageWeakRef(x.untyped_storage()).cdata  # type: ignore[no-any-return]


class Alive:
    """Weak references to storages: their memory may go, their identities are not given out again while this lives.

    One object for all of them: torch's own `StorageWeakRef` runs Python code when it dies, thousands of times a step,
    and a Ctrl-C that arrives there is lost.
    """

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}

    if _POINTERS:

        def hold(self, x: Tensor) -> int:
            """Hold the storage of a strided tensor weakly; its identity."""
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._references:
                self._references[key] = storage._weak_ref()
            return key

        def clear(self) -> None:
            while self._references:
                _free_weak_ref(self._references.popitem()[1])

    else:

        def hold(self, x: Tensor) -> int:
            reference = _StorageWeakRef(x.untyped_storage())
            self._references.setdefault(reference.cdata, reference)
            return reference.cdata  # type: ignore[no-any-return]

        def clear(self) -> None:
            self._references.clear()

    def __del__(self) -> None:
        self.clear()

    def __reduce__(self) -> Any:
        return Alive, ()  # a copy holds nothing


class Weak:
    """A strided tensor's memory, held weakly: as long as anybody has any tensor on it."""

    _reference: Any = None  # Ctrl-C may come before there is one

    def __init__(self, x: Tensor) -> None:
        self._held = None if _LOOKS else x.detach()
        self._reference = x.untyped_storage()._weak_ref() if _LOOKS else None
        self._geometry = x.storage_offset(), x.shape, x.stride()
        self._like = x.dtype, x.device
        self._conj, self._neg = x.is_conj(), x.is_neg()

    def tensor(self) -> Tensor | None:
        """A tensor of the same content, `None` where the memory is gone."""
        if not _LOOKS:
            return self._held
        storage = _new_with_weak_ptr(self._reference)
        if storage is None:
            return None
        dtype, device = self._like
        x = torch.empty(0, dtype=dtype, device=device).set_(storage, *self._geometry)  # type: ignore[call-overload]
        x = x.neg() if self._neg else x
        return x.conj() if self._conj else x

    def __del__(self) -> None:
        if self._reference is not None:
            _free_weak_ref(self._reference)


# -- counters and views -------------------------------------------------------------------------------------------

find("torch.Tensor._version", "notice that a tensor is written to", needed=True)
find("torch.Tensor._base", "tell whose memory a view shows", needed=True)


def version(x: Tensor) -> int:
    """The version counter of a tensor's storage; 0 for one made in `inference_mode`, which has none."""
    return 0 if x.is_inference() else x._version


def base_of(x: Tensor) -> Tensor:
    """What x is a view of, or x."""
    base = x._base
    return x if base is None else base


def is_view(x: Tensor) -> bool:
    return x._base is not None


# -- who else holds a tensor --------------------------------------------------------------------------------------

_storage_use_count = find(
    "torch._C._storage_Use_Count",
    "count the tensors on the same memory",
    "memory: copies of small tensors that somebody else might hold; sums are not written over temporaries",
    since="2.8",
)
_use_count = find("torch.Tensor._use_count", "tell temporaries apart", "memory: sums are not written over temporaries")
COUNTS_USES = _POINTERS and None not in (_storage_use_count, _use_count)  # whether `held_once` can tell


def holders(x: Tensor) -> int | None:
    """How many tensors (and NumPy arrays and the like, each by a tensor of its own) hold the memory of a strided one.

    `None` where this version of torch cannot tell.
    """
    if _storage_use_count is None or not _POINTERS:
        return None
    storage = x.untyped_storage()
    return int(_storage_use_count(storage._cdata)) - 1  # less Python's own object for the storage


def held_once(x: Tensor) -> bool:
    """Whether no other tensor, and nothing of autograd's, holds x or its memory (asked where `COUNTS_USES`)."""
    storage = x.untyped_storage()  # itself the second reference
    return x._use_count() == 1 and _storage_use_count(storage._cdata) == 2  # type: ignore[attr-defined,no-any-return]


_backward_hooks = find(
    "torch.Tensor._backward_hooks",
    "see that the gradient of an intermediate result is asked for",
    "memory: aggregates that go into a linear layer are kept; sums are not written over temporaries",
)

if _backward_hooks is not None:

    def gradient_asked(x: Tensor) -> bool:
        """Whether somebody asks for the gradient of x: by a hook, or by `retain_grad`."""
        return bool(x._backward_hooks) or x.retains_grad

else:

    def gradient_asked(x: Tensor) -> bool:
        return True


# -- tensors of other kinds ---------------------------------------------------------------------------------------

_wrapped = find(
    "torch._C._functorch.is_functorch_wrapped_tensor", "tell tensors inside a transform of torch.func apart", "time"
)
_fake = find("torch._subclasses.fake_tensor.FakeTensor", "tell tensors without values apart")
_lazy = find("torch.nn.parameter.is_lazy", "tell parameters without a shape apart")
_coo = None not in (
    find("torch.Tensor._indices", "read sparse tensors in coordinate form that are not coalesced"),
    find("torch.Tensor._values", "read sparse tensors in coordinate form that are not coalesced"),
)
# Of a tensor that Python has let go of and C++ has not, and that comes back.
TensorWeakRef: Any = find("torch.utils.weak.TensorWeakRef", "hold tensors weakly") or weakref.ref


def _has_no_address(x: Tensor) -> bool:
    if x.layout != torch.strided:
        return False
    try:
        x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return True
    return False


is_wrapped: Any = _has_no_address if _wrapped is None else _wrapped  # a tensor of torch.func's, without memory


def is_fake(x: Tensor) -> bool:
    """Whether x has no values: it stands for a tensor while something is traced."""
    if _fake is not None:
        return issubclass(type(x), _fake)
    return any(kind.__name__ == "FakeTensor" for kind in type(x).__mro__)


def _uninitialised(x: Any) -> bool:
    return isinstance(x, (UninitializedParameter, UninitializedBuffer))


is_lazy: Any = _uninitialised if _lazy is None else _lazy  # a parameter or buffer that has no shape yet


def coo_parts(x: Tensor) -> list[Tensor]:
    """Indices and values of a sparse tensor in coordinate form; none where torch does not give them."""
    if _coo:
        return [x._indices(), x._values()]
    return [x.indices(), x.values()] if x.is_coalesced() else []


_flattens = find("torch.utils._python_dispatch.is_traceable_wrapper_subclass", "see the tensors inside an EdgeIndex")


def flattened(x: Tensor) -> list[Tensor]:
    """The tensors that one of a subclass is around: as it tells the compiler, or all that are attributes of it.

    Raises:
        Exception: whatever the subclass raises.
    """
    if not defines(x, "__tensor_flatten__"):
        return []
    if _flattens is None:
        return [value for value in attributes(x).values() if is_a(value, Tensor)]
    return [getattr(x, name) for name in x.__tensor_flatten__()[0]]  # type: ignore[attr-defined]


# The attributes of a storage of torch_sparse. Its public methods would run code, and make what is not there yet.
_PARTS = "_row", "_rowptr", "_col", "_value", "_rowcount", "_colptr", "_colcount", "_csr2csc", "_csc2csr"


def scripted(value: Any) -> list[Tensor]:
    """The tensors in a `torch_sparse.SparseTensor` that TorchScript has made, which shows no attributes of its own.

    Empty where they have other names: then nobody knows that the caller holds them, and they are kept once more.
    """
    if not str(static(type(value), "__module__")).startswith("torch"):
        return []
    try:
        parts: list[Any] = [getattr(value.storage, name, None) for name in _PARTS]
    except Exception:  # it has no storage
        return []
    return [part for part in parts if is_a(part, Tensor)]


# -- tensors without memory ---------------------------------------------------------------------------------------

_make_wrapper = find(
    "torch.Tensor._make_wrapper_subclass",
    "have tensors that are made when they are needed",
    "time and memory: node features are gathered by edges",
)
_natively = find(
    "torch._C.DisableTorchFunction",
    "ask such a tensor for its shape",
    "time and memory: node features are gathered by edges",
)
DEFERS = None not in (_make_wrapper, _natively)


def without_memory(kind: type[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A contiguous tensor of a subclass that has a shape and no memory (where `DEFERS`)."""
    return _make_wrapper(kind, shape, dtype=dtype, device=device)


def natively(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function past all function modes and subclasses (where `DEFERS`)."""
    with _natively():
        return function(*args, **kwargs)
