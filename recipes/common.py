"""What the recipes share: data, Pilots from scratch, answers by `model.generate`, and the table of both."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import ScriptArguments

from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.training.trainer import CopilotMixin


@dataclass
class RecipeArguments:
    """The data's form, a Pilot from scratch, the Copilot, and the evaluation by generation."""

    prompt: str = field(default="{question}\n", metadata={"help": "Prompt, as a format string over a row's fields."})
    completion: str = field(default="{answer}", metadata={"help": "Completion, likewise."})
    from_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "A transformers config with its model_type: the Pilot is built from scratch."}
    )
    tokenizer_size: int = field(
        default=1024, metadata={"help": "Vocabulary of the byte-level BPE that from_config trains on the data."}
    )
    copilot_preset: str = field(
        default="default", metadata={"help": "Settings of the Copilot.", "choices": ["default", "paper"]}
    )
    copilot_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What differs from the preset, fields of CopilotConfig: {memory: pilot}."}
    )
    validation_rows: int = field(default=200, metadata={"help": "Rows of the training split kept for evaluation."})
    generate_rows: int = field(default=200, metadata={"help": "Test rows answered by generation; 0 for none."})
    answer_pattern: str = field(
        default="(?s)(.*)", metadata={"help": "Regular expression whose last match in an answer is compared."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    num_beams: int = field(default=1, metadata={"help": "Beams in generation."})

    def __post_init__(self):
        """On the command line the dictionaries are JSON."""
        for name in ("from_config", "copilot_config"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))

    def copilot(self) -> CopilotConfig:
        make_config = CopilotConfig.paper if self.copilot_preset == "paper" else CopilotConfig
        return make_config(**(self.copilot_config or {}))


# ---- data -----------------------------------------------------------------------------------------------------------


def load_rows(script_args: ScriptArguments) -> DatasetDict:
    """The training and the test split, from a folder, a file (its last tenth is the test split) or the Hub."""
    path = Path(script_args.dataset_name)
    names = (script_args.dataset_train_split, script_args.dataset_test_split)
    if path.is_dir():
        files = {name: [str(file) for file in path.glob(f"{name}.jsonl*")] for name in names}
        missing = [name for name in names if not files[name]]
        if missing:
            raise ValueError(f"{path} has no file {' or '.join(f'{name}.jsonl[.gz]' for name in missing)}.")
        return load_dataset("json", data_files=files)
    if path.is_file():
        return load_dataset("json", data_files=str(path), split="train").train_test_split(0.1, shuffle=False)
    rows = load_dataset(script_args.dataset_name, script_args.dataset_config)
    return DatasetDict({"train": rows[names[0]], "test": rows[names[1]]})


def to_prompt_completion(rows: Dataset, recipe: RecipeArguments) -> Dataset:
    """Rows in TRL's prompt-completion form."""

    def convert(row: dict) -> dict[str, str]:
        try:
            return {"prompt": recipe.prompt.format(**row), "completion": recipe.completion.format(**row)}
        except KeyError as error:
            raise ValueError(
                f"The data has no field {error}; it has {sorted(row)}. Set prompt and completion."
            ) from error

    return rows.map(convert, remove_columns=rows.column_names)


def prepare_rows(script_args: ScriptArguments, recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Rows to train on, to validate on (both of the training split) and to generate for."""
    rows = {name: to_prompt_completion(part, recipe) for name, part in load_rows(script_args).items()}
    train, test = rows["train"].shuffle(seed=seed), rows["test"]
    if len(train) <= recipe.validation_rows:
        raise ValueError(f"{len(train)} training rows leave none beside validation_rows={recipe.validation_rows}.")
    validation = train.select(range(recipe.validation_rows))
    train = train.select(range(recipe.validation_rows, len(train)))
    return train, validation, test.select(range(min(recipe.generate_rows, len(test))))


# ---- tokenizers, and Pilots from scratch ----------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word and per digit."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a padding and an end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def build_from_scratch(recipe: RecipeArguments, train: Dataset) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A Pilot with random weights and a tokenizer trained on the data."""
    texts = [prompt + completion for prompt, completion in zip(train["prompt"], train["completion"], strict=True)]
    tokenizer = train_tokenizer(texts, recipe.tokenizer_size)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tokens |= {"decoder_start_token_id": tokenizer.pad_token_id}  # of an encoder-decoder
    config = AutoConfig.for_model(**recipe.from_config, **tokens)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config), tokenizer


def ids_with_end(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 512) -> list[int]:
    """A text as an encoder-decoder reads and writes it: with the end token."""
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts as the encoder's input, completions as labels; both end with the end token."""

    def convert(row: dict) -> dict[str, list[int]]:
        return {
            "input_ids": ids_with_end(tokenizer, row["prompt"]),
            "labels": ids_with_end(tokenizer, row["completion"]),
        }

    return rows.map(convert, remove_columns=rows.column_names)


# ---- training and answers -------------------------------------------------------------------------------------------


def train_and_compare(
    trainer: CopilotMixin,
    tokenizer: PreTrainedTokenizerBase,
    test: Dataset,
    labelled: Dataset,
    recipe: RecipeArguments,
) -> None:
    """Train, save, and compare on the test split, whose rows `labelled` are as the trainer evaluates them."""
    start, resume = time.perf_counter(), trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    trainer.save_model()
    if recipe.generate_rows:
        compare(trainer, tokenizer, test, recipe, trainer.evaluate(labelled))
    print(cost_since(start))


def cost_since(start: float) -> str:
    """The time, and the most memory that was in use: of the GPU, or of the process (where the system is Linux)."""
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    text = f"{minutes} min {seconds} s"
    if torch.cuda.is_available():
        return f"{text}, at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the GPU's memory"
    if sys.platform != "linux":
        return text
    import resource  # not on Windows

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{text}, at most {1024 * kibibytes / 1e9:.1f} GB of memory"


def compare(
    trainer: CopilotMixin,
    tokenizer: PreTrainedTokenizerBase,
    test: Dataset,
    recipe: RecipeArguments,
    metrics: dict[str, float],
) -> None:
    """Pilot and Pilot + Copilot on the test split, by generation; `metrics` are teacher-forced, on the same rows."""
    pilot = trainer.accelerator.unwrap_model(trainer.model).eval()
    settings = {"max_new_tokens": recipe.max_new_tokens, "num_beams": recipe.num_beams, "do_sample": False}
    answers = generate_answers(pilot, tokenizer, test["prompt"][:], None, "Pilot", **settings)
    with CopilotLogitsProcessor(trainer.copilot, pilot, tokenizer=tokenizer) as processor:
        rectified = generate_answers(pilot, tokenizer, test["prompt"][:], processor, "Pilot + Copilot", **settings)
    hits = [matches(texts, test["completion"][:], recipe.answer_pattern) for texts in (answers, rectified)]
    print_comparison(f"{len(test)} test rows", *hits, metrics)


@torch.no_grad()
def generate_answers(
    pilot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    processor: LogitsProcessor | None,
    title: str,
    batch_size: int = 64,
    **generation,
) -> list[str]:
    """The text after each prompt (of an encoder-decoder all its text), in batches, with a progress bar."""
    answers, has_encoder = [], pilot.config.is_encoder_decoder
    side = "right" if has_encoder else "left"
    processors = [processor] if processor is not None else []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title):
        texts = prompts[start : start + batch_size]
        ids = [ids_with_end(tokenizer, text) if has_encoder else tokenizer(text)["input_ids"] for text in texts]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(pilot.device)
        out = pilot.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
        prompt = 0 if has_encoder else inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True)
    return answers


