"""The commands of `hf-copilot`, by name; `accelerate launch -m hf_copilot.cli` runs them too."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from jinja2 import TemplateError
from transformers.utils import logging

from ..version import __version__
from .processes import is_launched

# name: (what it does, module, function); a module is loaded when its command is called
COMMANDS = {
    "sft": ("fine-tune a decoder with a Copilot, in the conventions of `trl sft`", "train", "sft"),
    "seq2seq": ("the same for an encoder-decoder", "train", "seq2seq"),
    "eval": (
        "measure Pilot and Pilot + Copilot on rows, or on tasks of lm-evaluation-harness",
        "evaluate",
        "evaluate",
    ),
    "calibrate": ("choose the strength λ on rows, and write it into the Copilot", "calibrate", "calibrate"),
    "fold": ("train the Pilot towards Pilot + Copilot, so that it needs no Copilot", "fold", "fold"),
    "check": ("say whether a Copilot fits a Pilot, from their configs and the tokenizer", "check", "check"),
    "mistakes": ("write one page of what a run got wrong, and what the Copilot mends", "mistakes", "mistakes_page"),
    "card": ("write a Copilot's card anew, with measured results, and push it", "card", "card"),
}
IN_SEVERAL_PROCESSES = ("sft", "seq2seq", "eval")


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, (what, _, _) in COMMANDS.items()]
    head = f"hf-copilot {__version__}: fine-tune with a Copilot, and measure what it does."
    return "\n".join([head, "", "usage: hf-copilot COMMAND [arguments]", "", *lines, "", LAST])


WHERE = " (TRANSFORMERS_VERBOSITY=debug shows where)"
LAST = "hf-copilot COMMAND --help says more. Every command takes --config FILE, a YAML file of its arguments.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Gives 0, or 1 with a sentence for what can't be done, or 2 for what can't be understood."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the encoding has no λ
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"hf-copilot {__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        sys.stderr.write(f"hf-copilot: there is no command {argv[0]!r}, only {', '.join(COMMANDS)}.\n")
        return 2
    _, module, function = COMMANDS[argv[0]]
    try:
        if is_launched() and argv[0] not in IN_SEVERAL_PROCESSES:
            raise ValueError("This command runs in one process: call it without a launcher.")
        getattr(import_module(f"hf_copilot.cli.{module}"), function)(argv[1:])
    except (ValueError, NotImplementedError, OSError, TemplateError) as error:  # the last of a chat template
        if logging.get_verbosity() <= logging.DEBUG:  # TRANSFORMERS_VERBOSITY=debug
            traceback.print_exc()
        sys.stderr.write(f"hf-copilot {argv[0]}: {' '.join(str(error).split())}{WHERE}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
