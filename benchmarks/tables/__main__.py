"""Writes the tables of all pages anew."""

from benchmarks.tables import BETWEEN, PAGES, ROOT, rewritten

for name in PAGES:
    path = ROOT / name
    before = path.read_text(encoding="utf-8")
    after = rewritten(before)
    if after != before:
        path.write_text(after, encoding="utf-8")
    print(f"{name}: {len(BETWEEN.findall(after))} tables, {'written anew' if after != before else 'as before'}")
