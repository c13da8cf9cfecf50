"""Jobs: requests that are answered later. They lie in a folder or bucket, which is all that is known of them.

    open/ID.request       what is asked for, and by whom; gone when the job has ended
    open/ID.attempt-N     the lease of the replica that runs the job for the N-th time; it writes it again and again
    ended/ID              how the job ended, with its images
    keys/PERIOD-DIGEST    the job of an `Idempotency-Key`

All are made by `Storage.create`, which replaces nothing. So a lease has one owner and a job has one end, whatever
replicas do at once, and whenever they die.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from fewstep.assets import expanded
from fewstep_serve.config import Jobs
from fewstep_serve.schema import ErrorDetail, ImagesResponse, Job, JobStatus, Refusal, Refused

MAX_ATTEMPTS = 5
"""So often a job is begun; one whose replicas die each time may be what they die of."""
RELEASED = b"released"
"""Content of a lease whose replica has given the job back."""
_ID = re.compile(r"[0-9]{14}-[0-9a-f]{32}")


class StoredJob(BaseModel):
    """What a job asks for, and by whom."""

    owner: str
    """Name of the key that it came by."""
    body: str
    """Digest of the body as the client sent it."""
    base: str
    """Address of the service as the client wrote it."""
    request: dict[str, Any]
    """The `ImageRequest` that `Service.check` gave. Its seed is drawn, so each attempt gives the same images."""


class EndedJob(BaseModel):
    """How a job ended."""

    owner: str
    """Name of the key that it came by."""
    status: Literal["succeeded", "failed", "cancelled"]
    """In which of the ways."""
    result: ImagesResponse | None = None
    """The images, of a job that succeeded."""
    error: ErrorDetail | None = None
    """Why there are none, of a job that failed."""


class JobKey(BaseModel):
    """Which job an `Idempotency-Key` stands for."""

    id: str
    """Of the job."""
    body: str
    """Digest of the body that it came with."""


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a replica runs."""

    id: str
    """Of the job."""
    attempt: int
    """How often it has been begun, this time included."""
    job: StoredJob
    """What is asked for."""


