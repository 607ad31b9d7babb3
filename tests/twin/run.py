"""Runs a program: plain, compressed, or plain with every saved tensor copied; notes all that can be told apart."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import dibit
from dibit import Config, Sample
from dibit._torch.private.autograd import top_hooks
from dibit._torch.private.modes import set_callback
from dibit.api import state_of
from dibit.recipes import RECIPES
from tests.twin.grammar import Op, Program
from tests.twin.pieces import ENDS_COMPRESSION

CONFIGS: dict[str, Config] = {
    **{name: replace(config, dropout="mask") for name, config in RECIPES.items()},
    "8 bits": Config(bits=8, block=128, dropout="mask"),
    "rows": Config(bits=2, block=128, reduce=Sample(4), dropout="mask"),
    "seed": RECIPES["default"],
}


@dataclass
class Seen:
    """What a program looked at: a result, or a word."""

    value: Any
    stride: tuple[int, ...] = ()
    needs_gradient: bool = False


@dataclass
class Outcome:
    """All that can be told apart of two runs."""

    error: str = ""
    message: str = ""
    seen: list[Seen] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    next_draws: Tensor | None = None
    left: list[str] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


class Twin:
    """A program, ready to be run in every way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.code: CodeType = compile(program.source(), "<twin>", "exec")

    def plain(self, masks: list[Tensor] | None = None) -> Outcome:
        return self._run(lambda model: model, masks=masks)

    def ideal(self, masks: list[Tensor] | None = None) -> Outcome:
        """Plain, but what autograd saves is copied: no change of memory can reach it."""
        return self._run(lambda model: model, masks=masks, copied=True)

    def shaken(self) -> Outcome:
        """Plain, with each weight a few of its last bits away."""

        def shake(model: nn.Module) -> nn.Module:
            with torch.no_grad():
                for p in model.parameters():
                    if not is_lazy(p):
                        p.mul_(1 + 1e-6 * torch.randn_like(p))
            return model

        return self._run(shake)

    def compressed(self, salt: int) -> Outcome:
        return self._run(
            lambda model: self.compress(model, salt), record=self.program.recipe == "seed", names=salt == 1
        )

    def build(self) -> tuple[nn.Module, Callable[..., None], Tensor, Tensor]:
        """The model, what uses it, and its arguments, always the same."""
        program = self.program
        space: dict[str, Any] = {"__name__": "twin"}
        torch.manual_seed(0)
        exec(self.code, space)
        model = space["Net"]().train()
        if program.moved:
            with torch.no_grad():
                for p in model.parameters():
                    if not is_lazy(p):
                        p.add_(torch.randn_like(p) * 0.1)
        x, extra = torch.randn(program.n, 16), torch.randn(program.n, 16)
        return model, space["use"], x.requires_grad_(program.features_need_gradient), extra

    def compress(self, model: nn.Module, salt: int) -> nn.Module:
        config = CONFIGS[self.program.recipe]
        if self.program.around == "again":
            dibit.compress(model.first, "exact")  # type: ignore[arg-type]
        model = dibit.compress(model, {"first": None, "*": config} if self.program.around == "by name" else config)
        if self.program.around == "copied" and not any(is_lazy(p) for p in model.parameters()):
            model = copy.deepcopy(model)
        state = state_of(model)
        assert state is not None
        state.salt = salt
        return model

    def _run(
        self,
        prepare: Callable[[nn.Module], nn.Module],
        masks: list[Tensor] | None = None,
        copied: bool = False,
        record: bool = False,
        names: bool = False,
    ) -> Outcome:
        program, found = self.program, Outcome()
        model, use, x, extra = self.build()
        plain_attributes = _attributes(model)
        model = prepare(model)
        compressed = state_of(model) is not None
        torch.manual_seed(1)
        before = _surroundings(names)
        recorder = _Masks(model, masks, found.masks) if record or masks is not None else None

        def look(y: Any) -> Any:
            found.seen.extend(_seen(y))
            if recorder is not None:
                recorder.passes += 1
            return y

        hooks = torch.autograd.graph.saved_tensors_hooks(_copy, lambda saved: saved)
        try:
            with hooks if copied else contextlib.nullcontext(), self._around(model):
                use(model, x, extra, look)
        except BaseException as error:
            if type(error) is KeyboardInterrupt and program.scenario != "interrupted":
                raise  # of whoever runs the harness
            found.error, found.message = type(error).__name__, str(error).split("\n")[0]
        found.left = _left(before)
        found.next_draws = torch.rand(4)
        named = {"x": x, "extra": extra, **dict(model.named_parameters())}
        found.gradients = {
            name: p.grad.detach().clone() for name, p in named.items() if not is_lazy(p) and p.grad is not None
        }
        found.buffers = {name: b.detach().clone() for name, b in model.named_buffers() if not is_lazy(b)}
        ends = any(isinstance(op, Op) and op.piece in ENDS_COMPRESSION for op in program.ops)
        if compressed and not ends and state_of(model) is None:
            found.left.append("the model is no longer compressed")
        dibit.decompress(model)
        if not found.error and not ends:
            now = _attributes(model)
            found.left += [
                f"attributes of {name or 'the model'}"
                for name in now.keys() & plain_attributes.keys()
                if now[name] != plain_attributes[name]
            ]
        return found

    def _around(self, model: nn.Module) -> Any:
        if state_of(model) is None:
            return contextlib.nullcontext()
        match self.program.around:
            case "track":
                return dibit.track(model)
            case "batch":
                return dibit.batch(model, node_ids=torch.arange(self.program.n))
            case "held":
                return _held(model)
            case "averaged":
                return _averaged(model)
        return contextlib.nullcontext()


