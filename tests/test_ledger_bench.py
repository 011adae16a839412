"""The bench of the ledger: what is swapped, and how rankings are judged."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ledger import SHARE, found, swapped

ROWS = [{"prompt": f"{i}?", "completion": f"{i % 50}"} for i in range(200)]


def test_a_share_of_the_answers_is_swapped_for_others():
    changed, is_wrong = swapped(ROWS, seed=0)
    assert is_wrong.sum() == SHARE * 200
    different = [a["completion"] != b["completion"] for a, b in zip(ROWS, changed, strict=True)]
    assert different == is_wrong.tolist()
    assert [row["prompt"] for row in changed] == [row["prompt"] for row in ROWS]
    assert not np.array_equal(swapped(ROWS, seed=1)[1], is_wrong)


@pytest.mark.parametrize(("sign", "precision", "auroc"), [(1.0, 1.0, 1.0), (-1.0, 0.0, 0.0)])
def test_a_perfect_ranking_and_its_opposite(sign, precision, auroc):
    is_wrong = np.arange(200) % 20 == 3
    assert found(sign * (is_wrong + np.linspace(0, 0.5, 200)), is_wrong) == {"precision": precision, "auroc": auroc}
