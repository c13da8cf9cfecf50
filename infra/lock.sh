#!/usr/bin/env bash
# Writes infra/lock.txt: every package of an image with the hashes of its files, at the versions of infra/constraints.txt.
# Run it after a change of either, or of pyproject.toml; a test says when it is due. Needs the index, takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --quiet --extra train --extra serve --extra quantization --extra postgresql \
  --constraints infra/constraints.txt --generate-hashes --no-annotate --no-header --no-emit-index-url \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --output-file infra/lock.txt
