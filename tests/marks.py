"""Marks that several files share."""

import pytest

# The warning of a forward pass in which nothing was compressed, for tests of just that.
nothing_compressed = pytest.mark.filterwarnings("ignore:dibit. (a training forward pass|an optimiser)")
