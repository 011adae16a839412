"""Does the ledger find wrong rows? Answers of some rows are swapped, and rows are ranked by how the Pilot held them.

    python -m benchmarks.ledger --data DIR [--tasks mawps text] [--seeds 3] [--out benchmarks/results/ledger.json]

The small Pilots of benchmarks/accuracy are trained on rows of which 5 % have the answer of another row. Every way to
rank rows flags 5 %: precision is the share of swapped ones among these. Then the Pilot is trained anew, as many steps,
without the rows that the ledger's mean p flags.

    python -m benchmarks.ledger --data DIR --page out

trains on 400 such rows of MAWPS with a Copilot, and writes the rows and the page of their mistakes into a folder.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from scipy.stats import mannwhitneyu

from benchmarks.accuracy.scoring import Rectified
from benchmarks.accuracy.tasks import MAWPS, TEXT
from benchmarks.accuracy.training import Setting
from benchmarks.common import RESULTS, Row, kept, standard_error, table
from hf_copilot import CopilotConfig, CopilotSFTConfig, CopilotTrainer, MistakeLedger
from hf_copilot.ledger.page import mistakes

SHARE = 0.05
COPILOT = {"init": "random", "hidden_size": 16, "num_attention_heads": 2}  # as small as may be: the Pilot is looked at


class Plan(NamedTuple):
    """How much of a task is run."""

    rows: int
    epochs: int
    seeds: int


PLANS = {"mawps": Plan(rows=1671, epochs=4, seeds=3), "text": Plan(rows=600, epochs=4, seeds=2)}
TASKS = {"mawps": MAWPS, "text": TEXT}


def swapped(rows: list[Row], seed: int) -> tuple[list[Row], np.ndarray]:
    """The rows, of which `SHARE` have the answer of another row; and which, `[rows]` bool."""
    rng, is_wrong = random.Random(f"swap-{seed}"), np.zeros(len(rows), bool)
    is_wrong[rng.sample(range(len(rows)), round(SHARE * len(rows)))] = True
    changed = list(rows)
    for i in np.flatnonzero(is_wrong):
        others = [row for row in rng.sample(rows, 10) if row["completion"] != rows[i]["completion"]]
        changed[i] = rows[i] | {"completion": others[0]["completion"]}
    return changed, is_wrong


def train(setting: Setting, rows: list[Row], seed: int, steps: int, ledger: bool) -> CopilotTrainer:
    tokenizer = setting.tokenizer()
    arguments = setting.arguments(seed) | {"max_steps": steps, "copilot_steps_per_round": 1}
    arguments |= {"train_sampling_strategy": "group_by_length"}
    trainer = CopilotTrainer(
        setting.base(tokenizer, seed),
        CopilotSFTConfig(**arguments, copilot_mistake_ledger=ledger),
        copilot=CopilotConfig(**COPILOT),
        **setting.inputs(tokenizer, rows),
    )
    trainer.train()
    trainer.model.eval()
    return trainer


def loss(setting: Setting, trainer: CopilotTrainer, rows: list[Row]) -> np.ndarray:
    """`[rows, 2]`: −log p summed over the answer's tokens, and how many these are, by the Pilot at the end."""
    model = Rectified(trainer.model, trainer.processing_class)
    sums = model.log_likelihoods(setting.encoded(trainer.processing_class, rows)).numpy()
    return np.stack([-sums[:, 0], sums[:, 2]], axis=1)


def found(score: np.ndarray, is_wrong: np.ndarray) -> dict[str, float]:
    """How well the highest scores find the wrong rows."""
    flagged = (-score).argsort(kind="stable")[: is_wrong.sum()]
    statistic = mannwhitneyu(score[is_wrong], score[~is_wrong]).statistic
    return {"precision": float(is_wrong[flagged].mean()), "auroc": statistic / is_wrong.sum() / (~is_wrong).sum()}