def matches(answers: list[str], expected: list[str], pattern: str) -> torch.Tensor:
    """`[items]` float: 1 where the last match of the pattern is the same in both."""

    def last(text: str) -> str | None:
        found = [match.group(1).strip() for match in re.finditer(pattern, text) if match.group(1).strip()]
        return found[-1] if found else None

    return torch.tensor(
        [float(last(b) is not None and last(a) == last(b)) for a, b in zip(answers, expected, strict=True)]
    )


def print_comparison(title: str, pilot: torch.Tensor, rectified: torch.Tensor, metrics: dict[str, float]) -> None:
    """Both accuracies with their standard errors, the paired difference, and the teacher-forced figures.

    Args:
        title: Of the table.
        pilot, rectified: `[items]` float, 1 where the answer is right; the same items.
        metrics: Of `trainer.evaluate`, on the same items.
    """
    table = Table(title=title)
    for column in ("", "exact match", "s.e.", "NLL/token", "token acc."):
        table.add_column(column, justify="right" if column else "left")
    figures = {
        name: [metrics[f"eval_{name}_nll"], metrics[f"eval_{name}_token_accuracy"]] for name in ("pilot", "rectified")
    }
    change = [after - before for before, after in zip(*figures.values(), strict=True)]
    rows = (
        ("Pilot", pilot, figures["pilot"]),
        ("Pilot + Copilot", rectified, figures["rectified"]),
        ("difference (paired)", rectified - pilot, change),
    )
    for name, hits, (nll, accuracy) in rows:
        error = hits.std() / len(hits) ** 0.5
        table.add_row(name, f"{hits.mean():.1%}", f"{error:.1%}", f"{nll:.4f}", f"{accuracy:.1%}")
    Console().print(table)
