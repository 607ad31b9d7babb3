"""Programs for each kind of fault that was found once: they are run in every `make test`."""

from __future__ import annotations

from tests.twin.grammar import Fill, Op, Program, Read, Twins
from tests.twin.run import CONFIGS

INTERRUPTED = {
    f"{error} in a pass, then a plain model": Program(
        (Op("linear"), Op("relu")), scenario="interrupted", error=error, boom=1
    )
    for error in ("KeyboardInterrupt", "SystemExit", "GeneratorExit", "ValueError")
}
INTERRUPTED |= {
    f"within a pass: {name}": Program((Op("linear"), Op(name), Op("linear")))
    for name in ("interrupt caught", "error caught", "decompressed within", "hooks removed within")
} | {"saved-tensor hooks are disabled": Program((Op("relu"),), scenario="hooks disabled")}
SHARED = {
    f"constants of the same content, {content}, one is written: {change}": Program(
        (Twins(content, change), Op("linear"))
    )
    for content, change in (
        ("ones", "data"),
        ("ones", "in place"),
        ("zeros", "numpy"),
        ("a weight's copy", "data"),
        ("a weight's copy", "out="),
        ("indices", "in place"),
        ("indices as rows", "numpy"),
        ("booleans", "numpy"),
    )
} | {
    f"running statistics beside a weight of ones: {name}": Program((Op("linear"), Op(name)), recipe=recipe)
    for name in ("InstanceNorm", "InstanceNorm1d", "InstanceNorm2d", "instance norm by hand")
    for recipe in ("default", "8 bits")
}
CHANGED = {
    f"{source}, read by {read}, changed {when} by {change}": Program(
        (Read(source, read, "linear after", change, when),),
        first="nothing",
        features_need_gradient=source != "features",
    )
    for source, read, change, when in (
        ("buffer", "t[i]", "data", "after"),
        ("buffer", "index_select", "numpy", "after"),
        ("buffer", "t[i]", "no_grad", "after"),
        ("parameter", "product", "data", "after"),
        ("parameter", "t[i]", "SGD", "after"),
        ("parameter", "index_select", "Adam", "after"),
        ("attribute", "exp", "numpy", "after"),
        ("attribute", "cat", "copy_", "after"),
        ("features", "relu", "data", "after"),
        ("argument", "index_select", "numpy", "after"),
        ("argument", "clone", "out=", "after"),
        ("outside", "t[i]", "dlpack", "after"),
        ("in a list", "gather", "pointer", "after"),
        ("buffer", "t[i]", "data", "end"),
        ("buffer", "t[i]", "out=", "now"),
        ("buffer", "product", "no_grad slice", "now"),
        ("parameter", "t[i]", "set_", "after"),
        ("buffer", "sigmoid", "data assigned", "after"),
        ("of the pass", "product", "numpy", "now"),
    )
}
CHANGED |= {
    f"{source}, changed by {change} for the first time after the second pass": Program(
        (Read(source, "t[i]", "times", change, "after"),),
        scenario="zero_grad between",
        first="nothing",
        features_need_gradient=True,
    )
    for source in ("buffer", "argument", "attribute", "parameter")
    for change in ("data", "no_grad")
} | {
    f"parameter, read by {read}, changed by {change}": Program(
        (Read("parameter", read, "times", change, "after"),), first="nothing", features_need_gradient=True
    )
    for read in ("gather", "index_add")
    for change in ("data", "numpy row")
}
FILLED = {
    f"{make}, filled by {fill}, {use}": Program((Fill(make, fill, use),))
    for make, fill, use in (
        ("zeros", "numpy", "times"),
        ("zeros of a shape", "numpy", "returned by a function, then linear"),
        ("zeros", "dlpack", "into linear"),
        ("ones", "pointer", "times"),
        ("new_zeros", "numba", "into linear"),
        ("zeros_like", "interface", "times"),
        ("zeros, viewed", "numpy", "times"),
        ("zeros, plus", "numpy add", "times"),
        ("full", "data", "twice"),
        ("arange", "numpy", "times"),
        ("zeros", "set in a view, later", "times"),
        ("relu", "numpy of a view", "times"),
    )
}
DRAWN_AGAIN = {
    f"dropout within a reentrant checkpoint: {name}": Program(
        (Op("linear"), Op("nn.Dropout", wrap=wrap), Op("relu")),
        scenario=scenario,
        recipe="seed",
        features_need_gradient=True,
    )
    for name, wrap, scenario in (
        ("a part", "reentrant", "once"),
        ("a part, not reentrant", "checkpoint", "once"),
        ("the whole", "", "whole checkpoint, reentrant"),
    )
} | {"dropout in place": Program((Op("linear"), Op("nn.Dropout in place"), Op("relu")), recipe="seed")}
STRIDES = {
    f"strides: {name}, {recipe}": Program((Op("linear"), Op(name)), recipe=recipe)
    for name in (
        "relu of a transpose",
        "relu of a transpose, viewed",
        "dropout of relu of a transpose",
        "leaky_relu of a permutation",
        "channels_last",
    )
    for recipe in ("default", "iexact")
} | {"strides: dropout of a transpose": Program((Op("linear"), Op("dropout of a transpose")))}
TYPICAL = {
    "sigmoid, its log in the loss": Program((Op("linear"), Op("steep")), output="sigmoid", loss="bce", n=400),
    "sigmoid and its log in the model": Program((Op("linear"), Op("steep"), Op("log of sigmoid")), n=400),
    "h / sqrt(h.h + eps) with zero rows": Program((Op("linear"), Op("relu"), Op("zero rows over norm")), n=400),
    "log(softmax + 1e-14)": Program((Op("linear"), Op("steep"), Op("log of softmax")), n=400),
    "distances": Program((Op("linear"), Op("distances of neighbours")), n=400),
}
LEFT = {
    f"a pass without backward: {name}": Program((Op("linear"), Op(name), Op("linear")), scenario="skipped")
    for name in ("softmax", "normalize", "over norm", "cumprod", "standardise", "logsumexp", "log_softmax", "LSTM")
} | {
    "losses added up: log_softmax": Program((Op("linear"), Op("log_softmax"), Op("linear")), scenario="accumulated"),
    "a wrapper is tracked": Program((Op("linear"),), around="held"),
}
WORKS = {
    f"works plain: {name}": Program((Op("linear"), Op(name), Op("linear")))
    for name in ("lazy linear", "SAGE lazy", "GAT lazy", "vmap", "func.grad", "teacher", "linear in place in 3d", "FA")
}
RECIPES = {
    f"recipe {recipe}": Program(
        tuple(map(Op, ("BatchNorm1d", "relu", "SAGE", "gelu", "GAT"))), recipe=recipe, features_need_gradient=True
    )
    for recipe in CONFIGS
}
KNOWN = RECIPES | WORKS | LEFT | INTERRUPTED | SHARED | CHANGED | FILLED | DRAWN_AGAIN | STRIDES | TYPICAL
