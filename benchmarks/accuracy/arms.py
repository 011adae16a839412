"""What is compared: which Copilots stand beside a Pilot, and what is measured of each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.accuracy.report import LOWER_IS_BETTER, mean_of
from benchmarks.accuracy.scoring import Figures, Rectified, beside, likelihood
from benchmarks.accuracy.training import Setting, Variant
from benchmarks.common import Row, Stopwatch
from hf_copilot.training.metrics import best_strength
from hf_copilot.training.report import count_parameters

PAPER = Variant(arguments={"copilot_steps_per_round": 1, "copilot_weight_decay": 0.0}, paper=True)  # Algorithm 1
COPILOTS = {"paper": PAPER, "copilot": Variant(), "states": Variant({"memory": "pilot"})}  # "copilot": the defaults
JOINT_RATES = (1.0, 0.5)  # of the task's learning rate
CHOSEN_BY = {"λ chosen": "nll", "λ by accuracy": "token_accuracy"}  # on the validation rows
LONGER = 2.5  # times the task's steps
TITLES = {
    "pilot": "Pilot",
    "paper": "+ the paper's Copilot, λ = 1",
    "paper, λ chosen": "+ the paper's Copilot, λ chosen on valid",
    "paper, λ by accuracy": "+ the paper's Copilot, λ chosen by token accuracy",
    "copilot": "+ token Copilot, λ = 1",
    "copilot, λ chosen": "+ token Copilot, λ chosen on valid",
    "copilot, λ by accuracy": "+ token Copilot, λ chosen by token accuracy",
    "states": "+ state Copilot, λ = 1",
    "states, λ chosen": "+ state Copilot, λ chosen on valid",
    "states, λ by accuracy": "+ state Copilot, λ chosen by token accuracy",
    "deeper": "deeper Pilot of the joint size",
    "wider": "wider Pilot of the joint size",
    "longer": f"Pilot, {LONGER:g} times the steps",
}
COST_STEPS, COST_REPETITIONS = 12, 3
Arm = dict[str, Any]  # parameters, figures by name, and of a Copilot λ and how it was chosen


def measure(setting: Setting, model: Rectified, rows: list[Row]) -> dict[str, Figures]:
    """Likelihood of the completions, and the task's own figures."""
    examples = setting.encoded(model.tokenizer, rows)
    figures = likelihood(model.log_likelihoods(examples))
    return figures | setting.task.measure(model, rows, setting.data)


def run_copilots(setting: Setting, seed: int, variants: dict[str, Variant]) -> dict[str, Arm]:
    """The Pilot alone and with each Copilot, at its own λ and at those that are chosen on the validation rows."""
    splits, tokenizer = setting.task.splits(setting.data, seed), setting.tokenizer()
    valid = setting.encoded(tokenizer, splits.valid)
    pilot, learners, _ = setting.train(setting.base(tokenizer, seed), tokenizer, splits.train, seed, variants)
    size = count_parameters(pilot)[0]
    arms = {"pilot": alone(setting, Rectified(pilot, tokenizer), splits.test)}
    for name, learner in learners.items():
        model = beside(Rectified(pilot, tokenizer), learner)
        own = {"parameters": size + count_parameters(learner.copilot)[0]}
        arms[name] = own | {"figures": measure(setting, model, splits.test), "strength": model.strength}
        checks = setting.task.check(model, splits.test, setting.data)
        arms[name] |= {"checks": checks} if checks else {}
        calibration = model.calibrate(valid)
        measured = {0.0: arms["pilot"]["figures"], model.strength: arms[name]["figures"]}
        for by, metric in CHOSEN_BY.items():
            strength = best_strength(calibration, metric)
            if strength not in measured:
                measured[strength] = measure(setting, replace(model, strength=strength), splits.test)
            figures = {"figures": measured[strength], "strength": strength, "calibration": calibration}
            arms[f"{name}, {by}"] = own | figures
    return arms


def run_joint(setting: Setting, seed: int, variant: Variant) -> dict[str, Arm]:
    """Pilots alone, deeper or wider, with as many parameters as Pilot and Copilot together, trained as many steps; of
    several learning rates each has the one that is best on the validation rows."""
    shapes = setting.joint_shapes(setting.tokenizer(), variant)
    return {arm: at_best_rate(setting, seed, shape) for arm, shape in shapes.items()}


def at_best_rate(setting: Setting, seed: int, shape: dict[str, int]) -> Arm:
    """By what the task is judged by."""
    splits, tokenizer, metric = setting.task.splits(setting.data, seed), setting.tokenizer(), setting.task.metric
    found = []
    for share in JOINT_RATES:
        rate, base = share * setting.task.training["learning_rate"], setting.base(tokenizer, seed, shape)
        model = Rectified(setting.train(base, tokenizer, splits.train, seed, learning_rate=rate).pilot, tokenizer)
        found.append((mean_of(measure(setting, model, splits.valid)[metric]), rate, model))
    best = min if metric in LOWER_IS_BETTER else max
    _, rate, model = best(found, key=lambda one: one[0])
    chosen_from = {f"{rate:g}": value for value, rate, _ in found}
    return alone(setting, model, splits.test) | {"learning_rate": rate, f"{metric} on valid": chosen_from}


def run_longer(setting: Setting, seed: int) -> dict[str, Arm]:
    """The Pilot alone, trained `LONGER` times as long: what the time for a Copilot buys without one."""
    splits, tokenizer = setting.task.splits(setting.data, seed), setting.tokenizer()
    steps = round(LONGER * setting.task.training["max_steps"])
    pilot = setting.train(setting.base(tokenizer, seed), tokenizer, splits.train, seed, max_steps=steps).pilot
    return {"longer": alone(setting, Rectified(pilot, tokenizer), splits.test)}


def alone(setting: Setting, model: Rectified, test: list[Row]) -> Arm:
    return {"parameters": count_parameters(model.pilot)[0], "figures": measure(setting, model, test)}


def run_costs(setting: Setting, ours: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Time of training and of generation for the Pilot with each of these Copilots and Pilots of the joint size, as
    ratios to the Pilot alone: medians over repetitions that take the arms in turn, on the same rows."""
    tokenizer, watch = setting.tokenizer(), Stopwatch(setting.device)
    rows = setting.task.splits(setting.data, 0).train[: 32 * COST_STEPS]
    shapes = setting.joint_shapes(tokenizer, ours["copilot"])
    arms = ["pilot", *ours, *shapes]

    def run(arm: str) -> None:
        variants = {arm: ours[arm]} if arm in ours else {}
        base = setting.base(tokenizer, 0, shapes.get(arm))
        pilot, learners, seconds = setting.train(base, tokenizer, rows, 0, variants, max_steps=COST_STEPS)
        watch.seconds.setdefault(f"training {arm}", []).append(seconds)
        model = Rectified(pilot, tokenizer)
        if arm in learners:
            model = beside(model, learners[arm])
        with watch.time(f"generation {arm}"):
            model.answers([row["prompt"] for row in rows[:64]], "cost", max_new_tokens=16, min_new_tokens=16)

    watch.repeat(COST_REPETITIONS, 1, lambda: [partial(run, arm) for arm in arms])
    return {
        arm: {work: watch.ratio(f"{work} {arm}", f"{work} pilot") for work in ("training", "generation")}
        for arm in arms
    }
