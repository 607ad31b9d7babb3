"""No code of the user's runs because Dibit looks: modules, inputs and outputs may raise from whatever is read."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dibit
from dibit.engine.holdings import tensors_in

N, D = 300, 16


class Touched(BaseException):
    """Not to be caught by accident."""


def touched(*_: Any, **__: Any) -> Any:
    raise Touched


class Lazy(types.ModuleType):
    """A module whose optional dependency is missing."""

    def __getattr__(self, name: str) -> Any:
        raise Touched


class Descriptor:
    def __get__(self, instance: Any, owner: Any) -> Any:
        raise Touched


class Proxy:
    """Answers whatever it is asked with an error, its class included, as a context-local proxy outside its context."""

    __class__ = property(touched)  # type: ignore[assignment]
    __dict__ = property(touched)  # type: ignore[assignment]
    __getattr__ = touched


class Slots:
    __slots__ = ("x",)
    __getattr__ = touched


class Attributes:
    storage = property(touched)
    to_torch_sparse_csr_tensor = Descriptor()

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def __getattribute__(self, name: str) -> Any:
        raise Touched


class List(list[Any]):
    __iter__ = touched
    __len__ = touched


class Dict(dict[str, Any]):
    values = touched
    __iter__ = touched
    __getitem__ = touched


class Loads(UserDict[str, Any]):
    """Reads a file for each value."""

    def __getitem__(self, key: str) -> Any:
        raise Touched


class OfAMapping(Mapping[str, Any]):
    """One that has neither attributes nor values."""

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("closed")

    def __len__(self) -> int:
        return 1


class Subclass(Tensor):
    """Cannot be flattened, though it says so."""

    def __tensor_flatten__(self) -> Any:
        raise RuntimeError("not now")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        raise Touched if name in ("__module__", "forward", "__init__", "message") else AttributeError(name)


class OfAMetaclass(metaclass=Meta):
    pass


OBJECTS: dict[str, Callable[[], Any]] = {
    "module": lambda: Lazy("lazy"),
    "proxy": Proxy,
    "slots": Slots,
    "attributes": Attributes,
    "list": lambda: List([torch.ones(2)]),
    "dict": lambda: Dict(x=torch.ones(2)),
    "user dict": lambda: Loads(x=torch.ones(2)),
    "mapping": OfAMapping,
    "tensor": lambda: torch.ones(2).as_subclass(Subclass),
    "metaclass": OfAMetaclass,
    "function": lambda: touched,
    "class": lambda: Attributes,
}
UNREAD: dict[str, Any] = {"lazy": Lazy("lazy"), "proxy": Proxy(), "wrapped": nn.Linear(D, D).forward}


class Reads(nn.Module):
    """Names what must not be looked at, in code that does not run."""

    descriptor = Descriptor()
    prop = property(touched)
    __prepare_scriptable__ = Descriptor()

    def __init__(self, given: Any = UNREAD["proxy"]) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.ever = False

    def forward(self, x: Tensor, *others: Any) -> Any:
        if self.ever:
            return lazy.kernel(x), proxy.kernel(x), wrapped.kernel(x), self.descriptor, self.prop, self.kernel  # noqa: F821
        return self.lin(x).relu()


# With globals of its own: pytest reads those of this file.
Reads.forward = types.FunctionType(Reads.forward.__code__, globals() | UNREAD)  # type: ignore[method-assign]


class Returns(Reads):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x), others


def runs(model: nn.Module, *others: Any) -> None:
    y = dibit.compress(model, "default")(torch.randn(N, D), *others)
    (y if isinstance(y, Tensor) else y[0]).sum().backward()
    with dibit.track(model) as saved:
        y = model(torch.randn(N, D), *others)
    assert any("bit" in row.how for row in saved.rows)
    dibit.decompress(model)


def test_what_a_forward_pass_names_is_not_read() -> None:
    runs(Reads())


@pytest.mark.parametrize("name", OBJECTS)
def test_arguments_and_results_are_not_read(name: str) -> None:
    value = OBJECTS[name]()
    runs(Returns(), value, [value], {"a": (value,)})


@pytest.mark.parametrize("name", OBJECTS)
def test_attributes_of_modules_are_not_read(name: str) -> None:
    model = Reads()
    for attribute, value in (("a", OBJECTS[name]()), ("b", [OBJECTS[name]()]), ("c", (OBJECTS[name](),))):
        vars(model)[attribute] = value
    runs(model)


@pytest.mark.parametrize("name", ["proxy", "slots", "attributes", "metaclass"])
def test_hooks_and_defaults_are_not_read(name: str) -> None:
    hook = OBJECTS[name]()
    type.__setattr__(type(hook), "__call__", lambda *args: None)
    model = Reads()
    vars(model)["_forward_pre_hooks"][123456] = hook
    runs(model)
    assert vars(model)["_forward_pre_hooks"][123456] is hook


@pytest.mark.parametrize("name", ["attributes", "list", "dict", "user dict"])
def test_their_tensors_are_found_all_the_same(name: str) -> None:
    assert len(list(tensors_in(((OBJECTS[name](),), {})))) == 1


@pytest.mark.parametrize(
    ("storage", "count"),
    [({"_row": torch.ones(1), "_value": None, "_colcount": torch.ones(1)}, 2), ({"row_": torch.ones(1)}, 0), (None, 0)],
    ids=["as it is", "of another version", "none"],
)
def test_tensors_of_a_scripted_sparse_tensor_are_found(storage: dict[str, Any] | None, count: int) -> None:
    """It has no `__dict__`; torch-sparse itself is needed to make one."""
    kind = type("SparseTensor", (), {"__slots__": ("storage",), "__module__": "torch_sparse.tensor"})
    value: Any = kind()
    if storage is not None:
        value.storage = types.SimpleNamespace(**storage)
    assert len(list(tensors_in([value]))) == count


@pytest.mark.parametrize("kind", ["partial", "static", "property", "wrapped"])
def test_a_request_for_a_gradient_is_found_behind_wrappers(kind: str) -> None:
    import functools

    from dibit.hooks.inner_gradients import asks

    def force(self: Any, x: Tensor) -> Tensor:
        return torch.autograd.grad(x.sum(), x)[0]

    def around(*args: Any) -> Any:
        return force(*args)

    made = {
        "partial": functools.partialmethod(force),
        "static": staticmethod(force),
        "property": property(force),  # type: ignore[arg-type]
        "wrapped": functools.wraps(force)(around),
    }[kind]
    model = type("Asks", (nn.Module,), {"force": made, "forward": lambda self, x: self.force})()
    assert asks(model)
