"""Theorem 4.1 of the paper, measured: does some λ₀ > 0 exist below which every λ brings p̂ + λ f nearer to the truth?

    python benchmarks/theorem.py --seeds 8

Sequences come from a Markov chain of order two whose p(next | last two) is known. Several pairs of Pilot and Copilot
(RMSE, probability fusion without clamping, as the theorem has it) are trained, each on data and from weights of its
own; all are measured on the same sequences. Expectations over training (E_θ) are means over pairs. Per dimension k:

    ε_P² = E[(p − E_θ p̂)²]    σ_P² = E[Var_θ p̂]    ε_C² = E[(p − p̂ − E_θ f)²]    σ_C² = E[Var_θ f]

If ε_C < s = sqrt(ε_P² + σ_P²), the theorem promises λ₀ ≥ min(1, 2s(s − ε_C) / ((s − ε_C)² + σ_C²)). Writes
benchmarks/results/theorem.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cost import table
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_copilot import CopilotConfig, CopilotLearner, copilot_for

SYMBOLS, LENGTH, ROWS = 12, 32, 32
PILOT = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
RESULTS = Path(__file__).parent / "results"
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
    config = CopilotConfig(objective="rmse", fusion="probability", top_k=SYMBOLS)
    learner = CopilotLearner(copilot_for(pilot, config), pilot, learning_rate=1e-3, warmup_steps=20, seed=seed)
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
        for record in learner.read(inputs, lambda inputs=inputs: pilot(**inputs)):
            (batch,) = learner.batches([record])
            for _, logits, correction in learner.scores(batch):
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


def draw(found: dict[str, torch.Tensor], file: Path) -> None:
    """The error against λ, in each dimension and in total, with λ₀ as promised and as measured."""
    figure, (each, total) = plt.subplots(1, 2, figsize=(11, 4))
    ratio = found["error"] / found["error"][0]  # [L, V]
    each.plot(STRENGTHS, ratio, linewidth=0.8, color="tab:gray")
    each.set(title="each dimension k", xlabel="λ", ylabel="E[(p − p̂ − λf)²] / E[(p − p̂)²]", ylim=(0, 3))
    summed = found["error"].sum(1)  # [L]
    total.plot(STRENGTHS, summed / summed[0], color="tab:orange", label="measured")
    total.axvline(found["promised"].min(), color="tab:blue", linestyle=":", label="smallest λ₀ promised")
    total.axvline(found["measured"].min(), color="tab:green", linestyle="--", label="smallest λ₀ measured")
    total.set(title="all dimensions", xlabel="λ", ylabel="relative error", ylim=(0, 3))
    total.legend(frameon=False)
    for axes in (each, total):
        axes.axhline(1.0, color="black", linewidth=0.6)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def summary(found: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    """A row for each dimension, and one for the total."""
    names = ("pilot_bias", "pilot_spread", "copilot_bias", "copilot_spread", "promised", "measured")
    titles = ("ε_P", "σ_P", "ε_C", "σ_C", "λ₀ promised", "λ₀ measured")
    rows = []
    for k in range(SYMBOLS):
        row = {"k": str(k)} | {title: f"{found[name][k]:.4f}" for title, name in zip(titles, names, strict=True)}
        rows.append(row | {"ε_C < sqrt(ε_P² + σ_P²)": "yes" if found["condition"][k] else "no"})
    best = found["error"].sum(1).argmin()
    change = found["error"].sum(1)[best] / found["error"].sum(1)[0] - 1
    blank = dict.fromkeys(titles, "")
    return [*rows, {"k": f"all: error {change:+.1%} at λ = {STRENGTHS[best]:g}"} | blank | {list(rows[0])[-1]: ""}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="pairs of Pilot and Copilot")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=128, help="sequences that all pairs are measured on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chain = make_chain()
    torch.manual_seed(10_000)
    ids = sample(chain, args.rows)  # [rows, LENGTH]
    truth = chain[ids[:, :-2], ids[:, 1:-1]].flatten(0, 1)  # [targets, V]
    pairs = [predictions(*train_pair(chain, seed, args.steps), ids) for seed in range(1, args.seeds + 1)]
    found = quantities(truth, *(torch.stack(column) for column in zip(*pairs, strict=True)))
    rows = summary(found)
    settings = {"seeds": args.seeds, "steps": args.steps, "rows": args.rows, "pilot": PILOT}
    figures = {name: values.tolist() for name, values in found.items()} | {"strengths": STRENGTHS.tolist()}
    (args.results / "theorem.json").write_text(json.dumps({"settings": settings, "figures": figures}) + "\n")
    (args.results / "theorem.md").write_text(table(rows) + "\n")
    draw(found, args.results / "theorem.png")
    print(table(rows))


if __name__ == "__main__":
    main()
