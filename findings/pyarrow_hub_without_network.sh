#!/usr/bin/env bash
# pyarrow 25.0.1 on huggingface_hub 2.4.0's fsspec file system: without a network, a dataset on the hub is an empty
# folder or an error that is no OSError, depending on who knows first that there is no network.
#
# One would guess: `FileSystem.from_uri("hf://…")` gives a file system like any other of pyarrow's. If the hub can't be
#   reached, listing a folder raises an OSError, as S3 does, and `allow_not_found=True` forgives a missing folder alone.
# What happens: (1) with HF_HUB_OFFLINE=1, listing with allow_not_found=True gives no file and no error: an unreachable
#   dataset looks like an empty one; without it, FileNotFoundError. Only asking for the folder itself says why.
#   (2) without HF_HUB_OFFLINE, all three raise httpx2.ConnectError, which `except OSError` lets through.
#   So: catch every exception of such a file system, and take an empty listing for "nothing there, or not reachable".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==25.0.1 huggingface_hub==2.4.0
cat > "$folder/try.py" <<'P'
import os

from pyarrow import fs

system, base = fs.FileSystem.from_uri("hf://datasets/somebody/pictures")
ways = {
    "listed, allow_not_found": lambda: system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True)),
    "listed": lambda: system.get_file_info(fs.FileSelector(base, recursive=True)),
    "asked for": lambda: system.get_file_info(base),
}
for name, way in ways.items():
    try:
        found = way()
    except Exception as error:
        found = f"{type(error).__name__}, {'an' if isinstance(error, OSError) else 'no'} OSError"
    print(f"HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']}, {name}: {found}")
P
export HF_ENDPOINT=http://127.0.0.1:9  # nobody listens there
for offline in 1 0; do HF_HUB_OFFLINE=$offline "$folder/venv/bin/python" "$folder/try.py"; done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
HF_HUB_OFFLINE=1, listed, allow_not_found: []
HF_HUB_OFFLINE=1, listed: FileNotFoundError, an OSError
HF_HUB_OFFLINE=1, asked for: OfflineModeIsEnabled, an OSError
HF_HUB_OFFLINE=0, listed, allow_not_found: ConnectError, no OSError
HF_HUB_OFFLINE=0, listed: ConnectError, no OSError
HF_HUB_OFFLINE=0, asked for: ConnectError, no OSError
SEEN
