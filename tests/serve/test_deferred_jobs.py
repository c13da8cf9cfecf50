"""Requests that are answered later: each ends once, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_generator import FakeGenerator, answer, never
from fastapi.testclient import TestClient

from fewstep.engine.caller import Caller
from fewstep.errors import UserError
from fewstep_serve import jobs as module
from fewstep_serve.config import Jobs, ServeConfig
from fewstep_serve.http import build_api
from fewstep_serve.jobs import MAX_ATTEMPTS, EndedJob, JobQueue, StoredJob
from fewstep_serve.schema import ImageRequest, Refusal

JOBS = "/v1/images/jobs"
BODY = {"prompt": "owl", "seed": 7, "n": 2}


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where jobs lie: a folder, and a bucket of a real S3 server."""
    return (
        str(tmp_path / "jobs")
        if request.param == "folder"
        else request.getfixturevalue("s3_bucket") + "/jobs"
    )


@contextmanager
def serving(storage: str, generator: FakeGenerator | None = None, **settings: Any) -> Iterator[TestClient]:
    """The service from its start to its orderly end."""
    jobs = {"storage": storage, "lease_s": 1, "poll_s": 0.05} | settings.pop("jobs", {})
    config = ServeConfig.model_validate({"access": {"open_to_all": True}, "jobs": jobs, **settings})
    with TestClient(build_api(config, generator or FakeGenerator())) as client:
        yield client


def submit(client: TestClient, **how: Any) -> str:
    answer = client.post(JOBS, json=how.pop("json", BODY), **how)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"{JOBS}/{answer.json()['id']}"
    return answer.json()["id"]


def until(client: TestClient, job: str, *statuses: str, **how: Any) -> dict[str, Any]:
    """The job once it stands so."""
    end = time.monotonic() + 120
    while (found := client.get(f"{JOBS}/{job}", **how).json())["status"] not in statuses:
        assert time.monotonic() < end, found
        assert found["status"] in ("queued", "running"), found
        time.sleep(0.02)
    return found


def stored(owner: str = "me", **body: Any) -> StoredJob:
    request = ImageRequest.model_validate({"prompt": "x", "seed": 1} | body)
    return StoredJob(owner=owner, body="digest", base="http://here/", request=request.model_dump())


def queue(storage: str, **settings: Any) -> JobQueue:
    return JobQueue(Jobs.model_validate({"storage": storage, **settings}))


def test_a_job_ends_with_what_a_request_is_answered(storage: str) -> None:
    with serving(storage) as client:
        job = submit(client)
        ended = until(client, job, "succeeded")
        assert ended["result"] == client.post("/v1/images/generations", json=BODY).json()
        assert [image["seed"] for image in ended["result"]["data"]] == [7, 8]
        assert ended["expires"] - ended["created"] == pytest.approx(24 * 3600, abs=1)
        assert "error" not in ended
        assert client.delete(f"{JOBS}/{job}").json() == ended, "what has ended stays as it is"


def test_there_are_no_jobs_unless_they_are_configured() -> None:
    config = ServeConfig.model_validate({"access": {"open_to_all": True}})
    assert TestClient(build_api(config, FakeGenerator())).post(JOBS, json=BODY).status_code == 404


def test_a_wrong_job_is_refused_at_once(tmp_path: Path) -> None:
    with serving(str(tmp_path)) as client:
        for wrong, param in (({"n": 99}, "n"), ({"stream": True}, "stream"), ({"size": "x"}, "size")):
            answer = client.post(JOBS, json=BODY | wrong)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_images_of_a_job_may_have_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_URL_SECRET", "s" * 32)
    with serving(str(tmp_path / "jobs"), urls={"storage": str(tmp_path / "files")}) as client:
        ended = until(client, submit(client, json=BODY | {"response_format": "url"}), "succeeded")
        for image in ended["result"]["data"]:
            assert "b64_json" not in image
            assert client.get(image["url"]).status_code == 200


