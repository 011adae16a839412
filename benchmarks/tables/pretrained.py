"""Beside a pretrained Pilot: the searches."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.common import RESULTS, standard_error
from benchmarks.pretrained.arms import Result
from benchmarks.pretrained.report import ALONE, Results, chosen_of, greedy_at, nll_gain
from benchmarks.tables.cells import COPILOTS, figure, read, share, table

SEARCHED = {
    "lora-0.0003-x1.5": "SmolLM2 with LoRA at a poor rate",
    "lora-0.002-x1.5": "SmolLM2 with LoRA at its best rate",
    "frozen-0-x1.5": "SmolLM2, frozen",
}  # Pilots of the search, on MAWPS
REPEATED = ("search_h200", "search_cpu")
SEEDS = range(3)
FIXED_STRENGTHS = (0.3, 0.5, 0.7, 1.0)
FIGURES_OF_SEARCH = ("training", "NLL, λ chosen", "λ", "NLL, λ = 1", "right, λ chosen", "right, λ = 1")


class Search:
    """The arms of one search on MAWPS, by name."""

    def __init__(self, name: str):
        self.results = Results.read(RESULTS / "pretrained" / f"{name}.json")
        self.arms = {arm["name"]: arm for arm in self.results.arms}

    def gain(self, pilot: str, copilot: str) -> str:
        """In NLL over the Pilot of the same arm, with its interval."""
        found = [self.arms[f"mawps {pilot} {copilot} seed0"]]
        return nll_gain(found, found, ALONE).replace("-", "−")

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


def over_seeds(pilot: str, copilot: str) -> dict[int, Result]:
    """One arm by seed, of all seeds that it has in the repeated searches."""
    names = [f"mawps {pilot} {copilot} seed{seed}" for seed in SEEDS]
    found = [search.arms[name] for search in map(Search, REPEATED) for name in names if name in search.arms]
    return {arm["arm"]["seed"]: arm for arm in found}


def mean_figure(metric: str, values: list[float]) -> str:
    return figure(metric, {"mean": mean(values), "standard_error": standard_error(values)})


def pretrained_seeds() -> str:
    """What was repeated with more seeds: the Pilot, a Copilot, and its network without the mistakes."""
    best, rows = "lora-0.002-x1.5", []
    arms = {"alone": "LoRA at 2e-3", "token-0.0005-s4": "+ token Copilot"}
    arms["language model-0.0005-s4"] = "+ its network, as a language model"
    for copilot, title in arms.items():
        found = list(over_seeds(best, copilot).values())
        nll = [arm["test"]["nll"][arm["grid"].index(list(chosen_of(arm)))] for arm in found]
        right = [mean(greedy_at(arm, chosen_of(arm))) for arm in found]
        gained = nll_gain(found, found, ALONE).replace("-", "−") if copilot != "alone" else ""
        rows.append([title, str(len(found)), mean_figure("nll", nll), mean_figure("right", right), gained])
    tokens, language_model = (over_seeds(best, copilot) for copilot in list(arms)[1:])
    both = sorted(tokens.keys() & language_model.keys())
    more = nll_gain([tokens[seed] for seed in both], [language_model[seed] for seed in both]).replace("-", "−")
    rows.append(["token Copilot over language model", str(len(both)), "", "", more])
    return table(("", "seeds", "NLL, λ chosen", "right, λ chosen", "less NLL than its Pilot"), rows)


def pretrained_full() -> str:
    """Copilots beside full fine-tuning, and what they do to the rows of other tasks."""
    found, rows, others = Search("search_cpu"), [], ("gsm8k", "commonsense")
    pilot, token, language_model = "full-0.0002-x1.5", "token-0.0005-s4", "language model-0.0005-s4"
    for copilot, title in {token: "+ token Copilot", language_model: "+ its network, as a language model"}.items():
        arm = found.arms[f"mawps {pilot} {copilot} seed0"]
        _, nll, *rest = found.cells(pilot, copilot)
        harm = (f"{arm['other'][task]['alone']:.2f}, {arm['other'][task]['chosen']:.2f}" for task in others)
        rows.append([title, f"{arm['test']['nll'][0]:.3f}", nll, *rest, found.gain(pilot, copilot), *harm])
    both = ([found.arms[f"mawps {pilot} {copilot} seed0"]] for copilot in (token, language_model))
    rows.append(["token Copilot over language model", *[""] * 6, nll_gain(*both).replace("-", "−"), "", ""])
    head = ("", "NLL of its Pilot", *FIGURES_OF_SEARCH[1:], "less NLL than its Pilot")
    return table((*head, *(f"NLL of `{task}`: Pilot, with it" for task in others)), rows)


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


TABLES: dict[str, Callable[[], str]] = {
    "pretrained": pretrained,
    "pretrained-ways": pretrained_ways,
    "pretrained-seeds": pretrained_seeds,
    "pretrained-full": pretrained_full,
    "pretrained-steps": steps_beside_pretrained,
    "fixed-strengths": fixed_strengths,
}
