"""The paper's rows: published forms of data, answer rules, and each kind of row from end to end, on made-up rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny import tiny_pilot, tiny_seq2seq, tiny_tokenizer

from benchmarks.accuracy.scoring import Rectified
from benchmarks.common import RESULTS
from benchmarks.paper import __main__ as command
from benchmarks.paper import picture, tasks
from benchmarks.paper.rows import HUB, ROWS
from benchmarks.paper.run import summary, table, task_of
from benchmarks.paper.sets import ARITHMETIC, COMMONSENSE, instruction_of, last_number, lone_letter
from benchmarks.paper.tasks import Interactions, concluded_number
from benchmarks.paper.train import Options, arguments, copilot_settings
from hf_copilot import CopilotLearner, copilot_for
from hf_copilot.evaluation.rows import ids_with_end

SETS = {each.name: each for each in COMMONSENSE + ARITHMETIC}
HELLASWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A pan is hot.",
    "ctx_b": "a cook",
    "endings": list("wxyz"),
    "label": 2,
}
SIQA = {"context": "Ann is tired.", "question": "What now?", "answerA": "sleep", "answerB": "run", "answerC": "sing"}
SVAMP = {
    "Body": "Ben has 5 eggs and eats 2",
    "Question": "How many are left?",
    "Equation": "( 5.0 - 2.0 )",
    "Answer": 3.0,
}
AQUA = {"question": "1 + 1?", "options": ["A)2", "B) 3"], "rationale": "It is 2.", "correct": "A"}


def write(file, rows, whole: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows))


# ---- data -----------------------------------------------------------------------------------------------------------


def test_published_forms_become_instructions():
    """As in LLM-Adapters' own files: line breaks, numbering, and what is written in capitals."""
    assert instruction_of(HELLASWAG) == (
        "Please choose the correct ending to complete the given sentence: Cooking: A pan is hot. A cook\n\n"
        "Ending1: w Ending2: x Ending3: y Ending4: z\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending3",
        "ending3",
    )
    assert instruction_of(SIQA | {"label": "1"})[::2] == (
        "Please choose the correct answer to the question: Ann is tired. What now?\n\n"
        "Answer1: sleep Answer2: run Answer3: sing\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    )
    assert instruction_of(SVAMP) == (
        "Ben has 5 eggs and eats 2. How many are left?",
        "( 5.0 - 2.0 )\nThe answer is 3.0.",
        "3.0",
    )
    assert instruction_of(AQUA) == ("1 + 1? Answer Choices: (A) 2 (B) 3", "It is 2.\nThe answer is (A).", "A")
    assert instruction_of({"instruction": "?", "output": "It is 7.", "answer": [7.0]}) == ("?", "It is 7.", "7.0")
    mawps = {"question": "?", "answer": "", "equation": "x=1+2", "final": "3"}
    assert instruction_of(mawps) == ("?", "x=1+2\nThe answer is 3.", "3")
    with pytest.raises(ValueError, match="form is not known"):
        instruction_of({"text": "?"})


def test_files_are_found_by_their_published_names(tmp_path):
    write(tmp_path / "hellaswag" / "hellaswag_val.jsonl", [HELLASWAG])
    write(tmp_path / "siqa" / "dev.jsonl", [SIQA, SIQA])
    (tmp_path / "siqa" / "dev-labels.lst").write_text("2\n3\n")
    write(tmp_path / "svamp" / "SVAMP.json", [SVAMP], whole=True)
    for name, answers in {"hellaswag": ["ending3"], "siqa": ["answer2", "answer3"], "svamp": ["3.0"]}.items():
        rows = SETS[name].rows(tmp_path, 1)
        assert [row["answer"] for row in rows] == answers and rows[0]["set"] == name
        assert rows[0]["prompt"].endswith("### Response:\n" + 16 * " ")
    with pytest.raises(FileNotFoundError, match="hellaswag_train.json"):
        SETS["hellaswag"].rows(tmp_path, 0)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_right_by_the_harness_rules():
    boolq, siqa, gsm8k, aqua = (SETS[name] for name in ("boolq", "siqa", "gsm8k", "aqua"))
    assert boolq.right("the correct answer is true", "true") and boolq.right("untrue, so false", "true")
    assert not boolq.right("True", "true") and not boolq.right("", "true")
    assert siqa.right("answer2, not answer1", "answer2")
    assert gsm8k.right("so 1,234.0004 in all", "1234") and not gsm8k.right("1234 of 2", "1234")
    assert last_number("15-3") == -3 and last_number("none") is None and last_number("It is 22.") == 22
    assert aqua.right("Answer: (C)", "A") and lone_letter("Answer: (C)") == "C"
    assert not aqua.right("(c)", "C") and lone_letter("Each") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("... The answer is: 18", 18), ("#### 1,018.\nMore", 1018), ("The answer is 1/4.", 0.25), ("18", None)]
    + [("The answer is: x", None), ("The answer is: 1/0", None), ("The answer is 3. The final answer is: $4", 4)],
)
def test_metamathqa_reads_what_is_concluded(text, number):
    assert concluded_number(text) == number


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_have_the_papers_figures_and_settings():
    assert len(ROWS) == 12 * 2 + 3 * 2 + 1
    row = ROWS["llama-3.1-8b+1b/arithmetic"]
    assert row.paper["gsm8k"] == (63.5, 66.1) and row.training.learning_rate == 1e-4 and row.copilot == "llama-3.2-1b"
    assert ROWS["qwen2.5-7b+3b/commonsense"].paper["boolq"] == (71.2, 74.8)
    assert ROWS["qwen2.5-7b+3b/commonsense"].copilot == "qwen2.5-3b"
    assert ROWS["flan-t5-large+base/arithmetic"].copilot == "t5-base"
    assert ROWS["t5-small+small/lastfm"].paper["H@100"] == (11.0, 15.3)
    assert ROWS["t5-small+small/beauty"].training.epochs == 20
    for row in ROWS.values():
        assert row.pilot in HUB and (row.copilot in HUB or row.task == "metamathqa")
        assert row.training.batch_size % row.training.micro_batch_size == 0 or row.task == "metamathqa"


