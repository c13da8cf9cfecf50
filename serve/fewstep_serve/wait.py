"""Wait until a deployed configuration serves, and print its address.

python -m fewstep_serve.wait serve/config.yaml
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request

import yaml

PATIENCE_S = 300
"""How long to wait."""


def main(config: str) -> None:
    """Wait until the application of a configuration file is ready; exits with an error after `PATIENCE_S`."""
    with open(config) as file:
        http = yaml.safe_load(file).get("http_options", {})
    host = http.get("host", "127.0.0.1")
    # 0.0.0.0 means every address of this machine; as a destination it means nothing.
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{http.get('port', 8000)}"
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE_S:
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=5):
                print(f"serving at {address}    page {address}/    API {address}/docs")
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(
        f"error: {address} was not ready within {PATIENCE_S} s: `serve status` and Ray's dashboard say why."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
