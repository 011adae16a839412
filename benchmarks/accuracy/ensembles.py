"""Is it the mistakes that a Copilot learns from, or would any second network help as much?

    python -m benchmarks.accuracy.ensembles arithmetic mawps text --data DIR --seeds 3

Beside one Pilot, on the same draws: a token Copilot, and its own network trained as a plain language model, which is
told nothing of the Pilot's mistakes. And a second Pilot of another seed. Logits are mixed as α z + λ f, with f the
Copilot's correction (α = 1) or the other model's logits; the weights are those with the least NLL on validation rows.

Runs are kept under --work. Writes benchmarks/results/accuracy/ensembles_<task>.{json,md}.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.accuracy.arms import Arm
from benchmarks.accuracy.report import rows_of, summarise
from benchmarks.accuracy.run import metrics_of, run_seeds, variant_settings
from benchmarks.accuracy.scoring import Figures
from benchmarks.accuracy.training import Setting, Variant
from benchmarks.common import table
from benchmarks.pretrained.measuring import ALONE, ENSEMBLE_GRID, Model
from benchmarks.pretrained.tasks import Example
from benchmarks.pretrained.variants import Learner
from hf_copilot.training.records import IGNORE
from hf_copilot.training.report import count_parameters


class LanguageModel(Learner):
    """Trains the Copilot's network by itself, on the documents that a Copilot would draw."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, alone=True, **kwargs)


VARIANTS = {
    "copilot": Variant(learner=Learner),
    "language model": Variant({"copilot_input": "token"}, learner=LanguageModel),
}
DEPENDS_ON = {"variants": variant_settings(VARIANTS), "grid": ENSEMBLE_GRID}
TITLES = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot",
    "language model": "+ its network as a language model",
    "second": "+ a second Pilot",
}


def run_seed(setting: Setting, seed: int) -> dict[str, Arm]:
    """The arms of one seed, each at the weights that were chosen."""
    tokenizer, splits = setting.tokenizer(), setting.task.splits(setting.data, seed)
    trained = setting.train(setting.base(tokenizer, seed), tokenizer, splits.train, seed, VARIANTS)
    second = setting.train(setting.base(tokenizer, seed), tokenizer, splits.train, seed + 100).pilot
    models = {"pilot": Model(trained.pilot, tokenizer)}
    models |= {name: Model(trained.pilot, tokenizer, learner) for name, learner in trained.learners.items()}
    models["second"] = Model(trained.pilot, tokenizer, second=second)
    return {name: measure(setting, model, splits.valid, splits.test) for name, model in models.items()}


def measure(setting: Setting, model: Model, valid: list[dict], test: list[dict]) -> Arm:
    chosen = model.likelihoods(examples(setting, model, valid)).best("nll")
    rows = examples(setting, model, test)
    likelihoods = model.likelihoods(rows)
    tokens, own = likelihoods.tokens.tolist(), likelihoods.at(chosen)
    figures = {
        name: Figures([value / n for value, n in zip(own[sums], tokens, strict=True)], tokens)
        for name, sums in (("nll", "nll"), ("token accuracy", "hits"))
    }
    if setting.task.name != "text":
        task = SimpleNamespace(batch_size=64, max_new_tokens=setting.task.max_new_tokens, right=setting.task.right)
        figures[setting.task.metric] = Figures(model.right(test, rows, task, chosen))
    networks = [model.pilot, model.second, model.learner and model.learner.copilot]
    size = sum(count_parameters(network)[0] for network in networks if network is not None)
    strength = chosen[1] if chosen != ALONE else None
    return {"parameters": size, "figures": figures, "strength": strength, "weights": chosen}


def examples(setting: Setting, model: Model, rows: list[dict]) -> list[Example]:
    """Prompt and completion as tokens."""
    encoded = setting.encoded(model.tokenizer, rows)
    borders = [row["labels"].count(IGNORE) for row in encoded]
    return [Example(row["input_ids"][:n], row["input_ids"][n:]) for row, n in zip(encoded, borders, strict=True)]


def report(setting: Setting, runs: list[dict[str, Arm]], settings: dict[str, Any], results: Path) -> None:
    metrics = metrics_of(setting.task, runs[0]["pilot"]["figures"])
    summary = summarise(runs, metrics)
    for arm, row in summary.items():
        row["weights"] = [run[arm]["weights"] for run in runs]
    text = table(rows_of(summary, TITLES, metrics, {}))
    weights = {TITLES[arm]: ", ".join(f"{a:g} z + {s:g} f" for a, s in row["weights"]) for arm, row in summary.items()}
    text += "\n\n" + "\n".join(f"- {title}: {mixed}" for title, mixed in weights.items())
    stem = results / f"ensembles_{setting.task.name}"
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "arms": summary}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(f"\n{setting.task.name}, {len(runs)} seeds\n\n{text}\n", flush=True)


if __name__ == "__main__":
    run_seeds(__doc__, "ensembles", DEPENDS_ON, run_seed, report)
