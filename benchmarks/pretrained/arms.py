"""What is compared, in order of importance. Later arms hang on the best of earlier ones, by NLL on validation rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.pretrained.training import CopilotSpec, PilotSpec

RATES = (3e-4, 1e-3, 2e-3, 3e-3)
FIRST_LOOK = 3e-4  # the usual rate of LoRA
FULL_RATES = (2e-4, 5e-4, 1e-4)
SHORT, LONG = 1.5, 3.0  # epochs
LIKELIHOOD_ALONE = {"gsm8k", "lastfm"}  # no answers are generated: nearly none are right
SEEDS = (1, 2)
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One run in one process.

    Attributes:
        second: Whether a second Pilot of another seed stands beside the first.
        folds: Whether the Copilot is folded into its Pilot afterwards.
        samples: Whether answers are sampled as well.
        answers: Whether answers are generated at all.
    """

    task: str
    pilot: PilotSpec
    copilot: CopilotSpec | None = None
    seed: int = 0
    second: bool = False
    folds: bool = False
    samples: bool = False
    answers: bool = True

    @property
    def name(self) -> str:
        pilot = f"{self.pilot.method}-{self.pilot.rate:g}-x{self.pilot.epochs:g}"
        beside = "alone"
        if self.copilot is not None:
            beside = f"{self.copilot.kind}-{self.copilot.rate:g}-s{self.copilot.steps}" + " folded" * self.folds
        return f"{self.task} {pilot} {'pair' if self.second else beside} seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def goes_with(self, other: Arm) -> bool:
        """Whether both can stand beside one and the same Pilot in its training."""
        ours, theirs = ((arm.task, arm.pilot, arm.seed) for arm in (self, other))
        return ours == theirs and not (self.second or other.second) and not (self.folds or other.folds)


STATES = {"memory": "pilot"}
AT_LAG_0 = STATES | {"hidden_state_lag": 0}
LENT = AT_LAG_0 | {"vocab_projection": "pilot"}
TOKEN = CopilotSpec()
STATE = CopilotSpec("state, lag 1", config=STATES, shape="states")
STATE_0 = CopilotSpec("state, lag 0", config=AT_LAG_0, shape="states")
LENT_0 = CopilotSpec("state, lag 0, lent vocabulary", 1e-3, config=LENT, shape="lent")
LENT_1 = CopilotSpec(
    "state, lag 1, lent vocabulary", 1e-3, config=STATES | {"vocab_projection": "pilot"}, shape="lent"
)
FEATURES = CopilotSpec("features", 1e-3, config=LENT, make="features", shape="features")
FEATURES_OWN = CopilotSpec("features, own vocabulary", config=AT_LAG_0, make="features", shape="token")
FEATURES_ONLY = replace(FEATURES, kind="features, no memory", features={"attends": False})
FEATURES_RANK = replace(FEATURES, kind="features, head of rank 16", features={"rank": 16})
FED_TOKENS = replace(TOKEN, kind="token, fed tokens alone", config={"copilot_input": "token"})
LANGUAGE_MODEL = CopilotSpec(
    "language model", config={"copilot_input": "token"}, learner={"alone": True, "weight_decay": 0.1}
)
ON_THE_LOG = tuple(  # of a frozen Pilot that is run over the rows once
    replace(copilot, kind=f"{copilot.kind}, {epochs} epochs on the log", log_epochs=float(epochs))
    for epochs in (2, 7)
    for copilot in (FEATURES, TOKEN)
)
OTHERS = (
    replace(TOKEN, kind="token, trained at λ = 0.5", learner={"trained_strength": 0.5}),
    replace(TOKEN, kind="token", steps=1),
    replace(FEATURES, kind="features", steps=1),
    replace(FEATURES, kind="features, trained at λ = 0.5", learner={"trained_strength": 0.5}),
    replace(TOKEN, kind="token, dropout 0.3", config={"dropout": 0.3}),
    replace(FEATURES, kind="features, dropout 0.3", config=LENT | {"dropout": 0.3}),
    FEATURES_RANK,
    FEATURES_ONLY,
    replace(TOKEN, kind="token", steps=2),
    replace(TOKEN, kind="token", steps=8),
    replace(FEATURES, kind="features", steps=8),
    replace(TOKEN, kind="token, 4 layers", config={"num_hidden_layers": 4}, shape="token, 4 layers"),
    replace(TOKEN, kind="token, top layers", make="top"),
    replace(STATE_0, kind="state, lag 0, top layers", make="top"),
    replace(TOKEN, kind="token, random weights", config={"init": "random"}),
    replace(TOKEN, kind="token, weighted draws", weighted=True),
    replace(FEATURES, kind="features, weighted draws", weighted=True),
    replace(TOKEN, kind="token, weight decay 3", learner={"weight_decay": 3.0}),
    replace(FEATURES, kind="features, 4 layers", config=LENT | {"num_hidden_layers": 4}, shape="token, 4 layers"),
)
PAPERS = CopilotSpec(
    "the paper's preset, 4 layers", steps=1, config={"num_hidden_layers": 4}, make="paper", shape="token, 4 layers"
)
TIMED_COPILOTS = (  # the first two on every task
    TOKEN,
    STATE_0,
    replace(TOKEN, steps=1),
    FEATURES,
    LENT_0,
    replace(TOKEN, config={"num_hidden_layers": 4}, shape="token, 4 layers"),
)
TIMED_PILOTS = ("full", "dora", "frozen")


