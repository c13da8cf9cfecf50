"""Text encoders of pipelines give what `encode_prompt` of diffusers' own pipelines gives, of tiny random parts."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_pipelines import CHAT, DECODER, WORDS, language_model, tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from fewstep.config import Precision
from fewstep.encoders import encoder_widths, load_encoder
from fewstep.encoders import text as texts
from fewstep.encoders.base import of_pipeline, usual_precision
from fewstep.encoders.prompts import PipelineTextEncoder
from fewstep.errors import UserError
from fewstep.models.diffusers_family import bare_pipeline
from fewstep.plan.parts import text_encoder_bytes

KINDS = ("z-image", "longcat-image", "sd3", "qwen-image-2.1", "krea2", "wan")
CAPTIONS = ["a red heart", "a dog", "", "dog 'red' heart a a dog"]
KREA_LAYERS = (1, 2)


@dataclass
class Made:
    """A pipeline of diffusers with tiny text encoders: in memory, and in a folder."""

    kind: str
    folder: Path
    pipe: Any

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.folder}"

    @torch.no_grad()
    def by_diffusers(self, caption: str) -> tuple[Tensor, Tensor | None]:
        """(L, D) that the network is to see, and (P,) or None."""
        match self.kind:
            case "z-image":
                return self.pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0][0], None
            case "longcat-image":
                return self.pipe.encode_prompt(caption)[0][0], None
            case "sd3":
                states, negative, pooled, _ = self.pipe.encode_prompt(caption, caption, caption)
                assert negative.shape == states.shape == (1, 9 + 256, 32)
                return states[0], pooled[0]
            case "qwen-image-2.1":
                states, mask, _ = self.pipe.encode_prompt(caption)
                assert mask is None, "no padding"
                return states[0], None
            case "wan":
                # As its call: rows of zeros follow, which the network's family adds.
                states = self.pipe.encode_prompt(caption, None, False, max_sequence_length=512)[0][0]
                assert len(states) == 512
                return states[states.any(dim=1)], None
        states, mask = self.pipe.encode_prompt(caption)
        return states[mask].flatten(1), None


def words(folder: Path, template: str = "$A", **options: Any) -> Any:
    tokenizer(template, folder)
    made = AutoTokenizer.from_pretrained(folder, **options)
    made.chat_template = CHAT
    return made


def sd3_parts(folder: Path) -> dict[str, Any]:
    t5 = T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=4, d_ff=16, num_layers=1, num_heads=3, pad_token_id=0, eos_token_id=2
    )  # fmt: skip
    parts = {"text_encoder_3": T5EncoderModel(t5).eval(), "tokenizer_3": words(folder, "$A </s>")}
    for number, width, projected in (("", 10, 6), ("_2", 12, 7)):
        clip = CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=9, projection_dim=projected, bos_token_id=1,
            eos_token_id=7, pad_token_id=0,
        )  # fmt: skip
        clip.eos_token_id = 2
        parts[f"text_encoder{number}"] = CLIPTextModelWithProjection(clip).eval()
        parts[f"tokenizer{number}"] = words(folder / number, "<s> $A </s>", model_max_length=9)
    return parts


def qwen3_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    text = DECODER | {
        "vocab_size": len(WORDS) + 2,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def made(kind: str, folder: Path) -> Made:
    torch.manual_seed(0)
    plain = words(folder / "plain")
    match kind:
        case "z-image":
            model = Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, num_hidden_layers=3)).eval()
            pipe = bare_pipeline("ZImagePipeline", text_encoder=model, tokenizer=plain)
        case "longcat-image":
            model = language_model("qwen-image").eval()
            pipe = bare_pipeline("LongCatImagePipeline", text_encoder=model, tokenizer=plain)
        case "sd3":
            pipe = bare_pipeline("StableDiffusion3Pipeline", **sd3_parts(folder / "plain"))
        case "wan":
            umt5 = UMT5Config(
                vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=3, pad_token_id=0,
                eos_token_id=2,
            )  # fmt: skip
            ended = words(folder / "ended", "$A </s>")
            pipe = bare_pipeline("WanPipeline", text_encoder=UMT5EncoderModel(umt5).eval(), tokenizer=ended)
        case "krea2":
            settings = {"text_encoder_select_layers": KREA_LAYERS}
            pipe = bare_pipeline("Krea2Pipeline", text_encoder=qwen3_vl().model, tokenizer=plain, **settings)
        case _:
            plain.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
            # Its video processor needs torchvision, which is not installed; for texts none of the others is used.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *given: None)
                processor = Qwen3VLProcessor(tokenizer=plain, chat_template=CHAT)
            pipe = bare_pipeline("QwenImage21Pipeline", text_encoder=qwen3_vl(), processor=processor)
            # As the pipeline's `save_pretrained` would, but for the processors of pictures.
            plain.save_pretrained(folder / "pipeline" / "processor")
            pipe.text_encoder.save_pretrained(folder / "pipeline" / "text_encoder")
            return Made(kind, folder / "pipeline", pipe)
    pipe.save_pretrained(folder / "pipeline")
    return Made(kind, folder / "pipeline", pipe)


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def encoder(pipeline: Made) -> PipelineTextEncoder:
    return load_encoder(pipeline.name)


def test_a_caption_becomes_what_the_pipeline_gives_its_network(pipeline, encoder):
    given = list(CAPTIONS)
    for caption, ours in zip(CAPTIONS, encoder.each(given), strict=True):
        states, pooled = pipeline.by_diffusers(caption)
        torch.testing.assert_close(ours.states[0], states, atol=1e-6, rtol=1e-5)
        assert ours.mask.all()
        assert (ours.pooled is None) == (pooled is None)
        if pooled is not None:
            torch.testing.assert_close(ours.pooled[0], pooled, atol=1e-6, rtol=1e-5)
    assert given == CAPTIONS, "the caller's list stays as it is"
    different = {tuple(one.states.flatten()[-400:].tolist()) for one in encoder.each(CAPTIONS)}
    assert len(different) == len(CAPTIONS)


def test_widths_and_memory_are_known_without_the_weights(pipeline, encoder):
    [one] = encoder.each(["a dog"])
    pooled = None if one.pooled is None else one.pooled.shape[1]
    assert encoder_widths(pipeline.name) == (encoder.dim, encoder.pooled_dim) == (one.states.shape[2], pooled)
    assert text_encoder_bytes(pipeline.name, "float32") == pytest.approx(encoder.nbytes, rel=0.02)


def test_a_caption_does_not_depend_on_the_others(encoder):
    together, alone = encoder.conditioning(CAPTIONS), [encoder.conditioning([c]) for c in CAPTIONS]
    for row, one in enumerate(alone):
        assert torch.equal(together.states[row][together.mask[row]], one.states[0])
    assert all(map(torch.equal, encoder.states(CAPTIONS), [one.states[0] for one in alone]))
    assert encoder.stored_states([]) == encoder.encode([]) == []


def test_shards_hold_the_same_rounded_and_the_null_condition_is_the_empty_caption(encoder):
    for stored, exact in zip(encoder.stored_states(CAPTIONS), encoder.states(CAPTIONS), strict=True):
        assert torch.equal(stored, stored.half().float())
        torch.testing.assert_close(stored, exact, atol=1e-6, rtol=2**-10)
    assert torch.equal(encoder.null().states[0], encoder.stored_states([""])[0])


def test_captions_that_the_pipeline_would_cut_are_refused(pipeline, encoder):
    """The count is the pipeline's own: what it gives still grows below the limit, and not above."""
    limit = {"z-image": 512, "longcat-image": 512, "sd3": 256, "wan": 512}.get(pipeline.kind)
    long = load_encoder(pipeline.name, max_tokens=2000)
    if pipeline.kind == "krea2":
        limit = 512 + 34 - 5
    assert long.max_tokens == (limit or 2000 + long.token_counts([""])[0])
    beside = long.token_counts(["dog"])[0] - 1
    fits = long.max_tokens - beside
    if limit is None:
        return
    long.check(["dog " * fits])
    with pytest.raises(UserError, match=f"is too long \\({limit + 1} tokens, at most {limit}\\)"):
        long.check(["dog " * (fits + 1)])
    one_less, most, more = (pipeline.by_diffusers("dog " * (fits + by))[0] for by in (-1, 0, 1))
    if pipeline.kind in ("longcat-image", "sd3"):
        assert not torch.equal(one_less, most)
    else:
        assert len(one_less) + 1 == len(most) == len(more)
    if pipeline.kind == "longcat-image":  # others keep the end of a caption that is cut
        torch.testing.assert_close(most, more)


