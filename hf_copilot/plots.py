"""Pictures of a Copilot at work (needs the extra `viz`): the course of a training run, and one rectified token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from .model.discrepancy import fuse
from .training.learner import CopilotLearner

PILOT, RECTIFIED = "tab:gray", "tab:orange"


def plot_training(log_history: Sequence[dict[str, float]], nll: Axes, accuracy: Axes) -> None:
    """Negative log-likelihood and token accuracy of Pilot and Pilot + Copilot over `trainer.state.log_history`:
    on the evaluation set where it was evaluated, else on the training documents before they were learnt."""
    prefix = "eval_" if any("eval_pilot_nll" in entry for entry in log_history) else ""
    entries = [entry for entry in log_history if f"{prefix}pilot_nll" in entry]
    steps = [entry["step"] for entry in entries]
    for axes, quantity, label in (
        (nll, "nll", "NLL (nats per token)"),
        (accuracy, "token_accuracy", "token accuracy"),
    ):
        axes.plot(steps, [entry[f"{prefix}pilot_{quantity}"] for entry in entries], color=PILOT, label="Pilot")
        rectified = [entry[f"{prefix}rectified_{quantity}"] for entry in entries]
        axes.plot(steps, rectified, color=RECTIFIED, label="Pilot + Copilot")
        axes.set(xlabel="step", ylabel=label)
        axes.legend(frameon=False)


@torch.no_grad()
def rectified_token(
    learner: CopilotLearner, inputs: dict[str, torch.Tensor], pilot: torch.nn.Module
) -> dict[str, Any]:
    """The target of a labelled batch whose label gains most probability from the Copilot; one where the Pilot's first
    choice was wrong and the rectified one is right goes before all others.

    Returns:
        `tokens` before it, `label`, and `pilot`, `correction`, `rectified`: probabilities, f and probabilities, `[V]`.
    """
    config, best = learner.copilot.config, None
    learner.copilot.eval()
    for record in learner.forced.read(inputs, lambda: pilot(**{k: v for k, v in inputs.items() if k != "labels"})):
        (batch,) = learner.forced.batches([record])
        for rows, pilot_logits, correction in learner.forced.corrections(batch):
            before = pilot_logits.softmax(-1)  # [c, V]
            after = fuse(pilot_logits, correction, config.strength, config.fusion).softmax(-1)  # [c, V]
            label = batch.labels[rows]  # [c]
            mended = (before.argmax(-1) != label) & (after.argmax(-1) == label)  # [c]
            gain = (after - before).gather(1, label[:, None])[:, 0] + mended  # [c]
            at = int(gain.argmax())
            if best is None or gain[at] > best["gain"]:
                position = rows.start + at
                best = {
                    "gain": gain[at],
                    "tokens": record.input_ids[: int(record.positions[position]) + 1].tolist(),
                    "label": int(batch.labels[position]),
                    "pilot": before[at],
                    "correction": correction[at],
                    "rectified": after[at],
                }
    learner.close()
    return best


def plot_token(token: dict[str, Any], axes: Sequence[Axes], name: Any, top: int = 5) -> None:
    """The paper's Figure 4 for one token: the Pilot's likeliest tokens, the correction, the rectified probabilities.

    Args:
        token: From [`rectified_token`].
        axes: Three of them.
        name: Token id -> text.
        top: How many tokens; those likeliest before or after, and the label, in the Pilot's order.
    """
    likeliest = torch.maximum(token["pilot"], token["rectified"]).topk(top).indices.tolist()
    shown = list(dict.fromkeys([token["label"], *likeliest]))[:top]
    shown.sort(key=lambda index: -token["pilot"][index])
    titles = {"pilot": "Pilot p̂", "correction": "Copilot f", "rectified": "rectified p̃"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        colors = ["tab:green" if index == token["label"] else PILOT for index in shown]
        axis.bar([name(index) for index in shown], token[key][shown].cpu(), color=colors)
        axis.set_title(title)
        axis.axhline(0, color="black", linewidth=0.5)


def save_summary(
    path: str, log_history: Sequence[dict[str, float]], token: dict[str, Any], name: Any, title: str
) -> None:
    """One picture: the training run above, one rectified token below; the label is green."""
    figure = plt.figure(figsize=(10, 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    above.suptitle(title)
    below.suptitle("… " + " ".join(name(index) for index in token["tokens"][-12:]) + " → ?", fontsize=10)
    plot_training(log_history, *above.subplots(1, 2))
    plot_token(token, below.subplots(1, 3), name)
    figure.savefig(path, dpi=120)
    plt.close(figure)
