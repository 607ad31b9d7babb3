"""Tensors that somebody else owns (features, graphs, parameters, buffers), and whether residuals may rely on them.

Where an operation saves a tensor itself, plain torch keeps a reference, and so does Dibit. Where an operation copies
(`t[i]`, `t * 2`), plain torch keeps the copy; Dibit may compute it again from `t` only if `t` has the same content in
the backward pass. No counter shows every change: `.data`, NumPy and DLPack write past the version counter. So what is
needed is kept, unless

- plain torch, too, keeps a reference to the tensor in the same pass (a layer reads the features beside their
  aggregate), and every backward pass so far has read it, or
- the tensor holds integers or bools (a graph, of 32 KiB and more) and came through an earlier backward pass unchanged
  in the same *role* (an argument, a buffer). Its content is remembered by a fingerprint and compared in each backward
  pass; if it did change, the pass says so, and the role is not relied upon again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dibit._torch.private.autograd import backward_pass
from dibit._torch.private.operations import assert_true
from dibit._torch.storage_identity import Weak
from dibit.codec.fingerprint import fingerprint
from dibit.codec.seed_stream import capturing

SMALL = 1 << 15  # bytes; of less, copies are kept: nothing to speak of beside the activations
LARGE = 1 << 20  # bytes; numbers that may change are not copied whole beyond this, so they need no fingerprint

Print = int | Tensor  # of content


@dataclass
class History:
    """What a model's passes have shown.

    Attributes:
        steady: by role, whether what a pass keeps may rely on the content of the tensor in it.
    """

    steady: dict[str, bool] = field(default_factory=dict)
    _unused: set[str] = field(default_factory=set, repr=False)  # roles whose reference some backward pass did not read
    _uses: list[Uses] = field(default_factory=list, repr=False)  # of passes since the last one began
    _pending: list[tuple[str, Tensor]] = field(default_factory=list, repr=False)  # comparisons on a device

    def learn(self, role: str, same: bool | Tensor) -> None:
        """Record whether the tensor in this role had the same content in the backward pass; bool 0-d on a device."""
        if isinstance(same, Tensor):
            self._pending.append((role, same))
        else:
            self.steady[role] = same and self.steady.get(role, True)

    def settle(self) -> None:
        """Read what the passes before have shown: comparisons that a device has finished long since, and uses."""
        while self._uses:
            for role in self._uses.pop().missed():
                self._unused.add(role)
                self.steady[role] = False
        while self._pending:
            role, same = self._pending.pop()
            self.learn(role, bool(same))

    def referenced(self, role: str, here: bool) -> None:
        """A pass has ended; `here`: plain torch, too, would keep a reference to the tensor in this role."""
        self.steady[role] = here and role not in self._unused

    def watch(self, uses: Uses) -> None:
        """A pass has ended; `settle` looks at what its backward passes have read."""
        self._uses.append(uses)

    def __getstate__(self) -> dict[str, Any]:
        return {"steady": dict(self.steady), "_unused": set(self._unused), "_uses": [], "_pending": []}


class Uses:
    """Which backward passes of one forward pass read the references that plain torch would keep, too.

    If one did not (a head that is not in the loss, a loss that was first), its gradient did not depend on them.
    """

    def __init__(self) -> None:
        self._roles: dict[int, str] = {}
        self._seen: dict[int, set[int]] = {}
        self._all: set[int] = set()

    def expect(self, storage: int, role: str) -> Callable[[], None]:
        """A reference is kept. Returns what to call when a backward pass reads it."""
        self._roles[storage] = role
        return functools.partial(self._use, storage)

    def _use(self, storage: int) -> None:
        self._seen.setdefault(storage, set()).add(backward_pass())

    def run(self, task: int) -> None:
        """The backward pass with this number has read something of this forward pass."""
        self._all.add(task)

    def missed(self) -> list[str]:
        """Roles whose references not all backward passes have read."""
        return [role for storage, role in self._roles.items() if not self._all <= self._seen.get(storage, set())]


class Guard:
    """Compares content at the first sign of each backward pass; lives as long as anything that a pass has kept."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._relied: dict[Any, tuple[Weak, Print, str]] = {}
        self._watched: list[tuple[Weak, Print, str]] = []
        self._checked = -1  # the backward pass that has been checked
        self.uses = Uses()

    def watch(self, x: Tensor, content: Print, role: str) -> None:
        """Learn whether a tensor in this role is unchanged when the backward pass comes; holds no memory."""
        self._watched.append((Weak(x), content, role))

    def rely(self, key: Any, x: Tensor, content: Print, role: str) -> None:
        """Something that is kept relies on the content of x."""
        if key not in self._relied:
            self._relied[key] = Weak(x), content, role  # what relies on x keeps it alive

    def unpack(self, kept: Any) -> Tensor:
        """Restore a tensor that the pass has saved: autograd's unpack hook. Each backward pass checks content first."""
        task = backward_pass()
        if task != self._checked or task == -1:
            if task != -1:
                self.uses.run(task)
            self._check()
            self._checked = task
        return kept.restore()  # type: ignore[no-any-return]

    def _check(self) -> None:
        watched, self._watched = self._watched, []
        for weak, content, role in watched:
            x = weak.tensor()
            self.history.learn(role, True if x is None else fingerprint(x) == content)  # what is gone cannot change
        for weak, content, role in self._relied.values():
            x = weak.tensor()
            same = True if x is None else fingerprint(x) == content
            if isinstance(same, Tensor):
                assert_true(same, _CHANGED.format(role))
            elif not same:
                self.history.learn(role, False)
                raise RuntimeError(_CHANGED.format(role))


