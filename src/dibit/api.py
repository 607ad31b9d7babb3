"""`compress`, `decompress`, `scores`, `track`: hooks on an unmodified model that begin compressed passes."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from dibit._torch.private import USABLE, warn_if_missing
from dibit.config import Config, Sample, did_you_mean
from dibit.engine.ledger import Ledger, Row
from dibit.engine.model_state import Found, ModelState, Rule, state_of, states_in
from dibit.engine.row_scores import Scores
from dibit.hooks import dlpack, nothing_compressed
from dibit.hooks.module_hooks import attach, detach
from dibit.hooks.scripting import prepare as prepare_scripting
from dibit.recipes import recipe

__all__ = ["compress", "decompress", "scores", "state_of", "track"]

Setting = Config | str | None
M = TypeVar("M", bound=nn.Module)


def compress(
    model: M,
    config: Setting | Mapping[str, Setting] = "default",
    *,
    noise: float | None = None,
    rules: Mapping[Any, Rule] | None = None,
) -> M:
    """Keep compressed activations for the backward pass of a model; the forward pass stays as it is.

    Nothing of the model changes but forward hooks: parameters, buffers, `state_dict`, class and `repr` stay. In eval
    mode and under `torch.no_grad` nothing is compressed; in training, dropout has the same masks there.
    Compressing again replaces the setting.

    Args:
        model: any `torch.nn.Module`; parts of it may be called on their own.
        config: the name of a recipe (`dibit.recipes.RECIPES`), a `Config`, `None` (everything exact), or a
            mapping from module names to those. A name stands for the module and all within; `*` and `?` match as in
            file names; the first entry that matches counts, and modules without a match stay exact.
        noise: a bound on the squared error of the gradient over its square, in the place of the recipe's
            (`Config.noise`); for configs that leave out rows.
        rules: the model's own rules, by the function of torch that each takes over: function ->
            `rule(forward, *args, **kwargs)`, see `dibit.rules`. `torch.asinh` and `torch.Tensor.asinh` are two
            functions: give a rule for each by which the model calls.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, a setting is neither a name nor a `Config`, or a key or a value of `rules` is
            no function.
        ValueError: a recipe or a module name is unknown; the message gives the nearest. Or `noise` is not above 0, or
            no config leaves out rows.
    """
    _check_module("compress", model)
    warn_if_missing()
    for function, rule in (rules or {}).items():
        if not callable(function):
            raise TypeError(f"rules has the key {function!r}; expected a function of torch, such as torch.asinh.")
        if not callable(rule):
            raise TypeError(
                f"rules has {rule!r} for {getattr(function, '__name__', function)}; expected a rule: a function of the "
                "running pass and of the arguments, see docs/architecture.md."
            )
    settings = _bounded(_resolve(model, config), noise)
    decompress(model)
    state = ModelState(model, dict(rules or {}))
    attach(model, state, settings)
    prepare_scripting(model)
    if USABLE and any(setting is not None for setting in settings.values()):
        nothing_compressed.expect(state)
        dlpack.watch()
    return model


def decompress(model: M) -> M:
    """Remove what `compress` attached, from the model and every module in it.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("decompress", model)
    detach(model, lambda _: True)
    return model


@contextlib.contextmanager
def track(model: nn.Module) -> Iterator[Ledger]:
    """The ledger of the training forward passes in this block: one row a residual.

    Works on a plain model too: then `total` equals `plain`. Put one training step in the block; several add up. Blocks
    may lie within each other: each gets all rows of its own model.

    Args:
        model: a compressed model; a part of one, whose rows alone are shown; or what contains compressed models
            (DDP, `torch.compile`, `AveragedModel`, a LightningModule): theirs are shown, and nothing of what else it
            keeps. Rows carry the names by which `compress` knows the modules; where there are several compressed
            models, each one's own name goes before them.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> with dibit.track(model) as saved:
        ...     loss = step(model)
        >>> print(saved); saved.total, saved.plain
    """
    _check_module("track", model)
    warn_if_missing()
    ledger = Ledger()
    found = states_in(model) or [each for each in states_in(model, passive=True) if each.state is state_of(model)]
    observed = None
    if not found:
        observed = ModelState(model, passive=True)
        attach(model, observed, {name: None for name, _ in model.named_modules()})
        found = [Found(observed, "", {""})]
    trackers = []
    for each in found:
        tell = functools.partial(_take, ledger, None if each.whole else each.names, each.path if found[1:] else "")
        each.state.trackers.append(tell)
        trackers.append((each.state, tell))
    try:
        yield ledger
    finally:
        for state, tell in trackers:
            state.trackers[:] = [other for other in state.trackers if other is not tell]
        if observed is not None:
            detach(model, lambda state: state is observed)


def _take(ledger: Ledger, names: set[str] | None, path: str, rows: list[Row]) -> None:
    """Enter the rows of a pass, all or those of modules with these names, with a path before their own."""
    for row in rows:
        if names is None or row.module in names:
            ledger.add(replace(row, module=".".join(filter(None, (path, row.module)))) if path else row)


def scores(model: nn.Module) -> Scores:
    """What `Sample(by="gradient")` knows of a compressed model's rows: `state_dict` and `load_state_dict`.

    Args:
        model: the compressed model, a part of it, or what contains it and no other.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing of the model is compressed, or it contains several compressed models.
    """
    _check_module("scores", model)
    found = states_in(model)
    if not found and not USABLE:
        return Scores()  # nothing is compressed, so nothing is known
    if not found:
        raise ValueError("scores got a model that is not compressed; call dibit.compress(model) first.")
    if len(found) > 1:
        names = ", ".join(repr(each.path) for each in found)
        raise ValueError(f"scores got a model that contains {len(found)} compressed ones, {names}; give one of them.")
    return found[0].state.scores


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} got a {type(model).__name__}; expected a torch.nn.Module.")


def _config(setting: Setting) -> Config | None:
    if setting is None or setting == "none":
        return None
    if isinstance(setting, str):
        return recipe(setting)
    if isinstance(setting, Config):
        return setting
    raise TypeError(
        f"a setting of type {type(setting).__name__} was given; expected a recipe's name or a dibit.Config."
    )


def _resolve(model: nn.Module, config: Setting | Mapping[str, Setting]) -> dict[str, Config | None]:
    names = [name for name, _ in model.named_modules()]
    if not isinstance(config, Mapping):
        one = _config(config)
        return dict.fromkeys(names, one)
    patterns = {pattern: _config(setting) for pattern, setting in config.items()}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"no module is named {pattern!r}; {did_you_mean(pattern, [n for n in names if n])}.")
    return {
        name: next((setting for pattern, setting in patterns.items() if _matches(name, pattern)), None)
        for name in names
    }


def _bounded(settings: dict[str, Config | None], noise: float | None) -> dict[str, Config | None]:
    if noise is None:
        return settings
    if not any(config is not None and isinstance(config.reduce, Sample) for config in settings.values()):
        raise ValueError(
            f"noise = {noise!r} was given, but no config leaves out rows, of which more could be kept; use one with "
            "reduce=Sample(ratio), or the recipe 'default' or 'small'."
        )
    return {name: config and replace(config, noise=noise) for name, config in settings.items()}


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name, or that of a module around it, matches."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
