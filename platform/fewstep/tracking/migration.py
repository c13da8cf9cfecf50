"""From the sqlite file that everyone begins with to PostgreSQL and a bucket: all runs and models, and their files."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.errors import UserError, one_line
from fewstep.passwords import without_password
from fewstep.storage import Storage
from fewstep.tracking.address import absolute_uri, check_reachable, connect, sqlite_path

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData, Table
    from sqlalchemy.engine import Engine

COUNTED = {
    "experiments": "experiments",
    "runs": "runs",
    "metrics": "metric values",
    "params": "parameters",
    "tags": "tags",
    "logged_models": "logged models",
    "registered_models": "registered models",
    "model_versions": "model versions",
    "registered_model_aliases": "aliases",
}
"""The tables that are told to the user → what their rows are."""

MADE_BY_MLFLOW = {"experiments": 1, "workspaces": 1}
"""Table → rows that a database has as MLflow makes it."""

LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Tables with addresses of files → their columns."""

SERVED = "mlflow-artifacts:/"
"""Begins the address of a file that the MLflow server fetches from its bucket for the client."""

BATCH = 1000
"""Rows that are sent at a time."""


@dataclass(frozen=True)
class Copied:
    """What was copied."""

    before: dict[str, int]
    """Rows of each table of `COUNTED` in the sqlite file."""
    after: dict[str, int]
    """The same in PostgreSQL, counted there."""
    files: int
    size: int
    """Bytes of the files."""


def copy_runs(source: str, target: str, files: str) -> Copied:
    """Copy everything that an MLflow database in an sqlite file holds to an empty PostgreSQL database.

    Files that lie on this machine go to `files`, and what names them is changed to be fetched through the MLflow
    server; files that are elsewhere stay where they are. The sqlite file and its files are only read. Rows are
    committed all or none; uploaded files stay if it fails, and are written again the next time.

    Args:
        source: `sqlite:///…`.
        target: `postgresql…://…`; MLflow's tables are made where they are missing.
        files: folder, or `s3://…`, that the server gets as `--artifacts-destination`.

    Raises:
        UserError: one of them can't be read or written, holds another version's tables, or the target is not empty.
    """
    from sqlalchemy import MetaData, create_engine
    from sqlalchemy.exc import SQLAlchemyError

    source = absolute_uri(source)
    path = sqlite_path(source)
    if path is None:
        raise UserError(
            f"{source} is no sqlite database: name the file that is copied as sqlite:///mlflow.db."
        )
    if not path.is_file():
        raise UserError(f"{source} is not there: name an existing file, such as sqlite:///mlflow.db.")
    if not target.startswith("postgresql"):
        raise UserError(
            f"{without_password(target)} is no PostgreSQL database: name it as postgresql+psycopg://USER@HOST/NAME."
        )
    check_reachable(target)
    storage = Storage.at(files)
    try:
        connect(target).search_experiments(max_results=1)  # MLflow makes its tables with the first question
        old, new = create_engine(source), create_engine(target)
        tables = MetaData()
        tables.reflect(new)
        with old.connect() as reading, new.begin() as writing:
            _check_versions(reading, writing, source)
            _check_empty(writing, tables, target)
            reading.rollback()
            # All rows are of one moment. Writers wait meanwhile, so files, which take longer, are not copied in it.
            reading.exec_driver_sql("BEGIN")
            before = _counts(reading, tables)
            moved = dict(_moves(reading, tables))
            _copy_rows(reading, writing, tables, moved)
            reading.rollback()
            copied = _copy_files(moved, storage)
            _continue_numbers(writing, tables)
            after, now = _counts(writing, tables), _counts(reading, tables)
            if not before == after == now:
                raise UserError(
                    f"{source} held {before}, of which {target} has {after}, and holds {now} now: nothing was kept; "
                    "try again while no job writes to either."
                )
        _close(old, new)
    except SQLAlchemyError as error:
        raise UserError(
            f"{source} can't be copied to {target} ({one_line(error)}): see that both can be read and written."
        ) from error
    return Copied(before, after, *copied)


def _close(*engines: Engine) -> None:
    for engine in engines:
        engine.dispose()


def _check_versions(reading: Connection, writing: Connection, source: str) -> None:
    from sqlalchemy import text

    question = text("SELECT version_num FROM alembic_version")
    if reading.execute(question).scalars().all() != writing.execute(question).scalars().all():
        raise UserError(
            f"{source} has the tables of another version of MLflow: bring it to this one's with "
            f"`mlflow db upgrade {source}`, on a copy of the file."
        )


