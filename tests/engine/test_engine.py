"""The engine with the bundled student: exact independence of the batch, previews, cancellation, memory."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
import threading
import weakref
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import ModuleList

from fewstep.assets import asset
from fewstep.engine.admission import NotBegun, Overloaded
from fewstep.engine.caller import Caller
from fewstep.engine.engine import Engine
from fewstep.engine.generation import EvaluationReport, Generation
from fewstep.engine.models import ModelStore, UnknownModel
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep.models.precision import cpu_has_bfloat16, pipeline_arguments
from fewstep.student import FewStepPipeline, resolve_student

PROMPTS = [
    "red heart, noto style",
    "owl, fluent style",
    "a very long caption of a flag with stripes, twemoji style",
    "x",
]


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a replica's
    store = ModelStore({"s": ModelSource(name="s", source="emoji-student")})
    yield asyncio.run(store.get("s"))
    torch.set_num_threads(threads)


def make(generations):
    """The images of generations that are submitted together, by an engine of their own."""

    async def scenario():
        engine = Engine(max_wait_s=0.01)
        try:
            return await engine.generate(generations)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def asked(model, **settings):
    """One generation for each of the prompts."""
    return [Generation.of(model, prompt, seed, **settings) for seed, prompt in enumerate(PROMPTS)]


def same_up_to_rounding(alone, shared) -> None:
    assert (alone.latent - shared.latent).abs().max() < 1e-4
    assert np.abs(alone.pixels.astype(int) - shared.pixels).max() <= 1


@pytest.mark.parametrize("settings", [{}, {"h": 0.5}], ids=["as trained", "noise renewed"])
def test_an_image_is_the_same_alone_and_in_a_batch(model, settings) -> None:
    together = make(asked(model, **settings))
    assert {image.batch_size for image in together} == {len(PROMPTS)}
    for generation, in_batch in zip(asked(model, **settings), together, strict=True):
        [alone] = make([generation])
        same_up_to_rounding(alone, in_batch)


def test_renewed_noise_comes_from_the_image_s_own_seed_and_changes_the_image(model) -> None:
    first, second = (make([Generation.of(model, "owl, noto style", 7, h=0.5)])[0] for _ in range(2))
    [plain] = make([Generation.of(model, "owl, noto style", 7)])
    assert torch.equal(first.latent, second.latent)
    assert (first.latent - plain.latent).abs().max() > 0.1


def test_a_huge_h_renews_all_noise(model) -> None:
    [huge], [large] = (make([Generation.of(model, "owl, noto style", 7, h=h)]) for h in (1e200, 100.0))
    assert torch.equal(huge.latent, large.latent)


def test_an_image_with_renewed_noise_leaves_the_others_of_its_batch_alone(model) -> None:
    def pair(h):
        return [Generation.of(model, PROMPTS[0], 1), Generation.of(model, PROMPTS[1], 2, h=h)]

    [beside_plain, _], [beside_renewed, renewed] = make(pair(None)), make(pair(0.5))
    assert torch.equal(beside_plain.latent, beside_renewed.latent)
    [alone] = make([Generation.of(model, PROMPTS[1], 2, h=0.5)])
    same_up_to_rounding(alone, renewed)


def test_the_same_request_alone_twice_is_identical_to_the_bit(model) -> None:
    [first], [second] = (make([Generation.of(model, "owl, noto style", 7)]) for _ in range(2))
    assert torch.equal(first.latent, second.latent)


def test_a_batch_leaves_no_trace_in_a_later_lone_request(model) -> None:
    async def scenario():
        engine = Engine()
        try:
            await engine.generate(asked(model))  # encodes their prompts together
            return await engine.generate(asked(model)[1:2])
        finally:
            await engine.close()

    [later] = asyncio.run(scenario())
    [alone] = make(asked(model)[1:2])
    assert torch.equal(later.latent, alone.latent)


@pytest.mark.parametrize("h", [None, 0.5])
def test_it_generates_what_the_pipeline_generates(model, h) -> None:
    [image] = make([Generation.of(model, PROMPTS[0], 5, nfe=3, temperature=0.5, h=h)])
    [latent] = model.pipeline(
        PROMPTS[0], seed=5, num_inference_steps=3, temperature=0.5, h=h, output_type="latent"
    ).images
    assert torch.equal(image.latent, latent)


def test_the_teacher_generates_by_its_own_sampler(model) -> None:
    [image] = make([Generation.of(model, PROMPTS[0], 5, teacher_steps=8)])
    noise = torch.randn(model.pipeline.card.latent_shape, generator=torch.Generator().manual_seed(5))[None]
    expected = model.pipeline.sample_teacher(noise, model.pipeline.encode([PROMPTS[0]]), 8)
    assert torch.equal(image.latent, expected[0])


def test_previews_come_after_each_evaluation_and_change_nothing(model) -> None:
    seen = []

    def pair(on_preview):
        return [
            Generation.of(model, PROMPTS[1], 3, on_preview=on_preview),
            Generation.of(model, PROMPTS[0], 4),
        ]

    plain, [shown, _] = make(pair(None)), make(pair(seen.append))
    assert [preview.step for preview in seen] == [1, 2, 3, 4]
    assert torch.equal(shown.latent, plain[0].latent)
    assert np.abs(seen[-1].pixels.astype(int) - shown.pixels).max() <= 1


def test_the_parts_of_an_image_s_time_are_known(model) -> None:
    [image] = make([Generation.of(model, "something new, noto style", 0)])
    assert image.timings.network_s > image.timings.policy_s > 0
    assert min(astuple(image.timings)) > 0


@pytest.mark.parametrize("steps", [{"nfe": 32}, {"teacher_steps": 32}], ids=["student", "teacher"])
def test_an_image_joins_others_half_way_and_is_the_same_as_alone(model, steps) -> None:
    sizes: list[int] = []

    def early():
        return Generation.of(model, PROMPTS[0], 1, **steps)

    def late():
        return Generation.of(model, PROMPTS[2], 2, **steps)

    async def scenario():
        second: list[asyncio.Task] = []

        def arrive(report: EvaluationReport) -> None:
            """Submits the late one after three evaluations of the early one; runs in the network's thread."""
            sizes.append(report.size)
            if len(sizes) == 3:
                loop.call_soon_threadsafe(
                    lambda: second.append(asyncio.create_task(engine.generate([late()])))
                )

        loop = asyncio.get_running_loop()
        engine = Engine(max_wait_s=0, on_evaluation=arrive)
        try:
            [first] = await engine.generate([early()])
            [joined] = await second[0]
            return first, joined
        finally:
            await engine.close()

    together = asyncio.run(scenario())
    assert sizes[:3] == [1, 1, 1]
    assert 2 in sizes
    assert sizes[-1] == 1, "the late one ends alone"
    assert together[0].batch_size < 2
    for generation, shared in zip((early(), late()), together, strict=True):
        [alone] = make([generation])
        same_up_to_rounding(alone, shared)


