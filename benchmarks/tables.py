"""The tables of figures on the pages, written from benchmarks/results/*.json between their markers.

    python -m benchmarks.tables          # writes README.md and docs/*.md anew

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`. `tests/test_docs.py`
compares: a figure that is changed by hand fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.accuracy.shares import OWN, Runs, share_of_gain
from benchmarks.common import RESULTS, Share, share_of, standard_error, table_of_cells
from benchmarks.pretrained.report import Results, nll_gain

ROOT = RESULTS.parent.parent
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
BETWEEN = re.compile(r"(?<=<!-- table: )(\S+)( -->\n)(.*?)(?=<!-- end -->)", re.S)

TASKS = {  # name: the metric that it is judged by, and how the pages call the two
    "arithmetic": ("exact match", "generated arithmetic, right answers"),
    "text": ("nll", "GSM8K rationales, NLL per token (less is better)"),
    "mawps": ("value right", "MAWPS, equations with the right value"),
    "recommendation": ("H@10", "LastFM, next item among 3,646, H@10"),
}
ARMS = {
    "pilot": "Pilot alone",
    "copilot": "+ token Copilot, λ = 1",
    "copilot, λ chosen": "+ token Copilot, λ with the least NLL",
    "copilot, λ by accuracy": "+ token Copilot, λ with the most right tokens",
    "states": "+ state Copilot, λ = 1",
    "paper": "+ the paper's preset, λ = 1",
    "joint": "larger Pilot of the same total size",
    "longer": "Pilot, 2.5 times the steps",
}
COPILOTS = {"tokens": "token Copilot", "pilot": "state Copilot"}
LEDGER_TASKS = {"mawps": "MAWPS", "text": "GSM8K"}
CURVE_ROWS = 6
FIXED_STRENGTHS = (0.3, 0.5, 0.7, 1.0)
SEARCHED = {
    "lora-0.0003-x1.5": "SmolLM2 with LoRA at a poor rate",
    "lora-0.002-x1.5": "SmolLM2 with LoRA at its best rate",
    "frozen-0-x1.5": "SmolLM2, frozen",
}  # Pilots of the search, on MAWPS


# ---- figures into text ----------------------------------------------------------------------------------------------


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return table_of_cells(list(head), map(list, rows)) + "\n"


def share(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %".replace("-", "−")


def figure(metric: str, found: dict[str, Any]) -> str:
    """A mean and its standard error over seeds, where there are several."""
    value, error = found["mean"], found["standard_error"]
    if error is None:
        return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f} %"
    return f"{value:.3f} ± {error:.3f}" if metric == "nll" else f"{100 * value:.1f} ± {100 * error:.1f} %"


def gain(metric: str, found: dict[str, Any]) -> str:
    """The difference to the Pilot in nats or points, and its 95 % interval."""
    scale, form = (1, "+.3f") if metric == "nll" else (100, "+.1f")
    value, low, high = (f"{scale * found[name]:{form}}".replace("-", "−") for name in ("difference", "low", "high"))
    return f"{value} [{low}, {high}]"


def is_clear(found: dict[str, Any]) -> bool:
    """Whether the interval of the difference leaves zero out."""
    return found["low"] > 0 or found["high"] < 0


# ---- does it help ---------------------------------------------------------------------------------------------------


def helps() -> str:
    """Four tasks, λ = 1, with the training time beside the gain."""
    rows = []
    for task, (metric, title) in TASKS.items():
        found = read(f"accuracy/{task}")
        arms, times = found["arms"], found["costs"]["copilot"]
        cells = {arm: figure(metric, arms[arm][metric]) for arm in ("pilot", "copilot", "joint", "longer")}
        clear = is_clear(arms["copilot"][metric])
        cells["copilot"] = f"**{cells['copilot']}**" if clear else f"{cells['copilot']} (not clear of zero)"
        rows.append([title, *cells.values(), f"{times['training']:.1f} ×"])
    head = ("task", "Pilot", "+ Copilot", "larger Pilot, same total size", "Pilot, 2.5 × the steps")
    return table((*head, "training time with the Copilot"), rows)


def by_task(cell: Callable[[str, dict[str, Any]], str], arms: Iterable[str]) -> str:
    """A row for each arm, a column for each task."""
    found = {task: read(f"accuracy/{task}")["arms"] for task in TASKS}
    rows = [[ARMS[arm], *(cell(metric, found[t][arm][metric]) for t, (metric, _) in TASKS.items())] for arm in arms]
    return table(("", *(f"`{task}`, {'NLL' if m == 'nll' else m}" for task, (m, _) in TASKS.items())), rows)


RIGHT = {task: metric for task, (metric, _) in TASKS.items()} | {"text": "token accuracy"}
FOLDING_ARMS = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot",
    "folded": "folded Pilot",
    "labels": "Pilot, on labels for the time of folding",
    "again": "folded Pilot + a fresh Copilot",
}


def tasks_of(bench: str) -> dict[str, dict[str, Any]]:
    """What a bench of its own found, by task: of those that it has been run on."""
    names = {task: f"accuracy/{bench}_{task}" for task in TASKS}
    return {task: read(name) for task, name in names.items() if (RESULTS / f"{name}.json").is_file()}


def seeds(task: str, number: int) -> str:
    return f"`{task}`, {number} seed{'s' * (number > 1)}"


def folding() -> str:
    """Of a Copilot's gain, what the folded Pilot has, and what labels give in the same time."""
    rows = []
    for task, found in tasks_of("folding").items():
        arms, metrics = found["arms"], (RIGHT[task], "nll")
        for arm, title in FOLDING_ARMS.items():
            steps = [f"{found['steps'][arm]:,.0f}" if arm in found["steps"] else ""]
            cells = [figure(metric, arms[arm][metric]) for metric in metrics]
            shares = [of_gain(arms, arm, metric) if arm in found["steps"] else "" for metric in metrics]
            title_of_task = seeds(task, len(arms["pilot"]["nll"]["by_seed"])) if arm == "pilot" else ""
            rows.append([title_of_task, title, *steps, *cells, *shares])
    head = ("task", "arm", "further steps", "right", "NLL", "of the gain in right answers", "and in NLL")
    return table(head, rows)


