"""lm-evaluation-harness: local tasks, no network. λ = 0 is its own `hf` model; a run begins at the continuation."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_distributed import in_two_processes
from tiny import addition, teacher_forced, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like

from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.cli.__main__ import main

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hf_copilot.evaluation.tasks import check_shares, compare_on_tasks, manager_of  # noqa: E402
from hf_copilot.lm_eval import CopilotLM  # noqa: E402

PER_TOKEN = 1e-5
PAIRS = [("12+30=", "42"), ("12+30=", "7"), ("5+5=", "10"), ("5+5=1", "0"), ("", "1+1=2"), ("49+49=", "98 or so")]
CONTINUATIONS = [len(continuation) for _, continuation in PAIRS]  # a token is a character
TEXTS = ["1+1=2 and 2+2=4", "a long text. " * 40, "7"]
MEMORIES = {"tokens": {}, "states": {"memory": "pilot"}}


@pytest.fixture(params=MEMORIES)
def copilot(request, pilot):
    return trained_like(pilot, CopilotConfig(**MEMORIES[request.param]))


def requests(kind: str, arguments: list) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def model(pilot, copilot, strength=None, **kwargs) -> CopilotLM:
    return CopilotLM(pilot, copilot, strength, tokenizer=tiny_tokenizer(), **kwargs)


def hf(pilot, **kwargs) -> HFLM:
    return HFLM(pilot, tokenizer=tiny_tokenizer(), **kwargs)


GENERATION = {"until": [" "], "max_gen_toks": 12, "do_sample": False}


def answers(lm, order=None) -> dict[str, list]:
    """What it says to all three kinds of requests, given in some order."""
    found = {}
    for kind, arguments in {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": [(prompt, GENERATION) for prompt in dict(PAIRS) if prompt],
    }.items():
        places = list(range(len(arguments)))
        random.Random(order).shuffle(places) if order is not None else None
        said = getattr(lm, kind)(requests(kind, [arguments[i] for i in places]), disable_tqdm=True)
        found[kind] = [said[places.index(i)] for i in range(len(arguments))]
    return found


def assert_near(found, expected, tolerance: float) -> None:
    """Per token; text and greedy flags are the same."""
    assert found["generate_until"] == expected["generate_until"]
    assert [greedy for _, greedy in found["loglikelihood"]] == [greedy for _, greedy in expected["loglikelihood"]]
    pairs = [
        *zip(
            *[[value for value, _ in said["loglikelihood"]] for said in (found, expected)], CONTINUATIONS, strict=True
        ),
        *zip(found["loglikelihood_rolling"], expected["loglikelihood_rolling"], map(len, TEXTS), strict=True),
    ]
    assert max(abs(a - b) / tokens for a, b, tokens in pairs) <= tolerance


@pytest.mark.parametrize("batch_size", [1, 4])
def test_at_strength_0_it_is_their_own_model_to_the_last_digit(pilot, copilot, batch_size):
    assert answers(model(pilot, copilot, 0.0, batch_size=batch_size)) == answers(hf(pilot, batch_size=batch_size))


def test_a_copilot_that_changes_nothing_gives_the_likelihoods_of_their_model(pilot, copilot):
    """The same path as any other λ. With its cache of logits, `hf` takes those of a wrong token (lm-eval 0.4.13) where
    two requests have the same tokens and other borders."""
    copilot.get_submodule(copilot.last_map).weight.data.zero_()
    expected = answers(hf(pilot, batch_size=4, logits_cache=False))
    assert_near(answers(model(pilot, copilot, 1.0, batch_size=4)), expected, PER_TOKEN)


def test_the_order_and_the_batch_size_change_nothing(pilot, copilot):
    expected = answers(model(pilot, copilot))
    for batch_size, order in ((1, 1), (3, 2), (16, 3), ("auto", 4)):
        found = answers(model(pilot, copilot, batch_size=batch_size, max_batch_size=2), order)
        assert_near(found, expected, PER_TOKEN)
    assert expected != answers(hf(pilot))


def test_a_run_begins_at_the_continuation(pilot, copilot):
    """Also where another request has the same tokens and another border, whose logits `hf` shares."""
    lm, tokenizer, strength = model(pilot, copilot), tiny_tokenizer(), copilot.config.strength
    pairs = [("5+5=", "10"), ("5+5=1", "0"), ("5+5", "=10")]
    for (context, continuation), (found, _) in zip(
        pairs, lm.loglikelihood(requests("loglikelihood", pairs)), strict=True
    ):
        ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
        border = len(context)
        f = teacher_forced(copilot, pilot, ids, border)[:-1]  # [m, V]
        logits = pilot(input_ids=ids[None]).logits[0, border - 1 : -1]
        expected = (logits + strength * f).log_softmax(-1).gather(1, ids[border:, None]).sum()
        assert abs(found - expected.item()) <= 1e-4


def test_text_is_that_of_the_processor(pilot, copilot):
    tokenizer, prompts = tiny_tokenizer(), ["12+30=", "5+5="]
    found = model(pilot, copilot, batch_size=2).generate_until(
        requests("generate_until", [(prompt, GENERATION) for prompt in prompts])
    )
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with CopilotLogitsProcessor(copilot, pilot) as processor:
            out = pilot.generate(ids, logits_processor=[processor], max_new_tokens=12, do_sample=False)
        whole = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert whole.startswith(text) and text == whole.split(" ")[0][: len(text)]
    assert not any(module._forward_hooks for module in pilot.modules())


def test_beside_an_encoder_decoder():
    pilot = tiny_seq2seq().eval()
    copilot = trained_like(pilot)
    assert answers(model(pilot, copilot, 0.0)) == answers(hf(pilot))
    expected = answers(model(pilot, copilot))
    assert_near(answers(model(pilot, copilot, batch_size=4), order=1), expected, PER_TOKEN)
    assert expected != answers(hf(pilot))


# ---- tasks ---------------------------------------------------------------------------------------------------------


def write_tasks(folder, rows: int = 6) -> None:
    """Sums as multiple choice, as text and as a perplexity."""
    data = [{"question": row["prompt"], "answer": row["completion"]} for row in addition(rows)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
    }
    text = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": ""}
    rolling = {"doc_to_text": "", "doc_to_target": "{{question}}{{answer}}"}
    tasks = {
        "sums_choice": text
        | {"output_type": "multiple_choice", "doc_to_choice": "{{[answer, '1', '22']}}", "doc_to_target": 0},
        "sums_text": text | {"output_type": "generate_until", "generation_kwargs": GENERATION},
        "sums_rolling": rolling
        | {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))


@pytest.fixture
def folder(tmp_path, pilot):
    write_tasks(tmp_path)
    pilot.save_pretrained(tmp_path / "pilot")
    tiny_tokenizer().save_pretrained(tmp_path / "pilot")
    trained_like(pilot).save_pretrained(tmp_path / "copilot")
    return tmp_path


TASKS = ["sums_choice", "sums_text", "sums_rolling"]


def test_tasks_of_all_three_kinds(folder):
    """By name, from folders; with λ = 0 the results of `hf`."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    pilot, copilot = f"pretrained={folder}/pilot", f"copilot={folder}/copilot"
    results = {}
    for name, arguments in {
        "hf": ("hf", pilot),
        "off": ("hf-copilot", f"{pilot},{copilot},strength=0"),
        "on": ("hf-copilot", f"{pilot},{copilot}"),
    }.items():
        found = lm_eval.simple_evaluate(
            arguments[0], arguments[1], TASKS, task_manager=manager, device="cpu", bootstrap_iters=0
        )
        results[name] = {task: [sample["resps"] for sample in found["samples"][task]] for task in TASKS}
    assert results["off"] == results["hf"]
    assert all(results["on"][task] != results["hf"][task] for task in TASKS)
    assert found["config"]["copilot_strength"] == 1.0


