"""How large a correction is, and one token that it mends: the paper's Figures 3, 4 and 7 beside a pretrained Pilot.

    python -m benchmarks.pretrained.picture --pilot PILOT --data DATA --steps 40     # trains a Copilot on MAWPS first
    python -m benchmarks.pretrained.picture                                          # draws what is stored

Writes benchmarks/results/pretrained/correction.{json,png}. Shapes: c targets, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from benchmarks.common import RESULTS, Row
from benchmarks.paper.sets import COMMONSENSE
from benchmarks.pretrained.arms import FIRST_LOOK, STATE
from benchmarks.pretrained.measuring import Model
from benchmarks.pretrained.pilot import load
from benchmarks.pretrained.steps import collate
from benchmarks.pretrained.tasks import GSM8K, MAWPS, encode
from benchmarks.pretrained.training import PilotSpec, train
from hf_copilot.pilot.inspect import find_decoder
from hf_copilot.plots import rectified_token

FILE = RESULTS / "pretrained" / "correction"
KINDS = {"arithmetic": ("mawps", "gsm8k"), "commonsense": ("piqa", "boolq")}
COLOURS = {"arithmetic": "tab:blue", "commonsense": "tab:orange"}
BINS, WIDEST = 60, 6.0  # of the histogram, in logits
TOP = 5


def test_rows(data: Path, count: int) -> dict[str, list[Row]]:
    """Of each task, as many."""
    sets = {each.name: each for each in COMMONSENSE}
    rows = {"mawps": MAWPS.splits(data).test, "gsm8k": GSM8K.splits(data).test}
    return {
        name: own[:count] for name, own in (rows | {n: sets[n].rows(data, 1) for n in KINDS["commonsense"]}).items()
    }


@dataclass
class Study:
    """A Pilot with a Copilot, and what λ it was given."""

    model: Model
    strength: float

    @torch.no_grad()
    def correction(self, rows: list[Row]) -> dict[str, Any]:
        """|λ f| as a share of the Pilot's logit range, mean over targets, and how often it is how large. A constant
        that f adds to all logits changes nothing, and is left out."""
        shares, counts = [], torch.zeros(BINS)
        for row in rows:
            for _, z, f, _ in self.model.logits([encode(self.model.tokenizer, row)]):
                change = self.strength * (f - f.mean(-1, keepdim=True)).abs()  # [c, V]
                span = z.max(-1).values - z.min(-1).values  # [c]
                shares += (change.mean(-1) / span).tolist()
                counts += torch.histc(change, BINS, 0.0, WIDEST).cpu()
        return {"share": sum(shares) / len(shares), "targets": len(shares), "counts": counts.tolist()}

    def token(self, rows: list[Row]) -> dict[str, Any]:
        """The token that gains most, its bars, and what every layer would say by the Pilot's own head."""
        tokenizer, pilot = self.model.tokenizer, self.model.pilot
        inputs = collate([encode(tokenizer, row) for row in rows], tokenizer.pad_token_id, pilot.device)
        found = rectified_token(self.model.learner, inputs, pilot)
        likeliest = torch.maximum(found["pilot"], found["rectified"]).topk(TOP).indices.tolist()
        shown = list(dict.fromkeys([found["label"], *likeliest]))[:TOP]
        shown.sort(key=lambda index: -found["pilot"][index])
        bars = {key: found[key][shown].tolist() for key in ("pilot", "correction", "rectified")}
        names = {"names": [tokenizer.decode([index]) for index in shown], "label": tokenizer.decode([found["label"]])}
        return bars | names | {"before": tokenizer.decode(found["tokens"][-24:]), "lens": self.lens(found["tokens"])}

    @torch.no_grad()
    def lens(self, ids: list[int]) -> list[str]:
        """The likeliest next token after every layer: its state through the final norm and the head."""
        pilot = self.model.pilot
        inputs = torch.tensor([ids], device=pilot.device)
        *below, last = pilot(input_ids=inputs, output_hidden_states=True).hidden_states[1:]
        states = [find_decoder(pilot).norm(state[0, -1]) for state in below] + [last[0, -1]]  # normed already, [d_P]
        logits = pilot.get_output_embeddings()(torch.stack(states))  # [layers, V]
        return [self.model.tokenizer.decode([index]) for index in logits.argmax(-1).tolist()]


