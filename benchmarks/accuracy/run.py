"""Does a Copilot help, on data like mine, more than the same parameters spent on a bigger Pilot?

    python -m benchmarks.accuracy.run arithmetic --seeds 3
    python -m benchmarks.accuracy.run --seeds 3 --data DIR             # all tasks
    python -m benchmarks.accuracy.run mawps --pilot Qwen/Qwen2.5-0.5B --lora --device cuda --data DIR

Every run is kept under --work and not repeated while its settings are the same. Writes
benchmarks/results/accuracy/<task>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.accuracy.arms import (
    COPILOTS,
    JOINT_RATES,
    LONGER,
    TITLES,
    run_copilots,
    run_costs,
    run_joint,
    run_longer,
)
from benchmarks.accuracy.multiple_choice import MULTIPLE_CHOICE
from benchmarks.accuracy.recommendation import RECOMMENDATION
from benchmarks.accuracy.report import rows_of, summarise
from benchmarks.accuracy.tasks import ARITHMETIC, MAWPS, TEXT, Task
from benchmarks.accuracy.training import Setting, Variant
from benchmarks.common import kept, table

TASKS = {task.name: task for task in (ARITHMETIC, TEXT, MAWPS, RECOMMENDATION, MULTIPLE_CHOICE)}
RESULTS = common.RESULTS / "accuracy"


def settings_of(setting: Setting) -> dict:
    """Everything that a run's figures depend on, besides the code."""
    task = setting.task
    names = ("name", "pilot", "training", "copilot", "pretraining_steps", "max_length")
    settings = {name: getattr(task, name) for name in (*names, "max_new_tokens")}
    data = sha256(json.dumps(task.splits(setting.data, seed=0)).encode()).hexdigest()
    return settings | {
        "base": setting.pilot or "one for each seed",
        "lora": setting.lora,
        "device": setting.device,
        "data": data,
    }


def variant_settings(copilots: dict[str, Variant]) -> dict:
    """What makes the Copilots, beside a task's own settings of theirs."""
    return {name: variant.settings() for name, variant in copilots.items()}


def run_task(setting: Setting, seeds: int) -> tuple[list[dict], dict]:
    """All arms for every seed, and what they cost; a Hub model has no Pilot of the joint size beside it."""
    runs, settings, folder = [], settings_of(setting), setting.work / setting.task.name
    ours = COPILOTS["copilot"]
    with_copilots = settings | {"variants": variant_settings(COPILOTS)}
    with_ours = settings | {"variants": ours.settings()}
    for seed in range(seeds):
        run = kept(
            folder / f"copilots-{seed}.json",
            with_copilots,
            partial(run_copilots, setting, seed, COPILOTS),
        )
        if setting.pilot is None:
            rates = with_ours | {"joint_rates": JOINT_RATES, "shapes": ["deeper", "wider"]}
            run |= kept(folder / f"joint-{seed}.json", rates, partial(run_joint, setting, seed, ours))
            times = settings | {"longer": LONGER}
            run |= kept(folder / f"longer-{seed}.json", times, partial(run_longer, setting, seed))
        runs.append(run)
    if setting.pilot is not None:
        return runs, {}
    timed = {name: COPILOTS[name] for name in ("copilot", "states")}
    return runs, kept(
        folder / "costs.json", settings | {"variants": variant_settings(timed)}, partial(run_costs, setting, timed)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="all where none is named")
    parser.add_argument("--data", type=Path, help="folder with gsm8k/, mawps/, lastfm/, ... (not for arithmetic)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pilot", help="Hub id or folder of a causal LM; by default a small one is built")
    parser.add_argument("--learning-rate", type=float, help="of the Pilot; by default the task's, 3e-4 with --lora")
    parser.add_argument("--lora", action="store_true", help="fine-tune the Pilot with LoRA, r 32")
    parser.add_argument("--interactions", default="LastFM", help="name of the recommendation data in DIR/<name>")
    parser.add_argument("--work", type=Path, default=Path("out/accuracy"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = args.tasks or list(TASKS)
    if args.data is None and names != ["arithmetic"]:
        parser.error("--data is needed for every task but arithmetic")
    work = args.work / args.pilot.replace("/", "--") if args.pilot else args.work
    args.results.mkdir(parents=True, exist_ok=True)
    for name in names:
        task: Task = TASKS[name]
        if name == "recommendation" and args.interactions != task.dataset:
            task = replace(task, dataset=args.interactions, name=f"recommendation-{args.interactions.lower()}")
        learning_rate = args.learning_rate or (3e-4 if args.lora else task.training["learning_rate"])
        task = replace(task, training=task.training | {"learning_rate": learning_rate})
        setting = Setting(task, args.data, work, args.device, args.pilot, args.lora)
        stem = f"{name}-{args.pilot.replace('/', '--')}" if args.pilot else task.name
        settings = settings_of(setting) | {"variants": variant_settings(COPILOTS)}
        report(task, *run_task(setting, args.seeds), settings, args.results / stem)


def run_seeds(
    document: str,
    name: str,
    depends_on: dict[str, Any],
    run_seed: Callable[[Setting, int], dict[str, Any]],
    report: Callable[[Setting, list[dict[str, Any]], dict[str, Any], Path], None],
) -> None:
    """The command line of a bench of its own: `run_seed` for every task and seed, each kept, and after each a report
    of all so far.

    Args:
        name: Of the bench; runs are kept under it.
        depends_on: What the figures depend on besides the task.
        report: Writes and prints the runs of a task, with their settings, into a folder.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["arithmetic", "text", "mawps"])
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mawps/ (not for arithmetic)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        setting = Setting(TASKS[task], args.data, args.work, args.device)
        settings, runs = settings_of(setting) | depends_on, []
        for seed in range(args.seeds):
            file = args.work / task / f"{name}-{seed}.json"
            runs.append(kept(file, settings, partial(run_seed, setting, seed)))
            report(setting, runs, settings, args.results)


def metrics_of(task: Task, found: Iterable[str]) -> list[str]:
    """The task's own first, then NLL, then the others."""
    return list(dict.fromkeys([task.metric, "nll", *found]))


def table_of(task: Task, summary: dict[str, dict], costs: dict[str, dict[str, float]]) -> str:
    """The table of what `report` stores."""
    found = [name for name, value in summary["pilot"].items() if isinstance(value, dict)]
    return table(rows_of(summary, TITLES, metrics_of(task, found), costs))


def report(task: Task, runs: list[dict], costs: dict, settings: dict, stem: Path) -> None:
    """Write and print what the runs of one task say."""
    summary = summarise(runs, metrics_of(task, runs[0]["pilot"]["figures"]))
    text = table_of(task, summary, costs)
    found = {"settings": settings, "arms": summary, "costs": costs}
    Path(f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    Path(f"{stem}.md").write_text(text + "\n")
    for arm, row in summary.items():
        print("".join(f"{arm}: {check}\n" for check in row.get("checks", [])), end="")
    print(f"\n{task.name}, {len(runs)} seeds, {len(runs[0]['pilot']['figures']['nll'][0])} test items\n\n{text}\n")


if __name__ == "__main__":
    main()