def run(setting: Setting, seed: int, plan: Plan) -> dict[str, Any]:
    """One seed: every ranking's figures, and the test NLL with all rows and without those that are flagged."""
    splits = setting.task.splits(setting.data, seed)
    rows, is_wrong = swapped(splits.train[: plan.rows], seed)
    steps = plan.epochs * len(rows) // setting.task.training["per_device_train_batch_size"]
    trainer = train(setting, rows, seed, steps, ledger=True)
    ledger = MistakeLedger.load(trainer.args.output_dir).rows()
    final = loss(setting, trainer, rows)  # [rows, 2]
    scores = {
        "ledger: mean p over epochs": -ledger.mean_p,
        "ledger: mean loss over epochs": ledger.mean_loss,
        "ledger: p at the first visit": -ledger.first_p,
        "ledger: loss at the last visit": ledger.last_loss,
        "loss after training (one more pass)": final[:, 0] / final[:, 1],
    }
    flagged = set(ledger.mean_p.argsort(kind="stable")[: is_wrong.sum()].tolist())
    cleaned = train(setting, [row for i, row in enumerate(rows) if i not in flagged], seed, steps, ledger=False)
    test = [loss(setting, model, splits.test).sum(0) for model in (trainer, cleaned)]
    return {
        "rankings": {name: found(score, is_wrong) for name, score in scores.items()},
        "test nll": {name: float(a / b) for name, (a, b) in zip(("all rows", "without flagged"), test, strict=True)},
        "rows": len(rows),
        "steps": steps,
    }


def write_page(setting: Setting, folder: Path) -> None:
    """The rows, the run and the page of its mistakes; prints what the page of the documentation shows."""
    rows, is_wrong = swapped(setting.task.splits(setting.data, 0).train[:400], 0)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    tokenizer, file = setting.tokenizer(), folder / "train.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = setting.arguments(0) | {"max_steps": 150, "output_dir": str(folder)}
    trainer = CopilotTrainer(
        setting.base(tokenizer, 0),
        CopilotSFTConfig(**arguments, **setting.task.copilot),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    print(mistakes(folder, folder / "mistakes.html", file, rectify=True))
    found = MistakeLedger.load(folder).rows()
    for i in found.mean_p.argsort()[:5]:
        row, p, loss = found.row[i], found.mean_p[i], found.last_loss[i]
        print(f"row {row:3}  mean p {p:.3f}  last loss {loss:.2f}  {'swapped' if is_wrong[row] else ''}")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over seeds."""

    def over_seeds(values: list[float]) -> dict[str, float | None]:
        return {"mean": statistics.mean(values), "standard_error": standard_error(values)}

    return {
        "seeds": len(runs),
        "rows": runs[0]["rows"],
        "steps": runs[0]["steps"],
        "rankings": {
            name: {figure: over_seeds([run["rankings"][name][figure] for run in runs]) for figure in figures}
            for name, figures in runs[0]["rankings"].items()
        },
        "test nll": {name: over_seeds([run["test nll"][name] for run in runs]) for name in runs[0]["test nll"]},
        "gain": over_seeds([run["test nll"]["all rows"] - run["test nll"]["without flagged"] for run in runs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="instead of the plan's")
    parser.add_argument("--page", type=Path, help="write a page of mistakes into this folder, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS / "ledger.json")
    args = parser.parse_args()
    if args.page is not None:
        write_page(Setting(MAWPS, args.data, args.work), args.page)
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.tasks:
        setting, plan = Setting(TASKS[name], args.data, args.work), PLANS[name]
        runs = []
        for seed in range(args.seeds or plan.seeds):
            settings = {"plan": plan.rows, "epochs": plan.epochs, "share": SHARE, "copilot": COPILOT}
            file = args.work / "ledger" / f"{name}-{seed}.json"
            runs.append(kept(file, settings, lambda setting=setting, seed=seed, plan=plan: run(setting, seed, plan)))
        results[name] = summary(runs)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        rows = [
            {"ranked by": ranking, "precision": figures["precision"]["mean"], "AUROC": figures["auroc"]["mean"]}
            for ranking, figures in results[name]["rankings"].items()
        ]
        print(name, results[name]["test nll"], table(rows), sep="\n")


if __name__ == "__main__":
    main()
