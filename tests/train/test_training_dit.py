"""Class-conditional runs from end to end: a DiT teacher on labels, and a student on that teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fewstep.data.columns import condition_columns
from fewstep.data.schema import DatasetInfo, Encoding, Shard, bucket_folder, encode_table
from fewstep.encoders import load_encoder
from fewstep.errors import UserError
from fewstep.models.dit import DiT
from fewstep.models.qwen_image import QwenImage
from fewstep.models.teacher import load_teacher, read_card
from fewstep.storage import Storage
from fewstep.student import FewStepPipeline
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe
from fewstep.train.trainer import fit
from fewstep.train.validation import _check_fit

CLASSES, SHAPE, ROWS = "labels:cat,dog,owl", (1, 8, 8), 12
NETWORK = (
    "{num_attention_heads: 2, attention_head_dim: 16, in_channels: 1, out_channels: 1, num_layers: 2, "
    "sample_size: 8, patch_size: 4, num_embeds_ada_norm: 3}"
)
FIXED = [
    "data.batch_size=8", "train.threads=1", "train.cpus_per_worker=0.5", "train.log_every=50", "train.sample_every=0",
    "data.reading=threads",
]  # fmt: skip


@pytest.fixture(scope="session")
def labelled_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards and one held-out shard; a class's images are its own shade of grey, and noise."""
    root = tmp_path_factory.mktemp("labelled-data")
    rng, encoder, shards = np.random.default_rng(0), load_encoder(CLASSES), []
    encoding = Encoding(CLASSES, 0, "grey")
    for split, part in (("train", 0), ("train", 1), ("held_out", 0)):
        captions = [encoder.classes[row % 3] for row in range(ROWS)]
        keys = [f"{split}-{part}-{row}" for row in range(ROWS)]
        columns = condition_columns(encoder.encode(captions))
        rows = pa.table({"key": keys, "caption": captions, **columns})
        shades = np.array([row % 3 - 1.0 for row in range(ROWS)]).reshape(-1, 1, 1, 1)
        latents = (shades + rng.normal(0, 0.1, (ROWS, *SHAPE))).astype(np.float32)
        table = encode_table(rows, latents, SHAPE, split).replace_schema_metadata(encoding.metadata())
        path = f"{bucket_folder(split, SHAPE)}/part-{part:05d}.parquet"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / path)
        shards.append(Shard(path, split, SHAPE, ROWS))
    DatasetInfo(Storage.at(root), encoding, "tests", True, tuple(shards)).save()
    return root


@pytest.mark.slow
def test_a_teacher_learns_classes_and_its_student_draws_them(
    labelled_data: Path, ray_cluster, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teaching = [
        *FIXED, f"data.path={labelled_data}", f"network={{family: dit, config: {NETWORK}}}", "train.steps=700",
        "optimizer.lr=3e-3", "optimizer.ema_gamma=2", "flow_matching.shift=1",
    ]  # fmt: skip
    teacher = fit(load_recipe(TeacherRecipe, None, teaching))
    card = read_card(str(teacher.folder))
    assert (card.family, card.text_encoder, card.autoencoder) == ("dit", CLASSES, "grey")
    load_teacher(str(teacher.folder), "dit")

    # Two sharded workers: the embedder is gathered with the root, for all blocks.
    distilling = [
        *FIXED, f"data.path={labelled_data}", f"teacher.path={teacher.folder.absolute()}", "teacher.family=dit",
        "teacher.guidance_scale=1.5", "teacher.guidance_interval=[0, 0.8]", "train.steps=10", "train.workers=2",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}", "student.lora={rank: 4}",
        "imitation={window: 0}", "sampler={nfe: 1, shift: 1, final_step_scale: 1}",
    ]  # fmt: skip
    student = fit(load_recipe(DistillRecipe, None, distilling))
    pipe = FewStepPipeline.from_pretrained(student.folder)
    assert pipe.card.teacher_sampler.guidance_interval == (0.0, 0.8)
    assert pipe.teacher.interval.high == 0.8
    cat, owl = (np.mean([np.asarray(image) for image in pipe([name] * 8).images]) for name in ("cat", "owl"))
    assert owl - cat > 40, "of 255 between the darkest class and the brightest"


def test_data_of_other_classes_than_the_teachers_is_refused(labelled_data: Path) -> None:
    info = DatasetInfo.open(labelled_data)
    with torch.device("meta"):
        fitting, other = (
            DiT().build({"in_channels": 1, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": classes})
            for classes in (3, 10)
        )
        of_text = QwenImage().build({"in_channels": 4, "out_channels": 1, "num_layers": 1})
    _check_fit(info, fitting, DiT(), "t")
    with pytest.raises(UserError, match=r"has 3 classes \('labels:cat,dog,owl'\), the teacher 't' knows 10"):
        _check_fit(info, other, DiT(), "t")
    with pytest.raises(
        UserError, match=r"holds classes \('labels:cat,dog,owl'\), and the teacher 't' takes texts"
    ):
        _check_fit(info, of_text, QwenImage(), "t")
    sizes = replace(info, shards=(*info.shards, replace(info.shards[0], shape=(1, 8, 7))))
    with pytest.raises(UserError, match=r"latents of 8x7 can't be cut into the teacher's 2x2 patches"):
        _check_fit(sizes, fitting, DiT(), "t")
    captioned = replace(info, encoding=replace(info.encoding, text_encoder="minilm", token_dim=384))
    with pytest.raises(UserError, match=r"holds texts \('minilm'\), and the teacher 't' takes classes"):
        _check_fit(captioned, fitting, DiT(), "t")
