"""A compiled Copilot is the same Copilot: results, resuming, the Pilot beside it; it stops compiling, or says so.

Backends that compile nothing stand for inductor, but for one test. What a CUDA graph asks for is acted out here: few
shapes, and gradients that the next pass writes over.
"""

from __future__ import annotations

import logging

import pytest
import torch
from test_data import train
from test_learner import observe
from tiny import MEMORIES, addition, assert_same, tiny_pilot, tiny_seq2seq, trained_like
from torch._dynamo.utils import counters
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotConfig, CopilotLearner, CopilotSFTConfig, CopilotTrainer
from hf_copilot.model.compiled import CompiledDecode
from hf_copilot.training.ragged import Ragged, powers_of_two
from hf_copilot.training.teacher_forced import TeacherForced


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def varied_batch(step: int) -> dict[str, torch.Tensor]:
    """Another number of rows and positions at every step."""
    rows, length = 3 + step % 4, 6 + step
    ids = torch.arange(rows * length).view(rows, length) % 40 + 3
    labels = ids.clone()
    labels[:, : 2 + step % 3] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def run(memory="tokens", steps=6, backend=None, learner_class=CopilotLearner, dropout=0.1):
    """A learner after rounds of many shapes, measured in each, and the graphs that there were after each."""
    pilot, graphs = tiny_pilot(), []
    copilot = trained_like(pilot, CopilotConfig(memory=memory, dropout=dropout))
    learner = learner_class(copilot, pilot, num_training_steps=steps, compile_backend=backend)
    for step in range(steps):
        observe(learner, pilot, varied_batch(step))
        learner.step(measure=True)
        graphs.append(counters["stats"]["unique_graphs"])
    return learner, graphs


def weights(learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.copilot.parameters()])


@pytest.mark.parametrize(
    ("memory", "backend"), [pytest.param("tokens", "aot_eager", marks=pytest.mark.slow), ("pilot", "eager")]
)
def test_a_compiled_copilot_is_the_same_and_stops_compiling(memory, backend):
    """Dropout draws the same."""
    plain, none = run(memory)
    compiled, graphs = run(memory, backend=backend)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=0, atol=1e-6)
    assert none[-1] == 0 and graphs[-1] == graphs[0] == 2  # in training, and measured


@pytest.mark.slow
def test_by_inductor(caplog):
    """Of two lengths, to the rounding of sums in another order."""
    with caplog.at_level(logging.WARNING):
        compiled, graphs = run(steps=2, backend="inductor")
    if compiled.forced.compiled.compiled is None:
        pytest.skip(f"no compiler here: {caplog.text}")
    assert graphs[-1] == 2
    torch.testing.assert_close(weights(run(steps=2)[0]), weights(compiled), rtol=0, atol=1e-5)


def test_the_trainer_compiles_the_copilot_on_request(tmp_path):
    """And its Pilot is the parent's."""
    losses, settings = [], {"torch_compile": True, "torch_compile_backend": "eager"}
    for on in (False, True):
        trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), copilot_torch_compile=on, **settings)
        assert (trainer.learner.forced.compiled is None) is not on
        losses.append([entry["copilot_loss"] for entry in trainer.state.log_history if "copilot_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(trainer.model, train(SFTTrainer, SFTConfig, tmp_path, addition(32), **settings).model)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    settings = {"copilot_torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "steps"}
    settings |= {"max_steps": 4, "save_steps": 2, "torch_compile": False}
    whole = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), **settings)
    torch._dynamo.reset()
    resumed = train(
        CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), resume_from=tmp_path / "checkpoint-2", **settings
    )
    assert_same(whole.model, resumed.model)
    assert_same(whole.copilot, resumed.copilot)


# ---- where it can't be compiled -------------------------------------------------------------------------------------


def fails_at_once(graph, inputs):
    raise RuntimeError("no compiler")


def fails_in_the_backward_pass(graph, inputs):
    def fail(gradient):
        raise RuntimeError("no compiler")

    def compiled(*given):
        outputs = graph(*given)
        for output in outputs:
            if output.requires_grad:
                output.register_hook(fail)
        return outputs

    return compiled