def test_a_job_fails_as_its_request_would(tmp_path: Path) -> None:
    async def refuse(request: ImageRequest) -> Refusal:
        if request.prompt == "broken":
            raise ZeroDivisionError("a secret of the code")
        return Refusal(404, "there is no model 'x': use one of m.", "model_not_found", "model")

    with serving(str(tmp_path), FakeGenerator(refuse)) as client:
        error = until(client, submit(client), "failed")["error"]
        assert error == {
            "message": "there is no model 'x': use one of m.", "type": "invalid_request_error", "param": "model",
            "code": "model_not_found",
        }  # fmt: skip
        job = submit(client, json=BODY | {"prompt": "broken"})
        error = until(client, job, "failed")["error"]
        assert error["code"] == "internal"
        assert job in error["message"]
        assert "secret" not in error["message"]


def test_a_job_waits_while_the_service_is_full(tmp_path: Path) -> None:
    refusals = [Refusal(429, "full", "overloaded"), Refusal(503, "none", "unavailable", retry_after_s=1)]

    async def full_first(request: ImageRequest) -> Any:
        return refusals.pop() if refusals else await answer(request)

    with serving(str(tmp_path), FakeGenerator(full_first)) as client:
        until(client, submit(client), "succeeded")
    assert not refusals


def test_a_job_that_takes_too_long_fails(tmp_path: Path) -> None:
    with serving(str(tmp_path), FakeGenerator(never), jobs={"time_limit_s": 0.2}) as client:
        assert until(client, submit(client), "failed")["error"]["code"] == "timeout"


def test_a_job_is_cancelled_and_its_work_ends(storage: str) -> None:
    generator = FakeGenerator(never)
    with serving(storage, generator, jobs={"concurrent": 1}) as client:
        running, waiting = submit(client), submit(client)
        until(client, running, "running")
        for job in (waiting, running):
            assert client.get(f"{JOBS}/{job}").json()["status"] in ("queued", "running")
            assert client.delete(f"{JOBS}/{job}").json()["status"] == "cancelled"
            assert client.get(f"{JOBS}/{job}").json()["status"] == "cancelled"
        end = time.monotonic() + 60
        while not generator.cancelled:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert len(generator.asked) == 1


def test_a_job_belongs_to_its_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    access = {"api_keys_file": str(tmp_path / "keys")}
    with serving(str(tmp_path / "jobs"), access=access) as client:
        job = submit(client, headers=mine)
        until(client, job, "succeeded", headers=mine)
        for method in ("GET", "DELETE"):
            assert (
                client.request(method, f"{JOBS}/{job}", headers=other).json()["error"]["code"]
                == "job_not_found"
            )
            assert client.request(method, f"{JOBS}/{job}").status_code == 401
        assert client.post(JOBS, json=BODY).status_code == 401
        for wrong in ("x", "..%2Fkeys", job[:-1], f"{job}0"):
            assert client.get(f"{JOBS}/{wrong}", headers=mine).status_code == 404
    for file in (tmp_path / "jobs").rglob("*"):
        assert file.is_dir() or b'"one"' not in file.read_bytes(), "a key is never written down"


