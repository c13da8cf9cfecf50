"""What is written down of each image request: one exchange with a client, and its line of the audit file."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from fewstep.assets import expanded
from fewstep.engine.caller import Caller
from fewstep.errors import UserError
from fewstep_serve.schema import ImageRequest, ImagesResponse, Refusal


@dataclass
class Exchange:
    """One image request and its answer, filled in as far as it comes."""

    request_id: str
    """Of HTTP's header `x-request-id`; of a job that has ended, its id."""
    begin: float = field(default_factory=time.perf_counter)
    """When it came, by `time.perf_counter`."""
    caller: Caller | None = None
    """By whose key; None where it has none of those that are known."""
    request: ImageRequest | None = None
    """What `Service.check` gave; None where it was refused before."""
    images: ImagesResponse | None = None
    """What it was answered with; None where it was not."""
    status: int = 200
    """Of HTTP."""
    code: str | None = None
    """Of the error, if it was one."""

    @property
    def key(self) -> str:
        """What the key is called; empty where it is none."""
        return self.caller.name if self.caller else ""

    def refuse(self, refusal: Refusal) -> None:
        """Note that it ends with an error response."""
        self.status, self.code = refusal.status, refusal.code

    def audit(self) -> dict[str, Any]:
        """Its line of the audit file."""
        request, images = self.request, self.images
        caption = request.caption if request else None
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "key": self.key or None,
            "status": self.status,
            "code": self.code,
            "model": images.model if images else request and request.model,
            "version": images and images.version,
            "sampler": request and request.sampler,
            "n": request and request.n,
            "seed": request and request.seed,
            "num_inference_steps": images and images.num_inference_steps,
            "size": images and images.size,
            "work": images and images.work,
            # Who has a prompt can find what became of it; nobody can read it here.
            "prompt_sha256": caption and hashlib.sha256(caption.encode()).hexdigest(),
        }


class AuditLog:
    """Appends the line of each exchange to a file, which others may move away meanwhile.

    Replicas of one machine may share it, because a line is one write at the file's end. A line that can't be written is
    reported on stderr, and the request is answered all the same.

    Args:
        file: its path.

    Raises:
        UserError: it can't be written.
    """

    def __init__(self, file: str) -> None:
        path = expanded(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"audit_file: {file} can't be written ({error.strerror}): correct the path or its permissions."
            ) from error

    def write(self, exchange: Exchange) -> None:
        """Append the line of an exchange that has ended."""
        line = json.dumps(exchange.audit())
        self._handler.handle(logging.LogRecord("fewstep.audit", logging.INFO, "", 0, line, None, None))
