"""Trainers that co-train a Copilot: the parent's training, unchanged, and a learner that looks on."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import shutil
from pathlib import Path

from peft import PeftConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import SFTTrainer

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..pilot.inspect import eval_mode
from .checkpoint import (
    STATE_FOLDER,
    WEIGHTS_FOLDER,
    begin_checkpoint,
    check_whole,
    load_best,
    newest_whole_checkpoint,
    save_state,
    save_weights,
    write_manifest,
)
from .distributed import num_processes, without_repeated_rows
from .folding import FoldingMixin
from .learner import CopilotLearner
from .lifecycle import (
    TrainerLifecycle,
    add_lifecycle,
    loaders_made_anew,
    make_copilot,
    make_learner,
    no_evaluation_told,
    nothing_logged,
    optimizer_mode_kept,
)
from .metrics import STRENGTHS, NothingMeasured, use_unchosen_strength
from .mistake_source import hold_out
from .refusals import check_arguments, check_data, check_given, check_trainer
from .report import show, table_of_training
from .row_ids import NO_ROW_IDS, RowIdsMixin, has_row_ids, with_row_ids
from .training_args import AUTO_STRENGTHS, CopilotArguments

logger = logging.get_logger(__name__)

CARD_LINE = (
    "\n## Copilot\n\nThis model was fine-tuned together with a [Transformer Copilot]"
    "(https://huggingface.co/papers/2505.16270), which rectifies it while it generates: see "
    f"[`{WEIGHTS_FOLDER}/`]({WEIGHTS_FOLDER}/README.md). The ledger of its mistakes is not in this repository.\n"
)


class CopilotMixin(FoldingMixin, RowIdsMixin):
    """Adds a Copilot to a subclass of `transformers.Trainer`; see [`CopilotTrainer`].

    Attributes:
        copilot (`CopilotModel`): Save it with `save_pretrained`, push it with `push_to_hub`; with
            `copilot_peft_config` every access merges the adapter into a new copy.
        learner (`CopilotLearner`): What trains it.
    """

    learner_class = CopilotLearner
    takes_encoder_decoders = True

    def __init__(
        self,
        model=None,
        args=None,
        *more,
        copilot: CopilotModel | CopilotConfig | str | os.PathLike | None = None,
        copilot_peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        check_given(model, args, self.takes_encoder_decoders)
        copilot_peft_config = copy.deepcopy(copilot_peft_config)  # PEFT writes into the Pilot's, perhaps the same
        bound = inspect.signature(super().__init__).bind_partial(model, args, *more, **kwargs)
        for argument in ("train_dataset", "eval_dataset"):
            check_data(argument, bound.arguments.get(argument))
        writes_ledger = getattr(args, "copilot_mistake_ledger", True)
        if writes_ledger and bound.arguments.get("train_dataset") is not None:
            bound.arguments["train_dataset"] = with_row_ids(bound.arguments["train_dataset"], args)
        try:
            super().__init__(*bound.args, **bound.kwargs)
        except StopIteration as error:
            raise ValueError("A streamed data set is empty: it has no rows to train on or to measure.") from error
        check_trainer(self, copilot_peft_config)
        self.copilot_args = self.args if isinstance(self.args, CopilotArguments) else CopilotArguments()
        check_arguments(self.args, self.copilot_args, copilot, self.eval_dataset is not None)
        self.learner = make_learner(
            make_copilot(copilot, self.model, self.processing_class),
            self.model,
            self.args,
            self.copilot_args,
            copilot_peft_config,
            self.learner_class,
        )
        self.lifecycle = TrainerLifecycle(self.learner, self.copilot_args)
        self.lifecycle.can_choose = self.eval_dataset is not None
        if writes_ledger and has_row_ids(self.train_dataset):
            self.lifecycle.rows = len(bound.arguments["train_dataset"])
            self.lifecycle.chat_template = getattr(self, "chat_template", None)  # of SFTTrainer, for its masks
        if self.copilot_args.copilot_mistake_source == "holdout":
            self.lifecycle.source = hold_out(self, self.copilot_args.copilot_holdout)
        add_lifecycle(self, self.lifecycle)

    @property
    def copilot(self) -> CopilotModel:
        return self.learner.exported()

    # ---- training and evaluation -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        with self.args.main_process_first(local=False):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir)
            elif resume_from_checkpoint:
                check_whole(resume_from_checkpoint)
        if self.lifecycle.rows is not None and not has_row_ids(self.train_dataset):
            logger.warning(NO_ROW_IDS, "`train_dataset` was replaced after the trainer was made")
            self.lifecycle.rows = None
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self.is_in_train = True  # elsewhere an evaluation casts the Pilot (bf16_full_eval), and leaves it so
            told = nothing_logged(self.callback_handler)
            with eval_mode(self.model), optimizer_mode_kept(self.optimizer), told:
                self._choose_strength()
        except BaseException:
            self._leave_unchosen()
            raise
        finally:
            self.is_in_train = False  # transformers leaves it set where training ended with an exception
            self.learner.close()
        self._print_table()
        return output

    def _choose_strength(self):
        strength = self.copilot_args.copilot_strength
        if strength in AUTO_STRENGTHS:
            self.calibrate(metric=AUTO_STRENGTHS[strength])
        elif strength is None and self.eval_dataset is not None:
            try:
                self.calibrate()
            except Exception as error:  # nobody asked for it, and what is trained wants to be saved
                is_everywhere = isinstance(error, NothingMeasured)
                if num_processes() > 1 and not is_everywhere:
                    raise  # others wait for this process
                use_unchosen_strength(self.learner.copilot.config)
                chosen = self.learner.copilot.config.strength
                logger.warning(f"λ is {chosen:g}. It could not be chosen: {error}", exc_info=not is_everywhere)

    def _leave_unchosen(self):
        """A run that was interrupted has not come to the choice of λ."""
        config, is_asked_for = self.learner.copilot.config, self.copilot_args.copilot_strength != "config"
        is_left_open = is_asked_for and self.learner.steps > 0 and config.calibration is None
        if self.lifecycle.can_choose and is_left_open and use_unchosen_strength(config):
            logger.warning(f"λ is {config.strength:g}, training ended before it was chosen: call trainer.calibrate().")

    def _print_table(self):
        log, calibration = self.learner.log, self.learner.copilot.config.calibration
        table = table_of_training(self.state.log_history, log.nbytes / 1e6, calibration)
        if table is not None and self.is_world_process_zero() and not self.args.disable_tqdm:
            show(table)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.take_row_ids(inputs)  # where another class has a training_step of its own
        if self.model.training:
            watch = self.learner.observe(dict(inputs))
        elif inputs.get("labels") is not None:
            watch = self.learner.evaluate(without_repeated_rows(inputs, self.accelerator, self.args))
        else:
            watch = contextlib.nullcontext()
        with contextlib.ExitStack() as of_copilot, watch:
            loss = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if self.model.training:
                of_copilot.enter_context(self.lifecycle.watch.of_copilot())  # what it logs, when `watch` ends
        return loss

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.learner.metrics.forget("eval")
        if self.learner.calibrating is not None:
            prediction_loss_only = True  # nothing is generated, no logits are gathered
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            if not self.is_in_train:
                self.learner.close()
        results = self.learner.pop_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in results.items()})
        if not metric_key_prefix.startswith("eval"):
            return output
        if results:
            self.learner.copilot.config.results = results
        else:
            logger.warning_once(
                "The evaluation has no figures of the Copilot: no label came to compute_loss. All are -100, or a "
                "prediction_step of your own does not call it."
            )
        return output

    def calibrate(self, eval_dataset=None, strengths=STRENGTHS, metric="nll"):
        """Choose the Copilot's λ by teacher-forced NLL, or by `metric="token_accuracy"`, on a data set, `eval_dataset`
        by default; see [`CopilotLearner.calibrate`]. An evaluation whose metrics begin with `calibration_`: they are
        logged, but no callback is told of an evaluation. Returns what is stored in `copilot.config.calibration`.

        Raises:
            ValueError: Without a data set, without a labelled token in it, for a λ that is negative or not finite, or
                for another metric.
        """
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if data is None:
            raise ValueError("calibrate needs a data set: pass one here, or `eval_dataset` to the trainer.")
        if isinstance(data, str):
            data = self.eval_dataset[data]
        parts = list(data.values()) if isinstance(data, dict) else [data]
        rows = [f"{len(part)} rows" if hasattr(part, "__len__") else "a stream" for part in parts]
        choosing = self.learner.calibrate(strengths, " and ".join(rows), metric)
        with choosing, no_evaluation_told(self.callback_handler), loaders_made_anew(self.args):
            self.evaluate(eval_dataset, metric_key_prefix="calibration")
        return self.learner.copilot.config.calibration

    def add_callback(self, callback):
        super().add_callback(callback)
        if hasattr(self, "lifecycle"):
            add_lifecycle(self, self.lifecycle)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self.learner.pop_metrics())
        super().log(logs, start_time)

    # ---- saving and loading ----------------------------------------------------------------------------------------

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            save_weights(self.learner, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            run_dir = Path(self._get_output_dir(trial=trial))
            begin_checkpoint(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """The last that every process writes into a checkpoint."""
        super()._save_rng_state(output_dir)
        own = self.copilot_args.copilot_save_mistake_log, self.args.should_save
        save_state(self.learner, Path(output_dir) / STATE_FOLDER, *own)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self.lifecycle.checkpoint = checkpoint

    def _load_best_model(self):
        self.learner.join()  # its rounds read the Pilot
        super()._load_best_model()
        load_best(self.learner, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero() and (self.args.hub_always_push or not self._is_uploading()):
            shutil.copytree(
                Path(checkpoint_folder) / WEIGHTS_FOLDER,
                Path(self.args.output_dir) / WEIGHTS_FOLDER,
                dirs_exist_ok=True,
            )
        super()._push_from_checkpoint(checkpoint_folder)

    def _is_uploading(self):
        """In the main process, which alone knows."""
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(CARD_LINE)


class CopilotTrainer(CopilotMixin, SFTTrainer):
    """[`trl.SFTTrainer`], and beside the Pilot that it fine-tunes a Copilot learns from its mistakes.

    The Pilot's training is SFTTrainer's, bit for bit. The logs gain `copilot_loss`, `pilot_nll`, `rectified_nll`,
    `pilot_token_accuracy`, `rectified_token_accuracy` and `copilot_dropped_mass` (probability beyond the `top_k`
    tokens that the Copilot is told of), at every logging step: each round is measured before the Copilot learns from
    it, so that in the first epoch the documents are new to it; of later epochs judge by the evaluation, which has all
    but the first, with `eval_`. There is `copilot_skipped_steps` where a step failed and was left out, and
    `copilot_log_rounds` where its bound in bytes keeps the log short. `eval_loss` is the Pilot's: for
    `load_best_model_at_end` to follow Pilot + Copilot set `metric_for_best_model="eval_rectified_nll"`.

    The Copilot is saved in `output_dir/copilot` and in every checkpoint. Checkpoints also hold the Mistake Log, and
    with it token ids of the training data: where they are shared (`hub_strategy="checkpoint"` or
    `"all_checkpoints"`), `copilot_save_mistake_log=False` leaves it out.

    Takes every argument of SFTTrainer, and:

    Args:
        args: Also a [`CopilotSFTConfig`], for the fields that begin with `copilot_`.
        copilot: None for the default Copilot, a [`CopilotConfig`], a [`CopilotModel`], or a path or Hub id.
        copilot_peft_config: Trains the Copilot with this adapter; it is saved merged.

    Raises:
        ValueError, NotImplementedError: Before the first step, for anything that is not supported; the message says
            what to use instead.
    """

    _tag_names = ["trl", "sft", "transformer-copilot"]
    takes_encoder_decoders = False
