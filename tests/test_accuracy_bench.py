"""The accuracy bench: its figures are what they say, on data of a few rows."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB_SIZE, tiny_pilot, tiny_tokenizer, trained_like

from benchmarks.accuracy import ensembles, experiments, folding, moves, picture, run
from benchmarks.accuracy.groups import FEEDBACK
from benchmarks.accuracy.inputs import ReadingPrompts, ScheduledFeeding
from benchmarks.accuracy.mistakes import ReservoirLog, WeightedLog
from benchmarks.accuracy.multiple_choice import MULTIPLE_CHOICE, SETS, convert
from benchmarks.accuracy.recommendation import RECOMMENDATION, check_with_beams
from benchmarks.accuracy.report import difference, mean_of, summarise
from benchmarks.accuracy.scoring import Rectified, encode
from benchmarks.accuracy.tasks import ARITHMETIC, MAWPS, TEXT
from benchmarks.accuracy.training import Setting
from benchmarks.accuracy.trie import Trie, item_scores
from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor

SMALL = {
    "pilot": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    "pretraining_steps": 2,
}


def rectified(strength=1.0, **config):
    pilot = tiny_pilot().eval()
    copilot = trained_like(pilot, CopilotConfig(**config))
    return Rectified(pilot, tiny_tokenizer(), CopilotLearner(copilot, pilot), strength)


def alone(model):
    return replace(model, learner=None, strength=0.0)


ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in ((1, 2), (30, 41), (7, 99), (5, 5), (12, 8))]


def test_a_strength_of_zero_is_the_pilot_alone():
    model = rectified(0.0)
    examples = [encode(model.tokenizer, row, 64) for row in ROWS]
    torch.testing.assert_close(
        model.log_likelihoods(examples), alone(model).log_likelihoods(examples), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_all_hits_teacher_forced_are_the_generated_answer(strength):
    """Greedy generation gives a text exactly where each of its tokens is the first choice after those before it."""
    model, examples = rectified(strength), []
    for row in ROWS:
        ids = model.tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        with model.processor() as processor:
            out = model.pilot.generate(**ids, logits_processor=[processor], max_new_tokens=5, do_sample=False)
        prompt = ids["input_ids"].shape[1]
        examples.append({"input_ids": out[0].tolist(), "labels": [-100] * prompt + out[0, prompt:].tolist()})
    hits = model.log_likelihoods(examples)
    assert torch.equal(hits[:, 1], hits[:, 2])
    other = rectified(0.0 if strength else 2.0).log_likelihoods(examples)
    assert not torch.equal(other[:, 1], other[:, 2])


def test_long_prompts_lose_their_beginning():
    example = encode(tiny_tokenizer(), {"prompt": "123456789+", "completion": "12"}, 6)
    assert len(example["input_ids"]) == 6 and example["labels"][:3] == [-100] * 3
    assert tiny_tokenizer().decode(example["input_ids"][:5]).replace(" ", "") == "89+12"


ITEMS = [f"i{number:03d}" for number in (0, 1, 7, 12, 19, 105, 110, 250, 251, 252, 999)]
READS = [
    {},
    {"copilot_input": "discrepancy"},
    {"memory": "pilot"},
    {"memory": "pilot", "hidden_state_lag": 0},
    {"memory": "pilot", "pooled_layers": "second_half"},
    {"vocab_projection": "pilot"},
]


@pytest.mark.parametrize("config", [*READS, None])
def test_a_trie_scores_each_item_as_if_it_stood_alone(config):
    model = rectified(**config) if config is not None else alone(rectified())
    trie = Trie.of([model.tokenizer(item)["input_ids"] for item in ITEMS])
    prompt = "next after 12, 250?"
    scores = item_scores(model, trie, model.tokenizer(prompt)["input_ids"])
    examples = [encode(model.tokenizer, {"prompt": prompt, "completion": item}, 64) for item in ITEMS]
    without_end = [{name: ids[:-1] for name, ids in example.items()} for example in examples]
    expected = model.log_likelihoods(without_end)[:, 0].float()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert len(trie.tokens) < sum(map(len, ITEMS))


@pytest.mark.parametrize("with_copilot", [True, False])
def test_constrained_beam_search_finds_the_exact_scores(monkeypatch, with_copilot):
    monkeypatch.setattr("benchmarks.accuracy.recommendation.CHECKED_BEAMS", 10)
    model = rectified() if with_copilot else alone(rectified())
    trie = Trie.of([model.tokenizer(item)["input_ids"] for item in ITEMS])
    largest, found = check_with_beams(model, trie, ["next after 12?", "and after 250, 999?"])
    assert largest < 1e-3
    assert found >= 0.9  # beams may lose an item whose beginning is unlikely


def test_items_of_unequal_length_raise():
    with pytest.raises(ValueError, match="pad their numbers"):
        Trie.of([[1, 2], [1, 2, 3]])


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Every data set with a few rows, in the form that the bench reads."""
    words = [{"question": f"{i} and {i} ?", "answer": f"that is {2 * i}", "final": str(2 * i)} for i in range(1, 420)]
    equations = [row | {"equation": f"x={i}+{i}"} for i, row in enumerate(words, 1)]
    for split in ("train", "test"):
        write(tmp_path / "gsm8k", split, words if split == "train" else words[:5])
        for name in SETS:
            choices = {"answer": "false", "instruction": "is it so ?\n\nAnswer format: true/false"}
            write(tmp_path / name, split, [choices] * (104 if split == "train" else 5))
    for split, rows in (("train", equations[:40]), ("valid", equations[40:44]), ("test", equations[44:48])):
        write(tmp_path / "mawps", split, rows)
    users = [{"user": u, "items": [1 + (u * i) % 30 for i in range(1, 8)]} for u in range(1, 9)]
    write(tmp_path / "lastfm", "interactions", users)
    return tmp_path


