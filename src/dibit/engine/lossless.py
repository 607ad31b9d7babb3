"""What is kept without any loss: by reference, from what is kept anyway, or once for equal content."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dibit._torch.storage_identity import holders, storage_key, storages, strided
from dibit.codec.fingerprint import fingerprint
from dibit.engine.holdings import Holdings
from dibit.engine.ledger import Ledger
from dibit.engine.owners import is_whole
from dibit.recompute.nodes import SMALL, Node, nbytes
from dibit.recompute.recorder import Tape
from dibit.residuals.exact import Exact, LosslessForm, Narrowed, Recomputed, detach_copies, exact, narrow


class LosslessForms:
    """The exact residuals of one pass, and the tape from which tensors are computed again.

    What the words mean here, in `Holdings` and in `Owners`:

    - *held*: the caller or the model keeps the memory of a tensor through the backward pass. Its content may change.
    - *steady*, *settled*: a residual may rely on the content of a held tensor, because of what earlier passes showed
      for its role (see `dibit.engine.owners`). `Owners.steady` answers for one part of a tensor, `Holdings.settled`
      for all parts. `LosslessForms.steady` also asks whether each part can be secured.
    - *relied*: steady, and not a small tensor of integers, which is rather copied (`Owners.relied`).
    - *secure*: choose a reference or a copy, so that the backward pass reads the content that the forward pass read.
      `secure` does so for one node of the tape, `secured` for all tensors that a program starts from.
    - *exactly*: any exact residual of a tensor, the one of fewest bytes. It may be a program that computes it again.
    - *once*: the tensor itself, narrowed if it can be, and shared with an earlier constant of equal content.

    Args:
        holdings: whose memory the tensors of the pass lie in.
        ledger: counts the references that have to become copies.

    Attributes:
        tape: the operations of the pass, as far as their results can be computed again.
    """

    def __init__(self, holdings: Holdings, ledger: Ledger | None) -> None:
        self.holdings = holdings
        self.owners = holdings.owners
        self.tape = Tape(holdings.key, self.free, self._note_owner)
        self._ledger = ledger
        self._forms: dict[Any, Exact | Narrowed] = {}  # by purpose ("lossless", "copy", "leaf") and content
        self._content: dict[Any, list[Exact | Narrowed]] = {}  # by dtype and shape
        self._leaves: dict[int, list[Exact]] = {}  # by storage: kept in the place of tensors computed from them
        self._plain: dict[int, list[weakref.ref[Exact]]] = {}  # by storage: kept as plain torch keeps them

    def free(self, x: Tensor) -> bool:
        """Whether x, a strided tensor, can be computed from in the backward pass at no cost.

        It is kept exactly already, or somebody else holds it and has never changed it between the passes.
        """
        key = self.holdings.key(x)
        if key in self.holdings.referenced or any((form, key) in self._forms for form in ("lossless", "copy", "leaf")):
            return True
        role = self.holdings.roles.get(key[0])
        return role is not None and self.owners.relied(x, role)

    def steady(self, x: Tensor) -> bool:
        """Whether a residual may rely on the content that x has now, a tensor that somebody else holds.

        Earlier passes have shown whether it changes before the backward pass: `dibit.engine.owners`.
        """
        parts = storages(x)
        nodes = [self.tape.node(part) for part in parts]  # remembers the content
        return self.holdings.settled(x) and all(self.secure(node, copied=False) is not None for node in nodes)

    def exactly(self, x: Tensor) -> LosslessForm:
        """x in the fewest bytes that lose nothing: from what is kept anyway, narrowed, once for equal content."""
        if ("lossless", self.holdings.key(x)) not in self._forms:
            limit = nbytes(x) * (0.5 if x.dtype == torch.int64 else 1)
            recomputed = self.recomputed(x, limit)
            if recomputed is not None:
                return recomputed
        return self.once(x)

    def recomputed(self, x: Tensor, limit: float) -> Recomputed | None:
        """x computed again from tensors that take fewer bytes than the limit, if it can be."""
        while (leaves := self.tape.cut(x, limit)) is not None:
            forms = self.secured(leaves)
            if forms is not None:
                return Recomputed(forms, self.tape.program(x, leaves), self.tape.shared)
        return None

    def secured(self, leaves: Sequence[Node]) -> tuple[Exact | Narrowed, ...] | None:
        """Exact residuals of the tensors that a program starts from; `None` if one is lost: no later cut has it."""
        forms = []
        for node in leaves:
            form = self.secure(node)
            if form is None:
                self.tape.lose(node)
                return None
            forms.append(form)
        return tuple(forms)

    def secure(self, node: Node, copied: bool = True) -> Exact | Narrowed | None:
        """Keep the tensor of a node so that the backward pass reads the content that the forward pass read.

        Args:
            copied: a small graph is copied, not relied upon. `False`: the residual must read the tensor itself.

        Returns:
            A reference, if this pass made the tensor, if it is kept anyway, or if nobody changes it; else a copy.
            `None`: the content is lost.
        """
        x = node.tensor()
        assert x is not None
        root, key = node.root, self.holdings.key(x)
        if root is not None and key not in self.holdings.referenced:
            for copy in (self._forms.get(("copy", key)), self._forms.get(("lossless", key))):
                if copy is not None and storage_key(copy.x) != storage_key(x):
                    return copy
            whole = root.tensor()
            steady = self.owners.relied(x, root.role) if copied else self.owners.steady(x, root.role)
            if whole is None or (root.content is None and (is_whole(x) or not steady)):
                return None
            if not steady:
                if x.device.type == "cpu" and fingerprint(whole) != root.content:
                    return None
                return self._copy(x)
            if is_whole(x):
                self.owners.guard.rely(self.holdings.key(whole), whole, root.content, root.role)
        return self.leaf(x)

    def leaf(self, x: Tensor) -> Exact | Narrowed:
        """x itself, as what others are computed from; a copy as soon as somebody writes to it."""
        key = ("leaf", self.holdings.key(x))
        if key in self._forms:
            return self._forms[key]
        x, held = x.detach(), self.holdings.held(x)  # what is kept must not hold the graph that it belongs to
        if not held and x.untyped_storage().nbytes() > 2 * nbytes(x):
            x = x.clone()  # a small view would keep all that it is a view of
            held = False
        if held:  # of integers the content is compared: neither their version nor their owner's `set_` matters
            kept: Exact | Narrowed = exact(x.data if is_whole(x) else x)
        else:
            kept = self.once(x)
        self._forms[key] = kept = self._may_change(kept)
        self.tape.cuts.clear()  # what starts from x costs less now
        return kept

    def once(self, x: Tensor) -> Exact | Narrowed:
        """x as it is or narrowed, on an earlier constant of the same content where there is one."""
        if x.is_floating_point() and x.numel() != max(x.shape, default=0):
            return self._as_plain(exact(x), x)  # an activation: its content is its own
        key = ("lossless", self.holdings.key(x))
        if key not in self._forms:
            kept = narrow(x)
            node = self.tape.nodes.get(self.holdings.key(x))
            # Of a tensor that an operation has inside, nobody can say whether it will be written to.
            inside = node is not None and node.call is not None and self.holdings.is_made(x)
            self._forms[key] = self._shared_content(kept) if inside or storage_key(kept.x) != storage_key(x) else kept
            self.tape.cuts.clear()  # what starts from x costs less now
        return self._forms[key]

    def follow(self, kept: Exact, x: Tensor) -> None:
        """A rule keeps x itself: if a write turns earlier residuals of x into copies, this one becomes a copy, too."""
        if not strided(kept.x):
            return
        if (leaves := self._leaves.get(storage_key(kept.x))) is not None:
            leaves.append(kept)
        else:
            self._as_plain(kept, x)

    def _as_plain(self, kept: Exact, x: Tensor) -> Exact:
        if kept.x is not x:  # a tensor object of its own, which `let_go` can count
            self._plain.setdefault(storage_key(kept.x), []).append(weakref.ref(kept))
        return kept

    # -- writes, and the end ----------------------------------------------------------------------------------------

    def copy_leaves(self, storage: int) -> None:
        """Somebody writes to a storage: what is kept by a reference to it becomes a copy."""
        detach_copies(self._leaves.pop(storage, ()))

    def copy_aliases(self, x: Tensor, storage: int) -> None:
        """The same for other storages on the memory of x: what comes back through DLPack has a storage of its own."""
        address = x.untyped_storage().data_ptr()
        for node in list(self.tape.nodes.values()):
            other = node.ref()
            if other is not None and other.untyped_storage().data_ptr() == address != 0:
                alias = self.holdings.storage(other)
                if alias != storage:
                    self.copy_leaves(alias)
                    self.holdings.count_change(alias)
                    self.holdings.expose(alias)

    def let_go(self) -> None:
        """The pass ends: what somebody else holds is out of sight from now on, so references to it become copies."""
        for storage, leaves in self._leaves.items():
            if storage in self.holdings.roles:
                continue
            others = holders(leaves[0].x)
            plain = [kept for ref in self._plain.get(storage, ()) if (kept := ref()) is not None]
            if others is None or others > len({id(kept.x) for kept in (*leaves, *plain)}):
                detach_copies(leaves)
                if self._ledger is not None:
                    for leaf in leaves:
                        self._ledger.copied(storage, leaf.x)

    def clear(self) -> None:
        """The pass has ended."""
        for table in (self._forms, self._content, self._leaves, self._plain):
            table.clear()
        self.tape.clear()

    # -- one tensor -------------------------------------------------------------------------------------------------

    def _note_owner(self, node: Node, x: Tensor) -> None:
        """Remember the content of a tensor that somebody else owns, before it is read."""
        if not self.holdings.is_made(x):
            node.role = self.owners.role(storage_key(x))
            node.content = self.owners.read(x, node.role)

    def _copy(self, x: Tensor) -> Exact | Narrowed:
        """A copy that nobody else can write to, once for equal content."""
        kept = narrow(x.detach())
        if storage_key(kept.x) == storage_key(x):
            kept = kept.with_tensor(kept.x.clone())
        self._forms["copy", self.holdings.key(x)] = kept = self._shared_content(kept)
        self.tape.cuts.clear()
        return kept

    def _shared_content(self, kept: Exact | Narrowed) -> Exact | Narrowed:
        """`kept` on an earlier constant of equal content: each layer makes indices and normalised weights anew."""
        if kept.x.nbytes < SMALL and kept.x.device.type != "cpu":
            return kept  # comparing would wait for the device
        known = self._content.setdefault((type(kept), kept.x.dtype, kept.x.shape), [])
        for other in known:
            if other.unchanged and torch.equal(other.x, kept.x):
                self._may_change(other)
                return self._may_change(kept.with_tensor(other.x))
        known.append(kept)
        return kept

    def _may_change(self, kept: Exact | Narrowed) -> Exact | Narrowed:
        """Note a residual that must become a copy before somebody else writes to its memory."""
        if (exposed := kept.exposed()) is not None:
            self._leaves.setdefault(storage_key(exposed.x), []).append(exposed)
        return kept
