"""A Copilot on disk and on the Hub: loaded strictly, saved with a card, pushed in one commit."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .configuration_copilot import CopilotConfig
from .fields import SIZES

ASSETS = "assets"  # pictures, in a Copilot's folder
TEMPLATE = Path(__file__).with_name("card.md")
# of `from_pretrained`: where a file is found
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CopilotPreTrainedModel(PreTrainedModel):
    """What [`CopilotModel`] does on disk and on the Hub."""

    config_class = CopilotConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained` (`dtype`, `device_map`, `revision`, `subfolder`, ...), safetensors
        only, but raises a `ValueError` if a file is damaged, or a tensor missing, unexpected or of another size than
        the config says; the last before anything is allocated, where all weights are in one file."""
        _check_weights(cls, pretrained_model_name_or_path, kwargs)
        asked_for_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True} | kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        faults = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
        if any(faults.values()):
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete Copilot (tensors that are missing, unexpected, or "
                f"of other sizes than the config says): {faults}. Download or save it again with "
                "CopilotModel.save_pretrained."
            )
        return (model, info) if asked_for_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`: `config.json`, `model.safetensors` and a card (`README.md`)."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("Call copilot.push_to_hub(repo_id): it uploads weights and card in one commit.")
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError("Save a Copilot before it is quantised: from_pretrained quantises it as it is loaded.")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(save_directory, self.config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """As `PreTrainedModel.push_to_hub`, in one commit and with the Copilot's own card; gives the commit's URL."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            card = copilot_card(self.config, repo_id)
            card.data.tags = [*card.data.tags, *(tags or [])]
            card.save(os.path.join(directory, "README.md"))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or "Upload CopilotModel",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _check_weights(model_class: type, name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Compare what the weights' header lists with what the config asks for. Weights in several files are compared
    when they are loaded, and those that are given (`state_dict`) likewise."""
    if name_or_path is None:
        return
    place, config = {name: kwargs[name] for name in PLACE if name in kwargs}, kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = CopilotConfig.from_pretrained(config or name_or_path, **place)
    try:
        file = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **place)
    except OSError:
        return
    found = _listed(file)
    layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
    if layers != config.num_hidden_layers:  # before as many are built
        raise ValueError(f"num_hidden_layers={config.num_hidden_layers} in the config, and {file} has {layers}.")
    with torch.device("meta"):
        expected = model_class(copy.deepcopy(config)).state_dict()
    other = [name for name in found.keys() & expected.keys() if found[name] != list(expected[name].shape)]
    if other:
        sizes = {name: getattr(config, name) for name in SIZES}
        listed = {name: (found[name], list(expected[name].shape)) for name in sorted(other)}
        raise ValueError(f"{file} has tensors of other sizes (found, expected): {listed}. The config has {sizes}.")


def _listed(file: str) -> dict[str, list[int]]:
    """The names and shapes of a file's tensors, of its header alone."""
    try:
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            whole = [name for name, tensor in slices.items() if not tensor.get_dtype().startswith(("F", "BF"))]
            shapes = {name: list(tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}. Download or save it again.") from error
    if whole:
        raise ValueError(f"{file} is damaged: {whole} are no floating-point numbers. Download or save it again.")
    return shapes


def copilot_card(config: CopilotConfig, repo_id: str | None = None, picture: str | None = None) -> ModelCard:
    """The model card of a Copilot; keys that are not known are left out.

    Args:
        repo_id: Where its snippet loads the Copilot from, if that is known.
        picture: What it shows, a path in the repository.
    """
    on_hub = config.base_model_name_or_path
    metadata = ModelCardData(
        library_name="hf_copilot",
        base_model=on_hub,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag="text2text-generation" if config.pilot_is_encoder_decoder else "text-generation",
        tags=["transformer-copilot", "copilot", "generated_from_trainer", "arxiv:2505.16270"],
    )
    settings = {name: value for name, value in config.to_dict().items() if name not in ("results", "memory")}
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        needs=_needs(config),
        memory=_memory(config),
        pilot=f"`{on_hub}`" if on_hub else f"a `{config.pilot_model_type}` model",
        pilot_id=f"<your Pilot, fine-tuned from {on_hub}>" if on_hub else "<your Pilot>",
        copilot_id=repo_id or "<this repository or folder>",
        picture=f"\n![Pilot and Pilot + Copilot]({picture})\n" if picture else "",
        auto_class="AutoModelForSeq2SeqLM" if config.pilot_is_encoder_decoder else "AutoModelForCausalLM",
        version=config.hf_copilot_version,
        results=_results(config.results) + _calibration(config.calibration),
        **settings,
    )


def write_card(
    folder: str | os.PathLike, config: CopilotConfig, repo_id: str | None = None, picture: str | None = None
) -> None:
    """Write `README.md` into a Copilot's folder, with a picture of its `assets/`, by default the first."""
    pictures = [picture] if picture else sorted(file.name for file in Path(folder, ASSETS).glob("*.png"))
    shown = f"{ASSETS}/{pictures[0]}" if pictures else None
    copilot_card(config, repo_id, shown).save(Path(folder, "README.md"))


def _needs(config: CopilotConfig) -> str:
    """What a Pilot must have."""
    if not config.reads_states:
        return "the same tokenizer, of whatever size"
    if config.vocab_projection == "pilot":
        return (
            "the same vocabulary and hidden size, with the same embedding and head or nearly so: it uses the Pilot's"
        )
    return "the same vocabulary and hidden size"


def _memory(config: CopilotConfig) -> str:
    """What cross-attention reads."""
    if not config.reads_states:
        return "the tokens, none of the Pilot's states"
    layers = f"`{config.pooling}` over `{config.pooled_layers}` layers"
    return f"the Pilot's states of size {config.pilot_hidden_size}, {layers}"


def _results(results: dict | None) -> str:
    """A table of the last evaluation, Pilot alone beside Pilot + Copilot; empty without one."""
    if not results:
        return ""
    rows = [
        ("Negative log-likelihood (nats per token)", results["pilot_nll"], results["rectified_nll"]),
        ("Token accuracy", results["pilot_token_accuracy"], results["rectified_token_accuracy"]),
    ]
    lines = [f"| {name} | {pilot:.4f} | {rectified:.4f} |" for name, pilot, rectified in rows]
    head = ["", "## Results", "", "Teacher-forced, on rows for evaluation:", ""]
    return "\n".join([*head, "| | Pilot | Pilot + Copilot |", "|---|---|---|", *lines, ""])


def _calibration(calibration: dict | None) -> str:
    """How λ was chosen; empty if it was not."""
    if calibration is None:
        return ""
    rows = zip(calibration["strengths"], calibration["nll"], calibration["token_accuracy"], strict=True)
    lines = [f"| {strength:g} | {nll:.4f} | {accuracy:.4f} |" for strength, nll, accuracy in rows]
    data = f"{calibration['targets']:,} tokens of {calibration['data']}"
    best = {"nll": "the least NLL", "token_accuracy": "the highest token accuracy"}[calibration.get("metric", "nll")]
    head = ["", f"λ = {calibration['strength']:g} had {best}, teacher-forced on {data} (0 is the Pilot alone):"]
    return "\n".join([*head, "", "| λ | NLL (nats per token) | token accuracy |", "|---|---|---|", *lines, ""])
