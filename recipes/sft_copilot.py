"""Fine-tune a Pilot with a Copilot on any question-answer data, in TRL's script style.

    python recipes/sft_copilot.py --config recipes/mawps_tiny.yaml --dataset_name DIR/mawps
    python recipes/sft_copilot.py --config recipes/gsm8k_qwen2.5_0.5b.yaml

`dataset_name` is a Hub id, a JSON Lines file (`.jsonl`, `.jsonl.gz`) or a folder with `train`, `test` files of that
kind. The Pilot is `model_name_or_path` (a Hub id or a folder), or built from scratch with `from_config`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from answers import generate_answers, print_comparison
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_copilot import CopilotConfig, CopilotLogitsProcessor, CopilotSFTConfig, CopilotTrainer
from hf_copilot.training.trainer import CopilotMixin


@dataclass
class RecipeArguments:
    """The data's form, a Pilot from scratch, the Copilot, and the evaluation by generation."""

    prompt: str = field(default="{question}\n", metadata={"help": "Prompt, as a format string over a row's fields."})
    completion: str = field(default="{answer}", metadata={"help": "Completion, likewise."})
    from_config: str | None = field(
        default=None,
        metadata={"help": "JSON object or file with a transformers config: the Pilot is built from scratch."},
    )
    tokenizer_size: int = field(
        default=1024, metadata={"help": "Vocabulary of the byte-level BPE that from_config trains on the data."}
    )
    copilot_preset: str = field(
        default="default", metadata={"help": "Settings of the Copilot.", "choices": ["default", "paper"]}
    )
    copilot_init: str = field(default="pilot", metadata={"help": "'pilot', 'random', or another checkpoint."})
    copilot_layers: int | None = field(
        default=None, metadata={"help": "Layers of the Copilot, 0 for all of its source; default: the preset's."}
    )
    copilot_memory: str | None = field(
        default=None, metadata={"help": "What it reads: 'tokens', or 'pilot', its states; default: the preset's."}
    )
    copilot_dropout: float = field(default=CopilotConfig.dropout, metadata={"help": "Dropout of the Copilot."})
    validation_rows: int = field(default=200, metadata={"help": "Rows of the training split kept for evaluation."})
    generate_rows: int = field(default=200, metadata={"help": "Test rows answered by generation; 0 for none."})
    answer_pattern: str = field(
        default="(?s)(.*)", metadata={"help": "Regular expression whose last match in an answer is compared."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    num_beams: int = field(default=1, metadata={"help": "Beams in generation."})


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
    given = recipe.from_config
    settings = json.loads(Path(given).read_text() if Path(given).is_file() else given)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tokens |= {"decoder_start_token_id": tokenizer.pad_token_id}  # of an encoder-decoder
    config = AutoConfig.for_model(**settings, **tokens)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config), tokenizer


def matches(answers: list[str], expected: list[str], pattern: str) -> torch.Tensor:
    """`[items]` float: 1 where the last match of the pattern is the same in both."""

    def last(text: str) -> str | None:
        found = [match.group(1).strip() for match in re.finditer(pattern, text) if match.group(1).strip()]
        return found[-1] if found else None

    return torch.tensor(
        [float(last(b) is not None and last(a) == last(b)) for a, b in zip(answers, expected, strict=True)]
    )


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


def copilot_config(recipe: RecipeArguments) -> CopilotConfig:
    make_config = CopilotConfig.paper if recipe.copilot_preset == "paper" else CopilotConfig
    layers = {} if recipe.copilot_layers is None else {"num_hidden_layers": recipe.copilot_layers or None}
    settings = {"init": recipe.copilot_init, "dropout": recipe.copilot_dropout}
    memory = {"memory": recipe.copilot_memory} if recipe.copilot_memory else {}
    return make_config(**settings, **layers, **memory)


def main(
    script_args: ScriptArguments, training_args: CopilotSFTConfig, model_args: ModelConfig, recipe: RecipeArguments
) -> None:
    set_seed(training_args.seed)
    train, validation, test = prepare_rows(script_args, recipe, training_args.seed)
    if recipe.from_config is not None:
        model, tokenizer = build_from_scratch(recipe, train)
    else:
        model = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        } | (training_args.model_init_kwargs or {})
    trainer = CopilotTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        copilot=copilot_config(recipe),
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    trainer.save_model()
    if recipe.generate_rows:
        compare(trainer, tokenizer, test, recipe, trainer.evaluate(test))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, CopilotSFTConfig, ModelConfig, RecipeArguments))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
