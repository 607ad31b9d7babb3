"""What one operation keeps for its backward pass.

A residual is asked for as little as its user needs: a linear layer takes `outer`, which never rebuilds N x D.
Its tensors travel through `save_for_backward`, so that torch frees them with the graph and notices changes in place;
the rest of it, its description, is an attribute of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit.codec import Packed, decode, ops
from dibit.codec.seed_stream import Key
from dibit.config import Sample
from dibit.recompute.program import Program, Shared
from dibit.residuals.constant_csr import Graph
from dibit.residuals.exact import Exact, Narrowed, bind, outer
from dibit.residuals.gradient_norms import GradientNormObserver

# Whether the backward pass that runs leaves what was saved for another one.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class Residual(Protocol):
    """What all kinds have in common."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""

    @property
    def how(self) -> str:
        """For the ledger: in what form the tensor is kept."""

    def bind(self, tensors: Sequence[Tensor]) -> Residual:
        """The same residual on tensors that come back from autograd (an empty sequence: its description alone)."""

    def value(self) -> Tensor:
        """The tensor, or an unbiased estimate of it, in its own shape and dtype."""

    def outer(self, dy: Tensor) -> Tensor:
        """dY^T X, or an unbiased estimate: (O, D) for dy (N, O) and x (N, D), of the dtype of dy or a wider one."""


@dataclass(frozen=True)
class Reference:
    """Kept by someone else (features, parameters): exact, and free.

    Attributes:
        used: called when a backward pass reads it.
    """

    x: Tensor | None
    shape: torch.Size
    used: Callable[[], None] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.x is None else (self.x,)

    how = "reference"

    def bind(self, tensors: Sequence[Tensor]) -> Reference:
        return Reference(tensors[0] if tensors else None, self.shape, self.used)

    def value(self) -> Tensor:
        assert self.x is not None
        if self.used is not None:
            self.used()
        return self.x

    def outer(self, dy: Tensor) -> Tensor:
        return outer(self.value(), dy)


@dataclass(frozen=True)
class Compressed:
    """Reduced, quantised and packed by the codec.

    Attributes:
        watch: measures the gradients that it is multiplied with, where the next step's rows depend on them.
        key: of it among the residuals of a pass, the same in the next pass.
        module: whose operation keeps it.
        drawn: key of the pass, which is told when the backward pass comes to it.
    """

    packed: Packed
    watch: GradientNormObserver | None = None
    key: str = ""
    module: str = ""
    drawn: Key | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed.tensors

    @property
    def how(self) -> str:
        config = self.packed.config
        reduce = f", {type(config.reduce).__name__.lower()} 1/{config.reduce.ratio}" if config.reduce else ""
        if isinstance(config.reduce, Sample):
            if self.packed.scores is not None:
                reduce += f" by {config.reduce.by}" if config.reduce.ratio > 1 else " of the loss's"
            if config.reduce.ratio > self.packed.rows:
                reduce += f" (one row of {self.packed.rows})"
        return f"{config.bits} bit, block {config.block}{reduce}"

    def bind(self, tensors: Sequence[Tensor]) -> Compressed:
        packed = self.packed.with_tensors(tuple(tensors)) if tensors else self.packed.without_tensors()
        return replace(self, packed=packed)

    def value(self) -> Tensor:
        if self.drawn is not None:
            self.drawn.used()
        return decode(self.packed)

    def outer(self, dy: Tensor) -> Tensor:
        packed = self.packed
        if self.drawn is not None:
            self.drawn.used()
        if self.watch is not None:
            self.watch.observe(dy)
        # sums, and weights that may go beyond float16's largest number
        dtype = torch.float32 if dy.dtype in HALF else dy.dtype
        grad = packed.outer(dy, packed.sample(dtype))
        p = packed.projection(dtype)
        return grad if p is None else grad @ p.T

    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of an element-wise operation whose derivative this is."""
        return grad * self.value().to(grad.dtype)


@dataclass(frozen=True)
class Mask:
    """One bit an element, exact: where a gradient passes, and by how much it is scaled where it does not."""

    bits: Tensor
    slope: float
    how = "1-bit mask"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bits,)

    def bind(self, tensors: Sequence[Tensor]) -> Mask:
        return Mask(tensors[0] if tensors else torch.empty(0), self.slope)

    def apply(self, grad: Tensor) -> Tensor:
        return ops.apply_mask(grad.contiguous(), self.bits, self.slope)

    def value(self) -> Tensor:
        raise TypeError("a mask stands for no tensor: use apply(grad).")

    def outer(self, dy: Tensor) -> Tensor:
        raise TypeError("a mask stands for no tensor: use apply(grad).")


@dataclass(frozen=True)
class Reseeded:
    """Dropout: nothing but the seed, and the source where the dropped tensor itself is asked for."""

    seed: Tensor
    p: float
    source: Tensor | None = None
    how = "seed"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.seed,) if self.source is None else (self.seed, self.source)

    def bind(self, tensors: Sequence[Tensor]) -> Reseeded:
        seed, *source = tensors or (torch.empty(0),)
        return Reseeded(seed, self.p, source[0] if source else None)

    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of dropout: the mask is drawn again."""
        return ops.dropout(grad.contiguous(), self.seed, self.p)

    def value(self) -> Tensor:
        assert self.source is not None
        return ops.dropout(self.source.contiguous(), self.seed, self.p)

    def outer(self, dy: Tensor) -> Tensor:
        return outer(self.value(), dy)