def lora(rate: float, epochs: float) -> PilotSpec:
    return PilotSpec("lora", rate, epochs)


def nll_of(result: Result) -> float:
    """On validation rows, at the weights chosen there."""
    return min(result["valid"]["nll"])


def best_rates(
    results: list[Result], task: str, epochs: float, of: int, count: int = 1, method: str = "lora"
) -> list[float]:
    """Of the Pilot alone, seed 0, by validation NLL, once `of` runs that tried a rate are in."""

    def fits(result: Result) -> bool:
        arm, pilot = result["arm"], result["arm"]["pilot"]
        is_alone = arm["copilot"] is None and not arm["second"]
        return is_alone and (arm["task"], arm["seed"], pilot["method"], pilot["epochs"]) == (task, 0, method, epochs)

    found = sorted(filter(fits, results), key=nll_of)
    return [result["arm"]["pilot"]["rate"] for result in found[:count]] if len(found) >= of else []


def plan(results: list[Result], tasks: list[str]) -> Iterator[Arm]:
    """All arms that can be named now, most informative first; those that are done are named as well."""
    first = (beside_best_rate, beside_longer_pilots)
    then = (equal_time, frozen, better_pilots, beside_full, seeds, folded, more_kinds, other_changes, other_rates)
    if "mawps" in tasks:
        yield from alone("mawps")
        yield from beside_first_look()
        for part in first:
            yield from part(results)
    if "gsm8k-all" in tasks:
        yield from many_rows(results)
    for task in ("gsm8k", "commonsense", "lastfm"):
        if task in tasks:
            yield from alone(task, RATES[:3])
            yield from other_task(results, task)
    if "mawps" in tasks:
        for part in then:
            yield from part(results)


def alone(task: str, rates: tuple[float, ...] = RATES) -> Iterator[Arm]:
    for epochs in (SHORT, LONG):
        for rate in rates:
            yield Arm(task, lora(rate, epochs), samples=task == "mawps", answers=task not in LIKELIHOOD_ALONE)
    if task == "mawps":
        yield Arm(task, PilotSpec("frozen", 0.0, 0.0))
        yield Arm(task, PilotSpec("few-shot", 0.0, 0.0))


def beside_first_look() -> Iterator[Arm]:
    for copilot in (TOKEN, STATE):
        yield Arm("mawps", lora(FIRST_LOOK, SHORT), copilot)


