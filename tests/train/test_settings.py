"""Settings: one definition, from flags and YAML, checked in sentences."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dibit.recipes import RECIPES
from dibit.train import Settings, UserError
from dibit.train.arguments import build_parser, parse, to_yaml
from dibit.train.settings import groups


def test_defaults_are_sound() -> None:
    settings = parse([])
    settings.check()
    assert settings == Settings()


def test_names_are_unique_and_described() -> None:
    names = [f.name for kind in groups().values() for f in fields(kind)]
    assert len(names) == len(set(names))
    text = build_parser().format_help()
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    assert "Number of epochs" in text


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = Settings.from_flat(
        {
            "layers": 2,
            "lr": 1e-5,
            "clip": 0.5,
            "compare": True,
            "dataset": "planted:300",
            "norm": "none",
            "bits": 4,
            "block": "row",
            "levels": "normal",
            "self_loops": True,
            "split_file": "a split: #1.npz",
            "linear_skip": True,
            "jk": "last",
            "bias": False,
        }
    )
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(settings))
    assert parse(["--config", str(path)]) == settings


@pytest.mark.parametrize(
    ("given", "block"), [("64", 64), ("row", "row"), ("null", None)], ids=["number", "word", "none"]
)
def test_block_is_a_number_or_a_word(tmp_path: Path, given: str, block: object) -> None:
    (tmp_path / "run.yaml").write_text(f"block: {given}\n")
    for words in (["--block", given], ["--config", str(tmp_path / "run.yaml")]):
        settings = parse(words)
        settings.check()
        assert settings.compression.block == block
        assert type(settings.compression.block) is type(block)
    assert "--block N|row" in build_parser().format_help()


@pytest.mark.parametrize("order", [("flag", "file"), ("file", "flag")], ids=lambda order: "-".join(order))
def test_flags_win_over_the_file(tmp_path: Path, order: tuple[str, str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("layers: 5\nlr: 1e-3\nweight-decay: 0.1\ncompare: true\nrecipe: none\n")
    words = {"flag": ["--layers", "2", "--no-compare"], "file": [f"--config={path}"]}
    settings = parse([word for part in order for word in words[part]])
    assert (settings.model.layers, settings.run.compare) == (2, False)
    assert (settings.optimisation.lr, settings.optimisation.weight_decay) == (1e-3, 0.1)
    assert settings.compression.recipe == "none"  # the word, not a missing value


def test_a_later_file_wins(tmp_path: Path) -> None:
    for name, layers in (("a", 5), ("b", 6)):
        (tmp_path / name).write_text(f"layers: {layers}\n")
    assert parse(["--config", str(tmp_path / "a"), "--config", str(tmp_path / "b")]).model.layers == 6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--layrs 3", "no flag --layrs. Did you mean '--layers'"),
        ("--lay 3", "no flag --lay"),
        ("--layers three", "--layers is 'three', expected a whole number"),
        ("--layers 2.5", "--layers is '2.5', expected a whole number"),
        ("--lr fast", "--lr is 'fast', expected a finite number"),
        ("--clip much", "--clip is 'much', expected a finite number"),
        ("--block rwo", "--block is 'rwo', expected a whole number or 'row'."),
        ("--block 0.5", "--block is '0.5', expected a whole number or 'row'."),
        ("--block true", "--block is 'true', expected a whole number or 'row'."),
        ("--layers", "--layers has no value, expected a whole number."),
        ("--layers --quiet", "--layers has no value, expected a whole number."),
        ("--layers 3 4", "nothing to do with '4'"),
        ("--compare=maybe", "--compare takes no value, but is 'maybe'"),
        ("-- cora", "no flag --."),
        ("cora", "nothing to do with 'cora'"),
        ("--config missing.yaml", "Cannot read the settings file missing.yaml: No such file"),
        ("--config", "--config has no value, expected a text."),
    ],
)
def test_words_that_cannot_be_parsed(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(words.split())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layrs: 3", "unknown key 'layrs'. Did you mean 'layers'"),
        ("layers: three", "--layers is 'three', expected a whole number"),
        ("layers: [3", "is not valid YAML"),
        ("- 3", "holds no settings"),
        ("compare: perhaps", "compare is 'perhaps', expected true or false"),
        ("residual: perhaps", "residual is 'perhaps', expected true or false"),
        ("block: rwo", "--block is 'rwo', expected a whole number or 'row'."),
        ("block: 0.5", "--block is '0.5', expected a whole number or 'row'."),
        ("block: true", "--block is 'True', expected a whole number or 'row'."),
        ("levels: [0, 3]", "--levels is '[0, 3]', expected a text."),
        ("clip: true", "--clip is 'True', expected a finite number."),
    ],
)
def test_yaml_that_cannot_be_parsed(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--config", str(path)])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--bits 3", "--bits is 3, expected 1, 2, 4 or 8"),
        ("--block 0", "--block is 0, expected a whole number of at least 1, or 'row'."),
        ("--layers 0", "--layers is 0, expected a whole number of at least 1"),
        ("--hidden 0", "--hidden is 0"),
        ("--dropout 1", "--dropout is 1.0, expected a number from 0 up to but not including 1"),
        ("--dropout -0.1", "--dropout is -0.1"),
        ("--dropout nan", "--dropout is 'nan', expected a finite number"),
        ("--lr 0", "--lr is 0.0, expected a positive number"),
        ("--lr inf", "--lr is 'inf', expected a finite number"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--clip 0", "--clip is 0.0"),
        ("--epochs 0", "--epochs is 0"),
        ("--seeds 0", "--seeds is 0"),
        ("--seed -1", "--seed is -1"),
        ("--svd 0", "--svd is 0"),
        ("--eval-every 0", "--eval-every is 0"),
        ("--checkpoint-every 0", "--checkpoint-every is 0"),
        ("--patience 0", "--patience is 0"),
        (
            "--model sagee",
            "--model is 'sagee', expected one of gcn, sage, gin, gat, gcn2. Did you mean 'sage'",
        ),
        (
            "--recipe excat",
            f"--recipe is 'excat', expected one of {', '.join(RECIPES)}, none. Did you mean 'exact'",
        ),
        (
            "--norm bach",
            "--norm is 'bach', expected one of none, batch, layer, graph, pair. Did you mean 'batch'",
        ),
        ("--aggr median", "--aggr is 'median', expected one of mean, sum, max"),
        ("--model gcn --aggr max", "--aggr max does not apply to --model gcn"),
        ("--model gat --hidden 10", "--hidden 10 cannot be shared among --heads 4"),
        ("--model gat --heads 0", "--heads is 0"),
        ("--recipe none --bits 2", "--bits 2 has no meaning with --recipe none"),
        ("--recipe none --block row", "--block row has no meaning with --recipe none"),
        ("--recipe none --levels normal", "--levels normal has no meaning with --recipe none"),
        ("--recipe none --noise 0.1", "--noise 0.1 has no meaning with --recipe none"),
        ("--recipe iexact --noise 0.1", "--noise 0.1 has no meaning with --recipe iexact"),
        ("--noise 0", "--noise is 0.0, expected a positive number"),
        ("--levels gaussian", "--levels is 'gaussian', expected one of uniform, normal."),
        ("--levels normla", "Did you mean 'normal'"),
        (
            "--residual",
            "--residual does not apply to --model sage, only to gcn2; leave it out, or give --linear-skip.",
        ),
        ("--jk sum", "--jk is 'sum', expected one of last, cat, max, lstm."),
        (
            "--model gcn2 --jk last",
            "--jk does not apply to --model gcn2, only to gcn, sage, gin and gat; leave it out.",
        ),
        (
            "--model gcn2 --linear-skip",
            "--linear-skip does not apply to --model gcn2, only to gcn, sage, gin and gat; leave it out.",
        ),
        ("--model gin --no-bias", "--no-bias does not apply to --model gin, only to gcn, sage and gat; leave it out."),
        ("--model gcn2 --no-bias", "--no-bias does not apply to --model gcn2, only to gcn, sage and gat"),
        ("--jk lstm --hidden 1 --layers 1", "--jk lstm is half as wide as --layers times --hidden, which are both 1"),
        *(
            (f"--jk {jk} --loader {loader}", f"--jk {jk} needs every layer's output at once")
            for jk in ("cat", "max", "lstm")
            for loader in ("neighbor", "cluster", "saint-rw", "saint-node", "shadow")
        ),
        ("--split-file=", "--split-file is empty; give the path of an .npz file, or leave it out."),
        ("--recipe none --compare", "--compare with --recipe none"),
        ("--resume", "--resume needs --out"),
        ("--resume --overwrite --out x", "leave one of them out"),
        ("--alpha 2", "--alpha is 2.0"),
        ("--theta 0", "--theta is 0.0"),
    ],
)
def test_values_that_cannot_be_meant(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(words.split()).check()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "--jk last --loader neighbor",
        "--jk last --loader cluster --linear-skip",
        "--jk cat",
        "--jk lstm --hidden 1 --layers 2",
        "--model gat --no-bias --heads 1",
        "--model gin --bias",
        "--model gcn2 --bias --no-linear-skip",
        "--jk null --split-file null",
    ],
)
def test_values_that_can_be_meant(words: str) -> None:
    parse(words.split()).check()


def test_a_block_in_code_that_cannot_be_meant() -> None:
    with pytest.raises(UserError, match="--block is rwo, expected a whole number of at least 1, or 'row'"):
        Settings().updated(block="rwo").check()


def test_unknown_name_in_code() -> None:
    with pytest.raises(UserError, match=r"no setting 'layer'. Did you mean 'layers'"):
        Settings().updated(layer=3)


@pytest.mark.slow
def test_import_is_light() -> None:
    """`dibit.train` loads neither PyTorch Geometric nor what the extra brings."""
    heavy = ("torch_geometric", "yaml", "rich", "tensorboard", "torchmetrics")
    code = f"import sys, dibit.train.settings; print([m for m in {heavy} if m in sys.modules])"
    core = f"import sys, dibit; print([m for m in {heavy} if m in sys.modules])"
    outputs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (core, code)
    ]
    assert outputs[1] == outputs[0]
