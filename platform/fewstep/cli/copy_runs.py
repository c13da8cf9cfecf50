"""`fewstep copy-runs`: from the sqlite file of the beginning to PostgreSQL and a bucket."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Copy all that an MLflow database in an sqlite file holds (experiments, runs, metrics, models, versions, aliases) to an
empty PostgreSQL database, and the files of the runs to where the MLflow server keeps its own. What is copied is only
read and stays. Ends with a table of what was there before and what is there now."""
EXAMPLES = """\
examples
  {program} sqlite:///mlflow.db postgresql+psycopg://mlflow@db/mlflow --files s3://fewstep/mlflow

Stop the jobs that still write to the sqlite file first. The server is then started with the same two places:

  mlflow server --backend-store-uri postgresql+psycopg://mlflow@db/mlflow --artifacts-destination s3://fewstep/mlflow

Passwords come from ~/.pgpass or the environment variable PGPASSWORD; an address with one is refused.
Needs the extras train and postgresql."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("sqlite", metavar="SQLITE", help="what is copied: sqlite:///mlflow.db")
    parser.add_argument(
        "postgres", metavar="POSTGRES", help="an empty database: postgresql+psycopg://USER@HOST/NAME"
    )
    parser.add_argument(
        "--files",
        required=True,
        metavar="FOLDER",
        help="where files go: the server's --artifacts-destination, such as s3://BUCKET/mlflow",
    )


def run(options: argparse.Namespace) -> None:
    """Copy, and print the counts.

    Raises:
        UserError: one of the places can't be used, or the PostgreSQL database is not empty.
    """
    from fewstep.cli.extras import require

    require("fewstep copy-runs", "postgresql")
    from fewstep.tracking.migration import COUNTED, copy_runs

    copied = copy_runs(options.sqlite, options.postgres, options.files)
    print(f"{'':18} {'before':>10} {'after':>10}")
    for table, name in COUNTED.items():
        print(f"{name:18} {copied.before[table]:>10} {copied.after[table]:>10}")
    print(f"{copied.files} files ({copied.size:,} bytes) copied to {options.files}")
