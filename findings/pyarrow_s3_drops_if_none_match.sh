#!/usr/bin/env bash
# pyarrow 25.0.1, S3FileSystem: a stream opened with the metadata If-None-Match: * replaces the object that is there.
#
# One would guess: open_output_stream's metadata takes HTTP headers by their names (Content-Type, Cache-Control …), so that
#   If-None-Match, which S3 takes with a PUT since 2024, is sent too, and the second writer is refused; or that a name that
#   is not sent is refused.
# What happens: no error, and the second writer's bytes are what is read afterwards. boto3's put_object(IfNoneMatch="*") on
#   the same server is refused with 412. Who needs "create, but only if nobody has" (a lock, a lease, a queue) on S3 can't have
#   it from pyarrow.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "pyarrow==25.0.1" "boto3==1.44.5" "moto[server]==5.2.5"
cat > "$folder/try.py" <<'P'
import boto3
import pyarrow.fs
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
who = {"region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **who)
s3.create_bucket(Bucket="bucket")
arrow = pyarrow.fs.S3FileSystem(
    endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", access_key="a", secret_key="b"
)


def read(key):
    return s3.get_object(Bucket="bucket", Key=key)["Body"].read().decode()


for writer in ("first", "second"):
    with arrow.open_output_stream("bucket/arrow", metadata={"If-None-Match": "*"}) as stream:
        stream.write(writer.encode())
print("pyarrow holds", read("arrow"))
for writer in ("first", "second"):
    try:
        s3.put_object(Bucket="bucket", Key="boto", Body=writer.encode(), IfNoneMatch="*")
    except ClientError as error:
        print("boto3 says", error.response["ResponseMetadata"]["HTTPStatusCode"])
print("boto3 holds", read("boto"))
server.stop()
P
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'E'
pyarrow holds second
boto3 says 412
boto3 holds first
E
diff "$folder/seen" "$folder/expected"
