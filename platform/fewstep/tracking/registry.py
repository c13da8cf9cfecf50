"""Registered model versions: exported students are stored as such, and found again."""

from __future__ import annotations

import difflib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.errors import UserError
from fewstep.tracking.address import absolute_uri, connect, mlflow_settings, readable
from fewstep.tracking.version import code_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

ARTIFACT = "student"
"""Name of the exported folder among an MLflow model's artifacts."""

REGISTRY_SECONDS = 60
"""HTTP timeout of requests that move files."""

LOOK_UP_SECONDS = 5
"""HTTP timeout of requests that only look up a version."""

LISTED = 5
"""Most names, versions or aliases that an error message lists."""

LARGEST_VERSION = 2**31 - 1
"""The largest number of a version that MLflow's databases can hold, and be asked for."""

PAGE = 1000
"""Registered models that are asked for at a time, the most that MLflow gives."""

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+|(?i:latest)))")
_RUN_FILES = re.compile(r"runs:/(?P<run_id>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class ModelVersionInfo:
    """Where a student came from; all None for a plain folder, name and version None for a run's files."""

    name: str | None = None
    """Of the registered model."""
    version: int | None = None
    run_id: str | None = None
    """The MLflow run that made it."""

    @property
    def uri(self) -> str | None:
        """`models:/name/3`; None for what is not registered."""
        return None if self.name is None else f"models:/{self.name}/{self.version}"


def register(
    folder: Path,
    name: str,
    uri: str,
    run_id: str,
    alias: str | None = "champion",
    metrics: Mapping[str, float] | None = None,
    description: str = "",
    *,
    script: Path,
    requirements: Sequence[str] = (),
    code: Callable[[Path], Sequence[Path]] | None = None,
) -> ModelVersionInfo:
    """Store an exported student as the next version of the registered model `name`.

    The version holds the whole folder and `script`, which serves it through `mlflow.pyfunc`; nothing is
    pickled. The student is not loaded for it.

    Args:
        folder: the exported student.
        name: of the registered model, which is created if it does not exist.
        uri: tracking address of the run and of the registry.
        run_id: the run that made it; the version and the run's page link to each other.
        alias: moved to the new version; None leaves aliases alone.
        metrics: become the version's tags `metric.<name>` and a table in its description.
        description: shown on the version's page, before the metrics.
        script: a Python file that MLflow stores and runs to load the model ("models from code"). It is run once here.
        requirements: what the model needs, as lines of a requirements file of pip.
        code: what else of Python the model needs. It is called with an empty scratch folder, and returns folders of
            packages; MLflow stores them with the model, and makes them importable before it loads it.

    Returns:
        The new version.

    Raises:
        UserError: `folder` is not a folder, or MLflow does not take the version.
    """
    if not folder.is_dir():
        raise UserError(f"exported student {str(folder)!r} is not a folder: export the student first")
    metrics = metrics or {}
    uri = absolute_uri(uri)
    client = connect(uri)
    try:
        with mlflow_settings(REGISTRY_SECONDS, retries=2):
            model_id, location = _store_model(client, folder, name, run_id, script, requirements, code)
            _ensure_registered_model(client, name)
            version = client.create_model_version(
                name,
                source=location,
                run_id=run_id,
                model_id=model_id,
                tags={"code_version": str(code_version())}
                | {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()},
                description=_describe(description, run_id, metrics),
            )
            if alias is not None:
                client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # MLflow's, requests', botocore's, the disk's: every store has its own
        raise UserError(
            f"MLflow at {uri} did not register {str(folder)!r} as {name!r} ({readable(error)}): "
            "the folder is unharmed, register it again when the cause is mended"
        ) from error
    return ModelVersionInfo(name, int(version.version), run_id)


def resolve(model: str, uri: str, into: Path | None = None) -> tuple[Path, ModelVersionInfo]:
    """Find an exported student by its address, and fetch its files if they are elsewhere.

    Args:
        model: "models:/NAME@ALIAS", "models:/NAME/3", "models:/NAME/latest" (the newest version), "runs:/RUN_ID/PATH",
            or a plain local folder.
        uri: tracking address.
        into: where to download to. By default a new temporary folder, or no download at all where MLflow keeps the
            files on this machine.

    Returns:
        The student's local folder, and where it came from.

    Raises:
        UserError: no such model, alias, version, run or folder; the message lists what exists.
    """
    if "://" not in model and not model.startswith(("models:", "runs:")):
        return _require_folder(Path(model)), ModelVersionInfo()
    folder, info = fetch(model, uri, into)
    return _student_in(folder), info


def fetch(model: str, uri: str, into: Path | None = None) -> tuple[Path, ModelVersionInfo]:
    """Fetch the files that an address in MLflow means, whatever they are.

    Args:
        model, uri, into: as for `resolve`, without plain folders.

    Raises:
        UserError: as `resolve`.
    """
    uri = absolute_uri(uri)
    client = _client(uri)
    with mlflow_settings(REGISTRY_SECONDS, retries=2):
        if match := _REGISTERED.fullmatch(model):
            version = _find_version(client, uri, match["name"], match["alias"], match["version"])
            info = ModelVersionInfo(version.name, int(version.version), version.run_id or None)
            return _download(client, uri, _files_of(client, version), model, into), info
        if match := _RUN_FILES.fullmatch(model):
            info = ModelVersionInfo(run_id=match["run_id"])
            return _download(client, uri, model, model, into), info
    raise UserError(
        f"model address {model!r} is of no known form: "
        "use models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, runs:/RUN_ID/PATH or a local folder"
    )


def look_up(model: str, uri: str) -> ModelVersionInfo:
    """Which version "models:/NAME@ALIAS", "models:/NAME/latest" or "models:/NAME/3" means now, without download.

    Raises:
        UserError: no such model, alias or version, or no registry in reach.
    """
    match = _REGISTERED.fullmatch(model)
    if match is None:
        raise UserError(
            f"{model!r} names no registered model: use models:/NAME@ALIAS, models:/NAME/VERSION or "
            "models:/NAME/latest"
        )
    uri = absolute_uri(uri)
    with mlflow_settings(LOOK_UP_SECONDS):
        version = _find_version(_client(uri), uri, match["name"], match["alias"], match["version"])
    return ModelVersionInfo(version.name, int(version.version), version.run_id or None)


def _store_model(
    client: MlflowClient,
    folder: Path,
    name: str,
    run_id: str,
    script: Path,
    requirements: Sequence[str],
    code: Callable[[Path], Sequence[Path]] | None,
) -> tuple[str, str]:
    """Log the folder as an MLflow model of the run; returns the model's id and where its files are.

    This is what `mlflow.pyfunc.log_model` does. That call can't be used, because it sets the active run and the
    tracking address of the whole process.
    """
    from mlflow.entities import LoggedModelOutput

    with _quiet_mlflow():
        from mlflow.models import Model
        from mlflow.pyfunc import save_model

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run_id, params=run.data.params, model_type="fewstep"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="fewstep-model-") as scratch:
            (packages := Path(scratch) / "code").mkdir()
            # Copied beside the model's own folder, which MLflow wants to create itself.
            code_paths = [str(package) for package in code(packages)] if code is not None else None
            with _quiet_mlflow():
                save_model(
                    f"{scratch}/model",
                    python_model=str(script),
                    # As a URI: of a plain path MLflow, too, decodes what looks percent-encoded.
                    artifacts={ARTIFACT: folder.absolute().as_uri()},
                    # What a loader may override: MLflow passes on no other keys than those that a model is saved with.
                    model_config={"precision": "float32", "device": "cpu"},
                    signature=_signature(),
                    # Stated, because MLflow would load the model in a subprocess to find out what it imports.
                    pip_requirements=list(requirements),
                    code_paths=code_paths,
                    mlflow_model=Model(
                        artifact_path=logged.artifact_location,
                        model_uuid=logged.model_id,
                        model_id=logged.model_id,
                        run_id=run_id,
                    ),
                )
            client.log_model_artifacts(logged.model_id, f"{scratch}/model")
    except BaseException:  # an interrupt, too: otherwise the model would stay "pending" for ever
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id, logged.artifact_location


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    # Asked for and not looked up first: another process may create it between the two calls.
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _signature() -> ModelSignature:
    """An unnamed string column, so that `predict(["a prompt"])` works as well as a one-column table."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.binary, "png")]),
        params=ParamSchema(
            [ParamSpec("steps", DataType.long, default=0), ParamSpec("seed", DataType.long, default=0)]
        ),
    )


@contextmanager
def _quiet_mlflow() -> Iterator[None]:
    """No warnings inside: MLflow has some about its own type hints, and one that asks for an input example.

    An example would make it load and run the student while it is being stored.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _describe(description: str, run_id: str, metrics: Mapping[str, float]) -> str:
    rows = [f"| {key} | {value:.6g} |" for key, value in metrics.items()]
    table = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else ""
    parts = [description, f"Made by run {run_id}, code {code_version()}.", table]
    return "\n\n".join(part for part in parts if part)


