"""A proxy in front of a real HTTP server that can be slow, broken or away, and that says what was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from clock import now

Trouble = Literal["pass", "slow", "503", "cut", "away"]
"""pass: as the server answers. slow: each answer comes SLOW_SECONDS late. 503: each request is answered so, without the
server. cut: the server gets the request, and its answer breaks off in the middle. away: no connection is accepted, and
those that are open are reset."""

SLOW_SECONDS = 3.0
HELD_SECONDS = 30.0
"""How long a request that a moment waits for is held at most."""
BLOCK = 65536


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    line: str
    """Method and path, as `PUT /bucket/key`."""
    at: float
    """`now()`."""


class FaultProxy:
    """Listens on a port of its own, in a thread of its own, until `close`.

    Args:
        target: port of the server on this machine.
    """

    def __init__(self, target: int) -> None:
        self._target, self.trouble = target, "pass"
        self.only = re.compile("")
        self.asked: list[Asked] = []
        self._held: re.Pattern[str] | None = None
        self._release = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._listener = self._in_loop(self._listen())

    def set(self, trouble: Trouble, only: str = "") -> None:
        """Begin a trouble, or end it with `pass`; only for requests whose line a pattern matches."""
        self.only = re.compile(only)
        was, self.trouble = self.trouble, trouble
        if trouble == "away":
            self._in_loop(self._go())
        elif was == "away":
            self._listener = self._in_loop(self._listen())

    def hold(self, pattern: str) -> Callable[[], bool]:
        """Hold requests whose line a pattern matches, until `release`; returns what says whether one has come."""
        begun = len(self.asked)
        self._held = re.compile(pattern)
        self._loop.call_soon_threadsafe(self._release.clear)
        return lambda: any(re.search(pattern, asked.line) for asked in self.asked[begun:])

    def release(self) -> None:
        """Let held requests go on, and hold no more."""
        self._held = None
        self._loop.call_soon_threadsafe(self._release.set)

    def close(self) -> None:
        """Stop listening, and end the thread."""
        self.set("away")
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _go(self) -> None:
        self._listener.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").removesuffix("\r\n\r\n")
        line, *headers = head.split("\r\n")
        asked = " ".join(line.split(" ")[:2])
        self.asked.append(Asked(asked, now()))
        fields = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in headers)}
        if "100-continue" in fields.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, fields)
        if self._held is not None and self._held.search(asked):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._release.wait(), HELD_SECONDS)
        trouble = self.trouble if self.only.search(asked) else "pass"
        if trouble == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if trouble == "503":
            writer.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            await writer.drain()
            return
        kept = [one for one in headers if one.partition(":")[0].lower() not in ("connection", "expect")]
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            far_writer.write("\r\n".join([line, *kept, "Connection: close", "", ""]).encode("latin-1") + body)
            await far_writer.drain()
            if trouble == "cut":
                await _relay_half(far_reader, writer)
                return
            while block := await far_reader.read(BLOCK):
                writer.write(block)
                await writer.drain()
        finally:
            far_writer.close()


async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    """A request's body as it was sent, with the marks of its chunks."""
    if "chunked" not in fields.get("transfer-encoding", "").lower():
        return await reader.readexactly(int(fields.get("content-length", 0)))
    parts = []
    while True:
        size = await reader.readuntil(b"\r\n")
        parts += [size, await reader.readexactly(int(size.split(b";")[0], 16) + 2)]
        if int(size.split(b";")[0], 16) == 0:
            return b"".join(parts)


async def _relay_half(source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read a whole answer, send its head and half of its body, and reset the connection."""
    answer = await source.read(-1)
    begin = answer.find(b"\r\n\r\n") + 4
    writer.write(answer[: begin + (len(answer) - begin) // 2])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()