def test_settings_reach_the_trainer(tmp_path):
    options = Options(tmp_path, tmp_path)
    llama = arguments(ROWS["llama-3.2-1b+1b/beauty"], options)
    assert (llama["per_device_train_batch_size"], llama["gradient_accumulation_steps"]) == (1, 32)
    found = copilot_settings(ROWS["llama-3.2-1b+1b/beauty"], options)
    assert found["copilot"].init == HUB["llama-3.2-1b"] and found["copilot"].objective == "rmse"
    assert (found["copilot_peft_config"].r, found["copilot_peft_config"].lora_dropout) == (16, 0.08)
    t5 = copilot_settings(ROWS["flan-t5-base+base/commonsense"], replace(options, pilot="here", layers=2))
    assert t5.keys() == {"copilot"} and (t5["copilot"].init, t5["copilot"].num_hidden_layers) == ("pilot", 2)
    peft = copilot_settings(ROWS["llama-3.2-3b+two-layers/metamathqa"], options)
    assert peft.keys() == {"copilot"} and peft["copilot"].objective == "cross_entropy"


def test_the_table_stands_beside_the_papers():
    row = ROWS["llama-3.2-1b+1b/arithmetic"]
    text = table(row, {"figures": {"gsm8k": summary([(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])}})
    assert "| gsm8k | 4 | 25.0 | 75.0 | +50.0 [" in text and text.endswith("| 27.3 | 32.2 |")


# ---- from end to end ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of every set, in several forms, and two tiny Pilots."""
    folder = tmp_path_factory.mktemp("data")
    words = {"piqa": "solution1", "winogrande": "option1", "boolq": "true", "openbookqa": "answer1"}
    for name, answer in words.items():
        row = {"instruction": "which ?", "output": f"the correct answer is {answer}", "answer": answer}
        for split in ("train", "test"):
            write(folder / name / f"{split}.json", 4 * [row], whole=True)
    for name in ("hellaswag_train", "hellaswag_val"):
        write(folder / "hellaswag" / f"{name}.jsonl", 4 * [HELLASWAG])
    for name in ("train", "dev"):
        write(folder / "siqa" / f"{name}.jsonl", 4 * [SIQA])
        (folder / "siqa" / f"{name}-labels.lst").write_text("1\n2\n3\n1\n")
    sums = [{"question": f"{i} + 1 ?", "answer": "count on", "final": str(i + 1)} for i in range(6)]
    for name in ("gsm8k", "mawps"):
        for split in ("train", "test"):
            write(folder / name / f"{split}.jsonl", sums)
    for split in ("dev", "test"):
        write(folder / "aqua" / f"{split}.json", 4 * [AQUA])
    write(folder / "svamp" / "SVAMP.json", 4 * [SVAMP], whole=True)
    responses = [{"query": row["question"], "response": f"The answer is: {row['final']}"} for row in sums]
    write(folder / "metamathqa" / "MetaMathQA-395K.json", responses, whole=True)
    write(folder / "lastfm" / "interactions.jsonl", [{"user": i, "items": [1, 2, 3, 4 + i]} for i in range(4)])
    (folder / "beauty").mkdir()
    (folder / "beauty" / "Beauty.txt").write_text("".join(f"{i} 1 2 3 {4 + i}\n" for i in range(12)))
    for name, pilot in {"llama": tiny_pilot(max_position_embeddings=1024), "t5": tiny_seq2seq("flan_t5")}.items():
        pilot.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


KINDS = {
    "llama-3.2-1b+1b/commonsense": "llama",
    "llama-3.2-1b+1b/arithmetic": "llama",
    "llama-3.2-1b+1b/lastfm": "llama",
    "llama-3.2-3b+two-layers/metamathqa": "llama",
    "flan-t5-small+small/arithmetic": "t5",
    "t5-small+small/beauty": "t5",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_runs_from_end_to_end(data, tmp_path, monkeypatch, capsys, name):
    training = replace(ROWS[name].training, max_new_tokens=4, num_beams=2, micro_batch_size=2, max_length=400)
    monkeypatch.setitem(ROWS, name, replace(ROWS[name], training=training))
    given = {"data": data, "pilot": data / KINDS[name], "work": tmp_path / "work", "results": tmp_path / "results"}
    changes = [f"--{key}={value}" for key, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["paper", name, "--layers=2", "--max_steps=2", "--rows=3", *changes])
    command.main()
    said, task = capsys.readouterr().out, name.partition("/")[2]
    files = {file.stem.rpartition("--")[2]: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    found = files[task]
    assert found["took"]["steps"] == 2 and found["training"]["max_new_tokens"] == 4
    assert found["took"]["calibration"]["strengths"] == [0.0, *training.strengths]
    assert set(found["figures"]) >= set(ROWS[name].paper) and all(key in said for key in found["figures"])
    assert {figure["items"] for figure in found["figures"].values()} == {3}
    if task == "arithmetic":
        assert found["trained_on"]["of"] == {"aqua": 4, "gsm8k": 6, "mawps": 6, "svamp": 0}
        assert "aqua, lone letter" in found["figures"]
    if task == "metamathqa":
        assert files["peft"]["run_info"]["train_config"]["max_steps"] == 2
        assert files["peft"]["train_info"]["metrics"][0]["step"] == 2 and "rsLoRA r 64" in said


def test_the_published_mixture_is_trained_on_where_it_is(data, monkeypatch):
    rows = [{"instruction": f"{i} ?", "output": str(i), "answer": str(i)} for i in range(30)]
    write(data / "mixed.json", rows, whole=True)
    splits = replace(tasks.TASKS["arithmetic"], mixture="mixed.json").splits(data, None, seed=0)
    assert splits.sources == {"mixed.json": 30} and (len(splits.train), len(splits.valid)) == (27, 3)
    assert not {row["prompt"] for row in splits.train} & {row["prompt"] for row in splits.valid}


def test_sets_can_be_chosen(tmp_path):
    row, options = ROWS["llama-3.2-1b+1b/arithmetic"], Options(tmp_path, tmp_path, sets=["mawps", "aqua"])
    assert [each.name for each in task_of(row, options).sets] == ["mawps", "aqua"]
    with pytest.raises(ValueError, match="'aqua', 'gsm8k'"):
        task_of(row, replace(options, sets=["piqa"]))
    with pytest.raises(ValueError, match="no sets to choose among"):
        task_of(ROWS["llama-3.2-1b+1b/lastfm"], options)


def test_interactions_have_the_papers_prompt_form(data):
    task = tasks.NextItem("Beauty").interactions()
    assert isinstance(task, Interactions)
    row, texts = task.splits(data, seed=0).test[0], task.item_texts(data)
    seen = ", ".join(texts[item].removeprefix(" Beauty ") for item in (1, 2, 3))
    start = f"Considering Beauty user_0 has interacted with Beauty items {seen}. "
    assert row["prompt"] == start + "What is the next recommendation for the user?"
    assert row["completion"] == texts[4] and texts[4].startswith(" Beauty item_") and texts[4][-2:].isdigit()


def test_items_one_by_one_rank_as_likelihoods_do(data):
    """Beside a freshly made Copilot both ranks are the Pilot's, of all items by their own loss."""
    pilot, tokenizer = tiny_seq2seq("flan_t5").eval(), tiny_tokenizer()
    learner = CopilotLearner(copilot_for(pilot).eval(), pilot)
    item = tasks.NextItem("Beauty")
    task = item.interactions()
    texts, row = task.item_texts(data), task.splits(data, seed=0).test[1]
    pair = tasks.Pair(Rectified(pilot, tokenizer), Rectified(pilot, tokenizer, learner, 1.0))
    losses = {}
    for text in texts.values():
        ids, labels = (torch.tensor([ids_with_end(tokenizer, part)]) for part in (row["prompt"], text))
        with torch.no_grad():
            losses[text] = pilot(input_ids=ids, labels=labels).loss.item() * labels.numel()
    rank = sorted(losses, key=losses.get).index(row["completion"]) + 1
    assert item.ranks_one_by_one(pair, row, texts) == (rank, rank)


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_lines_are_fitted_and_the_stored_table_is_theirs():
    points = [picture.Point(0.1, 10.0, False), picture.Point(1.0, 30.0, True), picture.Point(10.0, 50.0, True)]
    assert picture.fitted(points) == pytest.approx((20.0, 30.0))
    groups = picture.our_points() | {f"{family}, the paper": own for family, own in picture.paper_points().items()}
    assert picture.text_of(groups) + "\n" == (RESULTS / "paper" / "parameters.md").read_text()
