"""After an arm: its Copilot folded into its Pilot, beside labels for as long, and a fresh Copilot after folding."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from typing import TYPE_CHECKING, Any

from peft import get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from benchmarks.pretrained.arms import Arm
from benchmarks.pretrained.measuring import Model
from benchmarks.pretrained.tasks import TASKS
from benchmarks.pretrained.training import BATCH, WARMUP, PilotSpec, lora_config
from hf_copilot import fold_copilot
from hf_copilot.training.records import IGNORE

if TYPE_CHECKING:
    from benchmarks.pretrained.running import Bench

RATES = (1e-3, 3e-4)  # of a new LoRA adapter, for folding and for labels
FORWARD = 0.25  # of a training step, in time: what the teacher's pass over the rows takes is given to labels as steps


class Folding:
    """What becomes of one trained pair, by arm: NLL on validation and test rows, and right answers.

    Args:
        model: The pair, its adapter merged.
        strength: λ of the teacher, as chosen on the validation rows.
    """

    def __init__(self, bench: Bench, arm: Arm, model: Model, strength: float):
        self.bench, self.arm, self.model, self.strength = bench, arm, model, strength
        self.examples, splits = bench.to_train(arm.task), bench.splits[arm.task]
        self.valid, self.test, self.test_rows = bench.encoded(splits.valid), bench.encoded(splits.test), splits.test
        self.steps = bench.steps(arm)

    def run(self) -> dict[str, dict[str, Any]]:
        folded, found = self.best({rate: self.fold(rate) for rate in RATES})
        more = self.steps + math.ceil(FORWARD * len(self.examples) / BATCH)
        _, of_labels = self.best({rate: self.go_on(rate, more) for rate in RATES})
        frozen = PilotSpec("frozen", 0.0, self.arm.pilot.epochs)
        again = self.bench.train(self.examples, frozen, [self.arm.copilot], self.steps, self.arm.seed, folded)
        return {
            "folded": found | {"steps": self.steps},
            "labels": of_labels | {"steps": more},
            "again": self.figures(Model(again.pilot, self.bench.tokenizer, again.learner)),
        }

    def fold(self, rate: float) -> PreTrainedModel:
        wrapped = get_peft_model(copy.deepcopy(self.model.pilot), lora_config("lora"))
        rows = [
            {"input_ids": [*prompt, *completion], "labels": [IGNORE] * len(prompt) + completion}
            for prompt, completion in self.examples
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=self.steps,
                learning_rate=rate,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                warmup_steps=min(WARMUP, self.steps // 4),
                lr_scheduler_type="cosine",
                seed=self.arm.seed,
                use_cpu=self.model.pilot.device.type == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            fold_copilot(wrapped, self.model.learner.copilot, rows, arguments, self.strength)
        return wrapped.merge_and_unload().eval().requires_grad_(False)

    def go_on(self, rate: float, steps: int) -> PreTrainedModel:
        """Trained further on the labels, likewise."""
        pilot = PilotSpec("lora", rate, self.arm.pilot.epochs)
        return self.bench.train(self.examples, pilot, [], steps, self.arm.seed, self.model.pilot).pilot

    def best(self, found: dict[float, PreTrainedModel]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Of the rates, by NLL on validation rows."""
        nll = {rate: Model(pilot, self.bench.tokenizer).nll(self.valid) for rate, pilot in found.items()}
        rate = min(nll, key=nll.get)
        return found[rate], self.figures(Model(found[rate], self.bench.tokenizer)) | {"rate": rate}

    def figures(self, model: Model) -> dict[str, Any]:
        """At the weights with the least NLL on validation rows."""
        valid = model.likelihoods(self.valid)
        chosen, test = valid.best("nll"), model.likelihoods(self.test)
        at = test.grid.index(chosen)
        found = {"weights": chosen, "valid": min(valid.means()[0]), "nll": test.means()[0][at]}
        if self.arm.answers:
            right = model.right(self.test_rows, self.test, TASKS[self.arm.task], chosen)
            found["right"] = statistics.mean(right)
        return found
