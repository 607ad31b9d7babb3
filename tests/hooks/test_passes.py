"""Nothing of a compressed pass outlives it, however it ends."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

import dibit
from dibit.hooks import passes
from tests.marks import nothing_compressed

ERRORS = ValueError, RuntimeError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit


class Event:
    """Something that a model does in the middle of its pass."""

    def __init__(self) -> None:
        self.happens: Callable[[], Any] | None = None

    def __call__(self, *_: Any) -> None:
        if self.happens is not None:
            self.happens()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.event = Event()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), Calls(self.event))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.body(x)), -1)


class Calls(nn.Module):
    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event

    def forward(self, x: Tensor) -> Tensor:
        self.event()
        return x


def raises(error: type[BaseException]) -> Callable[[], None]:
    def happens() -> None:
        raise error

    return happens


def plain_gradient() -> Tensor:
    """Of a model in which a BatchNorm's weight and running variance are equal, but must not be shared."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    F.cross_entropy(net(torch.randn(500, 8)), torch.arange(500) % 3).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def assert_nothing_is_left() -> None:
    assert passes.running() is None
    assert not _get_current_function_mode_stack()
    assert passes.top_hooks() is None


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    assert_nothing_is_left()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["forward", "pre-hook", "early pre-hook", "hook", "child's hook"])
def test_an_exception_leaves_nothing_while_it_is_handled(error: type[BaseException], where: str) -> None:
    expected = plain_gradient()
    net = dibit.compress(Net())
    if where == "forward":
        net.event.happens = raises(error)
    elif "pre-hook" in where:
        net.register_forward_pre_hook(lambda *_: raises(error)(), prepend=where.startswith("early"))
    else:
        (net if where == "hook" else net.body[2]).register_forward_hook(lambda *_: raises(error)())
    with pytest.raises(error) as caught:
        net(torch.randn(50, 8))
    assert caught.tb is not None  # the traceback still holds every frame of the pass
    assert_nothing_is_left()
    torch.func.grad(lambda w: (w * w).sum())(torch.randn(3))
    assert torch.equal(plain_gradient(), expected)


@pytest.mark.slow
def test_ctrl_c_at_any_line_leaves_nothing() -> None:
    """A trace function raises at one line of the pass; those of Dibit that set and remove are tried one by one."""
    net, x = dibit.compress(Net()), torch.randn(40, 8)
    net(x)

    def run(at: int | None) -> int:
        seen = 0
        dibit.compress(net)  # anew, so that as many lines run each time: it is measured like a first pass

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            name = frame.f_code.co_filename
            if "dibit" not in name and "torch/overrides" not in name and "nn/modules/module" not in name:
                return None
            if event == "line":
                own = name.endswith(("passes.py", "modules.py")) or frame.f_code.co_name in ("_pop_mode", "_push_mode")
                # Python looks for signals where functions are called and loops go round, never at a bare `try`, nor
                # where a `with` block has ended and its lock is still held
                words = linecache.getline(name, frame.f_lineno).strip().partition(" ")[0]
                counts = (own or frame.f_lineno % 29 == 0) and words not in ("try:", "finally:", "with")
                seen += counts
                if counts and seen == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            net(x)
        finally:
            sys.settrace(None)
        return seen

    lines = run(None)
    assert lines > 150
    for at in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            run(at)
        assert_nothing_is_left()
    with dibit.track(net) as saved:
        net(x)
    assert saved.total < saved.plain


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_model_that_catches_goes_on_under_its_own_name_and_config(error: type[BaseException]) -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net()
            self.body.event.happens = raises(error)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(error):
                x = self.body(x)
            return F.gelu(x * 2)

    net, x = dibit.compress(Catches(), {"body": "default"}), torch.randn(300, 8, requires_grad=True)
    with dibit.track(net) as saved:
        net(x)
    assert [(row.module, row.how) for row in saved.rows if row.operation == "gelu"] == [("", "exact")]


