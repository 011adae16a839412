"""The card of a Copilot, written from what its config knows and nothing else."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from .configuration_copilot import CopilotConfig

_TEMPLATE = """---
{metadata}
---

# Transformer Copilot for {pilot}

A [Transformer Copilot](https://huggingface.co/papers/2505.16270): a small decoder that was trained on the mistakes of
a language model (the *Pilot*, {pilot}) while that was fine-tuned, and that rectifies the Pilot's distribution in
`generate`. It is an adapter: it needs a Pilot of {needs}.

## Use it

```python
from transformers import {auto_class}, AutoTokenizer
from hf_copilot import CopilotLogitsProcessor, CopilotModel

pilot = {auto_class}.from_pretrained("{pilot_id}")  # or your fine-tuned version of it
tokenizer = AutoTokenizer.from_pretrained("{pilot_id}")
copilot = CopilotModel.from_pretrained("<this repository or folder>")

inputs = tokenizer("...", return_tensors="pt")
with CopilotLogitsProcessor(copilot, pilot, tokenizer=tokenizer) as processor:
    output = pilot.generate(**inputs, logits_processor=[processor])
```
{results}
## Settings

Trained with hf_copilot {version}.

| | |
|---|---|
| objective, fusion, strength λ | `{objective}`, `{fusion}`, {strength} |
| input, error feedback, vocabulary | `{copilot_input}`, `{error_feedback}`, `{vocab_projection}` |
| layers, hidden size, pattern, positions | {num_hidden_layers}, {hidden_size}, {pattern}, `{position_embedding}` |
| started from | `init="{init}"` |
| memory | {memory} |
| Pilot tokens | top {top_k} |

## Limits

A Copilot can't be merged into its Pilot, and it runs where `model.generate` does: other engines (vLLM, for one) can't
use it. It adds its own cost to every generated token.

## Citation

Zou et al., *Transformer Copilot: Learning from the Mistake Log in LLM Fine-tuning*, NeurIPS 2025, arXiv:2505.16270.
"""


def copilot_card(config: CopilotConfig) -> ModelCard:
    """The model card of a Copilot; keys that are not known are left out."""
    on_hub = config.base_model_name_or_path
    metadata = ModelCardData(
        library_name="hf_copilot",
        base_model=on_hub,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag="text2text-generation" if config.pilot_is_encoder_decoder else "text-generation",
        tags=["transformer-copilot", "copilot", "generated_from_trainer", "arxiv:2505.16270"],
    )
    fields = {name: value for name, value in config.to_dict().items() if name not in ("results", "memory")}
    return ModelCard(
        _TEMPLATE.format(
            **fields,
            metadata=metadata.to_yaml(),
            needs=_needs(config),
            memory=_memory(config),
            pilot=f"`{on_hub}`" if on_hub else f"a `{config.pilot_model_type}` model",
            pilot_id=on_hub or "<the Pilot>",
            auto_class="AutoModelForSeq2SeqLM" if config.pilot_is_encoder_decoder else "AutoModelForCausalLM",
            version=config.hf_copilot_version,
            results=_results(config.results) + _calibration(config.calibration),
        )
    )


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
    head = ["", "## Results", "", "Teacher-forced, on the evaluation set of the run that trained it:", ""]
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