@dataclass(frozen=True)
class Lossless:
    """Exact, in the fewest bytes of its own."""

    form: Exact | Narrowed

    @property
    def how(self) -> str:
        return self.form.how

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.form.x,)

    def bind(self, tensors: Sequence[Tensor]) -> Lossless:
        return Lossless(*bind((self.form,), tensors))

    def value(self) -> Tensor:
        return self.form.restore()

    def outer(self, dy: Tensor) -> Tensor:
        return outer(self.value(), dy)


@dataclass(frozen=True)
class Gathered:
    """`x[index]`, a view or an expansion of a smaller tensor, by what is kept of that: linear, so unbiased."""

    source: Residual
    leaves: tuple[Exact | Narrowed, ...]
    program: Program
    shared: Shared

    @property
    def how(self) -> str:
        return f"gathered from {self.source.how}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *(leaf.x for leaf in self.leaves))

    def bind(self, tensors: Sequence[Tensor]) -> Gathered:
        count = max(0, len(tensors) - len(self.leaves))  # a description alone may not know how many it has
        return replace(self, source=self.source.bind(tensors[:count]), leaves=bind(self.leaves, tensors[count:]))

    def value(self) -> Tensor:
        return self.program.run([self.source.value(), *(leaf.restore() for leaf in self.leaves)], self.shared)

    def outer(self, dy: Tensor) -> Tensor:
        return outer(self.value(), dy)


@dataclass(frozen=True)
class Normed:
    """The result of a norm, estimated from what it keeps of its normalised input: x_hat * weight + bias.

    For leaves alone: the norm's own backward pass uses the same draw, but all that multiplies a leaf comes from later
    operations, so the product is unbiased.
    """

    source: Compressed
    weight: Tensor | None
    bias: Tensor | None
    key: str = ""
    how = "codes of the norm"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *(x for x in (self.weight, self.bias) if x is not None))

    def bind(self, tensors: Sequence[Tensor]) -> Normed:
        rest = list(tensors[len(self.source.tensors) :])
        weight, bias = (
            None if x is None else rest.pop(0) if rest else torch.empty(0) for x in (self.weight, self.bias)
        )
        return Normed(self.source.bind(tensors[: len(self.source.tensors)]), weight, bias, self.key)

    def value(self) -> Tensor:
        y = self.source.value()
        if self.weight is not None:
            y *= self.weight
        return y if self.bias is None else y.add_(self.bias)

    def outer(self, dy: Tensor) -> Tensor:
        return _outer_by_parts(self, dy)


@dataclass(frozen=True)
class Passed:
    """What ReLU or dropout make of a tensor, by what is kept of it and by their own mask: linear, so unbiased."""

    source: Normed | Passed
    mask: Mask | Reseeded
    scale: float = 1.0
    key: str = ""
    how = "codes of the norm"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *self.mask.tensors)

    def bind(self, tensors: Sequence[Tensor]) -> Passed:
        count = len(self.source.tensors)
        return replace(self, source=self.source.bind(tensors[:count]), mask=self.mask.bind(tensors[count:]))

    def value(self) -> Tensor:
        source, mask = self.source, self.mask
        if isinstance(mask, Reseeded) and isinstance(source, Passed) and source.plain:  # in one pass
            assert isinstance(source.mask, Mask)
            return ops.relu_dropout_gradient(source.source.value(), source.mask.bits, mask.seed, mask.p)
        y = mask.apply(source.value())
        return y if self.scale == 1 else y.mul_(self.scale)

    @property
    def _chain(self) -> tuple[Normed, Mask | None, Reseeded | None] | None:
        """The norm, a ReLU and dropout, where there is nothing else and they come in this order."""
        drop = self.mask if isinstance(self.mask, Reseeded) else None
        relu = self.source if drop is not None else self
        if isinstance(relu, Normed):
            return relu, None, drop
        if isinstance(relu.source, Normed) and isinstance(relu.mask, Mask) and relu.scale == self.scale == 1:
            return relu.source, relu.mask, drop
        return None

    @property
    def plain(self) -> bool:
        """Whether the mask is a ReLU's."""
        return isinstance(self.mask, Mask) and self.mask.slope == 0 and self.scale == 1

    def outer(self, dy: Tensor) -> Tensor:
        return _outer_by_parts(self, dy)


