"""Long documents: attention by blocks of queries equals attention at once, and no mask grows with the square."""

from __future__ import annotations

import pytest
import torch
from tiny import MEMORIES, tiny_pilot, trained_like
from torch.utils._python_dispatch import TorchDispatchMode

from hf_copilot import CopilotConfig
from hf_copilot.model import attention
from hf_copilot.model.attention import NOWHERE, Span
from hf_copilot.training.teacher_forced import TeacherForced


def test_a_span_says_what_is_read():
    places, last = torch.tensor([[0, NOWHERE, 1, 2]]), torch.tensor([[0, 1, 2]])
    assert Span(places, last).mask().int().tolist() == [[[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]]
    first = torch.tensor([[0, 1, 1]])
    assert Span(places, last, first).mask(slice(1, 3)).int().tolist() == [[[0, 0, 1, 0], [0, 0, 1, 1]]]


def loss_and_gradients(copilot, pilot, rows, **how):
    """Of whole documents, labelled at every token."""
    batch = {"input_ids": rows, "labels": rows}
    with TeacherForced(copilot, pilot, **how) as forced:
        records = forced.read(batch, lambda: pilot(input_ids=rows))
        loss = forced.loss(forced.collate(records))
    copilot.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in copilot.parameters() if p.grad is not None]


@pytest.mark.parametrize("memory", MEMORIES)
def test_blocks_equal_one(memory, monkeypatch):
    pilot = tiny_pilot()
    copilot = trained_like(pilot, CopilotConfig(memory=memory, dropout=0.0))
    rows = torch.randint(5, 40, (3, 29))
    whole = loss_and_gradients(copilot, pilot, rows)
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 500)  # of 3 x 28 x 28, or 56
    in_blocks = loss_and_gradients(copilot, pilot, rows)
    torch.testing.assert_close(in_blocks, whole, rtol=1e-3, atol=1e-4)


def test_blocks_of_a_compiled_copilot(monkeypatch):
    """torch.compile can't recompute a block, so blocks are left out of what is compiled."""
    pilot = tiny_pilot()
    copilot = trained_like(pilot, CopilotConfig(dropout=0.0))
    rows = torch.randint(5, 40, (3, 29))
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 500)
    whole = loss_and_gradients(copilot, pilot, rows)
    compiled = loss_and_gradients(copilot, pilot, rows, compile_backend="eager")
    torch.testing.assert_close(compiled, whole, rtol=1e-3, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operator gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_no_tensor_grows_with_the_square(memory, monkeypatch):
    """A document twice as long has no tensor of more than about twice the size; where blocks are large, of four."""
    pilot = tiny_pilot(max_position_embeddings=1024)
    copilot = trained_like(pilot, CopilotConfig(memory=memory))

    def largest(length):
        with Largest() as watch:
            loss_and_gradients(copilot, pilot, torch.randint(5, 40, (1, length)))
        return watch.size

    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 2**10)
    assert largest(1024) < 2.1 * largest(512)
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 2**30)
    assert largest(1024) > 3 * largest(512)
