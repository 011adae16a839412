"""`hf-copilot card`: the card of a Copilot, with a picture and measured results, and to the Hub in one commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, HfApi, eval_result_entries_to_yaml

from ..model.configuration_copilot import CopilotConfig
from ..model.hub import ASSETS, write_card
from ..training.report import show
from .pair import check_place
from .parser import Parser


@dataclass
class CardArguments:
    """What the card shows, and where it goes."""

    copilot: str = field(metadata={"help": "The Copilot's folder."})
    picture: str | None = field(default=None, metadata={"help": "A PNG that the card shows; it goes into assets/."})
    results: str | None = field(
        default=None, metadata={"help": "What eval --output_file wrote: Pilot alone and both, into .eval_results/."}
    )
    metric: str | None = field(default=None, metadata={"help": "Which metric in it; by default the first."})
    dataset_id: str | None = field(default=None, metadata={"help": "Hub id of the data set that was measured on."})
    task_id: str | None = field(default=None, metadata={"help": "The task in that data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of the data set."})
    push_to_hub: str | None = field(default=None, metadata={"help": "The repository that the folder is pushed to."})
    private: bool = field(default=False, metadata={"help": "Make the repository a private one."})


def parser() -> Parser:
    return Parser(
        "hf-copilot card",
        "Write the card of a Copilot anew from its config, with a picture and with results for the model's page on "
        "the Hub. Then push the folder in one commit, if asked.",
        (CardArguments,),
        {"Arguments": [field.name for field in fields(CardArguments)]},
        positions=("copilot",),
        examples=[
            "hf-copilot card out/copilot --results eval.json --dataset_id openai/gsm8k --task_id gsm8k",
            "hf-copilot card out/copilot --picture out/training.png --push_to_hub me/my-copilot",
        ],
    )


def card(argv: Sequence[str]) -> None:
    arguments: CardArguments
    (arguments,) = parser().parse(argv)
    folder = Path(arguments.copilot)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder here: the card of a Copilot is written into its folder.")
    check_place(arguments.copilot, "Copilot", ("config.json",))
    config = CopilotConfig.from_pretrained(folder)
    picture = None if arguments.picture is None else copy_picture(Path(arguments.picture), folder / ASSETS)
    if arguments.results is not None:
        write_results(arguments, folder)
    write_card(folder, config, arguments.push_to_hub, picture)
    show(f"{folder / 'README.md'} is written.")
    if arguments.push_to_hub is not None:
        api = HfApi()
        repo_id = api.create_repo(arguments.push_to_hub, private=arguments.private or None, exist_ok=True).repo_id
        show(f"Pushed: {api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Upload Copilot')}")


def copy_picture(picture: Path, assets: Path) -> str:
    """Its name there."""
    if not picture.is_file():
        raise ValueError(f"The picture {picture} is not here.")
    if picture.suffix != ".png":
        raise ValueError(f"The picture {picture} is no PNG by its name: the card shows a .png.")
    assets.mkdir(exist_ok=True)
    if picture.resolve() != (assets / picture.name).resolve():
        shutil.copy(picture, assets / picture.name)
    return picture.name


def write_results(arguments: CardArguments, folder: Path) -> None:
    """`.eval_results/`, which the Hub shows on the model's page, from what `hf-copilot eval` wrote: a file for the
    Pilot alone and one for both."""
    if arguments.dataset_id is None or arguments.task_id is None:
        raise ValueError("Results on the Hub belong to a data set: --dataset_id and --task_id name it.")
    figures = read_figures(Path(arguments.results))
    measured = choose_figure(figures["results"], arguments.metric, arguments.task_id)
    place = folder / ".eval_results"
    place.mkdir(exist_ok=True)
    for name, key, who in (
        ("pilot", "pilot", "Pilot alone"),
        ("copilot", "rectified", f"Pilot + Copilot, strength {figures['strength']:g}"),
    ):
        entry = EvalResultEntry(
            dataset_id=arguments.dataset_id,
            task_id=arguments.task_id,
            value=measured[key],
            dataset_revision=arguments.dataset_revision,
            notes=f"{who}, {measured['metric']}",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        (place / f"{arguments.task_id.replace('/', '-')}-{name}.yaml").write_text(text, encoding="utf-8")


def choose_figure(results: dict[str, list[dict[str, Any]]], metric: str | None, task_id: str) -> dict[str, Any]:
    """The first of this metric, of the task where its name is among several that were measured."""
    titles = [title for title in results if title.startswith(f"{task_id}, ")] or list(results)
    found = {title: [entry for entry in results[title] if metric in (None, entry["metric"])] for title in titles}
    found = {title: entries for title, entries in found.items() if entries}
    if not found:
        raise ValueError(f"No metric {metric!r}, only {[e['metric'] for title in titles for e in results[title]]}.")
    if len(found) > 1:
        raise ValueError(
            f"The results are of {'; '.join(found)}: --task_id is to be the name of one of these tasks, or measure it "
            "by itself."
        )
    return next(iter(found.values()))[0]


def read_figures(file: Path) -> dict[str, Any]:
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
        return {"results": figures["results"], "strength": figures["strength"]}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what `hf-copilot eval --output_file` writes.") from error
