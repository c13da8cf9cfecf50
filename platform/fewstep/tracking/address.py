"""Where MLflow is: checking a tracking address before work starts, and talking to it with short timeouts."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fewstep.assets import expanded
from fewstep.errors import UserError, one_line
from fewstep.passwords import has_password, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

CHECK_SECONDS = 5
"""Longest wait for a tracking server, or for a locked database file, to answer."""

DATABASE_SECONDS = 60
"""The same for a database server: an empty one gets MLflow's schema first."""

_SQLITE = "sqlite:///"
_SERVERS = ("http://", "https://")
_DATABASES = ("postgresql", "mysql", "mssql")
# They report every schema migration and model version, and print a traceback for every busy database.
_NOISY_LOGGERS = ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store")
_environment_lock = threading.RLock()


def absolute_uri(uri: str) -> str:
    """The same address with an sqlite path made absolute.

    Ray workers run in working directories of their own: a relative `sqlite:///mlflow.db` would become one
    database per worker.

    Raises:
        UserError: it holds a password, which messages, recipes and runs would repeat.
    """
    uri = uri.strip()
    if has_password(uri):
        raise UserError(
            f"tracking address {without_password(uri)} holds a password, and it is written to recipes and checkpoints: "
            "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a PostgreSQL database: "
            "PGUSER and PGPASSWORD) in the environment"
        )
    path = sqlite_path(uri)
    return uri if path is None else _sqlite_uri(path)


def sqlite_path(uri: str) -> Path | None:
    """The database file of an sqlite address, absolute; None for any other address."""
    if not uri.startswith(_SQLITE):
        return None
    # As MLflow reads it: an address is a URL, in which `%20` is a blank and `?` begins options.
    from sqlalchemy.engine import make_url

    return expanded(make_url(uri).database or "").absolute()


def _sqlite_uri(path: Path) -> str:
    """The sqlite address of a database file, with the characters encoded that would mean something else in it."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string()


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps its files: a folder beside an sqlite database; None where a server decides."""
    path = sqlite_path(uri)
    if path is None:
        return None
    return _artifact_root(path, re.sub(r"[^\w.-]+", "_", experiment))


def _artifact_root(database: Path, *parts: str) -> str:
    """The address of a folder for files beside an sqlite database."""
    # Of a plain path, too, MLflow decodes what looks percent-encoded.
    return str(database.parent.joinpath("mlartifacts", *parts)).replace("%", "%25")


@contextmanager
def mlflow_settings(timeout_s: int, retries: int = 0) -> Iterator[None]:
    """Short HTTP timeouts and no printing for the MLflow calls inside, then the process's own settings again.

    What the user has set in the environment wins.

    Args:
        timeout_s: of each HTTP request, in seconds.
        retries: how often a failed request is sent again.
    """
    # MLflow reads these settings from the environment alone, at each call. The lock keeps two threads from seeing
    # each other's values.
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    with _environment_lock:
        ours = [name for name in wanted if name not in os.environ]
        os.environ.update({name: wanted[name] for name in ours})
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


def connect(uri: str) -> MlflowClient:
    """An MLflow client for tracking and registry at `uri`; MLflow's global settings stay as they are.

    An sqlite database that does not exist is created.
    """
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    if (path := sqlite_path(uri)) is not None and not path.exists():
        _create_database(path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_reachable(uri: str) -> str:
    """Refuse a tracking address that can't work, before any training starts.

    A missing sqlite database is created, which takes about 5 s. A server that does not answer is refused after
    `CHECK_SECONDS`, a database server after `DATABASE_SECONDS`.

    Args:
        uri: MLflow tracking address.

    Returns:
        The address to hand to workers: sqlite paths are absolute.

    Raises:
        UserError: an unreachable server, a file store, an unwritable or outdated database, an address with a password.
    """
    uri = absolute_uri(uri)
    if (path := sqlite_path(uri)) is not None:
        # First without MLflow, which retries a busy database for a long time and prints tracebacks meanwhile.
        _check_sqlite_file(uri, path)
        _ask(uri)
    elif uri.startswith((*_SERVERS, *_DATABASES)):
        import mlflow  # noqa: F401 - takes seconds, which are not the server's

        seconds = CHECK_SECONDS if uri.startswith(_SERVERS) else DATABASE_SECONDS
        _within(seconds, lambda: _ask(uri), _no_answer(uri, f"no answer within {seconds} s"))
    elif uri.startswith("file:") or "://" not in uri:
        raise UserError(
            f"tracking address {uri!r} is a folder, and MLflow 3 no longer writes runs to folders: "
            f"use a database file, as in sqlite:///{uri.removeprefix('file:').strip('/') or 'mlflow'}.db, "
            "or a server, as in http://host:5000"
        )
    else:
        raise UserError(
            f"tracking address {uri!r} is of no kind that MLflow knows: "
            "use sqlite:///path/mlflow.db or http://host:5000"
        )
    return uri


def _create_database(path: Path) -> None:
    """Write MLflow's schema to a file beside `path` and link it there.

    MLflow creates its tables in place and without a lock: two processes at once fail over each other's tables, and
    an interrupted first start leaves a database that no later start accepts. The link is made whole or not at
    all, and never over a database that another process made meanwhile.
    """
    # Not a public class, but the only way to write the schema to a chosen file, and to close that file afterwards.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        store = SqlAlchemyStore(_sqlite_uri(Path(scratch, path.name)), _artifact_root(path))
        store.engine.dispose()
        # A hard link appears in one act, and fails where the name is taken; renaming would replace the other database.
        with suppress(FileExistsError):
            os.link(f"{scratch}/{path.name}", path)


def _check_sqlite_file(uri: str, path: Path) -> None:
    """Refuse a database file that can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            connect(uri)
        database = sqlite3.connect(path, timeout=CHECK_SECONDS, isolation_level=None)
        try:
            # Permissions say nothing to root, and little on network drives; taking the write lock does.
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"tracking database {uri!r} can't be written ({error}): "
            "choose a file in a folder you may write to, or free the database if another program holds it"
        ) from error


def _ask(uri: str) -> None:
    """Send one cheap request to the tracking store, which creates the schema of a new database."""
    from mlflow.exceptions import MlflowException

    try:
        with mlflow_settings(timeout_s=CHECK_SECONDS - 1):
            connect(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise UserError(
                f"MLflow at {uri} refused the credentials: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        if "out-of-date database schema" in str(error):
            raise UserError(
                f"tracking database {uri} was written by another MLflow version: "
                f"back it up and run 'mlflow db upgrade {uri}'"
            ) from error
        raise _no_answer(uri, readable(error)) from error
    except Exception as error:  # sqlalchemy's errors, and whatever a plugin store raises
        raise _no_answer(uri, readable(error)) from error


def _no_answer(uri: str, reason: str) -> UserError:
    return UserError(
        f"MLflow at {uri} can't be reached ({reason}): start it with 'mlflow server', correct the address, "
        "or track to a local database with sqlite:///mlflow.db"
    )


def readable(error: Exception) -> str:
    """An error as `one_line`; of MLflow's nested connection errors the innermost cause, which names what is wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError):
            return one_line(cause)
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def _within(seconds: float, call: Callable[[], T], late: Exception) -> T:
    """The call's result; raises `late` when it takes longer than `seconds`."""
    # In a thread, as name resolution has no timeout of its own and can't be interrupted.
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="fewstep-tracking-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise late
    return outcome[0]