_CHANGED = (
    "{} was changed between the forward and the backward pass, for the first time since this model was compressed, and "
    "this pass had relied on its content. Run the forward pass of this step again: from now on Dibit keeps what it "
    "needs of it."
)


def is_whole(x: Tensor) -> bool:
    """Whether a tensor holds integers or bools: indices, masks."""
    return not (x.is_floating_point() or x.is_complex())


class Owners:
    """Which storages of a pass belong to somebody else, and in which role; lives as long as the pass."""

    def __init__(self, history: History) -> None:
        history.settle()
        self.history = history
        self.guard = Guard(history)
        self.roles: dict[int, str] = {}
        self.numbers: set[int] = set()  # storages of floating-point tensors
        self._others = 0

    def role(self, storage: int) -> str:
        """The role of a tensor that somebody else owns: one that is no argument and not the model's gets a number."""
        found = self.roles.get(storage)
        if found is None:
            self._others += 1
            return f"the tensor number {self._others} from outside of the model and its arguments"
        return found

    def read(self, x: Tensor, role: str) -> Print | None:
        """Fingerprint of a tensor that an operation is about to read; `None` if nothing can rely on it anyway."""
        if capturing(x.device):
            return 0  # the graph replays what is written down now: there is no later
        known, whole = self.history.steady.get(role), is_whole(x)
        if x.nbytes > LARGE and (known is False or not whole):
            return None
        content = fingerprint(x)
        if known is None and whole:
            self.guard.watch(x, content, role)
        return content

    def steady(self, x: Tensor, role: str) -> bool:
        """Whether what is kept may rely on the content of x."""
        return not x.requires_grad and (self.history.steady.get(role) is True or capturing(x.device))

    def relied(self, x: Tensor, role: str) -> bool:
        """Whether it relies on x instead of a copy: it may, and x is no small tensor of integers."""
        small = is_whole(x) and x.nbytes < SMALL and not capturing(x.device)
        return not small and self.steady(x, role)

    def referenced(self, storages: Collection[int]) -> list[int]:
        """A pass ends: the next one may rely on floating-point tensors that plain torch, too, keeps by reference.

        Args:
            storages: of the tensors that plain torch would keep by reference in this pass.

        Returns:
            Storages that this pass relied on although they are not among these.
        """
        wrong = []
        for storage, role in self.roles.items():
            if storage in self.numbers:
                if self.history.steady.get(role) and storage not in storages:
                    wrong.append(storage)
                self.history.referenced(role, storage in storages)
        self.history.watch(self.guard.uses)
        return wrong

    def changed(self, storage: int) -> None:
        """The model itself writes to a tensor that somebody else owns."""
        if storage in self.roles and storage not in self.numbers:
            self.history.learn(self.roles[storage], False)
