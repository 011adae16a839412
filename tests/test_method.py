"""The method as docs/method.md shows it (tests/dense.py) is what is trained, measured and generated."""

from __future__ import annotations

from pathlib import Path

import dense
import pytest
import torch
from tiny import VOCAB_SIZE, trained_like

from hf_copilot import CopilotConfig, CopilotLogitsProcessor, score
from hf_copilot.training.teacher_forced import TeacherForced

IDS = torch.tensor([5, 9, 12, 20, 21, 30, 2])
FIRST = 3  # the first token of the completion
CONFIGS = {
    "token Copilot": CopilotConfig(dropout=0.0, top_k=VOCAB_SIZE),
    "state Copilot": CopilotConfig(dropout=0.0, top_k=VOCAB_SIZE, memory="pilot", copilot_input="token"),
    "paper": CopilotConfig.paper(num_hidden_layers=2, dropout=0.0, top_k=VOCAB_SIZE, error_feedback="realized"),
}


@pytest.fixture(params=CONFIGS)
def copilot(request, pilot):
    return trained_like(pilot, CONFIGS[request.param])


def dense_pass(pilot, copilot):
    """z, ℓ, y and f of the completion, each by the dense reference."""
    config, outputs = copilot.config, []
    handles = [layer.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for layer in pilot.model.layers]
    logits = pilot(input_ids=IDS[None]).logits[0]  # [n, V]
    for handle in handles:
        handle.remove()
    z, y, positions = logits[FIRST - 1 : -1], IDS[FIRST:], torch.arange(FIRST - 1, len(IDS) - 1)
    n = int(positions[-1]) + 1
    ell = dense.mistake(z, y)  # [m, V]
    inputs = dense.fed(ell, y, copilot.embed_tokens.weight, copilot.start.weight, config.copilot_input)  # [m, d]
    tokens, states = dense.reads(positions, n, config.hidden_state_lag)  # [m, n] twice
    where = torch.arange(n)
    if config.memory == "tokens":
        memory, mask = IDS[:n], tokens
    else:  # X̃ and then h, not interleaved: attention has no order of its own
        embedded = pilot.get_input_embeddings()(IDS[:n])  # [n, d_P]
        pooled = torch.stack([output.view(len(IDS), -1)[:n] for output in outputs]).mean(0)  # [n, d_P]
        memory, mask, where = torch.cat([embedded, pooled]), torch.cat([tokens, states], dim=1), where.repeat(2)
    m = len(positions)
    f = copilot(
        None,
        None,
        None,
        memory[None],
        mask[None],
        torch.ones(1, m, m, dtype=torch.bool).tril(),
        positions[None],
        where[None],
        inputs_embeds=inputs[None],
        return_logits=True,
    ).logits[0]  # [m, V]
    return z, ell, y, f


def test_the_loss(pilot, copilot):
    z, ell, y, f = dense_pass(pilot, copilot)
    inputs = {"input_ids": IDS[None], "labels": IDS.masked_fill(torch.arange(len(IDS)) < FIRST, -100)[None]}
    with TeacherForced(copilot, pilot) as forced:
        (batch,) = forced.batches(forced.read(inputs, lambda: pilot(input_ids=IDS[None])))
        found = forced.loss(batch)
    torch.testing.assert_close(found, dense.loss(copilot.config.objective, f, z, ell, y), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_likelihood(pilot, copilot, strength):
    z, _, y, f = dense_pass(pilot, copilot)
    expected = dense.rectified(z, f, strength, copilot.config.fusion).gather(1, y[:, None])[:, 0]
    row = {"input_ids": IDS, "labels": IDS.masked_fill(torch.arange(len(IDS)) < FIRST, -100)}
    (found,) = score(pilot, copilot, [row], [strength])
    torch.testing.assert_close(found.log_likelihoods[0], expected, rtol=1e-4, atol=1e-4)


class Forced:
    """Makes `generate` emit the completion, whatever the scores are; keeps these."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores[0])
        return torch.full_like(scores, -torch.inf).index_fill(1, IDS[input_ids.shape[1]], 0.0)


@torch.no_grad()
def test_generation(pilot, copilot):
    z, _, y, f = dense_pass(pilot, copilot)
    forced = Forced()
    with CopilotLogitsProcessor(copilot, pilot, strength=0.7) as processor:
        pilot.generate(IDS[None, :FIRST], logits_processor=[processor, forced], max_new_tokens=len(y), do_sample=False)
    found = torch.stack(forced.seen).log_softmax(-1)  # [m, V]
    expected = dense.rectified(z, f, 0.7, copilot.config.fusion)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-3, atol=1e-4)


def test_the_docs_show_it():
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
    assert Path(dense.__file__).read_text(encoding="utf-8") in page