def of_gain(arms: dict[str, Any], arm: str, metric: str) -> str:
    """Of the Copilot's gain the share that an arm has."""
    sign = -1 if metric == "nll" else 1
    pilot, own, best = (arms[name][metric]["by_seed"] for name in ("pilot", arm, "copilot"))
    gains = [[sign * (a - b) for a, b in zip(other, pilot, strict=True)] for other in (own, best)]
    return percent(share_of(*gains))


def percent(found: Share | None) -> str:
    """A share with its standard error; of no gain there is none."""
    if found is None:
        return "no gain"
    error = "" if found.error is None else f" ± {100 * found.error:.0f}"
    return f"{100 * found.value:.0f}{error} %".replace("-", "−")


MOVES_ARMS = {
    "alone": "alone",
    "moved, λ of home": "moved, λ of home",
    "moved, λ chosen": "moved, λ chosen",
    OWN: "trained there",
    "small logits": "small logits",
}


def moves(metric: str) -> str:
    """A table for each task: a row for each destination, a column for each arm, and the λ that were chosen for the
    moved Copilot. In NLL with the share of the gain."""
    tables = []
    for task, found in tasks_of("moves").items():
        runs, rows = found["runs"], []
        for place, arms in runs[0].items():
            cells = [moved(runs, place, arm, metric) if arm in arms else "" for arm in MOVES_ARMS]
            chosen = ", ".join(f"{run[place]['moved, λ chosen']['strength']:g}" for run in runs)
            rows.append([place, *cells, *([chosen] if metric == "nll" else [])])
        head = [seeds(task, len(runs)), *MOVES_ARMS.values(), *(["chosen λ"] if metric == "nll" else [])]
        tables.append(table(head, rows))
    return "\n".join(tables)


def moved(runs: Runs, place: str, arm: str, metric: str) -> str:
    """A figure, and of the gain the share where there is one to have."""
    values = [run[place][arm][metric] for run in runs]
    cell = figure(metric, {"mean": mean(values), "standard_error": standard_error(values)})
    if metric != "nll" or arm in ("alone", OWN):
        return cell
    return f"{cell} ({percent(share_of_gain(runs, place, arm))})"


ENSEMBLE_ARMS = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot",
    "language model": "+ its network as a language model",
    "second": "+ a second Pilot",
}


def ensembles() -> str:
    """Other second networks in a Copilot's place, each with its two weights of every seed."""
    rows = []
    for task, found in tasks_of("ensembles").items():
        for arm, title in ENSEMBLE_ARMS.items():
            own = found["arms"][arm]
            cells = [figure(metric, own[metric]) for metric in (RIGHT[task], "nll")]
            cells.append("" if arm == "pilot" else gain("nll", own["nll"]))
            weights = "; ".join(f"{a:g}, {b:g}" for a, b in own["weights"])
            first = seeds(task, len(own["nll"]["by_seed"])) if arm == "pilot" else ""
            rows.append([first, title, *cells, "" if arm == "pilot" else weights])
    head = ("task", "arm", "right", "NLL", "NLL against the Pilot's", "weights of z and of the other")
    return table(head, rows) if rows else "It has not been run.\n"


