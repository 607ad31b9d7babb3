"""How noise grows from norm to norm down a chain of layers, by the draws of the codec alone.

    python benchmarks/noise_growth.py --models sage gcn gin --norms layer batch

For each network of `dibit bench noise` it prints q, the noise in the gradient of each convolution's output over its
square, from the loss downwards, where every norm keeps one row of 5 at 8 bits; and the share a of the noise that lies
along the next norm's x_hat, from q_below = (1 + a v) q + q_first, v = 4 (docs/gradient-error.md).
"""

from __future__ import annotations

import argparse
import copy
import itertools

import torch
from torch import Tensor, nn

import dibit
from dibit.bench.noise import NORMS, NetworkSettings, Training
from dibit.engine.model_state import state_of
from dibit.experiments.data import load_prepared

RATIO = 5


def gradients(model: nn.Module, training: Training) -> list[Tensor]:
    """Of each convolution's output, from the loss downwards."""
    found: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(found.append)

    hooks = [conv.register_forward_hook(watch) for conv in model.convs]  # type: ignore[union-attr]
    torch.manual_seed(1)
    model.zero_grad()
    training.step(model)
    for hook in hooks:
        hook.remove()
    return found


def noise(training: Training, draws: int) -> list[float]:
    """The noise of each of these gradients over its square."""
    trial = copy.deepcopy(training.model)
    sampled = dibit.Config(bits=8, rounding="dither", reduce=dibit.Sample(RATIO))
    dibit.compress(trial, dibit.Config(bits=8, norm=sampled))
    state = state_of(trial)
    assert state is not None
    drawn = []
    for state.salt in range(1, draws + 1):
        drawn.append(gradients(trial, training))
    found = []
    for parts in zip(*drawn, strict=True):
        mean = torch.stack(parts).mean(0)
        variance = sum(float((part - mean).square().sum()) for part in parts) / (draws - 1)
        found.append(variance / max(float(mean.square().sum()) - variance / draws, 1e-30))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="planted:6000")
    parser.add_argument("--root", default="data")
    parser.add_argument("--models", nargs="+", default=["sage", "gcn", "gin"])
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["layer", "batch"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 5, 30])
    parser.add_argument("--draws", type=int, default=8)
    args = parser.parse_args()
    graph = load_prepared(args.graph, args.root)
    for model in args.models:
        for norm in args.norms:
            training = Training(NetworkSettings(model, norm, False, args.layers), graph)
            for epoch in sorted(args.epochs):
                training.until(epoch)
                q = noise(training, args.draws)
                a = [(below - q[0] - above) / (RATIO - 1) / above for above, below in itertools.pairwise(q)]
                shown = " ".join(f"{value:.2g}" for value in q), " ".join(f"{value:.2f}" for value in a)
                print(f"{model:5} {norm:6} epoch {epoch:3}  q {shown[0]}  a {shown[1]}", flush=True)


if __name__ == "__main__":
    main()
