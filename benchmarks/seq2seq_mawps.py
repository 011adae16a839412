"""MAWPS, question to equation, with a small T5 from scratch: Pilot, Pilot + Copilot, and a Pilot of the joint size.

    python -m benchmarks.seq2seq_mawps --data DIR/mawps --seeds 3

Trains on `train`, chooses λ on `valid`, answers `test` greedily by `model.generate`; right is an answer whose equation
has the right value. Every run is kept under --runs and not repeated while its settings are the same. Writes
benchmarks/results/seq2seq_mawps.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, set_seed
from transformers import T5ForConditionalGeneration as T5

from benchmarks.common import RESULTS, kept, paired_interval, standard_error, table
from benchmarks.equations import solves
from hf_copilot import CopilotConfig, CopilotLogitsProcessor, CopilotSeq2SeqConfig, CopilotSeq2SeqTrainer, copilot_for
from hf_copilot.cli.scratch import train_tokenizer
from hf_copilot.cli.train import tokenize
from hf_copilot.evaluation.rows import generate_answers
from hf_copilot.training.report import count_parameters

SHAPE = {"num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1}
TRAINING = {"num_train_epochs": 16, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 100}
COPILOT = {"copilot_learning_rate": 1e-3, "copilot_steps_per_round": 4}
QUIET = {"save_strategy": "no", "report_to": [], "lr_scheduler_type": "cosine", "logging_steps": 100}


def load(folder: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Rows to train on, to choose λ on, to test on."""
    files = {name: [str(file) for file in folder.glob(f"{name}.jsonl*")] for name in ("train", "test", "valid")}
    rows = load_dataset("json", data_files=files)
    rows = rows.map(lambda row: {"prompt": row["question"], "completion": row["equation"]})
    return rows["train"], rows["valid"], rows["test"]


