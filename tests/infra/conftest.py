"""Real services for the tests of infra/: a PostgreSQL server of the machine's own package."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from processes import free_port

NOBODY = "nobody"
"""The user that runs PostgreSQL where the tests run as root, which PostgreSQL refuses to."""


def _program(name: str) -> str:
    """Path of one of PostgreSQL's programs: Debian keeps them beside the path, by version."""
    places = [os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.fail(
            f"PostgreSQL's {name} is not on this machine: `apt-get install postgresql` (.ci/run does so)."
        )
    return found


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """Address of a PostgreSQL server on loopback, without the name of a database, for SQLAlchemy."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-", dir="/tmp"))  # sockets need a short path
    as_user = [] if os.getuid() else ["setpriv", f"--reuid={NOBODY}", "--regid=nogroup", "--clear-groups"]
    if as_user:
        shutil.chown(folder, NOBODY, "nogroup")
    data, port = folder / "data", free_port()
    environment = os.environ | {"LC_ALL": "C", "HOME": str(folder)}

    def call(*command: str) -> None:
        done = subprocess.run(
            [*as_user, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    control = [_program("pg_ctl"), "--pgdata", str(data), "--wait"]
    call(
        _program("initdb"),
        "--pgdata",
        str(data),
        "--username=mlflow",
        "--auth=trust",
        "--no-sync",
        "--encoding=UTF8",
    )
    settings = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    call(*control, "--log", str(folder / "log"), "--options", settings, "start")
    yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}"
    call(*control, "--mode", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_database(postgresql_server: str) -> Callable[[str], str]:
    """Makes an empty database of a name, and gives its address."""
    from sqlalchemy import create_engine, text

    def make(name: str) -> str:
        engine = create_engine(f"{postgresql_server}/postgres", isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}"'))
        engine.dispose()
        return f"{postgresql_server}/{name}"

    return make
