"""Is what holds on a CPU true on an accelerator? In a minute, with a small Pilot in bf16 and both kinds of Copilot.

    python -m benchmarks.check_device --device cuda

Training, with the Copilot as it is and compiled, its draws in one batch and in two: the Pilot's weights are those
without a learner, bit for bit. A run that is saved, loaded and goes on ends with the same Copilot as one that does not
stop, and so does one that waits for every copy of its log. On CUDA, so does one whose rounds have a stream of their
own, and its Pilot is the same too. The losses of a compiled Copilot are those of another.
Generation: f at every step is that of a teacher-forced pass on the text, in a padded batch, with greedy search, with
beams and with a static cache, its steps run and recorded as CUDA graphs (pretended ones on a CPU); tokens of another
run raise. Each line says what was compared, and the largest difference.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.taped import pretended_graphs
from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor, copilot_for
from hf_copilot.training import beside
from hf_copilot.training.checkpoint import load_state, load_weights, save_state, save_weights
from hf_copilot.training.teacher_forced import TeacherForced
from hf_copilot.training.transfer import Transfer

SHAPE = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STEPS, LABELLED, NEW = 6, 10, 12
ROWS, LENGTH = 8, 32  # of a micro-batch
DECODINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
TOLERANCE = 1e-3  # of f in float32: another order of sums
TOLERANCE_OF_LOSS = 1e-2  # in nats, under autocast: other roundings to bf16


def make_pilot(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, dtype)


def make_batch(device: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH), generator=generator).to(device)
    labels = ids.clone()
    labels[:, :-LABELLED] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# ---- training -------------------------------------------------------------------------------------------------------


def train(device: str, pilot: LlamaForCausalLM, learner: CopilotLearner | None, optimizer: Any, steps: range) -> None:
    for step in steps:
        for batch in make_batch(device, 2 * step), make_batch(device, 2 * step + 1):
            with learner.observe(batch) if learner else nullcontext(), torch.autocast(device, torch.bfloat16):
                loss = pilot(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if learner:
            learner.step()


def make_learner(
    pilot: LlamaForCausalLM, memory: str, backend: str | None, own_stream: bool = False
) -> CopilotLearner:
    copilot = copilot_for(pilot, CopilotConfig(memory=memory))
    settings = {"autocast_dtype": torch.bfloat16, "compile_backend": backend, "own_stream": own_stream}
    learner = CopilotLearner(copilot, pilot, STEPS, **settings)
    learner.optimizer.limit = ROWS * LENGTH  # of a draw from two micro-batches, no more than one's in a batch
    return learner


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


def check_training(
    device: str, memory: str, losses: dict[str, float], backend: str | None = None
) -> Iterator[tuple[str, float, float]]:
    """`losses` keeps that of a whole eager run, by the memory, for a compiled one."""
    pilots, copilots, found = [], [], []
    runs = ("alone", "beside", "stopped", "waiting", *(("own stream",) if device == beside.KIND else ()))
    for run in runs:
        pilot = make_pilot(device, torch.float32)
        optimizer = torch.optim.AdamW(pilot.parameters(), 1e-3)
        learner = None if run == "alone" else make_learner(pilot, memory, backend, run == "own stream")
        stop = STEPS // 2 if run == "stopped" else STEPS
        with copies_at_once() if run == "waiting" else nullcontext():
            train(device, pilot, learner, optimizer, range(stop))
        if run == "stopped":
            learner = gone_on(pilot, learner, memory, backend)
            train(device, pilot, learner, optimizer, range(stop, STEPS))
        pilots.append(weights(pilot))
        if learner:
            learner.close()
            copilots.append(weights(learner.copilot))
            found.append(learner.pop_metrics()["copilot_loss"])
    how = backend or "eager"
    yield f"the Pilot with a learner and without, {how}", float((pilots[0] - pilots[1]).abs().max()), 0.0
    yield f"the Copilot of a run that went on, {how}", float((copilots[0] - copilots[1]).abs().max()), 0.0
    yield f"the Copilot whose log was waited for, {how}", float((copilots[0] - copilots[2]).abs().max()), 0.0
    if "own stream" in runs:
        yield f"the Copilot with a stream of its own, {how}", float((copilots[0] - copilots[3]).abs().max()), 0.0
        yield f"the Pilot beside that stream, {how}", float((pilots[0] - pilots[4]).abs().max()), 0.0
    if backend is None:
        losses[memory] = found[0]
    else:
        yield "the loss, compiled and not", abs(found[0] - losses[memory]), TOLERANCE_OF_LOSS


def copies_at_once() -> AbstractContextManager:
    """Inside the CPU waits for every copy of the log."""
    return patch.object(Transfer, "send", staticmethod(lambda tensor, device: tensor.to(device)))


def gone_on(pilot: LlamaForCausalLM, learner: CopilotLearner, memory: str, backend: str | None) -> CopilotLearner:
    """Another learner, of what one has saved."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(learner, folder)
        save_state(learner, Path(folder) / "state")
        learner.close()
        fresh = make_learner(pilot, memory, backend)
        load_weights(fresh, folder)
        load_state(fresh, Path(folder) / "state")
    return fresh