@pytest.fixture(autouse=True)
def short_costs(monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy.arms.COST_STEPS", 2)
    monkeypatch.setattr("benchmarks.accuracy.arms.COST_REPETITIONS", 1)


def test_items_ranked_by_their_counts(tmp_path):
    """Item 1 is met three times in training, item 2 once, item 3 never: ties stand behind one another."""
    folder = tmp_path / "lastfm"
    folder.mkdir()
    users = [[9, 1, 5, 1], [9, 1, 5, 2], [9, 1, 5, 3], [9, 2, 5, 1]]
    rows = [{"user": number, "items": items} for number, items in enumerate(users)]
    (folder / "interactions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figures = RECOMMENDATION.by_count(tmp_path)
    assert figures["N@5"].values == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(6), 1])


OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in (TEXT, RECOMMENDATION, MULTIPLE_CHOICE)]


@pytest.mark.parametrize("task", [MAWPS, *OTHERS], ids=lambda task: task.name)
def test_every_task_runs_and_is_kept(task, data, tmp_path):
    task = replace(task, **SMALL, max_new_tokens=4)
    setting = Setting(task, data, tmp_path / "work")
    runs, costs = run.run_task(setting, seeds=1)
    assert costs["pilot"] == {"training": 1.0, "generation": 1.0} and costs["wider"]["training"] > 0
    assert set(runs[0]) >= {
        "pilot",
        "paper",
        "copilot",
        "copilot, λ chosen",
        "copilot, λ by accuracy",
        "deeper",
        "wider",
        "longer",
    }
    both = runs[0]["copilot"]["parameters"]
    assert min(runs[0][arm]["parameters"] for arm in ("deeper", "wider")) >= both > runs[0]["pilot"]["parameters"]
    assert len(runs[0]["wider"][f"{task.metric} on valid"]) == 2
    checks = runs[0]["copilot"].get("checks", {})
    assert bool(checks) == (task.name == "recommendation") and "checks" not in runs[0]["paper"]
    assert checks.get("largest difference of a score", 0.0) < 1e-3
    items = len(task.splits(data, 0).test)
    assert all(len(arm["figures"]["nll"][0]) == items for arm in runs[0].values())
    (tmp_path / "work" / "base").rename(tmp_path / "elsewhere")
    assert run.run_task(setting, seeds=1) == (runs, costs)
    assert not (tmp_path / "work" / "base").exists()
    run.report(task, runs, costs, run.settings_of(setting), tmp_path / task.name)
    assert (tmp_path / f"{task.name}.md").read_text().count("\n") == len(runs[0]) + 2


