"""Tensors whose shape, strides, storage or values cannot be asked for: where plain torch trains, Dibit does too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dibit

N, D = 400, 16


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Refuses(Tensor):
    """A subclass that answers torch's own functions alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("untyped_storage", "stride", "storage_offset", "data_ptr"):
            raise RuntimeError("no memory here")
        return super().__torch_function__(func, types, args, kwargs or {})


def emptied(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


def of_a_transform(x: Tensor) -> Tensor:
    """A wrapper that outlives the transform that made it."""
    found: list[Tensor] = []
    torch.vmap(lambda row: found.append(row) or row)(x)  # type: ignore[func-returns-value]
    return found[0]


def nested(layout: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nested.nested_tensor([x[:150], x[150:]], layout=layout)


# By kind: how N x D numbers become such a tensor, and how they are read from it again (`None`: they cannot be).
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    "nested": (nested(torch.strided), lambda t: torch.cat(t.unbind())),
    "jagged": (nested(torch.jagged), lambda t: torch.cat(t.unbind())),
    "mkldnn": (Tensor.to_mkldnn, Tensor.to_dense),
    "coo": (Tensor.to_sparse, Tensor.to_dense),
    "csr": (Tensor.to_sparse_csr, Tensor.to_dense),
    "csc": (Tensor.to_sparse_csc, Tensor.to_dense),
    "bsr": (lambda x: x.to_sparse_bsr((4, 4)), Tensor.to_dense),
    "bsc": (lambda x: x.to_sparse_bsc((4, 4)), Tensor.to_dense),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.05, 10, torch.quint8), Tensor.dequantize),
    "quantised by channel": (
        lambda x: torch.quantize_per_channel(x, torch.full((D,), 0.05), torch.zeros(D), 1, torch.qint8),
        Tensor.dequantize,
    ),
    "conjugate": (lambda x: torch.complex(x, x + 1).conj(), lambda t: torch.view_as_real(t.resolve_conj()).sum(-1)),
    "negative": (lambda x: torch.complex(x, x).conj().imag, lambda t: t * 2),
    "real part": (lambda x: torch.complex(x, x).real, lambda t: t * 2),
    "no elements": (lambda x: x[:0], lambda t: t.sum(0).expand(N, D)),
    "no memory": (emptied, None),
    "fake": (fake, None),
    "of a transform": (of_a_transform, None),
    "meta": (lambda x: x.to("meta"), None),
    "subclass": (lambda x: x.as_subclass(Refuses), lambda t: t.as_subclass(Tensor)),
    "inference": (torch.inference_mode()(lambda x: x * 1), lambda t: t * 1),  # type: ignore[no-untyped-call]
}
PLACES = ("argument", "in a list", "buffer", "attribute", "in a tuple", "made", "made of an activation", "returned")


OPERATIONS: dict[str, Callable[[Tensor, nn.Linear], Any]] = {
    "linear": lambda t, lin: lin(t),
    "product": lambda t, lin: t @ lin.weight,
    "relu": lambda t, lin: F.relu(t),
    "gelu": lambda t, lin: F.gelu(t),
    "dropout": lambda t, lin: F.dropout(t, 0.0),
    "sigmoid": lambda t, lin: t.sigmoid(),
    "norm": lambda t, lin: F.layer_norm(t, (D,), lin.bias),
    "softmax": lambda t, lin: t.softmax(-1),
    "twice": lambda t, lin: t + t,
    "square": lambda t, lin: t * t,
    "scaled": lambda t, lin: t * lin.bias,
    "exp": lambda t, lin: torch.exp(t),
    "sum": lambda t, lin: t.sum(),
    "copy": lambda t, lin: t.clone(),
    "in place": lambda t, lin: t.clone().mul_(2),
    "rows": lambda t, lin: t[torch.arange(5)],
    "a view": lambda t, lin: t.transpose(0, 1),
    "cat": lambda t, lin: torch.cat([t, t]),
    "loss": lambda t, lin: F.mse_loss(t, t * 2),
}
# Operations of which torch has a forward pass and no backward pass, and those that read memory that is not there.
REFUSED = {"mkldnn": {"sigmoid", "softmax"}, "coo": {"scaled", "cat"}, "bsr": {"linear", "product"}}
REFUSED |= {name: set(OPERATIONS) for name in ("no memory", "of a transform")}
REFUSED["inference"] = {"linear", "product", "norm", "scaled"}  # a weight's gradient is made of it
NO_GRADIENT = ("csc", "bsr", "bsc")


