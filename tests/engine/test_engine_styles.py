"""The engine with style LoRAs: several in one batch, each on its own image."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewstep.engine.engine import Engine
from fewstep.engine.generation import GeneratedImage, Generation
from fewstep.engine.models import LoadedModel, ModelStore
from fewstep.engine.source import LoRASource, ModelSource
from fewstep.errors import UserError
from fewstep.models.teacher import load_teacher
from fewstep.student import FewStepPipeline
from random_lora import random_lora, write_lora

ENDS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.2")
PROMPTS = ["red heart, noto style", "owl, fluent style", "a flag with stripes, twemoji style", "x"]
Lora = Sequence[tuple[str, float]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    network, *_ = load_teacher("emoji", "qwen_image")
    folder = tmp_path_factory.mktemp("styles")
    return {
        name: write_lora(folder / f"{name}.safetensors", random_lora(network, ENDS, seed, rank=4 + 4 * seed))
        for seed, name in enumerate(("ink", "clay"))
    }


def source(files: dict[str, str], **settings) -> ModelSource:
    loras = tuple(LoRASource(name=name, source=file) for name, file in files.items())
    return ModelSource(name="s", source="emoji-student", loras=loras, **settings)


def load(one: ModelSource) -> LoadedModel:
    return asyncio.run(ModelStore({"s": one}).get("s"))


@pytest.fixture(scope="module")
def model(files: dict[str, str]):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a replica's
    yield load(source(files))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(model: LoadedModel) -> LoadedModel:
    return load(ModelSource(name="s", source="emoji-student"))


def make(model: LoadedModel, loras: Sequence[Lora], first: int = 0, **settings) -> list[GeneratedImage]:
    """Images of the prompts from `first` on, made together, with these styles."""

    async def scenario():
        engine = Engine(max_wait_s=0.01)
        asked = [
            Generation.of(model, PROMPTS[index], index, lora=lora, **settings)
            for index, lora in enumerate(loras, first)
        ]
        try:
            return await engine.generate(asked)
        finally:
            await engine.close()

    return asyncio.run(scenario())


NONE, INK, BOTH = (), (("ink", 0.8),), (("ink", 0.5), ("clay", -1.0))


@pytest.mark.parametrize("settings", [{}, {"teacher_steps": 3}], ids=["student", "teacher"])
def test_images_of_several_styles_share_a_batch_and_none_sees_another_s(model, plain, settings) -> None:
    mixed = make(model, [INK, NONE, BOTH, NONE], **settings)
    assert {image.batch_size for image in mixed} == {4}
    without = make(plain, [NONE] * 4, **settings)
    for row in (1, 3):
        assert torch.equal(mixed[row].latent, without[row].latent), "to the bit, as of a model that has none"
    others = make(model, [INK, BOTH, NONE, INK], **settings)
    assert torch.equal(mixed[0].latent, others[0].latent), "to the bit"
    for row, lora in ((0, INK), (2, BOTH)):
        assert (mixed[row].latent - without[row].latent).abs().max() > 0.01
        [alone] = make(model, [lora], first=row, **settings)
        assert (alone.latent - mixed[row].latent).abs().max() < 1e-4, "as without styles: by rounding only"
        [again] = make(model, [lora], first=row, **settings)
        assert torch.equal(alone.latent, again.latent)


def test_it_generates_what_the_pipeline_generates(model) -> None:
    [image] = make(model, [BOTH])
    [latent] = model.pipeline(PROMPTS[0], seed=0, lora=BOTH, output_type="latent").images
    assert torch.equal(image.latent, latent)


def test_a_pipeline_takes_styles_by_the_names_that_they_were_loaded_under(files, plain) -> None:
    pipe = FewStepPipeline.from_pretrained("emoji-student")
    before = pipe("x", output_type="latent").images
    pipe.load_lora_weights(files["ink"], adapter_name="mine")
    assert torch.equal(pipe("x", output_type="latent").images, before)
    assert not torch.equal(pipe("x", lora=[("mine", 1.0)], output_type="latent").images, before)
    for lora, message in (
        ([("ink", 1.0)], r"there is no 'ink': use one of those that are loaded \(mine\)"),
        ([("mine", 1.0), ("mine", 0.5)], "'mine' is named twice"),
        ([("mine", float("nan"))], "the scale of 'mine' is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            pipe("x", lora=lora)


def test_the_memory_of_styles_is_counted_and_bounded(model, plain, files) -> None:
    numbers = sum(
        part.numel() for seed in (0, 1) for low_rank in random_lora(
            load_teacher("emoji", "qwen_image")[0], ENDS, seed, rank=4 + 4 * seed
        ).values() for part in low_rank
    )  # fmt: skip
    assert model.nbytes == plain.nbytes + 4 * numbers
    huge = random_lora(load_teacher("emoji", "qwen_image")[0], ENDS, rank=128)
    file = write_lora(Path(files["ink"]).with_name("huge.safetensors"), huge)
    with pytest.raises(UserError, match=r"'huge' .* they take \d+\.\d MB, more than max_lora_memory_mb"):
        load(source({"huge": file}, max_lora_memory_mb=1))


def test_a_model_with_a_wrong_style_is_not_offered_and_the_former_one_stays(files, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")

    async def scenario() -> None:
        store = ModelStore({"s": source(files)})
        before = await store.get("s")
        for wrong in (tmp_path / "broken.safetensors", tmp_path / "none.safetensors"):
            with pytest.raises(UserError, match=f"the style 'new' of the model 's': lora: .*{wrong.name}"):
                await store.offer({"s": source(files | {"new": str(wrong)})})
            assert await store.get("s") is before
        await store.offer({"s": source({"new": files["clay"]})})
        assert list((await store.get("s")).pipeline.styles) == ["new"]

    asyncio.run(scenario())


def test_compiled_networks_take_no_styles(files) -> None:
    store = ModelStore({"s": source(files)}, compile="blocks")
    with pytest.raises(UserError, match=r"set engine\.compile to false"):
        asyncio.run(store.get("s"))


def test_two_styles_of_one_name_are_refused() -> None:
    twice = [{"name": "a", "source": "x"}] * 2
    with pytest.raises(ValueError, match="the name 'a' is given twice"):
        ModelSource.model_validate({"name": "s", "source": "emoji-student", "loras": twice})


def test_a_style_may_lie_in_object_storage(model, files, s3_bucket: str) -> None:
    from fewstep.storage import Storage

    Storage.at(f"{s3_bucket}/styles").write("ink.safetensors", Path(files["ink"]).read_bytes())
    for address in (f"{s3_bucket}/styles/ink.safetensors", f"{s3_bucket}/styles"):
        model.pipeline.load_lora_weights(address, "remote")
        [remote], [local] = (make(model, [[(name, 0.8)]]) for name in ("remote", "ink"))
        assert torch.equal(remote.latent, local.latent)
