"""Send to MLflow what finished or killed jobs could not: `python -m fewstep.tracking.resend SPOOL`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fewstep.errors import UserError
from fewstep.tracking.address import readable
from fewstep.tracking.delivery import Courier
from fewstep.tracking.spool import left_behind, sessions


def resend(spool: Path) -> tuple[int, int]:
    """Deliver the sessions under `spool` that no living process owns.

    Args:
        spool: the folder that the job named.

    Returns:
        How many sessions were delivered, and how many still wait: because a process uses them, or MLflow is away.

    Raises:
        UserError: `spool` is not a folder.
    """
    if not spool.is_dir():
        raise UserError(f"tracking spool {str(spool)!r} is not a folder: give the folder the job named")
    before = len(sessions(spool))
    delivered = 0
    for session in left_behind(spool):
        courier = Courier(session)
        try:
            while courier.send_records() or courier.send_upload():
                pass
            delivered += 1
        except Exception as error:  # one run's trouble must not hold up another's
            print(f"run {session.run_id} at {session.uri}: not delivered, {readable(error)}", file=sys.stderr)
        finally:
            session.close()
    return delivered, before - delivered


def main(arguments: list[str] | None = None) -> int:
    """Resend what one spool holds, as the command line says.

    Args:
        arguments: of the command line; those of this process by default.

    Returns:
        The exit status: 0 if everything is delivered, 1 if some still waits, 2 if the spool is not a folder.
    """
    parser = argparse.ArgumentParser(prog="python -m fewstep.tracking.resend", description=__doc__)
    parser.add_argument("spool", type=Path, help="the spool folder named in the job's last tracking message")
    try:
        delivered, waiting = resend(parser.parse_args(arguments).spool)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{delivered} sessions delivered, {waiting} still waiting")
    return 1 if waiting else 0


if __name__ == "__main__":
    sys.exit(main())
