"""All fields of a Copilot and of its training, from their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from benchmarks.tables.cells import table
from hf_copilot import CopilotArguments, CopilotConfig

ENTRY = re.compile(r"^    ((?:\w+,\s+)*\w+)(?: \([^\n]*\))?:\s(.*?)(?=^    \S|\Z)", re.M | re.S)  # names, text


def fields_of(kind: type) -> str:
    """A row for each entry of its docstring's `Parameters`. Many fields in one entry show no default."""
    section = inspect.getdoc(kind).partition("Parameters:\n")[2].partition("\nRaises:")[0]
    rows = []
    for names, text in ENTRY.findall(section):
        fields = names.split(",")
        defaults = [f"`{getattr(kind, name.strip())}`" for name in fields] if len(fields) < 3 else []
        told = re.sub(r"\[(`\w+`)\]", r"\1", " ".join(text.split())).replace("|", r"\|")
        rows.append([", ".join(f"`{name.strip()}`" for name in fields), ", ".join(defaults), told])
    return table(("field", "default", ""), rows)


TABLES: dict[str, Callable[[], str]] = {
    "config": lambda: fields_of(CopilotConfig),
    "training-arguments": lambda: fields_of(CopilotArguments),
}
