"""A second version of a model, on a share of its requests."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from test_offer import Gate, replica, student, until

from fewstep.engine.caller import ANYBODY
from fewstep.engine.source import Canary, ModelSource
from fewstep_serve.schema import ImageRequest, ImagesResponse


def source(share: float, **canary: Any) -> ModelSource:
    return ModelSource(name="m", source="a", canary=Canary(source="b", share=share, **canary))


def drawn(source: ModelSource, requests: int = 2000) -> set[int]:
    """Numbers of the requests that get the canary."""
    return {number for number in range(requests) if source.track_for(f"request {number}", "one") == "canary"}


def test_a_share_of_the_requests_gets_the_canary_and_each_always_the_same() -> None:
    assert drawn(source(0)) == set()
    assert len(drawn(source(1))) == 2000
    tenth = drawn(source(0.1))
    assert 140 < len(tenth) < 260  # four standard deviations
    assert drawn(source(0.1)) == tenth
    assert tenth < drawn(source(0.3)), "a larger share keeps those of a smaller one"
    assert source(0.1).model_copy(update={"name": "n"}).track_for("x", "y") in ("stable", "canary")
    assert ModelSource(name="m", source="a").track_for("x", "y") == "stable"


def test_where_it_is_sticky_a_key_gets_one_version() -> None:
    sticky = source(0.5, sticky=True)
    by_key = {f"key {number}": sticky.track_for("any request", f"key {number}") for number in range(100)}
    assert set(by_key.values()) == {"stable", "canary"}
    for key, track in by_key.items():
        assert sticky.track_for("another request", key) == track


def offer(stable: str, canary: str | None = None, share: float = 0.5) -> dict[str, Any]:
    model: dict[str, Any] = {"name": "m", "source": stable}
    if canary is not None:
        model["canary"] = {"source": canary, "share": share}
    return {"models": [model]}


async def ask(one: Any, number: int, model: str | None = None) -> Any:
    request = ImageRequest(
        prompt="x",
        seed=1,
        n=1,
        model=model,
        num_inference_steps=1,
        output_format="png",
        output_compression=100,
    )
    return await one.generate(request, ANYBODY, f"request {number}")


def test_two_versions_stand_side_by_side_and_no_change_loses_a_request(tmp_path: Path) -> None:
    new = student(tmp_path / "new", "\n")

    async def scenario() -> None:
        one = replica()
        await one.reconfigure(offer("emoji-student", new))
        answers = [await ask(one, number) for number in range(12)]
        stable, canary = await ask(one, 0, "m@stable"), await ask(one, 0, "m@canary")
        assert stable.version != canary.version
        assert {answer.version for answer in answers} == {stable.version, canary.version}
        assert {answer.model for answer in (*answers, stable, canary)} == {"m"}
        again = [await ask(one, number) for number in range(12)]
        assert [answer.version for answer in again] == [answer.version for answer in answers]
        for version in (stable.version, canary.version):
            assert (await ask(one, 0, f"m@{version}")).version == version
        for wrong in ("m@", "m@other", "n@canary", "m@sha256:0"):
            assert (await ask(one, 0, wrong)).code == "model_not_found"

        [entry] = await one.models()
        assert (entry.id, entry.version, entry.source) == ("m", stable.version, "emoji-student")
        assert (entry.canary.version, entry.canary.source, entry.canary.share) == (canary.version, new, 0.5)

        loaded = one._store.loaded
        changes = [offer("emoji-student", new, 1.0), offer(new), offer(new, "emoji-student", 0.0)]
        asked = []
        for change in changes:
            await one.reconfigure(change)
            while one._status.state != "current":
                asked.append(await ask(one, len(asked)))
            asked.append(await ask(one, len(asked)))
            assert asked[-1].version == canary.version
        assert all(isinstance(answer, ImagesResponse) for answer in asked)
        assert one._store.in_memory("m") in loaded, "a canary that takes over is in memory already"
        [entry] = await one.models()
        assert (entry.version, entry.canary.share) == (canary.version, 0.0)

    asyncio.run(scenario())


def test_a_request_whose_canary_is_taken_back_while_it_loads_gets_the_other_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, gate = replica(), Gate(tmp_path / "slow")
        models = offer("emoji-student", gate.source, 1.0)["models"]
        first = {"name": "first", "source": "emoji-student"}
        await one.reconfigure({"models": [first, *models]})
        asked = asyncio.create_task(ask(one, 0, "m"))
        held = await gate.reached()
        await one.reconfigure({"models": [first, *offer("emoji-student")["models"]]})
        await until(lambda: one._store.sources["m"].canary is None)
        os.close(held)
        assert isinstance(await asked, ImagesResponse)

    asyncio.run(scenario())


def test_a_canary_that_can_not_be_loaded_leaves_the_former_offer(tmp_path: Path) -> None:
    async def scenario() -> None:
        one = replica()
        await one.reconfigure(offer("emoji-student"))
        await one.reconfigure(offer("emoji-student", str(tmp_path / "nowhere"), 1.0))
        await until(lambda: one._status.state == "failed")
        assert isinstance(await ask(one, 0), ImagesResponse)
        assert (await ask(one, 0, "m@canary")).code == "model_not_found"

    asyncio.run(scenario())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Canary(source="b", share=share)
