"""Every setting of ``dibit train``, once: flags, YAML keys, help texts and checks come from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal

from dibit import recipes
from dibit.tools.errors import UserError, nearest, shown

MODELS = ("gcn", "sage", "gin", "gat", "gcn2")
NORMS = ("none", "batch", "layer", "graph", "pair")
AGGRS = ("mean", "sum", "max")
JKS = ("last", "cat", "max", "lstm")
RECIPES = (*recipes.RECIPES, "none")
BITS = (1, 2, 4, 8)
LEVELS = ("uniform", "normal")
LOADERS = ("full", "neighbor", "cluster", "saint-rw", "saint-node", "shadow")
PRECISIONS = ("fp32", "bf16", "fp16")
_MOST = 2**31 - 1  # largest accepted whole number (int32)
_MOST_REAL = 1e38  # float32 ends at 3.4e38


@dataclass(frozen=True)
class DataSettings:
    """The graph, its features and its split.

    Attributes:
        dataset: 'planted' (generated; 'planted:100000' sets the number of nodes), the name of a data set of
            PyTorch Geometric or OGB, such as 'cora', 'flickr' or 'ogbn-arxiv', or the path of an .npz file
            (docs/data.md).
        root: Folder of data sets: downloaded ones, and .npz files, which are looked at first: cora.npz for
            'cora', amazon_computers.npz for 'amazon-computers'.
        svd: Replace the features by their K leading singular directions (truncated SVD).
        standardize: Give every feature mean 0 and variance 1 over the nodes.
        undirected: Add the reverse of every edge.
        self_loops: Give every node one edge to itself; gcn, gcn2 and gat have it without this.
        split: Which of several published splits to train on, from 0; without it --seed modulo their number.
        split_file: An .npz file with the node numbers train, val (or valid) and test, or the masks train_mask,
            val_mask and test_mask, in place of the data set's own split (docs/data.md).
        trust: Let the data set's files run code when they are read, as Python's pickles may; without it, files that
            are more than arrays are refused.
    """

    dataset: str = "planted"
    root: str = "data"
    svd: int | None = None
    standardize: bool = False
    undirected: bool = False
    self_loops: bool = False
    split: int | None = None
    split_file: str | None = None
    trust: bool = False

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        if not self.dataset:
            raise UserError("--dataset is empty; give the name of a data set or the path of an .npz file.")
        if self.svd is not None:
            _at_least("svd", self.svd, 1)
        if self.split is not None:
            _at_least("split", self.split, 0)
        if self.split_file == "":
            raise UserError("--split-file is empty; give the path of an .npz file, or leave it out.")


@dataclass(frozen=True)
class ModelSettings:
    """The network, from torch_geometric.nn.

    Attributes:
        model: One of gcn, sage, gin, gat, gcn2.
        layers: Number of graph layers.
        hidden: Width of the hidden layers; for gat the heads together.
        dropout: Probability of dropping an element, from 0 up to but not including 1.
        norm: Normalisation between layers, one of none, batch, layer, graph, pair.
        heads: Attention heads (gat).
        aggr: Aggregation (sage, gin), one of mean, sum, max; without it the layer's own: mean for sage, sum
            for gin.
        alpha: Share of the first layer's output in every layer (gcn2).
        theta: Strength of the weights, falling with depth: beta = log(theta / layer + 1) (gcn2).
        residual: Add each layer's input to its output, after the norm and before the activation (gcn2).
        linear_skip: Add a linear layer of each graph layer's input to its output, before the norm: conv(x) + W x + b
            (gcn, sage, gin, gat).
        jk: Jumping knowledge, one of last, cat, max, lstm: norm, activation and dropout follow the last graph layer
            too, and a linear layer makes the classes from the last layer's output (last) or from all layers'
            (gcn, sage, gin, gat).
        bias: Bias of the graph layers (gcn, sage, gat).
    """

    model: str = "sage"
    layers: int = 3
    hidden: int = 128
    dropout: float = 0.5
    norm: str = "batch"
    heads: int = 4
    aggr: str | None = None
    alpha: float = 0.5
    theta: float = 1.0
    residual: bool = False
    linear_skip: bool = False
    jk: str | None = None
    bias: bool = True

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _one_of("model", self.model, MODELS)
        _at_least("layers", self.layers, 1, 1_000)
        _at_least("hidden", self.hidden, 1, 1_000_000)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}, expected a number from 0 up to but not including 1.")
        _one_of("norm", self.norm, NORMS)
        _at_least("heads", self.heads, 1)
        if self.model == "gat" and self.hidden % self.heads:
            raise UserError(
                f"--hidden {self.hidden} cannot be shared among --heads {self.heads}; "
                "expected a multiple of the number of heads."
            )
        if self.aggr is not None:
            _one_of("aggr", self.aggr, AGGRS)
            if self.model not in ("sage", "gin"):
                raise UserError(
                    f"--aggr {self.aggr} does not apply to --model {self.model}, only to sage and gin; leave it out."
                )
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha is {self.alpha}, expected a number from 0 to 1.")
        _positive("theta", self.theta)
        if self.residual and self.model != "gcn2":
            raise UserError(
                f"--residual does not apply to --model {self.model}, only to gcn2; leave it out, or give --linear-skip."
            )
        if self.jk is not None:
            _one_of("jk", self.jk, JKS)
            if self.jk == "lstm" and self.layers * self.hidden < 2:
                raise UserError(
                    "--jk lstm is half as wide as --layers times --hidden, which are both 1; expected more of one of "
                    "them, or give --jk last."
                )
        if self.model == "gcn2":
            for given, flag in ((self.linear_skip, "--linear-skip"), (self.jk is not None, "--jk")):
                if given:
                    raise UserError(
                        f"{flag} does not apply to --model gcn2, only to gcn, sage, gin and gat; leave it out."
                    )
        if not self.bias and self.model in ("gin", "gcn2"):
            raise UserError(
                f"--no-bias does not apply to --model {self.model}, only to gcn, sage and gat; leave it out."
            )


@dataclass(frozen=True)
class OptimisationSettings:
    """Adam.

    Attributes:
        epochs: Number of epochs; one epoch is one step on the full graph, or one pass over the batches.
        lr: Learning rate.
        weight_decay: L2 penalty, as Adam's weight_decay.
        clip: Clip the norm of the gradient to this.
        patience: Stop after this many evaluations without a better validation result.
        eval_every: Evaluate on the validation and test nodes every N epochs, and after the last one.
        precision: 'fp32'; 'bf16' or 'fp16', autocast in the training step (fp16 with a scaled loss), with the list
            of edges in place of the sparse matrix, whose mean takes FP32 alone.
    """

    epochs: int = 100
    lr: float = 0.01
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    eval_every: int = 1
    precision: str = "fp32"

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _at_least("epochs", self.epochs, 1)
        _positive("lr", self.lr)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight-decay is {self.weight_decay}, expected 0 or a positive number.")
        _in_float32("weight-decay", self.weight_decay)
        if self.clip is not None:
            _positive("clip", self.clip)
        if self.patience is not None:
            _at_least("patience", self.patience, 1)
        _at_least("eval-every", self.eval_every, 1)
        _one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class LoaderSettings:
    """Mini-batches, by PyTorch Geometric's loaders.

    Attributes:
        loader: 'full', the whole graph in one step; 'neighbor', sampled neighbours of some training nodes; 'cluster'
            (Cluster-GCN); 'saint-rw' or 'saint-node', random walks or nodes (GraphSAINT); or 'shadow' (ShaDow-GNN).
        batch_size: Training nodes of a batch (neighbor, shadow), walks (saint-rw), nodes (saint-node).
        neighbors: Neighbours sampled for a node, -1 for all; for neighbor one number, or one a hop, such as
            '15,10,5'; for shadow one number.
        parts: Clusters that the graph is cut into (cluster).
        clusters: Clusters of a batch (cluster).
        walk_length: Steps of a random walk (saint-rw).
        steps: Batches of an epoch, all processes together (saint-rw, saint-node).
        depth: Hops around a training node (shadow).
        workers: Processes that make batches.
    """

    loader: str = "full"
    batch_size: int = 1024
    neighbors: str = "10"
    parts: int = 100
    clusters: int = 10
    walk_length: int = 3
    steps: int = 10
    depth: int = 2
    workers: int = 0

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _one_of("loader", self.loader, LOADERS)
        for name in ("batch_size", "parts", "clusters", "walk_length", "steps", "depth"):
            _at_least(name.replace("_", "-"), getattr(self, name), 1)
        _at_least("workers", self.workers, 0, 1_000)
        if self.clusters > self.parts:
            raise UserError(f"--clusters is {self.clusters}, expected at most the number of --parts, {self.parts}.")
        self.hops(1)
        if self.loader == "shadow" and len(self.neighbors.split(",")) > 1:
            raise UserError(f"--neighbors is {shown(self.neighbors)!r}, expected one number with --loader shadow.")

    def hops(self, layers: int) -> list[int]:
        """Neighbours to sample in each hop of a model of so many layers."""
        try:
            numbers = [int(word) for word in self.neighbors.split(",")]
        except ValueError:
            numbers = [0]
        if not all(number == -1 or 1 <= number <= _MOST for number in numbers):
            raise UserError(
                f"--neighbors is {shown(self.neighbors)!r}, expected whole numbers of at least 1, or -1 for all, "
                "separated by commas, such as 15,10,5."
            )
        return numbers if len(numbers) > 1 else numbers * layers


@dataclass(frozen=True)
class CompressionSettings:
    """What is kept for the backward pass.

    Attributes:
        recipe: What is kept of activations (docs/operations.md), or 'none' for plain training.
        bits: Bits an element, one of 1, 2, 4, 8, instead of the recipe's own.
        block: Elements that share one range, or 'row' (each row has its own, as in EXACT), instead of the
            recipe's own.
        levels: 'uniform', or 'normal' (i-EXACT's levels of least variance for a clipped normal), instead of the
            recipe's own; what the recipe rounds with a dither, which needs uniform levels, is then rounded
            stochastically.
        noise: Bound on the squared error of the gradient over its square, beyond which more rows are kept, instead of
            the recipe's own: 0.5 of 'default', 1 of 'small'.
    """

    recipe: str = "default"
    bits: int | None = None
    block: int | Literal["row"] | None = None
    levels: str | None = None
    noise: float | None = None

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _one_of("recipe", self.recipe, RECIPES)
        if self.bits is not None and self.bits not in BITS:
            raise UserError(f"--bits is {shown(self.bits)}, expected 1, 2, 4 or 8.")
        if (
            self.block is not None
            and self.block != "row"
            and not (isinstance(self.block, int) and 1 <= self.block <= _MOST)
        ):
            raise UserError(f"--block is {shown(self.block)}, expected a whole number of at least 1, or 'row'.")
        if self.levels is not None:
            _one_of("levels", self.levels, LEVELS)
        if self.noise is not None:
            _positive("noise", self.noise)
            if self.recipe in recipes.UNBOUNDED:
                others = " or ".join(recipes.BOUNDED)
                raise UserError(
                    f"--noise {self.noise} has no meaning with --recipe {self.recipe}, which has no rows that a bound "
                    f"could add; take --recipe {others}, or leave it out."
                )
        rounds = self.recipe in recipes.RECIPES and not recipes.RECIPES[self.recipe].lossless
        for name in ("bits", "block", "levels", "noise"):
            if not rounds and getattr(self, name) is not None:
                raise UserError(
                    f"--{name} {getattr(self, name)} has no meaning with --recipe {self.recipe}, which rounds nothing; "
                    "leave one of the two out."
                )


@dataclass(frozen=True)
class RunSettings:
    """Seeds, comparison and what is written.

    Attributes:
        seed: Seed of the weights, the dropout, the split (where the data set has none) and the generated
            graph.
        seeds: Train K times, with the seeds seed .. seed + K - 1.
        compare: Train without compression too, with the same seeds, and end in a table of both.
        out: Folder of the checkpoints, the best model, the TensorBoard logs and settings.yaml; without it a
            new folder in runs/.
        json: Write settings, results and versions to this file.
        resume: Go on with the run in the folder --out, from its last checkpoint.
        overwrite: Replace the run in the folder --out.
        checkpoint_every: Write a checkpoint every N epochs, and after the last one.
        device: 'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'; under torchrun 'cuda' is each process's own.
        quiet: Print the result and nothing else.
    """

    seed: int = 0
    seeds: int = 1
    compare: bool = False
    out: str | None = None
    json: str | None = None
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int = 10
    device: str = "auto"
    quiet: bool = False

    def check(self) -> None:
        """Raise `UserError` for a value that cannot be meant."""
        _at_least("seed", self.seed, 0, 2**63 - 1)
        _at_least("seeds", self.seeds, 1, 10_000)
        if self.seed + self.seeds > 2**63:
            raise UserError(f"--seed is {self.seed}, expected a number below 2**63.")
        _at_least("checkpoint-every", self.checkpoint_every, 1)
        if self.resume and self.overwrite:
            raise UserError("--resume goes on with the run in --out, --overwrite replaces it; leave one of them out.")
        if self.resume and self.out is None:
            raise UserError("--resume needs --out, the folder of the run to go on with.")
        for name in ("out", "json"):
            if getattr(self, name) == "":
                raise UserError(f"--{name} is empty, expected a path.")


@dataclass(frozen=True)
class Settings:
    """All settings, by topic; flat (`flat`, `from_flat`) on the command line and in YAML."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check(self) -> None:
        """Raise `UserError` for the first value, or pair of values, that cannot be meant."""
        for name, value in self.flat().items():
            if isinstance(value, str):
                _printable(name.replace("_", "-"), value)
        for group in (self.data, self.model, self.optimisation, self.loader, self.compression, self.run):
            group.check()
        hops = len(self.loader.hops(self.model.layers))
        if self.loader.loader == "neighbor" and hops != self.model.layers:
            raise UserError(
                f"--neighbors names {hops} hops, but the model has {self.model.layers} layers (--layers); expected one "
                "number, or one for each layer."
            )
        if self.loader.loader != "full" and self.model.jk not in (None, "last"):
            raise UserError(
                f"--jk {self.model.jk} needs every layer's output at once, which the evaluation of --loader "
                f"{self.loader.loader}, layer by layer, does not have; give --jk last, or --loader full."
            )
        if self.run.compare and self.compression.recipe == "none":
            raise UserError("--compare with --recipe none compares plain training with itself; give another recipe.")

    def flat(self) -> dict[str, Any]:
        """Return every setting by its name, in the order of the help text."""
        return {name: getattr(getattr(self, group), name) for group, name in _places()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from names and values; what is not named keeps its default."""
        return cls().updated(**values)

    def updated(self, **values: Any) -> Settings:
        """Return a copy with these settings (by their flat names) changed."""
        known = {name: group for group, name in _places()}
        for name in values:
            if name not in known:
                raise UserError(f"There is no setting {name!r}.{nearest(name, known)}")
        result = self
        for group in {known[name]: None for name in values}:
            part = {name: value for name, value in values.items() if known[name] == group}
            result = replace(result, **{group: replace(getattr(result, group), **part)})
        return result


def groups() -> dict[str, type]:
    """Return the dataclass of each group of settings, by the group's name."""
    return {f.name: f.default_factory for f in fields(Settings)}  # type: ignore[misc]


def group_fields(group: type) -> tuple[Field[Any], ...]:
    """Return the settings of one group."""
    return fields(group)


def _places() -> Iterable[tuple[str, str]]:
    for group, kind in groups().items():
        for f in fields(kind):
            yield group, f.name


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = nearest(value, known)
        raise UserError(f"--{name} is {shown(value)!r}, expected one of {', '.join(known)}.{hint}")


def _at_least(name: str, value: int, least: int, most: int = _MOST) -> None:
    if value < least:
        raise UserError(f"--{name} is {shown(value)}, expected a whole number of at least {least}.")
    if value > most:
        raise UserError(f"--{name} is {shown(value)}, expected a whole number of at most {most:,}.")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--{name} is {value}, expected a positive number.")
    _in_float32(name, value)


def _in_float32(name: str, value: float) -> None:
    if value > _MOST_REAL:
        raise UserError(f"--{name} is {value}, expected a number of at most {_MOST_REAL:.0e}.")


def _printable(name: str, value: str) -> None:
    """Refuse what no file can be named, and what settings.yaml cannot hold."""
    if "\0" in value:
        raise UserError(f"--{name} is {shown(value)!r}, which has a null character in it; expected text without one.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--{name} is {shown(value)!r}, which is not text in UTF-8; expected a name without such bytes. Rename it, "
            "or give a link to it."
        ) from None
