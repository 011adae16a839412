"""Fine-tune a Pilot with a Copilot on any question-answer data, in TRL's script style.

    python recipes/sft_copilot.py --config recipes/mawps_tiny.yaml --dataset_name DIR/mawps
    python recipes/sft_copilot.py --config recipes/gsm8k_qwen2.5_0.5b.yaml

`dataset_name` is a Hub id, a JSON Lines file (`.jsonl`, `.jsonl.gz`) or a folder with `train`, `test` files of that
kind. The Pilot is `model_name_or_path` (a Hub id or a folder), or built from scratch with `from_config`.
"""

from __future__ import annotations

from common import RecipeArguments, build_from_scratch, prepare_rows, train_and_compare
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_copilot import CopilotSFTConfig, CopilotTrainer


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
        copilot=recipe.copilot(),
    )
    train_and_compare(trainer, tokenizer, test, test, recipe)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, CopilotSFTConfig, ModelConfig, RecipeArguments))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