# ---- generation -----------------------------------------------------------------------------------------------------


class Recorder(CopilotLogitsProcessor):
    """Keeps the tokens and f of every call."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rectified = super().__call__(input_ids, scores)
        self.calls.append((input_ids.clone(), self.rectifier.last_correction.clone()))
        return rectified


def check_generation(device: str, memory: str) -> Iterator[tuple[str, float, float]]:
    pilot = make_pilot(device, torch.float32).eval()
    copilot = copilot_for(pilot, CopilotConfig(memory=memory, dropout=0.0)).eval().to(device)
    with torch.no_grad():
        torch.nn.init.normal_(copilot.lm_head.weight, std=0.1)
    ids = make_batch(device, 0)["input_ids"][:3, :9]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for (name, how), recorded in product(DECODINGS.items(), (False, True)):
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "attention_mask": mask} | how
        with pretended_graphs() if device == "cpu" else nullcontext():
            processor = Recorder(copilot, pilot, cuda_graphs=recorded)
        with processor:
            pilot.generate(ids, logits_processor=[processor], **settings)
        copies = how.get("num_beams", 1)
        rows = mask.repeat_interleave(copies, 0).bool()
        name += ", recorded" if recorded else ""
        yield name, max(difference(copilot, pilot, call, rows) for call in processor.calls), TOLERANCE
    yield "tokens of another run", float(not raises(lambda: deceive(copilot, pilot, ids))), 0.0


@torch.no_grad()
def difference(
    copilot: torch.nn.Module, pilot: LlamaForCausalLM, call: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
) -> float:
    """Between f of a call and f of a teacher-forced pass on its rows, one at a time."""
    found = []
    for ids, visible, f in zip(call[0], mask, call[1], strict=True):
        row = torch.cat([ids[: len(visible)][visible], ids[len(visible) :], ids[-1:]])  # [n + 1], the last a label
        row = row[None]
        labels = row.clone()
        labels[:, : int(visible.sum())] = -100
        with TeacherForced(copilot, pilot) as forced:
            records = forced.read({"input_ids": row, "labels": labels}, lambda row=row: pilot(input_ids=row))
            *_, (_, _, correction) = forced.corrections(forced.collate(records))
        found.append(float((correction[-1] - f).abs().max()))
    return max(found)


def deceive(copilot: torch.nn.Module, pilot: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Call a processor for tokens of the right number that its Pilot was not run on."""
    with torch.no_grad(), CopilotLogitsProcessor(copilot, pilot) as processor:
        output = pilot(ids, use_cache=True)
        processor(ids, output.logits[:, -1].float())
        cache = {name: value for name, value in output.items() if isinstance(value, Cache)}
        output = pilot(ids[:, -1:], **cache)
        processor(torch.cat([ids, ids[:, -1:]], dim=1) + 1, output.logits[:, -1].float())


def raises(function: Callable[[], None]) -> bool:
    try:
        function()
    except ValueError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    logging.set_verbosity_error()
    failed = 0
    training = partial(check_training, losses={})
    checks = check_generation, training, partial(training, backend="inductor")  # compiling takes longest
    for check, memory in product(checks, ("tokens", "pilot")):
        for name, found, bound in check(device, memory):
            failed += not found <= bound
            verdict = "ok" if found <= bound else "FAILED"
            print(f"{verdict:7} {memory:7} {name}: {found:.2g} (at most {bound:g})", flush=True)
    if failed:
        raise SystemExit(f"{failed} checks failed.")


if __name__ == "__main__":
    main()
