"""A Pilot and its Copilot, named on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..model.configuration_copilot import CopilotConfig
from ..model.fields import is_dtype
from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import check_pilot, is_hub_id
from ..training.checkpoint import WEIGHTS_FOLDER
from ..training.distributed import num_processes
from .parser import in_a_line


@dataclass
class PairArguments:
    """Which Pilot and which Copilot."""

    pilot: str = field(metadata={"help": "The Pilot: a folder (of a run), or a Hub id."})
    copilot: str | None = field(
        default=None, metadata={"help": "The Copilot: a folder or a Hub id; by default copilot/ in the Pilot's."}
    )
    pilot_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the Pilot."})
    copilot_revision: str | None = field(
        default=None, metadata={"help": "Likewise of the Copilot; by default the Pilot's, where it lies beside it."}
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the Pilot's weights, float32 or bfloat16."})
    device: str | None = field(default=None, metadata={"help": "cuda or cpu; by default the first there is."})

    def __post_init__(self):
        """What would be found out after loading."""
        if self.dtype != "auto" and not is_dtype(self.dtype):
            raise ValueError(f"--dtype {self.dtype}: choose auto, float32, bfloat16 or float16.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device}: {in_a_line(error)}") from error

    @property
    def copilot_place(self) -> tuple[str, str]:
        """Folder or Hub id of the Copilot, and the subfolder in it."""
        return (self.copilot, "") if self.copilot is not None else (self.pilot, WEIGHTS_FOLDER)

    @property
    def copilot_name(self) -> str:
        """Both as one path."""
        return "/".join(filter(None, self.copilot_place))


def load_pair(arguments: PairArguments) -> tuple[PreTrainedModel, CopilotModel, PreTrainedTokenizerBase]:
    """Both, in eval mode on the device, and the Pilot's tokenizer; raises a `ValueError` if they do not fit."""
    check_weights(arguments)
    pilot_config(arguments)  # a Pilot that is not there has no Copilot beside it
    copilot = load_copilot(arguments)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if num_processes() > 1:
        device = PartialState().device
    pilot = load_pilot(arguments).to(device).eval()
    tokenizer = load_tokenizer(arguments)
    check_pilot(copilot, pilot, tokenizer)
    return pilot, copilot.to(device).eval(), tokenizer


def check_place(name: str, what: str, files: tuple[str, ...], subfolder: str = "") -> None:
    """Raise a `ValueError` if a folder here is none of a model, or a name is neither."""
    folder = Path(name, subfolder)
    if not Path(name).exists() and not is_hub_id(name):
        raise ValueError(f"The {what} {name} is neither a folder here nor a Hub id.")
    if Path(name).is_file():
        raise ValueError(f"The {what} {name} is a file: name the folder that save_pretrained wrote.")
    if Path(name).is_dir() and not any((folder / file).is_file() for file in files):
        raise ValueError(f"The folder {folder} is no {what}: it has no {' or '.join(files)}.")


def check_weights(arguments: PairArguments) -> None:
    """Raise a `ValueError` for a folder with whole weights and an adapter, which would be added to them once more."""
    if any(Path(arguments.pilot).glob("model*.safetensors")) and has_adapter(arguments):
        raise ValueError(
            f"The folder {arguments.pilot} holds whole weights and an adapter, which transformers would add to them "
            "once more: save a merged Pilot in a folder of its own."
        )


def not_loaded(what: str, name: str, error: Exception) -> ValueError:
    """Of a folder here, or else of a name that was looked for on the Hub."""
    place = "" if Path(name).exists() else " from the Hub, and is no folder here"
    return ValueError(f"The {what} {name} can't be loaded{place}: {in_a_line(error)}")


def pilot_config(arguments: PairArguments) -> PreTrainedConfig:
    """That of the Pilot, or of what its adapter was trained on."""
    name, revision = arguments.pilot, arguments.pilot_revision
    check_place(name, "Pilot", ("config.json", "adapter_config.json"))
    try:
        if has_adapter(arguments):
            name = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
            revision = None
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded("Pilot", arguments.pilot, error) from error
    if isinstance(config, CopilotConfig):
        raise ValueError(f"{arguments.pilot} is a Copilot: name its Pilot first.")
    return config


def load_pilot(arguments: PairArguments) -> PreTrainedModel:
    auto_class = AutoModelForSeq2SeqLM if pilot_config(arguments).is_encoder_decoder else AutoModelForCausalLM
    revision: dict[str, Any] = {"revision": arguments.pilot_revision}
    if has_adapter(arguments):
        revision = {"adapter_kwargs": revision}  # not of what the adapter was trained on
    return auto_class.from_pretrained(arguments.pilot, dtype=arguments.dtype, **revision)


def has_adapter(arguments: PairArguments) -> bool:
    """Whether the Pilot is saved as an adapter."""
    return find_adapter_config_file(arguments.pilot, revision=arguments.pilot_revision) is not None


def empty_pilot(arguments: PairArguments) -> PreTrainedModel:
    """The Pilot without its weights, which are not downloaded."""
    config = pilot_config(arguments)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def load_tokenizer(arguments: PairArguments) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.pilot, revision=arguments.pilot_revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{arguments.pilot} has no tokenizer: {in_a_line(error)}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_copilot(arguments: PairArguments) -> CopilotModel:
    name, subfolder = arguments.copilot_place
    revision = arguments.copilot_revision or (arguments.pilot_revision if arguments.copilot is None else "main")
    check_place(name, "Copilot", ("config.json",), subfolder)
    file = Path(name, subfolder, "config.json")
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") != CopilotConfig.model_type:
        raise ValueError(f"The folder {file.parent} is no Copilot: its config.json is another model's.")
    if file.is_file():  # beside an adapter, which transformers before 5.24 would look for
        name, subfolder = str(file.parent), ""
    try:
        return CopilotModel.from_pretrained(name, revision=revision, subfolder=subfolder)
    except OSError as error:
        raise not_loaded("Copilot", name, error) from error
