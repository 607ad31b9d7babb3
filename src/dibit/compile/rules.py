"""What compiled code does with each function of torch: `rule(mode, ...)`, or `NotImplemented` to leave it to torch.

Functions and their spellings are those of `dibit.rules`. docs/compile.md lists the ones that are missing here, and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dibit._torch.private import operations
from dibit.compile import autograd, edge_rules, ops
from dibit.rules.elementwise import CODECS, POINTWISE, Pointwise
from dibit.rules.norm import FEW_POSITIONS, rows_of_one
from dibit.rules.registry import table


def traceable_float(x: Any) -> bool:
    """What `dibit.rules.common.is_plain_float` asks, as far as Dynamo can trace it."""
    plain = isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter)
    return plain and x.layout == torch.strided and x.is_floating_point()


def next_index(mode: Any, count: int = 1) -> int:
    """The number of a new residual; `count` of them are taken."""
    first: int = mode.draws
    mode.draws = first + count
    return first


def index_for(mode: Any, x: Tensor) -> int:
    """The same number for the same input of several linear layers: one call, and so one residual."""
    for own, number in mode.inputs:
        if x is own:
            return int(number)
    number = next_index(mode)
    mode.inputs.append((x, number))
    return number


def dropped(mode: Any, x: Tensor) -> Any:
    """Source, number and probability of an x that is the dropout of what the caller holds."""
    for own, source, number, p in mode.dropped:
        if x is own:
            return source, number, p
    return None


def held(mode: Any, x: Tensor) -> bool:
    """Whether the caller keeps x: an input of the model, or a parameter."""
    if isinstance(x, nn.Parameter):
        return True
    for own in mode.held:  # noqa: SIM110 (a generator is not traced)
        if x is own:
            return True
    return False


def linear(mode: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _product(mode, input, weight, bias, False)


def matmul(mode: Any, input: Tensor, other: Tensor, *, out: Any = None) -> Any:
    return NotImplemented if out is not None else _product(mode, input, other, None, True)


def addmm(
    mode: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Any:
    if out is not None or not _weighs(mat1, mat2) or not traceable_float(input):
        return NotImplemented
    if mode.settings[-1].by_reference and held(mode, mat1):
        return NotImplemented
    if input is mat1:
        input = input.view_as(input)  # Dynamo takes no tensor twice
    text = mode.settings[-1].text
    return autograd.AddMM.apply(mat1, mat2, input, beta, alpha, mode.key, index_for(mode, mat1), text)


def _weighs(x: Any, weight: Any) -> bool:
    """Whether this is a product of an activation with a weight that has a gradient: a frozen one keeps no input."""
    if not (isinstance(weight, nn.Parameter) and weight.requires_grad and weight.dim() == 2):
        return False
    return traceable_float(weight) and traceable_float(x) and x.dim() >= 2


def _product(mode: Any, x: Any, weight: Any, bias: Any, product: bool) -> Any:
    if not _weighs(x, weight):
        return NotImplemented
    if mode.settings[-1].by_reference:
        if held(mode, x):
            return NotImplemented  # the caller keeps it: exact, and free
        found = dropped(mode, x)
        if found is not None and not product:
            return autograd.DroppedLinear.apply(x, weight, bias, found[0], mode.key, found[1], found[2])
    return autograd.Linear.apply(x, weight, bias, product, mode.key, index_for(mode, x), mode.settings[-1].text)


def relu(mode: Any, input: Tensor, inplace: bool = False) -> Any:
    if not _differs(input):
        return NotImplemented
    return _placed(input, autograd.ReLU.apply(input), inplace)


def leaky_relu(mode: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not _differs(input) or negative_slope < 0:
        return NotImplemented
    return _placed(input, autograd.LeakyReLU.apply(input, negative_slope), inplace)


def prelu(mode: Any, input: Tensor, weight: Tensor) -> Any:
    if not _differs(input) or input.dim() < 2 or not traceable_float(weight) or not weight.requires_grad:
        return NotImplemented
    return autograd.PReLU.apply(input, weight, mode.key, next_index(mode), mode.settings[-1].text)


def _differs(x: Any) -> bool:
    return traceable_float(x) and x.requires_grad and x.dim() > 0


def _placed(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return x.copy_(y) if inplace else y


def elementwise_rule(f: Pointwise) -> Any:
    """The rule of an element-wise function in compiled code."""
    of_result = f.derivative is None

    def apply(mode: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = f.arguments(args, kwargs)
        if found is None or not _differs(input):
            return NotImplemented
        options, inplace = found
        text = mode.settings[-1].text
        number = next_index(mode)
        y = autograd.Elementwise.apply(input, f.plain, f.slope, of_result, options, mode.key, number, text, f.codec)
        return _placed(input, y, inplace)

    return apply


def dropout(mode: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1 or not traceable_float(input) or not input.dim():
        return NotImplemented
    if mode.settings[-1].masked:
        if not input.requires_grad or not operations.SHOWS_MASK:
            return NotImplemented
        return _placed(input, autograd.MaskedDropout.apply(input, p), inplace)
    number = next_index(mode)
    if input.requires_grad:
        return _placed(input, autograd.SeededDropout.apply(input, mode.key, number, p), inplace)
    y = ops.seeded_dropout(input, mode.key, number, p)
    if not inplace and held(mode, input):
        mode.dropped.append((y, input, number, p))
    return _placed(input, y, inplace)


def batch_norm(
    mode: Any,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training or not _differs(input) or input.dim() < 2 or input.numel() <= input.shape[1]:
        return NotImplemented
    setting = mode.settings[-1]
    return autograd.BatchNorm.apply(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        momentum,
        eps,
        setting.two[0],
        mode.key,
        next_index(mode, 2),
        setting.text,
    )


def instance_norm(
    mode: Any,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """InstanceNorm of one matrix (1, D, N) is BatchNorm of it, as `dibit.rules.norm.instance_norm` says."""
    if not traceable_float(input) or not rows_of_one(input) or input.shape[2] < FEW_POSITIONS:
        return NotImplemented
    if running_mean is not None and running_mean.dtype != input.dtype:
        return NotImplemented
    x = input.contiguous()  # as torch does, to the same bits
    return batch_norm(mode, x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def layer_norm(
    mode: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    if not _differs(input) or input.numel() == 0:
        return NotImplemented
    setting, shape = mode.settings[-1], list(normalized_shape)
    two = setting.two[1]
    return autograd.LayerNorm.apply(input, shape, weight, bias, eps, two, mode.key, next_index(mode, 2), setting.text)


# By name; `dibit.rules.registry` has the functions of each.
COMPILED: dict[str, Any] = {
    **{name: elementwise_rule(f) for name, f in POINTWISE.items() if f.codec in CODECS},
    "linear": linear,
    "matmul": matmul,
    "addmm": addmm,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "prelu": prelu,
    "dropout": dropout,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
}
RULES: dict[Any, Any] = edge_rules.RULES | table(COMPILED)
