"""The whole path on a laptop, without any hub: make word problems, fine-tune a small Pilot with a Copilot, generate.

python recipes/quickstart.py
python recipes/quickstart.py --pretrained FOLDER_OR_ID    # LoRA on a chat model that exists
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging,
    set_seed,
)

from hf_copilot import CopilotLogitsProcessor, CopilotSFTConfig, CopilotTrainer
from hf_copilot.evaluation.comparison import Comparison, compare, table_of
from hf_copilot.evaluation.rows import generate_answers
from hf_copilot.plots import rectified_token, save_summary
from hf_copilot.training.report import cost_since, show

NAMES = ["ann", "ben", "eva", "tom", "lea", "max", "zoe", "jon"]
THINGS = ["apples", "books", "coins", "stamps", "pens", "eggs", "cards", "shells"]
FROM_SCRATCH = {
    "max_steps": 2500,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "copilot_learning_rate": 3e-3,
    "warmup_steps": 50,
    "logging_steps": 100,
    "eval_steps": 100,
}
PRETRAINED = {  # λ = 1 is too much beside a Pilot that knows a lot: it is chosen on the evaluation set
    "max_steps": 60,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "copilot_learning_rate": 1e-3,
    "warmup_steps": 5,
    "logging_steps": 10,
    "eval_steps": 15,
    "copilot_strength": "auto",
}
SHOWN = 5  # answers before and after


@dataclass
class Arguments:
    """What can be changed."""

    pretrained: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a chat model; without it a small Pilot from scratch."}
    )
    output_dir: str = field(default="out/quickstart", metadata={"help": "Where Pilot, Copilot and picture go."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps; 2500, pretrained 60."})
    problems: int | None = field(
        default=None, metadata={"help": "Unseen problems for the evaluation by generation; 1000, pretrained 100."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data, weights and training."})


def word_problem(rng: random.Random) -> tuple[str, str, int]:
    """A question about one or two operations, the calculation, and its answer."""
    name, other, thing = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9)
    kind = rng.randrange(4)
    if kind == 0:
        return f"{name} has {a} {thing} and buys {b} more . how many {thing} has {name} ?", f"{a} + {b}", a + b
    if kind == 1:
        a, b = max(a, b), min(a, b)
        return f"{name} has {a} {thing} and gives {b} to {other} . how many are left ?", f"{a} - {b}", a - b
    if kind == 2:
        return f"{name} fills {c} boxes with {a} {thing} each . how many {thing} are that ?", f"{c} * {a}", a * c
    return f"{name} has {c} bags of {a} {thing} and finds {b} more . how many now ?", f"{c} * {a} + {b}", a * c + b


def make_data(count: int, rng: random.Random, unseen: set[str]) -> Dataset:
    """`count` different problems, none of them in `unseen`; their questions are added to it."""
    rows = []
    while len(rows) < count:
        question, calculation, answer = word_problem(rng)
        if question not in unseen:
            unseen.add(question)
            rows.append({"question": question, "calculation": calculation, "answer": answer})
    return Dataset.from_list(rows)


def as_texts(data: Dataset) -> Dataset:
    """The problems for a Pilot from scratch: a question, and a bare number."""
    return data.map(lambda row: {"prompt": f"{row['question']} answer :", "completion": f" {row['answer']}"})


def make_pilot(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.8M parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def exact_answers(pilot, tokenizer, data: Dataset, title: str, processor) -> list[str]:
    """Greedy answers to every problem."""
    return generate_answers(pilot, tokenizer, data["prompt"][:], processor, title, max_new_tokens=20, do_sample=False)


def exact_matches(answers: list[str], data: Dataset) -> torch.Tensor:
    """`[problems]` float, 1 where right."""
    pairs = zip(answers, data["answer"], strict=True)
    return torch.tensor([float(text.rpartition("=")[-1].replace(" ", "") == str(right)) for text, right in pairs])


def example_batch(tokenizer, data: Dataset, device) -> dict[str, torch.Tensor]:
    """Labelled problems, for the picture of one rectified token."""
    tokenizer.padding_side = "right"
    prompts = [len(tokenizer(text)["input_ids"]) for text in data["prompt"]]
    texts = [p + c for p, c in zip(data["prompt"], data["completion"], strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, length in enumerate(prompts):
        labels[row, :length] = -100
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def load_pretrained(name: str) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A chat model in float32, and its tokenizer with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


def as_chats(data: Dataset, tokenizer) -> Dataset:
    """The problems in the chat form of a pretrained Pilot: it answers with the calculation and the number."""

    def convert(row: dict[str, str]) -> dict[str, str]:
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "completion": f"{row['calculation']} = {row['answer']}"}

    return data.map(convert)


def print_answers(columns: dict[str, list[str]]) -> None:
    """What is said to a few problems, side by side."""
    table = Table(*columns, title="Some answers")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(" ".join(text.split()) for text in row))
    Console().print(table)


def settings(arguments: Arguments) -> dict[str, Any]:
    """Of the trainer."""
    on_gpu = torch.cuda.is_available()
    chosen = PRETRAINED if arguments.pretrained else FROM_SCRATCH
    return chosen | {
        "output_dir": arguments.output_dir,
        "max_steps": arguments.max_steps or chosen["max_steps"],
        "eval_strategy": "steps",
        "save_strategy": "no",
        "report_to": [],
        "seed": arguments.seed,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
    }


def main(arguments: Arguments) -> None:
    set_seed(arguments.seed)
    logging.set_verbosity_error()
    rng, seen = random.Random(arguments.seed), set()
    *counts, problems = (1_000, 40, 100) if arguments.pretrained else (20_000, 200, 1000)
    counts.append(arguments.problems or problems)
    train, validation, test = (make_data(count, rng, seen) for count in counts)
    if arguments.pretrained:
        pilot, tokenizer = load_pretrained(arguments.pretrained)
        train, validation, test = (as_chats(data, tokenizer) for data in (train, validation, test))
        few = test["prompt"][:SHOWN]
        before = generate_answers(pilot, tokenizer, few, None, "before", max_new_tokens=24, do_sample=False)
    else:
        train, validation, test = map(as_texts, (train, validation, test))
        tokenizer = make_tokenizer([row["prompt"] + row["completion"] for data in (train, test) for row in data])
        pilot = make_pilot(tokenizer)

    trainer = CopilotTrainer(
        model=pilot,
        args=CopilotSFTConfig(**settings(arguments)),
        train_dataset=train.select_columns(["prompt", "completion"]),
        eval_dataset=validation.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if arguments.pretrained else None,
    )
    start = time.perf_counter()
    trainer.train()
    history = list(trainer.state.log_history)
    metrics = trainer.evaluate(test.select_columns(["prompt", "completion"]))
    trainer.save_model()

    pilot = trainer.model.eval()
    answers = exact_answers(pilot, tokenizer, test, "Pilot", None)
    with CopilotLogitsProcessor(trainer.copilot, pilot, tokenizer=tokenizer) as processor:
        rectified = exact_answers(pilot, tokenizer, test, "Pilot + Copilot", processor)
    hits = [exact_matches(texts, test) for texts in (answers, rectified)]
    found = [compare("right answers", *hits, form=".1%")]
    for quantity, name, form in (("nll", "NLL (nats per token)", ".4f"), ("token_accuracy", "token accuracy", ".1%")):
        both = (metrics[f"eval_{who}_{quantity}"] for who in ("pilot", "rectified"))
        found.append(Comparison(name, *both, form=form))
    show(table_of(f"{len(test)} unseen problems, greedy", found))
    if arguments.pretrained:
        after = {"Pilot after": answers[:SHOWN], "Pilot + Copilot": rectified[:SHOWN]}
        problems = {"problem": test["question"][:SHOWN], "Pilot before": before}
        print_answers(problems | after | {"right": test["completion"][:SHOWN]})
    print(cost_since(start))

    picture = Path(arguments.output_dir) / "quickstart.png"
    token = rectified_token(trainer.learner, example_batch(tokenizer, validation, pilot.device), pilot)
    title = "Word problems: evaluation set over training, and the token that gained most"
    save_summary(str(picture), history, token, tokenizer.convert_ids_to_tokens, title)
    print(f"\nPicture: {picture}\n\nTo use the Copilot again:\n")
    print(f"""    from transformers import AutoModelForCausalLM, AutoTokenizer
    from hf_copilot import CopilotLogitsProcessor, CopilotModel

    pilot = AutoModelForCausalLM.from_pretrained("{arguments.output_dir}")
    tokenizer = AutoTokenizer.from_pretrained("{arguments.output_dir}")
    copilot = CopilotModel.from_pretrained("{arguments.output_dir}/copilot")
    inputs = tokenizer({test[0]["prompt"]!r}, return_tensors="pt", return_token_type_ids=False)
    with CopilotLogitsProcessor(copilot, pilot, tokenizer=tokenizer) as processor:
        print(tokenizer.decode(pilot.generate(**inputs, logits_processor=[processor], max_new_tokens=20)[0]))""")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
