"""How much of a Copilot's gain stays when it is folded into its Pilot, beside the same time spent on labels.

    python -m benchmarks.accuracy.folding arithmetic mawps text --data DIR --seeds 3

A Pilot is trained with a token Copilot, λ is chosen on validation rows, and the Pilot goes on from there: taught by
Pilot + Copilot on its training rows (`fold_copilot`), or on their labels for as many seconds. Each takes the best of
`RATES` on validation rows. Then a fresh Copilot is trained beside the folded Pilot, which stays as it is.

Runs are kept under --work. Writes benchmarks/results/accuracy/folding_<task>.{json,md}.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from benchmarks.accuracy.arms import Arm, measure
from benchmarks.accuracy.report import LOWER_IS_BETTER, rows_of, summarise
from benchmarks.accuracy.run import metrics_of, run_seeds, variant_settings
from benchmarks.accuracy.scoring import Rectified, beside
from benchmarks.accuracy.training import Setting, Trained, Variant, copy_of
from benchmarks.common import table
from hf_copilot import fold_copilot
from hf_copilot.training.folding import TOP_K
from hf_copilot.training.report import count_parameters

SHARE = 0.5  # of the task's steps, for folding
RATES = (1.0, 0.3)  # of the task's learning rate
TIMED_STEPS = 200  # of training on labels, to know how many take as long as folding
VARIANTS = {"copilot": Variant()}
DEPENDS_ON = {"variants": variant_settings(VARIANTS), "share": SHARE, "rates": RATES, "top_k": TOP_K}
DEPENDS_ON["timed_steps"] = TIMED_STEPS
TITLES = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot, λ chosen on valid",
    "folded": "folded Pilot",
    "labels": "Pilot, labels for the time of folding",
    "again": "folded Pilot + a fresh token Copilot, λ chosen on valid",
}


class Folding:
    """One task with one seed."""

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.seed = setting, seed
        self.tokenizer, self.splits = setting.tokenizer(), setting.task.splits(setting.data, seed)
        self.rows = setting.encoded(self.tokenizer, self.splits.train)
        self.valid = setting.encoded(self.tokenizer, self.splits.valid)
        self.clock = time.process_time if setting.device == "cpu" else time.perf_counter  # whatever else runs there
        self.steps = round(SHARE * setting.task.training["max_steps"])

    def run(self) -> dict[str, Arm]:
        setting = self.setting
        trained = self.train(setting.base(self.tokenizer, self.seed), VARIANTS)
        alone = Rectified(trained.pilot, self.tokenizer)
        rectified = self.at_chosen(alone, trained.learners["copilot"])
        begin = self.clock()
        folded, rate = self.best(partial(self.fold, rectified))
        seconds = (self.clock() - begin) / len(RATES)  # the teacher runs again for each
        steps = round(seconds / self.seconds_of_step(trained.pilot))
        labels, rate_of_labels = self.best(partial(self.go_on, trained.pilot, steps))
        again = self.train(folded.pilot, VARIANTS, learning_rate=0.0)
        return {
            "pilot": self.arm(alone),
            "copilot": self.arm(rectified),
            "folded": self.arm(folded) | {"rate": rate, "steps": self.steps, "seconds": seconds},
            "labels": self.arm(labels) | {"rate": rate_of_labels, "steps": steps},
            "again": self.arm(self.at_chosen(Rectified(again.pilot, self.tokenizer), again.learners["copilot"])),
        }

    def at_chosen(self, alone: Rectified, learner) -> Rectified:
        """With λ chosen on the validation rows."""
        beside(alone, learner).calibrate(self.valid)
        return beside(alone, learner)

    def best(self, train: Callable[[float], PreTrainedModel]) -> tuple[Rectified, float]:
        """The Pilot of the rate with the least NLL on the validation rows, and that rate."""
        found = {}
        for share in RATES:
            rate = share * self.setting.task.training["learning_rate"]
            model = Rectified(train(rate).eval(), self.tokenizer)
            found[float(model.log_likelihoods(self.valid)[:, 0].sum())] = model, rate
        return found[max(found)]

    def fold(self, rectified: Rectified, rate: float) -> PreTrainedModel:
        pilot = copy_of(rectified.pilot)
        arguments = self.arguments(rate)
        fold_copilot(pilot, rectified.learner.copilot, self.rows, arguments, rectified.strength)
        return pilot

    def arguments(self, rate: float) -> TrainingArguments:
        own = self.setting.task.training
        return TrainingArguments(
            str(self.setting.work / "trainer" / f"folding-{self.setting.task.name}-{self.seed}"),
            max_steps=self.steps,
            learning_rate=rate,
            per_device_train_batch_size=own["per_device_train_batch_size"],
            per_device_eval_batch_size=32,
            warmup_steps=own.get("warmup_steps", 0),
            train_sampling_strategy=own.get("train_sampling_strategy", "random"),
            lr_scheduler_type="cosine",
            seed=self.seed,
            use_cpu=self.setting.device == "cpu",
            bf16=self.setting.device != "cpu",
            save_strategy="no",
            report_to=[],
            logging_steps=100,
        )

    def go_on(self, pilot: PreTrainedModel, steps: int, rate: float) -> PreTrainedModel:
        """Trained further on the labels."""
        return self.train(pilot, max_steps=steps, learning_rate=rate).pilot

    def seconds_of_step(self, pilot: PreTrainedModel) -> float:
        """Without what a training has to begin with."""
        times = [self.clock()]
        for steps in (1, 1 + TIMED_STEPS):
            self.train(pilot, max_steps=steps)
            times.append(self.clock())
        return (times[2] - 2 * times[1] + times[0]) / TIMED_STEPS

    def train(self, pilot: PreTrainedModel, variants: dict[str, Variant] | None = None, **changes: Any) -> Trained:
        """A copy of the Pilot, as the task trains it."""
        return self.setting.train(copy_of(pilot), self.tokenizer, self.splits.train, self.seed, variants, **changes)

    def arm(self, model: Rectified) -> Arm:
        size = count_parameters(model.pilot)[0]
        if model.learner is not None:
            size += count_parameters(model.learner.copilot)[0]
        return {
            "parameters": size,
            "figures": measure(self.setting, model, self.splits.test),
            "strength": model.strength if model.learner else None,
        }


def share_kept(summary: dict[str, Any], metric: str) -> dict[str, float]:
    """Of the Copilot's gain over its Pilot, by arm: the quotient of mean gains. Empty if it gains nothing."""
    gains = {arm: summary[arm][metric]["difference"] for arm in ("copilot", "folded", "labels")}
    gain = gains.pop("copilot")
    is_gain = gain < 0 if metric in LOWER_IS_BETTER else gain > 0
    return {arm: own / gain for arm, own in gains.items()} if is_gain else {}


def report(setting: Setting, runs: list[dict[str, Arm]], settings: dict[str, Any], results: Path) -> None:
    metrics = metrics_of(setting.task, runs[0]["pilot"]["figures"])
    summary = summarise(runs, metrics)
    shares = {metric: share_kept(summary, metric) for metric in metrics}
    steps = {arm: statistics.mean(run[arm]["steps"] for run in runs) for arm in ("folded", "labels")}
    text = table(rows_of(summary, TITLES, metrics, {}))
    for metric, share in filter(itemgetter(1), shares.items()):
        text += f"\n\nOf the Copilot's gain in {metric}: folded {share['folded']:.0%}, labels {share['labels']:.0%}."
    text += f"\n\nSteps: folded {steps['folded']:.0f}, labels {steps['labels']:.0f}; {len(runs)} seeds."
    stem = results / f"folding_{setting.task.name}"
    found = {"settings": settings, "arms": summary, "shares": shares, "steps": steps}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(f"\n{setting.task.name}\n\n{text}\n", flush=True)


def run_seed(setting: Setting, seed: int) -> dict[str, Arm]:
    return Folding(setting, seed).run()


if __name__ == "__main__":
    run_seeds(__doc__, "folding", DEPENDS_ON, run_seed, report)
