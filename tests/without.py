"""Dibit where torch lacks one of its private APIs: a warm process that forks a child for each name it reads.

    python -m tests.without < names

The child hides the API, imports Dibit, puts the API back for torch's own use, and trains a small GraphSAGE beside the
plain one. The parent writes a line of JSON for each name: what the child found, or its traceback.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numba.core.dispatcher  # noqa: F401 - loaded once, for all children
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

NODES, WIDTH, CLASSES, STEPS = 120, 16, 5, 3
# Attributes of objects that torch makes later, what torch itself needs while Dibit is imported, and what is looked up
# only when it is used: these are switched off by the environment variable alone.
SWITCHED = {
    "pickle._Unpickler",
    "sys._getframe",
    "torch._C.PyTorchFileReader",
    "torch._C._autograd._KinetoEvent.nbytes",
    "numba.core.dispatcher.Dispatcher.stats",
    "torch._ops.OpOverload",
    "torch._ops.OpOverload._schema",
    "torch._ops.OpOverloadPacket",
    "torch.autograd.graph.Node._saved_dim",
    "torch.autograd.graph.Node._sequence_nr",
    "torch.autograd.graph.Node.name",
}
_TABLES = (
    "torch.nn.Module._forward_",
    "torch.nn.Module._modules",
)  # the tables of a module are attributes of its instances
# What an older torch has in the place of another: it is hidden with it.
OLDER = {
    "torch._C._dynamo.eval_frame.set_code_exec_strategy": "torch._C._dynamo.eval_frame.skip_code",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing": "torch.fx._symbolic_trace.is_fx_tracing",
}


class _Gone:
    """In the place of an attribute that a class inherits."""

    def __get__(self, *_: Any) -> Any:
        raise AttributeError


@contextlib.contextmanager
def _unmade(owner: Any, attribute: str) -> Iterator[None]:
    """A block in which an object does not make an attribute when it is asked for it, as `torch.ops` makes operators."""
    kind, make = type(owner), type(owner).__getattr__

    def refuse(self: Any, name: str) -> Any:
        if self is owner and name == attribute:
            raise AttributeError(name)
        return make(self, name)

    vars(owner).pop(attribute, None)
    kind.__getattr__ = refuse
    try:
        yield
    finally:
        kind.__getattr__ = make


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """A block in which torch lacks an attribute, or what it is an attribute of."""
    path = name.split(".")
    owners = [importlib.import_module("torch")]
    for attribute in path[1:-1]:
        owners.append(getattr(owners[-1], attribute))
    if name.startswith("torch.ops."):
        with _unmade(owners[-1], path[-1]):
            yield
        return
    for owner, attribute in zip(reversed(owners), reversed(path), strict=False):
        own = vars(owner).get(attribute) if isinstance(owner, types.ModuleType | type) else None
        if own is None and isinstance(owner, types.ModuleType):  # this version of torch lacks it
            yield
            return
        try:
            if own is None:
                setattr(owner, attribute, _Gone())
            else:
                delattr(owner, attribute)
        except TypeError:
            continue  # a class of C++, which nobody can change
        try:
            yield
        finally:
            if own is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, own)
        return
    raise LookupError(f"{name} cannot be hidden")


class SAGE(nn.Module):
    """Two layers with BatchNorm and dropout, the mean and the largest of the neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = SAGEConv(WIDTH, 32), nn.BatchNorm1d(32)
        self.last = SAGEConv(32, CLASSES, aggr="max")

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x, edges)))
        return self.last(F.dropout(x, 0.5, self.training), edges)