@pytest.mark.parametrize("by_teacher", [False, True], ids=["student", "teacher"])
def test_different_steps_and_temperatures_share_evaluations(model, by_teacher: bool) -> None:
    kinds = [{"temperature": 0.5}, {}, {"temperature": "auto"}]

    def ones():
        return [
            Generation.of(model, prompt, seed, **{"teacher_steps" if by_teacher else "nfe": steps}, **kind)
            for seed, (prompt, steps, kind) in enumerate(zip(PROMPTS[:3], (2, 5, 5), kinds, strict=True))
        ]

    async def scenario():
        engine = Engine(max_batch_size=6 if by_teacher else 3, max_wait_s=10)  # until all three are there
        try:
            return await asyncio.gather(*(engine.generate([one]) for one in ones()))
        finally:
            await engine.close()

    together = asyncio.run(scenario())
    assert all(image.batch_size > 2 for [image] in together)
    for generation, [shared] in zip(ones(), together, strict=True):
        [alone] = make([generation])
        same_up_to_rounding(alone, shared)


def test_generations_that_can_share_no_batch_are_no_single_call(model) -> None:
    with pytest.raises(ValueError, match="one size"):
        make([Generation.of(model, "x", 0), Generation.of(model, "x", 0, size=(8, 24))])


def test_a_short_request_need_not_wait_for_a_long_one_of_another_kind(model) -> None:
    async def scenario() -> bool:
        engine = Engine(max_wait_s=0)
        long = asyncio.create_task(engine.generate([Generation.of(model, "x", 0, teacher_steps=64)]))
        await asyncio.sleep(0.1)
        await engine.generate([Generation.of(model, "x", 0)])
        overtaken = not long.done()
        await long
        await engine.close()
        return overtaken

    assert asyncio.run(scenario())


