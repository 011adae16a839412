"""The house: wings, imports in one direction, short rooms (CONTRIBUTING.md, "How the code is laid out")."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_copilot

PACKAGE = Path(hf_copilot.__file__).parent
WINGS = (
    "version",
    "model",
    "pilot",
    "generation",
    "serving",
    "training",
    "ledger",
    "lm_eval",
    "evaluation",
    "plots",
    "cli",
)  # each imports from those before it
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(".".join([*name.split(".")[: -node.level], node.module]))
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_go_in_one_direction(name):
    wing = WINGS.index(name.partition(".")[0])
    assert imports(name) <= FILES.keys()
    upwards = [other for other in imports(name) if WINGS.index(other.partition(".")[0]) > wing]
    assert not upwards


def test_imports_make_no_circle():
    order = list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())
    assert len(order) == len(FILES)


def test_files_are_listed_in_reading_order():
    """CONTRIBUTING.md lists each file below those that it imports from."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    wings = re.findall(r"^\*\*`hf_copilot/(\w+)/`(.*?)\n\n(?!\|)", page, re.MULTILINE | re.DOTALL)
    names = [f"{wing}.{file}" for wing, table in wings for file in re.findall(r"^\| `(\w+)\.py`", table, re.MULTILINE)]
    assert sorted(names) == [name for name in FILES if "." in name]
    for place, name in enumerate(names):
        assert {other for other in imports(name) if "." in other} <= {*names[:place]}, name


LINES = {"file": 350, "class": 250, "function": 40}  # at most, docstrings counted


@pytest.mark.parametrize("name", FILES)
def test_rooms_are_short(name):
    path = PACKAGE / Path(*name.split(".")).with_suffix(".py")
    sizes = {("file", name): len(path.read_text(encoding="utf-8").splitlines())}
    for node in ast.walk(FILES[name]):
        kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
        if kind is not None:
            sizes[kind, node.name] = node.end_lineno - node.lineno + 1
    assert not {where: size for where, size in sizes.items() if size > LINES[where[0]]}


ON_IMPORT = """
import sys, torch, transformers, peft
flag, before = torch._dynamo.config.skip_nnmodule_hook_guards, set(sys.modules)
import hf_copilot
assert torch._dynamo.config.skip_nnmodule_hook_guards == flag
heavy = sorted({"trl", "datasets", "rich", "matplotlib", "lm_eval"} & (sys.modules.keys() - before))
assert not heavy, heavy
assert set(hf_copilot.__all__) <= set(dir(hf_copilot))
"""


def test_import_is_cheap_and_changes_nothing():
    result = subprocess.run([sys.executable, "-c", ON_IMPORT], env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


PUBLIC = (
    *("CopilotArguments", "CopilotCallback", "CopilotConfig", "CopilotLearner", "CopilotLogitsProcessor"),
    *("CopilotModel", "CopilotSFTConfig", "CopilotSeq2SeqConfig", "CopilotSeq2SeqTrainer", "CopilotTrainer"),
    *("MistakeLedger", "MistakeLog", "RectifiedGeneration", "check_pilot", "copilot_for", "fold_copilot", "score"),
    *("__version__", "calibrate_on_rows"),
)


def test_public_names_stay():
    assert sorted(hf_copilot.__all__) == sorted(PUBLIC)
    assert all(getattr(hf_copilot, name) is not None for name in PUBLIC)


def test_an_unknown_name_raises():
    with pytest.raises(AttributeError, match="no attribute 'CopilotTrainr'"):
        hf_copilot.CopilotTrainr  # noqa: B018