def test_arithmetic_tests_on_unseen_problems():
    splits = ARITHMETIC.splits(Path(), seed=1)
    prompts = [{row["prompt"] for row in rows} for rows in splits]
    assert not prompts[0] & prompts[2] and not prompts[1] & prompts[2] and not prompts[0] & prompts[1]
    assert ARITHMETIC.splits(Path(), seed=2).test == splits.test
    assert ARITHMETIC.right(" - 1 2", {"completion": " -12"})


def test_a_question_without_its_answers_raises():
    with pytest.raises(ValueError, match="Answer format"):
        convert({"instruction": "is it so ?", "answer": "true"}, "boolq")


def test_differences_are_paired_and_weighted():
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    gain = rng.normal(0.1, 0.2, size=200)
    weights = rng.integers(1, 5, size=200).astype(float).tolist()
    arms = {"pilot": before, "copilot": before + gain}
    runs = [{n: {"parameters": 1, "figures": {"nll": (values.tolist(), weights)}} for n, values in arms.items()}]
    found = difference(runs, "copilot", "nll")
    assert found["difference"] == pytest.approx(np.average(gain, weights=weights))
    assert 0 < found["low"] < found["difference"] < found["high"] < 0.2
    assert mean_of(runs[0]["pilot"]["figures"]["nll"]) == pytest.approx(np.average(before, weights=weights))
    assert summarise(runs, ["nll"])["pilot"]["nll"]["standard_error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("group", experiments.GROUPS)
def test_every_experiment_runs(group, data, tmp_path, monkeypatch):
    task = replace(MAWPS, **SMALL, max_new_tokens=4)
    monkeypatch.setitem(experiments.TASKS, "mawps", task)
    names = ["--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["experiments", group, "mawps", *names])
    experiments.main()
    text = (tmp_path / f"experiments_{group}_mawps.md").read_text()
    assert all(name in text for name in experiments.GROUPS[group].variants)
    extras = {"mistakes": "cross-fitting", "pilots": "moved to the Pilot, 2.5 times", "feedback": "generated right"}
    assert all((name in text) == (group == its) for its, name in extras.items())


def test_what_is_done_is_kept(data, tmp_path, monkeypatch):
    """Every Copilot of a group on its own: one more alone is trained."""
    monkeypatch.setattr(experiments, "AT_ONCE", 1)
    names = list(FEEDBACK.variants)

    def run_first(count):
        some = replace(FEEDBACK, variants={name: FEEDBACK.variants[name] for name in names[:count]})
        monkeypatch.setitem(experiments.GROUPS, "feedback", some)
        return experiments.run_group(setting, 0, "feedback")

    setting = Setting(replace(MAWPS, **SMALL, max_new_tokens=4), data, tmp_path)
    first = run_first(1)
    trained, run_variants = [], experiments.run_variants
    monkeypatch.setattr(experiments, "run_variants", lambda *args: trained.extend(args[-1]) or run_variants(*args))
    both = run_first(2)
    assert trained == names[1:2] and list(both) == [experiments.ALONE, *names[:2]]
    assert {name: both[name] for name in first} == first  # the same Pilot, bit for bit


@pytest.mark.parametrize("task", run.TASKS.values(), ids=run.TASKS)
def test_the_tables_are_those_of_the_stored_results(task):
    found = json.loads((run.RESULTS / f"{task.name}.json").read_text())
    text = run.table_of(task, found["arms"], found["costs"])
    assert text + "\n" == (run.RESULTS / f"{task.name}.md").read_text()


@pytest.mark.parametrize("file", sorted(run.RESULTS.glob("experiments_*.json")), ids=lambda file: file.stem)
def test_the_tables_of_experiments_are_those_of_their_runs(file):
    group = experiments.GROUPS.get(file.stem.split("_")[1])
    if group is None:
        pytest.skip("of a group that is gone")
    assert (
        experiments.table_of(group, json.loads(file.read_text())["runs"]) + "\n" == file.with_suffix(".md").read_text()
    )


def test_the_pictures_of_the_results_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["picture.py", "--pictures", str(tmp_path)])
    picture.main()
    assert {file.name for file in tmp_path.iterdir()} == {"results.png", "learning.png", "moving.png"}


def test_prompts_are_read_and_not_measured():
    """With their discrepancies read the Copilot says something else about the same targets."""
    model = rectified()
    examples = [encode(model.tokenizer, row, 64) for row in ROWS]
    before = model.log_likelihoods(examples)
    model.learner = ReadingPrompts(model.learner.copilot, model.pilot)
    after = model.log_likelihoods(examples)
    assert torch.equal(after[:, 2], before[:, 2]) and not torch.allclose(after[:, 0], before[:, 0])
    at_zero = replace(model, strength=0.0).log_likelihoods(examples)
    torch.testing.assert_close(at_zero, alone(model).log_likelihoods(examples), rtol=1e-5, atol=1e-5)
    assert model.calibrate(examples)["targets"] == before[:, 2].sum()


@pytest.mark.parametrize("copilot_input", ["discrepancy", "both"])
def test_scheduled_feeding_is_generations_in_training(monkeypatch, copilot_input):
    """With every input predicted, the Copilot is fed in training what it is fed when it generates the same text."""
    monkeypatch.setattr("benchmarks.accuracy.inputs.SHARE", 1.0)
    pilot = tiny_pilot().eval()
    config = CopilotConfig.paper(num_hidden_layers=2, dropout=0.0, copilot_input=copilot_input, top_k=VOCAB_SIZE)
    copilot, prompt = trained_like(pilot, config), torch.tensor([[5, 9, 12]])
    forced = ScheduledFeeding(copilot, pilot)
    fed = {"training": [], "generation": []}
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        hook = copilot.layers[0].register_forward_pre_hook(lambda layer, args: fed["generation"].append(args[0]))
        ids = pilot.generate(prompt, logits_processor=[processor], max_new_tokens=2, do_sample=False)
        hook.remove()
    inputs = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < prompt.shape[1], -100)}
    (batch,) = forced.batches(forced.read(inputs, lambda: pilot(input_ids=ids)))
    copilot.train()
    copilot.layers[0].register_forward_pre_hook(lambda layer, args: fed["training"].append(args[0]))
    forced.run(**batch.inputs)
    torch.testing.assert_close(fed["training"][-1], torch.cat(fed["generation"], dim=1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fed["training"][0], fed["training"][-1], atol=1e-2)  # of ℓ, and of f


def records_of(errors):
    pilot = tiny_pilot().eval()
    learner = CopilotLearner(trained_like(pilot), pilot)
    ids = torch.arange(5, 17)[None].expand(len(errors), -1).clone()
    records = learner.visit({"input_ids": ids, "labels": ids}, lambda: pilot(input_ids=ids))
    for record, error in zip(records, errors, strict=True):
        record.values[:] = 0.0
        record.values[:, 0] = 2 * error
    return records


def test_a_weighted_log_draws_what_was_wrong():
    log = WeightedLog()
    log.append(records_of([0.01] * 8 + [0.9]))
    generator = torch.Generator().manual_seed(0)
    drawn = [any(r.values[0, 0] > 1 for r in log.sample(1, generator)) for _ in range(200)]
    assert 0.8 < sum(drawn) / 200 < 1.0  # 0.9 / 0.98


def test_a_reservoir_keeps_a_sample_of_all_rounds():
    (record,) = records_of([0.5])
    kept_rounds = []
    for seed in range(40):
        log = ReservoirLog(max_rounds=10)
        log.random.seed(seed)
        for step in range(100):
            log.append([replace(record, labels=torch.tensor([step]))])
        kept_rounds += [int(round_[0].labels) for round_ in log.rounds]
        assert len(log.rounds) == 10 and log.nbytes == sum(r.nbytes for rs in log.rounds for r in rs)
    assert 40 < np.mean(kept_rounds) < 60


def small_bench(bench, tmp_path, monkeypatch, seeds=1):
    """A bench of its own on the arithmetic task with 24 rows, as a function that runs it; it writes one JSON file."""
    monkeypatch.setattr(run, "TASKS", {"arithmetic": replace(ARITHMETIC, **SMALL)})
    splits = ARITHMETIC.splits(None, 0)
    monkeypatch.setattr(type(ARITHMETIC), "splits", lambda *_, **__: type(splits)(*(rows[:24] for rows in splits)))
    name, results = bench.__name__.rpartition(".")[2], tmp_path / "results"
    command = f"{name} arithmetic --seeds {seeds} --work {tmp_path} --results {results}"
    monkeypatch.setattr(sys, "argv", command.split())

    def start(run_seed):
        run.run_seeds("", name, {}, run_seed, bench.report)
        return json.loads((results / f"{name}_arithmetic.json").read_text())

    return start


def never(*_):
    raise AssertionError("a run that is kept is made again")


def test_folding_runs_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "TIMED_STEPS", 2)
    start = small_bench(folding, tmp_path, monkeypatch, seeds=2)
    found = start(folding.run_seed)
    assert set(found["arms"]) == set(folding.TITLES) and found["steps"]["folded"] == 2
    gains = {arm: found["arms"][arm]["nll"]["difference"] for arm in ("copilot", "folded")}
    assert found["shares"]["nll"]["folded"] == pytest.approx(gains["folded"] / gains["copilot"])
    assert start(never) == found  # all is kept


