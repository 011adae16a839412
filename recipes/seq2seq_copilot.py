"""Fine-tune an encoder-decoder (T5, FLAN-T5, BART, ...) with a Copilot on any question-answer data.

    python recipes/seq2seq_copilot.py --config recipes/mawps_t5_tiny.yaml --dataset_name DIR/mawps
    python recipes/seq2seq_copilot.py --config recipes/gsm8k_flan_t5_small.yaml

Data and Pilot are given as to `sft_copilot.py`.
"""

from __future__ import annotations

from common import RecipeArguments, build_from_scratch, prepare_rows, tokenize, train_and_compare
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_copilot import CopilotSeq2SeqConfig, CopilotSeq2SeqTrainer


def main(
    script_args: ScriptArguments,
    training_args: CopilotSeq2SeqConfig,
    model_args: ModelConfig,
    recipe: RecipeArguments,
) -> None:
    set_seed(training_args.seed)
    train, validation, test = prepare_rows(script_args, recipe, training_args.seed)
    if recipe.from_config is not None:
        model, tokenizer = build_from_scratch(recipe, train)
    else:
        name, revision = model_args.model_name_or_path, model_args.model_revision
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
        args=training_args,
        train_dataset=tokenize(train, tokenizer),
        eval_dataset=tokenize(validation, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        copilot=recipe.copilot(),
    )
    train_and_compare(trainer, tokenizer, test, tokenize(test, tokenizer), recipe)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, CopilotSeq2SeqConfig, ModelConfig, RecipeArguments))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
