"""Element-wise functions y = f(x) keep their *derivative* f'(x), computed exactly in the forward pass.

dx = dy f'(x) then has one estimate in it, to the first power, so that its mean is exact. From a rounded x there is no
unbiased f'(x): differentiating GELU, a sigmoid or 1/x where x was decoded has a bias.

`elementwise` makes the rules of such a function, for eager and for compiled code, from the function and its derivative.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit._torch.private.frames import calling_module
from dibit._torch.spellings import torch_functions
from dibit.config import Config
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import Rule
from dibit.residuals.base import Residual, load, save
from dibit.residuals.masks import Mask
from dibit.rules.common import MIN_ELEMENTS, eight_bit, first_order, is_plain_float, without_reduction
from dibit.rules.registry import rule
from dibit.rules.relative import keep_relative, relative, saturating
from dibit.rules.returned import Slope

# How a derivative is kept, by what it is like.
RECIPE = "recipe"  # bounded: at the recipe's bits
SATURATING = "saturating"  # from 0 to about 1, mostly near 1, but small ones may meet a logarithm: 4 bits, relative
RELATIVE = "relative"  # positive, and small ones do meet a logarithm: 8 bits, relative
EIGHT_BIT = "eight_bit"  # bounded, but what follows may multiply it by large numbers: 8 bits
MEASURED = "measured"  # unbounded: 8 bits, relative over the octaves that its elements take, and a sign

# The codecs; that of `MEASURED` follows the numbers, which a compiled graph cannot ask for.
CODECS: dict[str, Callable[[Config], Config]] = {
    RECIPE: without_reduction,
    SATURATING: lambda config: relative(config, saturating(config)),
    RELATIVE: relative,
    EIGHT_BIT: eight_bit,
}


class Elementwise(torch.autograd.Function):
    """dx = dy * f'(x), from an exact mask of a piecewise linear f or from the kept derivative of a smooth one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plain: Callable[[Tensor], Tensor], slope: Mask | Residual | Slope, inplace: bool
    ) -> Tensor:
        ctx.hops = 0
        ctx.cell = None
        if isinstance(slope, Slope):
            ctx.cell = slope
        else:
            save(ctx, slope)
        if inplace:
            ctx.mark_dirty(x)
        return plain(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        slope = ctx.cell or load(ctx)[0]
        return slope.apply(dy), None, None, None


class Pointwise:
    """An element-wise function and its derivative.

    Args:
        plain: the function of (x, *options), a new tensor.
        derivative: exact, of (x, *options), where plain torch keeps x.
        of_result: exact, of (y, *options), where plain torch keeps y: in place if there is a `derivative`, else always.
            The arguments of either after the first are the function's options, by name and with their defaults.
        codec: how the derivative is kept: `RECIPE`, `SATURATING`, `RELATIVE`, `EIGHT_BIT` or `MEASURED`.
        in_place: the function of (x, *options), written over x; `None` where torch has none.
        uses: how many residuals, those of later operations included, are not needed if x can be computed again.
        beside: a function of x, the bytes that plain torch keeps in addition: a buffer, or intermediate results.
        in_vectors: the last bit of a result may depend on where the element lies in the tensor, because torch's
            vectorised loop and the scalar loop for the last elements differ.

    Raises:
        ValueError: the codec is unknown, or neither derivative is given.
    """

    def __init__(
        self,
        plain: Callable[..., Tensor],
        derivative: Callable[..., Tensor] | None,
        of_result: Callable[..., Tensor] | None,
        codec: str,
        in_place: Callable[..., Tensor] | None,
        uses: int = 1,
        beside: Callable[[Tensor], int] | None = None,
        in_vectors: bool = True,
    ) -> None:
        if codec not in (*CODECS, MEASURED):
            raise ValueError(f"codec = {codec!r} was given; choose one of {', '.join((*CODECS, MEASURED))}.")
        if derivative is None and of_result is None:
            raise ValueError("neither a derivative nor of_result was given; an element-wise rule needs one of them.")
        self.beside, self.in_vectors = beside, in_vectors
        self.plain, self.derivative, self.of_result = plain, derivative, of_result
        self.codec, self.in_place, self.uses = codec, in_place, uses
        self.options = _options(of_result if derivative is None else derivative)

    def arguments(self, args: Any, kwargs: Any) -> tuple[list[Any], bool] | None:
        """The options in a call, and whether it works in place; `None` for a call that no rule is for."""
        names = [*self.options, "inplace"]
        given = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
        if given.pop("out", None) is not None or len(args) > len(names):
            return None
        inplace = bool(given.pop("inplace", False))
        options = [given.pop(name, default) for name, default in self.options.items()]
        for value in options:
            if value is inspect.Parameter.empty or isinstance(value, (Tensor, complex)):
                return None  # a tensor would need a gradient of its own
        return None if given or (inplace and self.in_place is None) else (options, inplace)

    def slope(self, z: Tensor, options: Any, of_result: bool) -> Tensor:
        """The derivative by x, or by y; but for the recipe's bits in single precision at least."""
        slope = self.of_result if of_result else self.derivative
        assert slope is not None
        return slope(z if self.codec == RECIPE else at_least_single(z), *options)

    def keep(self, forward: ForwardPass, slope: Tensor, config: Config) -> Any:
        """A residual of the derivative; `None` where it is not finite and its codec needs that."""
        if self.codec == MEASURED:
            return keep_relative(forward, slope)
        if self.codec == EIGHT_BIT:
            return forward.keep(slope, leaf=False, config=config) if slope.isfinite().all() else None
        return forward.keep_factor(slope, config)


def _options(function: Any) -> dict[str, Any]:
    """Names and defaults of a function's arguments after the first."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # one of torch's own
        return {}
    return {p.name: p.default for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}


POINTWISE: dict[str, Pointwise] = {}


def elementwise(
    name: str,
    plain: Callable[..., Tensor],
    derivative: Callable[..., Tensor] | None = None,
    of_result: Callable[..., Tensor] | None = None,
    *,
    codec: str,
    uses: int = 1,
    beside: Callable[[Tensor], int] | None = None,
    in_vectors: bool = True,
    **traits: Any,
) -> Rule:
    """Register an element-wise function: its rule, and what compiled code makes of it.

    Args:
        name: of the function, by which `torch.name`, `Tensor.name`, `F.name` and the same with `name_` are found.
        plain, derivative, of_result, codec, uses, beside, in_vectors: see `Pointwise`.
        traits: of the function, see `dibit.rules.registry.rule`.

    Raises:
        ValueError: torch has no function of this name; see `Pointwise`, too.
    """
    if not torch_functions(name):
        raise ValueError(
            f"torch has no function {name!r}; expected a name in torch, torch.Tensor or torch.nn.functional."
        )
    in_place = _in_place(name, plain)
    f = POINTWISE[name] = Pointwise(plain, derivative, of_result, codec, in_place, uses, beside, in_vectors)
    made = elementwise_rule(f)
    # a pickle finds the rule by its module and its name there, `exp` or `abs_`; without a module's name, by a search
    made.__module__ = calling_module()  # type: ignore[assignment]
    made.__qualname__ = made.__name__ = f"{name}_" if hasattr(builtins, name) else name
    return rule(name, in_place=in_place is not None, saves_result=derivative is None, in_its_row=True, **traits)(made)


def _in_place(name: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    for owner in (torch, Tensor, F):
        if (found := getattr(owner, f"{name}_", None)) is not None:
            return found  # type: ignore[no-any-return]
    has_option = isinstance(plain, FunctionType) and "inplace" in inspect.signature(plain).parameters
    return functools.partial(plain, inplace=True) if has_option else None


def elementwise_rule(f: Pointwise) -> Rule:
    """The rule of an element-wise function in eager code."""

    def apply(forward: ForwardPass, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        found, config = f.arguments(args, kwargs), forward.config
        if found is None or config is None or not is_plain_float(input) or not input.requires_grad:
            return NotImplemented
        (options, inplace), config = found, CODECS.get(f.codec, eight_bit)(config)
        if input.numel() < MIN_ELEMENTS:
            return NotImplemented
        if f.codec != RECIPE and not inplace and forward.cheaper_exact(input, config, uses=f.uses):
            return NotImplemented  # torch's own operation: its input can be computed again for less than the codes
        x, y = input.detach(), None
        of_result = f.of_result is not None and (inplace or f.derivative is None)
        if of_result or (f.codec in (EIGHT_BIT, MEASURED) and not inplace):
            y = f.plain(x, *options)
            if y.dtype != x.dtype:
                return NotImplemented  # autocast runs something inside the function in another dtype
        kept = f.keep(forward, f.slope(x if y is None or not of_result else y, options, of_result), config)
        if kept is None:
            return NotImplemented
        if inplace:
            compute: Any = lambda x: f.in_place(x, *options)  # type: ignore[misc]  # noqa: E731
        else:
            compute = lambda x: f.plain(x, *options) if y is None else y  # noqa: E731
        if not of_result:
            more = f.beside(x) if f.beside is not None else None
            forward.plain(x.nbytes if inplace else input, more)  # in place, torch keeps a copy
            return Elementwise.apply(input, compute, kept, inplace)
        cell = Slope(forward, kept, lambda y: f.slope(y, options, True))
        result = Elementwise.apply(input, compute, cell, inplace)
        cell.watch(result)
        forward.plain(result)
        return result

    return apply