def test_what_does_not_fit_raises(pilot, copilot):
    with pytest.raises(ValueError, match="vocabulary rows"):
        model(pilot, trained_like(tiny_pilot(vocab_size=64)))
    with pytest.raises(ValueError, match="finite"):
        model(pilot, copilot, -1.0)
    with pytest.raises(NotImplementedError, match="parallelize=True"):
        model(pilot, copilot, tp_plan="auto")


# ---- several processes ----------------------------------------------------------------------------------------------

THEIRS = """
import json, sys
import hf_copilot.lm_eval
from accelerate import PartialState
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1], sys.argv[2].split(",")
found = simple_evaluate("hf-copilot", f"pretrained={folder}/pilot,copilot={folder}/copilot", tasks, device="cpu",
    task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0)
rank = PartialState().process_index
open(f"{folder}/{rank}.json", "x").write(json.dumps(found and {task: found["results"][task] for task in tasks}))
"""


def figures(file) -> dict[str, list]:
    return {
        title: [(entry["metric"], entry["pilot"], entry["rectified"], *(entry["interval"] or ())) for entry in group]
        for title, group in json.loads(file.read_text())["results"].items()
    }


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(folder):
    """Seven documents and rows, which two can't share alike."""
    write_tasks(folder, rows=7)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition(7)))
    given = ["eval", folder / "pilot", folder / "copilot", "--tasks", ",".join(TASKS), "--include_path", folder]
    given += ["--data", rows, "--max_new_tokens", 4, "--device", "cpu", "--output_file"]
    assert main([str(argument) for argument in (*given, folder / "one.json")]) == 0
    done = in_two_processes("accelerate", "-m", "hf_copilot.cli", *given, folder / "two.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Passed an already-initialized model") == 2  # by lm-eval, in each process
    assert done.stdout.count("sums_choice, λ = 1") == 1  # the main one alone says what is found
    one, two = figures(folder / "one.json"), figures(folder / "two.json")
    assert one.keys() == two.keys() and len(one) == 4
    for title, entries in one.items():
        for expected, found in zip(entries, two[title], strict=True):
            assert found[0] == expected[0] and found[1:] == pytest.approx(expected[1:], rel=1e-4, abs=1e-6), title


