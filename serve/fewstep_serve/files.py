"""Images that are fetched from addresses: files in a folder or bucket, behind signatures that expire."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import os
import secrets
import time
from typing import Final

from fewstep.assets import expanded
from fewstep.errors import UserError
from fewstep_serve.config import Urls
from fewstep_serve.schema import OutputFormat, Refusal, Refused

log = logging.getLogger("ray.serve")

PATH: Final = "/v1/files"
"""Where the service answers for files."""
MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
"""Of file formats; they are also the ends of the files' names."""
LEAST_SECRET = 32
"""Characters of a secret."""
SWEEP_EVERY_S = 600.0
"""Time between two looks for files that have expired."""


class ImageFiles:
    """Files of images, and the addresses that they are fetched from.

    A file's name begins with the time at which it expires, so that any replica can tell which ones may be deleted.

    Args:
        config: where they are, and for how long.

    Raises:
        UserError: there is no secret, or a short one.
    """

    def __init__(self, config: Urls) -> None:
        from fewstep.storage import Storage  # of pyarrow, which few deployments need at the ingress

        secret = os.environ.get(config.secret_variable, "")
        if len(secret) < LEAST_SECRET:
            raise UserError(
                f"urls: {config.secret_variable} must hold a secret of at least {LEAST_SECRET} characters in the "
                "environment of the replicas: make one with `openssl rand -hex 32`."
            )
        self._secret, self._config = secret.encode(), config
        local = "://" not in config.storage
        self._storage = Storage.at(expanded(config.storage) if local else config.storage)
        self._swept_at = time.monotonic()

    async def put(self, b64_json: str, file_format: OutputFormat, base: str) -> str:
        """Write an image, and give its address.

        Args:
            b64_json: the file, base64.
            file_format: of the file.
            base: address of the service as the client wrote it.
        """
        expires = int(time.time() + 60 * self._config.expire_minutes)
        name = f"{expires:012d}-{secrets.token_hex(16)}.{file_format}"
        await asyncio.to_thread(self._storage.write, name, base64.b64decode(b64_json))
        if time.monotonic() - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            await asyncio.to_thread(self.sweep)
        return f"{(self._config.base or base).rstrip('/')}{PATH}/{name}?signature={self._signature(name)}"

    async def get(self, name: str, signature: str) -> tuple[bytes, str]:
        """The content and media type of a file.

        Raises:
            Refused: the signature is not the file's, or it has expired.
        """
        if not hmac.compare_digest(signature.encode(), self._signature(name).encode()):
            raise Refused(
                Refusal(403, "the address of this image is not as it was given: copy it whole.", "forbidden")
            )
        gone = Refused(Refusal(404, "the address of this image has expired: ask for it again.", "expired"))
        if int(name[:12]) < time.time():
            raise gone
        content = await asyncio.to_thread(self._storage.read, name)
        if content is None:
            raise gone
        return content, MEDIA_TYPES[name.rpartition(".")[2]]

    def sweep(self) -> int:
        """Delete files that have expired; how many."""
        now, gone = time.time(), 0
        try:
            for name in self._storage.list():
                if name[:12].isdigit() and name[12:13] == "-" and int(name[:12]) < now:
                    self._storage.delete([name])
                    gone += 1
        except (OSError, UserError) as error:  # the next sweep, or another replica's, deletes the rest
            log.warning("files that have expired could not be deleted: %s", error)
        return gone

    def _signature(self, name: str) -> str:
        # The name holds when it expires, so that nobody can prolong it.
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()
