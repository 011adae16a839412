"""Two processes (DDP over gloo): the same Copilot on both, and what one process would have learnt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import evaluated, learn

from hf_copilot import CopilotConfig

TESTS = Path(__file__).parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    + ["--mixed_precision=no", "--main_process_port={port}", "--dynamo_backend=no"],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(launcher: str, folder: Path) -> list[dict]:
    command = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "ACCELERATE_USE_CPU": "true"}
    script = [sys.executable, "-m", *command, str(TESTS / "two_processes.py"), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module", params=["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, *launch(request.param, folder)


def test_both_have_the_same_copilot_and_the_parents_pilot(ranks):
    _, first, second = ranks
    assert first["processes"] == 2
    assert first["copilot"] == second["copilot"]
    assert first["pilot"] == second["pilot"] == first["plain_pilot"] == second["plain_pilot"]


def test_each_has_its_own_log_and_all_log_the_same_metrics(ranks):
    _, first, second = ranks
    assert len(first["documents"]) == len(second["documents"]) == 24
    assert first["documents"] != second["documents"]
    names = ("copilot_loss", "pilot_nll", "rectified_nll")
    for mine, other in zip(first["logs"], second["logs"], strict=True):
        assert [mine[name] for name in names] == [other[name] for name in names]


def test_resumed_equals_uninterrupted_on_both(ranks):
    _, *both = ranks
    for rank in both:
        assert rank["resumed"] == [rank["pilot"], rank["copilot"]]


@pytest.mark.parametrize("share", ["shared", "one_has_none"])
@pytest.mark.parametrize("objective", ["ours", "paper"])
def test_two_processes_learn_what_one_learns(ranks, share, objective):
    """The same drawn documents, spread over two processes or all in one of them."""
    folder, *both = ranks
    config = CopilotConfig() if objective == "ours" else CopilotConfig.paper(num_hidden_layers=2)
    alone = learn([0, 1, 2], config)
    expected = torch.cat([p.detach().flatten() for p in alone.copilot.parameters()])
    loss = alone.pop_metrics()["copilot_loss"]
    for index, rank in enumerate(both):
        found = torch.load(folder / f"{share}-{objective}-{index}.pt")
        assert torch.allclose(found, expected, atol=2e-5)
        assert rank["learnt"][f"{share}-{objective}"] == pytest.approx(loss, rel=1e-5)


def test_repeated_rows_of_an_evaluation_are_not_counted_twice(ranks, tmp_path):
    _, first, second = ranks
    alone = evaluated(tmp_path)
    for name in ("eval_pilot_nll", "eval_rectified_nll", "eval_rectified_token_accuracy"):
        assert first["eval"][name] == second["eval"][name] == pytest.approx(alone[name], rel=1e-5)
