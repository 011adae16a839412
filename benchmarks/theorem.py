"""Theorem 4.1 of the paper, measured: does some λ₀ > 0 exist below which every λ brings p̂ + λ f nearer to the truth?

    python -m benchmarks.theorem --seeds 8

Sequences come from a Markov chain of order two whose p(next | last two) is known. Several pairs of Pilot and Copilot
(RMSE, probability fusion without clamping, as the theorem has it) are trained, each on data and from weights of its
own; all are measured on the same sequences. Expectations over training (E_θ) are means over pairs. Per dimension k:

    ε_P² = E[(p − E_θ p̂)²]    σ_P² = E[Var_θ p̂]    ε_C² = E[(p − p̂ − E_θ f)²]    σ_C² = E[Var_θ f]

If ε_C < s = sqrt(ε_P² + σ_P²), the theorem promises λ₀ ≥ min(1, 2s(s − ε_C) / ((s − ε_C)² + σ_C²)). Measured three
times: early in training, later, and when the Pilot has nearly learnt the chain. Writes
benchmarks/results/theorem.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import RESULTS, table
from hf_copilot import CopilotConfig, CopilotLearner, copilot_for

SYMBOLS, LENGTH, ROWS = 12, 32, 32
PILOT = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
STRENGTHS = torch.linspace(0, 3, 61)  # [L]


def make_chain(concentration: float = 0.3) -> torch.Tensor:
    """p(next | second last, last), `[V, V, V]`, from a Dirichlet distribution."""
    torch.manual_seed(0)
    return torch.distributions.Dirichlet(torch.full((SYMBOLS,), concentration)).sample((SYMBOLS, SYMBOLS))


def sample(chain: torch.Tensor, rows: int) -> torch.Tensor:
    """Sequences of the chain, `[rows, LENGTH]`; their first two symbols are uniform."""
    ids = torch.randint(SYMBOLS, (rows, LENGTH))
    for i in range(2, LENGTH):
        ids[:, i] = torch.multinomial(chain[ids[:, i - 2], ids[:, i - 1]], 1)[:, 0]
    return ids


def train_pair(chain: torch.Tensor, seed: int, steps: int) -> tuple[LlamaForCausalLM, CopilotLearner]:
    """A Pilot and the Copilot beside it, on fresh sequences in every round; targets follow the second symbol."""
    torch.manual_seed(seed)
    pilot = LlamaForCausalLM(LlamaConfig(vocab_size=SYMBOLS, max_position_embeddings=LENGTH, **PILOT))
    config = CopilotConfig(objective="rmse", fusion="probability", top_k=SYMBOLS, dropout=0.0)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 20, "steps_per_round": 4, "seed": seed}
    learner = CopilotLearner(copilot_for(pilot, config), pilot, **settings)
    learner.start(steps)
    optimizer = torch.optim.AdamW(pilot.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc=f"pair {seed}"):
        inputs = labelled(sample(chain, ROWS))
        with learner.observe(inputs):
            loss = pilot(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
    return pilot.eval(), learner


def labelled(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def predictions(pilot: LlamaForCausalLM, learner: CopilotLearner, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """p̂ and f at every target of the sequences, `[targets, V]` each, in the order of the sequences."""
    learner.copilot.eval()
    pilots, corrections = [], []
    for rows in ids.split(ROWS):
        inputs = labelled(rows)
        for record in learner.forced.read(inputs, lambda inputs=inputs: pilot(**inputs)):
            (batch,) = learner.forced.batches([record])
            for _, logits, correction in learner.forced.corrections(batch):
                pilots.append(logits.softmax(-1))
                corrections.append(correction)
    return torch.cat(pilots), torch.cat(corrections)


def quantities(truth: torch.Tensor, pilots: torch.Tensor, corrections: torch.Tensor) -> dict[str, torch.Tensor]:
    """The theorem's quantities and the measured error, per dimension.

    Args:
        truth: p, `[targets, V]`.
        pilots, corrections: p̂ and f of every pair, `[pairs, targets, V]`.

    Returns:
        `[V]` each, and `error` `[L, V]`, E[(p − p̂ − λ f)²] at every λ of `STRENGTHS`.
    """
    bias = (truth - pilots.mean(0)).square().mean(0)  # [V] ε_P²
    spread = pilots.var(0, correction=0).mean(0)  # [V] σ_P²
    own_bias = (truth - pilots - corrections.mean(0)).square().mean((0, 1))  # [V] ε_C²
    own_spread = corrections.var(0, correction=0).mean(0)  # [V] σ_C²
    s, c = (bias + spread).sqrt(), own_bias.sqrt()  # [V], [V]
    promised = (2 * s * (s - c) / ((s - c).square() + own_spread)).clamp_max(1.0)  # [V]
    rest = truth - pilots  # [pairs, targets, V]
    error = torch.stack([(rest - strength * corrections).square().mean((0, 1)) for strength in STRENGTHS])  # [L, V]
    gain, size = (rest * corrections).mean((0, 1)), corrections.square().mean((0, 1))  # [V], [V]
    return {
        "pilot_bias": bias.sqrt(),
        "pilot_spread": spread.sqrt(),
        "copilot_bias": c,
        "copilot_spread": own_spread.sqrt(),
        "condition": (bias > 0) & (c < s),
        "promised": torch.where(c < s, promised, 0.0),
        "measured": 2
        * gain
        / size,  # E[(p − p̂ − λ f)²] is a parabola: below E[(p − p̂)²] for 0 < λ < 2 E[(p − p̂)f]/E[f²]
        "error": error,
    }


def draw(stages: dict[int, dict[str, torch.Tensor]], file: Path) -> None:
    """For every stage the error against λ, in each dimension and in total, with λ₀ as promised and as measured."""
    figure, panels = plt.subplots(1, len(stages), figsize=(4.5 * len(stages), 4), sharey=True, squeeze=False)
    for axes, (steps, found) in zip(panels[0], stages.items(), strict=True):
        ratio, summed = found["error"] / found["error"][0], found["error"].sum(1)  # [L, V], [L]
        axes.plot(STRENGTHS, ratio, linewidth=0.7, color="tab:gray", label=["each dimension"] + [None] * (SYMBOLS - 1))
        axes.plot(STRENGTHS, summed / summed[0], color="tab:orange", linewidth=2, label="all together")
        axes.axvline(found["promised"].min(), color="tab:blue", linestyle=":", label="smallest λ₀ promised")
        axes.axvline(found["measured"].min(), color="tab:green", linestyle="--", label="smallest λ₀ measured")
        axes.axhline(1.0, color="black", linewidth=0.6)
        held = int(found["condition"].sum())
        axes.set(title=f"{steps} steps: condition holds in {held} of {SYMBOLS}", xlabel="λ", ylim=(0, 2))
    panels[0, 0].set_ylabel("E[(p − p̂ − λf)²] / E[(p − p̂)²]")
    panels[0, -1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def summary(stages: dict[int, dict[str, torch.Tensor]]) -> list[dict[str, str]]:
    """A row for each stage."""
    rows = []
    for steps, found in stages.items():
        summed = found["error"].sum(1)  # [L]
        best, promised = summed.argmin(), found["promised"]
        low, high = found["measured"].aminmax()
        rows.append(
            {
                "steps": str(steps),
                "s, mean": f"{torch.hypot(found['pilot_bias'], found['pilot_spread']).mean():.4f}",
                "ε_C, mean": f"{found['copilot_bias'].mean():.4f}",
                "condition holds": f"{int(found['condition'].sum())} of {SYMBOLS}",
                "λ₀ promised": f"{promised.min():.2f} to {promised.max():.2f}",
                "λ₀ measured": f"{low:.2f} to {high:.2f}",
                "promise kept": f"{int((promised <= found['measured']).sum())} of {SYMBOLS}",
                "best λ, all dimensions": f"{STRENGTHS[best]:.2f} ({summed[best] / summed[0] - 1:+.1%})",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="pairs of Pilot and Copilot")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400], help="lengths of training")
    parser.add_argument("--rows", type=int, default=128, help="sequences that all pairs are measured on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    chain = make_chain()
    torch.manual_seed(10_000)
    ids = sample(chain, args.rows)  # [rows, LENGTH]
    truth = chain[ids[:, :-2], ids[:, 1:-1]].flatten(0, 1)  # [targets, V]
    stages = {}
    for steps in args.steps:
        pairs = [predictions(*train_pair(chain, seed, steps), ids) for seed in range(1, args.seeds + 1)]
        stages[steps] = quantities(truth, *(torch.stack(column) for column in zip(*pairs, strict=True)))
    figures = {steps: {name: values.tolist() for name, values in found.items()} for steps, found in stages.items()}
    settings = {"seeds": args.seeds, "rows": args.rows, "pilot": PILOT, "strengths": STRENGTHS.tolist()}
    (args.results / "theorem.json").write_text(json.dumps({"settings": settings, "stages": figures}) + "\n")
    text = table(summary(stages))
    (args.results / "theorem.md").write_text(text + "\n")
    draw(stages, args.results / "theorem.png")
    print(text)


if __name__ == "__main__":
    main()
