"""Of a gain in NLL the share that another arm has, by what moves.py wrote."""

from __future__ import annotations

from benchmarks.common import Share, share_of

Runs = list[dict[str, dict[str, dict[str, float]]]]  # by seed: figures by destination, arm and metric
ALONE, OWN = "alone", "trained there, λ chosen"
NOT_TUNED = ", not fine-tuned"  # after the name of the same Pilot


def share_of_gain(runs: Runs, place: str, arm: str) -> Share | None:
    """Of the gain that a Copilot has which was trained there; beside a Pilot that was not fine-tuned, of what
    fine-tuning gains. None where that gains nothing."""
    tuned = place.removesuffix(NOT_TUNED)
    best = (place, OWN) if tuned == place else (tuned, ALONE)
    return share_of(*(gains(runs, place, other) for other in ((place, arm), best)))


def gains(runs: Runs, place: str, other: tuple[str, str]) -> list[float]:
    """What another destination and arm has over the Pilot alone, by seed."""
    return [run[place][ALONE]["nll"] - run[other[0]][other[1]]["nll"] for run in runs]
