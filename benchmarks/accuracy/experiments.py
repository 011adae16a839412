"""What makes a Copilot learn more: one thing changed at a time, all Copilots of a group beside one and the same Pilot.

    python benchmarks/accuracy/experiments.py positions arithmetic text mawps --data DIR --seeds 3
    python benchmarks/accuracy/experiments.py learning arithmetic text --data DIR --seeds 1
    python benchmarks/accuracy/experiments.py paper arithmetic mawps --data DIR --seeds 3

Groups: `positions` (with rotary positions and without, and the memory that is read), `learning` (one change at
a time to a Copilot that reads the Pilot's states, without positions), `mistakes` (whose errors it learns from),
`paper` (the paper's Tables 16 to 20),
`pilots` (beside a Pilot that is trained longer and beside a wider one, and a Copilot of tokens alone moved to them),
`width` (a Copilot of a quarter of its Pilot's width), `feedback` (RMSE that is fed its own predictions).

Everything is measured teacher-forced on the validation rows; λ is chosen on their first half and measured on the
second. Writes benchmarks/results/accuracy/experiments_<group>_<task>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arms import LONGER, PAPER
from inputs import SHARE, FedByItself, ReadingPrompts, WithoutHiddenStates
from mistakes import ALL_BYTES, ALL_ROUNDS, ReservoirLearner, WeightedLearner, cross_fit, log_rows, teach
from report import mean_of
from run import RESULTS, TASKS, settings_of, table
from runs import is_kept, keep, kept
from scoring import Rectified
from tasks import Row
from training import Setting, Trained, Variant

from hf_copilot import CopilotLearner


def arguments(**changes: Any) -> dict[str, Any]:
    return {f"copilot_{name}": value for name, value in changes.items()}


def ours(
    config: dict[str, Any] | None = None, learner: type[CopilotLearner] = CopilotLearner, **changes: Any
) -> Variant:
    """The Copilot that most groups are measured with, and these changes: run.py's as it was before it had positions
    and read tokens."""
    return Variant(
        {"memory": "pilot", "position_embedding": "none"} | (config or {}), arguments(**changes), learner=learner
    )


def papers(config: dict[str, Any] | None = None) -> Variant:
    """The paper's preset, likewise."""
    return replace(PAPER, config=config or {})