def graphs() -> dict[str, Tensor]:
    """One graph in both of PyTorch Geometric's forms."""
    edges = torch.randint(NODES, (2, 6 * NODES), generator=torch.Generator().manual_seed(0)).unique(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = torch.sparse_coo_tensor(edges.flip(0), torch.ones(edges.shape[1]), (NODES, NODES)).to_sparse_csr()
    return {"edge_index": edges, "csr": matrix}


def step(model: nn.Module, x: Tensor, y: Tensor, edges: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The result of a forward pass and the gradients of the loss."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(x, edges)
    F.cross_entropy(out, y).backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def train(dibit: Any, edges: Tensor) -> dict[str, Any]:
    """Three steps of a compressed model; at each the plain one with the same weights and draws beside it."""
    torch.manual_seed(1)
    model, plain = SAGE(), SAGE()
    x, y = torch.randn(NODES, WIDTH), torch.randint(CLASSES, (NODES,))
    config = dibit.Config(bits=8, block=32, dropout="mask")
    dibit.compress(model, config)
    same, errors = True, []
    with dibit.track(model) as saved:
        for i in range(STEPS):
            plain.load_state_dict(model.state_dict())
            expected, exact = step(plain, x, y, edges, i)
            out, found = step(model, x, y, edges, i)
            same &= torch.equal(out, expected)
            noise = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
            errors.append(noise / sum(float(g.square().sum()) for g in exact))
            with torch.no_grad():
                for p, g in zip(model.parameters(), found, strict=True):
                    p -= 0.1 * g
    dibit.compress(model)  # the default recipe, with masks of Dibit's own
    finite = all(torch.isfinite(g).all() for g in step(model, x, y, edges, 0)[1])
    dibit.scores(model).state_dict()
    dibit.decompress(model)
    plain.load_state_dict(model.state_dict())
    same &= torch.equal(step(model, x, y, edges, 0)[0], step(plain, x, y, edges, 0)[0])
    return {"same": same, "errors": errors, "finite": finite, "saved": saved.total, "plain": saved.plain}


# -- what the training does not come to, by the end of a name -----------------------------------------------------


def _transforms(dibit: Any) -> None:
    from dibit._torch.storage_identity import strided

    seen: list[bool] = []
    torch.func.vmap(torch.func.grad(lambda x: (seen.append(strided(x)), (x * x).sum())[1]))(torch.randn(2, 3))
    assert seen == [False]
    assert strided(torch.randn(3))


def _forbidden(dibit: Any) -> None:
    from dibit.hooks.dropout_masks import hooks_free

    assert hooks_free()
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert not hooks_free()


def _foreign(dibit: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    from dibit.hooks.dropout_masks import hooks_free

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not hooks_free()
        with torch.autograd.graph.save_on_cpu():
            assert not hooks_free()
    assert hooks_free()
    model, x = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(64, WIDTH)
    model(x).sum().backward()
    expected = model[0].weight.grad
    model.zero_grad()
    checkpoint(dibit.compress(model, "iexact"), x, use_reentrant=False).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)  # in a checkpoint all is exact


def _asking(dibit: Any) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.lin(x))
            return torch.autograd.grad(y.sum(), self.lin.weight, create_graph=True)[0] + y.sum()

    with contextlib.suppress(RuntimeError):
        dibit.compress(Asks(), "iexact")(torch.randn(64, WIDTH))
        raise AssertionError("the gradient of compressed operations was given")


def _devices(dibit: Any) -> None:
    from dibit._torch.private.operations import assert_true

    assert_true(torch.tensor(True), "yes")
    with contextlib.suppress(RuntimeError):
        assert_true(torch.tensor(False), "no")
        raise AssertionError("it is false")


def _traced(dibit: Any) -> None:
    model = dibit.compress(nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 3)))
    outer = nn.Sequential(model, nn.Linear(3, 3))
    x = torch.randn(64, WIDTH)
    assert torch.equal(torch.fx.symbolic_trace(outer)(x), outer(x))


def _compiled(dibit: Any) -> None:
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    compiled, x = torch.compile(dibit.compress(model), backend="eager"), torch.randn(200, WIDTH)
    for each in (compiled, plain):
        each(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # nothing was compressed
    dibit.compress(plain)
    plain.zero_grad()
    plain(x).square().sum().backward()  # once Dynamo is there
    assert not torch.equal(plain[2].weight.grad, model[2].weight.grad)


def _looked_at(dibit: Any) -> None:
    from dibit._torch.storage_identity import Weak

    x = torch.arange(12).view(3, 4).T[1:]
    weak = Weak(x)
    x += 1
    assert torch.equal(weak.tensor(), x)


def _numbered(dibit: Any) -> None:
    from dibit._torch.private.autograd import next_sequence_number, sequence_number

    number, x = next_sequence_number(), torch.ones(1, requires_grad=True)
    assert sequence_number((x * 2).grad_fn) == number


def _sparse(dibit: Any) -> None:
    from dibit._torch.storage_identity import storages

    x = torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 2]]), torch.ones(2), (2, 3))
    assert storages(x) == []
    assert len(storages(x.coalesce())) == 2


def _measured(dibit: Any) -> None:
    from dibit.tools.memory import peak_bytes

    def work() -> Tensor:
        x = torch.ones(1000)
        y = x * 2
        del x
        return (y + 1).sum()

    assert 8000 <= peak_bytes(work) < 8100


def _archives(dibit: Any) -> None:
    import io
    import pickle

    from dibit.train.data.guard import arrays_only

    file = io.BytesIO()
    torch.save(torch.ones(3), file)
    file.seek(0)
    with contextlib.suppress(pickle.UnpicklingError), arrays_only():
        torch.load(file)
        raise AssertionError("it was read unchecked")


