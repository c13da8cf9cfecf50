"""A teacher, a dataset and a recipe small enough to train in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fewstep.data.columns import condition_columns, latent_column
from fewstep.data.schema import DatasetInfo, Encoding, Shard, bucket_folder, encode_table
from fewstep.data.stream import ShardStream
from fewstep.encoders import load_encoder
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.adapters import LoRAConfig
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import TeacherCard, load_teacher, save_teacher
from fewstep.storage import Storage
from fewstep.student import StudentCard, save_student
from fewstep.train.learner import Learner
from fewstep.train.progress import LossMeter
from fewstep.train.recipe import DistillRecipe, load_recipe

SHAPE = (3, 8, 8)
SHARDS, ROWS = 2, 20


def write_teacher(folder: Path) -> None:
    """A Qwen-Image network in shape, with random weights."""
    torch.manual_seed(0)
    transformer = get_family("qwen_image").build(
        {"patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 384, "axes_dims_rope": [8, 4, 4]}
    )  # fmt: skip
    card = TeacherCard("qwen_image", "minilm", "pixel", SHAPE, shift=2.0, guidance_scale=2.0)
    save_teacher(transformer, card, folder, transformer.state_dict())


def write_data(root: Path, references: int = 0, seed: int = 0) -> None:
    """SHARDS training shards of ROWS rows and one held-out shard, real captions, random images and references."""
    storage, rng, noise = Storage.at(root), np.random.default_rng(0), torch.Generator().manual_seed(seed)
    encoding, encoder, shards = (
        Encoding("minilm", 384, "pixel", references=references),
        load_encoder("minilm"),
        [],
    )
    for split, count in (("train", SHARDS), ("held_out", 1)):
        for index in range(count):
            keys = [f"{split}-{index}-{row}" for row in range(ROWS)]
            captions = [f"{'very ' * (row % 3)}small thing {row}" for row in range(ROWS)]
            latents = rng.uniform(-1, 1, (ROWS, *SHAPE)).astype(np.float32)
            columns = condition_columns(encoder.encode(captions))
            rows = pa.table({"key": keys, "caption": captions, **columns})
            images = torch.rand(ROWS, references, *SHAPE, generator=noise) * 2 - 1
            column = latent_column(images, "float32") if references else None
            table = encode_table(rows, latents, SHAPE, split, column)
            table = table.replace_schema_metadata(encoding.metadata())
            path = f"{bucket_folder(split, SHAPE)}/part-{index:05d}.parquet"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / path)
            shards.append(Shard(path, split, SHAPE, ROWS))
    DatasetInfo(storage, encoding, "tests", True, tuple(shards)).save()


def recipe(data: Path | str, teacher: Path, *overrides: str) -> DistillRecipe:
    """A small distillation that logs every step and keeps a checkpoint of every fourth; overrides go before."""
    small = [
        f"data.path={data}", "data.batch_size=8", f"teacher.path={teacher}", "train.threads=1",
        "train.cpus_per_worker=0.5", "train.log_every=1", "train.checkpoint_every=4", "train.keep_checkpoints=20",
        "train.sample_every=0", "student.lora={rank: 4, dropout: 0.1}", "imitation.window=2",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}",
        "data.reading=threads",  # Ray Data's tasks would start processes of their own
    ]  # fmt: skip
    return load_recipe(DistillRecipe, None, [*small, *overrides])


def train_here(recipe: DistillRecipe, folder: Path) -> list[dict[str, float]]:
    """Take a recipe's steps in this process, as a run's only worker does, and export the student to a folder.

    For tests that are about the learning and not about the run: the processes of a run take longer to start.

    Returns:
        The metrics of each step.
    """
    encoding = DatasetInfo.open(recipe.data.path).encoding
    encoder = load_encoder(encoding.text_encoder, max_tokens=encoding.max_tokens)
    learner, metrics = Learner(recipe, encoder.null(), torch.device("cpu")), []
    size, seed = recipe.data.batch_size, recipe.train.seed
    stream = ShardStream(
        recipe.data.path, "train", batch_size=size, seed=seed, parts=learner.share.parts, reading="threads"
    )
    batches = iter(stream)
    for step in range(1, recipe.train.steps + 1):
        learner.set_lr(step)
        learner.step(step, batches, meter := LossMeter(learner.device))
        metrics.append(meter.read(size, 0.0))
    batches.close()
    learner.objective.export(folder, learner.ema.state_dict())
    return metrics


def write_editor(folder: Path) -> None:
    """A student that takes one reference image, untrained, on the bundled teacher."""
    transformer, family, reference = load_teacher("emoji", "qwen_image")
    policy = GMFlowConfig(components=3, logstd_width=16)
    network = PolicyNetwork(transformer, family, policy, LoRAConfig(rank=4))
    card = StudentCard(
        teacher=reference, text_encoder="minilm", autoencoder="pixel", latent_shape=(3, 16, 16), references=1,
        sampler=SamplerConfig(nfe=4, shift=2.0, h=0.5), teacher_sampler=TeacherSamplerConfig(guidance_scale=2.0),
    )  # fmt: skip
    save_student(network, card, folder)