def test_an_image_that_its_caller_left_stops_at_the_next_evaluation(model) -> None:
    evaluations: list[EvaluationReport] = []

    async def scenario() -> int:
        engine = Engine(max_wait_s=0, on_evaluation=evaluations.append)
        long = asyncio.create_task(engine.generate([Generation.of(model, "x", 0, teacher_steps=1000)]))
        await asyncio.sleep(0.5)
        long.cancel()
        done = len(evaluations)
        await asyncio.sleep(0.5)
        await engine.generate([Generation.of(model, "x", 0)])
        await engine.close()
        return len(evaluations) - done

    assert asyncio.run(scenario()) <= 1 + model.pipeline.card.sampler.nfe


def test_an_evaluation_that_nobody_waits_for_ends_at_the_next_block(model) -> None:
    """The network is held inside its first block until the caller has left; its last block must not be entered."""
    blocks = next(one for one in model.pipeline.network.transformer.modules() if isinstance(one, ModuleList))
    inside, left, entered = threading.Event(), threading.Event(), []

    def hold(*_) -> None:
        inside.set()
        left.wait(60)

    hooks = [
        blocks[0].register_forward_hook(hold),
        blocks[-1].register_forward_hook(lambda *_: entered.append(1)),
    ]

    async def scenario():
        engine = Engine()
        try:
            huge = asyncio.create_task(engine.generate([Generation.of(model, "x", 0, size=(64, 64))]))
            await asyncio.to_thread(inside.wait, 60)
            huge.cancel()
            await asyncio.gather(huge, return_exceptions=True)
            left.set()
            # The worker has outlived it, and the model is as it was.
            hooks.pop(0).remove()
            asked = Generation.of(model, PROMPTS[0], 0)
            [image] = await engine.generate([asked])
            return image, asked.total
        finally:
            await engine.close()

    try:
        image, evaluations = asyncio.run(scenario())
    finally:
        left.set()
        for hook in hooks:
            hook.remove()
    assert len(entered) == evaluations, "of the second image alone"
    [alone] = make([Generation.of(model, PROMPTS[0], 0)])
    assert torch.equal(alone.latent, image.latent)


def test_an_evaluation_goes_on_for_those_who_still_wait(model) -> None:
    async def scenario():
        engine = Engine(max_batch_size=2, max_wait_s=10)  # until both are there
        try:
            gone = asyncio.create_task(engine.generate([Generation.of(model, "x", 0, nfe=32)]))
            kept = asyncio.create_task(engine.generate([Generation.of(model, PROMPTS[0], 1, nfe=32)]))
            while not engine.batcher.pending and not kept.done():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            gone.cancel()
            return await kept
        finally:
            await engine.close()

    [kept] = asyncio.run(scenario())
    [alone] = make([Generation.of(model, PROMPTS[0], 1, nfe=32)])
    same_up_to_rounding(alone, kept)


def test_larger_images_make_smaller_batches_and_fill_the_queue_sooner(model) -> None:
    sizes: list[int] = []

    def asked(side: int, count: int):
        return [Generation.of(model, "x", seed, size=(side, side)) for seed in range(count)]

    async def scenario() -> None:
        engine = Engine(
            max_batch_size=8, max_pending_work=64, on_evaluation=lambda report: sizes.append(report.size)
        )
        try:
            await engine.generate(asked(32, 4))  # four times the pixels as trained: two are as much as eight
            assert set(sizes) == {2}
            sizes.clear()
            await engine.generate(asked(8, 8))  # smaller ones don't make larger batches
            assert set(sizes) == {8}
            with pytest.raises(Overloaded):
                await engine.generate(asked(32, 5))
            assert engine.pending == 0
        finally:
            await engine.close()

    asyncio.run(scenario())


