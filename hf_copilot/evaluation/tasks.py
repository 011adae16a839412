"""Tasks of lm-evaluation-harness, by a Pilot alone and with its Copilot, with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.modeling_copilot import CopilotModel
from .comparison import Comparison, compare

NO_LM_EVAL = "--tasks needs lm-evaluation-harness: pip install 'hf_copilot[lm-eval]'."


def compare_on_tasks(
    pilot: PreTrainedModel,
    copilot: CopilotModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    strength: float,
    include_path: str | None = None,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> dict[str, list[Comparison]]:
    """The metrics of each task, and of each group of tasks that has some. With an accelerator its processes share the
    documents, and the main one gets all metrics, the others none.

    Raises:
        ValueError: Without lm-eval, for a task that it does not know, or for one of fewer documents than processes.
    """
    try:
        from lm_eval import simple_evaluate

        from ..lm_eval import CopilotLM
    except ImportError as error:
        raise ValueError(NO_LM_EVAL) from error
    tasks = [task.strip() for task in tasks]
    manager = manager_of(tasks, include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}: --include_path names a folder with task files.")
    tasks = list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task])))  # of patterns
    model = CopilotLM(pilot, copilot, 0.0, tokenizer=tokenizer, batch_size=batch_size)
    if accelerator is not None:
        check_shares(manager, tasks, settings.get("limit"), accelerator.num_processes)
        model.accelerator = accelerator  # as `hf` has it where it loads the Pilot itself
    found = []
    for model.strength in (0.0, strength):
        found.append(simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings))
    if None in found:  # of a process that is not the main one
        return {}
    compared = {name: compare_task(*found, name) for name in found[0]["results"]}
    return {name: comparisons for name, comparisons in compared.items() if comparisons}


def manager_of(tasks: Sequence[str], include_path: str | None) -> Any:
    """The `TaskManager` in which to look for these tasks. A folder that has them all is read alone: to read lm-eval's
    own, thousands of files, takes longer than a small task."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=include_path)


def check_shares(manager: Any, tasks: Sequence[str], limit: int | None, processes: int) -> None:
    """Raise a `ValueError` for a task that has fewer documents than there are processes, where lm-eval would end."""
    for name, task in manager.load(list(tasks))["tasks"].items():
        count = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
        if count < processes:
            raise ValueError(f"The task {name} has {count} documents for {processes} processes: start fewer.")


def compare_task(pilot: dict[str, Any], rectified: dict[str, Any], task: str) -> list[Comparison]:
    """Of two results of `simple_evaluate`; without an interval where a metric is no mean over documents, or of a
    group."""
    comparisons = []
    for name, before in pilot["results"][task].items():
        metric, _, filtered = name.partition(",")
        if not isinstance(before, float | int) or not filtered or metric.endswith("_stderr"):
            continue
        values = [per_document(results["samples"].get(task, ()), metric, filtered) for results in (pilot, rectified)]
        after = rectified["results"][task][name]
        title = metric if filtered == "none" else f"{metric} ({filtered})"
        found = compare(title, *values) if None not in values else None
        if found is None or abs(found.pilot - before) > 1e-6:
            found = Comparison(title, before, after)
        comparisons.append(found)
    return comparisons


def per_document(samples: Sequence[dict[str, Any]], metric: str, filtered: str) -> torch.Tensor | None:
    """`[documents]`, or None where a document has no number."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
    if not values or not all(isinstance(value, float | int) for value in values):
        return None
    return torch.tensor(values, dtype=torch.float64)
