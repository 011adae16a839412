"""What makes a Copilot learn more: one thing changed at a time, all Copilots of a group beside one and the same Pilot.

    python -m benchmarks.accuracy.experiments positions arithmetic text mawps --data DIR --seeds 3
    python -m benchmarks.accuracy.experiments learning arithmetic text --data DIR --seeds 1
    python -m benchmarks.accuracy.experiments paper arithmetic mawps --data DIR --seeds 3

Groups, defined in groups.py: `positions` (with rotary positions and without, and the memory that is read), `input`
(what a token Copilot is fed: the token with its discrepancy, or the token alone), `learning` (one change at a time to
a state Copilot without positions), `mistakes` (whose errors it learns from), `paper` (the paper's Tables 16 to 20),
`pilots` (beside a Pilot that is trained longer and beside a wider one, and a token Copilot moved to them), `width` (a
Copilot of a quarter of its Pilot's width), `feedback` (RMSE that is fed its own predictions).

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

from benchmarks.accuracy.groups import GROUPS, Group
from benchmarks.accuracy.report import mean_of
from benchmarks.accuracy.run import RESULTS, TASKS, settings_of, variant_settings
from benchmarks.accuracy.scoring import Example, Rectified, beside
from benchmarks.accuracy.training import Setting, Variant
from benchmarks.common import is_kept, keep, kept, table

ALONE = "Pilot"  # the name of the Pilot alone in runs and tables
AT_ONCE = 4  # Copilots beside one Pilot
METRICS = ("token accuracy", "answers right", "generated right")
PAPERS_STRENGTHS = (0.3, 0.5, 0.8, 1.0)  # λ of Table 17
Figures = dict[str, Any]  # of one model: "own" at its λ, "chosen" at the chosen one, its calibration, and its Pilot
Run = dict[str, Figures]  # of one seed, by name

# ---- running -------------------------------------------------------------------------------------------------------


def run_group(setting: Setting, seed: int, name: str) -> Run:
    """A group for one seed. What is done is kept: as a whole where other models depend on all of it, else every
    Copilot on its own. Those that are missing are trained a few at a time, each time beside the same Pilot again."""
    folder, group = setting.work / setting.task.name / f"{name}-{seed}", GROUPS[name]
    settings = settings_of(setting) | group.depends_on
    if group.others is not None:
        settings["variants"] = variant_settings(group.variants)
        return kept(folder / "all.json", settings, partial(run_variants, setting, seed, group, group.variants))
    kept_as = {
        name: (folder / f"{name.replace(' ', '_')}.json", settings | {"variant": variant.settings()})
        for name, variant in group.variants.items()
    }
    missing = [name for name in group.variants if not is_kept(*kept_as[name])]
    for start in range(0, len(missing), AT_ONCE):
        some = {name: group.variants[name] for name in missing[start : start + AT_ONCE]}
        found = run_variants(setting, seed, group, some)
        for name in some:
            keep(*kept_as[name], {ALONE: found[ALONE], name: found[name]})
    figures = {}
    for file, _ in kept_as.values():
        figures |= json.loads(file.read_text())["result"]
    return figures


def run_variants(setting: Setting, seed: int, group: Group, variants: dict[str, Variant]) -> Run:
    """Train these beside one Pilot, and the group's other models; figures of each on validation rows."""
    tokenizer, splits = setting.tokenizer(), setting.task.splits(setting.data, seed)
    trained = setting.train(setting.base(tokenizer, seed), tokenizer, splits.train, seed, variants)
    alone = Rectified(trained.pilot, tokenizer)
    models = {ALONE: alone}
    models |= {name: beside(alone, learner) for name, learner in trained.learners.items()}
    if group.others is not None:
        models |= group.others(setting, tokenizer, splits.train, seed, trained)
    rows = setting.encoded(tokenizer, splits.valid)
    pilots = {id(model.pilot): name for name, model in models.items() if model.learner is None}
    figures = {name: figures_of(model, rows) | {"beside": pilots[id(model.pilot)]} for name, model in models.items()}
    if group.generates:
        for name, model in models.items():
            found = setting.task.measure(model, splits.valid[len(rows) // 2 :], setting.data)
            figures[name]["own"] |= {"generated right": mean_of(found[setting.task.metric])}
    return figures


def figures_of(model: Rectified, rows: list[Example]) -> Figures:
    """At the Copilot's own λ and at the one that the first half of the rows chooses, on the second half."""
    choosing, measuring = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if model.learner is None:
        return {"own": measure(model, measuring)}
    figures = {"own": measure(model, measuring), "calibration": model.calibrate(choosing)}
    chosen = replace(model, strength=figures["calibration"]["strength"])
    return figures | {"chosen": measure(chosen, measuring)}


def measure(model: Rectified, examples: list[Example]) -> dict[str, float]:
    """Means over targets, and over rows the share whose every token is the first choice: greedy generation with
    realised feedback, which all teacher-forced figures have, writes exactly these."""
    log_p, hits, targets = model.log_likelihoods(examples).T  # [rows] each
    right = (hits == targets).double().mean()
    return {
        "nll": float(-log_p.sum() / targets.sum()),
        "token accuracy": float(hits.sum() / targets.sum()),
        "answers right": float(right),
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def table_of(group: Group, runs: list[Run]) -> str:
    """A row for every model, more for λ where the group asks for it, and the paper's figures beside them."""
    rows = [row_of(runs, name) for name in runs[0]]
    if group.at_strengths:
        empty = dict.fromkeys(rows[0], "")
        rows += [empty | row for row in strength_rows(runs, group.at_strengths)]
    if group.paper:
        rows = [row | {"the paper": group.paper.get(row["Copilot"], "")} for row in rows]
    return table(rows)


def row_of(runs: list[Run], name: str) -> dict[str, str]:
    """Means over seeds at λ = 1, and at the λ that was chosen; NLL beside that of the Copilot's Pilot."""
    figures, row = runs[0][name], {"Copilot": name}
    pilot = mean(runs, figures["beside"], "own", "nll")
    for which, title in (("own", "λ = 1"), ("chosen", "λ chosen")):
        found = figures.get(which, {})
        row[f"NLL, {title}"] = ""
        if found:
            nll = mean(runs, name, which, "nll")
            row[f"NLL, {title}"] = f"{nll:.4f}" + (f" ({nll / pilot - 1:+.1%})" if "chosen" in figures else "")
        for metric in METRICS:
            if metric in figures["own"]:
                measured = metric in found
                row[f"{metric}, {title}"] = f"{mean(runs, name, which, metric):.1%}" if measured else ""
    strengths = [run[name]["calibration"]["strength"] for run in runs if "calibration" in run[name]]
    return row | {"λ": ", ".join(f"{strength:g}" for strength in strengths)}


def mean(runs: list[Run], name: str, which: str, metric: str) -> float:
    return statistics.mean(run[name][which][metric] for run in runs)


def strength_rows(runs: list[Run], name: str) -> list[dict[str, str]]:
    """Table 17: one Copilot at the paper's λ, on the rows that chose λ; its figures stand in the first columns."""
    found, rows = [run[name]["calibration"] for run in runs], []
    pilot = statistics.mean(calibration["nll"][0] for calibration in found)
    for strength in PAPERS_STRENGTHS:
        at = found[0]["strengths"].index(strength)
        nll, accuracy = (statistics.mean(c[metric][at] for c in found) for metric in ("nll", "token_accuracy"))
        row = {"Copilot": f"λ = {strength:g}", "NLL, λ = 1": f"{nll:.4f} ({nll / pilot - 1:+.1%})"}
        rows.append(row | {"token accuracy, λ = 1": f"{accuracy:.1%}"})
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
    if args.data is None and args.tasks != ["arithmetic"]:
        parser.error("--data is needed for every task but arithmetic")
    args.results.mkdir(parents=True, exist_ok=True)
    group = GROUPS[args.group]
    for name in args.tasks:
        setting = Setting(TASKS[name], args.data, args.work, args.device)
        runs = [run_group(setting, seed, args.group) for seed in range(args.seeds)]
        settings = settings_of(setting) | {"variants": variant_settings(group.variants)}
        text, stem = table_of(group, runs), f"experiments_{args.group}_{name}"
        found = json.dumps({"settings": settings, "runs": runs}, indent=1, default=str)
        (args.results / f"{stem}.json").write_text(found + "\n")
        (args.results / f"{stem}.md").write_text(text + "\n")
        print(f"\n{args.group}, {name}, {args.seeds} seeds\n\n{text}\n")


if __name__ == "__main__":
    main()
