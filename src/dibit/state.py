"""What `compress` attaches to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dibit.codec import Packed
from dibit.field import Field
from dibit.identity import storages
from dibit.ledger import Ledger
from dibit.owners import History
from dibit.score_table import Scores

Rule = Callable[..., Any]
# Sees what is compressed: module, operation, the tensor before its reduction, what is kept of it.
Observer = Callable[[str, str, Tensor, Packed], None]


@dataclass
class State:
    """Shared by the hooks of a model's modules; copied and pickled with them."""

    root: nn.Module
    rules: dict[Any, Rule] = field(default_factory=dict)
    passive: bool = False  # only observe: `track` on a plain model
    ledger: Ledger | None = None
    salt: int = 0  # other draws of the codec, the same dropout masks: the study of a gradient's error
    observer: Observer | None = None
    warned: bool = False
    scores: Scores = field(default_factory=Scores)

    @property
    def reach(self) -> Field:
        """How far the loss reaches, as passes with `loss_rows` have shown."""
        return self.scores.reach

    @property
    def history(self) -> History:
        """Which tensors of others came through the backward passes unchanged."""
        return self.scores.history

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that live as long as the model, with their names: parameters, buffers, cached graph structure."""
        yield from ((name, p) for name, p in self.root.named_parameters() if not is_lazy(p))
        yield from ((name, b) for name, b in self.root.named_buffers() if not is_lazy(b))
        for path, module in self.root.named_modules():
            for name, value in vars(module).items():
                for x in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(x, Tensor) and not x.requires_grad and storages(x):
                        yield f"{path}.{name}".lstrip("."), x
                    elif hasattr(x, "to_torch_sparse_csr_tensor"):  # a cached SparseTensor
                        for part in (*x.coo(), x.storage.rowptr()):
                            if part is not None:
                                yield f"{path}.{name}".lstrip("."), part
