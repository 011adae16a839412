"""One change of a Copilot at a time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.tables.cells import read, share, table


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


def fed() -> str:
    """What a Copilot is fed, as far as it was measured: state Copilots without positions."""
    names = {"ours": "`both`, the default", "input token": "`token`", "input ℓ": "`discrepancy`, the paper's"}
    sums, text = (Experiment("learning", task) for task in ("arithmetic", "text"))
    rows = [[title, sums.change(name), sums.right(name), text.change(name)] for name, title in names.items()]
    return table(("`copilot_input`", "`arithmetic`, NLL", "answers right", "`text`, NLL"), rows)


def fed_tokens() -> str:
    """The same of token Copilots, which can be served; answers in arithmetic seed by seed."""
    sums, text, mawps = (Experiment("input", task) for task in ("arithmetic", "text", "mawps"))
    rows = []
    for name in ("Pilot", "both", "token"):
        seeds = [run[name]["own"]["answers right"] for run in sums.runs]
        row = ["Pilot alone" if name == "Pilot" else f"`{name}`", ", ".join(map(share, seeds))]
        row += ["" if name == "Pilot" else found.change(name) for found in (sums, text)]
        row += ["" if name == "Pilot" else mawps.change(name, "chosen"), mawps.right(name)]
        rows.append(row)
    head = ("`copilot_input`", "`arithmetic`, answers right", "NLL", "`text`, NLL", "`mawps`, NLL at its chosen λ")
    return table((*head, "answers right, λ = 1"), rows)


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


TABLES: dict[str, Callable[[], str]] = {
    "positions": positions,
    "width": width,
    "pilots": pilots,
    "mistakes": mistakes,
    "fed": fed,
    "fed-tokens": fed_tokens,
    "defaults": defaults,
}