def _check_empty(writing: Connection, tables: MetaData, target: str) -> None:
    """Refuse a database with content, beside what MLflow puts into one that it makes."""
    others = [table.name for table in _content(tables) if table.name not in COUNTED]
    found = _counts(writing, tables, [*COUNTED, *others])
    if any(count > MADE_BY_MLFLOW.get(name, 0) for name, count in found.items()):
        held = ", ".join(f"{count} {COUNTED.get(name, name)}" for name, count in found.items() if count)
        raise UserError(f"{target} is not empty ({held}): name a new database.")
    for table in reversed(_content(tables)):
        writing.execute(table.delete())


def _content(tables: MetaData) -> list[Table]:
    """The tables with content, those that others refer to first."""
    return [table for table in tables.sorted_tables if table.name != "alembic_version"]


def _counts(connection: Connection, tables: MetaData, names: Iterable[str] = COUNTED) -> dict[str, int]:
    from sqlalchemy import func, select

    counts = {}
    for name in names:
        counts[name] = connection.execute(select(func.count()).select_from(tables.tables[name])).scalar_one()
    return counts


def _local(address: str | None) -> Path | None:
    """The folder on this machine that an address names, if it names one."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if not address or not is_local_uri(address, is_tracking_or_registry_uri=False):
        return None
    path = Path(local_file_uri_to_path(address))
    return path if path.is_absolute() else None


def _moves(reading: Connection, tables: MetaData) -> Iterator[tuple[Path, str]]:
    """Folders with files of runs → the name of theirs in the bucket, none inside another."""
    from sqlalchemy import select

    folders: dict[Path, str] = {}
    experiments = tables.tables["experiments"]
    for number, address in reading.execute(
        select(experiments.c.experiment_id, experiments.c.artifact_location)
    ):
        if (folder := _local(address)) is not None:
            folders.setdefault(folder, str(number))
    for name, columns in LOCATIONS.items():
        for column in columns:
            for (address,) in reading.execute(select(tables.tables[name].c[column]).distinct()):
                if (folder := _local(address)) is not None:
                    folders.setdefault(folder, f"copied-{len(folders)}")
    for folder, name in folders.items():
        if not any(parent in folders for parent in folder.parents):
            yield folder, name


def _copy_files(moved: dict[Path, str], storage: Storage) -> tuple[int, int]:
    """Upload what lies in the folders; gives the number of files, and of bytes."""
    count = size = 0
    for folder, name in moved.items():
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = f"{name}/{file.relative_to(folder).as_posix()}"
            length = file.stat().st_size
            if length == 0:
                storage.write(relative, b"")
            else:
                with (
                    open(file, "rb") as stream,
                    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
                ):
                    view = memoryview(content)
                    try:
                        storage.write(relative, view)
                    finally:
                        view.release()
            count, size = count + 1, size + length
    return count, size


def _new_address(address: str | None, moved: dict[Path, str]) -> str | None:
    """Where the files of an address are now."""
    if (folder := _local(address)) is None:
        return address
    root = next(one for one in (folder, *folder.parents) if one in moved)
    return SERVED + "/".join((moved[root], *folder.relative_to(root).parts))


def _copy_rows(reading: Connection, writing: Connection, tables: MetaData, moved: dict[Path, str]) -> None:
    """Copy the rows of all tables."""
    for table in _content(tables):
        # Read by the target's own types: sqlite has no booleans, and no JSON.
        rows = reading.execution_options(yield_per=BATCH).execute(table.select())
        for batch in rows.mappings().partitions(BATCH):
            values = [dict(row) for row in batch]
            for column in LOCATIONS.get(table.name, ()):
                for row in values:
                    row[column] = _new_address(row[column], moved)
            writing.execute(table.insert(), values)


def _continue_numbers(writing: Connection, tables: MetaData) -> None:
    """Let PostgreSQL number new rows after the copied ones."""
    from sqlalchemy import func, select

    for table in _content(tables):
        for column in table.primary_key.columns:
            if column.server_default is None or not column.autoincrement:
                continue
            sequence = writing.execute(
                select(func.pg_get_serial_sequence(table.name, column.name))
            ).scalar_one()
            highest = writing.execute(select(func.max(column))).scalar_one()
            if sequence is not None and highest:
                writing.execute(select(func.setval(sequence, highest)))