def _stack(dibit: Any) -> None:
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

    from dibit._torch.private.modes import may_have_mode, mode_count, pop_mode, push_mode

    first, second = TorchFunctionMode(), TorchFunctionMode()
    push_mode(first), push_mode(second)
    assert _get_current_function_mode_stack() == [first, second]
    assert may_have_mode(first)
    assert (pop_mode(), mode_count(), pop_mode(), mode_count()) == (second, 1, first, 0)


def _written(dibit: Any) -> None:
    from dibit._torch.private.operations import is_operator, writes_to

    x = torch.ones(1)
    for operator in (torch.ops.aten.add_.Tensor, torch.ops.aten.add_):
        assert is_operator(operator)
        assert any(part is x for part in writes_to(operator, (x, torch.zeros(1))))
    assert not any(map(is_operator, (torch.add, torch.Tensor.add, torch.Tensor.__add__, F.relu, torch.Tensor.relu_)))


def _slopes(dibit: Any) -> None:
    from dibit._torch.private import derivatives

    x = torch.linspace(-4, 4, 100).requires_grad_()
    for name in ("gelu", "silu", "mish", "hardswish", "elu"):
        (expected,) = torch.autograd.grad(getattr(F, name)(x).sum(), x)
        assert torch.allclose(getattr(derivatives, name)(x.detach()), expected, atol=1e-6)
    slope = derivatives.elu_of_result(F.elu(x.detach()))
    assert torch.allclose(slope, expected, atol=1e-6)
    layers = nn.Linear(WIDTH, 32), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ELU(inplace=True)
    dibit.compress(nn.Sequential(*layers, nn.Linear(32, 3)))(torch.randn(64, WIDTH)).sum().backward()


def _large(dibit: Any) -> None:
    from dibit.rules import large_outputs

    x, weight, bias, mean, var = torch.randn(1 << 14, 64), *torch.randn(3, 64), torch.rand(64)
    expected = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True)
    y, *statistics = large_outputs.batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    assert torch.equal(y, expected)
    for found, own in zip(statistics, (x.mean(0), x.var(0, correction=0).add(1e-5).rsqrt()), strict=True):
        assert torch.allclose(found, own, rtol=1e-5, atol=1e-6)


def _normalised(dibit: Any) -> None:
    from dibit._torch.private import operations

    x, weight, bias = torch.randn(64, 3, 8), *torch.randn(2, 3, 8)
    y, mean, inverse = operations.layer_norm(x, [3, 8], weight, bias, 1e-5)
    assert torch.equal(y, F.layer_norm(x, [3, 8], weight, bias))
    assert torch.allclose((x - mean) * inverse * weight + bias, y, atol=1e-5)
    _as_plain(dibit, nn.LayerNorm(32), lambda model: model)
    _as_plain(dibit, nn.LayerNorm(32), lambda model: torch.compile(model, backend="eager"))


def _batch_normalised(dibit: Any) -> None:
    _as_plain(dibit, nn.BatchNorm1d(32), lambda model: torch.compile(model, backend="eager"))


def _dropped(dibit: Any) -> None:
    from dibit._torch.private.operations import SHOWS_MASK
    from dibit.rules.dropout import dropout

    _as_plain(dibit, nn.Dropout(0.3), lambda model: torch.compile(model, backend="eager"))
    if not SHOWS_MASK:
        sources = types.SimpleNamespace(estimate=lambda x: None)
        forward = types.SimpleNamespace(config=dibit.Config(dropout="mask"), sources=sources)
        assert dropout(forward, torch.ones(64, 16, device="meta", requires_grad=True)) is NotImplemented


