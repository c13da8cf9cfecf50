#!/usr/bin/env bash
# pyarrow 25.0.1: `open_input_stream` unzips a file because of its name, `open_input_file` does not, and capitals matter.
#
# One would guess: a file system's stream gives the bytes that are stored, as Python's `open` and `open_input_file` do.
# What happens: the stream's default is `compression="detect"`, so "a.gz" arrives unzipped, and a file of the same bytes
#   called "a.GZ" or "a" arrives as it is. Code that reads any object by one helper and then unzips by suffix fails on
#   small letters alone; checksums of what was read are not those of the file. `compression=None` gives the stored bytes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==25.0.1
cat > "$folder/try.py" <<'P'
import gzip
import sys
import pyarrow
from pyarrow import fs

print("pyarrow", pyarrow.__version__)
local, content = fs.LocalFileSystem(), gzip.compress(b"a caption", mtime=0)
for name in ("a.gz", "a.GZ"):
    path = f"{sys.argv[1]}/{name}"
    with open(path, "wb") as file:
        file.write(content)
    for how in (local.open_input_stream, local.open_input_file):
        with how(path) as stream:
            print(name, how.__name__, "stored bytes" if stream.read() == content else "unzipped")
P
"$folder/venv/bin/python" "$folder/try.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
pyarrow 25.0.1
a.gz open_input_stream unzipped
a.gz open_input_file stored bytes
a.GZ open_input_stream stored bytes
a.GZ open_input_file stored bytes
SEEN
