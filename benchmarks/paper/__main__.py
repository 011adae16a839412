"""A row of the paper's tables, here.

    python -m benchmarks.paper                                              # names all rows
    python -m benchmarks.paper llama-3.2-1b+1b/arithmetic --data DIR --device cuda
    python -m benchmarks.paper llama-3.2-1b+1b/arithmetic --data DIR --pilot FOLDER --layers 2 --max_steps 4 --rows 8

The last form checks a row with a small model. README.md says what DIR holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.paper.rows import ROWS
from benchmarks.paper.run import league, run, table, write
from benchmarks.paper.train import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=sorted(ROWS), metavar="ROW", help="one of those that are listed")
    parser.add_argument("--data", type=Path, help="folder with piqa/, gsm8k/, ...")
    parser.add_argument("--pilot", help="folder or Hub id instead of the row's Pilot")
    parser.add_argument("--copilot", help="likewise, where the paper's Copilot starts from")
    parser.add_argument("--layers", type=int, help="of the Copilot")
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--rows", type=int, help="at most so many to train on, and of each set to test on")
    parser.add_argument("--sets", nargs="+", help="of a reasoning row, those to train on and to test; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/paper"), help="the trainer's folder")
    parser.add_argument("--results", type=Path, default=Path("out/paper/results"), help="where the file goes")
    given = vars(parser.parse_args())
    name, folder = given.pop("row"), given.pop("results")
    if name is None:
        print("\n".join(ROWS))
        return
    if given["data"] is None:
        parser.error("--data is needed")
    row, options = ROWS[name], Options(**given)
    found = run(row, options)
    print(f"\n{name}, trained on {found['trained_on']}, λ = {found['took']['calibration']['strength']:g}\n")
    print(table(row, found))
    if row.task == "metamathqa":
        print(f"\n{league()}")
    print(f"\n{write(row, options, found, folder)}")


if __name__ == "__main__":
    main()
