"""The text encoders of pipelines, tiny and with random weights, in the pipelines' layout; they do as diffusers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, QwenImagePipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from fewstep.data.prepare import EncodeText, PreparationConfig, ShardPlan
from fewstep.data.rows import index_table
from fewstep.encoders import ConditionEncoder, encoder_widths, load_encoder
from fewstep.encoders.pipelines import FLUX_TOKENS
from fewstep.errors import UserError
from fewstep.images import Size

WORDS = {
    word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "red", "heart", "dog"])
}
CAPTIONS = ["a red heart", "a dog", "", "a dog"]


def tokenizer(template: str, folder: Path) -> None:
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=2
    )
    clip = CLIPTextConfig(
        vocab_size=8, hidden_size=10, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=1, eos_token_id=7, pad_token_id=0,
    )  # fmt: skip
    clip.eos_token_id = 2
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    tokenizer("$A </s>", folder / "tokenizer_2")
    tokenizer("<s> $A </s>", folder / "tokenizer")
    return f"flux:{folder}"


@pytest.fixture(scope="module")
def encoder(name: str) -> ConditionEncoder:
    return load_encoder(name)


def test_every_caption_has_flux_s_own_length_padding_included(encoder):
    states = encoder.stored_states(CAPTIONS)
    assert {tuple(state.shape) for state in states} == {(FLUX_TOKENS, 12)}
    ids = torch.zeros(1, FLUX_TOKENS, dtype=torch.long)
    ids[0, :3] = torch.tensor([4, 7, 2])  # a dog </s>
    expected = encoder._model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(states[1], expected, atol=2e-3, rtol=0)
    assert expected[3:].any(), "padding has states, and is attended to"


def test_a_caption_is_one_vector_that_does_not_depend_on_others(encoder):
    together = encoder.pooled(CAPTIONS)
    assert together[0].shape == (10,)
    assert torch.equal(together[1], together[3])
    assert not torch.allclose(together[0], together[1])
    torch.testing.assert_close(encoder.pooled(CAPTIONS[:1])[0], together[0], atol=1e-6, rtol=0)


def test_each_caption_goes_through_t5_once(encoder, monkeypatch):
    rows, forward = [], encoder._model.forward

    def counted(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder._model, "forward", counted)
    encoder.stored_states(["a dog"])
    encoder.each(["a dog"])
    assert rows == [1, 1], "512 padded tokens are enough to choose the kernels"


def test_a_batch_carries_both(encoder):
    conditioning = encoder.conditioning(CAPTIONS)
    assert conditioning.mask.all()
    assert torch.equal(conditioning.summary(), torch.stack(encoder.pooled(CAPTIONS)))
    assert load_encoder().conditioning(["a dog"]).pooled is None


def test_widths_are_known_without_the_weights(name, encoder):
    assert encoder_widths(name) == (encoder.dim, encoder.pooled_dim) == (12, 10)
    assert encoder_widths("minilm") == (384, None)


def test_the_encoding_stage_adds_the_vectors(name, encoder):
    settings = PreparationConfig(sizes=(Size(8, 8),), text_encoder=name, max_tokens=FLUX_TOKENS)
    names = list("abcd")
    rows = index_table({"key": names, "caption": CAPTIONS, "where": names, "split": ["train"] * 4}, 4)
    stage = EncodeText(settings)
    stage.__dict__["encoder"] = encoder
    item = stage(ShardPlan("part", "train", Size(8, 8), (3, 8, 8), rows, np.arange(4)).as_item())
    with pa.ipc.open_stream(item["rows"]) as reader:
        pooled = reader.read_all()["pooled"].to_pylist()
    torch.testing.assert_close(torch.tensor(pooled), torch.stack(encoder.pooled(CAPTIONS)), atol=1e-6, rtol=0)


def test_a_folder_without_the_encoders_is_refused(tmp_path):
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load_encoder(f"flux:{tmp_path}")
    assert "\n" not in str(caught.value)


CHAT = (
    "{% for message in messages %}<s> {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %} </s>{% endfor %}"
    "{% if add_generation_prompt %} <s> a{% endif %}"
)
DECODER = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}


def language_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "qwen-image":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
        text = DECODER | {"num_hidden_layers": 2, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    if kind == "klein":
        return Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, num_hidden_layers=28))
    text = DECODER | {"model_type": "mistral", "head_dim": 8, "num_hidden_layers": 31}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=VISION | {"model_type": "pixtral"})
    )


@pytest.fixture(scope="module", params=["qwen-image", "klein", "dev"])
def pipeline(request, tmp_path_factory):
    """(kind, name of the encoder, its model, its tokenizer), the model as it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    model = language_model(request.param).eval()
    model.save_pretrained(folder / "text_encoder")
    tokenizer("$A", folder / "tokenizer")
    side = "left" if request.param == "dev" else "right"
    words = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side=side)
    words.chat_template = CHAT
    words.save_pretrained(folder / "tokenizer")
    prefix = "qwen-image" if request.param == "qwen-image" else "flux2"
    return request.param, f"{prefix}:{folder}", model, words


@torch.no_grad()
def by_diffusers(kind: str, model: torch.nn.Module, words, caption: str) -> torch.Tensor:
    """(L, D): what the pipeline itself would give its transformer."""
    if kind == "qwen-image":
        pipe = QwenImagePipeline(
            scheduler=None, vae=None, text_encoder=model, tokenizer=words, transformer=None
        )
        return pipe._get_qwen_prompt_embeds(caption, device="cpu")[0][0]
    if kind == "klein":
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(model, words, caption)[0]
    return Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, words, caption)[0]


def test_a_caption_becomes_what_the_pipeline_gives_its_transformer(pipeline):
    kind, name, model, words = pipeline
    encoder = load_encoder(name)
    for caption, ours in zip(CAPTIONS, encoder.stored_states(CAPTIONS), strict=True):
        expected = by_diffusers(kind, model, words, caption)
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert encoder_widths(name) == (encoder.dim, encoder.pooled_dim) == (expected.shape[1], None)


def test_longer_captions_than_the_pipeline_takes_are_refused(pipeline):
    kind, name, *_ = pipeline
    encoder = load_encoder(name, max_tokens=8)
    encoder.check(["dog " * 7])
    with pytest.raises(UserError, match="is too long"):
        encoder.check(["dog " * (9 if kind == "qwen-image" else 600)])
