#!/usr/bin/env bash
# Clients that people use for images, unchanged, on the service of this checkout: `make clients`. It needs the package
# registries, Node with npm, and some minutes; it installs the packages below into a temporary folder, and removes it.
set -euo pipefail

OPENAI=3.57.0     # Python
LITELLM=1.110.2
OPEN_WEBUI=0.12.4
OPENAI_NODE=7.59.0
NODE=22.23.3      # where the machine's own is older: npm would give that, without a word, an older package of OpenAI's

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
folder=$(mktemp -d)
site=
trap '[ -z "$site" ] || { kill "$site"; wait "$site"; } 2>/dev/null || true; rm -rf "$folder"' EXIT

PYTHONPATH="$here/..:$here/../serve${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/clients_site.py" "$folder" > "$folder/log" 2>&1 &
site=$!

echo "== installing the clients in $folder"
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "openai==$OPENAI" "litellm==$LITELLM"
# Open WebUI asks for some gigabytes of other packages, of which its module of images uses none: see there.
"$folder/venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$folder" "open-webui==$OPEN_WEBUI"
mkdir "$folder/node"
packages=("openai@$OPENAI_NODE")
[ "$(node -p 'process.versions.node.split(".")[0]')" -ge "${NODE%%.*}" ] || packages+=("node@$NODE")
npm install --silent --no-audit --no-fund --prefix "$folder/node" "${packages[@]}"

until [ -e "$folder/address" ]; do
  kill -0 "$site" 2>/dev/null || { echo "error: the service did not start:" >&2; cat "$folder/log" >&2; exit 1; }
  sleep 1
done
FEWSTEP_ADDRESS=$(cat "$folder/address")
export FEWSTEP_ADDRESS NODE_FOLDER="$folder/node" PATH="$folder/node/node_modules/.bin:$PATH" MLFLOW_DISABLE_TELEMETRY=true

(cd "$here" && "$python" -c 'import sys, client_checks; sys.stdout.buffer.write(client_checks.png())') > "$folder/node/picture.png"

failed=()
try() { "$@" || failed+=("$(basename "$2")"); }
try "$folder/venv/bin/python" "$here/openai_python.py"
try node "$here/openai_node.mjs"
try "$folder/venv/bin/python" "$here/litellm_images.py"
try "$python" "$here/open_webui_images.py" "$folder"/open_webui-*.whl
try "$python" "$here/mlflow_deployments.py"

if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not as promised: ${failed[*]}; the service said:" >&2
  tail -n 20 "$folder/log" >&2
  exit 1
fi
echo "== all clients: as docs/tutorials/serving.md says"