def make_t5(width: int, tokenizer) -> T5:
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    return T5(T5Config(d_model=width, d_kv=width // 4, d_ff=11 * width // 4, **SHAPE, **tokens))


def joint_width(width: int, tokenizer) -> int:
    """Width of the smallest Pilot that has as many parameters as Pilot and Copilot together."""
    pilot = make_t5(width, tokenizer)
    wanted = count_parameters(pilot)[0] + count_parameters(copilot_for(pilot, CopilotConfig()))[0]
    while count_parameters(make_t5(width, tokenizer))[0] < wanted:
        width += 8
    return width


def answer(pilot: T5, tokenizer, test: Dataset, processor, title: str) -> list[bool]:
    texts = generate_answers(pilot, tokenizer, test["prompt"][:], processor, title, max_new_tokens=48, do_sample=False)
    rows = zip(texts, test["equation"], test["final"], strict=True)
    return [text.strip() == equation or solves(text, float(value)) for text, equation, value in rows]


def train(trainer_class, config_class, width: int, seed: int, rows: Dataset, folder: Path, **settings):
    """A trainer that has trained its Pilot, and the seconds that it took."""
    set_seed(seed)
    texts = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
    tokenizer = train_tokenizer(texts, 1024)
    pilot = make_t5(joint_width(width, tokenizer) if settings.pop("joint", False) else width, tokenizer)
    extra = {"copilot": settings.pop("copilot")} if "copilot" in settings else {}
    trainer = trainer_class(
        model=pilot,
        args=config_class(output_dir=str(folder), seed=seed, **TRAINING, **QUIET, **settings),
        train_dataset=tokenize(rows, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pilot),
        processing_class=tokenizer,
        **extra,
    )
    trainer.model_accepts_loss_kwargs = False  # T5 gives mean losses
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def run_joint(width: int, seed: int, data: Path, folder: Path, device: str) -> dict:
    """Figures of a Pilot that is as large as Pilot and Copilot together."""
    rows, _, test = load(data)
    settings = {"use_cpu": device == "cpu", "joint": True}
    trainer, seconds = train(Seq2SeqTrainer, Seq2SeqTrainingArguments, width, seed, rows, folder, **settings)
    pilot, tokenizer = trainer.model.eval(), trainer.processing_class
    hits = answer(pilot, tokenizer, test, None, "Pilot of the joint size")
    size = count_parameters(pilot)[0]
    return {"joint": {"hits": hits, "nll": pilot_nll(trainer, test), "parameters": size, "train_s": seconds}}


def run_copilot(width: int, seed: int, data: Path, folder: Path, device: str) -> dict:
    """Figures of a Pilot, and of the same with its Copilot, at λ = 1 and at the λ that is best on `valid`."""
    rows, valid, test = load(data)
    settings = {"use_cpu": device == "cpu"} | COPILOT
    trainer, seconds = train(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, width, seed, rows, folder, **settings)
    pilot, tokenizer = trainer.model.eval(), trainer.processing_class
    size, own = count_parameters(pilot)[0], count_parameters(trainer.copilot)[0]
    figures = {}
    for arm in ("copilot", "calibrated"):
        if arm == "calibrated":
            trainer.calibrate(tokenize(valid, tokenizer))
        metrics = trainer.evaluate(tokenize(test, tokenizer))
        with CopilotLogitsProcessor(trainer.copilot, pilot) as processor:
            hits = answer(pilot, tokenizer, test, processor, f"Pilot + Copilot, λ = {processor.strength:g}")
        figures[arm] = {"hits": hits, "nll": metrics["eval_rectified_nll"], "strength": processor.strength}
        figures[arm] |= {"parameters": size + own, "train_s": seconds}
    hits = answer(pilot, tokenizer, test, None, "Pilot")
    return figures | {"pilot": {"hits": hits, "nll": metrics["eval_pilot_nll"], "parameters": size}}


@torch.no_grad()
def pilot_nll(trainer: Seq2SeqTrainer, test: Dataset) -> float:
    """Mean over all labels, as the Copilot's metrics are."""
    total, count, pilot = 0.0, 0, trainer.model.eval()
    for batch in trainer.get_eval_dataloader(tokenize(test, trainer.processing_class)):
        labels = int((batch["labels"] != -100).sum())
        total, count = total + pilot(**batch.to(pilot.device)).loss.item() * labels, count + labels
    return total / count


def summary(runs: list[dict]) -> list[dict]:
    """One row for each arm: means over seeds, and the difference to the Pilot with its 95 % interval over items."""
    arms = {"pilot": "Pilot", "copilot": "Pilot + Copilot, λ = 1", "calibrated": "Pilot + Copilot, λ chosen on valid"}
    arms["joint"] = "Pilot of the joint size"
    hits = {arm: np.array([run[arm]["hits"] for run in runs], dtype=float) for arm in arms}  # [seeds, items]
    rows = []
    for arm, name in arms.items():
        by_seed, gain = hits[arm].mean(1), (hits[arm] - hits["pilot"]).mean(0)
        row = {"arm": name, "parameters": f"{runs[0][arm]['parameters']:,}", "value right": f"{by_seed.mean():.1%}"}
        row["s.e. over seeds"] = f"{standard_error(by_seed.tolist()):.1%}" if len(by_seed) > 1 else ""
        row["NLL per token"] = f"{statistics.mean(run[arm]['nll'] for run in runs):.4f}"
        row["difference"] = ""
        if arm != "pilot" and gain.any():
            mean, low, high = paired_interval(gain)
            row["difference"] = f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train, test and valid .jsonl[.gz]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="d_model of the Pilot")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("out/seq2seq_mawps"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    common = {"training": TRAINING, "shape": SHAPE, "width": args.width}
    settings, runs = common | {"copilot": COPILOT}, []
    for seed in range(args.seeds):
        found = {}
        for name, measure, own in (("copilot", run_copilot, settings), ("joint", run_joint, common)):
            make = partial(measure, args.width, seed, args.data, args.runs / "trainer", args.device)
            found |= kept(args.runs / f"{name}-{seed}.json", own, make)
        runs.append(found)
    rows = summary(runs)
    text = table(rows) + "\n"
    (args.results / "seq2seq_mawps.json").write_text(json.dumps({"settings": settings, "runs": runs}) + "\n")
    (args.results / "seq2seq_mawps.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
