"""Exact scores of all items of a catalogue after one prompt: their tokens form a trie, scored in one forward.

The inner nodes of the trie stand behind the prompt as one sequence in which each sees the prompt and its ancestors
alone, so that prompt and shared beginnings are computed once. Shapes: n tokens of the prompt, N inner nodes, Q = N + 1
queries (the end of the prompt is the root), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.accuracy.scoring import Rectified
from hf_copilot import CopilotConfig
from hf_copilot.model.discrepancy import fuse, sparse_discrepancy
from hf_copilot.model.memory import memory_of
from hf_copilot.model.modeling_copilot import rotary_positions
from hf_copilot.pilot.tap import PilotStates, PilotTap


@dataclass
class Trie:
    """Token sequences of equal length, one for each item; nodes are numbered level by level, 0 is the root."""

    tokens: torch.Tensor  # [Q] the token of each inner node; of the root 0
    parents: torch.Tensor  # [Q] of the root 0
    depths: torch.Tensor  # [Q]
    sees: torch.Tensor  # [Q, Q] bool: ancestors and itself
    items: torch.Tensor  # [items, length] the inner nodes on each item's way, from the root
    item_tokens: torch.Tensor  # [items, length] the token that is read at each of them

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Trie:
        """
        Raises:
            ValueError: If the sequences differ in length.
        """
        if len({len(sequence) for sequence in sequences}) != 1:
            raise ValueError("The items' token sequences must have one length: pad their numbers with zeros.")
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for depth in range(1, len(sequences[0])):
            for sequence in sequences:
                nodes.setdefault(tuple(sequence[:depth]), len(nodes))
        sees = torch.eye(len(nodes), dtype=torch.bool)
        for prefix, node in nodes.items():
            if prefix:
                sees[node] |= sees[nodes[prefix[:-1]]]
        ways = [[nodes[tuple(sequence[:depth])] for depth in range(len(sequence))] for sequence in sequences]
        return cls(
            torch.tensor([prefix[-1] if prefix else 0 for prefix in nodes]),
            torch.tensor([nodes[prefix[:-1]] for prefix in nodes]),
            torch.tensor([len(prefix) for prefix in nodes]),
            sees,
            torch.tensor(ways),
            torch.tensor(sequences),
        )


@torch.no_grad()
def item_scores(model: Rectified, trie: Trie, prompt: list[int]) -> torch.Tensor:
    """log p̃ of every item after the prompt, `[items]` float32."""
    device, start = model.pilot.device, len(prompt) - 1
    inner = trie.tokens[1:]
    ids = torch.cat([torch.tensor(prompt), inner]).to(device)  # [n + N]
    sees = _sees(trie, len(prompt)).to(device)  # [n + N, n + N]
    positions = torch.cat([torch.arange(start), start + trie.depths]).to(device)  # [n + N]
    mask = torch.zeros(sees.shape, dtype=model.pilot.dtype, device=device).masked_fill(~sees, -torch.inf)
    caught: list[PilotStates] = []
    config = model.learner.copilot.config if model.learner else None
    with PilotTap(model.pilot, config or CopilotConfig(), caught.append, lambda: True):
        out = model.pilot(input_ids=ids[None], attention_mask=mask[None, None], position_ids=positions[None])
    logits = out.logits[0, start:].float()  # [Q, V]
    scores = logits.log_softmax(-1)  # [Q, V]
    if model.learner is not None:
        correction = _correction(model, trie, caught[0], logits, sees, positions, start)  # [Q, V]
        scores = fuse(scores, correction, model.strength, config.fusion)
    return scores.cpu()[trie.items, trie.item_tokens].sum(1)


def _sees(trie: Trie, prompt: int) -> torch.Tensor:
    """Which position sees which, `[n + N, n + N]` bool."""
    total = prompt + len(trie.tokens) - 1
    sees = torch.ones(total, total, dtype=torch.bool).tril()
    sees[prompt:, prompt:] = trie.sees[1:, 1:]
    return sees


def _correction(
    model: Rectified,
    trie: Trie,
    states: PilotStates,
    logits: torch.Tensor,
    sees: torch.Tensor,
    positions: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """f at every query, `[Q, V]`: X̃ of what it sees, h of what it sees at its lag (or its tokens), ℓ of its parent."""
    copilot, device = model.learner.copilot.eval(), logits.device
    parents, tokens = trie.parents.to(device), trie.tokens.to(device)  # [Q], [Q]
    mistake = sparse_discrepancy(logits[parents], tokens, copilot.config.top_k)  # of the root it is not read
    memory, reads = memory_of(copilot.config), sees[start:]  # [Q, n + N]
    itself = torch.eye(len(sees), dtype=torch.bool, device=device)[start:]  # [Q, n + N]
    reads_state = reads & ~itself if memory.lag else reads  # [Q, n + N]
    reads_entry = torch.stack([reads, reads_state], dim=-1) if copilot.config.reads_states else reads
    is_start = torch.zeros(1, len(tokens), dtype=torch.bool, device=device)
    is_start[:, 0] = True
    output = copilot(
        mistake.indices[None],
        mistake.values[None],
        is_start,
        memory.entries(states.input_ids, states.embeddings, states.hidden_states),  # [1, entries, ...]
        reads_entry.flatten(1)[None],  # [1, Q, entries]
        trie.sees.to(device)[None],
        **rotary_positions(copilot.config, positions[None, start:], positions[None]),
        return_logits=True,
        lent=model.learner.forced.lent,
    )
    return output.logits[0].float()
