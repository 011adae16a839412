"""Pilots that are no language model of one piece raise before training begins, and say what to use instead."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import BART_SHAPE, QUIET, SHAPE, VOCAB_SIZE, sums, tiny_tokenizer

from hf_copilot import (
    CopilotConfig,
    CopilotLogitsProcessor,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    copilot_for,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = SMALL | {"image_size": 16, "patch_size": 8}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SPEECH = {key: value for key, value in BART_SHAPE.items() if key not in ("init_std", "forced_eos_token_id")}


def composed(kind, encoder_config):
    decoder = transformers.BertConfig(vocab_size=VOCAB_SIZE, **SMALL)
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(encoder_config, decoder)
    return getattr(transformers, f"{kind}Model")(config)


def of_speech(kind, **shape):
    return getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**SPEECH, **shape)
    )


def llava():
    text = transformers.LlamaConfig(**SHAPE)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**PATCHES), text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


KINDS = {
    "two BERTs": (
        lambda: composed("EncoderDecoder", transformers.BertConfig(vocab_size=VOCAB_SIZE, **SMALL)),
        "composed of two models, and its decoder is a whole BertLMHeadModel.*T5",
    ),
    "Wav2Vec2 and BERT": (
        lambda: composed("SpeechEncoderDecoder", transformers.Wav2Vec2Config(**SMALL, **CONVOLUTIONS)),
        "reads inputs, and .*T5",
    ),
    "ViT and BERT": (
        lambda: composed("VisionEncoderDecoder", transformers.ViTConfig(**PATCHES)),
        "reads pixel_values, and .*T5",
    ),
    "Whisper": (lambda: of_speech("Whisper", num_mel_bins=8), "reads input_features, and .*T5"),
    "Speech2Text": (lambda: of_speech("Speech2Text", input_feat_per_channel=8), "reads input_features, and .*T5"),
    "Llava": (llava, "reads more than text.*AutoModelForCausalLM"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [None, CopilotConfig(init="random", memory="tokens", num_hidden_layers=2)])
def test_what_is_no_language_model_of_one_piece_raises(kind, config):
    make, message = KINDS[kind]
    pilot = make()
    with pytest.raises(NotImplementedError, match=f"^{type(pilot).__name__} (is )?{message}"):
        copilot_for(pilot, config)


def test_so_does_a_copilot_that_is_given(pilot):
    copilot = copilot_for(pilot)
    with pytest.raises(NotImplementedError, match="reads more than text"):
        CopilotLogitsProcessor(copilot, llava())


def test_it_raises_when_the_trainer_is_made(tmp_path):
    args = CopilotSeq2SeqConfig(output_dir=tmp_path, **QUIET)
    make, message = KINDS["two BERTs"]
    with pytest.raises(NotImplementedError, match=message):
        CopilotSeq2SeqTrainer(model=make(), args=args, train_dataset=sums(4), processing_class=tiny_tokenizer())


def test_layers_that_cannot_be_found_beside_an_encoder_give_no_advice_in_a_circle():
    pilot = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_SHAPE))
    copilot = copilot_for(pilot, CopilotConfig(init="random"))
    pilot.get_decoder().more = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(ValueError, match=r"found 2\. Take another Pilot\.$"):
        CopilotLogitsProcessor(copilot, pilot)