@pytest.mark.parametrize("backend", [fails_at_once, fails_in_the_backward_pass])
def test_what_can_not_be_compiled_runs_without(backend, caplog, monkeypatch):
    """It is said once, and training goes on as if it had not been tried: here without dropout, which a pass that is
    made again draws again."""
    plain, _ = run(dropout=0.0)
    with caplog.at_level(logging.WARNING):
        learner, _ = run(backend=backend, dropout=0.0)
    assert caplog.text.count("can't be compiled here") == 1 and "no compiler" in caplog.text
    assert learner.skipped_steps == 0 and learner.steps == 6
    assert torch.equal(weights(plain), weights(learner))


def test_an_error_of_another_kind_is_raised():
    class Fails(TeacherForced):
        def loss(self, batch):
            raise RuntimeError("not of compiling")

    class Learner(CopilotLearner):
        teacher_forced_class = Fails

    for backend in (None, "eager"):
        with pytest.raises(RuntimeError, match="not of compiling"):
            run(steps=1, backend=backend, learner_class=Learner)


# ---- what a CUDA graph asks for -------------------------------------------------------------------------------------


def as_graphs(monkeypatch):
    """Batches are padded, and gradients copied, as where graphs are recorded."""
    init = CompiledDecode.__init__

    def with_graphs(self, *args):
        init(self, *args)
        self.has_graphs = True

    monkeypatch.setattr(CompiledDecode, "__init__", with_graphs)


def loss_and_gradients(copilot, forced, records):
    loss = forced.loss(forced.collate(records))
    copilot.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in copilot.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [*MEMORIES, "encoder"])
def test_padding_to_few_shapes_changes_nothing(kind, monkeypatch):
    pilot = tiny_seq2seq().eval() if kind == "encoder" else tiny_pilot()
    config = CopilotConfig(dropout=0.0) if kind == "encoder" else CopilotConfig(memory=kind, dropout=0.0)
    copilot, found = trained_like(pilot, config), []
    inputs = varied_batch(0)
    if kind == "encoder":
        inputs["labels"] = torch.randint(5, 40, (3, 5))
    for graphs in (False, True):
        if graphs:
            as_graphs(monkeypatch)
        with TeacherForced(copilot, pilot, None, "eager") as forced:
            records = forced.read(inputs, lambda: pilot(**inputs))
            shape = tuple(forced.collate(records).inputs["is_start"].shape)
            found.append(loss_and_gradients(copilot, forced, records))
        assert (shape == (4, 16)) is graphs
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_no_row_reads_nothing():
    """Nor one without a document: what a softmax over nothing gives is the kernel's own."""
    visible = Ragged.of([2, 1, 3], powers_of_two).visible()
    assert visible.shape == (4, 16) and visible.sum(1).tolist() == [2, 1, 3, 1]


def test_few_shapes():
    """Of 16 documents of up to 256 tokens, with any number of labels."""
    assert len({powers_of_two(rows, size) for rows in range(9, 17) for size in range(1, 257)}) == 5
    assert (
        powers_of_two(1, 1) == (1, 16) and powers_of_two(16, 256) == (16, 256) and powers_of_two(17, 257) == (32, 512)
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_outlive_the_next_pass(keeps, monkeypatch):
    """A pass of a CUDA graph writes over what the last one gave, gradients too."""
    as_graphs(monkeypatch)
    given, call = [], CompiledDecode.__call__

    def writes_over(self, *args):
        for gradient in given:
            gradient.fill_(torch.nan)
        given.clear()
        return call(self, *args)

    def run_in_parts():
        pilot = tiny_pilot()
        learner = CopilotLearner(trained_like(pilot), pilot, num_training_steps=2, compile_backend="eager")
        for parameter in learner.copilot.layers.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: given.append(parameter.grad))
        monkeypatch.setattr(type(learner), "room", 7)  # one document in a batch
        observe(learner, pilot, varied_batch(0))
        learner.step()
        return learner

    plain = weights(run_in_parts())
    monkeypatch.setattr(CompiledDecode, "__call__", writes_over)
    if not keeps:
        monkeypatch.setattr("hf_copilot.training.optimizer.CopilotOptimizer._keep_gradients", lambda *_: None)
    learner = run_in_parts()
    assert (learner.skipped_steps == 0) is keeps and torch.equal(weights(learner), plain) is keeps