def _cast(dibit: Any) -> None:
    from dibit._torch.private.modes import autocast_caches, autocast_dtype, autocasts

    assert not autocasts("cpu")
    assert not autocasts("cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts("cpu")
        assert autocast_dtype("cpu") == torch.bfloat16
        assert autocast_caches()
        _as_plain(dibit, nn.ReLU(), lambda model: model, most=1e-3)


def _as_plain(dibit: Any, layer: nn.Module, made: Callable[[nn.Module], Any], most: float = 1e-4) -> None:
    """A compressed model with this layer gives the plain one's bits, and nearly its gradients, but not quite."""
    model = nn.Sequential(nn.Linear(WIDTH, 32), layer, nn.GELU(), nn.Linear(32, 3))
    plain, x = copy.deepcopy(model), torch.randn(200, WIDTH)
    results = []
    for each in (plain, made(dibit.compress(model, dibit.Config(bits=8, block=32, dropout="mask")))):
        torch.manual_seed(0)
        results.append(each(x))
        results[-1].square().sum().backward()
    assert torch.equal(*results)
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    noise = sum(float((p.grad - q.grad).square().sum()) for p, q in pairs)
    assert 0 < noise < most * sum(float(q.grad.square().sum()) for _, q in pairs)


def _reached(dibit: Any) -> None:
    x, y, matrix = torch.randn(NODES, WIDTH), torch.randint(CLASSES, (7,)), graphs()["csr"]
    model = dibit.compress(SAGE(), "iexact")
    for _ in range(3):
        with dibit.batch(model, loss_rows=torch.arange(7)):
            F.cross_entropy(model(x, matrix)[:7], y).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def _inside(dibit: Any) -> None:
    from torch_geometric import EdgeIndex

    from dibit.engine.holdings import tensors_in

    index = EdgeIndex(torch.tensor([[0, 1], [1, 0]]), sparse_size=(2, 2))
    held = {x.data_ptr() for x in tensors_in([index]) if type(x) is Tensor}
    assert index.as_tensor().data_ptr() in held


def _searched(dibit: Any) -> None:
    import pickle

    from dibit.rules import RULES

    assert pickle.loads(pickle.dumps(RULES[torch.exp])) is RULES[torch.exp]


def _pickles(dibit: Any) -> None:
    import pickle

    from dibit.train.data.guard import arrays_only

    content = pickle.dumps([1])
    with contextlib.suppress(pickle.UnpicklingError), arrays_only():
        pickle.loads(content)
        raise AssertionError("it was read unchecked")
    assert pickle.loads(content) == [1]


def _lazy(dibit: Any) -> None:
    model = dibit.compress(nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 3)))
    model(torch.randn(64, WIDTH)).sum().backward()


CHECKS: dict[str, Callable[[Any], None]] = {
    "is_functorch_wrapped_tensor": _transforms,
    "_top_saved_tensors_default_hooks": _foreign,
    "_saved_tensors_hooks_get_disabled_error_message": _forbidden,
    "_forward_cls": _asking,
    "_assert_async": _devices,
    "is_fx_symbolic_tracing": _traced,
    "set_code_exec_strategy": _compiled,
    "_new_with_weak_ptr": _looked_at,
    "_weak_ref": _looked_at,
    "_get_sequence_nr": _numbered,
    "_indices": _sparse,
    "nbytes": _measured,
    "PyTorchFileReader": _archives,
    "_push_mode": _stack,
    "_pop_mode": _stack,
    "_get_current_function_mode_stack": _stack,
    "_len_torch_function_stack": _stack,
    "_schema": _written,
    "OpOverload": _written,
    "OpOverloadPacket": _written,
    "gelu_backward": _slopes,
    "silu_backward": _slopes,
    "mish_backward": _slopes,
    "hardswish_backward": _slopes,
    "elu_backward": _slopes,
    "out": _large,
    "native_layer_norm": _normalised,
    "native_batch_norm": _batch_normalised,
    "native_dropout": _dropped,
    "is_autocast_enabled": _cast,
    "get_autocast_dtype": _cast,
    "is_autocast_cache_enabled": _cast,
    "name": _reached,
    "is_traceable_wrapper_subclass": _inside,
    "_getframe": _searched,
    "_Unpickler": _pickles,
    "is_lazy": _lazy,
}


def report(name: str) -> dict[str, Any]:
    """What happens without one API, or several with commas between; an empty name: with all of them."""
    switched = name in SWITCHED or name.startswith(_TABLES) or "," in name
    if switched:
        os.environ["DIBIT_WITHOUT"] = name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with contextlib.ExitStack() as stack:
            for each in (name, OLDER.get(name, "")):
                if each and not switched:
                    stack.enter_context(hidden(each))
            dibit = importlib.import_module("dibit")
        found = {form: train(dibit, edges) for form, edges in graphs().items()}
        check = CHECKS.get(name.rpartition(".")[2])
        if check is not None:
            check(dibit)
    from dibit._torch.private import APIS, USABLE

    lacking = [api.name for api in APIS.values() if not api.found]
    messages = [str(each.message) for each in said if str(each.message).startswith("dibit: torch ")]
    return {"runs": found, "warnings": messages, "missing": lacking, "usable": USABLE}


def main() -> None:
    torch.overrides.resolve_name(torch.add)  # torch looks all its functions up, private ones too, the first time
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                answer: dict[str, Any] = report(line.strip())
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            print(pipe.read() or json.dumps({"error": "the child has died"}), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
