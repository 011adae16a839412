"""Where does a Copilot keep its gain when it leaves a pretrained Pilot? As in benchmarks/accuracy/moves.py.

    python -m benchmarks.pretrained.moving --pilot PILOT --data DATA --work WORK --seed 0 [--device cuda]
    python -m benchmarks.pretrained.moving --work WORK --store

The training rows of MAWPS are cut in halves. The Pilot, with LoRA, and a third as many layers less of it, after some
full training on GSM8K, learn one half, each with a token Copilot. Then the Copilots move to Pilots that learnt the
other half, and to the Pilot as it came. Each destination is kept when it is done; --store writes
benchmarks/results/accuracy/moves_smollm2.{json,md} of the seeds that have all.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.accuracy.moves import ARMS, Figures, table_of
from benchmarks.accuracy.shares import ALONE, OWN
from benchmarks.common import RESULTS
from benchmarks.pretrained.arms import LONG, TOKEN, lora
from benchmarks.pretrained.measuring import COPILOT_GRID, Likelihoods, Model, Weights, logits_of
from benchmarks.pretrained.pilot import load
from benchmarks.pretrained.running import Bench, Limits
from benchmarks.pretrained.steps import collate
from benchmarks.pretrained.training import PilotSpec, Trained
from hf_copilot.pilot.inspect import find_decoder

CHOSEN_ON = 100  # validation rows
HEALING = PilotSpec("full", 2e-4, LONG)
TUNING = lora(1e-3, LONG)  # the best of four rates on validation rows, in the second search
FULL = PilotSpec("full", 1e-4, LONG)
_, MOVED_AS_IT_WAS, MOVED, _, SMALL = ARMS


@dataclass
class Changed(Model):
    """z + λ (z' − z''): what fine-tuning changed in the logits of another Pilot (proxy-tuning, arXiv 2401.08565)."""

    tuned: PreTrainedModel | None = None
    untuned: PreTrainedModel | None = None

    @property
    def grid(self) -> list[Weights]:
        return COPILOT_GRID

    def logits(self, examples) -> Iterator[tuple[torch.Tensor, ...]]:
        inputs = collate(examples, self.tokenizer.pad_token_id, self.pilot.device)
        for rows, (z, tuned, untuned), labels in logits_of([self.pilot, self.tuned, self.untuned], inputs):
            yield rows, z, tuned - untuned, labels


class Moves:
    """All with one seed."""

    def __init__(self, bench: Bench, seed: int):
        self.bench, self.seed, splits = bench, seed, bench.splits["mawps"]
        rows = bench.to_train("mawps")
        self.halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        self.valid, self.test = bench.encoded(splits.valid[:CHOSEN_ON]), bench.encoded(splits.test)

    def run(self) -> Iterator[tuple[str, dict[str, Figures]]]:
        """Figures of every arm, destination by destination."""
        full, small = self.bench.base, "from 20 layers to 30"
        home, other = (self.train(full, TUNING, half) for half in self.halves)
        yield "home", self.compare(home.pilot, home, home, full)
        yield "other rows", self.compare(other.pilot, other, home, full)
        shallow = self.train(shallower(full), HEALING, self.bench.to_train("gsm8k"), []).pilot
        small_home, small_other = (self.train(shallow, TUNING, half) for half in self.halves)
        yield "20 layers, home", self.compare(small_home.pilot, small_home, small_home, shallow)
        yield small, self.compare(other.pilot, other, small_home, shallow)
        yield f"{small}, not fine-tuned", self.compare(full, None, small_home, shallow)
        yield "from 30 layers to 20", self.compare(small_other.pilot, small_other, home, full)
        fully = self.train(full, FULL, self.halves[1])
        yield "other rows, full fine-tuning", self.compare(fully.pilot, fully, home, full)

    def train(self, base: PreTrainedModel, pilot: PilotSpec, rows: list, copilots=(TOKEN,)) -> Trained:
        steps = pilot.steps(len(rows))
        return self.bench.train(rows, pilot, copilots, min(steps, self.bench.limits.steps or steps), self.seed, base)

    def compare(
        self, pilot: PreTrainedModel, own: Trained | None, home: Trained, untuned: PreTrainedModel
    ) -> dict[str, Figures]:
        tokenizer = self.bench.tokenizer
        with self.beside(home.pilot, home) as model:
            at_home = model.likelihoods(self.valid).best("nll")
        with self.beside(pilot, home) as moved:
            found, chosen = moved.likelihoods(self.test), moved.likelihoods(self.valid).best("nll")
        figures = {
            ALONE: figures_at(found, (1.0, 0.0)),
            MOVED_AS_IT_WAS: figures_at(found, at_home),
            MOVED: figures_at(found, chosen),
            SMALL: at_best(Changed(pilot, tokenizer, tuned=home.pilot, untuned=untuned), self.valid, self.test),
        }
        if own is not None:
            with self.beside(pilot, own) as model:
                figures[OWN] = at_best(model, self.valid, self.test)
        figures[ALONE].pop("strength")
        return figures

    @contextmanager
    def beside(self, pilot: PreTrainedModel, trained: Trained) -> Iterator[Model]:
        """A trained Copilot beside some Pilot, inside the block."""
        learner = type(trained.learner)(copy.deepcopy(trained.learner.copilot), pilot)
        yield Model(pilot, self.bench.tokenizer, learner)
        learner.close()


def at_best(model: Model, valid: list, test: list) -> Figures:
    return figures_at(model.likelihoods(test), model.likelihoods(valid).best("nll"))


def figures_at(found: Likelihoods, weights: Weights) -> Figures:
    """Metrics as moves.py has them; a row is right if all of its tokens are."""
    i, total = found.grid.index(weights), found.tokens.sum()
    return {
        "nll": float(found.nll[i].sum() / total),
        "token accuracy": float(found.hits[i].sum() / total),
        "answers right": float((found.hits[i] == found.tokens).double().mean()),
        "strength": weights[1],
    }


def shallower(base: PreTrainedModel) -> PreTrainedModel:
    """A copy without the third of the layers that lies in the middle."""
    pilot = copy.deepcopy(base)
    decoder = find_decoder(pilot)
    count = len(decoder.layers)
    first = third = count // 3
    decoder.layers = decoder.layers[:first] + decoder.layers[first + third :]
    for i, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = i
    pilot.config.num_hidden_layers = len(decoder.layers)
    return pilot


def store(work: Path, results: Path) -> None:
    found = [json.loads(file.read_text()) for file in sorted(work.glob("moves_seed*.json"))]
    runs = [run for run in found if len(run) == max(map(len, found))]
    settings = {"seeds": len(runs), "rows": "halves of MAWPS", "pilot": "SmolLM2-135M-Instruct"}
    stem, text = results / "accuracy" / "moves_smollm2", table_of(runs)
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilot", default="pilot", help="folder or Hub id (see pilot.py)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="at most, to try things out")
    parser.add_argument("--store", action="store_true", help="write the table of the seeds that are done")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --store writes")
    arguments = parser.parse_args()
    if arguments.store:
        store(arguments.work, arguments.results)
        return
    if arguments.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    bench = Bench(*load(arguments.pilot, arguments.device), arguments.data, Limits(steps=arguments.steps))
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, figures in Moves(bench, arguments.seed).run():
        found[name] = figures
        (arguments.work / f"moves_seed{arguments.seed}.json").write_text(json.dumps(found))
        print(f"{name}\n{table_of([{name: figures}])}", flush=True)


if __name__ == "__main__":
    main()