def times() -> str:
    found = {task: read(f"accuracy/{task}")["costs"] for task in TASKS}
    works = {"training": "training", "generation": "a generated token"}
    kinds = {"copilot": "token Copilot", "states": "state Copilot"}
    rows = [
        [f"{title}, {kind}", *(f"{found[task][arm][work]:.2f}" for task in TASKS)]
        for work, title in works.items()
        for arm, kind in kinds.items()
    ]
    return table(("time beside the Pilot's", *(f"`{task}`" for task in TASKS)), rows)


def strengths() -> str:
    """MAWPS, where answers and likelihood want different λ."""
    arms, rows = read("accuracy/mawps")["arms"], []
    for arm in ("pilot", "copilot", "copilot, λ by accuracy", "copilot, λ chosen"):
        used = sorted({value for value in arms[arm]["strengths"] if value is not None})
        shown = " to ".join(f"{value:g}" for value in (used[:1] + used[1:][-1:]))
        title = ARMS[arm] if arm == "pilot" else ARMS[arm].removeprefix("+ token Copilot, ")
        cells = (figure(metric, arms[arm][metric]) for metric in ("value right", "nll"))
        rows.append([title, "" if arm == "copilot" else shown, *cells])
    return table(("MAWPS, token Copilot", "λ", "right", "NLL"), rows)


def t5() -> str:
    runs, rows = read("seq2seq_mawps")["runs"], []
    arms = {"pilot": ARMS["pilot"], "copilot": "+ Copilot, λ = 1", "calibrated": "+ Copilot, λ with the least NLL"}
    for arm, title in (arms | {"joint": ARMS["joint"]}).items():
        right, nll = mean(mean(run[arm]["hits"]) for run in runs), mean(run[arm]["nll"] for run in runs)
        rows.append([title, share(right), f"{nll:.3f}"])
    return table(("T5, MAWPS", "right", "NLL"), rows)


# ---- beside a pretrained Pilot -------------------------------------------------------------------------------------


class Search:
    """The arms of one search on MAWPS, by name."""

    def __init__(self, name: str):
        self.results = Results.read(RESULTS / "pretrained" / f"{name}.json")
        self.arms = {arm["name"]: arm for arm in self.results.arms}

    def gain(self, pilot: str, copilot: str, other: str = "") -> str:
        """In NLL over the Pilot of the same arm, or over another arm beside the same Pilot, with its interval."""
        found, at = self.arms[f"mawps {pilot} {copilot} seed0"], None if other else (1.0, 0.0)
        return nll_gain(found, self.arms[f"mawps {pilot} {other} seed0"] if other else found, at).replace("-", "−")

    def cells(self, pilot: str, copilot: str) -> list[str]:
        """Seconds; NLL at the λ that was chosen, that λ, and NLL at λ = 1; right answers at both."""
        found = self.arms[f"mawps {pilot} {copilot} seed0"]
        chosen, nll, right = found["chosen"]["nll"], found["test"]["nll"], {}
        for greedy in found["greedy"]:
            right[tuple(greedy["weights"])] = share(mean(greedy["right"]))
        alone = [f"{self.results.seconds(found):.0f} s", f"{nll[found['grid'].index(chosen)]:.3f}"]
        if found["arm"]["copilot"] is None:
            return [*alone, "", "", right[tuple(chosen)], ""]
        if [1.0, 1.0] not in found["grid"]:
            return [*alone, ", ".join(f"{w:g}" for w in chosen), "", right[tuple(chosen)], ""]
        full = found["grid"].index([1.0, 1.0])
        return [*alone, f"{chosen[1]:g}", f"{nll[full]:.3f}", right[tuple(chosen)], right[1.0, 1.0]]


FIGURES_OF_SEARCH = ("training", "NLL, λ chosen", "λ", "NLL, λ = 1", "right, λ chosen", "right, λ = 1")