class JobQueue:
    """The jobs in a folder or bucket. Its methods wait for the storage, so they belong into threads.

    Args:
        config: where they are, how many, and for how long.

    Raises:
        UserError: the storage can't be used for jobs.
    """

    def __init__(self, config: Jobs) -> None:
        from fewstep.storage import Storage  # of pyarrow, which few deployments need at the ingress

        self.config = config
        local = "://" not in config.storage
        self._storage = Storage.at(expanded(config.storage) if local else config.storage)
        self._storage.require_create()
        # A lease lapses when its content stays the same for so long by this replica's own clock: those of others may
        # differ. This is since when each lease has had its content.
        self._since: dict[str, tuple[bytes, float]] = {}

    def add(self, job: StoredJob, key: str | None = None) -> str:
        """Add a job, and give its id.

        Args:
            job: what is asked for.
            key: the client's `Idempotency-Key`, if it sent one: however often a job is added with it, there is one.

        Raises:
            Refused: too many jobs are open, or the key came with another body before.
            UserError: the storage can't be reached.
        """
        name = f"{time.time_ns() // 10**6:014d}-{secrets.token_hex(16)}"
        if key is not None:
            name = self._id_of_key(job, key, name)
            if self.find(name, job.owner) is not None:
                return name
        if len(self.open_jobs()) >= self.config.max_open:
            message = f"{self.config.max_open} jobs already wait: try again later."
            raise Refused(Refusal(429, message, "queue_full"))
        self._storage.create(_request(name), job.model_dump_json().encode())
        return name

    def find(self, name: str, owner: str) -> Job | None:
        """How a job stands; None where there is none of that id and owner, or no longer.

        Raises:
            UserError: the storage can't be reached.
        """
        if not _ID.fullmatch(name) or self._has_expired(name):
            return None
        ended = self._ended(name)
        if ended is None:
            if (request := self._storage.read(_request(name))) is not None:
                owned = StoredJob.model_validate_json(request).owner == owner
                return self._job(name, "running" if self._runs(name) else "queued") if owned else None
            ended = self._ended(name)  # it may have ended between the two looks
        if ended is None or ended.owner != owner:
            return None
        return self._job(name, ended.status, ended)

    def cancel(self, name: str, owner: str) -> Job | None:
        """End a job that has not ended; how it stands then. None as for `find`.

        Raises:
            UserError: the storage can't be reached.
        """
        job = self.find(name, owner)
        if job is None or job.status not in ("queued", "running"):
            return job
        self.end(name, EndedJob(owner=owner, status="cancelled"))
        return self.find(name, owner)

    def claim(self, running: set[str]) -> ClaimedJob | None:
        """Take the oldest job that no replica runs; None where there is none.

        Args:
            running: ids of the jobs that this replica runs.

        Raises:
            UserError: the storage can't be reached.
        """
        jobs = self.open_jobs()
        leases = {_lease(name, attempts) for name, attempts in jobs.items()}
        self._since = {lease: since for lease, since in self._since.items() if lease in leases}
        for name, attempts in sorted(jobs.items()):  # which is by age
            if name in running or self._has_expired(name):
                continue
            if attempts and not self._has_lapsed(_lease(name, attempts)):
                continue
            if self._ended(name) is not None:  # whoever ended it died before it had tidied up
                self._close(name)
                continue
            # Whoever creates the next lease has the job.
            if not self._storage.create(_lease(name, attempts + 1), _beat()):
                continue
            if (stored := self._storage.read(_request(name))) is not None:
                return ClaimedJob(name, attempts + 1, StoredJob.model_validate_json(stored))
        return None

    def renew(self, claim: ClaimedJob) -> bool:
        """Keep a claim for another while; False where its job has ended, because it was cancelled or its lease lapsed.

        Raises:
            UserError: the storage can't be reached.
        """
        if self._ended(claim.id) is not None:
            return False
        self._storage.write(_lease(claim.id, claim.attempt), _beat())
        return True

    def release(self, claim: ClaimedJob) -> None:
        """Give a job back, to be run by another replica at once.

        Raises:
            UserError: the storage can't be reached.
        """
        self._storage.write(_lease(claim.id, claim.attempt), RELEASED)

    def end(self, name: str, ended: EndedJob) -> bool:
        """End a job; False where it has ended already, and nothing changes.

        Raises:
            UserError: the storage can't be reached.
        """
        first = self._storage.create(f"ended/{name}", ended.model_dump_json().encode())
        self._close(name)
        return first

    def open_jobs(self) -> dict[str, int]:
        """Id of each job that has not ended → how often it was begun.

        Raises:
            UserError: the storage can't be reached.
        """
        names = [path.removeprefix("open/") for path in self._storage.list("open")]
        jobs = {name.removesuffix(".request"): 0 for name in names if name.endswith(".request")}
        for name in names:
            job, _, attempt = name.partition(".attempt-")
            if attempt and job in jobs:  # one that lost its job while it was renewed is swept
                jobs[job] = max(jobs[job], int(attempt))
        return jobs

    def sweep(self) -> int:
        """Delete what has expired; how many objects.

        Raises:
            UserError: the storage can't be reached.
        """
        expired = [path for path in self._storage.list() if self._may_go(path)]
        for path in expired:
            self._delete(path)
        return len(expired)

    def _id_of_key(self, job: StoredJob, key: str, new: str) -> str:
        """The id that a key stands for: that of its former job, or else the new one, which it stands for from now on.

        Raises:
            Refused: it came with another body before.
        """
        digest = hashlib.sha256(f"{job.owner} {key}".encode()).hexdigest()
        # The period of the name tells when it may be deleted; a job of the last one may still be there.
        period = int(time.time() // self._lifetime_s)
        former, now = (f"keys/{number:010d}-{digest}" for number in (period - 1, period))
        known = self._key(former)
        if known is None or self._has_expired(known.id):
            if self._storage.create(now, JobKey(id=new, body=job.body).model_dump_json().encode()):
                return new
            known = self._key(now)
        assert known is not None, "keys of this period are not deleted"
        if known.body != job.body:
            message = "Idempotency-Key: it was used with another body before: use a new one for each job."
            raise Refused(Refusal(409, message, "idempotency_conflict"))
        return known.id

    def _key(self, path: str) -> JobKey | None:
        content = self._storage.read(path)
        return None if content is None else JobKey.model_validate_json(content)

    def _ended(self, name: str) -> EndedJob | None:
        content = self._storage.read(f"ended/{name}")
        return None if content is None else EndedJob.model_validate_json(content)

    def _runs(self, name: str) -> bool:
        newest = None
        for attempt in itertools.count(1):  # few; a listing would be of all jobs
            if (lease := self._storage.read(_lease(name, attempt))) is None:
                break
            newest = lease
        return newest not in (None, RELEASED)

    def _has_lapsed(self, lease: str) -> bool:
        """Whether the replica of a lease has given it back, or not renewed it for too long."""
        content, now = self._storage.read(lease), time.monotonic()
        if content is None or content == RELEASED:
            return content == RELEASED
        known, since = self._since.get(lease, (None, now))
        if content != known:
            self._since[lease] = content, now
            return False
        return now - since > self.config.lease_s

    def _job(self, name: str, status: JobStatus, ended: EndedJob | None = None) -> Job:
        created = int(name[:14]) / 1000
        return Job(
            id=name,
            status=status,
            created=int(created),
            expires=int(created + self._lifetime_s),
            result=ended and ended.result,
            error=ended and ended.error,
        )

    def _close(self, name: str) -> None:
        """Delete what an open job consists of; the request first, as without it the job is not open."""
        leases = [path for path in self._storage.list("open") if path.startswith(_lease(name, ""))]
        for path in (_request(name), *leases):
            self._delete(path)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):  # another replica was faster
            self._storage.delete([path])

    def _may_go(self, path: str) -> bool:
        kind, _, name = path.partition("/")
        if kind == "keys":
            return int(name.partition("-")[0]) < time.time() // self._lifetime_s - 1
        return kind in ("open", "ended") and self._has_expired(name)

    def _has_expired(self, name: str) -> bool:
        return int(name[:14]) / 1000 + self._lifetime_s < time.time()

    @property
    def _lifetime_s(self) -> float:
        return 60 * self.config.expire_minutes


def _request(name: str) -> str:
    return f"open/{name}.request"


def _lease(name: str, attempt: int | str) -> str:
    return f"open/{name}.attempt-{attempt}"


def _beat() -> bytes:
    """A content that no lease had before."""
    return secrets.token_hex(16).encode()
