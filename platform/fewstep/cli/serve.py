"""`fewstep serve`: students behind HTTP."""

from __future__ import annotations

import argparse
import re
import time
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.dry_run import (
    add_parts_options,
    add_serving_options,
    plan_only,
    print_serving_plans,
    refuse_unread,
)
from fewstep.config import checked_settings
from fewstep.errors import UserError
from fewstep.text import read_settings

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.serve.schema import ServeDeploySchema

    from fewstep_serve.config import Offer, ServeConfig

GENERATOR = "Generator"
"""The deployment whose replicas hold the models."""
READY_S = 300
"""How long a deployment may take until it answers."""

ALL_KEYS = "the documentation's page on serving lists all"
"""Where an unknown key of a configuration sends its author."""

DESCRIPTION = """\
Put students behind HTTP on the local Ray node: a page to try them on, OpenAI's images API, live previews. Starts a
node where none runs. Serves until Ctrl-C, or goes on in the background with --detach."""
EXAMPLES = """\
examples
  {program}                                  the bundled student at http://127.0.0.1:8000
  {program} --print-config > config.yaml     a configuration to start from: models, batching, limits, scaling
  {program} --config config.yaml --detach    again after every change of the file
  {program} --config config.yaml --dry-run --gpu-memory 24
                                             what its models take in each precision, and on which GPU they fit

A configuration is Ray Serve's: `serve deploy config.yaml` on a cluster does the same. It replaces all that the node
serves: new models load beside the old, which go on where the new can't be loaded. What a running Serve can't change
(http_options, proxy_location) needs `serve shutdown` first. `serve status` tells more, as do the logs, by default in
/tmp/ray/session_latest/logs/serve. A node that --detach started goes on until `ray stop`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a Ray Serve configuration; default: the bundled student"
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as it serves")
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration, and do nothing else"
    )
    group = add_serving_options(parser)
    add_parts_options(group)
    plan_only(parser, group)


def needs_extra(options: argparse.Namespace) -> bool:
    """Whether the extra must be installed: the configuration is printed, and a service planned, without it."""
    return not (options.print_config or options.dry_run)


def run(options: argparse.Namespace) -> None:
    """Deploy, wait until the service answers, print its address, and serve.

    Raises:
        UserError: the configuration can't be read or deployed, or the service does not become ready.
    """
    text = _text(options.config)
    if options.print_config:
        print(text, end="")
        return
    config = _parse(text, options.config)
    if options.dry_run:
        _print_plans(options, config)
        return
    refuse_unread(options, "--recipe", "--set")

    from ray import serve

    from fewstep.cluster import connect_ray

    _settings(config, options.config)
    checked = _checked(config, options.config)
    _check_traces(checked)
    if not config["applications"]:  # deployed, it would end all that the node serves
        raise UserError(
            f"--config: {options.config} lists no application: add one, or end all by `serve shutdown`."
        )
    dashboard = connect_ray(show_logs=False, keep_node=options.detach)
    names = [application["name"] for application in config["applications"]]
    ours: list[str] = []  # what ends with this command
    try:
        client = _serve_client(dashboard)
        address = _address(checked, client.get_serve_details())
        before = serve.status().applications
        ours = [name for name in names if name not in before]  # as long as it is not ready, another's goes on
        _deploy(config, client)
        _wait(address, names)
        ours = names
        print(f"serving at {address}    page {address}/    API {address}/docs", flush=True)
        if options.detach:
            return
        print("Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        # The node may be another's and go on, so what was deployed is taken back. In the background it stays, even
        # where it is not ready: `serve status` can tell why.
        if not options.detach:
            for name in ours:
                serve.delete(name)


def _text(file: Path | None) -> str:
    if file is None:
        return (files("fewstep_serve") / "config.yaml").read_text(encoding="utf-8")
    return read_settings(file, "--config")


def _parse(text: str, file: Path | None) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config: {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(one, dict) for one in applications):
        raise UserError(
            f"--config: {file} is no Ray Serve configuration: it has no list of applications. "
            "`fewstep serve --print-config` shows one."
        )
    for application in applications:
        application.setdefault("name", "default")  # Ray Serve's own
    return config


def _settings(config: dict[str, Any], file: Path | None) -> list[tuple[Offer, ServeConfig]]:
    """What each application of fewstep's offers, and its settings.

    Raises:
        UserError: an application names no models, or a setting does not exist or is not allowed.
    """
    from fewstep_serve.config import Offer, ServeConfig

    found = []
    for application in config["applications"]:
        if not str(application.get("import_path")).startswith("fewstep_serve."):
            continue
        place = f"--config: {file or 'bundled'}: {application['name']}"
        settings = checked_settings(ServeConfig, application.get("args") or {}, f"{place}: args", ALL_KEYS)
        deployments = application.get("deployments") or []
        try:
            ours = [one for one in deployments if one.get("name") == GENERATOR]
            offers = [one["user_config"] for one in ours if one.get("user_config") is not None]
        except (AttributeError, TypeError):
            raise UserError(
                f"{place}: deployments is no list of mappings: write one per deployment."
            ) from None
        offer = (
            checked_settings(Offer, offers[0], f"{place}: user_config", ALL_KEYS)
            if offers
            else settings.offer
        )
        found.append((offer, settings))
    return found


def _print_plans(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Print what the recipe's student takes, or else the models of a configuration.

    Raises:
        UserError: the configuration serves nothing of fewstep's, or has wrong settings.
    """
    if options.recipe is not None:
        print_serving_plans(options, [])  # of a student that no configuration names yet
        return
    found = _settings(config, options.config)
    if not found:
        raise UserError(f"--config: {options.config} has no application of fewstep_serve to plan.")
    for offer, settings in found:
        _plan(options, offer, settings)


