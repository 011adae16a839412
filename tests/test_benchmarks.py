"""The benchmarks run, on shapes that take no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import SHAPE

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cost  # noqa: E402


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = {name: SHAPE[name] for name in cost.SHAPES["cpu"]} | {"num_hidden_layers": 3}
    monkeypatch.setitem(cost.SHAPES, "cpu", shape)


def test_cost_of_training():
    row = cost.measure_training("cpu", "cpu", labelled=26, rows=2, accumulate=2, reps=2)
    assert row["pilot_and_copilot_s"] > row["share_optimizer"] > 0
    assert row["share_forward_backward"] > 0 and row["share_log"] > 0 and row["log_mb"] > 0


def test_cost_of_generation():
    row = cost.measure_generation("cpu", "cpu", rows=2, prompt=6, tokens=4, reps=2)
    assert row["rectified_ms_per_token"] > 0 and 0 < row["share_of_weights"] < 1
    assert cost.table([row]).count("|") == 3 * (len(row) + 1)