def parts(kept: Residual) -> Iterator[tuple[slice, Tensor]]:
    """An estimate of what is kept, (..., D) as rows (N, D), part by part: on a CPU no tensor of full size is made."""
    chain = (kept, None, None) if isinstance(kept, Normed) else kept._chain if isinstance(kept, Passed) else None
    if chain is None or not chain[0].source.packed.plain_rows:
        x = kept.value()
        x = x.reshape(-1, x.shape[-1])
        yield slice(0, x.shape[0]), x
        return
    norm, relu, drop = chain
    packed, source = norm.source.packed, norm.source
    if source.drawn is not None:
        source.drawn.used()
    width, dtype = packed.width, packed.dtype
    weight, bias = (
        packed.codes.new_full((width,), fill, dtype=dtype) if given is None else given.detach().to(dtype).reshape(-1)
        for given, fill in ((norm.weight, 1.0), (norm.bias, 0.0))
    )
    bits, slope = (None, 0.0) if relu is None else (relu.bits, relu.slope)
    seed, p = (None, 0.0) if drop is None else (drop.seed, drop.p)
    for start, stop in packed.parts():
        yield slice(start, stop), ops.passed_rows(
            packed.codes, packed.ranges, packed.seed, weight, bias, bits, slope, seed, p, start, stop, packed.rows,
            packed.config.bits, packed.block, packed.dither,
        )  # fmt: skip


def _outer_by_parts(kept: Residual, dy: Tensor) -> Tensor:
    """dY^T X, (O, D), for dy (N, O)."""
    grad: Tensor | None = None
    for rows, x in parts(kept):
        if grad is None:
            grad = outer(x, dy[rows])
        else:
            grad.addmm_(dy[rows].T, x.to(dy.dtype))
    assert grad is not None
    return grad


@dataclass(frozen=True)
class Aggregated:
    """A x of a constant graph, by what is kept of x: (A x)^T dY = x^T (A^T dY) needs no aggregate."""

    graph: Graph
    source: Residual
    how = "aggregate of the source"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.graph.parts, *self.source.tensors)

    def bind(self, tensors: Sequence[Tensor]) -> Aggregated:
        return Aggregated(self.graph.bind(tensors[:3]), self.source.bind(tensors[3:]))

    def value(self) -> Tensor:
        return self.graph.product(self.source.value())

    def outer(self, dy: Tensor) -> Tensor:
        return self.source.outer(self.graph.transposed_product(dy))


def save(ctx: Any, *parts: Residual | Tensor | None) -> None:
    """Keep residuals and tensors for the backward pass of an `autograd.Function`; `load` gives them back in order."""
    tensors: list[Tensor] = []
    layout: list[tuple[Residual | None, int]] = []
    for part in parts:
        if part is None:
            layout.append((None, 0))
        elif isinstance(part, Tensor):
            tensors.append(part)
            layout.append((None, 1))
        else:
            tensors += part.tensors
            layout.append((part.bind(()), len(part.tensors)))
    ctx.layout = layout
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> list[Any]:
    """What `save` kept: residuals on the tensors that autograd held, tensors, `None`.

    The backward pass has come to them: the pass's key is told.
    """
    tensors = ctx.saved_tensors
    found: list[Any] = []
    at = 0
    for residual, count in released(ctx, "layout"):
        held, at = tensors[at : at + count], at + count
        if isinstance(residual, Compressed) and residual.drawn is not None:
            residual.drawn.used()
        found.append(residual.bind(held) if residual is not None else held[0] if count else None)
    return found


def released(ctx: Any, attribute: str) -> Any:
    """An attribute of a context, which goes when autograd frees what it has saved: the graph itself may live on."""
    value = getattr(ctx, attribute)
    if value is None:
        raise RuntimeError(
            "the backward pass came through this graph a second time, after what it needs was freed; say "
            "backward(retain_graph=True) the first time."
        )
    if not keeps_graph():
        setattr(ctx, attribute, None)
    return value
