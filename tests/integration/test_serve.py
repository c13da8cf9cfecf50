"""The service as its users meet it: real Ray Serve, real HTTP, a real MLflow registry."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fewstep.assets import asset
from fewstep_loadtest.client import Answer, Client, decode_image
from fewstep_loadtest.running import deploy
from fewstep_loadtest.soak import replica_pids

ROOT = Path(__file__).parents[2]
PROMPT = "red heart, noto style"
KEY = "sesame"
SMALL = {"num_cpus": 0.5}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(ray_cluster: str):
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of a model "emoji", the alias "champion" on the first."""
    from fewstep.tracking.address import connect
    from fewstep_loadtest.versions import register_variants

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    register_variants("emoji", uri, folder, (1.0, 0.5))
    connect(uri).set_registered_model_alias("emoji", "champion", "1")
    return uri


@pytest.fixture(scope="module")
def service(address: str, registry: str) -> str:
    """The bundled student, and a registered one behind an alias, on two replicas."""
    models = [
        {"name": "emoji-student", "source": "emoji-student"},
        {"name": "emoji", "source": "models:/emoji@champion"},
    ]
    deploy(
        address,
        {
            "offer": {"models": models, "follow_alias_every_s": 0.5, "batching": {"max_pending_work": 1280}},
            "limits": {"max_pixels": 1024, "max_images": 10, "time_limit_s": 30},
            "engine": {"tracking_uri": registry},
        },
        num_replicas=2,
        ray_actor_options=SMALL,
    )
    return address


@pytest.fixture(scope="module")
def pipeline():
    from fewstep.student import FewStepPipeline

    return FewStepPipeline.from_pretrained("emoji-student")


def ask(service: str, *bodies: dict):
    """All bodies at once; their answers in order."""

    async def scenario():
        async with Client(service) as client:
            return await asyncio.gather(*(client.generate(**body) for body in bodies))

    return asyncio.run(scenario())


def within_one_level(*images: np.ndarray | Image.Image) -> bool:
    first, second = (np.asarray(image).astype(int) for image in images)
    return first.shape == second.shape and np.abs(first - second).max() <= 1


def test_the_image_is_the_pipeline_s_and_the_answer_says_how_it_was_made(service: str, pipeline) -> None:
    [answer] = ask(service, {"prompt": PROMPT, "n": 2, "seed": 3, "num_inference_steps": 4})
    assert answer.status == 200, answer.body
    expected = pipeline([PROMPT] * 2, seed=3, num_inference_steps=4).images
    assert all(map(within_one_level, answer.images, expected))
    body = answer.body
    assert [image["seed"] for image in body["data"]] == [3, 4]
    assert body["model"] == "emoji-student"
    assert body["version"].startswith("sha256:")
    assert (body["size"], body["num_inference_steps"]) == ("16x16", 4)
    assert body["data"][0]["timings"]["network_ms"] > 0
    assert answer.headers["x-fewstep-model"] == f"emoji-student@{body['version']}"
    assert answer.headers["x-request-id"]


def test_the_same_request_twice_is_identical_to_the_byte(service: str) -> None:
    body = {"prompt": PROMPT, "seed": 3}
    first, second = (ask(service, body)[0] for _ in range(2))
    assert first.body["data"][0]["b64_json"] == second.body["data"][0]["b64_json"]


def test_a_drawn_seed_gives_the_same_image_again(service: str) -> None:
    [first] = ask(service, {"prompt": PROMPT})
    [again] = ask(service, {"prompt": PROMPT, "seed": first.body["data"][0]["seed"]})
    assert np.array_equal(first.images[0], again.images[0])