def test_a_prompt_that_is_too_long_leaves_the_others_alone(model) -> None:
    async def scenario():
        engine = Engine()
        long = engine.generate([Generation.of(model, "long " * 100, 0)])
        outcomes = await asyncio.gather(
            long, engine.generate([Generation.of(model, "x", 0)]), return_exceptions=True
        )
        await engine.close()
        return outcomes

    refused, [image] = asyncio.run(scenario())
    assert isinstance(refused, UserError)
    assert image.batch_size == 1


def test_images_beyond_the_bound_are_refused_before_any_work(model) -> None:
    async def scenario() -> None:
        engine = Engine(max_pending_work=3 * model.pipeline.card.sampler.nfe)
        with pytest.raises(Overloaded):
            await engine.generate([Generation.of(model, "x", seed) for seed in range(4)])
        assert engine.pending == 0
        await engine.close()

    asyncio.run(scenario())


def test_who_floods_the_engine_neither_delays_another_nor_changes_its_image(model) -> None:
    evaluations: list[EvaluationReport] = []

    def light():
        return Generation.of(model, PROMPTS[0], 1)

    async def scenario():
        engine = Engine(max_batch_size=4, max_pending_work=400, on_evaluation=evaluations.append)
        flood = [
            asyncio.create_task(engine.generate([Generation.of(model, "x", seed, nfe=8)], Caller("flood")))
            for seed in range(60)
        ]
        while len(evaluations) < 2:
            await asyncio.sleep(0.01)
        before = len(evaluations)
        [image] = await engine.generate([light()], Caller("light"))
        took = len(evaluations) - before
        assert engine.admission.work <= 400
        for one in flood:
            one.cancel()
        outcomes = await asyncio.gather(*flood, return_exceptions=True)
        await engine.close()
        return image, took, outcomes

    image, took, outcomes = asyncio.run(scenario())
    # Those that run while it arrives and while its caption is encoded come first, and not the 50 that wait.
    assert took <= 6 * light().total
    assert any(isinstance(one, Overloaded) for one in outcomes)
    [alone] = make([light()])
    same_up_to_rounding(alone, image)


def test_what_can_not_begin_in_time_takes_no_evaluation(model) -> None:
    evaluations: list[EvaluationReport] = []

    async def scenario() -> None:
        engine = Engine(on_evaluation=evaluations.append)
        with pytest.raises(NotBegun):
            await engine.generate([Generation.of(model, "x", 0)], Caller("hasty", begin_within_s=0))
        assert (engine.pending, engine.admission.work) == (0, 0)
        await engine.generate([Generation.of(model, "x", 0)], Caller("patient", begin_within_s=600))
        await engine.close()

    asyncio.run(scenario())
    assert len(evaluations) == model.pipeline.card.sampler.nfe


def test_a_size_that_no_patch_tiles_is_refused(model) -> None:
    with pytest.raises(UserError, match=r"15x16 pixels .* multiples of 2"):
        Generation.of(model, "x", 0, size=(16, 15))


def test_other_sizes_can_be_generated(model) -> None:
    [image] = make([Generation.of(model, "x", 0, size=(8, 24))])
    assert image.pixels.shape == (8, 24, 3)


def test_the_least_recently_used_model_leaves_a_full_memory(model) -> None:
    async def scenario() -> None:
        names = ("a", "b", "c")
        store = ModelStore(
            {name: ModelSource(name=name, source="emoji-student") for name in names},
            memory_bytes=2 * model.nbytes,
        )
        for name in names:
            await store.get(name)
        assert [loaded.name for loaded in store.loaded] == ["b", "c"]
        with pytest.raises(UnknownModel):
            await store.get("d")

    asyncio.run(scenario())


def test_a_version_says_which_weights(model, tmp_path: Path) -> None:
    assert model.version == resolve_student("emoji-student").version
    for file in resolve_student("emoji-student").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert resolve_student(tmp_path).version == model.version
    with (tmp_path / "fewstep.json").open("a") as card:
        card.write("\n")
    assert resolve_student(tmp_path).version != model.version