def _plan(options: argparse.Namespace, offer: Offer, settings: ServeConfig) -> None:
    """Print what the models of an application take, each as it is configured where the options do not say."""
    engine = settings.engine
    asked = argparse.Namespace(**vars(options))
    asked.batch = options.batch or offer.batching.max_batch_size
    asked.encoder_precision = options.encoder_precision or engine.parts.text_encoder_precision
    asked.autoencoder_precision = options.autoencoder_precision or engine.parts.autoencoder_precision
    print_serving_plans(
        asked,
        [track.source for model in offer.models for track in model.tracks.values()],
        engine.tracking_uri,
        configured=engine.precision,
    )


def _check_traces(config: ServeDeploySchema) -> None:
    """Refuse to send traces without an exporter, of which the logs of Serve's processes alone would tell.

    Raises:
        UserError: the extra `telemetry` is not installed.
    """
    from fewstep_serve.telemetry import OTLP, otlp_exporter

    if config.tracing_config is not None and config.tracing_config.exporter_import_path == OTLP:
        otlp_exporter()


def _checked(config: dict[str, Any], file: Path | None) -> ServeDeploySchema:
    """The configuration as Serve will read it.

    Raises:
        UserError: a value is none that Serve takes.
    """
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        return ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]  # messages are one sentence; the others come up once this one is corrected
        key = ".".join(str(part) for part in first["loc"])
        message = " ".join(first["msg"].removeprefix("Value error, ").split()).rstrip(".")
        raise UserError(f"--config: {file}: {key}: {message} (got {str(first['input'])[:200]!r}).") from None


