"""The HTTP API of jobs: they are sent, asked for and cancelled here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Header, Request
from fastapi.responses import Response

from fewstep.errors import UserError
from fewstep_serve.answers import ignored_fields
from fewstep_serve.audit import Exchange
from fewstep_serve.errors import error_responses
from fewstep_serve.jobs import StoredJob
from fewstep_serve.schema import ImageRequest, Job, Refusal, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

Found = TypeVar("Found")

JOBS = "/v1/images/jobs"
"""Where the service takes requests that are answered later."""


def add_jobs(api: FastAPI, service: Service) -> None:
    """Requests that are answered later, where the deployment has them."""
    if (jobs := service.jobs) is None:
        return

    async def send(
        request: Request, body: ImageRequest, idempotency_key: Annotated[str | None, Header()] = None
    ) -> Response:
        exchange = Exchange(request.headers.get("x-request-id", ""))
        try:
            exchange.caller = caller = service.check_key(request)
            exchange.request = checked = service.check(body)
            if checked.stream:
                message = "stream: a job has no stream: leave it out, and ask for the job until it has ended."
                raise Refused(Refusal(400, message, "invalid_value", "stream"))
            await service.check_prompt(checked)
            await service.count(caller, checked, exchange.request_id)
            job = _stored(request, body, checked, caller.name)
            name = await _from_storage(jobs.add, job, idempotency_key)
        except Refused as error:  # a job that is accepted counts when it ends
            exchange.refuse(error.refusal)
            service.answered(exchange)
            raise
        headers = {"location": f"{request.url.path}/{name}", **ignored_fields(body.model_extra or ())}
        return _answer(await _from_storage(jobs.find, name, caller.name), 202, headers)

    send.__annotations__["body"] = Annotated[service.body, Body()]  # FastAPI reads the fields from it
    sent = {"model": Job, "description": "The job; `Location` says where to ask how it stands."}
    api.post(
        JOBS, summary="Generate images later", status_code=202, response_class=Response,
        responses=error_responses(400, 401, 409, 413, 429, 500, 503) | {202: sent},
    )(send)  # fmt: skip
    ok = {"model": Job, "description": "The job as it stands, with its images where it has succeeded."}
    responses = error_responses(401, 404, 500, 503) | {200: ok}

    @api.get(f"{JOBS}/{{job}}", summary="How a job stands", response_class=Response, responses=responses)
    async def find(request: Request, job: str) -> Response:
        return _answer(await _from_storage(jobs.find, job, service.check_key(request).name))

    @api.delete(f"{JOBS}/{{job}}", summary="Cancel a job", response_class=Response, responses=responses)
    async def cancel(request: Request, job: str) -> Response:
        return _answer(await _from_storage(jobs.cancel, job, service.check_key(request).name))


def _stored(request: Request, body: ImageRequest, checked: ImageRequest, owner: str) -> StoredJob:
    return StoredJob(
        owner=owner,
        # As it was sent: what is filled in, such as a seed that is drawn, makes no other body.
        body=hashlib.sha256(body.model_dump_json(exclude_unset=True).encode()).hexdigest(),
        base=str(request.base_url),
        request=checked.model_dump(),
    )


async def _from_storage(call: Callable[..., Found], *arguments: Any) -> Found:
    """What a call of the queue gives.

    Raises:
        Refused: the storage can't be reached.
    """
    try:
        return await asyncio.to_thread(call, *arguments)
    except UserError as error:
        log.error("jobs can't be had: %s", error)
        message = "the storage of jobs can't be reached now: try again later."
        raise Refused(Refusal(503, message, "unavailable", retry_after_s=5)) from None


def _answer(job: Job | None, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    if job is None:
        raise Refused(
            Refusal(404, "there is no such job, or it has expired: send it again.", "job_not_found")
        )
    body = job.model_dump_json(exclude_none=True)
    headers = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, headers, media_type="application/json")
