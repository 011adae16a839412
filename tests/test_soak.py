"""Nothing grows with calls of `generate` and rounds of training; tests/soak.py has thousands of them."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import pytest
from soak import KINDS, soak


@pytest.mark.filterwarnings("ignore")  # pytest keeps all that are given
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows(kind):
    _, *seen = soak(kind, warm_up=40, rounds=40, looks=4)  # the first look settles a few things
    assert len({each[1:4] for each in seen}) == 1
    grown = [later.objects - earlier.objects for earlier, later in pairwise(seen)]  # in 10 rounds each
    assert median(grown) < 10  # less than one in a round; the interpreter's own come and go, once as many as 31
