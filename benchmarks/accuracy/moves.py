"""Where does a Copilot keep its gain, when it leaves the Pilot that it was trained beside?

    python -m benchmarks.accuracy.moves arithmetic mawps --data DIR --seeds 3

At home a Pilot is fine-tuned with a token Copilot on one half of the training rows. Then the Copilot moves to Pilots
of the same tokenizer that were fine-tuned on the other half: of the same base, by LoRA, rounded to 8 and 4 bits,
aligned further by DPO, of half and twice as many layers. And to a base of twice as many layers that was not
fine-tuned at all.

Beside each stand: no Copilot, the moved one at the λ of home and at one that is chosen on 100 validation rows, one
that was trained there, and what the small Pilot learnt at home, as logits alone (proxy-tuning, arXiv 2401.08565).

Everything is teacher-forced on test rows. Runs are kept under --work. Writes
benchmarks/results/accuracy/moves_<task>.{json,md}.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from benchmarks.accuracy.experiments import measure
from benchmarks.accuracy.run import run_seeds, variant_settings
from benchmarks.accuracy.scoring import BATCH, Example, Rectified, beside
from benchmarks.accuracy.shares import ALONE, OWN, Runs, share_of_gain
from benchmarks.accuracy.training import Setting, Variant, copy_of
from benchmarks.common import CHECKPOINTING, Row, standard_error, table
from hf_copilot import CopilotLearner
from hf_copilot.training.metrics import STRENGTHS
from hf_copilot.training.records import IGNORE

VARIANTS = {"copilot": Variant()}
CHOSEN_ON = 100  # validation rows
DPO = {"max_steps": 100, "learning_rate": 1e-4, "beta": 0.1, "per_device_train_batch_size": 16}
BITS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]),
}
METRICS = ("nll", "token accuracy", "answers right")
ARMS = (ALONE, "moved, λ of home", "moved, λ chosen", OWN, "small logits")
Figures = dict[str, float]


class Place(NamedTuple):
    """A Pilot, and the Copilot that was trained beside it (or beside what it was made of)."""

    pilot: PreTrainedModel
    copilot: Any = None


class Moves:
    """One task with one seed."""

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.seed = setting, seed
        self.tokenizer, splits = setting.tokenizer(), setting.task.splits(setting.data, seed)
        self.at_home, self.elsewhere = splits.train[::2], splits.train[1::2]
        self.valid = setting.encoded(self.tokenizer, splits.valid[:CHOSEN_ON])
        self.test = setting.encoded(self.tokenizer, splits.test)

    def run(self) -> dict[str, dict[str, Figures]]:
        """Figures of every arm, by destination."""
        home, base = self.train(self.at_home), self.setting.base(self.tokenizer, self.seed)
        strength = self.calibrated(home.pilot, home.copilot).strength
        return {name: self.compare(place, home, base, strength) for name, place in self.places(home)}

    def places(self, home: Place) -> Iterator[tuple[str, Place]]:
        layers = self.setting.task.pilot["num_hidden_layers"]
        yield "home", home
        other = self.train(self.elsewhere)
        yield "other rows", other
        yield "LoRA", self.train(self.elsewhere, setting=replace(self.setting, lora=True))
        for name, bits in BITS.items():
            yield name, Place(quantised(other.pilot, bits), other.copilot)
        yield "aligned by DPO", Place(self.aligned(other.pilot), other.copilot)
        half, twice = ({"num_hidden_layers": number} for number in (layers // 2, 2 * layers))
        yield "half as deep", self.train(self.elsewhere, half)
        yield "twice as deep", self.train(self.elsewhere, twice)
        yield "twice as deep, not fine-tuned", Place(self.setting.base(self.tokenizer, self.seed, twice).eval())

    def train(self, rows: list[Row], shape: dict[str, int] | None = None, setting: Setting | None = None) -> Place:
        setting = setting or self.setting
        base = setting.base(self.tokenizer, self.seed, shape)
        trained = setting.train(base, self.tokenizer, rows, self.seed, VARIANTS)
        copilot = trained.learners["copilot"].copilot
        pilot = trained.pilot.merge_and_unload() if setting.lora else trained.pilot
        return Place(copy_of(pilot), copilot)

    def aligned(self, pilot: PreTrainedModel) -> PreTrainedModel:
        """Further, by a short DPO run: the right completion is chosen, that of another row rejected."""
        rows = self.elsewhere[: DPO["max_steps"] * DPO["per_device_train_batch_size"]]
        others = [*rows[1:], rows[0]]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in zip(rows, others, strict=True)
            if row["completion"] != other["completion"]
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                folder,
                **DPO,
                seed=self.seed,
                use_cpu=self.setting.device == "cpu",
                bf16=self.setting.device != "cpu",
                save_strategy="no",
                report_to=[],
                **{CHECKPOINTING: False},
            )
            pairs = Dataset.from_list(pairs)
            trainer = DPOTrainer(copy_of(pilot), args=arguments, train_dataset=pairs, processing_class=self.tokenizer)
            trainer.train()
        return copy_of(trainer.model)

    def compare(self, place: Place, home: Place, base: PreTrainedModel, strength: float) -> dict[str, Figures]:
        moved = self.calibrated(place.pilot, home.copilot)
        figures = {
            ALONE: measure(Rectified(place.pilot, self.tokenizer), self.test),
            "moved, λ of home": measure(replace(moved, strength=strength), self.test) | {"strength": strength},
            "moved, λ chosen": measure(moved, self.test) | {"strength": moved.strength},
            "small logits": self.with_small_logits(place.pilot, home.pilot, base.eval()),
        }
        if place.copilot is not None:
            own = self.calibrated(place.pilot, place.copilot)
            figures[OWN] = measure(own, self.test) | {"strength": own.strength}
        return figures

    def calibrated(self, pilot: PreTrainedModel, copilot: Any) -> Rectified:
        """A copy of the Copilot beside a Pilot, at the λ of the validation rows."""
        model = Rectified(pilot, self.tokenizer, CopilotLearner(copy.deepcopy(copilot).eval(), pilot))
        model.calibrate(self.valid)
        return beside(model, model.learner)

    def with_small_logits(self, pilot: PreTrainedModel, small: PreTrainedModel, base: PreTrainedModel) -> Figures:
        """z + λ (z' − z''): what a small Pilot's fine-tuning changed in its logits, λ chosen on validation rows."""
        nll = {strength: self.proxy(self.valid, pilot, small, base, strength)["nll"] for strength in STRENGTHS}
        strength = min(nll, key=nll.get)
        return self.proxy(self.test, pilot, small, base, strength) | {"strength": strength}

    @torch.no_grad()
    def proxy(self, rows: list[Example], pilot, small, base, strength: float) -> Figures:
        model, sums = Rectified(pilot, self.tokenizer), torch.zeros(3, dtype=torch.float64)
        right = []
        for start in range(0, len(rows), BATCH):
            inputs = model.collate(rows[start : start + BATCH])
            labels = inputs.pop("labels")[:, 1:]  # [B, T - 1]
            z, tuned, untuned = (m(**inputs).logits[:, :-1].float() for m in (pilot, small, base))  # [B, T - 1, V]
            scores = (z + strength * (tuned - untuned)).log_softmax(-1)  # [B, T - 1, V]
            targets = labels != IGNORE
            log_p = scores.gather(-1, labels.clamp_min(0)[..., None])[..., 0]  # [B, T - 1]
            hits = (scores.argmax(-1) == labels) & targets
            sums += torch.stack([(log_p * targets).sum(), hits.sum(), targets.sum()]).double().cpu()
            right += (hits.sum(1) == targets.sum(1)).tolist()
        log_p, hits, targets = sums.tolist()
        return {"nll": -log_p / targets, "token accuracy": hits / targets, "answers right": statistics.mean(right)}


def quantised(pilot: PreTrainedModel, bits: BitsAndBytesConfig) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        pilot.save_pretrained(folder)
        pilot = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits)
    return pilot.train()  # without dropout; in eval mode layers of bitsandbytes repack their weights on a CPU


def table_of(runs: Runs) -> str:
    """A row for every destination and arm: means and standard errors over seeds, and of its own Copilot's gain in NLL
    the share that the arm has."""
    rows = []
    for place in runs[0]:
        for arm in filter(runs[0][place].__contains__, ARMS):
            row = {"Pilot": place, "arm": arm, "λ": ", ".join(strengths(runs, place, arm))}
            row |= {metric: cell(runs, place, arm, metric) for metric in METRICS}
            rows.append(row | {"of the gain": shown_share(runs, place, arm)})
    return table(rows)


def strengths(runs: Runs, place: str, arm: str) -> list[str]:
    return [f"{run[place][arm]['strength']:g}" for run in runs if "strength" in run[place][arm]]


def cell(runs: Runs, place: str, arm: str, metric: str) -> str:
    values = [run[place][arm][metric] for run in runs]
    form = ".3f" if metric == "nll" else ".1%"
    error = standard_error(values)
    return f"{statistics.mean(values):{form}}" + (f" ± {error:{form}}" if error is not None else "")


def shown_share(runs: Runs, place: str, arm: str) -> str:
    """Beside a Pilot that has a Copilot of its own."""
    found = share_of_gain(runs, place, arm) if arm != ALONE and OWN in runs[0][place] else None
    return "" if found is None else f"{found.value:.0%}"


def run_seed(setting: Setting, seed: int) -> dict[str, dict[str, Figures]]:
    return Moves(setting, seed).run()


def report(setting: Setting, runs: list[dict[str, Any]], settings: dict[str, Any], results: Path) -> None:
    text, stem = table_of(runs), results / f"moves_{setting.task.name}"
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(f"\n{setting.task.name}, {len(runs)} seeds\n\n{text}\n", flush=True)


if __name__ == "__main__":
    depends_on = {"variants": variant_settings(VARIANTS), "dpo": DPO, "chosen_on": CHOSEN_ON, "halves": "in turn"}
    run_seeds(__doc__, "moves", depends_on, run_seed, report)
