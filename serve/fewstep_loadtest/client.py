"""A small asynchronous client of the API, for benchmarks, the soak test and tests of ours."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np


@dataclass
class Answer:
    """One response."""

    status: int
    """Of HTTP; 599 where the connection broke."""
    body: dict[str, Any]
    """The JSON of the response, or an error's in the same shape."""
    headers: dict[str, str]
    """By lower-case name."""
    seconds: float
    """From sending to the last byte."""
    images: list[np.ndarray] = field(default_factory=list)
    """(H, W, 3) uint8 each."""

    @property
    def message(self) -> str:
        """Of the error, if it is one."""
        return self.body.get("error", {}).get("message", "")


def decode_image(encoded: str) -> np.ndarray:
    """A base64 image file → (H, W, 3) uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


class Client:
    """Sends requests to one address, each over a connection of a shared pool. An async context manager.

    Args:
        address: of the endpoint.
        api_key: where it asks for one.
        time_limit_s: a request that takes longer has failed.
    """

    def __init__(self, address: str, api_key: str | None = None, time_limit_s: float = 120) -> None:
        self._address = address
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._limit = aiohttp.ClientTimeout(total=time_limit_s)

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            self._address, headers=self._headers, timeout=self._limit, connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def generate(self, *, decode: bool = True, **body: Any) -> Answer:
        """`POST /v1/images/generations` with these fields; `decode`: also decode the images."""
        return await self.post(json.dumps(body).encode(), decode=decode)

    async def post(self, content: bytes, *, decode: bool = True) -> Answer:
        """`POST /v1/images/generations` with any bytes as the body."""
        begin = time.perf_counter()
        try:
            async with self._session.post(
                "/v1/images/generations", data=content, headers={"content-type": "application/json"}
            ) as response:
                text = await response.read()
                headers = {name.lower(): value for name, value in response.headers.items()}
                answer = Answer(response.status, {}, headers, time.perf_counter() - begin)
        except (aiohttp.ClientError, TimeoutError) as error:
            return Answer(599, {"error": {"message": repr(error)}}, {}, time.perf_counter() - begin)
        try:
            answer.body = json.loads(text)
        except ValueError:  # a proxy's own page, say
            answer.body = {"error": {"message": text.decode(errors="replace")[:200]}}
        # Decoding takes time of the event loop, which a load test would measure as latency.
        if decode and answer.status == 200:
            answer.images = [decode_image(image["b64_json"]) for image in answer.body["data"]]
        return answer

    async def get(self, path: str) -> tuple[int, Any]:
        """The status and the JSON of a `GET` of a path."""
        async with self._session.get(path) as response:
            return response.status, await response.json(content_type=None)