RMSE = {"objective": "rmse", "fusion": "probability"}
LEARNING = {
    "ours": ours(),
    "1 step in a round": ours(steps_per_round=1),
    "1 step, learning rate x 3": ours(steps_per_round=1, learning_rate=3e-3),
    "2 steps in a round": ours(steps_per_round=2),
    "no weight decay": ours(weight_decay=0.0),
    "no dropout": ours({"dropout": 0.0}),
    "dropout 0.2": ours({"dropout": 0.2}),
    "the Pilot's vocabulary": ours({"vocab_projection": "pilot"}),
    "lag 0": ours({"hidden_state_lag": 0}),
    "no hidden states": ours(learner=WithoutHiddenStates),
    "log of 32 rounds": ours(log_rounds=32),
    "log of 512 rounds": ours(log_rounds=512),
    "input ℓ": ours({"copilot_input": "discrepancy"}),
    "input token": ours({"copilot_input": "token"}),
    "4 layers": ours({"num_hidden_layers": 4}),
    "prompts' discrepancies read": ours(learner=ReadingPrompts),
    "RMSE, realised feedback": ours(RMSE),
    "random weights": ours({"init": "random"}),
}
ROTARY = {"position_embedding": "rotary"}
POSITIONS = {
    "no positions": ours(),
    "tokens alone, no positions": ours({"memory": "tokens"}),
    "rotary positions": ours(ROTARY),
    "tokens alone, rotary positions": ours({"memory": "tokens"} | ROTARY),
}
PILOTS = {"the Pilot's states": ours(ROTARY), "tokens alone": ours({"memory": "tokens"} | ROTARY)}
NARROW = ROTARY | {"init": "random", "hidden_size": 32, "num_attention_heads": 2}
WIDTH = {
    "narrow, the Pilot's states": ours(NARROW),
    "narrow, tokens alone": ours(NARROW | {"memory": "tokens"}),
}
FEEDBACK = {
    "RMSE, realised": ours(RMSE),
    "RMSE, predicted": ours(RMSE | {"error_feedback": "predicted"}),
    "RMSE, predicted, scheduled": ours(RMSE | {"error_feedback": "predicted"}, FedByItself),
}
# Tables 18 to 20 of the paper; 16 is in `latest_checkpoint`, and 17 is what calibration stores of every λ
ABLATIONS = {
    "Pattern 1, mean, RMSE": papers(),
    "Pattern 2": papers({"pattern": 2}),
    "Pattern 3": papers({"pooled_layers": "first_half"}),
    "Pattern 4": papers({"pooled_layers": "second_half"}),
    "max": papers({"pooling": "max"}),
    "sum": papers({"pooling": "sum"}),
    "cross-entropy of the fused logits": papers(
        {"objective": "cross_entropy", "fusion": "logit", "error_feedback": "realized"}
    ),
}
PAPER_FIGURES = {  # accuracy in %, Tables 16 to 20
    "Pattern 1, mean, RMSE": "GSM8K 32.2, SVAMP 51.6 (1B + 1B)",
    "Pattern 2": "27.9, 49.3",
    "Pattern 3": "30.4, 49.8",
    "Pattern 4": "31.8, 50.4",
    "max": "GSM8K 63.2, AQuA 37.5 (8B + 1B; mean 66.1, 38.9)",
    "sum": "65.8, 38.3",
    "cross-entropy of the fused logits": "theirs, whose form is not said: AQuA 60.7 (RMSE 64.2; 7B + 3B)",
    "log of the latest checkpoint": "average of four 46.7 (all stages 48.4; 1B + 1B)",
    "λ = 0.3": "GSM8K 29.8 (1B + 1B)",
    "λ = 0.5": "30.4",
    "λ = 0.8": "31.8",
    "λ = 1": "32.2",
}
ALL = {"log_rounds": ALL_ROUNDS, "log_max_bytes": ALL_BYTES}
MISTAKES = {
    "train (the paper)": ours(),
    "first_visit": ours(mistake_source="first_visit"),
    "first_visit, all rounds": ours(mistake_source="first_visit", **ALL),
    "all rounds": ours(**ALL),
    "reservoir of 128 rounds": ours(learner=ReservoirLearner),
    "weighted by error": ours(learner=WeightedLearner),
}
HOLDOUTS = {share: ours(mistake_source="holdout", holdout=share, log_max_bytes=ALL_BYTES) for share in (0.1, 0.25)}
GROUPS = {
    "learning": LEARNING,
    "positions": POSITIONS,
    "mistakes": MISTAKES,
    "paper": ABLATIONS,
    "pilots": PILOTS,
    "width": WIDTH,
    "feedback": FEEDBACK,
}
AT_ONCE = 4  # Copilots beside one Pilot
OTHER_WIDTH = 192  # of the wider Pilot of `pilots`
METRICS = ("token accuracy", "answers right", "generated right")
Measured = dict[str, float]


def measure(model: Rectified, examples: list[dict[str, list[int]]]) -> Measured:
    """Means over targets, and over rows the share whose every token is the first choice: greedy generation with
    realised feedback, which all teacher-forced figures have, writes exactly these."""
    log_p, hits, targets = model.log_likelihoods(examples).T  # [rows] each
    right = (hits == targets).double().mean()
    return {
        "nll": float(-log_p.sum() / targets.sum()),
        "token accuracy": float(hits.sum() / targets.sum()),
        "answers right": float(right),
    }


