"""Nothing grows with calls of `generate` and rounds of training; tests/soak.py has thousands of them."""

from __future__ import annotations

import pytest
from soak import KINDS, soak


@pytest.mark.filterwarnings("ignore")  # pytest keeps all that are given
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows(kind):
    seen = [each[:4] for each in soak(kind, warm_up=40, rounds=30, looks=3)]  # the first look settles a few things
    assert seen[1] == seen[2] == seen[3]