def test_requests_at_once_share_batches_and_get_their_own_images(service: str, pipeline) -> None:
    prompts = [
        f"{thing}, {style} style"
        for thing in ("owl", "red heart", "a flag of stripes")
        for style in ("noto", "fluent")
    ] * 4
    answers = ask(service, *({"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)))
    assert max(answer.body["data"][0]["batch_size"] for answer in answers) > 1
    for seed, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        [expected] = pipeline(prompt, seed=seed).images
        assert within_one_level(answer.images[0], expected)


def test_renewed_noise_depends_on_the_seed_alone(service: str, pipeline) -> None:
    bodies = [{"prompt": PROMPT, "seed": seed, "h": 0.5} for seed in range(8)]
    answers = ask(service, *bodies)
    assert [answer.status for answer in answers] == [200] * 8
    expected = pipeline([PROMPT] * 8, seed=0, h=0.5).images
    assert all(within_one_level(answer.images[0], one) for answer, one in zip(answers, expected, strict=True))
    [plain] = ask(service, {"prompt": PROMPT, "seed": 0, "h": 0})
    assert not within_one_level(answers[0].images[0], plain.images[0])


def test_file_formats(service: str) -> None:
    answers = ask(
        service, *({"prompt": PROMPT, "seed": 1, "output_format": kind} for kind in ("png", "webp", "jpeg"))
    )
    files = [base64.b64decode(answer.body["data"][0]["b64_json"]) for answer in answers]
    assert [Image.open(io.BytesIO(file)).format for file in files] == ["PNG", "WEBP", "JPEG"]
    assert np.array_equal(answers[0].images[0], answers[1].images[0])


def test_the_openai_client_works_unchanged(service: str, pipeline) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{service}/v1", api_key="any", max_retries=0)
    result = client.images.generate(
        model="emoji-student",
        prompt=PROMPT,
        n=2,
        size="16x16",
        response_format="b64_json",
        extra_body={"seed": 1},
    )
    expected = pipeline([PROMPT] * 2, seed=1).images
    assert all(map(within_one_level, (decode_image(image.b64_json) for image in result.data), expected))
    assert result.created > 1_600_000_000
    assert {model.id for model in client.models.list()} == {"emoji-student", "emoji"}
    with pytest.raises(openai.BadRequestError, match="at most 10") as refused:
        client.images.generate(prompt=PROMPT, n=99)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="there is no model 'nope'"):
        client.images.generate(prompt=PROMPT, model="nope")


def test_the_openai_client_streams_previews(service: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{service}/v1", api_key="any", max_retries=0)
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1})
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    [plain] = ask(service, {"prompt": PROMPT, "seed": 1})
    assert within_one_level(decode_image(events[-1].b64_json), plain.images[0])


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "prompt", "add it"),
        ({"class_label": 3}, 400, "class_label", "leave class_label out"),
        ({"prompt": ""}, 400, "prompt", "at least 1 character"),
        ({"prompt": "x" * 1001}, 400, "prompt", "at most 1000"),
        ({"prompt": "x " * 200}, 400, "prompt", "at most 64"),
        ({"prompt": "x", "n": 11}, 400, "n", "at most 10"),
        ({"prompt": "x", "n": "2"}, 400, "n", "valid integer"),
        ({"prompt": "x", "size": "big"}, 400, "size", "write WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "15x16"}, 400, "size", "multiples of 2"),
        ({"prompt": "x", "size": "512x512"}, 400, "size", "at most 1024 pixels"),
        ({"prompt": "x", "num_inference_steps": 17}, 400, "num_inference_steps", "at most 16"),
        ({"prompt": "x", "sampler": "teacher", "num_inference_steps": 65}, 400, "num_inference_steps", "at most 64"),
        ({"prompt": "x", "seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": 2}, 400, "temperature", "less than or equal to 1"),
        ({"prompt": "x", "h": -0.5}, 400, "h", "greater than or equal to 0"),
        ({"prompt": "x", "h": float("nan")}, 400, "h", "finite number"),
        ({"prompt": "x", "class_label": 3}, 400, "class_label", "leave class_label out"),
        ({"prompt": "x", "response_format": "url"}, 400, "response_format", "b64_json"),
        ({"prompt": "x", "sede": 1}, 400, "sede", "did you mean 'seed'"),
        ({"prompt": "x", "steps": 4}, 400, "steps", "did you mean 'num_inference_steps'"),
        ({"prompt": "x", "model": "nope"}, 404, "model", "use one of emoji-student, emoji"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence_in_openai_s_shape(
    service: str, body, status, param, message
) -> None:
    [answer] = ask(service, body)
    assert answer.status == status
    error = answer.body["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_bodies_that_are_no_requests(service: str) -> None:
    async def scenario():
        async with Client(service) as client:
            return [await client.post(content) for content in (b"", b"{", b"[]", b"\xff\xfe", b"1" * 100_000)]

    statuses = [answer.status for answer in asyncio.run(scenario())]
    assert statuses == [400, 400, 400, 400, 413]


def test_models_name_their_exact_versions(service: str) -> None:
    async def scenario():
        async with Client(service) as client:
            return (
                await client.get("/v1/models"),
                await client.get("/v1/models/emoji"),
                await client.get("/nothing"),
            )

    (_, listed), (_, one), (missing, error) = asyncio.run(scenario())
    assert [entry["id"] for entry in listed["data"]] == ["emoji-student", "emoji"]
    assert one["version"].startswith("models:/emoji/")
    assert missing == 404
    assert error["error"]["code"] == "not_found"


def test_moving_the_alias_rolls_over_without_a_failed_request(
    service: str, registry: str, tmp_path: Path
) -> None:
    from fewstep.student import FewStepPipeline
    from fewstep.tracking.address import connect
    from fewstep_loadtest.versions import write_variant

    async def scenario():
        answers, moved = [], False
        async with Client(service) as client:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                answers += await asyncio.gather(
                    *(client.generate(prompt=PROMPT, seed=5, model="emoji") for _ in range(4))
                )
                if not moved:
                    connect(registry).set_registered_model_alias("emoji", "champion", "2")
                    moved = True
                if all(answer.body.get("version") == "models:/emoji/2" for answer in answers[-8:]):
                    break
        return answers

    answers = asyncio.run(scenario())
    connect(registry).set_registered_model_alias("emoji", "champion", "1")
    assert {answer.status for answer in answers} == {200}
    assert {answer.body["version"] for answer in answers} == {"models:/emoji/1", "models:/emoji/2"}
    second = FewStepPipeline.from_pretrained(write_variant(tmp_path, 0.5))
    expected = {
        "models:/emoji/1": FewStepPipeline.from_pretrained("emoji-student"),
        "models:/emoji/2": second,
    }
    expected = {version: one(PROMPT, seed=5).images[0] for version, one in expected.items()}
    assert not within_one_level(*expected.values())
    assert all(within_one_level(answer.images[0], expected[answer.body["version"]]) for answer in answers)


def test_a_dead_replica_s_requests_are_answered_by_another(service: str) -> None:
    async def scenario():
        async with Client(service) as client:
            sent = [
                asyncio.create_task(
                    client.generate(prompt=f"owl {i}, noto style", seed=i, num_inference_steps=16)
                )
                for i in range(24)
            ]
            await asyncio.sleep(0.4)
            victims = replica_pids("fewstep")
            os.kill(victims[0], signal.SIGKILL)
            return await asyncio.gather(*sent), victims

    answers, victims = asyncio.run(scenario())
    assert len(victims) == 2
    assert [answer.status for answer in answers] == [200] * 24, [a.message for a in answers]


def test_a_client_that_leaves_stops_costing(service: str) -> None:
    async def scenario() -> float:
        async with Client(service) as client:
            long = [
                asyncio.create_task(
                    client.generate(prompt="x", n=10, sampler="teacher", num_inference_steps=64, seed=i)
                )
                for i in range(3)
            ]
            await asyncio.sleep(1.5)
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            begin = time.perf_counter()
            answers = await asyncio.gather(*(client.generate(prompt=PROMPT, seed=i) for i in range(4)))
            assert {answer.status for answer in answers} == {200}
            return time.perf_counter() - begin

    assert asyncio.run(scenario()) < 5


def test_beyond_the_queue_requests_are_told_when_to_come_back(service: str) -> None:
    answers = ask(
        service, *({"prompt": "x", "n": 10, "num_inference_steps": 16, "seed": i} for i in range(40))
    )
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1, answer
        assert answer.body["error"]["type"] == "rate_limit_error"


def test_under_overload_requests_wait_in_an_engine_or_are_refused_by_it_and_never_in_the_router(
    service: str,
) -> None:
    """Where Serve's router holds requests back for a full replica, it lets one through per half a second."""
    replicas, accepted, surplus = 2, 10, 20  # by each replica: of 64 steps, each two passes

    async def scenario() -> list[Answer]:
        async with Client(service) as client:
            # Long, so that hardly any place gets free while they arrive.
            sent = [
                asyncio.create_task(client.generate(prompt="x", sampler="teacher", seed=seed))
                for seed in range(replicas * accepted + 2 * surplus)
            ]
            refused = []
            for answered in asyncio.as_completed(sent):
                if (answer := await answered).status != 200:
                    refused.append(answer)
                if len(refused) == surplus:
                    break
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
            return refused

    refused = asyncio.run(scenario())
    assert len(refused) == surplus
    assert {answer.status for answer in refused} == {429}
    assert all("units of work are under way here" in answer.message for answer in refused), (
        "the engine's own refusal"
    )


def test_metrics_reach_prometheus_and_the_log_has_the_request_id(service: str) -> None:
    import ray

    [answer] = ask(service, {"prompt": PROMPT})
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {
        "requests_total", "errors_total", "queue_ms", "batch_size", "network_ms", "policy_ms", "images_total",
        "images_per_second", "request_ms",
    }  # fmt: skip
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
        missing = {name for name in wanted if f"fewstep_{name}" not in text}
        if not missing:
            break
        time.sleep(1)
    assert not missing
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = "".join(file.read_text() for file in session.glob("logs/serve/replica_fewstep_Ingress*"))
    [line] = [
        line for line in logs.splitlines() if answer.headers["x-request-id"] in line and "network_ms" in line
    ]
    assert "version" in line


def test_keys_are_asked_for_where_they_are_set(address: str, tmp_path: Path) -> None:
    from ray import serve

    (tmp_path / "keys").write_text(f"# ours\nstudio: {KEY}\n")
    access = {"api_keys_file": str(tmp_path / "keys"), "metrics": "keys", "work_per_minute": 7}
    settings = {"access": access, "audit_file": str(tmp_path / "audit")}
    deploy(address, settings, name="locked", prefix="/locked", ray_actor_options=SMALL)

    async def scenario():
        statuses = []
        for key in (None, "wrong", KEY):
            async with Client(address, key) as client:
                async with client._session.post(
                    "/locked/v1/images/generations", json={"prompt": "x"}
                ) as response:
                    statuses.append(response.status)
                statuses.append((await client.get("/locked/v1/models"))[0])
                statuses.append((await client.get("/locked/healthz"))[0])
                async with client._session.get("/locked/metrics") as response:
                    statuses.append(response.status)
        return statuses

    assert asyncio.run(scenario()) == [401, 401, 200, 401] * 2 + [200] * 4
    status, error = post(f"{address}/locked", KEY, prompt="x")
    assert status == 429
    assert "may ask for 7 units of work a minute, and this request counts as 4" in error["error"]["message"]
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(line["key"], line["status"], line["work"]) for line in lines] == [
        (None, 401, None), (None, 401, None), ("studio", 200, 4), ("studio", 429, None),
    ]  # fmt: skip
    serve.delete("locked")


def test_encoder_and_decoder_may_be_deployments_of_their_own(address: str) -> None:
    """Of the default model, which has an autoencoder."""
    from ray import serve

    from fewstep.student import FewStepPipeline

    settings = {"engine": {"stages": "apart"}}
    deploy(address, settings, name="apart", prefix="/apart", ray_actor_options={"num_cpus": 0.1})
    status, body = post(f"{address}/apart", prompt=PROMPT, seed=3, n=2)
    assert status == 200
    images = [decode_image(image["b64_json"]) for image in body["data"]]
    together = FewStepPipeline.from_pretrained(body["model"])([PROMPT] * 2, seed=3)
    assert all(map(within_one_level, images, together.images))
    serve.delete("apart")


def test_a_request_has_a_time_limit(address: str) -> None:
    from ray import serve

    deploy(address, {"limits": {"time_limit_s": 0.3}}, name="hasty", prefix="/hasty", ray_actor_options=SMALL)
    status, error = post(f"{address}/hasty", prompt="x", sampler="teacher", n=10)
    assert status == 504
    assert "not ready within 0.3 s" in error["error"]["message"]
    serve.delete("hasty")


def post(url: str, key: str = "any", **body) -> tuple[int, dict]:
    """Status and JSON of one image request."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def test_serve_deploy_changes_models_and_limits_without_a_restart_and_deletion_waits_for_what_was_accepted(
    address: str, ray_cluster: str, tmp_path: Path
) -> None:
    from ray import serve

    def deploy_file(offer: dict) -> None:
        config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
        config["http_options"]["port"] = int(address.rpartition(":")[2])
        [application] = config["applications"]
        application |= {"name": "changing", "route_prefix": "/changing"}
        application["deployments"][0] |= {"ray_actor_options": SMALL, "user_config": offer}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "serve"), "deploy", "-a", ray_cluster, str(file)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    def answers(model: str) -> bool:
        try:
            return post(f"{address}/changing", prompt="x", model=model)[0] == 200
        except ValueError:  # not there yet: the proxy's own 404
            return False

    def wait_for(model: str) -> None:
        deadline = time.monotonic() + 60
        while not answers(model):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    deploy_file({"models": [{"name": "one", "source": "emoji-student"}]})
    wait_for("one")
    before = replica_pids("changing")
    deploy_file({"models": [{"name": "two", "source": "emoji-student"}], "batching": {"max_batch_size": 2}})
    wait_for("two")
    status, body = post(f"{address}/changing", prompt="x", n=4, model="two")
    assert status == 200
    assert [image["batch_size"] for image in body["data"]] == [2, 2, 2, 2]
    assert post(f"{address}/changing", prompt="x", model="one")[0] == 404
    assert replica_pids("changing") == before
    with ThreadPoolExecutor() as pool:
        long = pool.submit(post, f"{address}/changing", prompt="x", n=8, model="two", sampler="teacher")
        time.sleep(1)
        assert not long.done()
        serve.delete("changing")
        assert long.result()[0] == 200


@pytest.mark.slow
def test_a_slow_or_wrong_configuration_never_takes_the_service_down_not_even_with_its_replicas(
    address: str, ray_cluster: str, tmp_path: Path
) -> None:
    """The slow model is a folder with a pipe among the files that are hashed: loading waits until it is written."""
    from ray import serve
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    slow = tmp_path / "slow"
    shutil.copytree(asset("emoji_student"), slow)
    os.mkfifo(slow / "slow.json")

    def configure(name: str, source: str, replicas: int = 1) -> None:
        config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
        [application] = config["applications"]
        application |= {"name": "steady", "route_prefix": "/steady", "args": settings}
        application["deployments"] = [
            {
                "name": "Generator", "num_replicas": replicas, "ray_actor_options": SMALL,
                "user_config": {"models": [{"name": name, "source": source}]},
            }
        ]  # fmt: skip
        ServeSubmissionClient(ray_cluster).deploy_applications(config)

    def get(path: str) -> dict:
        try:
            with urllib.request.urlopen(f"{address}/steady{path}", timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"{path}: {refused.code} {refused.read().decode()}") from None

    def serves(model: str) -> bool:
        """Whether it is healthy (an error is raised otherwise), and an unchanged request is answered by this model."""
        status, body = post(f"{address}/steady", prompt="x")
        assert get("/healthz")["status"] == "ok"
        assert status == 200
        return body["model"] == model

    def is_there() -> bool:
        try:
            return serves("old")
        except (AssertionError, ValueError, OSError):  # the proxy's own 404, or no replica yet
            return False

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    settings: dict[str, dict] = {}
    configure("old", "emoji-student")
    wait(is_there)
    [first] = replica_pids("steady")
    configure("new", str(slow))
    wait(lambda: serves("old") and get("/healthz")["offer"] == "loading")
    assert get("/v1/models")["offer"] == {"state": "loading", "message": None}
    assert serves("old")
    (slow / "slow.json").open("w").close()
    wait(lambda: serves("new"))
    wait(lambda: get("/healthz")["offer"] == "current")

    configure("wrong", "nowhere")
    wait(lambda: get("/healthz")["offer"] == "failed")
    assert "there is no folder 'nowhere'" in get("/v1/models")["offer"]["message"]
    assert [entry["id"] for entry in get("/v1/models")["data"]] == ["new"]
    assert serves("new")
    assert replica_pids("steady") == [first]

    # A replica that starts meanwhile, because there are to be more or because one died, begins with what others serve.
    (slow / "slow.json").unlink()
    configure("wrong", "nowhere", replicas=2)
    wait(lambda: serves("new") and get("/healthz")["replicas"] == 2)
    os.kill(first, signal.SIGKILL)
    wait(lambda: serves("new") and len(set(replica_pids("steady")) - {first}) == 2)

    # Neither do other settings that replace the replicas, right or wrong.
    settings = {"limits": {"max_steps": 2}}
    before = set(replica_pids("steady"))
    configure("wrong", "nowhere")
    wait(
        lambda: (
            serves("new") and not before & set(replica_pids("steady")) and get("/healthz")["replicas"] == 1
        )
    )
    assert post(f"{address}/steady", prompt="x", num_inference_steps=3)[0] == 400

    configure("mended", "emoji-student")
    wait(lambda: serves("mended") and get("/healthz")["offer"] == "current")
    serve.delete("steady")


@pytest.fixture(scope="module")
def idle(address: str) -> Iterator[str]:
    """A service with all defaults that has no replica yet."""
    from ray import serve

    from fewstep_serve.app import assemble
    from fewstep_serve.config import ServeConfig

    scaling = {"min_replicas": 0, "max_replicas": 1}
    application = assemble(ServeConfig(), autoscaling_config=scaling, ray_actor_options=SMALL)
    serve.run(application, name="idle", route_prefix="/idle")
    yield f"{address}/idle"
    serve.delete("idle")


def test_an_idle_service_may_have_no_replica_and_a_request_starts_one(idle: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as unready:
        urllib.request.urlopen(f"{idle}/healthz")
    assert unready.value.code == 503
    assert post(idle, prompt=PROMPT)[0] == 200
    with urllib.request.urlopen(f"{idle}/healthz") as response:
        assert json.load(response) == {"status": "ok", "replicas": 1, "offer": "current"}


def test_by_default_a_huge_image_is_refused_before_it_costs_anything(idle: str) -> None:
    status, body = post(idle, prompt="x", size="1536x1536")
    assert status == 400
    assert (
        "at most 4 times the 64x64 pixels that 'emoji64-student' was trained at" in body["error"]["message"]
    )
    assert post(idle, prompt="x", size="128x128")[0] == 200


def test_fuzzing_from_the_schema_finds_no_server_error(service: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"), "run", f"{service}/openapi.json", "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            "--max-examples", "15", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