def beside_best_rate(results: list[Result]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", SHORT, len(RATES)):
        for copilot in (TOKEN, FED_TOKENS, replace(TOKEN, steps=1), STATE, FEATURES, LANGUAGE_MODEL):
            yield Arm("mawps", lora(rate, SHORT), copilot, samples=copilot in (TOKEN, STATE))
        yield Arm("mawps", lora(rate, SHORT), second=True, samples=True)


def beside_longer_pilots(results: list[Result]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        for copilot in (TOKEN, STATE, LANGUAGE_MODEL, replace(TOKEN, steps=1), FEATURES):
            yield Arm("mawps", lora(rate, LONG), copilot, samples=copilot in (TOKEN, STATE))
        yield Arm("mawps", lora(rate, LONG), second=True, samples=True)


def many_rows(results: list[Result]) -> Iterator[Arm]:
    """All of GSM8K once: a Pilot that never sees a row again, so that no row's mistakes are known by heart."""
    for rate in RATES[1:]:
        yield Arm("gsm8k-all", lora(rate, 1.0), answers=False)
    for rate in best_rates(results, "gsm8k-all", 1.0, len(RATES[1:])):
        for copilot in (TOKEN, STATE, LANGUAGE_MODEL):
            yield Arm("gsm8k-all", lora(rate, 1.0), copilot, answers=False)
        yield Arm("gsm8k-all", lora(rate, 1.0), second=True, answers=False)
        yield Arm("gsm8k-all", lora(rate, 2.0), answers=False)


def equal_time(results: list[Result]) -> Iterator[Arm]:
    """The Pilot alone for longer, and Copilots beside that."""
    for rate in best_rates(results, "mawps", LONG, len(RATES), count=2):
        for epochs in (4.5, 6.0):
            yield Arm("mawps", lora(rate, epochs), samples=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        yield Arm("mawps", lora(rate, 9.0), samples=True)
        for copilot in (TOKEN, STATE):
            yield Arm("mawps", lora(rate, 6.0), copilot)


def frozen(results: list[Result]) -> Iterator[Arm]:
    """No fine-tuning of the Pilot at all."""
    for copilot in ON_THE_LOG:
        yield Arm("mawps", PilotSpec("frozen", 0.0, 1.0), copilot)
    for epochs, copilot in ((SHORT, TOKEN), (LONG, TOKEN), (LONG, FEATURES)):
        yield Arm("mawps", PilotSpec("frozen", 0.0, epochs), copilot)


def better_pilots(results: list[Result]) -> Iterator[Arm]:
    for epochs in (SHORT, LONG):
        for rate in FULL_RATES:
            yield Arm("mawps", PilotSpec("full", rate, epochs), samples=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        for method, own in (("rslora", rate), ("rslora", rate / 3), ("dora", rate)):
            yield Arm("mawps", PilotSpec(method, own, LONG), samples=True)


def beside_full(results: list[Result]) -> Iterator[Arm]:
    """Full fine-tuning costs less than LoRA where the Pilot is small, and learns more: what is left for a Copilot?"""
    for epochs in (SHORT, LONG):
        for rate in best_rates(results, "mawps", epochs, len(FULL_RATES), method="full"):
            for copilot in (TOKEN, FED_TOKENS, LANGUAGE_MODEL):
                yield Arm("mawps", PilotSpec("full", rate, epochs), copilot)


def other_task(results: list[Result], task: str) -> Iterator[Arm]:
    answers = task not in LIKELIHOOD_ALONE
    for copilot in (TOKEN, FED_TOKENS, LANGUAGE_MODEL):  # beside full fine-tuning at the best rate on MAWPS
        yield Arm(task, PilotSpec("full", FULL_RATES[0], SHORT), copilot, answers=answers)
    for epochs in (LONG, SHORT):
        for rate in best_rates(results, task, epochs, 3):
            pilot = lora(rate, epochs)
            for copilot in (TOKEN, STATE, LANGUAGE_MODEL):
                yield Arm(task, pilot, copilot, answers=answers)
            yield Arm(task, pilot, second=True, answers=answers)
    for rate in best_rates(results, task, LONG, 3):
        yield Arm(task, lora(rate, 6.0), answers=answers)
        for seed in SEEDS:
            for copilot in (None, TOKEN, LANGUAGE_MODEL):
                yield Arm(task, lora(rate, LONG), copilot, seed, answers=answers)
        yield Arm(task, PilotSpec("full", FULL_RATES[0], LONG), answers=answers)
        for copilot in (replace(TOKEN, rate=1e-4), FEATURES, replace(FEATURES, rate=3e-4)):
            yield Arm(task, lora(rate, LONG), copilot, answers=answers)


def seeds(results: list[Result]) -> Iterator[Arm]:
    """More seeds of what decides: Pilots of both lengths alone and longer, beside them Copilots and ensembles. Answers
    are greedy alone."""
    for seed in SEEDS:
        for epochs in (LONG, SHORT):
            for rate in best_rates(results, "mawps", epochs, len(RATES)):
                for copilot in (None, TOKEN, FED_TOKENS, STATE, LANGUAGE_MODEL):
                    yield Arm("mawps", lora(rate, epochs), copilot, seed)
                yield Arm("mawps", lora(rate, epochs), None, seed, second=True)
        for rate in best_rates(results, "mawps", LONG, len(RATES)):
            yield Arm("mawps", lora(rate, 6.0), None, seed)


def folded(results: list[Result]) -> Iterator[Arm]:
    """Beside the poor Pilot, where there is a gain to fold, and beside the best one of GSM8K."""
    for seed in (0, *SEEDS):
        yield Arm("mawps", lora(FIRST_LOOK, SHORT), TOKEN, seed, folds=True)
    for rate in best_rates(results, "gsm8k", LONG, 3):
        yield Arm("gsm8k", lora(rate, LONG), TOKEN, folds=True, answers=False)


def more_kinds(results: list[Result]) -> Iterator[Arm]:
    """Other Copilots beside the best Pilot of few epochs."""
    kinds = (STATE_0, PAPERS, LENT_0, LENT_1, FEATURES_OWN)
    rates = tuple(replace(copilot, rate=rate) for copilot, rate in ((TOKEN, 1e-4), (STATE, 1e-4), (FEATURES, 3e-4)))
    yield from changed(results, kinds + rates)


def changed(results: list[Result], copilots: tuple[CopilotSpec, ...]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", SHORT, len(RATES)):
        for copilot in copilots:
            yield Arm("mawps", lora(rate, SHORT), copilot)


def other_changes(results: list[Result]) -> Iterator[Arm]:
    yield from changed(results, OTHERS)


def other_rates(results: list[Result]) -> Iterator[Arm]:
    """The first look's Pilot with other rates of the Copilot."""
    for copilot, rates in ((TOKEN, (3e-4, 1e-4)), (FEATURES, (3e-4,)), (STATE_0, (3e-4,)), (LENT_0, (1e-3,))):
        for rate in rates:
            yield Arm("mawps", lora(FIRST_LOOK, SHORT), replace(copilot, rate=rate))
