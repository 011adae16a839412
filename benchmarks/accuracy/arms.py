"""What is compared: which Copilots stand beside a Pilot, and what is measured of each."""

from __future__ import annotations

from typing import Any

from scoring import Figures, Rectified, encode, likelihood
from tasks import Row
from training import Setting, Variant

from hf_copilot.report import count_parameters

COPILOTS = {"paper": Variant(paper=True), "copilot": Variant()}
TITLES = {
    "pilot": "Pilot",
    "paper": "+ Copilot, paper's preset, λ = 1",
    "paper, λ chosen": "+ Copilot, paper's preset, λ chosen on valid",
    "copilot": "+ Copilot, default, λ = 1",
    "copilot, λ chosen": "+ Copilot, default, λ chosen on valid",
    "joint": "Pilot of the joint size",
}
Arm = dict[str, Any]  # parameters, figures by name, and of a Copilot λ and how it was chosen


def measure(setting: Setting, model: Rectified, rows: list[Row], generate: bool = True) -> dict[str, Figures]:
    """Likelihood of the completions, and the task's own figures."""
    examples = [encode(model.tokenizer, row, setting.task.max_length) for row in rows]
    figures = likelihood(model.log_likelihoods(examples))
    return figures | (setting.task.measure(model, rows, setting.data) if generate else {})


def run_copilots(setting: Setting, seed: int, variants: dict[str, Variant], generate: bool = True) -> dict[str, Arm]:
    """The Pilot alone and with each Copilot, at its own λ and at the one that is chosen on the validation rows."""
    splits, tokenizer = setting.task.splits(setting.data, seed), setting.tokenizer()
    valid = [encode(tokenizer, row, setting.task.max_length) for row in splits.valid]
    pilot, learners = setting.train(setting.base(tokenizer), tokenizer, splits.train, seed, variants)
    size = count_parameters(pilot)[0]
    alone = Rectified(pilot, tokenizer)
    arms = {"pilot": {"parameters": size, "figures": measure(setting, alone, splits.test, generate)}}
    for name, learner in learners.items():
        model = Rectified(pilot, tokenizer, learner, learner.copilot.config.strength)
        own = {"parameters": size + count_parameters(learner.copilot)[0]}
        arms[name] = own | {"figures": measure(setting, model, splits.test, generate), "strength": model.strength}
        calibration = model.calibrate(valid)
        chosen = Rectified(pilot, tokenizer, learner, calibration["strength"])
        same = chosen.strength == model.strength
        figures = arms[name]["figures"] if same else measure(setting, chosen, splits.test, generate)
        arms[f"{name}, λ chosen"] = own | {"figures": figures, "strength": chosen.strength, "calibration": calibration}
    return arms


def run_joint(setting: Setting, seed: int, variant: Variant) -> dict[str, Arm]:
    """A Pilot alone, with as many parameters as Pilot and Copilot together, trained as many steps."""
    splits, tokenizer = setting.task.splits(setting.data, seed), setting.tokenizer()
    base = setting.base(tokenizer, setting.joint_layers(tokenizer, variant.copilot_config()))
    pilot, _ = setting.train(base, tokenizer, splits.train, seed)
    figures = measure(setting, Rectified(pilot, tokenizer), splits.test)
    return {"joint": {"parameters": count_parameters(pilot)[0], "figures": figures}}
