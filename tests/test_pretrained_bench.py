"""The bench beside a pretrained Pilot: short arms on a tiny one, `generate` beside the teacher-forced pass, tables."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_pilot

from benchmarks.accuracy.moves import ARMS
from benchmarks.accuracy.shares import OWN
from benchmarks.common import RESULTS
from benchmarks.pretrained import arms, moving, picture, report, search, steps, training
from benchmarks.pretrained.arms import FEATURES, FEATURES_OWN, LANGUAGE_MODEL, STATE_0, TOKEN, Arm, lora, plan
from benchmarks.pretrained.measuring import ALONE, Model
from benchmarks.pretrained.running import Bench, Limits
from benchmarks.pretrained.tasks import ALL_OF_GSM8K, GSM8K, LASTFM, MAWPS, MIXTURE, SETS, Example, encode, family
from benchmarks.pretrained.training import make_learner, train
from benchmarks.taped import TapedGraph
from hf_copilot.cli.scratch import train_tokenizer
from hf_copilot.pilot.inspect import find_layers

STORED = [RESULTS / "pretrained" / f"search_{device}.json" for device in ("h100", "h200", "cpu")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """MAWPS with a few rows, and a Pilot with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"{i} and {i + 1} ?", "equation": f"x={i}+{i + 1}", "final": str(2 * i + 1)} for i in range(48)
    ]
    (folder / "mawps").mkdir()
    for split, part in (("train", rows[:32]), ("valid", rows[32:40]), ("test", rows[40:])):
        (folder / "mawps" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = train_tokenizer([row["question"] for row in rows], 300)
    pilot = tiny_pilot(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    return Bench(pilot, tokenizer, folder, Limits(rows=6, steps=3))


COPILOTS = {"alone": None, "token": TOKEN, "features": FEATURES, "language model": LANGUAGE_MODEL}


@pytest.mark.parametrize("copilot", COPILOTS.values(), ids=COPILOTS)
def test_an_arm_runs(bench, copilot):
    (result,) = bench.run([Arm("mawps", lora(1e-3, 1.5), copilot, samples=copilot is None)])
    assert result["steps"] == 3 and set(result["seconds"]) == {"pilot", "observe", "copilot"}
    assert len(result["rows"][0]["nll"]) == 6 and len(result["greedy"][0]["right"]) == 6
    grid, nll = result["grid"], result["valid"]["nll"]
    assert grid.index(ALONE) == 0 and len(nll) == len(grid) and result["chosen"]["nll"] == grid[nll.index(min(nll))]
    assert ({weight for _, weight in grid} > {0.0}) == (copilot is not None) == ("copilot_parameters" in result)
    assert ("sampled" in result) == (copilot is None)
    json.dumps(result)


def test_a_pilot_alone_has_a_temperature(bench):
    """α z, and the same greedy answers."""
    prompt, completion = bench.encoded(bench.splits["mawps"].test)[0]
    with torch.no_grad():
        logits = bench.base(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    model = Model(bench.base, bench.tokenizer)
    found = model.likelihoods([Example(prompt, completion)])
    for scale in (1.0, 0.5, 1.3):
        expected = F.cross_entropy(scale * logits.float(), torch.tensor(completion), reduction="sum")
        assert found.at((scale, 0.0))["nll"] == pytest.approx([expected.item()], abs=1e-3)
    cold, warm = (model.answers([Example(prompt, completion)], MAWPS, (scale, 0.0)) for scale in (1.0, 0.5))
    assert cold == warm


def test_a_copilot_learns_on_from_the_log(bench, monkeypatch):
    """After the pass over the rows no forward of the Pilot is run; a chosen λ is no worse than the Pilot."""
    visits = []
    usual = steps.decoded
    monkeypatch.setattr(steps, "decoded", lambda *inputs: visits.append(1) or usual(*inputs))
    spec = replace(TOKEN, kind="token, on the log", log_epochs=4.0)
    arms_of_log = (Arm("mawps", training.PilotSpec("frozen", 0.0, 1.0), copilot) for copilot in (TOKEN, spec))
    once, more = (result for arm in arms_of_log for result in bench.run([arm]))
    assert len(visits) == once["steps"] + more["steps"] == 4 and (once["replays"], more["replays"]) == (0, 8)
    assert once["valid"]["nll"][0] == more["valid"]["nll"][0] and min(more["valid"]["nll"]) < min(once["valid"]["nll"])


def test_two_pilots_are_an_ensemble(bench):
    (result,) = bench.run([Arm("mawps", lora(1e-3, 1.5), second=True)])
    assert len(result["grid"]) > 1 and {row["weights"] for row in result["rows"]} >= {ALONE}


def test_copilots_beside_one_pilot_do_not_know_of_each_other(bench):
    """The same figures as each has by itself."""
    alone, token, features = (Arm("mawps", lora(1e-3, 1.5), copilot) for copilot in (None, TOKEN, FEATURES))
    assert features.goes_with(token) and not replace(token, seed=1).goes_with(token)
    together = list(bench.run([alone, features, token]))
    for arm, found in zip((alone, features, token), together, strict=True):
        (expected,) = bench.run([arm])
        for key in ("name", "valid", "test", "rows", "greedy", "other"):
            assert found[key] == expected[key], (arm.name, key)


def test_a_copilot_is_folded_after_its_arm(bench):
    """Each arm has figures; λ is chosen for the fresh Copilot, and what is folded is another Pilot."""
    (result,) = bench.run([Arm("mawps", lora(1e-3, 1.5), replace(TOKEN, rate=3e-3), folds=True)])
    after = result["after"]
    assert list(after) == ["folded", "labels", "again"] and after["labels"]["steps"] > after["folded"]["steps"] == 3
    assert all(0 < found["nll"] < 10 and 0 <= found["right"] <= 1 for found in after.values())
    assert after["folded"]["nll"] != result["test"]["nll"][0] and "rate" not in after["again"]


def test_copilots_move_between_depths(bench, tmp_path, monkeypatch, capsys):
    """A share for every destination; a λ that is chosen at home is that of home; a third of the layers goes."""
    with monkeypatch.context() as patched:
        patched.setitem(bench.splits, "gsm8k", bench.splits["mawps"])
        found = dict(moving.Moves(bench, 0).run())
    assert len(found) == 7 and set(found["other rows"]) == {*ARMS}
    assert found["home"][ARMS[1]]["nll"] == found["home"][ARMS[3]]["nll"]
    assert set(found["from 20 layers to 30, not fine-tuned"]) == {*ARMS} - {OWN}
    assert len(moving.shallower(bench.base).model.layers) == 2 < len(bench.base.model.layers)
    for seed in (0, 1):
        (tmp_path / f"moves_seed{seed}.json").write_text(json.dumps(found))
    (tmp_path / "accuracy").mkdir()
    monkeypatch.setattr(sys, "argv", ["moving", "--work", str(tmp_path), "--store", "--results", str(tmp_path)])
    moving.main()
    assert (tmp_path / "accuracy" / "moves_smollm2.md").read_text() == capsys.readouterr().out


METHODS = {"lora": (lora(1e-3, 1.0), TOKEN), "full": (training.PilotSpec("full", 1e-3), STATE_0)}
METHODS |= {"dora": (training.PilotSpec("dora", 1e-3), FEATURES), "alone": (lora(1e-3, 1.0), None)}


@pytest.mark.parametrize(("pilot", "copilot"), METHODS.values(), ids=METHODS)
def test_a_recorded_step_trains_both_models_alike(bench, pilot, copilot):
    """The Pilot's forward and backward played from a tape, batch after batch: the same weights, and the same logits of
    both models."""
    examples = bench.to_train("mawps")
    found = []
    for record in (None, TapedGraph):
        copilots = [] if copilot is None else [LANGUAGE_MODEL, copilot]
        trained = train(bench.base, bench.tokenizer, examples, pilot, copilots, 5, 0, record)
        model = Model(trained.pilot, bench.tokenizer, trained.learners[-1] if copilots else None)
        found.append([torch.cat([z, *([] if f is None else [f])]) for _, z, f, _ in model.logits(examples[:3])])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    before = [z for _, z, _, _ in Model(bench.base, bench.tokenizer).logits(examples[:3])]
    assert not torch.allclose(before[0], found[1][0][: len(before[0])], atol=0.01)


def untrained(bench, spec):
    """A Copilot whose last map is not zero, so that it changes the text."""
    learner = make_learner(bench.base.eval(), spec, 1, seed=0)
    with torch.no_grad():
        copilot = learner.copilot.eval()
        copilot.get_submodule(copilot.last_map).weight.normal_(std=0.3)
        copilot.start.weight.normal_()
    learner.close()
    return Model(bench.base, bench.tokenizer, learner)


READERS = {
    "token": TOKEN,
    "states": STATE_0,
    "features": FEATURES,
    "features, own vocabulary": FEATURES_OWN,
    "features, no memory": replace(FEATURES, features={"attends": False}),
    "features, head of a rank": replace(FEATURES, features={"rank": 4}),
    "top layers": replace(TOKEN, make="top"),
}


@pytest.mark.parametrize("spec", READERS.values(), ids=READERS)
def test_generate_and_the_teacher_forced_pass_agree(bench, spec):
    """Left-padded prompts of several lengths: at every step the mixed logits are those of the pass over the text."""
    model, weights = untrained(bench, spec), (1.0, 0.7)
    prompts = [bench.tokenizer(text)["input_ids"] for text in ("1 and 2 ?", "12 and 13 and 14 ?", "7 ?")]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    with model.processor(weights, mask) as processor:
        out = model.pilot.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **settings)
    written = out.sequences[:, length:].tolist()
    examples = [Example(prompt, completion) for prompt, completion in zip(prompts, written, strict=True)]
    rows = [[], [], []]
    for at, z, f, _ in model.logits(examples):
        for row, logits in zip(at.tolist(), weights[0] * z + weights[1] * f, strict=True):
            rows[row].append(logits)
    expected = torch.stack([torch.stack(row) for row in rows], dim=1)  # [steps, R, V]
    torch.testing.assert_close(torch.stack(out.scores), expected, rtol=1e-3, atol=1e-3)
    assert f.abs().max() > 0.1
    found = model.likelihoods(examples)
    at_one = found.grid.index((1.0, 1.0))
    assert not torch.allclose(found.nll[0], found.nll[at_one])


def test_generate_follows_the_second_model(bench):
    """An ensemble of a Pilot with itself writes what it writes alone."""
    rows = bench.splits["mawps"].test
    examples = [encode(bench.tokenizer, row) for row in rows]
    task = replace(MAWPS, max_new_tokens=6)
    twice = Model(bench.base, bench.tokenizer, second=bench.base)
    assert twice.answers(examples, task, (0.5, 0.5)) == twice.answers(examples, task, ALONE)


def test_features_are_three_layers(bench):
    model = untrained(bench, FEATURES)
    tap = model.learner.forced.tap
    assert [list(find_layers(bench.base)).index(layer) for layer in tap.pooled] == [0, 1, 2]
    inputs = {"input_ids": torch.arange(5, 11)[None], "labels": torch.arange(5, 11)[None]}
    caught = []
    hooks = [layer.register_forward_hook(lambda module, args, out: caught.append(out)) for layer in tap.pooled]
    (record,) = model.learner.forced.read(inputs, lambda: bench.base(input_ids=inputs["input_ids"]))
    for hook in hooks:
        hook.remove()
    model.learner.close()
    outputs = [output[0] if isinstance(output, tuple) else output for output in caught]
    torch.testing.assert_close(record.hidden_states, torch.cat(outputs, dim=-1)[0, : len(record.hidden_states)])


def test_the_plan_goes_on_from_what_is_known():
    """Rates first, then Copilots beside the best of them; nothing twice."""

    def rates_beside(found, method="lora"):
        return {arm.pilot.rate for arm in found if arm.copilot == TOKEN and arm.pilot.method == method}

    first, results = list(plan([], ["mawps"])), []
    assert len({arm.name for arm in first}) == len(first) and rates_beside(first) == {arms.FIRST_LOOK}
    assert not rates_beside(first, "full")
    for arm in first:
        nll = 0.5 - arm.pilot.rate if arm.copilot is None else 0.4
        results.append({"name": arm.name, "arm": json.loads(json.dumps(arm.settings())), "valid": {"nll": [nll]}})
    found = list(plan(results, ["mawps"]))
    assert rates_beside(found) == {arms.FIRST_LOOK, max(arms.RATES)}
    assert rates_beside(found, "full") == {max(arms.FULL_RATES)}


def test_arms_beside_one_pilot_are_handed_out_together(tmp_path):
    """Those that come soon, as long as there is time; one that has failed is tried by itself."""
    options = {"work": tmp_path, "rows": None, "steps": None}
    searching = search.Search(options, ["mawps"], time.monotonic() + 1000)
    first = searching.next_arms()
    assert [arm.name for arm in first][0] == next(plan([], ["mawps"])).name
    assert len({(arm.pilot, arm.seed) for arm in first}) == 1 < len(first) <= search.TOGETHER
    searching.tries[first[1].name] = 1
    assert first[1] not in searching.next_arms()
    searching.tries[first[0].name] = 1
    assert searching.next_arms() == first[:1]
    searching.started |= {arm.name for arm in first}
    assert not {arm.name for arm in searching.next_arms()} & searching.started
    searching.deadline = time.monotonic() + search.work_of(first[:1]) / 2
    assert all(arm.pilot.steps(1671) < first[0].pilot.steps(1671) for arm in searching.next_arms())


def test_a_search_goes_on_from_a_stored_one(tmp_path):
    """What it has is not run again, and its best rates count; `only` picks arms by a regular expression."""
    done = report.Results.read(RESULTS / "pretrained" / "search_h200.json").arms
    known = {result["name"] for result in done}
    options, only = {"work": tmp_path, "rows": None, "steps": None}, r"lora-0\.002-x1\.5 token-0\.0005-s4 seed"
    searching = search.Search(options, ["mawps"], time.monotonic() + 1000, only, done)
    names = [arm.name for arm in searching.open_arms(set())]
    assert names == [f"mawps lora-0.002-x1.5 token-0.0005-s4 seed{seed}" for seed in arms.SEEDS]
    assert names[0].replace("seed1", "seed0") in known and not known & {*names}
    alone = search.Search(options, ["mawps"], time.monotonic() + 1000, only)
    assert not list(alone.open_arms(set()))  # which rate is the best is not known yet
    with pytest.raises(ValueError, match="holds arms of"):  # a trial's would count as done
        search.Search(options | {"steps": 5}, ["mawps"], time.monotonic() + 1000)


def test_a_mixture_of_sets_in_equal_parts(tmp_path):
    for name in SETS:
        (tmp_path / name).mkdir()
        labels = [word for word in SETS[name].words if word != "answer5"]
        for split in ("train", "test"):
            rows = [
                {"instruction": f"{name} {split} {i}", "output": f"the correct answer is {label}", "answer": label}
                for i in range(600)
                for label in [labels[i % len(labels)]]
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert MIXTURE.is_in(tmp_path) and not MAWPS.is_in(tmp_path)
    splits = MIXTURE.splits(tmp_path)
    assert {row["set"] for row in splits.test[:20]} == {*SETS}
    assert [len(rows) for rows in splits] == [2000, 300, 1200]
    for rows in splits:
        assert len({row["prompt"] for row in rows}) == len(rows) == 4 * sum(row["set"] == "piqa" for row in rows)
    assert not {row["prompt"] for row in splits.train} & {row["prompt"] for row in splits.valid}
    row = next(row for row in splits.test if row["set"] == "boolq")
    other = {"true": "false", "false": "true"}[row["final"]]
    assert MIXTURE.right(row["completion"], row) and not MIXTURE.right(f"the correct answer is {other}", row)


def test_the_last_item_of_every_user_is_the_test(tmp_path):
    (tmp_path / "lastfm").mkdir()
    users = [{"user": user, "items": [*range(user, user + 12)]} for user in range(1, 9)]
    (tmp_path / "lastfm" / "interactions.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    splits = LASTFM.splits(tmp_path)
    assert [len(rows) for rows in splits] == [8 * 9, 8, 8]
    tests = {row["prompt"]: row["final"] for row in splits.test}
    for row in splits.valid:
        (asked,) = (prompt for prompt in tests if row["prompt"].split("has")[0] in prompt)
        assert row["final"].split()[-1] in asked and tests[asked].split()[-1] not in asked
    row = splits.test[0]
    assert LASTFM.right(f" {row['completion']}", row) and not LASTFM.right(splits.test[1]["final"], row)


def test_more_rows_of_a_task_are_chosen_and_tested_on_the_same(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 1400), ("test", 9)):
        rows = [{"question": f"{split} {i}", "answer": "so", "final": "1"} for i in range(count)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    some, every = GSM8K.splits(tmp_path), ALL_OF_GSM8K.splits(tmp_path)
    assert some[1:] == every[1:] and every.train[:1000] == some.train and len(every.train) == 1100
    assert not {row["prompt"] for row in every.train} & {row["prompt"] for row in every.valid}
    assert ALL_OF_GSM8K.is_in(tmp_path) and family(ALL_OF_GSM8K.name) == family(GSM8K.name) == GSM8K.name


def test_a_gain_over_seeds_is_the_mean_of_theirs():
    def arm(*nll):
        return {"chosen": {"nll": ALONE}, "test": {"tokens": [1, 2, 1]}, "rows": [{"weights": ALONE, "nll": [*nll]}]}

    ours, first, second = arm(0.0, 0.0, 0.0), arm(0.1, 0.4, 0.3), arm(0.3, 0.8, 0.5)
    assert report.nll_gain([ours], [first]).startswith("+0.200 ")
    assert report.nll_gain([ours, ours], [first, second]).startswith("+0.300 ")
    with pytest.raises(ValueError, match="shorter"):
        report.nll_gain([ours, ours], [first])


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.stem)
def test_the_table_is_that_of_the_stored_results(stored, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(stored)])
    report.main()
    assert capsys.readouterr().out == stored.with_suffix(".md").read_text()


def test_results_are_stored_without_loss_for_the_tables(bench, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "work"
    (folder / "arms").mkdir(parents=True)
    for i, copilot in enumerate((None, TOKEN)):
        (result,) = bench.run([Arm("mawps", lora(1e-3, 1.5), copilot, samples=True)])
        (folder / "arms" / f"{i}.json").write_text(json.dumps(result))
    (folder / "timing_mawps.json").write_text(json.dumps(bench.time("mawps", steps=2, skip=1)))
    monkeypatch.setattr(
        sys, "argv", ["report", str(folder), "--store", "tiny", "--machine", "a CPU", "--folder", str(tmp_path)]
    )
    report.main()
    text = capsys.readouterr().out
    assert text.startswith("a CPU, 2 arms") and "token-0.0005-s4" in text and "Pilot alone, dora" in text
    assert report.text_of(report.Results.read(tmp_path / "tiny.json")) + "\n" == text
    assert (tmp_path / "tiny.md").read_text() == text
    (folder / "arms" / "0.json").unlink()
    given = ["report", str(tmp_path / "tiny.json"), str(folder), "--store", "tiny", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    report.main()
    assert capsys.readouterr().out == text  # what is stored already, and of the folder what is new


def test_the_size_of_a_correction_and_the_lens(bench):
    """Twice the strength is twice the share; a fresh Copilot has none; the last layer says what the Pilot says."""
    model, rows = untrained(bench, TOKEN), bench.splits["mawps"].test
    half, full = (picture.Study(model, strength).correction(rows)["share"] for strength in (0.5, 1.0))
    assert full == pytest.approx(2 * half) and full > 0.001
    fresh = make_learner(bench.base.eval(), TOKEN, 1, seed=0)
    fresh.close()
    found = picture.Study(Model(bench.base, bench.tokenizer, fresh), 1.0).correction(rows)
    assert found["share"] == 0 and sum(found["counts"]) == found["targets"] * bench.base.config.vocab_size
    ids = bench.tokenizer("12 and 13 ?")["input_ids"]
    with torch.no_grad():
        out = bench.base(input_ids=torch.tensor([ids]))
    lens = picture.Study(model, 1.0).lens(ids)
    assert len(lens) == 3 and lens[-1] == bench.tokenizer.decode([int(out.logits[0, -1].argmax())])


def test_the_picture_is_drawn_of_what_is_stored(bench, tmp_path, monkeypatch, capsys):
    looked, rows = picture.Study(untrained(bench, TOKEN), 1.0), bench.splits["mawps"].test
    tasks = {name: looked.correction(rows[:2]) for names in picture.KINDS.values() for name in names}
    found = {"steps": 1, "seconds": 1.0, "strength": 1.0, "tasks": tasks, "token": looked.token(rows)}
    (tmp_path / "small.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["picture", "--file", str(tmp_path / "small")])
    picture.main()
    assert (tmp_path / "small.png").stat().st_size > 10_000 and "mawps: " in capsys.readouterr().out
