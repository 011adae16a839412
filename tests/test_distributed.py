"""Two processes (DDP and FSDP2 over gloo): one Copilot on both, and what one process would have learnt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import OBJECTIVES, addition, tiny_tokenizer
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import evaluated, learn
from versions import CANT_RESUME_ON_TWO_CPU_PROCESSES, fails_with

from hf_copilot import CopilotLearner, MistakeLedger, copilot_for
from hf_copilot.ledger.row_tokens import RowTokens

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


def in_two_processes(launcher: str, *argv: object) -> subprocess.CompletedProcess:
    """What a launcher makes of a script, or of `-m` and a module, with its arguments."""
    command = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-m", *command, *map(str, argv)]
    return subprocess.run(run, capture_output=True, text=True, timeout=400, env=environment)


def launch(launcher: str, script: str, folder: Path, *more: str) -> list[dict]:
    done = in_two_processes(launcher, TESTS / script, folder, *more)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module", params=["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, *launch(request.param, "two_processes.py", folder)


def test_both_have_the_same_copilot_and_the_parents_pilot(ranks):
    _, first, second = ranks
    assert first["processes"] == 2
    assert first["copilot"] == second["copilot"]
    assert first["pilot"] == second["pilot"] == first["plain_pilot"] == second["plain_pilot"]


def test_both_write_one_ledger_of_the_rows_that_each_has_read(ranks):
    folder, *both = ranks
    rows, ledger = addition(64), MistakeLedger.load(folder / "straight")
    assert len(RowTokens(ledger, rows, tiny_tokenizer()).confusions()) > 0
    assert ledger.documents["step"].tolist() == sorted([*range(1, 7)] * 8)
    read = [tiny_tokenizer().decode(ids).replace(" ", "") for rank in both for ids in rank["documents"]]
    named = ["".join(rows[int(row)].values()) for row in ledger.documents["row"]]
    assert sorted(read) == sorted(named)  # a record ends before the last token, which is the end


def test_each_has_its_own_log_and_all_log_the_same_metrics(ranks):
    _, first, second = ranks
    assert len(first["documents"]) == len(second["documents"]) == 24
    assert first["documents"] != second["documents"]
    names = ("copilot_loss", "pilot_nll", "rectified_nll")
    for mine, other in zip(first["logs"], second["logs"], strict=True):
        assert [mine[name] for name in names] == [other[name] for name in names]


@fails_with(CANT_RESUME_ON_TWO_CPU_PROCESSES)
def test_resumed_equals_uninterrupted_on_both(ranks):
    _, *both = ranks
    for rank in both:
        assert rank["resumed"] == [rank["pilot"], rank["copilot"]]


@pytest.mark.parametrize("share", ["shared", "one_has_none"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_learn_what_one_learns(ranks, share, objective):
    """The same drawn documents, spread over two processes or all in one of them."""
    folder, *both = ranks
    alone = learn([0, 1, 2], OBJECTIVES[objective])
    expected = torch.cat([p.detach().flatten() for p in alone.copilot.parameters()])
    loss = alone.pop_metrics()["copilot_loss"]
    for index, rank in enumerate(both):
        found = torch.load(folder / f"{share}-{objective}-{index}.pt")
        assert torch.allclose(found, expected, atol=2e-5)
        assert rank["learnt"][f"{share}-{objective}"] == pytest.approx(loss, rel=1e-5)


def test_repeated_rows_of_an_evaluation_are_not_counted_twice(ranks, tmp_path):
    _, first, second = ranks
    for form, alone in evaluated(tmp_path).items():
        for name in ("eval_pilot_nll", "eval_rectified_nll", "eval_rectified_token_accuracy"):
            found = [rank["eval"][form][name] for rank in (first, second)]
            assert found[0] == found[1] == pytest.approx(alone[name], rel=1e-5)


def test_a_failure_on_one_process_leaves_the_step_out_on_both(ranks):
    """The second of three steps failed on the second process alone."""
    _, *both = ranks
    for failure in ("no_memory", "not_finite"):
        first, second = (rank["failed"][failure] for rank in both)
        assert first == second and first["skipped"] == 1
        assert first["copilots"][0] == first["copilots"][1] != first["copilots"][2]


QUICK, OTHERS = ("full", "lora", "pilot_states"), ("tied", "sharded_states")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return launch("torchrun", "sharded_processes.py", tmp_path_factory.mktemp("sharded"), *QUICK)


@pytest.fixture(scope="module")
def sharded_in_other_ways(tmp_path_factory):
    return launch("torchrun", "sharded_processes.py", tmp_path_factory.mktemp("others"), *OTHERS)


def check_sharded(first: dict, second: dict) -> None:
    """The Pilot is SFTTrainer's, both processes have one Copilot, resumed equals uninterrupted."""
    assert first["sharded"] and second["sharded"]
    assert {*first["pilots"], *second["pilots"]} == {first["plain_pilot"]}
    assert len({*first["copilots"], *second["copilots"]}) == 1
    assert first["eval_rectified_nll"] == second["eval_rectified_nll"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", QUICK)
def test_a_sharded_pilot_is_the_parents_and_resumes(sharded, variant):
    check_sharded(*(rank[variant] for rank in sharded))


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_a_pilot_that_is_sharded_in_another_way(sharded_in_other_ways, variant):
    check_sharded(*(rank[variant] for rank in sharded_in_other_ways))


@pytest.mark.slow
def test_a_sharded_pilot_teaches_what_a_whole_one_does(sharded, ranks):
    _, whole, _ = ranks
    losses = [[entry["copilot_loss"] for entry in logs] for logs in (sharded[0]["full"]["logs"], whole["logs"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sharded_copilot_raises(pilot):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        copilot = fully_shard(copilot_for(pilot), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match="copilot_peft_config"):
            CopilotLearner(copilot, pilot)
    finally:
        dist.destroy_process_group()