def pretrained() -> str:
    found, lent = Search("search_h100"), "+ state Copilot, the Pilot's vocabulary"
    arms = {
        "token-0.0005-s4": "+ token Copilot",
        "token-0.0005-s1": "+ token Copilot, one step in a round",
        "state, lag 1-0.0005-s4": "+ state Copilot",
        "state, lag 1, lent vocabulary-0.001-s4": lent,
    }
    rows = []
    for rate, title in {"0.0003": "3e-4, a poor one", "0.002": "2e-3, the best of four on validation rows"}.items():
        rows.append([title, "Pilot alone", *found.cells(f"lora-{rate}-x1.5", "alone")])
        for copilot, name in arms.items():
            if f"mawps lora-{rate}-x1.5 {copilot} seed0" in found.arms:
                rows.append(["", name, *found.cells(f"lora-{rate}-x1.5", copilot)])
        rows.append(["", "Pilot alone, 3 epochs", *found.cells(f"lora-{rate}-x3", "alone")])
    return table(("rate of the Pilot", "arm", *FIGURES_OF_SEARCH), rows)


def pretrained_ways() -> str:
    """What else there is to do, and what a Copilot adds: the second search."""
    found, best = Search("search_h200"), "lora-0.002-x1.5"
    ways = {
        "not trained": ("frozen-0-x0", "alone"),
        "8 training rows in the prompt": ("few-shot-0-x0", "alone"),
        "Pilot frozen, + token Copilot": ("frozen-0-x1.5", "token-0.0005-s4"),
        "LoRA at 3e-4": ("lora-0.0003-x1.5", "alone"),
        "+ state Copilot": ("lora-0.0003-x1.5", "state, lag 1-0.0005-s4"),
        "LoRA at 2e-3": (best, "alone"),
        "+ token Copilot": (best, "token-0.0005-s4"),
        "+ token Copilot, one step in a round": (best, "token-0.0005-s1"),
        "+ reader of three layers' states": (best, "features-0.001-s4"),
        "+ the Copilot's network, as a language model": (best, "language model-0.0005-s4"),
        "full fine-tuning at 2e-4": ("full-0.0002-x1.5", "alone"),
        "LoRA at 1e-3, 3 epochs": ("lora-0.001-x3", "alone"),
        "full fine-tuning at 2e-4, 3 epochs": ("full-0.0002-x3", "alone"),
    }
    rows = [[title, *found.cells(*arm), "" if "alone" in arm else found.gain(*arm)] for title, arm in ways.items()]
    return table(("", *FIGURES_OF_SEARCH, "less NLL than its Pilot"), rows)


def pretrained_mistakes() -> str:
    found, best = Search("search_h200"), "lora-0.002-x1.5"
    both = found.gain(best, "token-0.0005-s4", "language model-0.0005-s4")
    return table(("beside LoRA at 2e-3", "less NLL"), [["token Copilot, over its network as a language model", both]])


def steps_beside_pretrained() -> str:
    """Four steps in a round and one, beside the Pilot at its best rate."""
    found = Search("search_h100")
    steps = {"4": "token-0.0005-s4", "1": "token-0.0005-s1"}
    rows = [[name, *found.cells("lora-0.002-x1.5", copilot)] for name, copilot in steps.items()]
    return table(("steps in a round", *FIGURES_OF_SEARCH), rows)


def fixed_strengths() -> str:
    """What is gained in NLL at one λ for all, by setting: those of small Pilots, and the searched ones."""
    curves = {
        f"`{task}`, {COPILOTS[memory]}": [calibration["strengths"], *(run["nll"] for run in runs)]
        for task in ("arithmetic", "text", "mawps")
        for arm, memory in {"copilot": "tokens", "states": "pilot"}.items()
        if (runs := read(f"accuracy/{task}")["arms"][f"{arm}, λ chosen"]["calibrations"]) and (calibration := runs[0])
    }
    search = {arm["name"]: arm for arm in read("pretrained/search_h100")["arms"]}
    for pilot, title in SEARCHED.items():
        for copilot, name in {"token": "token Copilot", "state, lag 1": "state Copilot"}.items():
            arm = search.get(f"mawps {pilot} {copilot}-0.0005-s4 seed0")
            if arm is not None:
                points = [(s, nll) for (a, s), nll in zip(arm["grid"], arm["valid"]["nll"], strict=True) if a == 1]
                curves[f"{title}, {name}"] = [list(column) for column in zip(*points, strict=True)]
    rows = []
    for title, (strengths, *nll) in curves.items():
        gains = {s: mean(run[0] - run[i] for run in nll) for i, s in enumerate(strengths)}
        best = max(gains, key=gains.get)
        cells = (f"{gains[s]:+.3f}".replace("-", "−") for s in FIXED_STRENGTHS)
        rows.append([title, f"{gains[best]:+.3f} (λ = {best:g})", *cells])
    return table(("", "at the best λ", *(f"λ = {s:g}" for s in FIXED_STRENGTHS)), rows)


# ---- what it costs --------------------------------------------------------------------------------------------------


