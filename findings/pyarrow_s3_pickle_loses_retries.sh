#!/usr/bin/env bash
# pyarrow 25.0.1: an S3FileSystem that travels to another process forgets its retry strategy.
#
# One would guess: `S3FileSystem` pickles with its settings, as Ray and Dask rely on, so a worker's requests are tried as
#   often as its driver's.
# What happens: end point, credentials, region and time limits travel, `retry_strategy` does not. A driver that allows one
#   attempt gives up at once on an unreachable server; the worker goes on with the default number of attempts.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==25.0.1
cat > "$folder/try.py" <<'P'
import pickle
import socket
import threading
import pyarrow
from pyarrow import fs

asked = 0


def refuse(server):
    """Answer every request with 503, which clients try again."""
    global asked
    while True:
        connection, _ = server.accept()
        connection.recv(65536)
        asked += 1
        connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()


def attempts(s3):
    global asked
    asked = 0
    try:
        s3.get_file_info("bucket/key")
    except OSError:
        pass
    return asked


server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=refuse, args=(server,), daemon=True).start()
s3 = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{server.getsockname()[1]}", scheme="http", access_key="a",
                     secret_key="b", region="us-east-1", retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))
print("pyarrow", pyarrow.__version__)
print("attempts here", attempts(s3))
there = attempts(pickle.loads(pickle.dumps(s3)))
print("attempts after pickling", "the same" if there == 1 else "more")
P
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
pyarrow 25.0.1
attempts here 1
attempts after pickling more
SEEN
