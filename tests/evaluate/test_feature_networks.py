"""Networks of papers: CLIP and DINOv2 of transformers, TorchScript files, each against its own library or by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluate.features import load_features
from fewstep.evaluate.features.torchscript import LPIPS
from fewstep.evaluate.features.vision import CLIP
from fewstep.evaluate.measure import ImageSets, Judges, build_report
from fewstep.evaluate.report import Report

CAPTIONS = ["a red cat", "a blue dog", "a green sun", "a red cat"]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, with its processor and a tokenizer of some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {
        word: index
        for index, word in enumerate(["<pad>", "<end>", *sorted({w for c in CAPTIONS for w in c.split()})])
    }
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(words),
            "eos_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


def test_clip_scores_are_those_of_its_own_logits(clip_folder: Path, images: np.ndarray) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")(
        [Image.fromarray(one) for one in images], return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(clip_folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, **tokens)
    cosine = (output.logits_per_image / model.logit_scale.exp()).detach().numpy()

    aligned = CLIP.load(str(clip_folder)).align(images, CAPTIONS)
    np.testing.assert_allclose(aligned.scores, 100 * np.diag(cosine).clip(min=0), rtol=1e-4, atol=1e-4)
    others = cosine[:, :3]  # the fourth caption is the first one again
    own = np.array([0, 1, 2, 0])
    np.testing.assert_array_equal(aligned.ranks, (others > others[np.arange(4), own][:, None]).sum(1))


def test_a_report_tells_scores_retrieval_and_its_features(clip_folder: Path, images: np.ndarray) -> None:
    clip = load_features(f"clip:{clip_folder}")
    assert isinstance(clip, CLIP)
    sets = ImageSets({"student_4": images[::-1].copy()}, images, images, images, captions=CAPTIONS)
    report = build_report(sets, {"teacher_64": 128, "student_4": 4}, Judges(clip, clip=clip))
    assert report.features == "CLIP"
    row = report.row("student_4")
    assert row.retrieval_1 is not None
    assert row.retrieval_5 == 1.0, "there are three captions"
    assert 0 <= row.retrieval_1 <= 1
    assert Report.from_metrics(report.metrics(), "student_4").row("student_4") == row


def test_dinov2_features_are_its_class_token(tmp_path: Path, images: np.ndarray) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path
    )
    found = load_features(f"dinov2:{tmp_path}")
    features = found.features(images)
    assert features.shape == (4, 16)
    np.testing.assert_allclose(found.features(images[2:3])[0], features[2], atol=1e-5)
    # After the last normalisation the class token is what the model pools.
    pixels = BitImageProcessorPil.from_pretrained(tmp_path)(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        pooled = Dinov2Model.from_pretrained(tmp_path).eval()(pixels).pooler_output
    np.testing.assert_allclose(features, pooled.numpy(), atol=1e-5)


class Means(nn.Module):
    """Called like the networks of StyleGAN's metrics, with features that are known: each channel's mean."""

    def forward(
        self, x: Tensor, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False
    ) -> Tensor:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        assert return_features or (return_lpips and not resize_images and x.shape[2] >= 64)
        return x.float().mean(dim=[2, 3]) / 255


@pytest.fixture
def script(tmp_path: Path) -> Path:
    torch.jit.script(Means()).save(tmp_path / "network.pt")
    return tmp_path / "network.pt"


def test_a_torchscript_file_gives_features_and_lpips(script: Path, images: np.ndarray) -> None:
    features = load_features(f"inception:{script}").features(images)
    np.testing.assert_allclose(features, images.mean(axis=(1, 2)) / 255, atol=1e-5)
    distances = LPIPS(str(script)).distances(images, images[::-1])
    expected = np.square((images.mean(axis=(1, 2)) - images[::-1].mean(axis=(1, 2))) / 255).sum(1)
    np.testing.assert_allclose(distances, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("inceptionv3", "there is no network 'inceptionv3'"),
        ("inception", "inception:FILE"),
        ("inception:/nowhere.pt", r"there is no file /nowhere\.pt"),
        ("dinov2:/nowhere", "/nowhere can't be loaded"),
    ],
)
def test_what_can_not_be_loaded_is_told(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_features(spec)


def test_a_file_that_is_no_torchscript_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match="no TorchScript file"):
        load_features(f"inception:{tmp_path / 'x.pt'}")
