"""Private parts of torch: everything that Dibit uses beyond what torch documents, looked up here and nowhere else.

The operators of `torch.ops.aten` are among them, and a few private parts of Python. Each one is entered in
`registry.APIS` with its purpose and with what is lost without it. The rest of Dibit calls the functions of these
modules, which choose a fallback when they are imported. A later version of torch that has dropped an API thus costs
compression or speed, and never the import: `dibit doctor` prints the list.
"""

from dibit._torch.private import autograd, derivatives, frames, generator, modes, modules, operations, tensors, traces
from dibit._torch.private.registry import APIS, KNOWN, WITHOUT, PrivateApi, missing, warn_if_missing

# Whether Dibit can compress at all. If not, compressed models train exactly as plain ones do.
USABLE = not any(api.needed and not api.found for api in APIS.values())
# Whether it also compresses what `torch.compile` compiles. If not, compiled models are plain.
COMPILES = USABLE and modes.DYNAMO

__all__ = [
    "APIS",
    "COMPILES",
    "KNOWN",
    "USABLE",
    "WITHOUT",
    "PrivateApi",
    "autograd",
    "derivatives",
    "frames",
    "generator",
    "missing",
    "modes",
    "modules",
    "operations",
    "tensors",
    "traces",
    "warn_if_missing",
]