@pytest.mark.parametrize("event", ["decompress", "compress again", "decompress a part", "hooks deleted"])
def test_hooks_that_go_in_the_middle_of_a_pass(event: str) -> None:
    expected = plain_gradient()
    net, x = dibit.compress(Net()), torch.randn(50, 8)
    plain = Net()
    plain.load_state_dict(net.state_dict())

    def deleted() -> None:
        for module in net.modules():
            module._forward_hooks.clear(), module._forward_pre_hooks.clear()

    net.event.happens = {
        "decompress": lambda: dibit.decompress(net),
        "compress again": lambda: dibit.compress(net, "exact"),
        "decompress a part": lambda: dibit.decompress(net.body),
        "hooks deleted": deleted,
    }[event]
    y = net(x)
    assert_nothing_is_left()
    assert torch.equal(y, plain(x))
    y.sum().backward()
    assert torch.equal(plain_gradient(), expected)


def test_what_the_model_itself_sets_stays_and_what_is_dibits_goes_from_under_it() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    mode, hooks = Mode(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    net = dibit.compress(Net())

    def happens() -> None:
        mode.__enter__()
        hooks.__enter__()

    net.event.happens = happens
    net(torch.randn(50, 8))
    try:
        assert _get_current_function_mode_stack() == [mode]
        assert passes.top_hooks()[0] is hooks.pack_hook
    finally:
        hooks.__exit__(), _pop_mode()


def test_a_pass_that_ends_while_another_thread_runs() -> None:
    inside, go = threading.Event(), threading.Event()
    slow, fast, x = dibit.compress(Net()), dibit.compress(Net()), torch.randn(50, 8)

    def wait() -> None:
        inside.set()
        go.wait()

    slow.event.happens = wait
    fast.event.happens = raises(KeyboardInterrupt)
    left: list[Any] = []

    def run() -> None:
        slow(x).sum().backward()
        left.extend([passes.running(), passes.top_hooks(), *_get_current_function_mode_stack()])

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    with pytest.raises(KeyboardInterrupt):
        fast(x)
    assert_nothing_is_left()
    assert torch.equal(plain_gradient(), plain_gradient())
    go.set()
    thread.join()
    assert left == [None, None]


@nothing_compressed
def test_a_generator_that_is_closed() -> None:
    class Yields(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Iterator[Tensor]:
            while True:
                x = F.gelu(self.first(x))
                yield x

    results = dibit.compress(Yields())(torch.randn(50, 8))
    next(results), next(results).sum().backward()
    assert_nothing_is_left()
    results.close()


@pytest.mark.slow
def test_interrupted_passes_leave_no_tensor() -> None:
    net, x = dibit.compress(Net()), torch.randn(50, 8)
    net.event.happens = raises(KeyboardInterrupt)
    counts = []
    for _ in range(12):
        with pytest.raises(KeyboardInterrupt):
            net(x)
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[3] == counts[-1]


def test_the_ledger_gets_the_rows_of_a_pass_that_raised() -> None:
    net = dibit.compress(Net())
    net.event.happens = raises(KeyboardInterrupt)
    with dibit.track(net) as saved, contextlib.suppress(KeyboardInterrupt):
        net(torch.randn(50, 8))
    assert {"body.1", "body.2"} <= {row.module for row in saved.rows}


def test_a_hook_called_by_hand_does_nothing() -> None:
    net, x = dibit.compress(Net()), torch.randn(3, 8)
    outer = nn.Sequential(nn.Linear(8, 8))
    enter = next(iter(net._forward_pre_hooks.values()))
    outer.register_forward_pre_hook(lambda *_: enter(net, (), {}))
    outer[0].register_forward_pre_hook(lambda *_: enter(net, (), {}))
    assert type(outer(x).grad_fn).__name__ == "AddmmBackward0"
    enter(net, (), {})


@pytest.mark.parametrize("whole", [True, False])
@nothing_compressed
def test_where_saved_tensor_hooks_are_forbidden_all_stays_exact(whole: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.nullcontext() if whole else disable_saved_tensors_hooks("not here"):
                return self.last(self.first(x).relu())

    x, grads = torch.randn(300, 8), []
    for compressed in (False, True):
        torch.manual_seed(0)
        model = dibit.compress(Model().train()) if compressed else Model().train()
        with disable_saved_tensors_hooks("not here") if whole else contextlib.nullcontext():
            y = model(x)
        y.sum().backward()
        grads.append(model.last.weight.grad)
    assert torch.equal(*grads)
