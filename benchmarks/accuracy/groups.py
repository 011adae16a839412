"""What experiments.py compares: groups of Copilots that differ in one thing, under the names of the tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.accuracy.arms import LONGER, PAPER
from benchmarks.accuracy.inputs import SHARE, FedByItself, ReadingPrompts, WithoutHiddenStates
from benchmarks.accuracy.mistakes import (
    ALL_BYTES,
    ALL_ROUNDS,
    ReservoirLearner,
    WeightedLearner,
    cross_fit,
    log_rows,
    teach,
)
from benchmarks.accuracy.scoring import Rectified, beside
from benchmarks.accuracy.training import Setting, Trained, Variant
from benchmarks.common import Row
from hf_copilot import CopilotLearner

OtherModels = Callable[[Setting, Any, list[Row], int, Trained], dict[str, Rectified]]


@dataclass(frozen=True)
class Group:
    """Copilots that are trained beside one and the same Pilot, and what is measured besides.

    Attributes:
        variants: The Copilots, by their names in the tables.
        others: Further models by name, which need more than that one Pilot: a function of the setting, the tokenizer,
            the training rows, the seed, and the Pilot and learners of the variants.
        depends_on: What `others` depends on, to know kept runs by.
        generates: Whether answers are generated as well.
        at_strengths: The variant that is shown at several λ too.
        paper: The paper's figures, by name, as a column of the table.
    """

    variants: dict[str, Variant]
    others: OtherModels | None = None
    depends_on: dict[str, Any] = field(default_factory=dict)
    generates: bool = False
    at_strengths: str | None = None
    paper: dict[str, str] = field(default_factory=dict)


def arguments(**changes: Any) -> dict[str, Any]:
    return {f"copilot_{name}": value for name, value in changes.items()}


def state_copilot(
    config: dict[str, Any] | None = None, learner: type[CopilotLearner] = CopilotLearner, **changes: Any
) -> Variant:
    """The Copilot that most groups are measured with, and these changes: it reads the Pilot's states and has no
    positions."""
    own = {"memory": "pilot", "position_embedding": "none"}
    return Variant(own | (config or {}), arguments(**changes), learner=learner)


def papers(config: dict[str, Any] | None = None) -> Variant:
    """The paper's preset, likewise."""
    return replace(PAPER, config=config or {})


# ---- one change at a time ------------------------------------------------------------------------------------------

ROTARY = {"position_embedding": "rotary"}
TOKENS = {"memory": "tokens"}
RMSE = {"objective": "rmse", "fusion": "probability"}
LEARNING = Group(
    {
        "ours": state_copilot(),
        "1 step in a round": state_copilot(steps_per_round=1),
        "1 step, learning rate x 3": state_copilot(steps_per_round=1, learning_rate=3e-3),
        "2 steps in a round": state_copilot(steps_per_round=2),
        "no weight decay": state_copilot(weight_decay=0.0),
        "no dropout": state_copilot({"dropout": 0.0}),
        "dropout 0.2": state_copilot({"dropout": 0.2}),
        "the Pilot's vocabulary": state_copilot({"vocab_projection": "pilot"}),
        "lag 0": state_copilot({"hidden_state_lag": 0}),
        "no hidden states": state_copilot(learner=WithoutHiddenStates),
        "log of 32 rounds": state_copilot(log_rounds=32),
        "log of 512 rounds": state_copilot(log_rounds=512),
        "input ℓ": state_copilot({"copilot_input": "discrepancy"}),
        "input token": state_copilot({"copilot_input": "token"}),
        "4 layers": state_copilot({"num_hidden_layers": 4}),
        "prompts' discrepancies read": state_copilot(learner=ReadingPrompts),
        "RMSE, realised feedback": state_copilot(RMSE),
        "random weights": state_copilot({"init": "random"}),
    }
)
POSITIONS = Group(
    {
        "no positions": state_copilot(),
        "tokens alone, no positions": state_copilot(TOKENS),
        "rotary positions": state_copilot(ROTARY),
        "tokens alone, rotary positions": state_copilot(TOKENS | ROTARY),
    }
)
FED = Group({"both": Variant(), "token": Variant({"copilot_input": "token"})})  # token Copilots, as they are served
NARROW = ROTARY | {"init": "random", "hidden_size": 32, "num_attention_heads": 2}
WIDTH = Group(
    {
        "narrow, the Pilot's states": state_copilot(NARROW),
        "narrow, tokens alone": state_copilot(NARROW | TOKENS),
    }
)
FEEDBACK = Group(
    {
        "RMSE, realised": state_copilot(RMSE),
        "RMSE, predicted": state_copilot(RMSE | {"error_feedback": "predicted"}),
        "RMSE, predicted, scheduled": state_copilot(RMSE | {"error_feedback": "predicted"}, FedByItself),
    },
    generates=True,
    depends_on={"share": SHARE},
)

# ---- whose mistakes ------------------------------------------------------------------------------------------------

ALL = {"log_rounds": ALL_ROUNDS, "log_max_bytes": ALL_BYTES}
HELD_OUT = (0.1, 0.25)  # shares of the rows


def holdout(share: float) -> Variant:
    return state_copilot(mistake_source="holdout", holdout=share, log_max_bytes=ALL_BYTES)


