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
    told: bool = False  # that gradients inside the forward pass keep it exact
    seeds: bool = False  # some module's config draws dropout's masks from seeds
    asks: bool | None = None  # a forward pass asks for a gradient; `None`: not known yet
    scores: Scores = field(default_factory=Scores)
    reach: Field = field(default_factory=Field)

    def constants(self) -> Iterator[Tensor]:
        """Tensors that live as long as the model: parameters, buffers, cached graph structure."""
        yield from (p for p in self.root.parameters() if not is_lazy(p))
        yield from (b for b in self.root.buffers() if not is_lazy(b))
        for module in self.root.modules():
            for value in vars(module).values():
                for x in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(x, Tensor) and not x.requires_grad and storages(x):
                        yield x
                    elif hasattr(x, "to_torch_sparse_csr_tensor"):  # a cached SparseTensor
                        yield from (part for part in x.coo() if part is not None)
                        yield x.storage.rowptr()