def test_ensembles_run_and_are_kept(tmp_path, monkeypatch):
    start = small_bench(ensembles, tmp_path, monkeypatch)
    found = start(ensembles.run_seed)
    arms = found["arms"]
    assert list(arms) == list(ensembles.TITLES)
    assert all(0 <= arms[arm]["exact match"]["mean"] <= 1 and arms[arm]["nll"]["mean"] > 0 for arm in arms)
    sizes = {arm: arms[arm]["parameters"] for arm in arms}
    assert sizes["copilot"] == sizes["language model"] and sizes["second"] == 2 * sizes["pilot"]
    assert start(never) == found


def test_a_language_model_learns_without_its_pilot(tmp_path, monkeypatch):
    """Whatever the Pilot holds likely, the second network is the same."""
    found = []
    for seed in (0, 1):
        pilot = tiny_pilot(seed=seed)
        copilot = trained_like(tiny_pilot(), CopilotConfig(copilot_input="token", dropout=0.0)).train()
        learner = ensembles.LanguageModel(copilot, pilot, learning_rate=1e-2, num_training_steps=1)
        ids = torch.tensor([[5, 9, 12, 20, 21, 2]])
        inputs = {"input_ids": ids, "labels": ids.masked_fill(ids < 10, -100)}
        with learner.observe(inputs):
            pilot(**inputs)
        learner.step()
        learner.close()
        found.append(copilot.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_moves_run_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(moves, "DPO", moves.DPO | {"max_steps": 2, "per_device_train_batch_size": 2})
    start = small_bench(moves, tmp_path, monkeypatch)
    all_of_it = start(moves.run_seed)
    (found,) = all_of_it["runs"]
    assert len(found) == 9 and all(set(arms) <= set(moves.ARMS) for arms in found.values())
    home = found["home"]
    assert home["moved, λ chosen"] == home["trained there, λ chosen"] == home["moved, λ of home"]
    assert home["small logits"]["nll"] > 0
    assert start(never) == all_of_it


def test_small_logits_at_their_own_base_are_the_small_pilot(tmp_path):
    """z'' + 1 (z' − z'') = z'."""
    pilots = [tiny_pilot(seed=seed).eval() for seed in (0, 1)]
    bench = object.__new__(moves.Moves)
    bench.tokenizer = tiny_tokenizer()
    examples = [encode(bench.tokenizer, row, 64) for row in ROWS]
    found = bench.proxy(examples, pilots[0], pilots[1], pilots[0], strength=1.0)
    expected = experiments.measure(Rectified(pilots[1], bench.tokenizer), examples)
    assert found == pytest.approx(expected, rel=1e-5)
