"""A replica that is given another offer while it serves: it goes on with what it has until the new one is whole."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fewstep.engine.caller import ANYBODY
from fewstep.errors import UserError
from fewstep.student import resolve_student
from fewstep_serve import generator as module
from fewstep_serve.config import EngineConfig
from fewstep_serve.generator import Generator
from fewstep_serve.schema import ImageRequest, ImagesResponse

GOOD = {"models": [{"name": "good", "source": "emoji-student"}]}


def student(folder: Path, mark: str = "") -> str:
    """A copy of the bundled student; another mark makes it another version."""
    shutil.copytree(resolve_student("emoji-student").folder, folder)
    with (folder / "fewstep.json").open("a") as card:
        card.write(mark)
    return str(folder)


class Gate:
    """A student whose loading waits for `open`, because one of the files that its version is a hash of is a pipe."""

    def __init__(self, folder: Path) -> None:
        self.source = student(folder)
        self._pipe = folder / "slow.json"
        os.mkfifo(self._pipe)

    async def reached(self) -> int:
        """Wait until the load has come to the pipe; gives its writing end, which `os.close` lets the load go on."""
        while True:
            try:
                return os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads it yet
                await asyncio.sleep(0.01)

    async def open(self) -> None:
        """Wait until the load has come to the pipe, and let it go on."""
        os.close(await self.reached())


def replica() -> Any:
    return Generator.func_or_class(EngineConfig().model_dump(mode="json"), 4.0)


async def ask(one: Any, model: str | None = None) -> Any:
    return await one.generate(
        ImageRequest(prompt="x", seed=1, n=1, model=model, output_format="png", output_compression=100),
        ANYBODY,
        "request",
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def offer(*models: tuple[str, str], **batching: int) -> dict[str, Any]:
    return {"models": [{"name": name, "source": source} for name, source in models], "batching": batching}


def test_while_a_new_default_loads_the_old_one_answers_and_then_the_new_one_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, gate = replica(), Gate(tmp_path / "slow")
        await one.reconfigure(offer(("old", "emoji-student")))
        assert (await one.offer_status()).state == "current"
        async with asyncio.timeout(5):  # Serve sends no request as long as this runs
            await one.reconfigure(offer(("new", gate.source), max_batch_size=2))
        assert (await one.offer_status()).state == "loading"
        assert (await ask(one)).model == "old"
        assert [entry.id for entry in await one.models()] == ["old"]
        assert one._engine.batcher.max_batch_size == 16, "all at once"
        await gate.open()
        await until(lambda: one._status.state == "current")
        assert (await ask(one)).model == "new"
        assert [entry.id for entry in await one.models()] == ["new"]
        assert one._engine.batcher.max_batch_size == 2
        assert (await ask(one, "old")).code == "model_not_found"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (offer(("good", "nowhere")), "there is no folder 'nowhere'"),
        (offer(("other", "nowhere"), ("good", "emoji-student")), "there is no folder 'nowhere'"),
        (offer(("good", "emoji-student"), ("second", "nowhere")), "there is no folder 'nowhere'"),
        (offer(("good", "emoji-student"), ("good", "emoji-student")), "the name 'good' is given twice"),
        ({"modles": []}, "modles"),
        (offer(("good", "emoji-student"), max_pending_work=0), "max_pending_work"),
    ],
    ids=["default", "another default", "a model in use", "a name twice", "no such field", "out of bounds"],
)
def test_a_wrong_offer_leaves_the_former_one_in_service_and_says_why(
    wrong, message: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        one = replica()
        former = offer(("good", "emoji-student"), ("second", student(tmp_path / "second")))
        await one.reconfigure(former)
        before = [(await ask(one, name)).version for name in ("good", "second")]
        await one.reconfigure(wrong)
        await until(lambda: one._status.state != "loading")
        status = await one.offer_status()
        assert status.state == "failed"
        assert message in status.message
        assert "\n" not in status.message
        assert [entry.id for entry in await one.models()] == ["good", "second"]
        assert [(await ask(one, name)).version for name in ("good", "second")] == before
        await one.reconfigure(former)
        await until(lambda: one._status.state == "current")

    asyncio.run(scenario())


def test_what_could_not_be_loaded_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOAD_AGAIN_S", 0.05)

    async def scenario() -> None:
        one = replica()
        await one.reconfigure(GOOD)
        await one.reconfigure(offer(("late", str(tmp_path / "late"))))
        await until(lambda: one._status.state == "failed")
        student(tmp_path / "arriving")
        (tmp_path / "arriving").rename(tmp_path / "late")
        await until(lambda: one._status.state == "current")
        assert (await ask(one)).model == "late"

    asyncio.run(scenario())


def test_the_last_of_several_offers_wins(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, gate = replica(), Gate(tmp_path / "slow")
        await one.reconfigure(GOOD)
        await one.reconfigure(offer(("slow", gate.source)))
        held = await gate.reached()
        await one.reconfigure(offer(("last", student(tmp_path / "last", "\n"))))
        os.close(held)
        await until(lambda: one._status.state == "current")
        assert [entry.id for entry in await one.models()] == ["last"]
        assert isinstance(await ask(one), ImagesResponse)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wrong", "error"), [(offer(("x", "nowhere")), UserError), ({"modles": []}, ValidationError)]
)
def test_only_at_its_start_a_replica_fails(wrong, error, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(self: Any) -> None:
        """No other replica runs."""

    monkeypatch.setattr(Generator.func_or_class, "_former_offer", nobody)
    with pytest.raises(error):
        asyncio.run(replica().reconfigure(wrong))
