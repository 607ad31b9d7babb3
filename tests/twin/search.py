"""Random programs until time is up; what is found is made small."""

from __future__ import annotations

import faulthandler
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.twin.compare import Verdict, judge
from tests.twin.grammar import Op, Program
from tests.twin.strategies import programs

OFTEN = 3  # a find of the same kind is made small so many times
LONGEST = 300  # seconds that a program may take, made small included
CHUNK = 40  # programs that hypothesis draws from one seed


@dataclass
class Find:
    """A program whose outcomes differ, as small as it was made."""

    program: Program
    problems: list[str]
    first: Program
    seconds: float  # since the search began
    number: int  # of the program in the search

    def text(self) -> str:
        """The program, ready to be run from the project's root."""
        head = "".join(f"# {problem}\n" for problem in self.problems)
        how = f"# recipe {self.program.recipe!r}{_around(self.program)}\n"
        return f"{head}{how}{self.program.source()}\n{footer(self.program)}"


def footer(program: Program) -> str:
    """Runs a printed program as the search did."""
    return (
        'if __name__ == "__main__":\n    from tests.twin.compare import judge\n'
        "    from tests.twin.grammar import Fill, Index, Op, Program, Read, Twins\n\n"
        f"    print(*judge({program!r}).problems, sep='\\n')\n"
    )


def _around(program: Program) -> str:
    return f", around it: {program.around}" if program.around else ""


@dataclass
class Progress:
    """What a search has tried."""

    programs: int = 0
    compared: int = 0
    failed: int = 0


def search(
    until: float,
    first: int,
    events: Counter[str],
    on: Callable[[Progress, Find | None, Program | None], None],
    recipe: str = "",
) -> None:
    """Judge programs until `until` (`time.monotonic`); `on` hears of each program before it runs and after it.

    All have the recipe, if one is given.
    """
    progress, known, began = Progress(), Counter[str](), time.monotonic()
    chunk = first * 1_000_000
    while time.monotonic() < until:

        @seed(chunk)
        @settings(
            max_examples=CHUNK,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(programs(recipe=recipe))
        def look(program: Program) -> None:
            if time.monotonic() > until:
                return
            on(progress, None, program)
            verdict = verdict_of(program)
            progress.programs += 1
            progress.compared += verdict.compared
            progress.failed += verdict.failed
            events.update(set(program.events()))
            found = None
            if verdict.problems and known[kind(verdict.problems[0])] < OFTEN:
                known[kind(verdict.problems[0])] += 1
                small, problems = shrunk(program, verdict.problems)
                found = Find(small, problems, program, time.monotonic() - began, progress.programs)
            on(progress, found, None)

        look()
        chunk += 1


def work(minutes: float, seed: int, out: Any, running: str, recipe: str = "") -> None:
    """Search in this process; tell `out` of programs and finds. `running` is the file of the program that runs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    events: Counter[str] = Counter()

    def on(progress: Progress, find: Find | None, begins: Any) -> None:
        if begins is not None:
            faulthandler.dump_traceback_later(LONGEST, exit=True)  # a deadlock is a find, too
            Path(running).write_text(begins.source() + "\n" + footer(begins))
        else:
            told = None if find is None else (find.text(), find.problems, find.number, find.seconds)
            out.put((seed, (progress.programs, progress.compared, progress.failed), told))

    search(time.monotonic() + 60 * minutes, seed, events, on, recipe)
    faulthandler.cancel_dump_traceback_later()
    out.put((seed, None, events))


def verdict_of(program: Program) -> Verdict:
    """The verdict; what breaks the harness itself is a find, too."""
    try:
        return judge(program)
    except Exception as error:
        return Verdict([f"the harness ends in {type(error).__name__}: {str(error)[:200]}"], False, False)


def kind(problem: str) -> str:
    """A problem without its numbers and names."""
    return re.sub(r"\d[\d.e+-]*", "#", problem.split(", most in")[0])[:70]


def shrunk(program: Program, problems: list[str], tries: int = 60, seconds: float = 60) -> tuple[Program, list[str]]:
    """A smaller program with a problem of the same kind."""
    wanted, end = kind(problems[0]), time.monotonic() + seconds
    again = True
    while again and tries > 0 and time.monotonic() < end:
        again = False
        for smaller in _smaller(program):
            tries -= 1
            found = [p for p in verdict_of(smaller).problems if kind(p) == wanted]
            if found:
                program, problems, again = smaller, found, True
                break
            if tries <= 0 or time.monotonic() > end:
                break
    return program, problems


def _smaller(program: Program) -> Iterator[Program]:
    for at in range(len(program.ops)):
        if len(program.ops) > 1:
            yield replace(program, ops=program.ops[:at] + program.ops[at + 1 :])
    default = Program(())
    for part in fields(Program):
        value = getattr(default, part.name)
        if part.name != "ops" and getattr(program, part.name) != value:
            yield replace(program, **{part.name: value})
    for at, op in enumerate(program.ops):
        for smaller in _simpler(op):
            yield replace(program, ops=(*program.ops[:at], smaller, *program.ops[at + 1 :]))


def _simpler(op: Op) -> Iterator[Op]:
    if op.wrap:
        yield replace(op, wrap="")
    if op.back != 1:
        yield replace(op, back=1)
    if getattr(op, "when", "after") not in ("after", "never"):
        yield replace(op, when="never")  # type: ignore[call-arg]
