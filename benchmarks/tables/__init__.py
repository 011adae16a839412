"""The tables of figures on the pages, written from benchmarks/results/*.json between their markers.

    python -m benchmarks.tables          # writes README.md and docs/*.md anew

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES` in one of these modules.
`tests/test_docs.py` compares: a figure that is changed by hand fails.
"""

from __future__ import annotations

import re

from benchmarks.common import RESULTS
from benchmarks.tables import arguments, benches, costs, expected, experiments, ledger, pretrained, scaling, tasks
from benchmarks.tables.cells import as_printed

ROOT = RESULTS.parent.parent
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
BETWEEN = re.compile(r"(?<=<!-- table: )(\S+)( -->\n)(.*?)(?=<!-- end -->)", re.S)

MODULES = (arguments, tasks, benches, pretrained, costs, experiments, ledger, scaling, expected)
TABLES = {name: make for module in MODULES for name, make in module.TABLES.items()}
TABLES["theorem"] = as_printed("theorem")


def rewritten(page: str) -> str:
    """A page with the tables that the figures give."""
    return BETWEEN.sub(lambda found: found[1] + found[2] + TABLES[found[1]](), page)
