"""Who may generate, and how much: API keys, which may change while the service runs, and what holds for each."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
import time
from collections.abc import Mapping

from fastapi import Request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from fewstep.assets import expanded
from fewstep.engine.caller import ANYBODY, Caller
from fewstep.errors import UserError
from fewstep_serve.config import Access, KeySettings
from fewstep_serve.schema import Refusal, Refused

log = logging.getLogger("ray.serve")

READ_AGAIN_S = 2.0
"""How often the file of keys is looked at."""
_UNKNOWN = Refusal(
    401, "a valid API key is needed: send it as 'Authorization: Bearer KEY'.", "invalid_api_key"
)


class AccessControl:
    """Checks the keys of requests, and counts the work that each key asks for, in one ingress replica.

    Args:
        access: where the keys are, and what holds for each.

    Raises:
        UserError: the keys can't be read.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._file_was, self._looked_at = (
            self._file_is(),
            time.monotonic(),
        )  # first: it may change while it is read
        self._names = _names(access.api_keys())
        self.open = not self._names
        """Whether no key is asked for; a file whose last key is removed later opens nothing."""
        self._storage = MemoryStorage()
        self._rates = SlidingWindowCounterRateLimiter(self._storage)
        if strange := sorted(set(access.keys) - set(self._names.values())):
            log.warning("access.keys: there is no key called %s now", ", ".join(strange))

    def who(self, request: Request) -> Caller:
        """By whose key a request comes, with what holds for that key.

        Raises:
            Refused: keys are set, and this request carries none of them.
        """
        self._follow_file()
        if self.open:
            return self.caller(ANYBODY.name)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # All are compared, and each in constant time: how long it takes tells nothing of the keys.
        matches = [name for known, name in self._names.items() if hmac.compare_digest(given, known)]
        if not matches:
            raise Refused(_UNKNOWN)
        return self.caller(matches[0])

    def has_rate(self, caller: Caller) -> bool:
        """Whether a caller's work is limited per minute."""
        return self._rate(caller) is not None

    def count(self, caller: Caller, work: float) -> None:
        """Count work that somebody asks for.

        Raises:
            Refused: it is more than may be asked for in a minute; it then does not count.
        """
        cost, rate = math.ceil(work), self._rate(caller)
        if rate is None or self._rates.hit(rate, caller.name, cost=cost):
            return
        if cost > rate.amount:
            message = (
                f"this request counts as {work:g} units of work, and this key may ask for {rate.amount} in a minute: "
                "ask for fewer images, evaluations or pixels."
            )
            raise Refused(Refusal(400, message, "invalid_value", "n"))
        wait = max(1, math.ceil(self._seconds_until(rate, caller, cost) + 1e-3))
        message = (
            f"this key may ask for {rate.amount} units of work a minute, and this request counts as {work:g}: try "
            f"again in {wait} s, or for less."
        )
        raise Refused(Refusal(429, message, "rate_limit_exceeded", retry_after_s=wait))

    def caller(self, name: str) -> Caller:
        """Whoever has the key of that name, with what holds for it now."""
        settings = self._access.keys.get(name, KeySettings())
        return Caller(name, settings.weight, settings.begin_within_s or self._access.begin_within_s)

    def _rate(self, caller: Caller) -> RateLimitItemPerMinute | None:
        own = self._access.keys.get(caller.name, KeySettings()).work_per_minute
        most = own or self._access.work_per_minute
        return None if most is None else RateLimitItemPerMinute(most)

    def _seconds_until(self, rate: RateLimitItemPerMinute, caller: Caller, cost: int) -> float:
        """How long somebody has to wait until so much may be asked for.

        The window slides: what was asked for in the last full minute counts less and less while this one goes on.
        """
        minute, key = rate.get_expiry(), rate.key_for(caller.name)
        before, _, now, remembered = self._storage.get_sliding_window(key, minute)
        left = remembered - minute  # of this minute; its work is remembered for another one
        room = rate.amount - cost + 1  # the sum is rounded down
        if now < room:
            return max(0.0, left - (room - now) * minute / max(before, 1))
        return left + max(0.0, minute - room * minute / now)

    def _follow_file(self) -> None:
        """Take the keys of a file that has changed; where it can't be read now, the former ones go on."""
        if self._access.api_keys_file is None or time.monotonic() - self._looked_at < READ_AGAIN_S:
            return
        self._looked_at = time.monotonic()
        if (now := self._file_is()) == self._file_was:
            return
        try:
            self._names = _names(self._access.api_keys(at_start=False))
        except UserError as error:
            log.error("the former API keys go on: %s", error)
            return
        self._file_was = now
        level = logging.INFO if self._names else logging.ERROR
        log.log(level, "%d API keys were read again; without any, nobody may generate", len(self._names))

    def _file_is(self) -> tuple[int, int, int] | None:
        """What changes with the content of the file of keys; None where there is no file."""
        if self._access.api_keys_file is None:
            return None
        try:
            status = expanded(self._access.api_keys_file).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def require_loopback(host: str) -> None:
    """Refuse to serve the whole network unless somebody has decided so.

    Args:
        host: where HTTP listens, an address or a name.

    Raises:
        UserError: it is not this machine's loopback.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: where it leads can't be told here
        loopback = False
    if not loopback:
        raise UserError(
            f"http_options.host is {host}, beyond loopback, and no API key is set: set access.api_keys_file, or "
            "FEWSTEP_API_KEYS where the node starts, or access.open_to_all: true."
        )


def _names(keys: Mapping[str, str | None]) -> dict[bytes, str]:
    """Digest of each key → its name; one without a name is called by the beginning of its digest, which does not tell
    the key."""
    return {_digest(key): name or _digest(key).hex()[:8] for key, name in keys.items()}


def _digest(key: str) -> bytes:
    # Digests have one length, which the comparison in constant time needs.
    return hashlib.sha256(key.encode()).digest()
