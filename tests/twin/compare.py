"""Whether two runs of a program had the same outcome; the statistics of what may differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.twin.grammar import Program
from tests.twin.run import CONFIGS, Outcome, Twin, growth
from tests.unbiased import bias_of

_PARTS = 4  # tensors that stand for one of plain's: codes, ranges, a seed, scores
CHEAP, MANY = 8, 64  # draws: a first look; each of the two independent sets that decide
ROUNDING = 3e-4  # of the whole gradient's norm: what other orders of summation give
LOW = 5e-2  # the same where the program computes in bfloat16
# Median error of a draw, over the gradient's norm, beyond which it is of no use; of a new recipe that of "default".
WORST = dict.fromkeys(CONFIGS, 4.0) | {"small": 5.0, "rows": 8.0, "8 bits": 0.5, "lossless": 0.1}
WORST |= {"exact": 30.0, "iexact": 40.0}  # the papers' projection alone makes 8


@dataclass
class Verdict:
    """What differs, and what was looked at."""

    problems: list[str]
    compared: bool  # the gradient could be compared
    failed: bool  # plain ends in an error


def judge(program: Program, memory: bool = True) -> Verdict:
    """Run a program in every way."""
    twin = Twin(program)
    first = twin.compressed(1)
    masks = first.masks if program.recipe == "seed" and first.masks else None
    plain = twin.plain(masks)
    problems = list(_differences(program, plain, first))
    truth, compared = _truth(twin, plain, masks), False
    if truth is not None and not first.error and not problems:
        compared = True
        problems += _gradient(twin, truth, first)
    if memory and not problems and not plain.error and not first.error:
        try:
            problems += _memory(twin)
        except Exception as error:
            problems.append(f"a second pass of the same model ends in {type(error).__name__}: {str(error)[:100]}")
    return Verdict(problems, compared, bool(plain.error))


def _differences(program: Program, plain: Outcome, other: Outcome) -> Iterator[str]:
    if other.error and not plain.error:
        yield f"fails where plain works: {other.error}: {other.message[:160]}"
    elif other.error and other.error != plain.error:
        yield f"fails as {other.error} ({other.message[:80]}), plain as {plain.error} ({plain.message[:80]})"
    seeded = program.recipe == "seed" and bool(other.masks)
    if not other.error or other.error == plain.error:
        if len(plain.seen) != len(other.seen) and not plain.error:
            yield f"{len(plain.seen)} results, compressed {len(other.seen)}"
        for at, (a, b) in enumerate(zip(plain.seen, other.seen, strict=False)):
            if not isinstance(a.value, Tensor) or not isinstance(b.value, Tensor):
                if type(a.value) is not type(b.value) or a.value != b.value:
                    yield f"result {at}: {a.value!r}, compressed {b.value!r}"
            elif a.value.shape != b.value.shape or a.value.dtype != b.value.dtype:
                yield f"result {at}: {a.value.shape} {a.value.dtype}, compressed {b.value.shape} {b.value.dtype}"
            elif not same(a.value, b.value, 1e-3 if seeded else 0.0):
                yield f"result {at}: other bits, at most {(a.value.double() - b.value.double()).abs().max():.2g} away"
            elif a.stride != b.stride:
                yield f"result {at}: strides {a.stride}, compressed {b.stride}"
            elif a.needs_gradient != b.needs_gradient:
                yield f"result {at}: requires_grad {a.needs_gradient}, compressed {b.needs_gradient}"
    if not plain.error and not other.error:
        if plain.gradients.keys() != other.gradients.keys():
            yield f"gradients of other tensors: {sorted(plain.gradients.keys() ^ other.gradients.keys())}"
        for name, buffer in plain.buffers.items():
            if name not in other.buffers or not same(buffer, other.buffers[name], 1e-3 if seeded else 0.0):
                yield f"buffer {name}: other bits"
        if not seeded and program.recipe != "seed" and not torch.equal(plain.next_draws, other.next_draws):
            yield "torch's generator stands elsewhere"
    for what in other.left:
        if what not in plain.left:
            yield f"left behind: {what}"


def same(a: Tensor, b: Tensor, tolerance: float = 0.0) -> bool:
    """Bit for bit, NaN included; or nearly."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not tolerance and not torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()):
        return False  # -0. == 0., but 1 / -0. is another number
    return torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