def test_a_job_counts_for_its_key_and_has_its_weight(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("studio: one\n")
    key = {"authorization": "Bearer one"}
    access = {
        "api_keys_file": str(tmp_path / "keys"), "work_per_minute": 12, "begin_within_s": 5,
        "keys": {"studio": {"weight": 4}},
    }  # fmt: skip
    generator, audit = FakeGenerator(), tmp_path / "audit.jsonl"
    with serving(str(tmp_path / "jobs"), generator, access=access, audit_file=str(audit)) as client:
        job = submit(client, headers=key)
        until(client, job, "succeeded", headers=key)
        refused = client.post(JOBS, json=BODY, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    [(_, caller, request_id)] = generator.asked
    # It may begin late: a job has a time limit of its own.
    assert (caller, request_id) == (Caller("studio", weight=4), job)
    done, not_taken = map(json.loads, audit.read_text().splitlines())
    assert (done["request_id"], done["key"], done["status"], done["work"]) == (job, "studio", 200, 8)
    assert (not_taken["key"], not_taken["status"], not_taken["seed"]) == ("studio", 429, 7)


def test_so_many_jobs_may_wait(tmp_path: Path) -> None:
    with serving(str(tmp_path), FakeGenerator(never), jobs={"max_open": 2, "concurrent": 1}) as client:
        first, _ = submit(client), submit(client)
        refused = client.post(JOBS, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"]
        client.delete(f"{JOBS}/{first}")
        submit(client)


def test_a_key_of_idempotency_stands_for_one_job(storage: str) -> None:
    generator = FakeGenerator()
    # The seed, which is drawn, makes no other body.
    body, key = {"prompt": "owl"}, {"idempotency-key": "order 66"}
    with serving(storage, generator) as client:
        job = submit(client, json=body, headers=key)
        assert submit(client, json=body, headers=key) == job
        until(client, job, "succeeded")
        assert submit(client, json=body, headers=key) == job
        conflict = client.post(JOBS, json={"prompt": "cat"}, headers=key)
        assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
        another = submit(client, json=body, headers={"idempotency-key": "another"})
        until(client, another, "succeeded")
        assert another != job
    assert len(generator.asked) == 2
    assert queue(storage).add(stored("somebody else"), "order 66") != job


def test_a_key_whose_job_was_never_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, one = queue(str(tmp_path), max_open=1), queue(str(tmp_path))
    full.add(stored())
    with pytest.raises(Exception, match="already wait"):
        full.add(stored(), "key")
    job = one.add(stored(), "key")
    assert one.find(job, "me") is not None
    assert one.add(stored(), "key") == job


def test_jobs_expire_and_leave_nothing(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = queue(storage, expire_minutes=5)
    waiting, running, ended = (one.add(stored(), f"key {number}") for number in range(3))
    assert one.claim({waiting}).id == running
    one.end(ended, EndedJob(owner="me", status="cancelled"))
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 301)
    assert [one.find(job, "me") for job in (waiting, running, ended)] == [None] * 3
    assert one.claim(set()) is None
    assert one.add(stored(), "key 0") != waiting
    monkeypatch.setattr(module.time, "time", lambda: now + 1201)
    one.sweep()
    assert one._storage.list() == {}


def test_a_job_that_ran_when_the_service_ended_is_run_by_the_next_one(storage: str) -> None:
    stopped, generator = FakeGenerator(never), FakeGenerator()
    with serving(storage, stopped, jobs={"lease_s": 3600, "concurrent": 1}) as client:
        running, waiting = submit(client), submit(client)
        until(client, running, "running")
    assert queue(storage).find(running, "anybody").status == "queued", "given back, not left to lapse"
    with serving(storage, generator, jobs={"lease_s": 3600}) as client:
        for job in (running, waiting):
            until(client, job, "succeeded")
    assert generator.asked[0] == stopped.asked[0], "of the same seed"


VICTIM = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_deferred_jobs import *
with serving(sys.argv[1], FakeGenerator(never)) as client:
    job = submit(client)
    until(client, job, "running")
    print(job, flush=True)
    time.sleep(600)
"""


def test_a_job_whose_process_was_killed_ends_once(tmp_path: Path) -> None:
    storage = str(tmp_path)
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, storage, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    job = victim.stdout.readline().strip()
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    generator = FakeGenerator()
    with serving(storage, generator) as client:
        assert client.get(f"{JOBS}/{job}").json()["status"] == "running", "its lease has not lapsed yet"
        first = until(client, job, "succeeded")
        time.sleep(1.5)  # longer than a lease
        assert client.get(f"{JOBS}/{job}").json() == first
    assert len(generator.asked) == 1


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that are made at the same time."""
    ready, given = threading.Barrier(len(calls)), [None] * len(calls)

    def call(number: int) -> None:
        ready.wait()
        given[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def test_of_replicas_that_reach_for_a_job_one_gets_it_and_one_ends_it(storage: str) -> None:
    replicas = [queue(storage) for _ in range(4)]
    for _ in range(5):
        job = replicas[0].add(stored())
        claims = [
            claim for claim in together(*(lambda one=one: one.claim(set()) for one in replicas)) if claim
        ]
        assert [claim.id for claim in claims] == [job]
        ends = together(*(
            lambda one=one, job=job, status=status: one.end(job, EndedJob(owner="me", status=status))
            for one, status in zip(replicas, ["cancelled", "failed", "succeeded", "cancelled"], strict=True)
        ))  # fmt: skip
        assert sorted(ends) == [False, False, False, True]
        assert (
            replicas[0].find(job, "me").status
            == ["cancelled", "failed", "succeeded", "cancelled"][ends.index(True)]
        )
        assert replicas[0].open_jobs() == {}


def test_of_one_key_of_idempotency_at_once_there_is_one_job(storage: str) -> None:
    replicas = [queue(storage) for _ in range(4)]
    names = together(*(lambda one=one: one.add(stored(), "key") for one in replicas))
    assert len(set(names)) == 1
    assert list(replicas[0].open_jobs()) == names[:1]


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_lapses(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    slow, other = queue(storage, lease_s=30), queue(storage, lease_s=30)
    job = slow.add(stored())
    held = slow.claim(set())
    for _ in range(5):
        assert other.claim(set()) is None
        clock[0] += 20
        assert slow.renew(held)
    assert other.claim(set()) is None
    clock[0] += 31  # it is slow for once
    taken = other.claim(set())
    assert (taken.id, taken.attempt, held.attempt) == (job, 2, 1)
    assert slow.renew(held), "nothing has been lost yet"
    assert slow.claim(set()) is None
    assert other.end(job, EndedJob(owner="me", status="failed"))
    assert not slow.renew(held)
    assert not slow.end(job, EndedJob(owner="me", status="succeeded"))
    assert slow.find(job, "me").status == "failed", "a client never sees two ends"


def test_a_job_that_ended_but_was_not_tidied_up_is_not_run_again(tmp_path: Path) -> None:
    one = queue(str(tmp_path))
    job = one.add(stored())
    one._storage.create(f"ended/{job}", EndedJob(owner="me", status="succeeded").model_dump_json().encode())
    assert one.claim(set()) is None
    assert one.open_jobs() == {}
    assert one.find(job, "me").status == "succeeded"


def test_a_job_that_kills_whoever_runs_it_is_given_up(tmp_path: Path) -> None:
    one = queue(str(tmp_path))
    job = one.add(stored("anybody"))
    for _ in range(MAX_ATTEMPTS):
        one.release(one.claim(set()))
    generator = FakeGenerator()
    with serving(str(tmp_path), generator) as client:
        assert "begun 5 times" in until(client, job, "failed")["error"]["message"]
    assert generator.asked == []


def test_a_job_of_a_version_that_knew_other_fields_fails_alone(tmp_path: Path) -> None:
    strange = stored("anybody")
    strange.request["no_such_field"] = 1
    job = queue(str(tmp_path)).add(strange)
    with serving(str(tmp_path)) as client:
        assert until(client, job, "failed")["error"]["code"] == "internal"
        until(client, submit(client), "succeeded")


def test_jobs_go_on_when_their_storage_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep_serve.job_worker.STORAGE_AGAIN_S", 0.05)
    place = tmp_path / "jobs"
    with serving(str(place)) as client:
        until(client, submit(client), "succeeded")
        place.rename(tmp_path / "away")
        place.write_text("no folder")
        answer = client.post(JOBS, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        place.unlink()
        (tmp_path / "away").rename(place)
        until(client, submit(client), "succeeded")


def test_jobs_need_a_storage_that_replaces_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"local folder or s3://bucket/prefix"):
        queue("mock://somewhere")


def test_a_worker_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as past:
        past.setattr(module.time, "time_ns", lambda: 10**18)
        queue(str(tmp_path)).add(stored())
    with serving(str(tmp_path)) as client:
        end = time.monotonic() + 60
        while list(tmp_path.rglob("*.request")):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.get("/v1/images/jobs/x").status_code == 404
