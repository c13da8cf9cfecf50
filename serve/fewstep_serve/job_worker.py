"""What runs the jobs of a `JobQueue`, in each replica of the ingress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from fewstep.engine.caller import Caller
from fewstep.errors import UserError
from fewstep_serve.audit import Exchange
from fewstep_serve.errors import error_body, failure
from fewstep_serve.jobs import MAX_ATTEMPTS, ClaimedJob, EndedJob, JobQueue
from fewstep_serve.metrics import JobMetrics
from fewstep_serve.schema import ErrorDetail, ImageRequest, ImagesResponse, Refusal, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

Result = TypeVar("Result")

REPORT_EVERY_S = 10.0
"""How often the number of open jobs is reported."""
SWEEP_EVERY_S = 600.0
"""Time between two looks for jobs that have expired."""
STORAGE_AGAIN_S = 5.0
"""A storage that could not be reached is tried again after this long."""
RENEWALS = 5
"""How often a lease is renewed in the time after which it would lapse."""


class JobWorker:
    """Runs jobs, several at once, until it is stopped; those that it has under way then are given back.

    Args:
        queue: where they come from; its configuration says how many are run at once.
        service: where their images come from.
    """

    def __init__(self, queue: JobQueue, service: Service) -> None:
        self._config, self._queue, self._service = queue.config, queue, service
        self._metrics = JobMetrics()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Run jobs while the block of a `with` statement is left open."""
        tasks = [asyncio.create_task(loop) for loop in (self._work(), self._report(), self._sweep())]
        try:
            yield
        finally:
            tasks += self._running.values()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            if len(self._running) >= self._config.concurrent:
                self._ended.clear()
                await self._ended.wait()
            claim = await self._patiently(lambda: self._queue.claim(set(self._running)))
            if claim is None:
                await asyncio.sleep(self._config.poll_s)
                continue
            self._running[claim.id] = asyncio.create_task(self._run(claim))

    async def _run(self, claim: ClaimedJob) -> None:
        """Run a job to its end, and renew its lease meanwhile."""
        generating = asyncio.create_task(self._outcome(claim))
        try:
            while not (await asyncio.wait({generating}, timeout=self._config.lease_s / RENEWALS))[0]:
                if not await self._patiently(lambda: self._queue.renew(claim)):
                    log.info("job %s ended elsewhere", claim.id)
                    return
            ended = generating.result()
            if await self._patiently(lambda: self._queue.end(claim.id, ended)):
                self._metrics.ended(ended.status)
        except asyncio.CancelledError:
            with suppress(UserError):  # where the storage can't be reached, the lease lapses
                await asyncio.to_thread(self._queue.release, claim)
            raise
        finally:
            generating.cancel()  # without effect where it has ended
            del self._running[claim.id]
            self._ended.set()

    async def _outcome(self, claim: ClaimedJob) -> EndedJob:
        """How a job ends here."""
        job = claim.job
        # A job has a time limit of its own, within which it may begin as late as it has to.
        caller = replace(self._service.caller(job.owner), begin_within_s=None)
        exchange = Exchange(claim.id, caller=caller)
        try:
            if claim.attempt > MAX_ATTEMPTS:
                message = f"it was begun {MAX_ATTEMPTS} times and never ended: try again, or report it."
                raise Refused(Refusal(500, message, "internal"))
            exchange.request = request = ImageRequest.model_validate(job.request)
            exchange.images = await self._images(request, caller, claim.id)
            if request.response_format == "url":
                exchange.images = await self._service.with_addresses(exchange.images, job.base)
        except Refused as error:
            refusal = error.refusal
        except Exception:  # whatever it is, other jobs go on
            log.exception("job %s failed", claim.id)
            refusal = failure(claim.id)
        else:
            self._service.answered(exchange)
            return EndedJob(owner=job.owner, status="succeeded", result=exchange.images)
        exchange.refuse(refusal)
        self._service.answered(exchange)
        error_detail = ErrorDetail.model_validate(error_body(refusal)["error"])
        return EndedJob(owner=job.owner, status="failed", error=error_detail)

    async def _images(self, request: ImageRequest, caller: Caller, job: str) -> ImagesResponse:
        """The images of a job. Where the service is full or has no replica, it is asked again: a job has time.

        Raises:
            Refused: they can't be had, or not within the time limit of jobs.
        """
        until = time.monotonic() + self._config.time_limit_s
        while True:
            try:
                left = until - time.monotonic()
                return await self._service.generate(request, caller, job, time_limit_s=left)
            except Refused as error:
                wait = error.refusal.retry_after_s or self._service.retry_after_s
                if error.refusal.status not in (429, 503) or time.monotonic() + wait > until:
                    raise
                await asyncio.sleep(wait)

    async def _report(self) -> None:
        while True:
            self._metrics.open(len(await self._patiently(self._queue.open_jobs)))
            await asyncio.sleep(REPORT_EVERY_S)

    async def _sweep(self) -> None:
        while True:
            await self._patiently(self._queue.sweep)
            await asyncio.sleep(SWEEP_EVERY_S)

    async def _patiently(self, call: Callable[[], Result]) -> Result:
        """What a call of the queue gives, which is repeated as long as the storage can't be reached."""
        while True:
            try:
                return await asyncio.to_thread(call)
            except Exception as error:  # whatever it is, jobs go on when it is over
                log.error("the jobs wait: %s", error, exc_info=not isinstance(error, UserError))
            await asyncio.sleep(STORAGE_AGAIN_S)
