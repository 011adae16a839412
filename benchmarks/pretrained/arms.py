"""What is compared, in order of importance. Later arms hang on the best of earlier ones, by NLL on validation rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.pretrained.training import CopilotSpec, PilotSpec

RATES = (3e-4, 1e-3, 2e-3, 3e-3)
FIRST_LOOK = 3e-4  # the usual rate of LoRA
FULL_RATES = (1e-4, 5e-5, 2e-4)
SHORT, LONG = 1.5, 3.0  # epochs
SEEDS = (1, 2)
ENOUGH = 30  # Copilots of seed 0, to choose finalists among
FIRST = 6  # of `OTHERS`, before the other task
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One run in one process.

    Attributes:
        second: Whether a second Pilot of another seed stands beside the first.
        samples: Whether answers are sampled as well.
        answers: Whether answers are generated at all.
    """

    task: str
    pilot: PilotSpec
    copilot: CopilotSpec | None = None
    seed: int = 0
    second: bool = False
    samples: bool = False
    answers: bool = True

    @property
    def name(self) -> str:
        pilot = f"{self.pilot.method}-{self.pilot.rate:g}-x{self.pilot.epochs:g}"
        beside = "alone"
        if self.copilot is not None:
            beside = f"{self.copilot.kind}-{self.copilot.rate:g}-s{self.copilot.steps}"
        return f"{self.task} {pilot} {'pair' if self.second else beside} seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        return asdict(self)


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
LANGUAGE_MODEL = CopilotSpec(
    "language model", config={"copilot_input": "token"}, learner={"alone": True, "weight_decay": 0.1}
)
MAIN = (TOKEN, FEATURES, STATE_0)
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
TIMED_COPILOTS = (  # the first two on every task
    TOKEN,
    FEATURES,
    replace(TOKEN, steps=1),
    STATE_0,
    LENT_0,
    replace(TOKEN, config={"num_hidden_layers": 4}, shape="token, 4 layers"),
)
TIMED_PILOTS = ("full", "dora", "frozen")


def lora(rate: float, epochs: float) -> PilotSpec:
    return PilotSpec("lora", rate, epochs)


def nll_of(result: Result) -> float:
    """On validation rows, at the weights chosen there."""
    return min(result["valid"]["nll"])


def best(results: list[Result], task: str, epochs: float | None = None, alone: bool = True, count: int = 1):
    """The best finished LoRA runs of a task, seed 0, by validation NLL."""

    def fits(result: Result) -> bool:
        arm = result["arm"]
        is_one = arm["task"] == task and arm["seed"] == 0 and arm["pilot"]["method"] == "lora" and not arm["second"]
        return is_one and epochs in (None, arm["pilot"]["epochs"]) and (arm["copilot"] is None) == alone

    return sorted(filter(fits, results), key=nll_of)[:count]


def best_rates(results: list[Result], task: str, epochs: float, of: int, count: int = 1) -> list[float]:
    """The best rates, once `of` runs that tried one are in."""
    found = best(results, task, epochs, count=99)
    return [result["arm"]["pilot"]["rate"] for result in found[:count]] if len(found) >= of else []


def plan(results: list[Result], tasks: list[str]) -> Iterator[Arm]:
    """All arms that can be named now, most informative first; those that are done are named as well."""
    first = (main_copilots, equal_time, ensembles, beside_longer_pilots, first_changes, frozen, better_pilots)
    then = (other_changes, beside_best_pilot, seeds, other_rates)
    if "mawps" in tasks:
        yield from alone("mawps")
        yield from beside_first_look()
        for part in first:
            yield from part(results)
    if "gsm8k" in tasks:
        yield from alone("gsm8k", RATES[:3])
        yield from gsm8k_copilots(results)
    if "mawps" in tasks:
        for part in then:
            yield from part(results)


def alone(task: str, rates: tuple[float, ...] = RATES) -> Iterator[Arm]:
    for epochs in (SHORT, LONG):
        for rate in rates:
            yield Arm(task, lora(rate, epochs), samples=task == "mawps", answers=task == "mawps")
    if task == "mawps":
        yield Arm(task, PilotSpec("frozen", 0.0, 0.0))  # zero-shot


def beside_first_look() -> Iterator[Arm]:
    for copilot in (*MAIN, STATE):
        yield Arm("mawps", lora(FIRST_LOOK, SHORT), copilot)


