#!/usr/bin/env bash
# pyarrow 25.0.1: an exception inside `with open_output_stream(...)` on S3 publishes what was written so far.
#
# One would guess: an upload that ends by an exception is aborted; S3 shows an object when its upload is completed, so
#   a reader sees the whole object or none, as with most S3 clients' uploads.
# What happens: the stream is closed on leaving the block, whatever the reason, and closing completes the upload. The
#   object gets its final name with the first part of its content. Write the whole content in one call, or write under
#   another name first.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==25.0.1 'moto[s3,server]==5.2.5'
cat > "$folder/try.py" <<'P'
import logging
import pyarrow
from moto.server import ThreadedMotoServer
from pyarrow import fs

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
s3 = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", access_key="a", secret_key="b",
                     region="us-east-1", allow_bucket_creation=True)
s3.create_dir("bucket")
try:
    with s3.open_output_stream("bucket/weights") as stream:
        stream.write(b"first half")
        raise RuntimeError("the second half could not be made")
except RuntimeError:
    pass
print("pyarrow", pyarrow.__version__)
info = s3.get_file_info("bucket/weights")
print("object:", info.type.name, info.size, "bytes")
server.stop()
P
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
pyarrow 25.0.1
object: File 10 bytes
SEEN
