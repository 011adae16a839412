"""The pages are true: figures are those of the results, rows name tests that exist, and what raises does raise."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import PromptTuningConfig, get_peft_model
from tiny import QUIET, addition, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import ProcessorMixin, Trainer, TrainingArguments

from benchmarks import tables
from hf_copilot import (
    CopilotArguments,
    CopilotCallback,
    CopilotConfig,
    CopilotLogitsProcessor,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.training.refusals import OVERRIDDEN, check_trainer

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
TABLE = PAGES["docs/compatibility.md"]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| what")]


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_results(page):
    assert tables.rewritten(PAGES[page]) == PAGES[page], "python -m benchmarks.tables writes them anew"


def test_every_table_is_on_a_page_and_a_wrong_figure_is_seen():
    written = [name for page in tables.PAGES for name, _, _ in tables.BETWEEN.findall(PAGES[page])]
    assert sorted(written) == sorted(tables.TABLES)
    wrong = PAGES["README.md"].replace("**36.4 ± 1.0 %**", "**46.4 ± 1.0 %**")
    assert wrong != PAGES["README.md"] == tables.rewritten(wrong)


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_of_figures_are_written_by_the_script_or_marked(page):
    """A table with figures in it stands between markers, or below one that says that it is written by hand."""
    text = tables.BETWEEN.sub("", PAGES[page])
    text = re.sub(r"<!-- by hand: .* -->\n(\|.*\n)+", "", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\d\.\d.*\|.*\d\.\d", re.sub(r"`[^`]*`", "", row))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist_and_hold_what_is_named(page):
    """`memory.py`, `model/memory.py: TokenMemory`, `test_score.py::test_...`."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("*/**/*.py")}
    for name, inside in re.findall(r"`((?:\w+/)*\w+\.py)(?:::? ?(\w+))?", PAGES[page]):
        texts = [text for file, text in files.items() if f"/{file}".endswith(f"/{name}")]
        assert texts, name
        assert not inside or any(re.search(rf"(def|class) {inside}\b", text) for text in texts), (name, inside)


def test_the_layout_names_every_file_once():
    layout = PAGES["CONTRIBUTING.md"].partition("## How the code is laid out")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+\.py)`", layout)
    files = [path.name for path in (ROOT / "hf_copilot").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(files)


def test_every_test_file_is_run_for_some_change():
    """Those of the benchmarks by the end of their names."""
    files = {path.name for path in TESTS.glob("test_*.py") if not path.stem.endswith("_bench")}
    assert files <= set(re.findall(r"test_\w+\.py", PAGES["CONTRIBUTING.md"]))


def sentence_lengths(page: str) -> list[int]:
    """Words of each sentence: no code blocks, tables or titles; a code span is one word."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    blocks = [block.strip() for block in re.split(r"\n\s*\n|\n(?=- |\d+\. |#|\|)", text)]
    prose = [" ".join(block.split()) for block in blocks if block and block[0] not in "|#"]
    sentences = [part for block in prose for part in re.split(r"(?<=[.?!])\*{0,2} +", block)]
    counts = [sum(any(c.isalnum() for c in word) for word in sentence.split()) for sentence in sentences]
    return [count for count in counts if count]


def test_every_field_is_on_the_page_of_arguments():
    names = {*CopilotConfig.__annotations__, *(field.name for field in fields(CopilotArguments))} - {"model_type"}
    listed = re.findall(r"^\| (`.*?`) \| ", PAGES["docs/arguments.md"], re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(listed))) == sorted(names)


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    lengths = sentence_lengths(PAGES[page])
    assert sum(lengths) / len(lengths) <= 20


def test_the_summaries_of_what_works_are_one():
    found = [
        re.search(r"<!-- summary -->\n(.*?)<!-- end of summary -->", PAGES[page], re.S)[1]
        for page in ("README.md", "docs/compatibility.md")
    ]
    assert found[0] == found[1] and len(found[0].splitlines()) == 8
    families = [line for line in PAGES["docs/families.md"].splitlines() if line.startswith("| ")][1:]
    assert f"{len(families)} families" in found[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_a_test(row):
    """In a file, and perhaps more of the same file by their names alone."""
    (file,) = re.findall(r"`(test_\w+\.py)::", row)
    named = re.findall(r"`(?:test_\w+\.py)?::(test_\w+)`", row)
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert named and {*named} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def make_trainer(folder) -> CopilotTrainer:
    return CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(output_dir=str(folder), **QUIET),
        train_dataset=addition(8),
        processing_class=tiny_tokenizer(),
    )


class Sharded:
    """Stands for a ParallelismConfig over two processes."""

    non_data_parallel_size = 2


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "message"),
    [
        ("trainer", "is_fsdp_enabled", True, "use FSDP2"),
        ("trainer", "is_deepspeed_enabled", True, "DeepSpeed"),
        ("trainer", "processing_class", ProcessorMixin.__new__(ProcessorMixin), "vision-language"),
        ("trainer", "model_init", tiny_pilot, "model_init"),
        ("state", "parallelism_config", Sharded, "context, sequence or tensor parallelism"),
    ],
)
def test_unsupported_training_raises(tmp_path, monkeypatch, owner, attribute, value, message):
    """The set-ups themselves need several GPUs: only what the constructor looks at is set."""
    trainer = make_trainer(tmp_path)
    owners = {"trainer": trainer, "state": trainer.accelerator.state}
    monkeypatch.setattr(owners[owner], attribute, value, raising=False)
    with pytest.raises(NotImplementedError, match=message):
        check_trainer(trainer, None)


def test_a_trainer_of_other_names_raises(tmp_path, monkeypatch):
    """All that the trainers override and is not public; what is not called any more would be missed by no one."""
    trainer, own = make_trainer(tmp_path), (ROOT / "hf_copilot/training/trainer.py").read_text(encoding="utf-8")
    assert sorted({*re.findall(r"super\(\)\.(_[a-z]\w+)", own)}) == sorted(OVERRIDDEN)
    monkeypatch.delattr(Trainer, OVERRIDDEN[0])
    with pytest.raises(NotImplementedError, match=f"has no {OVERRIDDEN[0]}, where CopilotTrainer .* use a version"):
        check_trainer(trainer, None)


def test_what_is_given_in_the_wrong_place_raises(tmp_path):
    wrong = {
        "model is a Copilot": {"model": trained_like(tiny_pilot())},
        "by itself": {"callbacks": [CopilotCallback()]},
    }
    for message, given in wrong.items():
        arguments = {"model": tiny_pilot(), "args": CopilotSFTConfig(output_dir=str(tmp_path), **QUIET)} | given
        with pytest.raises(ValueError, match=message):
            CopilotTrainer(train_dataset=addition(8), processing_class=tiny_tokenizer(), **arguments)


def test_an_encoder_decoder_in_the_trainer_of_decoders_raises(tmp_path):
    with pytest.raises(NotImplementedError, match="use CopilotSeq2SeqTrainer for T5"):
        CopilotTrainer(
            model=tiny_seq2seq(),
            args=CopilotSFTConfig(output_dir=str(tmp_path), **QUIET),
            train_dataset=addition(8),
            processing_class=tiny_tokenizer(),
        )


def test_data_parallel_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataParallel"):
        make_trainer(tmp_path)


def test_the_callback_in_several_processes_raises(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="plain `python`"):
        CopilotCallback().on_train_begin(args, None, None, model=tiny_pilot())


def test_virtual_tokens_raise_in_generation(pilot):
    copilot = trained_like(pilot)
    tuned = get_peft_model(pilot, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        CopilotLogitsProcessor(copilot, tuned)
