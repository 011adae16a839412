"""One row from end to end, and its table."""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from benchmarks.common import device_name, paired_interval, standard_error, table_of_cells
from benchmarks.paper.rows import HUB, PEFT, PaperRow
from benchmarks.paper.tasks import TASKS, MetaMathQA, NextItem, Pairs, Reasoning
from benchmarks.paper.train import Options, train
from hf_copilot.version import __version__


def task_of(row: PaperRow, options: Options) -> Reasoning | NextItem | MetaMathQA:
    """
    Raises:
        ValueError: If the row has no set of a name that is asked for.
    """
    task, wanted = TASKS[row.task], options.sets
    if wanted is None:
        return task
    known = {each.name: each for each in getattr(task, "sets", ())}
    if not set(wanted) <= known.keys():
        raise ValueError(f"--sets {' '.join(wanted)}: {row.name} has {sorted(known) or 'no sets to choose among'}.")
    return replace(task, sets=tuple(known[name] for name in wanted))


def run(row: PaperRow, options: Options) -> dict[str, Any]:
    """Train and measure one row; everything that goes into its file."""
    set_seed(options.seed)
    task, started = task_of(row, options), datetime.datetime.now(datetime.UTC)
    splits = task.splits(options.data, options.rows, options.seed)
    pair, took = train(row, options, splits.train, splits.valid)
    start = time.perf_counter()
    measured = task.measure(pair, splits.test, options.data, row.training)
    return {
        "row": row.name,
        "created_at": started.isoformat(timespec="seconds"),
        "options": {name: value for name, value in asdict(options).items() if name not in ("data", "work")},
        "training": asdict(row.training),
        "trained_on": {"rows": len(splits.train), "of": splits.sources},
        "took": took | {"seconds of the evaluation": time.perf_counter() - start},
        "figures": {name: summary(pairs) for name, pairs in measured.items()},
        "versions": {"hf_copilot": __version__, "torch": torch.__version__, "device": device_name(options.device)},
    }


def summary(pairs: Pairs) -> dict[str, Any]:
    """Means in %, and the paired difference with its 95 % interval over test items."""
    alone, beside = (100 * np.array(column) for column in zip(*pairs, strict=True))  # [items] each
    difference, low, high = paired_interval(beside - alone)
    means = {"pilot": float(alone.mean()), "rectified": float(beside.mean()), "items": len(pairs)}
    means |= {"standard_error": standard_error(alone.tolist())}
    return means | {"difference": difference, "low": low, "high": high}


def table(row: PaperRow, found: dict[str, Any]) -> str:
    """Beside the paper's."""
    cells = []
    for name, own in found["figures"].items():
        theirs = [f"{value:g}" for value in row.paper.get(name, ())] or ["", ""]
        change = f"{own['difference']:+.1f} [{own['low']:+.1f}, {own['high']:+.1f}]"
        means = [f"{own[arm]:.1f}" for arm in ("pilot", "rectified")]
        cells.append([name, str(own["items"]), *means, change, *theirs])
    head = ("%", "items", "Pilot", "+ Copilot", "difference", "paper: Pilot", "paper: + Copilot")
    return table_of_cells(head, cells)


def peft_form(row: PaperRow, options: Options, found: dict[str, Any]) -> dict[str, Any]:
    """The same under the names of a file in PEFT's method_comparison/MetaMathQA/results."""
    took, training = found["took"], row.training
    names = {"train samples": took["steps"] * training.batch_size, "step": took["steps"]}
    accuracy = {"test accuracy": found["figures"]["gsm8k"]["rectified"] / 100}
    own = {"test accuracy of the Pilot alone": found["figures"]["gsm8k"]["pilot"] / 100}
    config = asdict(training) | {"model_id": options.pilot or HUB[row.pilot], "max_steps": took["steps"]}
    memory = torch.cuda.max_memory_reserved() if options.device == "cuda" else None
    return {
        "run_info": {
            "created_at": found["created_at"],
            "total_time": took["seconds"] + took["seconds of the evaluation"],
            "experiment_name": f"copilot/{row.name.replace('/', '--')}",
            "train_config": config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_max": memory,
            "train_time": took["seconds"],
            "num_total_params": sum(took["parameters"]),
            "status": "success",
            "metrics": [names | accuracy | own],
        },
        "meta_info": {"package_info": found["versions"]},
    }


def league() -> str:
    """What others have in PEFT's comparison."""
    cells = [[name, f"{right:g}", f"{seconds or ''}"] for name, (right, seconds) in PEFT.items()]
    return table_of_cells(("PEFT's comparison, LLaMA-3.2-3B", "GSM8K, %", "seconds of training, one L40S"), cells)


def write(row: PaperRow, options: Options, found: dict[str, Any], folder: Path) -> Path:
    """The file of the row, and of MetaMathQA the one in PEFT's form beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.name.replace('/', '--')}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    if row.task == "metamathqa":
        peft = json.dumps(peft_form(row, options, found), indent=2)
        file.with_name(f"{file.stem}--peft.json").write_text(peft + "\n")
    return file