def study(pilot: str, data: Path, steps: int, rows: int) -> dict[str, Any]:
    """Train on MAWPS, choose λ on its validation rows, and look at the test rows of every task."""
    base, tokenizer = load(pilot)
    splits, test = MAWPS.splits(data), test_rows(data, rows)
    examples = [encode(tokenizer, row) for row in splits.train]
    start = time.perf_counter()
    trained = train(base, tokenizer, examples, PilotSpec(rate=FIRST_LOOK), [STATE], steps, seed=0)
    seconds = time.perf_counter() - start
    model = Model(trained.pilot, tokenizer, trained.learner)
    valid = model.likelihoods([encode(tokenizer, row) for row in splits.valid[:rows]], batch_size=8)
    strength = valid.best("nll")[1]
    if not strength:
        raise ValueError(f"λ = 0 is best on the validation rows after {steps} steps: there is nothing to draw.")
    trained.learner.copilot.config.strength = strength
    looked = Study(model, strength)
    tasks = {name: looked.correction(own) for name, own in test.items()}
    nll = dict(zip([weights[1] for weights in valid.grid], valid.means()[0], strict=True))
    return {
        "steps": steps,
        "seconds": seconds,
        "strength": strength,
        "valid_nll": {"pilot": nll[0.0], "rectified": nll[strength]},
        "tasks": tasks,
        "token": looked.token(test["mawps"]),
    }


# ---- drawing --------------------------------------------------------------------------------------------------------


def plot_sizes(tasks: dict[str, dict[str, Any]], shares: Axes, histogram: Axes) -> None:
    """Figure 3."""
    for kind, names in KINDS.items():
        shares.bar(names, [100 * tasks[name]["share"] for name in names], color=COLOURS[kind], label=kind)
        counts = torch.tensor([tasks[name]["counts"] for name in names]).sum(0)  # [bins]
        edges = torch.linspace(0, WIDEST, BINS + 1)
        histogram.stairs(counts / counts.sum(), edges, color=COLOURS[kind], label=kind, fill=True, alpha=0.5)
    shares.set(title="mean |λ f|, % of the Pilot's logit range")
    histogram.set(title="share of all logits", xlabel="|λ f|", yscale="log")
    histogram.legend(frameon=False)


def plot_bars(token: dict[str, Any], axes: list[Axes]) -> None:
    """Figures 4 and 7: the label is green."""
    colours = ["tab:green" if name == token["label"] else "tab:gray" for name in token["names"]]
    names = [repr(name)[1:-1].replace(" ", "␣") for name in token["names"]]
    for axis, (key, title) in zip(
        axes, {"pilot": "Pilot p̂", "correction": "Copilot f", "rectified": "rectified p̃"}.items(), strict=True
    ):
        axis.bar(range(len(names)), token[key], color=colours)
        axis.set_xticks(range(len(names)), names)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(title)


def plot_lens(token: dict[str, Any], axes: Axes) -> None:
    """One cell for a layer."""
    for layer, name in enumerate(token["lens"]):
        colour = "tab:green" if name == token["label"] else "lightgray"
        axes.add_patch(plt.Rectangle((layer, 0), 1, 1, facecolor=colour, edgecolor="white"))
        text = repr(name)[1:-1].replace(" ", "␣")
        axes.text(layer + 0.5, 0.5, text, rotation=90, ha="center", va="center", fontsize=7, parse_math=False)
    axes.set(xlim=(0, len(token["lens"])), ylim=(0, 1), yticks=[], xlabel="layer", title="likeliest token by layer")


def draw(found: dict[str, Any], file: Path) -> None:
    """All of it in one picture."""
    figure = plt.figure(figsize=(10, 8.5), layout="constrained")
    above, middle, below = figure.subfigures(3, 1, height_ratios=[1.1, 1.1, 0.6])
    above.suptitle(f"Corrections of a Copilot trained on MAWPS for {found['steps']} steps, λ = {found['strength']:g}")
    plot_sizes(found["tasks"], *above.subplots(1, 2))
    middle.suptitle(f"… {' '.join(found['token']['before'].split())} → ?", fontsize=9, parse_math=False)
    plot_bars(found["token"], middle.subplots(1, 3))
    plot_lens(found["token"], below.subplots())
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilot", help="folder or Hub id; without it the stored figures are drawn")
    parser.add_argument("--data", type=Path, help="folder with mawps/, gsm8k/, piqa/, boolq/")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--rows", type=int, default=50, help="of each task")
    parser.add_argument("--file", type=Path, default=FILE, help="without its ending")
    given = parser.parse_args()
    stored = given.file.with_suffix(".json")
    if given.pilot:
        stored.write_text(json.dumps(study(given.pilot, given.data, given.steps, given.rows), indent=1) + "\n")
    found = json.loads(stored.read_text())
    draw(found, given.file.with_suffix(".png"))
    for name, own in found["tasks"].items():
        print(f"{name}: {100 * own['share']:.2f} % of the Pilot's logit range, {own['targets']} targets")
    print(f"token {found['token']['label']!r} after {found['token']['before']!r}; training {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
