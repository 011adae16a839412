"""The ten reasoning sets: from their files to instructions, and what a right answer is.

Prompts and answer rules are those of LLM-Adapters, with which the paper compares; README.md names their traps. Files
lie in `DIR/<set>/`, in the normalised form (`train.jsonl`, `test.jsonl`), that of LLM-Adapters (`test.json`), or as
their authors publish them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Row

BLANKS = 16 * " "  # the harness's own, as is the blank before the first line's end
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{BLANKS}### Instruction:\n{BLANKS}{{instruction}}\n\n{BLANKS}### Response:\n{BLANKS}"
)
TOLERANCE = 1e-3
ENDINGS = (".jsonl", ".jsonl.gz", ".json")


# ---- answer rules ---------------------------------------------------------------------------------------------------


def first_word(text: str, words: Iterable[str]) -> str | None:
    """The first of these words that is anywhere in the text, also inside another word."""
    found = re.search("|".join(words), text)
    return found[0] if found else None


def last_number(text: str) -> float | None:
    """The last number, thousands commas left out. "15-3" ends with −3."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


def lone_letter(text: str) -> str | None:
    """The last of A to E that stands by itself: what AQuA's rule means to find."""
    found = re.findall(r"\b[A-E]\b", text)
    return found[-1] if found else None


@dataclass(frozen=True)
class ReasoningSet:
    """One set.

    Attributes:
        name: Its folder, and its name in the tables.
        words: What an answer may be, tried in this order; none where it is a number.
        files: Stems of the training and the test file as their authors publish them.
    """

    name: str
    words: tuple[str, ...] = ()
    files: tuple[str, str] = ("train", "test")

    def right(self, text: str, answer: str) -> bool:
        """By the harness's rule."""
        if self.words:
            return first_word(text.strip(), self.words) == answer
        number = last_number(text)
        return number is not None and abs(number - float(answer)) <= TOLERANCE

    def rows(self, data: Path, split: int) -> list[Row]:
        """The rows of the training (0) or test split (1)."""
        file = find_file(data / self.name, dict.fromkeys((("train", "test")[split], self.files[split])))
        labels = file.with_name(f"{file.name.partition('.')[0]}-labels.lst")
        rows = read_rows(file)
        if labels.is_file():
            rows = [row | {"label": label} for row, label in zip(rows, labels.read_text().split(), strict=True)]
        return [self.row(row) for row in rows]

    def row(self, source: dict[str, Any]) -> Row:
        """Prompt, completion, answer and set of one row, whatever its form."""
        instruction, output, answer = instruction_of(source)
        prompt = PROMPT.format(instruction=instruction)
        return {"prompt": prompt, "completion": output, "answer": answer, "set": self.name}


def numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


COMMONSENSE = (
    ReasoningSet("piqa", numbered("solution", 2)),
    ReasoningSet("winogrande", numbered("option", 2)),
    ReasoningSet("hellaswag", numbered("ending", 4), ("hellaswag_train", "hellaswag_val")),
    ReasoningSet("boolq", ("true", "false")),
    ReasoningSet("siqa", numbered("answer", 5), ("train", "dev")),
    ReasoningSet("openbookqa", numbered("answer", 5)),
)
ARITHMETIC = (
    ReasoningSet("aqua", tuple("ABCDE"), ("dev", "test")),
    ReasoningSet("gsm8k"),
    ReasoningSet("mawps"),
    ReasoningSet("svamp", (), ("train", "SVAMP")),
)


# ---- files ----------------------------------------------------------------------------------------------------------


def find_file(folder: Path, stems: Iterable[str]) -> Path:
    """
    Raises:
        FileNotFoundError: If the folder holds none of these.
    """
    names = [f"{stem}{ending}" for stem in stems for ending in ENDINGS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}: see benchmarks/paper/README.md.")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A list in one piece, or a row a line."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        text = stream.read()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


# ---- forms of a row: instruction, output, answer -------------------------------------------------------------------

Form = tuple[str, str, str]


def _adapters(row: dict[str, Any]) -> Form:
    """LLM-Adapters' own form; the answer may be a list with the one answer in it."""
    answer = row["answer"][-1] if isinstance(row["answer"], list) else row["answer"]
    return row["instruction"], row["output"], str(answer)


def _normalised(row: dict[str, Any]) -> Form:
    """A rationale, or where there is none (MAWPS) the equation, and the answer behind it."""
    is_letter = row["final"] in "ABCDE"
    return row["question"], _concluded(row["answer"] or row["equation"], row["final"], is_letter), row["final"]


def _concluded(rationale: str, answer: str, is_letter: bool = False) -> str:
    return f"{rationale}\nThe answer is {f'({answer})' if is_letter else answer}."


def _hellaswag(row: dict[str, Any]) -> Form:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
    start = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {context}"
    return _choice(start, "ending", row["endings"], int(row["label"]) + 1)


def _siqa(row: dict[str, Any]) -> Form:
    start = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _choice(start, "answer", [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]))


def _choice(start: str, word: str, texts: list[str], label: int) -> Form:
    choices = " ".join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(texts, 1))
    form, answer = "/".join(numbered(word, len(texts))), f"{word}{label}"
    return f"{start}\n\n{choices}\n\nAnswer format: {form}", f"the correct answer is {answer}", answer


def _svamp(row: dict[str, Any]) -> Form:
    body, answer = row["Body"].strip(), str(row["Answer"])
    body = body if body.endswith(".") else f"{body}."
    return f"{body} {row['Question'].strip()}", _concluded(row["Equation"], answer), answer


def _aqua(row: dict[str, Any]) -> Form:
    choices = " ".join(f"({option[0]}) {option[2:].strip()}" for option in row["options"])
    rationale = row["rationale"].strip()
    return f"{row['question']} Answer Choices: {choices}", _concluded(rationale, row["correct"], True), row["correct"]


FORMS: dict[str, Callable[[dict[str, Any]], Form]] = {  # by a field that no other form has
    "instruction": _adapters,
    "final": _normalised,
    "endings": _hellaswag,
    "answerC": _siqa,
    "Body": _svamp,
    "correct": _aqua,
}


def instruction_of(row: dict[str, Any]) -> Form:
    """
    Raises:
        ValueError: For a row of no known form.
    """
    for field, form in FORMS.items():
        if field in row:
            return form(row)
    raise ValueError(f"A row with the fields {sorted(row)} has none of {sorted(FORMS)}: its form is not known.")
