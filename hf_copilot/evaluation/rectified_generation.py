"""Answers to a few rows at every evaluation of a run, by the Pilot alone and with its Copilot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..generation.logits_processor import CopilotLogitsProcessor
from ..pilot.inspect import eval_mode, is_sharded, isolated_rng
from ..training.chats import is_chat
from ..training.distributed import copy_from_main_process
from ..training.report import show
from ..training.trainer import CopilotMixin
from .rows import expected_answer, generate_answers, prompt_of, text_of, to_answer

logger = logging.get_logger(__name__)

COLUMNS = ("prompt", "expected", "Pilot", "Pilot + Copilot")
METRICS = ("eval_pilot_right_answers", "eval_rectified_right_answers")
SHOWN_PROMPT = 60  # its last characters


def same_text(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


class RectifiedGeneration(TrainerCallback):
    """Generates at every evaluation: `trainer.add_callback(RectifiedGeneration(trainer, rows))`.

    Adds `eval_pilot_right_answers` and `eval_rectified_right_answers`, shares of the rows, to the evaluation's metrics
    and to the log, and shows all answers in a table: printed, as text in TensorBoard, as a table in trackio. The main
    process generates. Training is what it is without, bit for bit: the random state and both models are left as they
    were, and nothing is recorded in the Mistake Log.

    Args:
        trainer: A [`CopilotTrainer`] or [`CopilotSeq2SeqTrainer`].
        rows: Each with a text `prompt` and a text `completion`, or a chat in one of TRL's forms, whose last assistant
            message is what is expected.
        is_right: Of an answer and the expected text, as the tokenizer gives it back; by default whether they are the
            same but for spaces around them.
        max_new_tokens, num_beams: Of the answers.
        max_seconds: The bound on both generations together; answers that it cuts short are named in a warning.

    Raises:
        ValueError: Without rows, for rows without these texts, for a chat without an answer, for a trainer without a
            `processing_class`.
        TypeError: For another trainer.
        NotImplementedError: When training starts, for a sharded Pilot (FSDP2).
    """

    def __init__(
        self,
        trainer: CopilotMixin,
        rows: Sequence[Mapping[str, Any]],
        is_right: Callable[[str, str], bool] = same_text,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        max_seconds: float = 60.0,
    ):
        if not isinstance(trainer, CopilotMixin):
            raise TypeError(f"RectifiedGeneration needs a trainer of hf_copilot, not a {type(trainer).__name__}.")
        self.trainer, self.is_right, self.max_seconds = trainer, is_right, max_seconds
        self.rows = [to_answer(row) for row in rows]
        texts = [row.get(name) for row in self.rows if not is_chat(row) for name in ("prompt", "completion")]
        if not self.rows or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                "RectifiedGeneration needs rows, each with a text `prompt` and a text `completion`, or with messages."
            )
        tokenizer = trainer.processing_class
        if tokenizer is None:
            raise ValueError("RectifiedGeneration reads texts: give the trainer its tokenizer, processing_class=...")
        self.expected = [expected_answer(tokenizer, row) for row in self.rows]
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        self.answered: int | None = None  # the step of the last answers

    def on_train_begin(self, args, state, control, **kwargs):
        self.answered = None
        if is_sharded(self.trainer.model):
            raise NotImplementedError(
                "RectifiedGeneration does not generate with a sharded Pilot (FSDP2): leave it out, and run "
                "`hf-copilot eval` on a checkpoint."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.answered = None  # λ is chosen, and the best model loaded, after the last step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.answered == state.global_step or not any(name.startswith("eval_") for name in metrics or {}):
            return  # another evaluation set of this step, or no evaluation: a calibration
        self.answered = state.global_step
        shares = torch.zeros(len(METRICS), device=self.trainer.learner.device)  # [2]
        if state.is_world_process_zero:
            with isolated_rng(shares.device):  # of `generate`, and of the user's function
                try:
                    answers = self.generate()
                    for i, said in enumerate(answers):
                        shares[i] = self.share_of_right(said)
                    self.report(answers, args, state.global_step)
                except Exception:  # of a user's function, or no memory: other processes wait, and training goes on
                    shares.fill_(torch.nan)
                    logger.warning("No answers at step %d.", state.global_step, exc_info=True)
        copy_from_main_process([shares])
        found = dict(zip(METRICS, shares.tolist(), strict=True))
        metrics.update(found)
        self.trainer.log(found)

    def share_of_right(self, answers: Sequence[str]) -> float:
        pairs = zip(answers, self.expected, strict=True)
        return sum(bool(self.is_right(*pair)) for pair in pairs) / len(self.rows)

    def generate(self) -> tuple[list[str], list[str]]:
        """The answers of both."""
        pilot = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        tokenizer = self.trainer.processing_class
        prompts = [prompt_of(tokenizer, row) for row in self.rows]
        settings = self.generation | {"batch_size": len(prompts), "use_cache": True, "max_time": self.max_seconds / 2}
        start = time.monotonic()
        with eval_mode(pilot):
            alone = generate_answers(pilot, tokenizer, prompts, None, **settings)
            with CopilotLogitsProcessor(self.trainer.copilot, pilot) as processor:
                both = generate_answers(pilot, tokenizer, prompts, processor, **settings)
        if time.monotonic() - start >= self.max_seconds / 2:
            logger.warning(
                f"Some answers may be cut short: {len(prompts)} rows took {time.monotonic() - start:.0f} s of "
                f"max_seconds={self.max_seconds:g}. Take fewer rows, or fewer new tokens."
            )
        return alone, both

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def report(self, answers: tuple[list[str], list[str]], args: Any, step: int) -> None:
        """The table of all answers, everywhere that the run reports to."""
        rows = [
            (text_of(row["prompt"]), expected, *(said.strip() for said in pair))
            for row, expected, pair in zip(self.rows, self.expected, zip(*answers, strict=True), strict=True)
        ]
        if not args.disable_tqdm:
            show(self.table(rows, f"Answers at step {step}"))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("eval/answers", markdown(rows), step)
        if "trackio" in args.report_to:
            import trackio

            trackio.log({"eval/answers": trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])}, step)

    def table(self, rows: Sequence[Sequence[str]], title: str) -> Table:
        table = Table(*COLUMNS, title=title, show_lines=True)
        for prompt, expected, *said in rows:
            colours = ["green" if self.is_right(answer, expected) else "red" for answer in said]
            answers = [Text(answer, style=colour) for answer, colour in zip(said, colours, strict=True)]
            table.add_row(Text(prompt.strip()[-SHOWN_PROMPT:]), Text(expected.strip()), *answers)
        return table


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are code, so that nothing in them is read as Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        lines.append(
            " | ".join("`" + " ".join(cell.replace("`", "'").replace("|", "/").split()) + "`" for cell in row)
        )
    return "\n".join(f"| {line} |" for line in lines)
