"""The service that the clients are tried on: the bundled student, and an editor, with keys and addresses of images.

It is the application over real HTTP with the real engine, in one process: clients can't see whether Ray is between.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from pathlib import Path

from client_checks import EDITOR, KEY, STUDENT
from local_service import serving

from fewstep.student import FewStepPipeline
from tiny import write_editor


def main(folder: Path) -> None:
    """Serve until the process is ended; the address is written to a file of the folder once it answers."""
    write_editor(folder / "editor")
    (folder / "keys").write_text(f"clients: {KEY}\n")
    os.environ["FEWSTEP_URL_SECRET"] = secrets.token_hex(32)
    models = {
        STUDENT: FewStepPipeline.from_pretrained(STUDENT),
        EDITOR: FewStepPipeline.from_pretrained(folder / "editor"),
    }
    models[STUDENT](
        "owl, noto style", seed=0
    )  # compiles what it needs, which takes longer than a request may
    settings = {
        "access": {"api_keys_file": str(folder / "keys")},
        "urls": {"storage": str(folder / "images")},
        "limits": {"time_limit_s": 300},  # a machine that is busy otherwise must not fail the clients
    }
    with serving(models, prefix="/pictures", **settings) as address:
        written = folder / "address.new"
        written.write_text(address)
        written.rename(folder / "address")
        threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