def cost_of_training() -> str:
    found, rows = read("cost_cpu")["training_step"], {}
    for row in found:
        key = (
            f"{COPILOTS[row['memory']]}, {row['steps_per_round']} step{'s' * (row['steps_per_round'] > 1)} in a round"
        )
        rows.setdefault(key, {})[f"{100 * row['labelled_share']:.0f} % labelled"] = f"{row['ratio']:.2f}"
    head = ["a training step beside the Pilot's", *next(iter(rows.values()))]
    return table(head, ([key, *cells.values()] for key, cells in rows.items()))


def cost_of_generation() -> str:
    rows: dict[str, dict[str, str]] = {}
    for row in read("cost_cpu")["generated_token"]:
        rows.setdefault(COPILOTS[row["memory"]], {})[f"batch {row['batch']}"] = f"{row['ratio']:.2f}"
    head = ["a generated token beside the Pilot's", *next(iter(rows.values()))]
    return table(head, ([key, *cells.values()] for key, cells in rows.items()))


def cost_on_gpu() -> str:
    """Of a step beside SmolLM2, from the second search: milliseconds, and the whole step beside the Pilot's own."""
    timing, rows = Search("search_h200").results.timings["mawps"], []
    alone = {name: 1e3 * sum(timing["pilots"][name].values()) for name in ("lora", "full")}
    names = {"token": "token Copilot", "states": "state Copilot", "features": "reader of three layers' states"}
    names["lent"] = "state Copilot, the Pilot's vocabulary"
    for times in timing["copilots"]:
        if times["shape"] in names:
            own = [1e3 * times["observe"], 1e3 * times["copilot"]]
            whole = [f"{1 + sum(own) / pilot:.2f}" for pilot in alone.values()]
            title = f"{names[times['shape']]}, {times['steps']} step{'s' * (times['steps'] > 1)} in a round"
            rows.append([title, *(f"{x:.0f} ms" for x in own), *whole])
    beside = [
        f"beside {title} ({alone[name]:.0f} ms)" for name, title in (("lora", "LoRA"), ("full", "full training"))
    ]
    return table(("a training step", "observing", "its steps", *beside), rows)


# ---- experiments ----------------------------------------------------------------------------------------------------


class Experiment:
    """One group of experiments on one task: means over its seeds."""

    def __init__(self, group: str, task: str):
        self.runs = read(f"accuracy/experiments_{group}_{task}")["runs"]

    def value(self, name: str, metric: str, which: str = "own") -> float:
        return mean(run[name][which][metric] for run in self.runs)

    def right(self, name: str, metric: str = "answers right") -> str:
        return share(self.value(name, metric))

    def change(self, name: str, which: str = "own") -> str:
        """NLL beside that of the Pilot that the Copilot stands beside."""
        return share(self.value(name, "nll", which) / self.value(self.runs[0][name]["beside"], "nll") - 1, "+")


def vocabularies() -> str:
    rows = [
        [
            row["vocabulary"],
            f"{row['trained_m']:.1f}M",
            f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_largest']:.2f})",
            f"{row['memory_mb']:,.0f} MB",
            f"{row['file_mb']:,.0f} MB",
        ]
        for row in read("vocabulary")["rows"]
    ]
    return table(("vocabulary matrices", "trained", "a step's time", "weights, gradients, moments", "file"), rows)


def positions() -> str:
    names = {
        "no positions": "state Copilot, no positions",
        "tokens alone, no positions": "token Copilot, no positions",
        "rotary positions": "state Copilot, rotary positions",
        "tokens alone, rotary positions": "token Copilot, rotary positions (the default)",
    }
    sums, text, mawps = (Experiment("positions", task) for task in ("arithmetic", "text", "mawps"))
    rows = [["Pilot alone", "", sums.right("Pilot"), "", text.right("Pilot", "token accuracy"), "", ""]]
    rows[0].append(mawps.right("Pilot"))
    for name, title in names.items():
        row = [title, sums.change(name), sums.right(name), text.change(name), text.right(name, "token accuracy")]
        rows.append([*row, mawps.change(name), mawps.change(name, "chosen"), mawps.right(name)])
    head = ("", "`arithmetic`, NLL", "answers right", "`text`, NLL", "right tokens", "`mawps`, NLL", "at its chosen λ")
    return table((*head, "answers right"), rows)