def test_a_task_too_small_for_the_processes_is_named(folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    check_shares(manager, TASKS, None, 6)
    for limit, processes in ((None, 7), (1, 2)):
        with pytest.raises(ValueError, match="sums_choice has . documents for . processes"):
            check_shares(manager, TASKS, limit, processes)


@pytest.mark.slow
def test_groups_and_patterns(folder):
    """A group has a figure of its own, without an interval; names may be a pattern."""
    group = {"group": "all_sums", "task": ["sums_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    pilot, copilot = tiny_pilot(), trained_like(tiny_pilot())
    found = {}
    for name in ("all_sums", " sums_ch*"):
        found[name] = compare_on_tasks(pilot, copilot, tiny_tokenizer(), [name], 1.0, str(folder))
    assert [*found[" sums_ch*"]] == ["sums_choice"] and {*found["all_sums"]} == {"all_sums", "sums_choice"}
    (own,), (acc, _) = found["all_sums"]["all_sums"], found["all_sums"]["sums_choice"]
    assert own.metric == "acc" and own.interval is None
    assert (own.pilot, own.rectified) == pytest.approx((acc.pilot, acc.rectified))


def test_a_folder_that_has_all_tasks_is_read_alone(folder, monkeypatch):
    """lm-eval's own are thousands of files, and read where one of them is asked for."""
    assert set(manager_of(TASKS, str(folder)).all_tasks) == set(TASKS)
    asked = []
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **given: asked.append(given) or SimpleNamespace(all_subtasks=TASKS)
    )
    manager_of([*TASKS, "piqa"], "folder")
    manager_of(["piqa"], None)
    assert asked[1:] == [{"include_path": "folder"}, {"include_path": None}]


@pytest.mark.slow
def test_two_processes_of_their_own(folder):
    """`accelerate launch` of lm-eval with the model's name."""
    (folder / "theirs.py").write_text(THEIRS)
    done = in_two_processes("accelerate", folder / "theirs.py", folder, ",".join(TASKS))
    assert done.returncode == 0, done.stderr[-3000:]
    found, others = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert others is None
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = CopilotLM(f"{folder}/pilot", f"{folder}/copilot", device="cpu")
    alone = lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)["results"]
    for task in TASKS:
        numbers = {name: value for name, value in alone[task].items() if isinstance(value, float)}
        assert numbers and {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
