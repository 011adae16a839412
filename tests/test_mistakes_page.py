"""The page of a run's mistakes: one file, whose text is only text, and which opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset
from test_ledger import different_rows, train_on
from test_seq2seq import make as make_seq2seq
from tiny import sums, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_copilot import CopilotSeq2SeqConfig, CopilotSeq2SeqTrainer, MistakeLedger
from hf_copilot.cli.__main__ import main
from hf_copilot.ledger.page import IN_FULL, decoder_of, mistakes
from hf_copilot.training.ledger import (
    DOCUMENT,
    FORMAT_VERSION,
    HEADER,
    LEDGER_FOLDER,
    TOKEN,
    checksum,
    documents_file,
    tokens_file,
)

BROWSER = next(filter(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome", "chrome")), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has saved its Pilot, its Copilot and its tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    trainer = train_on(different_rows(48), folder, max_steps=48)
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in different_rows(48)))
    return path


class Page(HTMLParser):
    """What a browser would load, and the data in it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.data, self.in_data = [], [], "", False
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        self.in_data = ("id", "data") in attributes

    def handle_endtag(self, tag):
        self.in_data = False

    def handle_data(self, data):
        if self.in_data:
            self.data += data


def opened(path) -> str:
    """The page as a browser has built it; nothing can be fetched."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shown = subprocess.run([*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=300)
    return shown.stdout


def test_the_page_is_one_file_with_the_rows_tokens(run, rows, tmp_path):
    page = Page(mistakes(run, tmp_path / "page.html", rows, rows=[5]))
    assert page.links == [] and page.tags.count("script") == 2
    assert len(page.data["cards"]) == 48 and page.data["cards"][0]["why"] == "chosen"
    ledger = MistakeLedger.load(run)
    for card in page.data["cards"][:5]:
        row = different_rows(48)[card["row"]]
        ids = tiny_tokenizer()(row["prompt"] + row["completion"] + "<eos>")["input_ids"]
        assert "".join(token[0] for token in card["tokens"]) == " " + tiny_tokenizer().decode(ids)
        labelled = [token for token in card["tokens"] if len(token) > 1]
        last = ledger.of_row(card["row"])[-1][1]
        assert [token[1] for token in labelled] == pytest.approx(last["p"].tolist(), abs=1e-4)
        assert [token[2] for token in labelled] == (last["said"] != -1).tolist()
    assert page.data["confusions"] and page.data["rectified"] is None


def test_without_the_data_set_there_is_no_text(run, tmp_path):
    page = Page(mistakes(run, tmp_path / "page.html"))
    assert page.data["confusions"] is None and all(card["tokens"] == [] for card in page.data["cards"])


def test_before_and_after_the_copilot(run, rows, tmp_path):
    page = Page(mistakes(run, tmp_path / "page.html", rows, rectify=True))
    labelled = [token for card in page.data["cards"] for token in card["tokens"] if len(token) > 1]
    before, after = (sum(token[i] for token in labelled) for i in (2, 5))
    found = [int(number) for number in re.findall(r"\d+", page.data["rectified"])]
    assert found[:2] == [len(labelled), before] and before - found[2] + found[3] == after
    assert any(token[1] != token[4] for token in labelled)


MARKUP = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & <b>"


def with_markup(folder):
    """A run whose rows hold HTML, which the tiny tokenizer would not."""
    letters = sorted(set(MARKUP))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([letter for letter in letters if letter not in tokenizer.get_vocab()])
    rows = [{"input_ids": [*tokenizer(MARKUP)["input_ids"], i + 5]} for i in range(3)]
    made_up(folder, rows, visits=2)
    tokenizer.save_pretrained(folder)
    return rows


def made_up(folder, rows, visits: int, labelled: int = 3) -> None:
    """The ledger of a run on these rows that was never made: the last tokens are labelled."""
    target, rng = folder / LEDGER_FOLDER, np.random.default_rng(0)
    target.mkdir(parents=True)
    documents, tokens = np.empty(len(rows) * visits, DOCUMENT), np.empty(len(rows) * visits * labelled, TOKEN)
    documents["step"] = np.arange(len(documents)) // 16 + 1
    documents["row"], documents["tokens"] = np.tile(np.arange(len(rows)), visits), labelled
    checks = [checksum(np.asarray(row["input_ids"])[-labelled:]) for row in rows]
    documents["check"] = np.tile(np.array(checks, np.uint32), visits)
    starts = np.array([len(row["input_ids"]) - labelled for row in rows])
    tokens["position"] = (np.tile(starts, visits)[:, None] + np.arange(labelled)).reshape(-1)
    hardness = np.tile(np.repeat(rng.random(len(rows)), labelled), visits)
    tokens["p"] = rng.random(len(tokens)) ** (4 * hardness)
    tokens["said"] = np.where(tokens["p"] > 0.5, -1, rng.integers(5, 30, len(tokens)))
    documents.tofile(documents_file(target, 0))
    tokens.tofile(tokens_file(target, 0))
    header = {"format_version": FORMAT_VERSION, "rows": len(rows), "has_encoder": False}
    (target / HEADER).write_text(json.dumps(header))


def test_text_is_never_markup(tmp_path):
    rows = with_markup(tmp_path / "run")
    page = Page(mistakes(tmp_path / "run", tmp_path / "page.html", rows))
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.links == []
    assert MARKUP in "".join(token[0].removeprefix(" ") or " " for token in page.data["cards"][0]["tokens"])


def test_labels_of_an_encoder_decoder_may_be_padded(tmp_path):
    rows = sums(64)
    rows = rows.map(lambda row: {"labels": row["labels"] + [-100] * (8 - len(row["labels"]))})
    trainer = make_seq2seq(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, data=rows, max_steps=4)
    trainer.train()
    trainer.save_model()
    page = Page(mistakes(tmp_path, data=rows))
    assert all(0 < len(card["tokens"]) < 8 for card in page.data["cards"])


def test_words_stay_apart():
    """Decoders of SentencePiece strip the space of a text's first token, so that one token alone has none."""
    vocabulary = {"▁a": 0, "▁many": 1, "many": 2, "▁legs": 3, "a": 4, "▁": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([1]) == fast.decode([2]) == "many"
    assert [decoder_of(fast)(token) for token in (1, 2, 3)] == [" many", "many", " legs"]


@in_a_browser
def test_markup_is_text_in_a_browser_too(tmp_path):
    rows = with_markup(tmp_path / "run")
    shown = opened(mistakes(tmp_path / "run", tmp_path / "page.html", rows))
    assert "<title>Mistakes</title>" in shown and "<img" not in shown.replace("&lt;img", "")
    assert re.search(r'data-ready="\d+"', shown)


@in_a_browser
def test_a_browser_shows_rows_and_confusions(run, rows, tmp_path):
    shown = opened(mistakes(run, tmp_path / "page.html", rows, rectify=True))
    assert shown.count('class="row"') == 20 and "48 of 48 rows" in shown  # of 48, twenty at a time
    assert "+ Copilot" in shown and "of them are right" in shown
    assert shown.count('class="number"') == len(Page(tmp_path / "page.html").data["confusions"])


@in_a_browser
def test_a_hundred_thousand_rows_open_in_three_seconds(tmp_path):
    rng = np.random.default_rng(1)
    ids = rng.integers(5, 45, (100_000, 60)).tolist()
    made_up(tmp_path / "run", [{"input_ids": row} for row in ids], visits=3, labelled=20)
    tiny_tokenizer().save_pretrained(tmp_path / "run")
    path = mistakes(tmp_path / "run", tmp_path / "page.html", Dataset.from_dict({"input_ids": ids}))
    assert len(Page(path).data["cards"]) == IN_FULL
    shown = opened(path)
    assert "100,000 of 100,000 rows" in shown
    assert int(re.search(r'data-ready="(\d+)"', shown)[1]) < 3000


def test_what_a_user_may_hand_in(run, rows, tmp_path, capsys):
    cases = {
        "holds no mistake ledger": {"run": tmp_path},
        "did not read the rows": {"run": run, "rows": [999]},
        "is not a file": {"run": run, "data": tmp_path / "nowhere.jsonl"},
        "rows and the run's had 48": {"run": run, "data": different_rows(47)},
        "holds other tokens": {"run": run, "data": different_rows(48).select(range(47, -1, -1))},
        "can't be tokenised": {"run": run, "data": Dataset.from_dict({"question": ["?"] * 48})},
        "pass data": {"run": run, "rectify": True},
    }
    (tmp_path / "torn.jsonl").write_text('{"prompt": "1+1=", "compl')
    cases["can't be read as JSON Lines"] = {"run": run, "data": tmp_path / "torn.jsonl"}
    for sentence, arguments in cases.items():
        with pytest.raises(ValueError, match=sentence):
            mistakes(output=tmp_path / "page.html", **arguments)
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_saved_no_model_says_so(tmp_path, rows):
    train_on(different_rows(48), tmp_path, max_steps=12)
    with pytest.raises(ValueError, match="call trainer.save_model"):
        mistakes(tmp_path, data=rows)


def test_from_the_command_line(run, rows, capsys):
    """By default beside the ledger, which is not pushed."""
    assert main(["mistakes", str(run), "--data", str(rows), "--rows", "3"]) == 0
    page = run / LEDGER_FOLDER / "mistakes.html"
    assert "mistakes.html" in "".join(capsys.readouterr().out.split()) and page.is_file()
    assert Page(page).data["cards"][0]["row"] == 3


def test_what_is_wrong_is_said_in_a_sentence(run, tmp_path, capsys):
    assert main(["mistakes", str(tmp_path)]) == 1
    assert "holds no mistake ledger" in capsys.readouterr().err
    assert main(["mistakes", str(run), "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl is not here" in capsys.readouterr().err