def width() -> str:
    names = {"narrow, the Pilot's states": "narrow state Copilot", "narrow, tokens alone": "narrow token Copilot"}
    sums, text = (Experiment("width", task) for task in ("arithmetic", "text"))
    rows = [[title, text.change(name), sums.change(name), sums.right(name)] for name, title in names.items()]
    pilot = ["Pilot alone", "", "", sums.right("Pilot")]
    return table(("", "`text`, NLL", "`arithmetic`, NLL", "answers right"), [pilot, *rows])


def pilots() -> str:
    found, rows = Experiment("pilots", "arithmetic"), []
    others = {"": "the Pilot of `arithmetic`", "Pilot, 2.5 times the steps": "the same, 2.5 times the steps"}
    for other, title in (others | {"Pilot of width 192": "a Pilot of width 192"}).items():
        row = [title, found.right(other or "Pilot")]
        for copilot in ("the Pilot's states", "tokens alone"):
            name = f"{copilot}, beside the {other}" if other else copilot
            row.append(f"{found.right(name)}, {found.change(name)}")
        moved = f"tokens alone, moved to the {other}"
        rows.append([*row, f"{found.right(moved)}, {found.change(moved)}" if other else ""])
    return table(("beside", "alone", "+ state Copilot", "+ token Copilot", "+ token Copilot, moved there"), rows)


def mistakes() -> str:
    names = {
        "train (the paper)": "the last 128 rounds (the paper)",
        "all rounds": "all rounds",
        "reservoir of 128 rounds": "a reservoir of 128 rounds",
        "weighted by error": "the last 128, larger errors more often",
        "first_visit": 'epoch one alone (`"first_visit"`)',
        "cross-fitting": "two half Pilots, each on the other's half",
        "holdout of 10%": 'a slice of 10 % (`"holdout"`)',
        "holdout of 25%": "a slice of 25 %",
    }
    found, rows = Experiment("mistakes", "mawps"), []
    for name, title in names.items():
        beside = found.runs[0][name]["beside"]
        right = f"{found.right(name, 'token accuracy')} ({found.right(beside, 'token accuracy')})"
        rows.append([title, found.change(name), found.change(name, "chosen"), right])
    return table(("the Copilot learns from", "NLL, λ = 1", "λ chosen", "right tokens, λ = 1 (its Pilot alone)"), rows)


def served() -> str:
    """Requests in vLLM, with a Copilot and without."""
    rows = []
    for row in read("serving_cpu")["served"]:
        cells = [f"{row[f'ms_per_token_{arm}']:.0f} ms" for arm in ("without", "with")]
        cells += [f"{row[f'tokens_per_s_{arm}']:.0f}" for arm in ("without", "with")]
        rows.append([f"`{row['copilot_input']}`", str(row["requests"]), *cells, f"{row['ratio']:.2f}"])
    head = ("`copilot_input`", "requests", "a step, Pilot alone", "with a Copilot", "tokens a second, Pilot alone")
    return table((*head, "with a Copilot", "ratio"), rows)


def fed() -> str:
    """What a Copilot is fed, as far as it was measured: state Copilots without positions."""
    names = {"ours": "`both`, the default", "input token": "`token`", "input ℓ": "`discrepancy`, the paper's"}
    sums, text = (Experiment("learning", task) for task in ("arithmetic", "text"))
    rows = [[title, sums.change(name), sums.right(name), text.change(name)] for name, title in names.items()]
    return table(("`copilot_input`", "`arithmetic`, NLL", "answers right", "`text`, NLL"), rows)


def fed_tokens() -> str:
    """The same of token Copilots, which can be served."""
    sums = Experiment("input", "arithmetic")
    rows = [[f"`{name}`", sums.change(name), sums.right(name)] for name in ("both", "token")]
    return table(("`copilot_input`", "`arithmetic`, NLL", "answers right"), rows)


