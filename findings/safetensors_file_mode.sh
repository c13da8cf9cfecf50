#!/usr/bin/env bash
# safetensors 0.8.0: `save_file` writes files that their owner alone can read, and puts a file in place of a link.
#
# One would guess: a file of weights gets the mode that the umask gives every other file of the same program (0644 under
#   022), and writing to a symbolic link writes its target, as `open` does.
# What happens: the mode is 0600 whatever the umask, so that a server of another user, or a group that shares a folder of
#   models, reads config.json and is refused the weights beside it. A link is replaced; its target keeps the old weights.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
cat > "$folder/try.py" <<'P'
import os
import stat
import sys
import numpy
import safetensors
from safetensors.numpy import load_file, save_file

os.chdir(sys.argv[1])
os.umask(0o022)
print("safetensors", safetensors.__version__)
save_file({"x": numpy.zeros(1)}, "target")
with open("config.json", "w") as file:
    file.write("{}")
for name in ("config.json", "target"):
    print(name, oct(stat.S_IMODE(os.stat(name).st_mode)))
os.symlink("target", "link")
save_file({"x": numpy.ones(1)}, "link")
print("still a link:", os.path.islink("link"), "- the target holds", load_file("target")["x"][0])
P
"$folder/venv/bin/python" "$folder/try.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
safetensors 0.8.0
config.json 0o644
target 0o600
still a link: False - the target holds 0.0
SEEN
