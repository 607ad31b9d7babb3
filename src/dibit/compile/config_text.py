"""A `Config` as text, since the operators of a compiled graph take no objects; and the codec for each use of a
config."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import NamedTuple

import torch

from dibit.config import Config, Project, Rows, Sample
from dibit.rules.elementwise import CODECS

LEAF, NORM = "leaf", "norm"  # what a residual is for: the input of a linear layer, of a norm; or a key of `CODECS`
_REDUCE = {"Project": Project, "Sample": Sample}


class Setting(NamedTuple):
    """A module's config, as far as it decides what is traced.

    Attributes:
        text: the config.
        by_reference: what the caller holds anyway is not kept again.
        masked: dropout keeps a mask of 1 bit instead of a seed.
        two: norm layers keep two draws: BatchNorm with any reduction, LayerNorm with a projection.
    """

    text: str
    by_reference: bool
    masked: bool
    two: tuple[bool, bool]


def setting_of(config: Config | None) -> Setting | None:
    """`None`: everything exact, as compiled code is where nothing may be rounded."""
    if config is None or config.lossless:
        return None
    text = text_of(config)
    reduce = settings(text, NORM).reduce
    two = reduce is not None, isinstance(reduce, Project)
    return Setting(text, config.inputs == "reference", config.dropout == "mask", two)


def text_of(config: Config) -> str:
    """JSON of a config."""
    return json.dumps(_plain(config))


@functools.cache
def config_of(text: str) -> Config:
    """The inverse of `text_of`."""
    return _config(json.loads(text))


@functools.cache
def settings(text: str, use: str) -> Config:
    """The codec for one use of a module's config in compiled code.

    A residual has one shape and dtype whatever it holds, so ranges are float32; scores by gradients live outside of the
    graph, so that rows are taken by their norms (inputs of linear layers) or uniformly (inputs of norm layers).
    """
    config = config_of(text)
    if use == NORM:
        config = config.norm or dataclasses.replace(config, reduce=None)
    elif use in CODECS:
        config = CODECS[use](config)
    reduce = config.reduce
    if isinstance(reduce, Sample) and reduce.by == "gradient":
        reduce = dataclasses.replace(reduce, by="norm" if use == LEAF else "uniform")
    return dataclasses.replace(config, reduce=reduce, stats=torch.float32, norm=None)


def _plain(config: Config) -> dict[str, object]:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if config.reduce is not None:
        fields["reduce"] = [type(config.reduce).__name__, dataclasses.asdict(config.reduce)]
    if isinstance(config.block, Rows):
        fields["block"] = dataclasses.asdict(config.block)
    if config.norm is not None:
        fields["norm"] = _plain(config.norm)
    return {**fields, "stats": str(config.stats).removeprefix("torch.")}


def _config(fields: dict[str, object]) -> Config:
    made: dict[str, object] = {**fields, "stats": getattr(torch, str(fields["stats"]))}
    if isinstance(fields["reduce"], list):
        name, own = fields["reduce"]
        made["reduce"] = _REDUCE[name](**own)
    if isinstance(fields["block"], dict):
        made["block"] = Rows(**fields["block"])
    if isinstance(fields["levels"], list):
        made["levels"] = tuple(fields["levels"])
    if isinstance(fields["norm"], dict):
        made["norm"] = _config(fields["norm"])
    return Config(**made)  # type: ignore[arg-type]