def defaults() -> str:
    """Where the defaults leave the paper: NLL against the Pilot's in arithmetic and in text, with each of the two."""
    places = [Experiment("positions", task) for task in ("arithmetic", "text")]
    learning = [Experiment("learning", task) for task in ("arithmetic", "text")]
    feedback = Experiment("feedback", "arithmetic")

    def pair(group: list[Experiment], name: str) -> str:
        return ", ".join(found.change(name) for found in group)

    tokens, states = "tokens alone, rotary positions", "rotary positions"
    ours, bare = pair(learning, "ours"), "state, no positions"
    rows = [
        ["`memory`", "`tokens`", "`pilot`", "rotary", pair(places, tokens), pair(places, states)],
        ["`position_embedding`", "`rotary`", "`none`", "token", pair(places, tokens)],
        ["`objective`, `fusion`", "`cross_entropy`, `logit`", "`rmse`, `probability`", bare, ours],
        ["`error_feedback`", "`realized`", "`predicted`", "RMSE, sums right"],
        ["`copilot_input`", "`both`", "`discrepancy`", bare, ours, pair(learning, "input ℓ")],
        ["`num_hidden_layers`", "2", "all of a small decoder", bare, ours, f"4: {pair(learning, '4 layers')}"],
        ["`copilot_steps_per_round`", "4", "1", bare, ours, pair(learning, "1 step in a round")],
        ["`dropout`", "0.1", "0.08 (LoRA's); T5: 0.1", f"{bare}, text", learning[1].change("ours")],
        ["`copilot_weight_decay`", "0.1", "0; T5: 0.01", "the same, text", learning[1].change("ours")],
    ]
    rows[1].append(pair(places, "tokens alone, no positions"))
    rows[2].append(pair(learning, "RMSE, realised feedback"))
    rows[3] += [feedback.right(f"RMSE, {kind}", "generated right") for kind in ("realised", "predicted")]
    rows[7].append(f"0: {learning[1].change('no dropout')}")
    rows[8].append(f"0: {learning[1].change('no weight decay')}")
    return table(("field", "default", "paper", "measured with", "the default gives", "the paper's gives"), rows)


