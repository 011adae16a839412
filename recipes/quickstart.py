"""The whole path on a laptop, without any hub: make word problems, fine-tune a small Pilot with a Copilot, generate.

python recipes/quickstart.py
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import make_tokenizer
from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging, set_seed

from hf_copilot import CopilotLogitsProcessor, CopilotSFTConfig, CopilotTrainer
from hf_copilot.evaluation.comparison import Comparison, compare, table_of
from hf_copilot.evaluation.rows import generate_answers
from hf_copilot.plots import rectified_token, save_summary
from hf_copilot.training.report import cost_since, show

NAMES = ["ann", "ben", "eva", "tom", "lea", "max", "zoe", "jon"]
THINGS = ["apples", "books", "coins", "stamps", "pens", "eggs", "cards", "shells"]


@dataclass
class Arguments:
    """What can be changed."""

    output_dir: str = field(default="out/quickstart", metadata={"help": "Where Pilot, Copilot and picture go."})
    max_steps: int = field(default=2500, metadata={"help": "Optimizer steps."})
    problems: int = field(default=1000, metadata={"help": "Unseen problems for the evaluation by generation."})
    seed: int = field(default=0, metadata={"help": "Seed of data, weights and training."})


def word_problem(rng: random.Random) -> tuple[str, str]:
    """A question about one or two operations, and its answer."""
    name, other, thing = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9)
    kind = rng.randrange(4)
    if kind == 0:
        return f"{name} has {a} {thing} and buys {b} more . how many {thing} has {name} ?", str(a + b)
    if kind == 1:
        a, b = max(a, b), min(a, b)
        return f"{name} has {a} {thing} and gives {b} to {other} . how many are left ?", str(a - b)
    if kind == 2:
        return f"{name} fills {c} boxes with {a} {thing} each . how many {thing} are that ?", str(a * c)
    return f"{name} has {c} bags of {a} {thing} and finds {b} more . how many now ?", str(a * c + b)


def make_data(count: int, rng: random.Random, unseen: set[str]) -> Dataset:
    """`count` different problems, none of them in `unseen`; their questions are added to it."""
    rows = []
    while len(rows) < count:
        question, answer = word_problem(rng)
        if question not in unseen:
            unseen.add(question)
            rows.append({"prompt": question + " answer :", "completion": " " + answer})
    return Dataset.from_list(rows)


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


def exact_matches(pilot, tokenizer, data: Dataset, title: str, processor) -> torch.Tensor:
    """Greedy answers to every problem: `[problems]` float, 1 where right."""
    answers = generate_answers(
        pilot, tokenizer, data["prompt"][:], processor, title, max_new_tokens=6, do_sample=False
    )
    pairs = zip(answers, data["completion"], strict=True)
    return torch.tensor([float(answer.replace(" ", "") == right.strip()) for answer, right in pairs])


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


def main(arguments: Arguments) -> None:
    set_seed(arguments.seed)
    logging.set_verbosity_error()
    rng, seen = random.Random(arguments.seed), set()
    train, validation, test = (make_data(count, rng, seen) for count in (20_000, 200, arguments.problems))
    tokenizer = make_tokenizer([row["prompt"] + row["completion"] for data in (train, test) for row in data])
    pilot = make_pilot(tokenizer)
    on_gpu = torch.cuda.is_available()

    trainer = CopilotTrainer(
        model=pilot,
        args=CopilotSFTConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            copilot_learning_rate=3e-3,
            warmup_steps=50,
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=100,
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            bf16=on_gpu,
            use_cpu=not on_gpu,
        ),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train()
    history = list(trainer.state.log_history)
    metrics = trainer.evaluate(test)
    trainer.save_model()

    pilot = trainer.model.eval()
    pilot_hits = exact_matches(pilot, tokenizer, test, "Pilot", None)
    with CopilotLogitsProcessor(trainer.copilot, pilot, tokenizer=tokenizer) as processor:
        rectified_hits = exact_matches(pilot, tokenizer, test, "Pilot + Copilot", processor)
    found = [compare("right answers", pilot_hits, rectified_hits, form=".1%")]
    for quantity, name, form in (("nll", "NLL (nats per token)", ".4f"), ("token_accuracy", "token accuracy", ".1%")):
        both = (metrics[f"eval_{who}_{quantity}"] for who in ("pilot", "rectified"))
        found.append(Comparison(name, *both, form=form))
    show(table_of(f"{len(test)} unseen problems, greedy", found))
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
    inputs = tokenizer("{test[0]["prompt"]}", return_tensors="pt", return_token_type_ids=False)
    with CopilotLogitsProcessor(copilot, pilot, tokenizer=tokenizer) as processor:
        print(tokenizer.decode(pilot.generate(**inputs, logits_processor=[processor], max_new_tokens=6)[0]))""")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