def test_a_load_goes_on_when_the_request_that_began_it_has_left(model) -> None:
    async def scenario():
        store = ModelStore({"a": ModelSource(name="a", source="emoji-student")})
        first = asyncio.ensure_future(store.get("a"))
        await asyncio.sleep(0.01)
        first.cancel()
        async with asyncio.timeout(60):
            while not store.loaded:
                await asyncio.sleep(0.01)
        assert (await store.get("a")).version == model.version

    asyncio.run(scenario())


def test_a_model_that_is_offered_anew_while_it_loads_is_the_new_one(model, tmp_path: Path) -> None:
    for file in resolve_student("emoji-student").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "fewstep.json").open("a") as card:
        card.write("\n")

    async def scenario():
        first = ModelSource(name="first", source="emoji-student")
        store = ModelStore({"first": first, "a": ModelSource(name="a", source="emoji-student")})
        await store.get("first")
        asked = asyncio.ensure_future(store.get("a"))
        await asyncio.sleep(0.01)
        await store.offer({"first": first, "a": ModelSource(name="a", source=str(tmp_path))})
        assert (await asked).version != model.version, "not the one that was withdrawn"

    asyncio.run(scenario())


def test_an_offer_that_can_not_be_loaded_changes_nothing(model) -> None:
    async def scenario() -> None:
        sources = {name: ModelSource(name=name, source="emoji-student") for name in ("a", "b", "c")}
        store = ModelStore(sources)
        held = [await store.get(name) for name in ("a", "b")]
        wrong = ModelSource(name="b", source="nowhere")
        for offer in ({"b": wrong}, {"new": wrong}, {"a": sources["a"], "b": wrong}):
            with pytest.raises(UserError, match="there is no folder 'nowhere'"):
                await store.offer(offer)
            assert store.sources == sources
            assert store.loaded == held
        # What is not in memory is not loaded for this, and fails those alone who ask for it.
        await store.offer({"a": sources["a"], "c": ModelSource(name="c", source="nowhere")})
        assert store.loaded == held[:1]

    asyncio.run(scenario())


def test_a_new_offer_respects_the_memory_and_the_default_stays(model) -> None:
    async def scenario() -> None:
        sources = {name: ModelSource(name=name, source="emoji-student") for name in ("a", "b")}
        store = ModelStore(sources, memory_bytes=model.nbytes)
        await store.get("b")
        await store.offer({"d": ModelSource(name="d", source="emoji-student"), "b": sources["b"]})
        assert [loaded.name for loaded in store.loaded] == ["d"]

    asyncio.run(scenario())


def test_a_replaced_model_leaves_memory_at_once(tmp_path: Path) -> None:
    copy = shutil.copytree(asset("emoji_student"), tmp_path / "student")

    async def scenario() -> None:
        source = ModelSource(name="a", source="emoji-student")
        # Compiled blocks refer to themselves, so that reference counts alone would keep them.
        store = ModelStore({"a": source}, compile="blocks", whole=False)
        network = (await store.get("a")).pipeline.network
        old = weakref.ref(next(network.family.blocks(network.transformer)[0].parameters()))
        del network
        await store.offer({"a": ModelSource(name="a", source=str(copy))})
        assert old() is None

    gc.collect()
    gc.disable()  # as in a server, whose old objects the collector rarely looks at
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_a_model_may_lie_in_object_storage(model, s3_bucket: str, tmp_path: Path, monkeypatch) -> None:
    from fewstep.storage import Storage

    storage = Storage.at(f"{s3_bucket}/student")
    for file in resolve_student("emoji-student").folder.iterdir():
        storage.write(file.name, file.read_bytes())

    async def scenario():
        store = ModelStore({"remote": ModelSource(name="remote", source=f"{s3_bucket}/student")})
        assert await store.version("remote") is None, "nothing is fetched to tell a version"
        return await store.get("remote")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = asyncio.run(scenario())
    assert remote.version == model.version
    assert not list(tmp_path.iterdir()), "what was fetched is deleted when it is in memory"
    [from_storage], [bundled] = make([Generation.of(remote, "x", 0)]), make([Generation.of(model, "x", 0)])
    assert torch.equal(from_storage.latent, bundled.latent)