def as_printed(name: str) -> Callable[[], str]:
    """A table that its benchmark wrote as Markdown."""
    return lambda: (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() + "\n"


# ---- the ledger ----------------------------------------------------------------------------------------------------


def rankings() -> str:
    """How well each way to rank rows finds the swapped answers: precision at 5 %, and AUROC."""
    found = read("ledger")
    heads = [f"{LEDGER_TASKS[task]}, {what}" for task in found for what in ("precision at 5 %", "AUROC")]
    names = next(iter(found.values()))["rankings"]
    rows = [
        [name, *(spread(run["rankings"][name][what]) for run in found.values() for what in ("precision", "auroc"))]
        for name in names
    ]
    return table(("rows ranked by", *heads), [*rows, ["by chance", *["0.050", "0.500"] * len(found)]])


def cleaned() -> str:
    """Test NLL with all rows and without those that the ledger flags."""
    rows = [
        [
            f"{LEDGER_TASKS[task]}, {run['rows']:,} rows, {run['steps']} steps, {run['seeds']} seeds",
            *(spread(run["test nll"][arm]) for arm in ("all rows", "without flagged")),
            spread(run["gain"], "+").replace("-", "−"),
        ]
        for task, run in read("ledger").items()
    ]
    return table(("test NLL per token", "trained on all rows", "without what is flagged", "gain"), rows)


# ---- on paper ------------------------------------------------------------------------------------------------------


def scaled_training() -> str:
    rows = [
        [
            row["pilot"],
            row["copilot"],
            f"{row['pilot_step_s']:.2f} s",
            *(f"{row[name]:.2f}" for name in ("training", "training_compiled", "training_beside")),
            "" if row["training_paper"] is None else f"{row['training_paper']:.3f}",
            f"{row['trained_gb']:.0f} GB",
            f"{row['exchange_s']:.2f} s",
        ]
        for row in read("scaling")["overheads"]
    ]
    head = ("Pilot", "Copilot", "its step", "with the Copilot", "compiled", "and beside, at best", "the paper")
    return table((*head, "weights, gradients, moments", "gradients between nodes"), rows)


def scaled_generation() -> str:
    rows = [
        [
            row["pilot"],
            row["copilot"],
            f"{row['pilot_token_ms']:.0f} ms",
            *(f"{row[name]:.2f}" for name in ("generation", "generation_compiled")),
            "" if row["generation_paper"] is None else f"{row['generation_paper']:.3f}",
        ]
        for row in read("scaling")["overheads"]
    ]
    return table(("Pilot", "Copilot", "its token", "with the Copilot", "compiled", "the paper"), rows)


def scaled_documents() -> str:
    rows = [
        [
            f"{row['length']:,}",
            row["copilot"],
            *(f"{row[name]:.2f}" for name in ("training_some_labelled", "training_all_labelled")),
            f"{row['rounds_in_log']:.1f}",
        ]
        for row in read("scaling")["long_documents"]
    ]
    head = ("tokens of a document", "Copilot", "ten labelled", "all labelled", "rounds in the log")
    return table(head, rows)


def scaled_operators() -> str:
    """At no layer, and for each."""
    names = {"step": "a step", "look": "the look at a forward, by the Pilot's layers", "token": "a generated token"}
    names["token beside a graph"] = "a generated token, beside a CUDA graph"
    rows = [
        [name if name != "pilot" else "the Pilot, a micro-batch for a step", names[part]]
        + [f"{found['base']:.0f}", f"{found['slope']:.0f}"]
        for name, parts in read("scaling")["operators"].items()
        for part, found in parts.items()
    ]
    return table(("operators of", "in", "beside the layers", "each layer"), rows)


def scaling_check() -> str:
    found = read("scaling")["check"]
    rows = [
        ["a step", *(f"{found[f'step_s_{kind}']:.2f} s" for kind in ("predicted", "measured"))],
        ["a generated token", *(f"{found[f'token_ms_{kind}']:.1f} ms" for kind in ("predicted", "measured"))],
    ]
    return table(("of the Copilot that was measured", "predicted", "measured"), rows)


def spread(found: dict[str, Any], sign: str = "") -> str:
    """A mean and its standard error over seeds, if there are several."""
    error = found["standard_error"]
    return f"{found['mean']:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


# ---- numbers to expect ----------------------------------------------------------------------------------------------


def expected() -> str:
    """What each recipe took, the λ that it chose, and its right answers."""
    rows = []
    for name, run in read("expected").items():
        seconds = run["processor_seconds"]
        took = "" if seconds is None else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
        extra = "" if run["share"] is None else f"+{run['share']:.0f} %"
        memory = "" if run["gigabytes"] is None else f"{run['gigabytes']:.1f} GB"
        strength = "" if run["strength"] is None else f"{run['strength']:g}"
        right = [""] * 2 if run["right"] is None else [share(value) for value in run["right"]]
        rows.append([f"`{name}`", took, extra, memory, strength, *right])
    head = ("recipe", "processor time", "training, with the Copilot", "memory", "chosen λ")
    return table((*head, "right: Pilot", "Pilot + Copilot"), rows)


def curve(name: str) -> str:
    """The NLL of both at some evaluations, beside what training logged last before; or what it logged, without any."""
    run = read("expected")[name]
    unit = next(key for key in ("step", "epoch") if key in run["training"][0])
    points = run["evaluation"] or run["training"]
    places = sorted({round(i * (len(points) - 1) / (CURVE_ROWS - 1)) for i in range(CURVE_ROWS)})
    rows = []
    for point in (points[place] for place in places):
        logged = [entry for entry in run["training"] if entry[unit] <= point[unit]]
        before = logged[-1] if logged else {}
        cells = [before.get(key) for key in ("pilot_nll", "rectified_nll", "copilot_loss")]
        cells += [point[key] if run["evaluation"] else None for key in ("pilot_nll", "rectified_nll")]
        rows.append([f"{point[unit]:g}", *("" if value is None else f"{value:.3f}" for value in cells)])
    head = (unit, "`pilot_nll`", "`rectified_nll`", "`copilot_loss`", "`eval_pilot_nll`", "`eval_rectified_nll`")
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "helps": helps,
    "tasks": lambda: by_task(figure, ARMS),
    "gains": lambda: by_task(gain, [arm for arm in ARMS if arm not in ("pilot", "paper")]),
    "times": times,
    "strengths": strengths,
    "t5": t5,
    "pretrained": pretrained,
    "pretrained-ways": pretrained_ways,
    "pretrained-mistakes": pretrained_mistakes,
    "cost-gpu": cost_on_gpu,
    "pretrained-steps": steps_beside_pretrained,
    "fixed-strengths": fixed_strengths,
    "cost-training": cost_of_training,
    "cost-generation": cost_of_generation,
    "vocabularies": vocabularies,
    "positions": positions,
    "width": width,
    "pilots": pilots,
    "mistakes": mistakes,
    "defaults": defaults,
    "fed": fed,
    "fed-tokens": fed_tokens,
    "served": served,
    "theorem": as_printed("theorem"),
    "ledger-rankings": rankings,
    "ledger-cleaned": cleaned,
    "scaling-training": scaled_training,
    "scaling-generation": scaled_generation,
    "scaling-documents": scaled_documents,
    "scaling-operators": scaled_operators,
    "scaling-check": scaling_check,
    "expected": expected,
    "folding": folding,
    "moves": partial(moves, "nll"),
    "moves-right": partial(moves, "answers right"),
    "ensembles": ensembles,
} | {f"expected-{name}": partial(curve, name) for name in read("expected")}


def rewritten(page: str) -> str:
    """A page with the tables that the figures give."""
    return BETWEEN.sub(lambda found: found[1] + found[2] + TABLES[found[1]](), page)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
        print(f"{name}: {len(BETWEEN.findall(after))} tables, {'written anew' if after != before else 'as before'}")


if __name__ == "__main__":
    main()