@contextlib.contextmanager
def _held(model: nn.Module) -> Iterator[None]:
    with dibit.track(nn.Sequential(model)):
        pass
    yield


@contextlib.contextmanager
def _averaged(model: nn.Module) -> Iterator[None]:
    if any(is_lazy(p) for p in model.parameters()):
        yield
        return
    mean = torch.optim.swa_utils.AveragedModel(model)
    yield
    mean.update_parameters(model)


class _Masks:
    """Notes the masks of `nn.Dropout` in the forward passes; or puts noted ones in the place of torch's.

    A plain run may go through a forward pass again with torch's generator restored: the generator's state tells which
    mask belongs there.
    """

    def __init__(self, model: nn.Module, given: list[Tensor] | None, noted: list[Tensor]) -> None:
        self.given, self.noted = given, noted
        self.known: dict[bytes, Tensor] = {}
        self.passes = 0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                if given is None:
                    module.register_forward_hook(self.note)
                else:
                    module.register_forward_pre_hook(self.before)
                    module.register_forward_hook(self.replace)

    def before(self, module: nn.Module, args: Any) -> Any:
        self.state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes()).digest()
        self.x = args[0]
        return (args[0].clone(),) if module.inplace else args  # torch's own mask is written to a copy

    def note(self, module: nn.Module, args: Any, y: Tensor) -> None:
        if module.training:
            self.noted.append((y != 0).detach().float())

    def replace(self, module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        if not module.training or self.given is None:
            return None
        if self.state not in self.known:
            self.known[self.state] = self.given[len(self.known) % len(self.given)]
        return self.x * self.known[self.state] / (1 - module.p)  # type: ignore[operator]


def _copy(saved: Tensor) -> Tensor:
    return saved.detach().clone() if saved.layout == torch.strided else saved


def _seen(y: Any) -> Iterator[Seen]:
    if isinstance(y, Tensor):
        yield Seen(y.detach().clone(), y.stride(), y.requires_grad)
    elif isinstance(y, Mapping):
        for part in y.values():
            yield from _seen(part)
    elif isinstance(y, tuple | list):
        for part in y:
            yield from _seen(part)
    else:
        yield Seen(y)


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Names of what each module has, and how many hooks. A lazy module drops its own."""
    found = {}
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in module.parameters(recurse=False)) or hasattr(module, "_initialize_hook"):
            continue
        if isinstance(module, nn.Dropout):
            continue  # the harness has hooks of its own there
        counts = [len(getattr(module, hooks)) for hooks in _HOOKS]
        found[name] = (sorted(key for key in vars(module) if not key.startswith("__")), counts)
    return found


_PATCHED = (torch, F, Tensor, nn.Module, torch.autograd, torch.optim.Optimizer, torch.random)


def _surroundings(names: bool) -> dict[str, Any]:
    """What a pass may set and must put back; the names of torch's modules take a while."""
    callback = set_callback(None)
    set_callback(callback)
    return {
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "saved-tensor hooks": top_hooks() is not None,
        "dynamo callback": callback,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "names of torch": [{key: id(value) for key, value in vars(owner).items()} for owner in _PATCHED]
        if names
        else [],
    }


def _left(before: dict[str, Any]) -> list[str]:
    """What is not as before; put back, so that the next program is not blamed."""
    now = _surroundings(bool(before["names of torch"]))
    for index, names in enumerate(now["names of torch"]):
        first = before["names of torch"][index]
        for key in list(names):
            if key.startswith("_") or key not in first:
                first.pop(key, None)
                names.pop(key)
    left = [name for name in now if now[name] != before[name]]
    while top_hooks() is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for _ in range(now["function modes"] - before["function modes"]):
        torch.overrides._pop_mode()
    torch.set_grad_enabled(before["grad mode"])
    return left


def live() -> int:
    """Tensors that Python knows of."""
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def growth(twin: Twin, compressed: bool) -> tuple[int, int, bool]:
    """Tensors that passes of one model leave until the collector comes; that a model leaves for ever; is it alive?"""
    gc.freeze()  # what is there already is not counted, nor looked through
    gc.disable()
    try:
        _passes(twin, compressed, 1)
        gc.collect()
        before = live()
        each, model = _passes(twin, compressed, 3)
        gc.collect()
        ever = live() - before
        if each > 0:  # or was that the last that the first passes learn?
            each, model = _passes(twin, compressed, 9)
        return each, ever, model() is not None
    finally:
        gc.enable()
        gc.unfreeze()


def _passes(twin: Twin, compressed: bool, times: int) -> tuple[int, weakref.ref[nn.Module]]:
    model, use, x, extra = twin.build()
    if compressed:
        model = twin.compress(model, 1)
    counts = []
    for _ in range(times):
        torch.manual_seed(1)
        use(model, x, extra, lambda y: y)
        if twin.program.scenario == "deep copy between":
            gc.collect()  # a compressed model and what knows of it are a cycle
        counts.append(live())
    return counts[-1] - counts[len(counts) // 2], weakref.ref(model)
