"""`fewstep resend`: deliver what finished or killed jobs could not send to MLflow."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Send to MLflow what finished or killed jobs could not: figures, pictures and files wait in a spool folder, which the
job's last tracking message names. Exit status 1 while something still waits."""
EXAMPLES = """\
examples
  {program} .fewstep/spool"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("spool", type=Path, help="the spool folder named in the job's last tracking message")


def run(options: argparse.Namespace) -> int:
    """Deliver what no living process owns.

    Returns:
        0 where everything was delivered, or 1.

    Raises:
        UserError: the spool is not a folder.
    """
    from fewstep.tracking.resend import resend

    delivered, waiting = resend(options.spool)
    print(f"{delivered} sessions delivered, {waiting} still waiting")
    return 1 if waiting else 0
