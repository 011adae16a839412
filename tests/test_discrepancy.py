"""Every equation against a dense float64 reference of a few lines, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_copilot.model import discrepancy as d

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(2, 12), st.integers(0, 2**16))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few rows per chunk, so that every loop over chunks runs more than once."""
    monkeypatch.setattr(d, "CHUNK_ELEMENTS", 24)


def problem(m, width, vocab, seed):
    """Copilot states, its output matrix, Pilot logits and labels, in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    logits = 2 * torch.randn(m, vocab, generator=g, dtype=torch.float64)
    return hidden, weight, logits, torch.randint(0, vocab, (m,), generator=g)


def dense(sparse, vocab):
    return torch.zeros(len(sparse.values), vocab, dtype=torch.float64).scatter_add_(
        1, sparse.indices, sparse.values.double()
    )


def onehot_minus_softmax(logits, labels):
    return torch.nn.functional.one_hot(labels, logits.shape[1]) - logits.softmax(-1)


def check_gradients(found, expected, inputs, tolerance=1e-4):
    """Same value and gradients: `found` in float32, `expected` in float64."""
    leaves = [[x.detach().clone().to(t).requires_grad_() for x in inputs] for t in (torch.float32, torch.float64)]
    values = [found(*leaves[0]), expected(*leaves[1])]
    for value in values:
        value.backward()
    assert torch.allclose(values[0].double(), values[1], atol=tolerance, rtol=tolerance)
    for a, b in zip(*leaves, strict=True):
        assert torch.allclose(a.grad.double(), b.grad, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 14))
def test_sparse_discrepancy_keeps_the_largest_entries_and_the_label(sizes, top_k):
    hidden, weight, _, labels = problem(*sizes)
    found = d.discrepancy(lambda x: (x @ weight.T).float(), hidden, labels, top_k)
    full = onehot_minus_softmax(hidden @ weight.T, labels)
    kept = dense(found, len(weight))
    is_kept = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, found.indices, True)
    assert torch.allclose(kept[is_kept], full[is_kept], atol=1e-6)
    assert is_kept.sum(1).min() >= min(top_k, len(weight))
    dropped = full.masked_fill(is_kept, 0).abs().sum(1)
    assert torch.allclose(found.dropped.double(), dropped, atol=1e-5)
    if top_k >= len(weight):
        assert torch.allclose(kept, full, atol=1e-6)
    assert torch.equal(found.indices[:, -1], labels)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([True, False, None]))
def test_the_squared_norm_by_both_ways(sizes, gram):
    hidden, weight, _, _ = problem(*sizes)
    check_gradients(
        lambda h, w: d.squared_norm(h, w, gram).sum(), lambda h, w: (h @ w.T).square().sum(), (hidden, weight), 5e-3
    )


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_rmse_equals_eq_7(sizes):
    hidden, weight, logits, labels = problem(*sizes)
    sequence = torch.arange(len(labels)) // 3
    target = d.sparse_discrepancy(logits.float(), labels, top_k=3)
    mistake = dense(target, len(weight))

    def reference(hidden, weight):
        squares = (hidden @ weight.T - mistake).square().sum(-1)
        return sum(squares[sequence == s].sum().sqrt() for s in sequence.unique())

    count = int(sequence[-1]) + 1
    check_gradients(lambda h, w: d.rmse_loss(h, w, target, sequence, count), reference, (hidden, weight), 5e-3)


def test_rmse_of_a_perfect_copilot_is_zero_with_finite_gradients():
    target = d.SparseDiscrepancy(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2))
    hidden = torch.zeros(2, 3, requires_grad=True)
    loss = d.rmse_loss(hidden, torch.ones(4, 3), target, torch.zeros(2, dtype=torch.int64), 1)
    loss.backward()
    assert loss < 1e-5 and hidden.grad.isfinite().all()


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_cross_entropy_of_the_fused_logits(sizes):
    hidden, weight, logits, labels = problem(*sizes)

    def reference(hidden, weight):
        return torch.nn.functional.cross_entropy(logits + hidden @ weight.T, labels, reduction="sum")

    check_gradients(
        lambda h, w: d.cross_entropy_loss(h, w, lambda rows: logits[rows].float(), labels),
        reference,
        (hidden, weight),
    )


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([0.1, 0.5, 1.0, 3.0]))
def test_logit_fusion(sizes, strength):
    _, _, logits, _ = problem(*sizes)
    correction = logits.flip(0).roll(1, -1)
    fused = d.fuse(logits, correction, strength, "logit")
    assert torch.allclose(fused.softmax(-1), (logits + strength * correction).softmax(-1))
    assert torch.allclose(fused.logsumexp(-1), logits.logsumexp(-1))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([0.1, 0.5, 1.0, 3.0]))
def test_probability_fusion_equals_eq_8_where_it_is_positive(sizes, strength):
    _, _, logits, labels = problem(*sizes)
    pilot = logits.softmax(-1)
    correction = onehot_minus_softmax(logits, labels) * 0.3
    fused = d.fuse(logits, correction, strength, "probability")
    expected = (pilot + strength * correction).clamp_min(d.PROBABILITY_FLOOR)
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(fused.softmax(-1), expected, atol=1e-8)
    assert torch.allclose(fused.logsumexp(-1), logits.logsumexp(-1))


@pytest.mark.parametrize("fusion", ["logit", "probability"])
def test_fusion_keeps_banned_tokens_banned_and_zero_strength_is_the_identity(fusion):
    scores = torch.randn(3, 7)
    scores[:, 2] = -torch.inf
    correction = torch.randn(3, 7)
    fused = d.fuse(scores, correction, 1.0, fusion)
    assert (fused[:, 2] == -torch.inf).all() and fused[:, [0, 1, 3]].isfinite().all()
    assert d.fuse(scores, correction, 0.0, fusion) is scores
    scores[1] = -torch.inf  # nothing is left, for a beam that constraints have ended
    fused = d.fuse(scores, correction, 1.0, fusion)
    assert (fused[1] == -torch.inf).all() and fused[[0, 2]][:, [0, 1, 3]].isfinite().all()
    scores[1] = torch.tensor([torch.inf] + 6 * [0.0])  # a forced token
    assert torch.equal(d.fuse(scores, correction, 1.0, fusion)[1], scores[1])
    scores[1] = 0.0
    log_probabilities = scores.log_softmax(-1)
    assert torch.allclose(d.fuse(log_probabilities, correction, 1.0, fusion).exp().sum(-1), torch.ones(3))
    if fusion == "logit":
        assert torch.equal(d.fuse(scores, torch.zeros(3, 7), 1.0, fusion), scores)


def test_no_buffer_of_positions_by_vocabulary(monkeypatch):
    """V = 128k, chunks of an eighth of the usual: every tensor that is made along the way stays far below [m, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(d, "CHUNK_ELEMENTS", 2**21)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    positions, vocab, width = 250, 128_000, 8
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (positions,))
    pilot_weight = torch.randn(vocab, width)
    with Watch():
        target = d.discrepancy(lambda x: x @ pilot_weight.T, hidden.detach(), labels, 64)
        d.cross_entropy_loss(hidden, weight, lambda rows: hidden[rows].detach() @ pilot_weight.T, labels).backward()
        d.rmse_loss(hidden, weight, target, torch.zeros_like(labels), 1).backward()  # by Gram
        d.squared_norm(hidden, weight, gram=False).sum().backward()
    assert largest <= max(d.CHUNK_ELEMENTS, vocab * width) < positions * vocab / 10


@pytest.mark.parametrize("fusion", ["logit", "probability"])
@pytest.mark.parametrize("ban", [-torch.inf, torch.finfo(torch.float32).min, -1e6, "the others are lifted"])
def test_what_is_banned_by_any_number_stays_banned(fusion, ban):
    generator = torch.Generator().manual_seed(0)
    scores, f = torch.randn(4, 9, generator=generator), torch.rand(4, 9, generator=generator)
    allowed = torch.tensor([2, 5])
    if ban == "the others are lifted":
        banned = scores.index_add(1, allowed, torch.full((4, 2), 999.0))
    else:
        banned = torch.full_like(scores, ban).index_copy(1, allowed, scores[:, allowed])
    fused = d.fuse(banned, f, 1.0, fusion)
    assert torch.isin(fused.argmax(-1), allowed).all()
    assert fused.softmax(-1)[:, allowed].sum(-1).allclose(torch.ones(4))
