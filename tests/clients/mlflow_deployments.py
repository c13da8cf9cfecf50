"""MLflow's clients of deployments on the service: they know chat and text, and so can't ask for an image."""

from __future__ import annotations

import os
from importlib.metadata import version

from client_checks import ADDRESS, KEY, PROMPT, STUDENT, check, finish, raised

os.environ |= {"OPENAI_API_KEY": KEY, "OPENAI_API_BASE": ADDRESS}

from mlflow.deployments import get_deploy_client
from mlflow.gateway.config import EndpointType
from mlflow.gateway.providers.base import PassthroughAction

print(f"MLflow {version('mlflow')}")
client = get_deploy_client("openai")
error = raised(client.predict, endpoint=STUDENT, inputs={"prompt": PROMPT})
check(
    "openai: takes messages alone", isinstance(error, KeyError) and error.args == ("messages",), repr(error)
)
error = raised(client.predict, endpoint=STUDENT, inputs={"messages": [{"role": "user", "content": PROMPT}]})
check("openai: asks for a chat, which there is not", "/v1/chat/completions: /docs" in str(error), repr(error))
client = get_deploy_client(ADDRESS.removesuffix("/v1"))
error = raised(client.predict, endpoint=STUDENT, inputs={"prompt": PROMPT})
check("http: asks at an address of MLflow's own", "404" in str(error), repr(error))
kinds = {kind.value for kind in EndpointType} | {action.value for action in PassthroughAction}
check("gateway: has no kind of endpoint for images", not [kind for kind in kinds if "image" in kind], kinds)
finish()
