#!/usr/bin/env bash
# LiteLLM 1.110.2: `image_generation` refuses OpenAI's field `response_format` for every `openai/` model, `image_edit` sends it.
#
# One would guess: with `model="openai/NAME"` and `api_base`, a field of OpenAI's image API goes to the server, which knows
#   what its models take; more so as fields that OpenAI has not at all, such as `seed`, are sent.
# What happens: every name, dall-e-3 too, is taken for one of OpenAI's newer image models, which answer with b64_json
#   always, and `response_format` raises UnsupportedParamsError before anything is sent. So a server of one's own that
#   gives addresses of images is asked for them by `extra_body`; `image_edit` takes the field as it is.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check litellm==1.110.2 openai==3.57.0
cat > "$folder/try.py" <<'P'
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

litellm.suppress_debug_info = True
bodies = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        bodies.append(self.rfile.read(int(self.headers["content-length"])).decode())
        answer = json.dumps({"created": 0, "data": [{"b64_json": "AAAA"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
site = {"api_base": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "any", "prompt": "an owl"}


def seen(word, function, **options):
    """Whether the server gets the word; or the error before it is asked."""
    bodies.clear()
    try:
        function(**options, **site)
    except Exception as error:
        return f"{type(error).__name__}, {len(bodies)} requests"
    return "sent" if word in bodies[0] else "left out"


field, new, edit = "response_format", litellm.image_generation, litellm.image_edit
print("LiteLLM", version("litellm"))
print("generation, openai/mine, seed:", seen("seed", new, model="openai/mine", seed=1))
print("generation, openai/mine, response_format:", seen(field, new, model="openai/mine", response_format="b64_json"))
print("generation, openai/dall-e-3, response_format:", seen(field, new, model="openai/dall-e-3", response_format="b64_json"))
print("generation, openai/mine, in extra_body:", seen(field, new, model="openai/mine", extra_body={field: "b64_json"}))
print("edit, openai/mine, response_format:", seen(field, edit, model="openai/mine", image=b"x", response_format="b64_json"))
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
LiteLLM 1.110.2
generation, openai/mine, seed: sent
generation, openai/mine, response_format: UnsupportedParamsError, 0 requests
generation, openai/dall-e-3, response_format: UnsupportedParamsError, 0 requests
generation, openai/mine, in extra_body: sent
edit, openai/mine, response_format: sent
SEEN
