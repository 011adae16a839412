"""`hf-copilot sft` and `hf-copilot seq2seq`: fine-tune a Pilot with a Copilot on rows of questions and answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from datasets import Dataset
from peft import get_peft_model
from rich.console import Group
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..evaluation.comparison import compare_answers, compare_likelihoods, table_of
from ..evaluation.rectified_generation import RectifiedGeneration
from ..pilot.inspect import eval_mode, is_sharded
from ..training.report import cost_since, show
from ..training.seq2seq_trainer import CopilotSeq2SeqTrainer
from ..training.trainer import CopilotMixin, CopilotTrainer
from ..training.training_args import CopilotArguments, CopilotSeq2SeqConfig, CopilotSFTConfig
from .chats import check_template
from .mistakes import write_reference
from .parser import TRAINING, Parser, resume_from
from .recipe import RecipeArguments, TaskRows, prepare_rows, tokenize
from .scratch import build_from_scratch

logger = logging.get_logger(__name__)

MODEL = ("model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout")
OF_LOADED_PILOTS = ("model_name_or_path", "model_revision", "dtype", "attn_implementation")
OF_LOADED_PILOTS += ("load_in_4bit", "load_in_8bit")
REPORTS = ("logging_steps", "eval_strategy", "eval_steps", "save_strategy", "report_to", "resume_from_checkpoint")
REPORTS += ("push_to_hub", "hub_model_id")
WHOLE_CHATS = (
    "All of a row's `messages` is learnt, questions too, and λ is chosen on all of it. For the answers alone set "
    "--assistant_only_loss true, or give rows with a `prompt` and a `completion` of messages."
)


def parser(name: str) -> Parser:
    """That of `sft` or `seq2seq`."""
    kind, config, own = {
        "sft": ("decoder", CopilotSFTConfig, ("max_length", "assistant_only_loss", "chat_template_path")),
        "seq2seq": ("encoder-decoder", CopilotSeq2SeqConfig, ()),
    }[name]
    return Parser(
        f"hf-copilot {name}",
        f"Fine-tune a Pilot ({kind}) together with a Copilot. Then answer test rows, with and without the Copilot. "
        f"All other arguments are trl's and transformers' own. Several processes: accelerate launch -m "
        f"hf_copilot.cli {name} ...",
        (ScriptArguments, config, ModelConfig, RecipeArguments),
        {
            "Data": ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
            "Rows, answers, Pilot from scratch": [field.name for field in fields(RecipeArguments)],
            "Pilot": MODEL,
            "Training": TRAINING + REPORTS + own,
            "Copilot": [field.name for field in fields(CopilotArguments)],
        },
        examples=[f"hf-copilot {name} --config recipe.yaml --dataset_name rows.jsonl --output_dir out"],
    )


class Task(NamedTuple):
    """What both commands are given: their arguments, the rows, a Pilot (or its name) and its tokenizer."""

    script_args: ScriptArguments
    args: Any  # CopilotSFTConfig or CopilotSeq2SeqConfig
    model_args: ModelConfig
    recipe: RecipeArguments
    rows: TaskRows
    pilot: PreTrainedModel | str
    tokenizer: PreTrainedTokenizerBase

    @property
    def eval_dataset(self) -> Dataset | None:
        return self.rows.validation if len(self.rows.validation) else None


def read_task(name: str, argv: Sequence[str]) -> Task:
    script_args, args, model_args, recipe = parser(name).parse(argv)
    set_seed(args.seed)
    refuse_what_is_not_read(script_args, model_args, recipe)
    rows = prepare_rows(script_args, recipe, args.seed)
    if recipe.from_config is not None:
        pilot, tokenizer = build_from_scratch(recipe.from_config, recipe.tokenizer_size, rows.train)
    elif model_args.model_name_or_path is not None:
        pilot = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(pilot, revision=model_args.model_revision)
    else:
        raise ValueError("There is no Pilot: --model_name_or_path names one, --from_config builds one from scratch.")
    return Task(script_args, args, model_args, recipe, rows, pilot, tokenizer)


def refuse_what_is_not_read(script_args: ScriptArguments, model_args: ModelConfig, recipe: RecipeArguments) -> None:
    """Arguments of TRL's that would change nothing here."""
    found = changed(script_args, ("dataset_streaming", "ignore_bias_buffers"))
    if found:
        raise ValueError(f"{found} can't be used here: rows are read whole. CopilotTrainer in Python takes a stream.")
    found = changed(model_args, OF_LOADED_PILOTS) if recipe.from_config is not None else ""
    if found:
        raise ValueError(f"--from_config builds a Pilot from scratch, and {found} is for one that is loaded.")