def main_copilots(results: list[Result]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", SHORT, len(RATES)):
        for copilot in (*MAIN, STATE, LENT_0, LENT_1, FEATURES_OWN):
            yield Arm("mawps", lora(rate, SHORT), copilot, samples=copilot in MAIN)
        for copilot in (TOKEN, replace(FEATURES, rate=5e-4), STATE_0):
            yield Arm("mawps", lora(rate, SHORT), replace(copilot, rate=3e-4))
        yield Arm("mawps", lora(rate, SHORT), replace(TOKEN, rate=1e-4))
        yield Arm("mawps", lora(rate, SHORT), replace(FEATURES, rate=3e-3))


def equal_time(results: list[Result]) -> Iterator[Arm]:
    """The Pilot alone for longer."""
    for rate in best_rates(results, "mawps", LONG, len(RATES), count=2):
        for epochs in (4.5, 6.0):
            yield Arm("mawps", lora(rate, epochs), samples=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        yield Arm("mawps", lora(rate, 9.0), samples=True)


def ensembles(results: list[Result]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", SHORT, len(RATES)):
        yield Arm("mawps", lora(rate, SHORT), LANGUAGE_MODEL, samples=True)
        yield Arm("mawps", lora(rate, SHORT), second=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        yield Arm("mawps", lora(rate, LONG), second=True)


def frozen(results: list[Result]) -> Iterator[Arm]:
    """No fine-tuning of the Pilot at all."""
    for epochs, copilot in ((SHORT, TOKEN), (LONG, TOKEN), (LONG, FEATURES)):
        yield Arm("mawps", PilotSpec("frozen", 0.0, epochs), copilot)
    for copilot in ON_THE_LOG:
        yield Arm("mawps", PilotSpec("frozen", 0.0, 1.0), copilot, samples=True)


def better_pilots(results: list[Result]) -> Iterator[Arm]:
    for epochs in (SHORT, LONG):
        for rate in FULL_RATES:
            yield Arm("mawps", PilotSpec("full", rate, epochs), samples=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        for method in ("dora", "rslora"):
            yield Arm("mawps", PilotSpec(method, rate, LONG), samples=True)
        yield Arm("mawps", PilotSpec("rslora", rate / 3, LONG), samples=True)


def gsm8k_copilots(results: list[Result]) -> Iterator[Arm]:
    for epochs in (SHORT, LONG):
        for rate in best_rates(results, "gsm8k", epochs, 3):
            for copilot in MAIN:
                yield Arm("gsm8k", lora(rate, epochs), copilot, answers=False)
            if epochs == SHORT:
                yield Arm("gsm8k", lora(rate, epochs), replace(TOKEN, rate=1e-4), answers=False)
                yield Arm("gsm8k", lora(rate, epochs), replace(FEATURES, rate=3e-4), answers=False)
                yield Arm("gsm8k", lora(rate, epochs), LANGUAGE_MODEL, answers=False)
            yield Arm("gsm8k", lora(rate, epochs), second=True, answers=False)
    for rate in best_rates(results, "gsm8k", LONG, 3):
        yield Arm("gsm8k", lora(rate, 4.5), answers=False)
        yield Arm("gsm8k", lora(rate, 6.0), answers=False)


def changed(results: list[Result], copilots: tuple[CopilotSpec, ...]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", SHORT, len(RATES)):
        for copilot in copilots:
            yield Arm("mawps", lora(rate, SHORT), copilot)


def first_changes(results: list[Result]) -> Iterator[Arm]:
    yield from changed(results, OTHERS[:FIRST])


def other_changes(results: list[Result]) -> Iterator[Arm]:
    yield from changed(results, OTHERS[FIRST:])


def beside_longer_pilots(results: list[Result]) -> Iterator[Arm]:
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        for copilot in (*MAIN[:2], replace(TOKEN, steps=1), replace(FEATURES, steps=1)):
            yield Arm("mawps", lora(rate, LONG), copilot, samples=copilot in MAIN)


def beside_best_pilot(results: list[Result]) -> Iterator[Arm]:
    """Copilots beside the Pilot that is best of all, where that is one that is trained for longer."""
    found = best(results, "mawps")
    if found and found[0]["arm"]["pilot"]["epochs"] > LONG:
        for copilot in (replace(TOKEN, steps=1), replace(FEATURES, steps=1)):
            yield Arm("mawps", PilotSpec(**found[0]["arm"]["pilot"]), copilot, samples=True)
    for rate in best_rates(results, "mawps", LONG, len(RATES)):
        yield Arm("mawps", lora(rate, LONG), STATE_0)
    for copilot in (TOKEN, FEATURES):
        yield Arm("mawps", PilotSpec("frozen", 0.0, 6.0), copilot)


def seeds(results: list[Result]) -> Iterator[Arm]:
    """More seeds of the best Pilots alone, the default Copilot, and the best two others, once seed 0 is far enough."""
    copilots = best(results, "mawps", alone=False, count=99)
    if len(copilots) < ENOUGH:
        return
    chosen = [PilotSpec(**result["arm"]["pilot"]) for result in best(results, "mawps", count=2)]
    pairs = [(pilot, None) for pilot in [*chosen, *(lora(r, SHORT) for r in best_rates(results, "mawps", SHORT, 1))]]
    for result in copilots[:3]:
        pairs.append((PilotSpec(**result["arm"]["pilot"]), CopilotSpec(**result["arm"]["copilot"])))
    for rate in best_rates(results, "mawps", SHORT, 1):
        pairs += [(lora(rate, SHORT), TOKEN), (lora(rate, SHORT), LANGUAGE_MODEL)]
    for seed in SEEDS:
        for pilot, copilot in pairs:
            yield Arm("mawps", pilot, copilot, seed, samples=True)


def other_rates(results: list[Result]) -> Iterator[Arm]:
    """The first look's Pilot with other rates of the Copilot."""
    for copilot, rates in ((TOKEN, (3e-4, 1e-4)), (FEATURES, (3e-4,)), (STATE_0, (3e-4,)), (LENT_0, (1e-3,))):
        for rate in rates:
            yield Arm("mawps", lora(FIRST_LOOK, SHORT), replace(copilot, rate=rate))
