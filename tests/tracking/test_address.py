"""A tracking address that can't work is refused before any work starts."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from fewstep.errors import UserError
from fewstep.tracking import address
from fewstep.tracking.address import absolute_uri, check_reachable, mlflow_settings

QUICK_SECONDS = 7.0  # 5 s for the check, the rest for a busy machine


def refusal(uri: str) -> str:
    import mlflow  # noqa: F401 - its import takes seconds that are not the check's

    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        check_reachable(uri)
    assert time.perf_counter() - began < QUICK_SECONDS
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_server_that_is_not_there_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    message = refusal(f"http://127.0.0.1:{port}")
    assert "can't be reached" in message
    assert "refused" in message
    assert "start it with 'mlflow server'" in message


def test_a_server_that_never_answers_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "can't be reached" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_host_that_does_not_exist_is_refused():
    assert "can't be reached" in refusal("http://mlflow.invalid:5000")


@pytest.mark.parametrize("kind", ["https", "postgresql", "postgresql+psycopg"])
def test_an_address_with_a_password_is_refused_and_the_password_not_repeated(kind: str):
    message = refusal(f"{kind}://me:sec/ret@host:5432/runs")
    assert f"{kind}://host:5432/runs holds a password" in message
    assert "PGPASSWORD" in message
    assert "sec/ret" not in message


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "mlruns"])
def test_a_folder_is_refused(uri):
    assert "MLflow 3 no longer writes runs to folders: use a database file" in refusal(uri)


def test_an_unknown_kind_of_address_is_refused():
    assert "of no kind that MLflow knows" in refusal("htp://host:5000")


def test_an_sqlite_path_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    assert "can't be written" in refusal(f"sqlite:///{tmp_path}/file/mlflow.db")
    assert "can't be written" in refusal(f"sqlite:///{tmp_path}")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    assert "file is not a database" in refusal(f"sqlite:///{tmp_path}/text.db")


def test_a_database_that_stays_locked_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(address, "CHECK_SECONDS", 1)
    holder = sqlite3.connect(tmp_path / "held.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert "free the database if another program holds it" in refusal(f"sqlite:///{tmp_path}/held.db")
    holder.close()


def test_a_database_of_another_mlflow_version_is_refused(database, tmp_path):
    old = tmp_path / "old.db"
    source = sqlite3.connect(database.removeprefix("sqlite:///"))
    copy = sqlite3.connect(old)
    source.backup(copy)
    copy.execute("UPDATE alembic_version SET version_num = 'cfd24bdc0731'")
    copy.commit()
    copy.close()
    source.close()
    assert f"run 'mlflow db upgrade sqlite:///{old}'" in refusal(f"sqlite:///{old}")


def test_a_reachable_server_and_database_pass(server, database):
    assert check_reachable(server.uri) == server.uri
    assert check_reachable(database) == database


def test_workers_get_an_absolute_database_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_two_processes_create_one_database_quietly(created):
    assert created.other_returncode == 0, created.other_output
    assert created.other_output == ""
    assert sorted(path.name for path in created.path.parent.iterdir()) == ["mlflow.db"]


class EmptyStore:
    """A database creation without MLflow's seconds of schema migrations."""

    def __init__(self, uri: str, artifacts: str) -> None:
        self.engine = create_engine(uri)
        self.engine.connect().close()


def test_a_creation_never_replaces_a_database_that_was_there_first(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", EmptyStore)
    first = tmp_path / "mlflow.db"
    first.write_text("made by another process meanwhile")
    address._create_database(first)
    assert first.read_text() == "made by another process meanwhile"
    assert list(tmp_path.iterdir()) == [first]


def test_mlflow_settings_hold_inside_only_and_the_users_own_win(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    with mlflow_settings(7):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