class Net(nn.Module):
    def __init__(self, kind: str, place: str) -> None:
        super().__init__()
        self.done: list[str] = []
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.kind, (self.make, self.back) = kind, KINDS[kind]
        self.place = place
        if place == "buffer":
            self.register_buffer("t", self.make(numbers(N, D)), persistent=False)
        elif place in ("attribute", "in a tuple"):
            vars(self)["t"] = self.make(numbers(N, D)) if place == "attribute" else (self.make(numbers(N, D)),)

    def forward(self, x: Tensor, given: Any = None) -> Any:
        h = F.gelu(self.first(x))
        if self.place in ("buffer", "attribute", "in a tuple"):
            given = self.t
        elif self.place == "made of an activation":
            given = self.make(h)
        elif self.place in ("made", "returned"):
            given = self.make(numbers(N, D))
        given = given[0] if isinstance(given, list | tuple) else given
        if self.back is not None:
            t = self.back(given)
            h = h + F.gelu(self.second(t)) * t.sigmoid() + t.detach() * h
        h = h + sum(self.tried(given)) / 100
        y = self.last(F.relu(h))
        return (y, given) if self.place == "returned" else y

    def tried(self, given: Tensor) -> Iterator[Any]:
        """Numbers from what torch can do with it."""
        refused = REFUSED.get(self.kind, set())
        if self.kind in NO_GRADIENT and given.requires_grad:
            return
        for name, operation in OPERATIONS.items():
            if name in refused:
                continue
            try:
                result = operation(given, self.second)
                number = torch.zeros(()) if self.back is None else self.back(result).tanh().mean()
                yield number.as_subclass(Tensor).nan_to_num()
                self.done.append(name)
            except Exception:
                self.done.append(f"no {name}")


def outcome(model: nn.Module, kind: str, place: str) -> Any:
    """The output and the gradients of two steps; the error of what plain torch refuses."""
    given = {"argument": lambda t: (t,), "in a list": lambda t: ([t],)}.get(place, lambda t: ())
    x, found = numbers(N, D), []
    try:
        for _ in range(2):
            model.zero_grad()
            y = model(x, *given(KINDS[kind][0](numbers(N, D))))
            y = y[0] if isinstance(y, tuple) else y
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    except Exception as error:
        return error
    return found


@pytest.mark.parametrize("recipe", [None, "default", "exact", dibit.Config(bits=8)], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_trains_where_plain_torch_does(kind: str, place: str, recipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Net(kind, place).train()
        model = Net(kind, place).train()
        model.load_state_dict(plain.state_dict())
        expected = outcome(plain, kind, place)
        dibit.compress(model, recipe)
        with dibit.track(model):
            found = outcome(model, kind, place)
    if isinstance(expected, Exception):
        assert type(found) is type(expected)
        return
    assert not isinstance(found, Exception), found
    assert model.done == plain.done
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert len(ours) == len(theirs)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            if recipe is None or isinstance(recipe, dibit.Config):
                assert (a - b).norm() <= (1e-5 if recipe is None else 0.1) * b.norm()


@pytest.mark.parametrize("kind", ["nested", "jagged", "conjugate", "subclass"])
@pytest.mark.parametrize("recipe", ["default", "exact"])
def test_as_the_input_of_a_whole_model(kind: str, recipe: str) -> None:
    dtype = torch.cfloat if kind == "conjugate" else torch.float32
    plain = nn.Sequential(nn.Linear(D, D, dtype=dtype), nn.Linear(D, 4, dtype=dtype)).train()
    model, results = dibit.compress(copy.deepcopy(plain), recipe), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for net in (plain, model):
            y = net(KINDS[kind][0](numbers(N, D)))
            parts = y.unbind() if "ed" in kind else [y]
            sum(part.abs().sum() for part in parts).as_subclass(Tensor).backward()  # type: ignore[union-attr]
            results.append([p.grad for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class Both(nn.Module):
    """Numbers and their conjugates, and their imaginary parts: one memory, two contents."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D, dtype=torch.cfloat)
        self.a, self.b = (nn.Parameter(torch.randn(D, dtype=torch.cfloat)) for _ in range(2))
        self.register_buffer("c", torch.complex(numbers(N, D), numbers(N, D) + 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.lin(x)
        both = (z * self.a).abs() + (z.conj() * self.b).abs() + (z * self.c).abs() + (z * self.c.conj()).abs()
        return both.sum() + (z.imag * z.conj().imag).sum() + (z.conj()[3:] * self.b).abs().sum()


@pytest.mark.parametrize("recipe", [None, dibit.Config(bits=8)], ids=str)
def test_a_view_that_is_conjugate_or_negative_is_another_tensor(recipe: Any) -> None:
    plain, x = Both().train(), torch.complex(numbers(N, D), numbers(N, D))
    model = dibit.compress(copy.deepcopy(plain), recipe)
    for _ in range(3):
        for net in (plain, model):
            net.zero_grad()
            net(x).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert (p.grad - q.grad).norm() <= 0.02 * p.grad.norm()
