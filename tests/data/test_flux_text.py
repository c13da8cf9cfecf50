"""FLUX.1's two text encoders, tiny and with random weights, in the layout of its pipeline."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fewstep.data.encode import EncodeText, Settings, ShardPlan
from fewstep.data.flux_text import FLUX_TOKENS
from fewstep.data.sources import Size
from fewstep.data.text import TextEncoder, pooled_dim, token_dim
from fewstep.errors import UserError

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
def encoder(name: str) -> TextEncoder:
    return TextEncoder.load(name)


def test_every_caption_has_flux_s_own_length_padding_included(encoder):
    states = encoder.encode(CAPTIONS)
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
    encoder.encode(["a dog"])
    encoder.each(["a dog"])
    assert rows == [1, 1], "512 padded tokens are enough to choose the kernels"


def test_a_batch_carries_both(encoder):
    conditioning = encoder.conditioning(CAPTIONS)
    assert conditioning.mask.all()
    assert torch.equal(conditioning.summary(), torch.stack(encoder.pooled(CAPTIONS)))
    assert TextEncoder.load().conditioning(["a dog"]).pooled is None


def test_widths_are_known_without_the_weights(name, encoder):
    assert (token_dim(name), pooled_dim(name)) == (encoder.dim, encoder.pooled_dim) == (12, 10)
    assert pooled_dim("minilm") is None


def test_the_encoding_stage_adds_the_vectors(name, encoder):
    settings = Settings(sizes=(Size(8, 8),), text_encoder=name, max_tokens=FLUX_TOKENS)
    rows = pa.table({"key": list("abcd"), "caption": CAPTIONS})
    stage = EncodeText(settings)
    stage.__dict__["encoder"] = encoder
    item = stage(ShardPlan("part", "train", Size(8, 8), (3, 8, 8), rows).as_item())
    with pa.ipc.open_stream(item["rows"]) as reader:
        pooled = reader.read_all()["pooled"].to_pylist()
    torch.testing.assert_close(torch.tensor(pooled), torch.stack(encoder.pooled(CAPTIONS)), atol=1e-6, rtol=0)


def test_a_folder_without_the_encoders_is_refused(tmp_path):
    with pytest.raises(UserError, match="can't be loaded") as caught:
        TextEncoder.load(f"flux:{tmp_path}")
    assert "\n" not in str(caught.value)