def _truth(twin: Twin, plain: Outcome, masks: list[Tensor] | None) -> dict[str, Tensor] | None:
    """The gradient to be estimated; `None` where plain itself is wrong or ends in an error."""
    if not twin.program.changes and not plain.error:
        return plain.gradients
    ideal = twin.ideal(masks)
    if ideal.error:
        return None
    if not plain.error and any(not _near(g, plain.gradients.get(name)) for name, g in ideal.gradients.items()):
        return None
    return ideal.gradients


def _near(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool((a - b).norm() <= 1e-5 * a.norm() + 1e-12)


def _flat(gradients: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in names])


def _gradient(twin: Twin, truth: dict[str, Tensor], first: Outcome) -> Iterator[str]:
    names = sorted(truth.keys() & first.gradients.keys())
    if not names:
        return
    g = _flat(truth, names)
    d = _flat(first.gradients, names)
    if not bool(g.isfinite().all()):
        if bool(d.isfinite().all()):
            yield "the gradient is finite, plain's is not"
        return
    norm = g.norm().item()
    rounding = (LOW if twin.program.low else ROUNDING) * norm

    def draws(start: int, count: int) -> Tensor:
        found = []
        for salt in range(start, start + count):
            outcome = twin.compressed(salt)
            if outcome.error or any(name not in outcome.gradients for name in names):
                raise Unsteady(f"draw {salt}: {outcome.error} {outcome.message[:100]}")
            found.append(_flat(outcome.gradients, names))
        return torch.stack(found)

    if norm == 0:
        if d.norm() > 1e-6:
            yield f"plain's gradient is zero, compressed {d.norm():.2g}"
        return
    try:
        second = draws(2, 1)
        if torch.equal(second[0], d) and (d - g).norm() <= rounding:
            return  # nothing is lossy
        if torch.equal(second[0], d) and (draws(3, 5) == d).all():  # not what takes few values
            yield f"exact, and wrong by {(d - g).norm() / norm:.3g} of the gradient" + _worst(truth, names, d - g)
            return
        few = torch.cat([d[None], second, draws(3, CHEAP - 2)])
        if not _suspicious(few, g, rounding, twin.program.recipe):
            return
        one, two = draws(100, MANY), draws(1000, MANY)
    except Unsteady as error:
        yield f"not the same in every draw: {error}"
        return
    yield from _decided(one, two, g, truth, names, rounding, twin)


class Unsteady(Exception):
    """Some draw ends otherwise than the first."""


def _suspicious(few: Tensor, g: Tensor, rounding: float, recipe: str) -> bool:
    if not bool(few.isfinite().all()):
        return True
    miss = few.mean(0) - g
    spread = (few - few.mean(0)).square().sum() / (len(few) - 1)
    if miss.norm() <= rounding:
        return False
    parts = few @ g / g.square().sum()
    return bool(
        len(few) * miss.square().sum() > 3 * spread
        or ((few - g).norm(dim=1).median() > WORST[recipe] * g.norm())
        or ((parts.median() - 1).abs() > 0.2 and (parts < 1).double().mean().sub(0.5).abs() > 0.3)
        or _suspicious_parts(few, g, rounding)
    )


def _suspicious_parts(few: Tensor, g: Tensor, rounding: float) -> bool:
    """Blocks of 16 elements on their own: a parameter's bias drowns in the noise of the others."""
    size = 16
    rest = -len(g) % size
    few = torch.nn.functional.pad(few, (0, rest)).view(len(few), -1, size)
    g = torch.nn.functional.pad(g, (0, rest)).view(-1, size)
    miss = (few.mean(0) - g).square().sum(-1)
    spread = (few - few.mean(0)).square().sum((0, 2)) / (len(few) - 1)
    return bool(((len(few) * miss > 4 * spread) & (miss > rounding**2)).any())


