"""The ledger: what autograd keeps of one training step, by module and operation, and what it would have kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from dibit._torch.storage_identity import Alive, storage_key, storages
from dibit.tools.units import MB


@dataclass
class Row:
    """One residual: `plain` bytes without Dibit, `kept` bytes with it, and how it is kept.

    Attributes:
        chunk: identity of an operation that runs once for each chunk of its input; `None` for others. Rows of the same
            operation become one when the pass ends.
    """

    module: str
    operation: str
    how: str
    shape: tuple[int, ...]
    plain: int = 0
    kept: int = 0
    chunk: tuple[object, ...] | None = None


@dataclass
class Ledger:
    """Filled by `dibit.track`; bytes of distinct storages, without parameters, the model's inputs and its outputs.

    Attributes:
        rows: one a residual, in the order of the forward pass.
        total: bytes kept.
        plain: bytes that the model would keep without Dibit.
    """

    rows: list[Row] = field(default_factory=list)
    trackers: tuple[Callable[[list[Row]], None], ...] = field(default=(), repr=False)  # get the rows at the end
    _plain: dict[int, tuple[Row, int]] = field(default_factory=dict, repr=False)
    _kept: dict[int, tuple[Row, int]] = field(default_factory=dict, repr=False)
    _alive: Alive = field(default_factory=Alive, repr=False)

    @property
    def total(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def plain(self) -> int:
        return sum(row.plain for row in self.rows)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def plain_tensor(self, row: Row, x: Tensor) -> None:
        """Without Dibit, `row` would keep the storage of x; the first to claim a storage bears its bytes."""
        for part in storages(x):
            self._claim(self._plain, row, part, "plain")

    def kept_tensor(self, row: Row, x: Tensor) -> None:
        """`row` keeps the storage of x."""
        for part in storages(x):
            self._claim(self._kept, row, part, "kept")

    def copied(self, storage: int, x: Tensor) -> None:
        """Whoever keeps this storage keeps the copy x of it too."""
        if storage in self._kept:
            self.kept_tensor(self._kept[storage][0], x)

    def _claim(self, claims: dict[int, tuple[Row, int]], row: Row, x: Tensor, side: str) -> None:
        key = storage_key(x)
        if key not in claims:
            # The weak reference keeps the storage's identity (not its memory) from being given to another tensor.
            self._alive.hold(x)
            size = x.untyped_storage().nbytes()
            claims[key] = (row, size)
            setattr(row, side, getattr(row, side) + size)

    def dropped(self, tensors: Iterable[Tensor]) -> None:
        """Nobody keeps these after all."""
        for x in tensors:
            if (claim := self._kept.pop(storage_key(x), None)) is not None:
                claim[0].kept -= claim[1]

    def close(self, outputs: Iterable[Tensor]) -> None:
        """End of a forward pass: what it returned is the caller's, and its identities may be used again."""
        for x in outputs:
            for part in storages(x):
                key = storage_key(part)
                for claims, side in ((self._plain, "plain"), (self._kept, "kept")):
                    if key in claims:
                        row, size = claims.pop(key)
                        setattr(row, side, getattr(row, side) - size)
        self._plain.clear()
        self._kept.clear()
        self._alive.clear()
        self._join_chunks()
        for tell in self.trackers:
            tell(self.rows)

    def _join_chunks(self) -> None:
        first: dict[object, Row] = {}
        for row in self.rows:
            whole = row if row.chunk is None else first.setdefault(row.chunk, row)
            if whole is not row:
                whole.plain += row.plain
                whole.kept += row.kept
                if whole.shape and row.shape:
                    whole.shape = whole.shape[0] + row.shape[0], *whole.shape[1:]
        self.rows[:] = [row for row in self.rows if row.chunk is None or first[row.chunk] is row]
        for row in first.values():
            row.chunk = None

    def __str__(self) -> str:
        rows = [row for row in self.rows if row.plain or row.kept]
        head = ("module", "operation", "kept as", "shape", "plain MB", "kept MB")
        lines = [
            (
                r.module,
                r.operation,
                r.how,
                "x".join(map(str, r.shape)),
                f"{r.plain / MB:.3f}",
                f"{r.kept / MB:.3f}",
            )
            for r in rows
        ]
        lines.append(("total", "", "", "", f"{self.plain / MB:.3f}", f"{self.total / MB:.3f}"))
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        return "\n".join(
            "  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in [head, *lines]
        )