def figures_of(model: Rectified, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """At the Copilot's own λ and at the one that the first half of the rows chooses, on the second half."""
    choosing, measuring = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if model.learner is None:
        return {"own": measure(model, measuring)}
    figures = {"own": measure(model, measuring), "calibration": model.calibrate(choosing)}
    chosen = replace(model, strength=figures["calibration"]["strength"])
    return figures | {"chosen": measure(chosen, measuring)}


def run_group(setting: Setting, seed: int, group: str) -> dict[str, Any]:
    """A group for one seed. What is done is kept: a group with `EXTRAS`, which need all of it, as a whole, else every
    Copilot on its own. Those that are missing are trained a few at a time, each time beside the same Pilot again."""
    folder, variants = setting.work / setting.task.name / f"{group}-{seed}", GROUPS[group]
    settings = settings_of(setting)
    if group in EXTRAS:
        settings["variants"] = {name: variant.settings() for name, variant in variants.items()}
        settings["others"] = [OTHER_WIDTH, LONGER, SHARE, {share: v.settings() for share, v in HOLDOUTS.items()}]
        return kept(folder / "all.json", settings, partial(run_variants, setting, seed, group, variants))
    kept_as = {
        name: (folder / f"{name.replace(' ', '_')}.json", settings | {"variant": variant.settings()})
        for name, variant in variants.items()
    }
    missing = [name for name in variants if not is_kept(*kept_as[name])]
    for start in range(0, len(missing), AT_ONCE):
        some = {name: variants[name] for name in missing[start : start + AT_ONCE]}
        found = run_variants(setting, seed, group, some)
        for name in some:
            keep(*kept_as[name], {"Pilot": found["Pilot"], name: found[name]})
    figures = {}
    for file, _ in kept_as.values():
        figures |= json.loads(file.read_text())["result"]
    return figures


def run_variants(setting: Setting, seed: int, group: str, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
    """Train these beside one Pilot, with what the group's `EXTRAS` add; figures of each on validation rows."""
    tokenizer, splits = setting.tokenizer(), setting.task.splits(setting.data, seed)
    trained = setting.train(setting.base(tokenizer), tokenizer, splits.train, seed, variants)
    alone = Rectified(trained.pilot, tokenizer)
    models = {"Pilot": alone}
    models |= {name: beside(alone, learner) for name, learner in trained.learners.items()}
    if group in EXTRAS:
        models |= EXTRAS[group](setting, tokenizer, splits.train, seed, trained)
    rows = setting.encoded(tokenizer, splits.valid)
    pilots = {id(model.pilot): name for name, model in models.items() if model.learner is None}
    figures = {name: figures_of(model, rows) | {"beside": pilots[id(model.pilot)]} for name, model in models.items()}
    for name in models if group == "feedback" else ():
        found = setting.task.measure(models[name], splits.valid[len(rows) // 2 :], setting.data)
        figures[name]["own"] |= {"generated right": mean_of(found[setting.task.metric])}
    return figures


def beside(alone: Rectified, learner: CopilotLearner) -> Rectified:
    """A Pilot with a Copilot at its own λ."""
    return replace(alone, learner=learner, strength=learner.copilot.config.strength)


def other_pilots(setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained) -> dict[str, Rectified]:
    """The sources of mistakes that need Pilots of their own: cross-fitting, and rows held out."""
    models = {"cross-fitting": cross_fit(setting, tokenizer, rows, seed, ours(), trained)}
    for share, variant in HOLDOUTS.items():
        pilot, learner = setting.train_with_holdout(setting.base(tokenizer), tokenizer, rows, seed, variant)
        own = Rectified(pilot, tokenizer)
        models[f"Pilot on {1 - share:.0%} of the rows"] = own
        models[f"holdout of {share:.0%}"] = beside(own, learner)
    return models


def better_pilots(setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained) -> dict[str, Rectified]:
    """A Pilot that is trained longer and a wider one: alone, each with Copilots of its own, and with the Copilot of
    tokens alone that was trained beside the first Pilot."""
    wider = replace(setting, task=replace(setting.task, pilot=setting.task.pilot | {"hidden_size": OTHER_WIDTH}))
    steps = round(LONGER * setting.task.training["max_steps"])
    others = {
        f"Pilot, {LONGER:g} times the steps": (setting, {"max_steps": steps}),
        f"Pilot of width {OTHER_WIDTH}": (wider, {}),
    }
    models = {}
    for name, (where, changes) in others.items():
        pilot, learners, _ = where.train(where.base(tokenizer), tokenizer, rows, seed, PILOTS, **changes)
        models[name] = alone = Rectified(pilot, tokenizer)
        models |= {f"{copilot}, beside the {name}": beside(alone, learner) for copilot, learner in learners.items()}
        moved = CopilotLearner(trained.learners["tokens alone"].copilot, pilot)
        models[f"tokens alone, moved to the {name}"] = beside(alone, moved)
    return models


def latest_checkpoint(
    setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained
) -> dict[str, Rectified]:
    """Table 16: the log holds what the trained Pilot gets wrong on its training rows, and nothing from before."""
    learner = log_rows(setting, tokenizer, trained.pilot, rows, seed, papers())
    teach([learner], setting.task.training["max_steps"], setting.task.training["per_device_train_batch_size"])
    model = Rectified(trained.pilot, tokenizer, learner, learner.copilot.config.strength)
    return {"log of the latest checkpoint": model}


EXTRAS = {"mistakes": other_pilots, "paper": latest_checkpoint, "pilots": better_pilots}


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each variant: means over seeds at λ = 1, and at the λ that was chosen; NLL beside its own Pilot's."""

    def mean(name: str, which: str, metric: str) -> float:
        return statistics.mean(run[name][which][metric] for run in runs)

    rows = []
    for name in runs[0]:
        has_copilot = "chosen" in runs[0][name]
        pilot = mean(runs[0][name]["beside"], "own", "nll")
        row = {"Copilot": name}
        for which, title in (("own", "λ = 1"), ("chosen", "λ chosen")):
            known = which == "own" or has_copilot
            nll = mean(name, which, "nll") if known else pilot
            change = f" ({nll / pilot - 1:+.1%})" if has_copilot else ""
            row[f"NLL, {title}"] = f"{nll:.4f}{change}" if known else ""
            for metric in [m for m in METRICS if m in runs[0][name]["own"]]:
                measured = known and metric in runs[0][name][which]
                row[f"{metric}, {title}"] = f"{mean(name, which, metric):.1%}" if measured else ""
        strengths = [run[name]["calibration"]["strength"] for run in runs] if has_copilot else []
        rows.append(row | {"λ": ", ".join(f"{strength:g}" for strength in strengths)})
    return rows


def strength_rows(runs: list[dict[str, Any]], name: str) -> list[dict[str, str]]:
    """Table 17: one Copilot at the paper's λ, on the rows that chose λ; its figures stand in the first columns."""
    pilot, rows = statistics.mean(run[name]["calibration"]["nll"][0] for run in runs), []
    for strength in (0.3, 0.5, 0.8, 1.0):
        found = [run[name]["calibration"] for run in runs]
        at = found[0]["strengths"].index(strength)
        nll, accuracy = (statistics.mean(c[metric][at] for c in found) for metric in ("nll", "token_accuracy"))
        row = {"Copilot": f"λ = {strength:g}", "NLL, λ = 1": f"{nll:.4f} ({nll / pilot - 1:+.1%})"}
        rows.append(row | {"token accuracy, λ = 1": f"{accuracy:.1%}"})
    return rows


def table_of(group: str, runs: list[dict[str, Any]]) -> str:
    """All rows of a group; beside those of the paper's ablations stand its own figures."""
    rows = rows_of(runs)
    if group == "paper":
        rows += strength_rows(runs, next(iter(ABLATIONS)))
        rows = [
            dict.fromkeys(rows[0], "") | row | {"the paper": PAPER_FIGURES.get(row["Copilot"], "")} for row in rows
        ]
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--data", type=Path, help="as in run.py")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.data is None and args.tasks != ["arithmetic"]:
        parser.error("--data is needed for every task but arithmetic")
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        setting = Setting(TASKS[name], args.data, args.work, args.device)
        runs = [run_group(setting, seed, args.group) for seed in range(args.seeds)]
        settings = settings_of(setting)
        settings |= {"variants": {key: variant.settings() for key, variant in GROUPS[args.group].items()}}
        text, stem = table_of(args.group, runs), f"experiments_{args.group}_{name}"
        (args.results / f"{stem}.json").write_text(
            json.dumps({"settings": settings, "runs": runs}, indent=1, default=str) + "\n"
        )
        (args.results / f"{stem}.md").write_text(text + "\n")
        print(f"\n{args.group}, {name}, {args.seeds} seeds\n\n{text}\n")


if __name__ == "__main__":
    main()
