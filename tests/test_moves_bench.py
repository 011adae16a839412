"""Tables and picture of moved, folded and replaced Copilots: shares of a gain by hand, and whatever a run may give."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from benchmarks.accuracy import folding, moves, picture, run
from benchmarks.accuracy.shares import share_of_gain
from benchmarks.common import share_of
from benchmarks.tables import benches, cells

UNTUNED = "twice as deep, not fine-tuned"


def figures(nll, strength=None):
    found = {"nll": nll, "token accuracy": 0.5, "answers right": 0.25}
    return found if strength is None else found | {"strength": strength}


def place(alone, at_home, chosen, own, small=0.9):
    arms = {
        "alone": figures(alone),
        "moved, λ of home": figures(at_home, 1.2),
        "moved, λ chosen": figures(chosen, 0.8),
    }
    arms |= {"small logits": figures(small, 0.5)}
    return arms if own is None else arms | {"trained there, λ chosen": figures(own, 1.0)}


def runs_of(*gains_of_seeds):
    """By seed: at home a half of the gain; 4 bits lose it four times; LoRA has none; the base goes a third."""
    return [
        {
            "home": place(1.0, 1.0 - gain / 2, 1.0 - gain, 1.0 - gain),
            "4 bits": place(1.0, 1.0 + 4 * gain, 1.0, 1.0 - gain),
            "LoRA": place(1.0, 1.5, 1.0, 1.0),
            "twice as deep": place(1.0, 0.9, 0.9, 0.9),
            UNTUNED: place(4.0, 3.0, 3.5, None),
        }
        for gain in gains_of_seeds
    ]


def test_shares_of_a_gain():
    runs = runs_of(0.2, 0.4)
    assert share_of_gain(runs, "home", "moved, λ of home") == pytest.approx((0.5, 0.0))
    assert share_of_gain(runs, "4 bits", "moved, λ of home") == pytest.approx((-4.0, 0.0))
    assert share_of_gain(runs, "LoRA", "moved, λ of home") is None
    assert share_of_gain(runs, UNTUNED, "moved, λ of home") == pytest.approx((1 / 3, 0.0))
    assert share_of_gain(runs[:1], "home", "moved, λ chosen") == (1.0, None)
    value, error = share_of([1.0, 2.0], [4.0, 2.0])  # ½, ± the error of 1 − ½ · 4 and 2 − ½ · 2, over 3
    assert value == pytest.approx(0.5) and error == pytest.approx(1 / 3)
    assert share_of([1.0], [-1.0]) is share_of([0.0], [0.0]) is None


def test_of_no_gain_a_folded_pilot_has_no_share():
    arms = {"copilot": -0.4, "folded": -0.1, "labels": 0.2}

    def kept(metric, **changes):
        summary = {arm: {metric: {"difference": value}} for arm, value in (arms | changes).items()}
        return folding.share_kept(summary, metric)

    assert kept("nll") == {"folded": 0.25, "labels": -0.5}
    assert kept("nll", copilot=0.0) == kept("nll", copilot=0.4) == kept("exact match") == {}
    assert kept("exact match", copilot=0.4) == {"folded": -0.25, "labels": 0.5}


@pytest.mark.parametrize("file", sorted(run.RESULTS.glob("moves_*.json")), ids=lambda file: file.stem)
def test_the_tables_of_moves_are_those_of_their_runs(file):
    assert moves.table_of(json.loads(file.read_text())["runs"]) + "\n" == file.with_suffix(".md").read_text()


def test_the_picture_of_moves_shows_what_lies_outside():
    axes = plt.figure().subplots()
    picture.plot_moves(axes, "arithmetic", runs_of(0.2, 0.4))
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["-400%", "no gain there to have a share of"] and axes.get_xlim() == picture.SHARES
    assert [label.get_text() for label in axes.get_yticklabels()] == [*runs_of(1.0)[0]][:-1] + [UNTUNED + "*"]
    drawn = [line.get_xdata() for line in axes.lines]
    assert [-0.5] in drawn and all(-0.5 <= x <= 2.5 for points in drawn for x in points)
    plt.close("all")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, as a function that adds one."""
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    (tmp_path / "accuracy").mkdir()
    return lambda name, found: (tmp_path / "accuracy" / f"{name}.json").write_text(json.dumps(found))


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_of_moves_has_a_part_for_every_task_that_was_run(results):
    assert benches.moves("nll") == ""
    results("moves_mawps", {"runs": runs_of(0.2)})
    results("moves_arithmetic", {"runs": runs_of(0.2, 0.4)})
    first, second = benches.moves("nll").split("\n\n")
    head, _, home, bits, lora, _, untuned = rows_of(first)
    assert head == ["`arithmetic`, 2 seeds", *benches.MOVES_ARMS.values(), "chosen λ"]
    assert rows_of(second)[0][0] == "`mawps`, 1 seed"
    assert home[2:] == ["0.850 ± 0.050 (50 ± 0 %)", "0.700 ± 0.100 (100 ± 0 %)", "0.700 ± 0.100", home[5], "0.8, 0.8"]
    assert bits[2].endswith("(−400 ± 0 %)") and lora[2] == "1.500 ± 0.000 (no gain)"
    assert untuned[2].endswith("(33 ± 0 %)") and untuned[4] == ""
    assert rows_of(benches.moves("answers right"))[2][1:] == ["25.0 ± 0.0 %"] * 5


def arms_of(**by_seed):
    """Summaries of a bench whose NLL falls as its right answers rise."""
    arms = {}
    for arm, right in by_seed.items():
        arms[arm] = {
            metric: {"mean": sum(values) / len(values), "standard_error": 0.0, "by_seed": values}
            | {"difference": -0.1, "low": -0.2, "high": 0.0}
            for metric, values in (("exact match", right), ("token accuracy", right), ("nll", [1 - x for x in right]))
        }
        arms[arm]["weights"] = [[1.0, 0.5]] * len(right)
    return arms


def test_the_table_of_folding_has_every_task_that_was_run(results):
    seeds = {
        "pilot": [0.1, 0.2],
        "copilot": [0.3, 0.4],
        "folded": [0.2, 0.3],
        "labels": [0.4, 0.5],
        "again": [0.3, 0.3],
    }
    steps = {"folded": 1500, "labels": 1234.4}
    results("folding_text", {"arms": arms_of(**seeds | {"copilot": [0.0, 0.1]}), "steps": steps})
    results("folding_arithmetic", {"arms": arms_of(**seeds), "steps": steps})
    rows = rows_of(benches.folding())[2:]
    assert [row[0] for row in rows] == ["`arithmetic`, 2 seeds", *[""] * 4, "`text`, 2 seeds", *[""] * 4]
    assert [row[2] for row in rows[:5]] == ["", "", "1,500", "1,234", ""]
    assert [row[5:] for row in rows[2:4]] == [["50 ± 0 %"] * 2, ["150 ± 0 %"] * 2] and rows[1][5:] == ["", ""]
    assert rows[7][5:] == ["no gain"] * 2  # the Copilot is worse than its Pilot


def test_the_table_of_ensembles_waits_for_its_run(results):
    assert benches.ensembles() == "It has not been run.\n"
    found = {"pilot": [0.1], "copilot": [0.3], "language model": [0.2], "second": [0.2]}
    results("ensembles_text", {"arms": arms_of(**found)})
    rows = rows_of(benches.ensembles())[2:]
    assert [row[1] for row in rows] == [*benches.ENSEMBLE_ARMS.values()]
    assert rows[0][4:] == ["", ""] and rows[3][4:] == ["−0.100 [−0.200, +0.000]", "1, 0.5"]
