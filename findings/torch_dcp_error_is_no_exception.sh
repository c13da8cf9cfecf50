#!/usr/bin/env bash
# torch 2.13.0: `except Exception` does not catch what torch.distributed.checkpoint raises about a damaged checkpoint.
#
# One would guess: loading a checkpoint with a missing file raises some kind of Exception, so that `except Exception` can
#   go on with the checkpoint before.
# What happens: errors of the ranks are gathered in a CheckpointException, which derives from BaseException directly, as
#   KeyboardInterrupt does. A fallback guarded by `except Exception` never runs; also outside of any process group.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import pathlib
import sys
import warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint as dcp

place = pathlib.Path(sys.argv[1]) / "checkpoint"
dcp.save({"x": torch.zeros(4)}, checkpoint_id=place)
for file in place.glob("*.distcp"):
    file.unlink()
print("torch", torch.__version__.partition("+")[0])
try:
    dcp.load({"x": torch.zeros(4)}, checkpoint_id=place)
except Exception as error:
    print("an Exception:", type(error).__name__)
except BaseException as error:
    print("no Exception:", type(error).__name__)
P
"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
no Exception: CheckpointException
SEEN
