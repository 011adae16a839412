"""Counts what a device would be asked for: operators dispatched, and calls that wait for it.

On a GPU every operator is a launch, and every call that needs a value on the CPU waits for all launches before it.
Both can be counted without one; waits in training on a GPU that is pretended, where an event that is looked at before
the first use of a copy is counted by itself.

    python -m benchmarks.counting

beside a Llama of three layers, whose own operators are left out: what the learner adds to a forward of 16 documents,
one step of a default Copilot, and one more token.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import table
from benchmarks.pretended import DEVICE, pretended_gpu
from benchmarks.taped import pretended_graphs
from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor, CopilotModel, copilot_for
from hf_copilot.generation.follower import Follower

VALUES = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__}
VALUES |= {torch.Tensor.__index__, torch.Tensor.numpy, torch.Tensor.cpu, torch.equal, torch.Tensor.equal}
SIZES = {torch.Tensor.nonzero, torch.nonzero, torch.unique, torch.Tensor.unique, torch.unique_consecutive}
VIEWS = {"view", "_unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select"}
VIEWS |= {"alias", "detach", "split", "split_with_sizes", "unbind", "_reshape_alias", "as_strided", "unfold"}


class Waits(TorchFunctionMode):
    """Calls that give a value, or a size that depends on one, to the CPU."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in VALUES | SIZES:
            self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Operators that are launched; views are not."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Count:
    """`with Count() as count:` and then `count.operators`, `count.waits`."""

    def __enter__(self) -> Count:
        self._operators, self._waits = Operators(), Waits()
        self._waits.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._operators.__exit__(*exception)
        self._waits.__exit__(*exception)

    @property
    def operators(self) -> int:
        return self._operators.calls.total()

    @property
    def waits(self) -> int:
        return self._waits.calls.total()

    def __repr__(self) -> str:
        operators, waits = self._operators.calls, self._waits.calls
        return f"{self.operators} operators {dict(operators.most_common(12))}, {self.waits} waits {dict(waits)}"


SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
HOW: dict[str, dict[str, Any]] = {"greedy": {"rows": 2}, "beams": {"rows": 2, "num_beams": 3}}
SHORT, LONG = 4, 8  # tokens that are generated


def small_pilot() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def token(
    pilot: PreTrainedModel, copilot: CopilotModel | None, rows: int, recorded: bool = False, **how: Any
) -> tuple[float, float]:
    """Operators and waits of one more token, of the Pilot and, where there is one, the Copilot; not those that are
    recorded as a CUDA graph."""
    ids, counts = torch.randint(5, 40, (rows, 8), generator=torch.Generator().manual_seed(0)), []
    for tokens in (SHORT, LONG):
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **how}
        with pretended_graphs():
            processors = [] if copilot is None else [CopilotLogitsProcessor(copilot, pilot, cuda_graphs=recorded)]
        with Count() as count:
            pilot.generate(ids, logits_processor=processors, **settings)
        for processor in processors:
            processor.detach()
        counts.append(count)
    short, long = counts
    return (long.operators - short.operators) / (LONG - SHORT), (long.waits - short.waits) / (LONG - SHORT)


def documents(count: int) -> dict[str, torch.Tensor]:
    """Documents of 32 tokens, the last 5 to 12 of them labelled."""
    ids = torch.randint(5, 40, (count, 32))
    labels = ids.clone()
    for i in range(count):
        labels[i, : 20 + i % 8] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def training_round(memory: str, count: int) -> tuple[int, int]:
    """Operators of the learner's look at a forward, beyond the Pilot's own, and of one step."""
    pilot = small_pilot()
    learner = CopilotLearner(copilot_for(pilot, CopilotConfig(memory=memory)), pilot, 4, steps_per_round=1)
    for _ in range(2):
        inputs = documents(count)
        with Count() as alone:
            pilot(**inputs)
        with Count() as look, learner.observe(inputs):
            pilot(**inputs)
        with Count() as step:
            learner.step()
    return look.operators - alone.operators, step.operators


def waits_of_a_round(
    memory: str, count: int, is_frozen: bool = False, own_stream: bool = False
) -> tuple[Counter, Counter, torch.Tensor]:
    """Waits of the same look and step on a pretended GPU, by name, and the Copilot's weights after them. With a frozen
    embedding the log leaves X̃ out, where a comparison on the device says that the tokens give it."""
    torch.manual_seed(0)
    batches = [documents(count) for _ in range(2)]
    with pretended_gpu() as gpu:
        pilot = small_pilot().to(DEVICE)
        pilot.config.use_cache = False
        pilot.get_input_embeddings().weight.requires_grad_(not is_frozen)
        copilot = copilot_for(pilot, CopilotConfig(memory=memory))
        learner = CopilotLearner(copilot, pilot, 4, steps_per_round=1, own_stream=own_stream)
        for batch in batches:
            inputs = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
            with gpu.counted() as alone:
                pilot(**inputs)
            with gpu.counted() as look, learner.observe(inputs):
                pilot(**inputs)
            with gpu.counted() as step:
                learner.step()
        weights = torch.cat([parameter.detach().cpu().flatten() for parameter in learner.copilot.parameters()])
        learner.stream.close()
    return look - alone, step, weights


def main() -> None:
    logging.set_verbosity_error()
    Follower.waits, rows = False, []  # as on an accelerator
    pilot = small_pilot().eval()
    for memory in ("tokens", "pilot"):
        operators, waits = training_round(memory, 16), waits_of_a_round(memory, 16)[:2]
        found = {
            name: (count, waited.total() - waited["event"])
            for name, count, waited in zip(("look at a forward", "step"), operators, waits, strict=True)
        }
        copilot = copilot_for(pilot, CopilotConfig(memory=memory))
        for (name, how), recorded in product(HOW.items(), (False, True)):
            alone, both = token(pilot, None, **how), token(pilot, copilot, recorded=recorded, **how)
            name = f"token, {name}, beside a CUDA graph" if recorded else f"token, {name}"
            found[name] = tuple(b - a for a, b in zip(alone, both, strict=True))
        rows += [
            {"memory": memory, "of": name, "operators": operators, "waits": waits}
            for name, (operators, waits) in found.items()
        ]
    print(table(rows))


if __name__ == "__main__":
    main()