def _decided(
    one: Tensor, two: Tensor, g: Tensor, truth: dict[str, Tensor], names: list[str], rounding: float, twin: Twin
) -> Iterator[str]:
    both = torch.cat([one, two])
    if not bool(both.isfinite().all()):
        yield "the gradient is not finite, plain's is"
        return
    norm = g.norm()
    median = ((both - g).norm(dim=1).median() / norm).item()
    far = median > WORST[twin.program.recipe]
    parts = both @ g / g.square().sum()
    side = (parts < 1).double().mean().item()
    aside = abs(parts.median().item() - 1) > 0.2 and abs(side - 0.5) > 0.3
    if (far or aside) and (_is_rounding(twin, g, names) or _falls_with_bits(median, twin, g, names)):
        far = aside = False
    if far:
        yield f"no draw is near: median error {median:.2f} of the gradient"
    if aside:
        yield (
            f"the typical draw is {parts.median():.2f} of the gradient ({side:.0%} below 1, mean {parts.mean():.2f}, "
            f"largest error {(both - g).norm(dim=1).max() / norm:.1f})"
        )
    at = 0
    for name in ["the whole", *names]:
        size = len(g) if name == "the whole" else truth[name].numel()
        start, at = (0, 0) if name == "the whole" else (at, at + size)
        cut = slice(start, start + size)
        a, b = (bias_of(part[:, cut].__getitem__, g[cut], len(part)) for part in (one, two))
        miss = (both[:, cut].mean(0) - g[cut]).norm().item()
        if miss <= rounding:
            continue
        if all((bias.statistic > 3 and bias.z > 5) or (bias.relative == 0 and not bias.exact) for bias in (a, b)):
            yield (
                f"biased, {name}: statistic {a.statistic:.1f} and {b.statistic:.1f}, "
                f"mean {miss / max(g[cut].norm().item(), 1e-30):.3g} of it away"
            )


def _is_rounding(twin: Twin, g: Tensor, names: list[str]) -> bool:
    """Whether plain's own gradient is the rounding of sums that cancel, as that of a loss that is a constant."""
    found = twin.shaken().gradients
    return not all(name in found for name in names) or bool((_flat(found, names) - g).norm() > 0.1 * g.norm())


def _falls_with_bits(median: float, twin: Twin, g: Tensor, names: list[str]) -> bool:
    """Whether 8 bits take the error down as they take rounding down, 85 times: then the program magnifies any rounding.

    A derivative that most draws miss is missed at 8 bits, too.
    """
    if twin.program.recipe not in ("default", "small", "rows"):
        return False
    fine = Twin(replace(twin.program, recipe="8 bits"))
    found = [fine.compressed(salt).gradients for salt in range(1, CHEAP + 1)]
    errors = torch.stack([(_flat(gradients, names) - g).norm() for gradients in found])
    return bool(errors.median() < median * g.norm() / 30)


def _worst(truth: dict[str, Tensor], names: list[str], miss: Tensor) -> str:
    at, found = 0, []
    for name in names:
        size = truth[name].numel()
        part = miss[at : at + size].norm() / truth[name].double().norm().clamp(min=1e-30)
        found.append((part.item(), name))
        at += size
    return ", most in " + ", ".join(f"{name} ({part:.2g})" for part, name in sorted(found, reverse=True)[:3])


def _memory(twin: Twin) -> Iterator[str]:
    """What passes and models leave, beyond what they leave without Dibit."""
    each, ever, alive = growth(twin, True)
    if each <= 0 and ever <= 0 and not alive:
        return
    plain_each, plain_ever, plain_alive = growth(twin, False)
    if ever > _PARTS * max(plain_ever, 0):
        yield f"a model leaves {ever} tensors for ever, plain {plain_ever}"
    elif alive and not plain_alive:
        yield "the model is never freed"
    if each > _PARTS * max(plain_each, 0):
        yield f"every pass leaves {each} tensors, plain {plain_each}"