def test_a_model_s_teacher_may_lie_in_object_storage(
    model, s3_bucket: str, tmp_path: Path, monkeypatch
) -> None:
    from fewstep.storage import Storage

    storage = Storage.at(f"{s3_bucket}/teacher")
    for file in asset("emoji_teacher").iterdir():
        storage.write(file.name, file.read_bytes())
    source = ModelSource(name="remote", source="emoji-student", teacher=f"{s3_bucket}/teacher")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = asyncio.run(ModelStore({"remote": source}).get("remote"))
    assert not list(tmp_path.iterdir()), "what was fetched is deleted when it is in memory"
    [from_storage], [bundled] = make([Generation.of(remote, "x", 0)]), make([Generation.of(model, "x", 0)])
    assert torch.equal(from_storage.latent, bundled.latent)


def test_a_storage_folder_without_a_model_is_refused(s3_bucket: str) -> None:
    store = ModelStore({"remote": ModelSource(name="remote", source=f"{s3_bucket}/nothing")})
    with pytest.raises(UserError, match="no model lies at"):
        asyncio.run(store.get("remote"))


def test_a_new_version_that_does_not_fit_beside_the_old_is_refused_and_the_old_goes_on(
    model, tmp_path: Path, monkeypatch
) -> None:
    from fewstep.models import devices

    for file in resolve_student("emoji-student").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "fewstep.json").open("a") as card:
        card.write("\n")

    async def scenario() -> None:
        old, new = (ModelSource(name="s", source=str(place)) for place in ("emoji-student", tmp_path))
        store = ModelStore({"s": old}, precision="float32")
        served = await store.get("s")
        monkeypatch.setattr(devices, "free_on_host", lambda: model.nbytes // 2)
        with pytest.raises(
            UserError, match=r"takes \d+\.\d MB, and \d+\.\d MB of this machine's memory are free"
        ):
            await store.offer({"s": new})
        assert await store.get("s") is served
        assert (await served_image(served)).pixels.shape == (16, 16, 3)
        monkeypatch.setattr(devices, "free_on_host", lambda: 2 * model.nbytes)
        await store.offer({"s": new})
        assert (await store.get("s")).version != served.version

    async def served_image(served):
        engine = Engine()
        [image] = await engine.generate([Generation.of(served, PROMPTS[0], 0)])
        await engine.close()
        return image

    asyncio.run(scenario())


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU emulates bfloat16")
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_store_holds_its_models_in_its_precision(model, precision: str) -> None:
    store = ModelStore({"s": ModelSource(name="s", source="emoji-student")}, precision=precision)
    lower = asyncio.run(store.get("s"))
    assert lower.nbytes < 0.9 * model.nbytes
    alone = FewStepPipeline.from_pretrained("emoji-student", **pipeline_arguments(precision))
    [image] = make([Generation.of(lower, PROMPTS[0], 7)])
    expected = alone(PROMPTS[0], seed=7, output_type="latent").images[0]
    torch.testing.assert_close(image.latent, expected, atol=1e-3, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", ["blocks", pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_network_draws_the_same_and_is_compiled_once(model, how) -> None:
    torch._dynamo.reset()
    store = ModelStore({"s": ModelSource(name="s", source="emoji-student")}, compile=how)
    compiled = asyncio.run(store.get("s"))
    counted = torch._dynamo.utils.counters["stats"]
    graphs = 0
    for _ in range(2):
        graphs, before = counted["unique_graphs"], graphs
        for prompt in (PROMPTS[1], PROMPTS[2], PROMPTS[0]):  # of several lengths
            [image] = make([Generation.of(compiled, prompt, 3)])
    assert counted["unique_graphs"] == graphs > before, "what was compiled for a length serves it again"
    [plain] = make([Generation.of(model, PROMPTS[0], 3)])
    same_up_to_rounding(plain, image)
