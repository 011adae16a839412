"""`hf-copilot fold`: train a Pilot towards Pilot + Copilot on rows, so that it needs no Copilot afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..evaluation.rows import label_row
from ..pilot.compatibility import check_pilot
from ..training.checkpoint import WEIGHTS_FOLDER
from ..training.folding import TOP_K, fold_copilot, mean_nll, share_kept
from ..training.report import show
from .chats import check_template
from .data import read_answers
from .pair import PairArguments, has_adapter, load_copilot, load_pilot, load_tokenizer, pilot_config
from .parser import TRAINING, Parser, resume_from
from .recipe import RowArguments


@dataclass
class FoldArguments(RowArguments, PairArguments):
    """What the Pilot is taught on, and how strongly."""

    data: str | None = field(default=None, metadata={"help": "A JSON Lines file, best the rows of training."})
    held_out: str | None = field(
        default=None, metadata={"help": "Another one, to measure how much of the Copilot's gain is kept."}
    )
    strength: float | None = field(default=None, metadata={"help": "λ of the teacher; by default the Copilot's own."})
    top_k: int = field(default=TOP_K, metadata={"help": "Tokens that are kept of each of its distributions."})


def parser() -> Parser:
    pair = [field.name for field in fields(PairArguments) if field.name != "device"]
    return Parser(
        "hf-copilot fold",
        "Train a Pilot, or its adapter, towards the distribution of Pilot + Copilot on rows. The folded Pilot in "
        "output_dir needs no Copilot, and costs what the Pilot cost.",
        (FoldArguments, TrainingArguments),
        {
            "Pilot and Copilot": pair,
            "Folding": [field.name for field in fields(FoldArguments) if field.name not in (*pair, "device")],
            "Training": TRAINING,
        },
        positions=("pilot", "copilot"),
        examples=["hf-copilot fold out --data train.jsonl --held_out valid.jsonl --output_dir folded"],
    )


def fold(argv: Sequence[str]) -> None:
    arguments: FoldArguments
    args: TrainingArguments
    arguments, args = parser().parse(argv)
    if arguments.data is None:
        raise ValueError("There is nothing to learn from: --data names a JSON Lines file.")
    if arguments.device is not None:
        raise ValueError("Folding trains on the first accelerator; --use_cpu chooses the processor, not --device.")
    if Path(args.output_dir, WEIGHTS_FOLDER).is_dir():
        raise ValueError(
            f"{args.output_dir} has a Copilot in {WEIGHTS_FOLDER}/, which would be found beside the folded Pilot and "
            "correct it twice: --output_dir names another folder."
        )
    set_seed(args.seed)
    pilot_config(arguments)  # as in load_pair
    copilot, pilot, tokenizer = load_copilot(arguments), load_trainable(arguments), load_tokenizer(arguments)
    check_pilot(copilot, pilot, tokenizer)
    has_encoder = copilot.config.pilot_is_encoder_decoder
    rows = labelled(arguments.data, arguments, tokenizer, has_encoder)
    held_out = labelled(arguments.held_out, arguments, tokenizer, has_encoder) if arguments.held_out else []
    strength = copilot.config.strength_or_own(arguments.strength)
    before = mean_nll(pilot.to(args.device), copilot, held_out, [0.0, strength])
    args.resume_from_checkpoint = resume_from(args)
    fold_copilot(pilot, copilot, rows, args, strength, arguments.top_k)
    pilot.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    if held_out:
        (folded,) = mean_nll(pilot, copilot, held_out, [0.0])
        found = share_kept(*before, folded)
        show(
            f"NLL per token on {len(held_out)} held-out rows: Pilot {found['pilot_nll']:.4f}, Pilot + Copilot "
            f"{found['rectified_nll']:.4f}, folded Pilot {found['folded_nll']:.4f}: {found['kept']:.0%} of the gain."
        )
    show(f"The folded Pilot is in {args.output_dir}. It needs no Copilot.")


def load_trainable(arguments: PairArguments) -> PreTrainedModel:
    """The Pilot, whose adapter can be trained where it has one."""
    if not has_adapter(arguments):
        return load_pilot(arguments)
    has_encoder = pilot_config(arguments).is_encoder_decoder
    auto_class = AutoPeftModelForSeq2SeqLM if has_encoder else AutoPeftModelForCausalLM
    settings = {"revision": arguments.pilot_revision, "dtype": arguments.dtype}
    return auto_class.from_pretrained(arguments.pilot, is_trainable=True, **settings)


def labelled(
    file: str, arguments: FoldArguments, tokenizer: PreTrainedTokenizerBase, has_encoder: bool
) -> list[dict[str, list[int]]]:
    """The rows of a file, as `calibrate` reads them."""
    rows = read_answers(file, arguments.prompt, arguments.completion)
    check_template(rows, tokenizer, has_encoder)
    return [label_row(tokenizer, row, has_encoder) for row in rows]