def _serve_client(dashboard: str | None) -> ServeSubmissionClient:
    """What talks to Serve as `serve deploy` does.

    Raises:
        UserError: the cluster has no dashboard.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    if dashboard is None:
        raise UserError("the Ray node runs without its dashboard: start it with `ray start --head`.")
    return ServeSubmissionClient(dashboard)


def _address(config: ServeDeploySchema, running: dict[str, Any]) -> str:
    """Where the first application will answer.

    Args:
        config: what is to be deployed.
        running: what Serve says of itself; without `http_options` where it does not run yet.

    Raises:
        UserError: Serve runs with other options, which it can't change.
    """
    # Serve would take the configuration, and go on with the options that it has.
    pairs = []
    for section in ("http_options", "grpc_options"):
        asked = getattr(config, section).model_dump(mode="json", exclude_unset=True)
        has = running.get(section) or {}
        pairs += [(f"{section}.{name}", asked[name], has[name]) for name in asked if name in has]
    if running.get("http_options") and "proxy_location" in config.model_fields_set:
        pairs.append(("proxy_location", config.proxy_location.value, running.get("proxy_location")))
    for name, value, present in pairs:
        if value != present:
            raise UserError(
                f"{name}: {value} is asked for, but Serve already runs here with {present} and can't change it: keep "
                f"{present}, or run `serve shutdown` first, which ends all that it serves."
            )
    http = (running.get("http_options") or {}) | config.http_options.model_dump(exclude_unset=True)
    host = http.get("host", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # of all addresses, this machine's own
    host = f"[{host}]" if ":" in host else host
    prefix = config.applications[0].route_prefix or "/" if config.applications else "/"
    return f"http://{host}:{http.get('port', 8000)}{prefix.rstrip('/')}"


def _deploy(config: dict[str, Any], client: ServeSubmissionClient) -> None:
    """Hand the configuration to the cluster, as `serve deploy` does.

    Raises:
        UserError: the cluster refuses it.
    """
    try:
        client.deploy_applications(config)
    except (RuntimeError, ConnectionError) as error:
        raise UserError(f"the configuration was not deployed: {_essence(str(error))}") from None


def _wait(address: str, names: list[str]) -> None:
    """Wait until the applications run and the address answers.

    Raises:
        UserError: one of them failed, or goes on with its former models, or it took too long.
    """
    from ray import serve

    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        applications = serve.status().applications
        states = {name: applications[name] for name in names if name in applications}
        for name, state in states.items():
            if state.status == "DEPLOY_FAILED":
                # The application's own message may do no more than name the deployment that failed.
                failed = [one.message for one in state.deployments.values() if one.status == "DEPLOY_FAILED"]
                why = _essence((failed or [state.message])[0])
                raise UserError(f"the application {name!r} could not be deployed: {why}")
        running = len(states) == len(names) and all(state.status == "RUNNING" for state in states.values())
        # A deployment of min_replicas 0 is ready without a replica, and then says 503 until the first request.
        asleep = any(
            not one.replica_states for state in states.values() for one in state.deployments.values()
        )
        if (
            running
            and _status(address) in ({200, 503} if asleep else {200})
            and all(_is_served(name) for name, state in states.items() if GENERATOR in state.deployments)
        ):
            return
        time.sleep(0.5)
    raise UserError(
        f"{address} was not ready within {READY_S} s: `serve status` and Ray's dashboard say why."
    )


def _is_served(name: str) -> bool:
    """Whether all replicas of an application serve the models of its configuration, and none those of a former one.

    Raises:
        UserError: a replica goes on with its former models.
    """
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    replicas = serve.get_deployment_handle(GENERATOR, name)
    try:
        answers = replicas.broadcast("offer_status").results(timeout_s=10, return_exceptions=True)
    except DeploymentUnavailableError:
        return True  # none runs; the next one begins with this configuration
    except TimeoutError:
        return False
    states = {answer.state: answer.message for answer in answers if not isinstance(answer, Exception)}
    if "failed" in states:
        raise UserError(
            f"the application {name!r} goes on with its former models, as the new ones can't be loaded: "
            f"{states['failed']}"
        )
    return states.keys() <= {"current"}


def _status(address: str) -> int | None:
    """The status with which the service answers; None where nobody does."""
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # URLError is one
        return None


def _essence(message: str) -> str:
    """One line of what Ray tells: of a traceback, the exception alone."""
    began = [match.start() for match in re.finditer(r"^\w[\w.]*(Error|Exception)\b", message, re.MULTILINE)]
    lines = (line.strip() for line in message[began[-1] if began else 0 :].splitlines())
    return " ".join(line for line in lines if line and not line.startswith("For further information"))[:500]