def changed(arguments: Any, names: Sequence[str]) -> str:
    """Which of them are not as they are by default."""
    default = type(arguments)()
    return ", ".join(f"--{name}" for name in names if getattr(arguments, name) != getattr(default, name))


def sft(argv: Sequence[str]) -> None:
    task = read_task("sft", argv)
    args, model_args = task.args, task.model_args
    if args.chat_template_path is None:
        check_template(task.rows.train.take(1), task.tokenizer, has_encoder=False)
    if "messages" in task.rows.train.column_names and not args.assistant_only_loss:
        logger.warning(WHOLE_CHATS)
    if isinstance(task.pilot, str):
        args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        } | (args.model_init_kwargs or {})
    trainer = CopilotTrainer(
        model=task.pilot,
        args=args,
        train_dataset=task.rows.train,
        eval_dataset=task.eval_dataset,
        processing_class=task.tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        copilot=task.recipe.copilot(),
        copilot_peft_config=task.recipe.copilot_adapter(),
    )
    train_and_compare(trainer, task)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=task.script_args.dataset_name)


def seq2seq(argv: Sequence[str]) -> None:
    task = read_task("seq2seq", argv)
    model, tokenizer, model_args = task.pilot, task.tokenizer, task.model_args
    check_template(task.rows.train.take(1), tokenizer, has_encoder=True)
    if isinstance(model, str):
        model = AutoModelForSeq2SeqLM.from_pretrained(
            model,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
        )
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.task_type = "SEQ_2_SEQ_LM"
        model = get_peft_model(model, peft_config)
    trainer = CopilotSeq2SeqTrainer(
        model=model,
        args=task.args,
        train_dataset=tokenize(task.rows.train, tokenizer),
        eval_dataset=tokenize(task.eval_dataset, tokenizer) if task.eval_dataset is not None else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        copilot=task.recipe.copilot(),
        copilot_peft_config=task.recipe.copilot_adapter(),
    )
    train_and_compare(trainer, task)
    if task.args.push_to_hub:
        trainer.push_to_hub(dataset=task.script_args.dataset_name)


def train_and_compare(trainer: CopilotMixin, task: Task) -> None:
    """Train, with some answers at every evaluation; save; compare Pilot and Pilot + Copilot on the test rows, which
    several processes share. The main one says what is found."""
    recipe, test = task.recipe, task.rows.test
    watched = task.rows.validation.take(min(recipe.watch_rows, len(task.rows.validation)))
    if len(watched) and trainer.args.eval_strategy != "no" and not trainer.is_fsdp_enabled:
        trainer.add_callback(RectifiedGeneration(trainer, watched, recipe.is_right, **recipe.generation))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_from(trainer.args))
    trainer.save_model()
    is_main, pilot, found = trainer.is_world_process_zero(), trainer.accelerator.unwrap_model(trainer.model), None
    if is_main:
        write_reference(trainer, task.script_args, recipe)
    if is_sharded(pilot):
        found = "The Pilot is sharded, so nothing is answered here: hf-copilot eval does that with what is saved."
    elif test:
        both = (pilot, trainer.copilot, trainer.processing_class, test, trainer.copilot.config.strength)
        with eval_mode(pilot):
            size = {"batch_size": trainer.args.per_device_eval_batch_size}
            answers = compare_answers(*both, recipe.answer_pattern, **recipe.generation, **size)
            found = table_of(f"{len(test)} test rows", [answers, *compare_likelihoods(*both, **size)])
    if is_main:
        show(cost_since(start) if found is None else Group(found, cost_since(start)))
