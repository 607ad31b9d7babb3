"""The table: each function of torch that has a rule. One file a family of operations.

A rule takes the `Step` and the function's own arguments. It computes the plain forward, keeps a residual, and returns
the result; or it returns `NotImplemented`, and the function runs as it is, kept exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.functions import activation, aggregate, dropout, linear, loss, norm
from dibit.intercept import Rule

RULES: Mapping[Any, Rule] = {
    F.linear: linear.linear,
    torch.matmul: aggregate.matmul,
    Tensor.matmul: aggregate.matmul,
    Tensor.__matmul__: aggregate.matmul,
    Tensor.__rmatmul__: linear.rmatmul,
    torch.mm: aggregate.matmul,
    Tensor.mm: aggregate.matmul,
    torch.addmm: aggregate.addmm,
    Tensor.addmm: aggregate.addmm,
    torch.sparse.mm: aggregate.sparse_mm,
    Tensor.scatter_reduce_: aggregate.scatter_reduce_,
    F.relu: activation.relu,
    F.relu_: activation.relu_,
    torch.relu: activation.relu,
    torch.relu_: activation.relu_,
    Tensor.relu: activation.relu,
    Tensor.relu_: activation.relu_,
    F.leaky_relu: activation.leaky_relu,
    F.leaky_relu_: activation.leaky_relu_,
    F.prelu: activation.prelu,
    torch.prelu: activation.prelu,
    Tensor.prelu: activation.prelu,
    F.elu: activation.elu,
    F.elu_: activation.elu_,
    F.gelu: activation.gelu,
    F.silu: activation.silu,
    torch.sigmoid: activation.sigmoid,
    torch.sigmoid_: activation.sigmoid_,
    Tensor.sigmoid: activation.sigmoid,
    Tensor.sigmoid_: activation.sigmoid_,
    torch.tanh: activation.tanh,
    torch.tanh_: activation.tanh_,
    Tensor.tanh: activation.tanh,
    Tensor.tanh_: activation.tanh_,
    F.dropout: dropout.dropout,
    torch.dropout: dropout.torch_dropout,
    torch.dropout_: dropout.torch_dropout_,
    F.batch_norm: norm.batch_norm,
    torch.batch_norm: norm.torch_batch_norm,
    F.layer_norm: norm.layer_norm,
    torch.layer_norm: norm.layer_norm,
    F.log_softmax: loss.log_softmax,
    torch.log_softmax: loss.torch_log_softmax,
    Tensor.log_softmax: loss.torch_log_softmax,
    F.cross_entropy: loss.cross_entropy,
    F.nll_loss: loss.nll_loss,
    F.mse_loss: loss.mse_loss,
    F.binary_cross_entropy_with_logits: loss.binary_cross_entropy_with_logits,
}