def sources_with_own_pilots(
    setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained
) -> dict[str, Rectified]:
    """The sources of mistakes that need Pilots of their own: cross-fitting, and rows held out."""
    models = {"cross-fitting": cross_fit(setting, tokenizer, rows, seed, state_copilot(), trained)}
    for share in HELD_OUT:
        pilot, learner = setting.train_with_holdout(
            setting.base(tokenizer, seed), tokenizer, rows, seed, holdout(share)
        )
        own = Rectified(pilot, tokenizer)
        models[f"Pilot on {1 - share:.0%} of the rows"] = own
        models[f"holdout of {share:.0%}"] = beside(own, learner)
    return models


MISTAKES = Group(
    {
        "train (the paper)": state_copilot(),
        "first_visit": state_copilot(mistake_source="first_visit"),
        "first_visit, all rounds": state_copilot(mistake_source="first_visit", **ALL),
        "all rounds": state_copilot(**ALL),
        "reservoir of 128 rounds": state_copilot(learner=ReservoirLearner),
        "weighted by error": state_copilot(learner=WeightedLearner),
    },
    others=sources_with_own_pilots,
    depends_on={"holdouts": {share: holdout(share).settings() for share in HELD_OUT}},
)

# ---- other Pilots --------------------------------------------------------------------------------------------------

OTHER_WIDTH = 192  # of the wider Pilot
BESIDE_PILOTS = {"the Pilot's states": state_copilot(ROTARY), "tokens alone": state_copilot(TOKENS | ROTARY)}


def better_pilots(setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained) -> dict[str, Rectified]:
    """A Pilot that is trained longer and a wider one: alone, each with Copilots of its own, and with the token Copilot
    that was trained beside the first Pilot."""
    wider = replace(setting, task=replace(setting.task, pilot=setting.task.pilot | {"hidden_size": OTHER_WIDTH}))
    steps = round(LONGER * setting.task.training["max_steps"])
    others = {
        f"Pilot, {LONGER:g} times the steps": (setting, {"max_steps": steps}),
        f"Pilot of width {OTHER_WIDTH}": (wider, {}),
    }
    models = {}
    for name, (where, changes) in others.items():
        pilot, learners, _ = where.train(where.base(tokenizer, seed), tokenizer, rows, seed, BESIDE_PILOTS, **changes)
        models[name] = alone = Rectified(pilot, tokenizer)
        models |= {f"{copilot}, beside the {name}": beside(alone, learner) for copilot, learner in learners.items()}
        moving = {key: learner for key, learner in trained.learners.items() if can_move(learner)}
        for copilot, learner in moving.items():
            models[f"{copilot}, moved to the {name}"] = beside(alone, CopilotLearner(learner.copilot, pilot))
    return models


def can_move(learner: CopilotLearner) -> bool:
    """Whether the Copilot reads nothing that another Pilot of the vocabulary would lack."""
    return not learner.copilot.config.reads_states


PILOTS = Group(BESIDE_PILOTS, others=better_pilots, depends_on={"width": OTHER_WIDTH, "longer": LONGER})

# ---- the paper's ablations -----------------------------------------------------------------------------------------


def latest_checkpoint(
    setting: Setting, tokenizer, rows: list[Row], seed: int, trained: Trained
) -> dict[str, Rectified]:
    """Table 16: the log holds what the trained Pilot gets wrong on its training rows, and nothing from before."""
    learner = log_rows(setting, tokenizer, trained.pilot, rows, seed, papers())
    teach([learner], setting.task.training["max_steps"], setting.task.training["per_device_train_batch_size"])
    return {"log of the latest checkpoint": beside(Rectified(trained.pilot, tokenizer), learner)}


PAPERS_OWN = "Pattern 1, mean, RMSE"
ABLATIONS = Group(  # Tables 18 to 20; 16 is `latest_checkpoint`, and 17 is what calibration stores of every λ
    {
        PAPERS_OWN: papers(),
        "Pattern 2": papers({"pattern": 2}),
        "Pattern 3": papers({"pooled_layers": "first_half"}),
        "Pattern 4": papers({"pooled_layers": "second_half"}),
        "max": papers({"pooling": "max"}),
        "sum": papers({"pooling": "sum"}),
        "cross-entropy of the fused logits": papers(
            {"objective": "cross_entropy", "fusion": "logit", "error_feedback": "realized"}
        ),
    },
    others=latest_checkpoint,
    at_strengths=PAPERS_OWN,
    paper={  # accuracy in %, Tables 16 to 20
        PAPERS_OWN: "GSM8K 32.2, SVAMP 51.6 (1B + 1B)",
        "Pattern 2": "27.9, 49.3",
        "Pattern 3": "30.4, 49.8",
        "Pattern 4": "31.8, 50.4",
        "max": "GSM8K 63.2, AQuA 37.5 (8B + 1B; mean 66.1, 38.9)",
        "sum": "65.8, 38.3",
        "cross-entropy of the fused logits": "theirs, whose form is not said: AQuA 60.7 (RMSE 64.2; 7B + 3B)",
        "log of the latest checkpoint": "average of four 46.7 (all stages 48.4; 1B + 1B)",
        "λ = 0.3": "GSM8K 29.8 (1B + 1B)",
        "λ = 0.5": "30.4",
        "λ = 0.8": "31.8",
        "λ = 1": "32.2",
    },
)

GROUPS = {
    "learning": LEARNING,
    "positions": POSITIONS,
    "input": FED,
    "mistakes": MISTAKES,
    "paper": ABLATIONS,
    "pilots": PILOTS,
    "width": WIDTH,
    "feedback": FEEDBACK,
}
