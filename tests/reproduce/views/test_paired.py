"""How far from zero paired differences are drawn."""

import pytest

from dibit.reproduce.views.paired import Difference, reach


def test_one_wide_interval_does_not_flatten_the_others() -> None:
    narrow = [Difference(mean=-0.002 * i, low=-0.002 * i - 0.01, high=-0.002 * i + 0.01) for i in range(9)]
    assert reach([*narrow, Difference(mean=0.0, low=-0.9, high=0.9)]) == pytest.approx(reach(narrow), rel=0.3)
    assert reach([Difference(mean=0.05)]) == pytest.approx(5.5)  # every mean is within
    assert reach([Difference(mean=0.0, values=[-0.02, 0.02])]) == pytest.approx(2.2)  # and every seed
    assert reach([Difference(mean=-0.002, low=-0.0045, high=0.0003)]) > 0.45  # one interval is most
