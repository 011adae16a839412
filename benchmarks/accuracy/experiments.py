"""What makes a Copilot learn more: one thing changed at a time, all Copilots of a group beside one and the same Pilot.

    python benchmarks/accuracy/experiments.py learning arithmetic text --data DIR --seeds 1
    python benchmarks/accuracy/experiments.py paper arithmetic mawps --data DIR --seeds 3

Everything is measured teacher-forced on the validation rows; λ is chosen on their first half and measured on the
second. Writes benchmarks/results/accuracy/experiments_<group>_<task>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from run import RESULTS, TASKS, kept, settings_of, table
from scoring import Rectified, encode
from training import Setting, Variant


def arguments(**changes: Any) -> dict[str, Any]:
    return {f"copilot_{name}": value for name, value in changes.items()}


LEARNING = {
    "default": Variant(),
    "2 steps in a round": Variant(arguments=arguments(steps_per_round=2)),
    "4 steps in a round": Variant(arguments=arguments(steps_per_round=4)),
    "learning rate x 3": Variant(arguments=arguments(learning_rate=3e-3)),
    "weight decay 0.1": Variant(arguments=arguments(weight_decay=0.1)),
    "dropout 0.1": Variant({"dropout": 0.1}),
    "4 layers": Variant({"num_hidden_layers": 4}),
    "log of 32 rounds": Variant(arguments=arguments(log_rounds=32)),
    "log of 512 rounds": Variant(arguments=arguments(log_rounds=512)),
    "input ℓ": Variant({"copilot_input": "discrepancy"}),
    "input token": Variant({"copilot_input": "token"}),
    "lag 0": Variant({"hidden_state_lag": 0}),
    "RMSE, realised feedback": Variant({"objective": "rmse", "fusion": "probability"}),
    "random weights": Variant({"init": "random"}),
}
# Tables 18 to 20 of the paper; Table 17 is the line of λ that calibration stores
PAPER = {
    "Pattern 1, mean, RMSE": Variant(paper=True),
    "Pattern 2": Variant({"pattern": 2}, paper=True),
    "Pattern 3": Variant({"pooled_layers": "first_half"}, paper=True),
    "Pattern 4": Variant({"pooled_layers": "second_half"}, paper=True),
    "max": Variant({"pooling": "max"}, paper=True),
    "sum": Variant({"pooling": "sum"}, paper=True),
    "RMSE, realised feedback": Variant({"error_feedback": "realized"}, paper=True),
    "cross-entropy of the fused logits": Variant(
        {"objective": "cross_entropy", "fusion": "logit", "error_feedback": "realized"}, paper=True
    ),
}
GROUPS = {"learning": LEARNING, "paper": PAPER}
Measured = dict[str, float]


def measure(model: Rectified, examples: list[dict[str, list[int]]]) -> Measured:
    """Means over targets, and over rows the share whose every token is the first choice: with realised feedback,
    greedy generation writes exactly these."""
    log_p, hits, targets = model.log_likelihoods(examples).T  # [rows] each
    right = (hits == targets).double().mean()
    return {
        "nll": float(-log_p.sum() / targets.sum()),
        "token accuracy": float(hits.sum() / targets.sum()),
        "answers right": float(right),
    }


def run_group(setting: Setting, seed: int, variants: dict[str, Variant]) -> dict[str, Any]:
    """Train all of a group beside one Pilot; figures of each on validation rows."""
    task, tokenizer = setting.task, setting.tokenizer()
    splits = task.splits(setting.data, seed)
    pilot, learners = setting.train(setting.base(tokenizer), tokenizer, splits.train, seed, variants)
    rows = [encode(tokenizer, row, task.max_length) for row in splits.valid]
    choosing, measuring = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    found = {"Pilot": {"own": measure(Rectified(pilot, tokenizer), measuring)}}
    for name, learner in learners.items():
        at_own = Rectified(pilot, tokenizer, learner, learner.copilot.config.strength)
        figures = {"own": measure(at_own, measuring), "calibration": at_own.calibrate(choosing)}
        chosen = Rectified(pilot, tokenizer, learner, figures["calibration"]["strength"])
        found[name] = figures | {"chosen": measure(chosen, measuring)}
    return found


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each variant: means over seeds at λ = 1, and at the λ that was chosen."""

    def mean(name: str, which: str, metric: str) -> float:
        return statistics.mean(run[name][which][metric] for run in runs)

    pilot, rows = mean("Pilot", "own", "nll"), []
    for name in runs[0]:
        at = ["own", "chosen"] if name != "Pilot" else ["own"]
        row = {"Copilot": name}
        for which, title in (("own", "λ = 1"), ("chosen", "λ chosen")):
            known = which in at
            nll = mean(name, which, "nll") if known else pilot
            row[f"NLL, {title}"] = f"{nll:.4f} ({nll / pilot - 1:+.1%})" if known else ""
            for metric in ("token accuracy", "answers right"):
                row[f"{metric}, {title}"] = f"{mean(name, which, metric):.1%}" if known else ""
        strengths = [run[name]["calibration"]["strength"] for run in runs] if name != "Pilot" else []
        rows.append(row | {"λ": ", ".join(f"{strength:g}" for strength in strengths)})
    return rows


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
    variants = GROUPS[args.group]
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        setting = Setting(TASKS[name], args.data, args.work, args.device)
        settings = settings_of(setting) | {"variants": {key: vars(variant) for key, variant in variants.items()}}
        runs = []
        for seed in range(args.seeds):
            file = args.work / name / f"{args.group}-{seed}.json"
            runs.append(kept(file, settings, lambda seed=seed, setting=setting: run_group(setting, seed, variants)))
        text, stem = table(rows_of(runs)), f"experiments_{args.group}_{name}"
        (args.results / f"{stem}.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
        (args.results / f"{stem}.md").write_text(text + "\n")
        print(f"\n{args.group}, {name}, {args.seeds} seeds\n\n{text}\n")


if __name__ == "__main__":
    main()
