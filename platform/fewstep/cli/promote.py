"""`fewstep promote`: another version of a registered model gets the alias that is served."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Give the alias that is served to a version of a registered model. A distillation gives it to its student only if that
keeps the recipe's acceptance criteria (tracking.promote), and otherwise registers the student as `challenger`, with the
reason on the version's page. Servers that follow the alias change over by themselves."""
EXAMPLES = """\
examples
  {program} emoji64-4step                          the newest version
  {program} emoji64-4step 3                        this one, also to go back to it
  {program} emoji64-4step 3 --alias candidate"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="name of the registered model, without models:/")
    parser.add_argument(
        "version", nargs="?", default="latest", help="number of the version; default: the newest"
    )
    parser.add_argument("--alias", default="champion", help="which alias moves; default: %(default)s")
    parser.add_argument(
        "--tracking-uri", help="where the model is registered; default: MLFLOW_TRACKING_URI or ./mlflow.db"
    )


def run(options: argparse.Namespace) -> None:
    """Move the alias, and print from where to where.

    Raises:
        UserError: there is no such model or version, it is not complete, or MLflow can't be reached.
    """
    from fewstep.student.resolve import registry_uri
    from fewstep.tracking.promotion import promote

    given = promote(options.model, options.version, registry_uri(options.tracking_uri), options.alias)
    print(f"{given.address} is {given.version.uri} now: {given.reason}")
