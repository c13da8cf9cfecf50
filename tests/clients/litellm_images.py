"""LiteLLM on the service: its functions of images, with `openai/NAME` and the service's address."""

from __future__ import annotations

import asyncio
import base64
import os
from importlib.metadata import version
from typing import Any

# Its prices of models come from its own package; it would ask for newer ones each time it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from client_checks import (
    ADDRESS,
    EDITOR,
    KEY,
    PROMPT,
    SEED,
    STUDENT,
    check,
    drawn,
    fetched,
    finish,
    png,
    raised,
)  # fmt: skip

litellm.suppress_debug_info = True
print(f"LiteLLM {version('litellm')}")
SITE: dict[str, Any] = {"api_base": ADDRESS, "api_key": KEY}
NEW: dict[str, Any] = {"model": f"openai/{STUDENT}", "prompt": PROMPT, "seed": SEED, **SITE}
CHANGED: dict[str, Any] = {"model": f"openai/{EDITOR}", "prompt": PROMPT, "seed": SEED, **SITE}


def decoded(result: Any) -> list[bytes]:
    """The files of its answer."""
    return [base64.b64decode(image.b64_json) for image in result.data]


expected = drawn(n=2)
result = litellm.image_generation(**NEW, n=2, size="16x16", quality="high", user="somebody")
check("generates", decoded(result) == expected, result)
check("says size and format", (result.size, result.output_format) == ("16x16", "png"), result)
result = asyncio.run(litellm.aimage_generation(**NEW, n=2))
check("generates asynchronously", decoded(result) == expected, result)
result = litellm.image_generation(**NEW, num_inference_steps=2)
check("passes fields of the service's own on", decoded(result) == drawn(num_inference_steps=2), result)
error = raised(litellm.image_generation, **NEW, response_format="b64_json")
check(
    "refuses response_format itself, for a model that it does not know",
    isinstance(error, litellm.UnsupportedParamsError), repr(error),
)  # fmt: skip
result = litellm.image_generation(**NEW, extra_body={"response_format": "url"})
check("fetches by address, asked for in extra_body", fetched(result.data[0].url)[0] == expected[0], result)
result = litellm.image_generation(**NEW, response_format="url", drop_params=True)
check("leaves it out where told to", decoded(result) == expected[:1], result)
check("can't stream", raised(litellm.image_generation, **NEW, stream=True, max_retries=0) is not None)

first = litellm.image_edit(
    **CHANGED, image=png(), n=2, size="16x16", response_format="b64_json", quality="low"
)
check("edits", len(first.data) == 2, first)
result = litellm.image_edit(**CHANGED, image=[png()], mask=png(transparent=True), input_fidelity="high")
check("edits a list, with a mask", len(decoded(result)) == 1, result)
result = asyncio.run(litellm.aimage_edit(**CHANGED, image=png(), n=2))
check("edits asynchronously", decoded(result) == decoded(first), result)
result = litellm.image_edit(**CHANGED, image=png(), response_format="url")
check("edits, to an address", fetched(result.data[0].url)[0] == decoded(first)[0], result)

models = litellm.get_valid_models(
    check_provider_endpoint=True, custom_llm_provider="openai",
    litellm_params=litellm.types.router.LiteLLM_Params(model="openai/any", **SITE),
)  # fmt: skip
check("lists models", models == [STUDENT, EDITOR], models)

for what, kind, call, change in (
    ("400", litellm.BadRequestError, litellm.image_generation, NEW | {"n": 99}),
    ("404", litellm.NotFoundError, litellm.image_generation, NEW | {"model": "openai/nope"}),
    ("401", litellm.AuthenticationError, litellm.image_generation, NEW | {"api_key": "no"}),
    ("400 of an edit", litellm.BadRequestError, litellm.image_edit, CHANGED | {"n": 99, "image": png()}),
    ("401 of an edit", litellm.AuthenticationError, litellm.image_edit, CHANGED | {"api_key": "no", "image": png()}),
):  # fmt: skip
    error = raised(call, **change)
    check(what, isinstance(error, kind), repr(error))
    if "400" in what:
        check("  with the service's sentence", "at most 10" in str(error), error)
        check("  without the field to blame", getattr(error, "param", None) is None, error)
finish()
