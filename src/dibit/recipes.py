"""The named recipes: what `compress(model, "default")` stands for."""

from __future__ import annotations

from dibit.config import Config, Project, Sample, did_you_mean

# The papers keep the projected input of every linear layer (features included), a dropout mask of 1 bit, and the
# whole normalised input of BatchNorm.
_papers = {"bits": 2, "reduce": Project(8), "dropout": "mask", "inputs": "compress"}


def _important(ratio: int, norm_ratio: int, least: int, noise: float) -> Config:
    """Rows by their last gradients, of linear inputs and of norm inputs."""
    norm = Config(bits=2, block=1024, reduce=Sample(norm_ratio, by="gradient", least=least), rounding="dither")
    return Config(bits=2, block=128, reduce=Sample(ratio, by="gradient", least=least), norm=norm, noise=noise)


RECIPES: dict[str, Config] = {
    # Measured on the gradient of whole models, all bytes counted (docs/gradient-error.md).
    "default": _important(6, 16, 1024, 0.5),
    "small": _important(10, 24, 512, 1.0),
    "exact": Config(block="row", **_papers),  # type: ignore[arg-type]
    "iexact": Config(block=1024, **_papers),  # type: ignore[arg-type]
    # For whoever wants the speed and the peak of sums over edges without any noise.
    "lossless": Config(lossless=True, dropout="mask"),
}

# They keep what they say, whatever the error of the gradient is.
UNBOUNDED = tuple(name for name, config in RECIPES.items() if config.noise is None)
BOUNDED = tuple(name for name in RECIPES if name not in UNBOUNDED)


def recipe(name: str) -> Config:
    """The `Config` behind a recipe's name.

    Raises:
        ValueError: the name is unknown; the message gives the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; {did_you_mean(str(name), RECIPES)}.")
    return RECIPES[name]