def test_a_shorter_limit_is_on_the_caption_where_texts_keep_their_length(pipeline):
    encoder = load_encoder(pipeline.name, max_tokens=8)
    encoder.check(["dog " * 7])
    if pipeline.kind not in ("longcat-image", "sd3"):  # which always have all their rows
        with pytest.raises(UserError, match="is too long"):
            encoder.check(["dog " * 9])


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_language_models_are_lowered_and_clip_is_never_made_of_integers(
    pipeline, encoder, precision: Precision
):
    lowered = load_encoder(pipeline.name, precision=precision)
    assert lowered.precision == precision
    assert lowered.nbytes < 0.75 * encoder.nbytes
    for one, exact in zip(lowered.each(CAPTIONS[:2]), encoder.each(CAPTIONS[:2]), strict=True):
        assert one.states.dtype == torch.float32
        assert (one.states - exact.states).norm() < 0.1 * exact.states.norm()
    for clip in getattr(lowered, "_clips", ()):
        assert {weight.dtype for weight in clip.parameters()} == {torch.bfloat16}


def test_models_visit_the_device_for_their_work(pipeline, encoder):
    leaves = load_encoder(pipeline.name)
    leaves.offload()
    for one, other in zip(leaves.each(CAPTIONS), encoder.each(CAPTIONS), strict=True):
        assert torch.equal(one.states, other.states)
        assert one.pooled is None or torch.equal(one.pooled, other.pooled)


def test_the_usual_precision_on_a_gpu(pipeline):
    exact = of_pipeline(pipeline.name) == "sd3"
    assert usual_precision(pipeline.name, on_cpu=False) == ("float32" if exact else "bfloat16")
    assert usual_precision(pipeline.name, on_cpu=True) == "float32"


def test_an_encoder_goes_with_its_last_reference(pipeline):
    """Nothing of diffusers keeps the models."""
    import weakref

    encoder = load_encoder(pipeline.name)
    encoder.each(["a dog"])
    gone = weakref.ref(encoder._model)
    del encoder
    gc.collect()
    assert gone() is None


def test_a_folder_without_the_encoders_is_one_sentence(pipeline, tmp_path):
    for call in (load_encoder, encoder_widths):
        with pytest.raises(
            UserError, match=r"can't be loaded .* KIND is one of flux, flux2, krea2"
        ) as caught:
            call(f"{pipeline.kind}:{tmp_path}")
        assert "\n" not in str(caught.value)


def test_every_kind_is_a_class_of_diffusers_and_named_in_messages():
    assert set(KINDS) < set(texts.PIPELINES)
    for kind in PipelineTextEncoder.__subclasses__():
        assert hasattr(diffusers, kind._pipeline_class)
