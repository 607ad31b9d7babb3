"""Tensors that somebody else owns: features, graphs, parameters, buffers; and what may rest on them.

Where an operation saves a tensor itself, plain torch keeps a reference, and so does Dibit. Where an operation copies
(`t[i]`, `t * 2`), plain torch keeps the copy; Dibit may compute it again from `t` only if `t` has the same content when
the backward pass comes. Nothing tells of every change: `.data`, NumPy and DLPack write past the version counter. So
content is remembered by a fingerprint when it is read, and a tensor is relied upon only in a *role* (an argument, a
buffer) in which it came through an earlier backward pass unchanged; until then, and always for what is trained, what is
needed is kept. If a tensor changes after all in such a role, the backward pass says so, and the role is not relied
upon again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dibit.codec.fingerprint import fingerprint
from dibit.identity import Weak
from dibit.stream import capturing

LARGE = 1 << 20  # bytes; what is trained or changes anyway is not copied whole beyond this, so it needs no fingerprint

Print = int | Tensor  # of content


@dataclass
class History:
    """What a model's passes have shown.

    Attributes:
        unchanged: by role, whether every tensor that came in it had its content still in the backward pass.
    """

    unchanged: dict[str, bool] = field(default_factory=dict)
    _pending: list[tuple[str, Tensor]] = field(default_factory=list, repr=False)  # comparisons on a device

    def learn(self, role: str, same: bool | Tensor) -> None:
        if isinstance(same, Tensor):
            self._pending.append((role, same))
        else:
            self.unchanged[role] = same and self.unchanged.get(role, True)

    def settle(self) -> None:
        """Read the comparisons of the pass before, which a device has finished long since."""
        while self._pending:
            role, same = self._pending.pop()
            self.learn(role, bool(same))

    def __getstate__(self) -> dict[str, Any]:
        return {"unchanged": dict(self.unchanged), "_pending": []}


class Guard:
    """Compares content at the first sign of each backward pass; lives as long as anything that a pass has kept."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._relied: dict[Any, tuple[Tensor, Print, str]] = {}
        self._watched: list[tuple[Weak, Print, str]] = []
        self._checked = -1  # the backward pass that has been checked

    def watch(self, x: Tensor, content: Print, role: str) -> None:
        """Learn whether a tensor in this role is unchanged when the backward pass comes; holds no memory."""
        self._watched.append((Weak(x), content, role))

    def rely(self, key: Any, x: Tensor, content: Print, role: str) -> None:
        """Something that is kept rests on the content of x."""
        self._relied.setdefault(key, (x.detach(), content, role))

    def unpack(self, kept: Any) -> Tensor:
        """What the hooks of autograd call for each tensor that the pass has saved."""
        if self._watched or self._relied:
            self._check()
        return kept.restore()  # type: ignore[no-any-return]

    def _check(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._checked and task != -1:
            return
        watched, self._watched = self._watched, []
        for weak, content, role in watched:
            x = weak.tensor()
            self.history.learn(role, True if x is None else fingerprint(x) == content)  # what is gone cannot change
        for x, content, role in self._relied.values():
            same = fingerprint(x) == content
            if isinstance(same, Tensor):
                torch._assert_async(same, _CHANGED.format(role))
            elif not same:
                self.history.learn(role, False)
                raise RuntimeError(_CHANGED.format(role))
        self._checked = task


_CHANGED = (
    "{} was changed between the forward and the backward pass, for the first time since this model was compressed, and "
    "this pass had relied on its content. Run the forward pass of this step again: from now on Dibit keeps what it "
    "needs of it."
)


class Owners:
    """Which storages of a pass belong to somebody else, and in which role; lives as long as the pass."""

    def __init__(self, history: History) -> None:
        history.settle()
        self.history = history
        self.guard = Guard(history)
        self.roles: dict[int, str] = {}
        self._others = 0

    def role(self, storage: int) -> str:
        """Of a tensor that somebody else owns; tensors that are neither arguments nor the model's are counted."""
        found = self.roles.get(storage)
        if found is None:
            self._others += 1
            return f"the tensor number {self._others} from outside of the model and its arguments"
        return found

    def read(self, x: Tensor, role: str) -> Print | None:
        """The content of a tensor as an operation is about to read it; `None` where nothing can rest on it anyway."""
        if capturing(x.device):
            return 0  # the graph replays what is written down now: there is no later
        known = self.history.unchanged.get(role)
        if (x.requires_grad or known is False) and x.nbytes > LARGE:
            return None
        content = fingerprint(x)
        if known is None and not x.requires_grad:
            self.guard.watch(x, content, role)
        return content

    def steady(self, x: Tensor, role: str) -> bool:
        """Whether what is kept may rest on x: not trained, and unchanged in every pass so far."""
        return not x.requires_grad and (self.history.unchanged.get(role) is True or capturing(x.device))

    def changed(self, storage: int) -> None:
        """The model itself writes to a tensor that somebody else owns."""
        if storage in self.roles:
            self.history.learn(self.roles[storage], False)