def _client(uri: str) -> MlflowClient:
    try:
        return connect(uri)
    except ModuleNotFoundError:
        raise  # MLflow is not installed: the command says which extra has it
    except Exception as error:  # an address that MLflow does not know, a file that is no database
        raise UserError(
            f"registered models can't be looked up at {uri} ({readable(error)}): "
            "correct the address or start the server"
        ) from error


def _find_version(
    client: MlflowClient, uri: str, name: str, alias: str | None, version: str | None
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    def fault(error: Exception) -> UserError:
        return UserError(
            f"registered model {name!r} can't be looked up at {uri} ({readable(error)}): "
            "correct the address or start the server"
        )

    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        assert version is not None, "an address has an alias or a version"
        if not version.isdigit():
            return _newest_version(client, uri, name)
        if _too_large(version):
            raise UserError(_what_exists(client, uri, name, f"version {version}"))
        return client.get_model_version(name, version)
    except UserError:
        raise
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise fault(error) from error
        what = f"alias {alias!r}" if alias is not None else f"version {version}"
        raise UserError(_what_exists(client, uri, name, what)) from error
    except Exception as error:  # sqlalchemy's, and whatever other stores raise
        raise fault(error) from error


def _too_large(version: str) -> bool:
    """Whether digits are a number that no version can have."""
    digits = version.lstrip("0")
    # By their count first: Python converts no more than some thousand digits.
    return len(digits) > len(str(LARGEST_VERSION)) or int(digits or "0") > LARGEST_VERSION


def _newest_version(client: MlflowClient, uri: str, name: str) -> ModelVersion:
    """The version with the largest number, as MLflow's own loaders read `latest`.

    Raises:
        UserError: the model has none.
    """
    quoted = name.replace("'", "\\'")
    found = client.search_model_versions(
        f"name = '{quoted}'", max_results=1, order_by=["version_number DESC"]
    )
    if not found:
        raise UserError(_what_exists(client, uri, name, "version"))
    return found[0]


def _what_exists(client: MlflowClient, uri: str, name: str, missing: str) -> str:
    """The message about what is missing: of a registered model, or the model itself."""
    from mlflow.exceptions import MlflowException

    try:
        # Asked for by its name: a search gives one page of many.
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise UserError(
                f"registered model {name!r} can't be looked up at {uri} ({readable(error)}): "
                "correct the address or the name"
            ) from error
        names = _names(client)
        near = difflib.get_close_matches(name, names, n=LISTED, cutoff=0)
        others = f"use one that exists ({_few(sorted(near), len(names))}) or register it"
        return f"MLflow at {uri} has no registered model {name!r}: " + (
            others if names else "register it, or correct the address, as there are no models at all"
        )
    quoted = name.replace("'", "\\'")
    numbers = sorted(int(one.version) for one in client.search_model_versions(f"name = '{quoted}'"))
    if not numbers:
        return f"registered model {name!r} has no versions at all: register its first, or use another model"
    aliases = [f"{alias} (version {number})" for alias, number in sorted(model.aliases.items())]
    return (
        f"registered model {name!r} has no {missing}: use one of the versions "
        f"{_few([str(number) for number in numbers[-LISTED:]], len(numbers))}"
        + (f", or of the aliases {_few(aliases[:LISTED], len(aliases))}" if aliases else "")
    )


def _names(client: MlflowClient) -> list[str]:
    """The names of all registered models."""
    names, token = [], None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        names += [model.name for model in page]
        if not (token := page.token):
            return names


def _few(listed: Sequence[str], total: int) -> str:
    """Names for a message, and how many there are beside them."""
    more = f" and {total - len(listed)} more" if total > len(listed) else ""
    return f"{', '.join(listed)}{more}"


def _files_of(client: MlflowClient, version: ModelVersion) -> str:
    """Address of a version's files; some versions point at a logged model, which has them elsewhere."""
    source = client.get_model_version_download_uri(version.name, version.version)
    if match := re.fullmatch(r"models:/(m-[0-9a-f]+)", source):
        return client.get_logged_model(match[1]).artifact_location
    return source


def _download(client: MlflowClient, uri: str, source: str, asked: str, into: Path | None) -> Path:
    from mlflow.artifacts import download_artifacts

    try:
        return Path(
            download_artifacts(
                artifact_uri=source, tracking_uri=uri, dst_path=None if into is None else str(into)
            )
        )
    except Exception as error:  # requests', botocore's, MLflow's: every store has its own
        raise UserError(
            f"files of {asked} can't be fetched from {source} ({readable(error)}): "
            "check that the store is reachable and that the files were not deleted"
        ) from error


def _student_in(folder: Path) -> Path:
    """The exported folder inside an MLflow model; a folder that is no MLflow model is itself one."""
    if not (folder / "MLmodel").exists():
        return _require_folder(folder)
    import yaml

    # Not by MLflow's `Model.load`, which decodes a path that looks percent-encoded.
    model = yaml.safe_load((folder / "MLmodel").read_text())
    stored = model.get("flavors", {}).get("python_function", {}).get("artifacts", {})
    if ARTIFACT not in stored:
        raise UserError(
            f"MLflow model {str(folder)!r} holds no student: choose a model that fewstep registered"
        )
    return folder / stored[ARTIFACT]["path"]


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"student folder {str(folder)!r} does not exist: "
            "give an exported folder or a registered model, as in models:/NAME@champion"
        )
    return folder
