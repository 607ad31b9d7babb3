"""What each section shows: a module a section, each with the same four names.

TITLE: its heading. CLAIM: what the papers claim. Results: the form of the results in its file. `records(results)`: the
facts of the summary, sentences on what was found, figures and tables (`dibit.reproduce.records`).
"""

from __future__ import annotations

from types import ModuleType

from dibit.reproduce.views import accuracy, blocks, distribution, memory, tuned, variance

VIEWS: dict[str, ModuleType] = {
    "memory": memory,
    "blocks": blocks,
    "variance": variance,
    "distribution": distribution,
    "accuracy": accuracy,
    "tuned": tuned,
}
