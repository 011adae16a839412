"""`hf-copilot sft` and `hf-copilot seq2seq`: fine-tune a Pilot with a Copilot on rows of questions and answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..evaluation.comparison import compare_answers, compare_likelihoods, table_of
from ..evaluation.rectified_generation import RectifiedGeneration
from ..pilot.inspect import eval_mode, is_sharded
from ..training.report import cost_since, show
from ..training.trainer import CopilotMixin, CopilotSeq2SeqTrainer, CopilotTrainer
from ..training.training_args import CopilotArguments, CopilotSeq2SeqConfig, CopilotSFTConfig
from .mistakes import write_reference
from .parser import Parser
from .recipe import RecipeArguments, prepare_rows, tokenize
from .scratch import build_from_scratch

MODEL = ("model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout")
TRAINING = ("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate")
TRAINING += ("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "bf16", "use_cpu", "seed")
TRAINING += ("logging_steps", "eval_strategy", "eval_steps", "save_strategy", "report_to", "resume_from_checkpoint")
TRAINING += ("push_to_hub", "hub_model_id")


def parser(name: str) -> Parser:
    """That of `sft` or `seq2seq`."""
    kind, config, own = {
        "sft": ("decoder", CopilotSFTConfig, ("max_length",)),
        "seq2seq": ("encoder-decoder", CopilotSeq2SeqConfig, ()),
    }[name]
    return Parser(
        f"hf-copilot {name}",
        f"Fine-tune a Pilot ({kind}) together with a Copilot. Then answer test rows, with and without the Copilot. "
        f"Everything that trl's or transformers' own arguments say holds. Several processes: accelerate launch -m "
        f"hf_copilot.cli {name} ...",
        (ScriptArguments, config, ModelConfig, RecipeArguments),
        {
            "Data": ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
            "Rows, answers, Pilot from scratch": [field.name for field in fields(RecipeArguments)],
            "Pilot": MODEL,
            "Training": TRAINING + own,
            "Copilot": [field.name for field in fields(CopilotArguments)],
        },
        examples=[f"hf-copilot {name} --config recipe.yaml --dataset_name rows.jsonl --output_dir out"],
    )


def sft(argv: Sequence[str]) -> None:
    script_args, args, model_args, recipe = parser("sft").parse(argv)
    set_seed(args.seed)
    train, validation, test = prepare_rows(script_args, recipe, args.seed)
    if recipe.from_config is not None:
        model, tokenizer = build_from_scratch(recipe.from_config, recipe.tokenizer_size, train)
    else:
        model = named_model(model_args)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
        args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        } | (args.model_init_kwargs or {})
    trainer = CopilotTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation if len(validation) else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        copilot=recipe.copilot(),
    )
    train_and_compare(trainer, tokenizer, validation, test, recipe, script_args)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def seq2seq(argv: Sequence[str]) -> None:
    script_args, args, model_args, recipe = parser("seq2seq").parse(argv)
    set_seed(args.seed)
    train, validation, test = prepare_rows(script_args, recipe, args.seed)
    if recipe.from_config is not None:
        model, tokenizer = build_from_scratch(recipe.from_config, recipe.tokenizer_size, train)
    else:
        name, revision = named_model(model_args), model_args.model_revision
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            name,
            revision=revision,
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
        args=args,
        train_dataset=tokenize(train, tokenizer),
        eval_dataset=tokenize(validation, tokenizer) if len(validation) else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        copilot=recipe.copilot(),
    )
    train_and_compare(trainer, tokenizer, validation, test, recipe, script_args)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)


def named_model(model_args: ModelConfig) -> str:
    if model_args.model_name_or_path is None:
        raise ValueError("There is no Pilot: --model_name_or_path names one, --from_config builds one from scratch.")
    return model_args.model_name_or_path


def train_and_compare(
    trainer: CopilotMixin,
    tokenizer: PreTrainedTokenizerBase,
    validation: Dataset,
    test: Dataset,
    recipe: RecipeArguments,
    script_args: ScriptArguments,
) -> None:
    """Train, with some answers at every evaluation; save; compare Pilot and Pilot + Copilot on the test rows, in the
    main process."""
    watched = list(validation)[: recipe.watch_rows]
    if watched and trainer.args.eval_strategy != "no" and not trainer.is_fsdp_enabled:
        trainer.add_callback(RectifiedGeneration(trainer, watched, recipe.is_right, **recipe.generation))
    start, resume = time.perf_counter(), trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    write_reference(trainer.args.output_dir, script_args, recipe, trainer.args.seed)
    pilot = trainer.accelerator.unwrap_model(trainer.model)
    if is_sharded(pilot):
        show("The Pilot is sharded, so nothing is answered here: hf-copilot eval does that with what is saved.")
    elif len(test):
        both = (pilot, trainer.copilot, tokenizer, list(test), trainer.copilot.config.strength)
        with eval_mode(pilot), torch.no_grad():
            answers = compare_answers(*both, recipe.answer_pattern, **recipe.generation)
            found = [answers, *compare_likelihoods(*both)]
        show(table_of(f"{len(test)} test rows", found))
    show(cost_since(start))
