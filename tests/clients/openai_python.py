"""OpenAI's Python package on the service: images, edits, streams, models, errors."""

from __future__ import annotations

import base64
import io

import openai
from client_checks import (
    ADDRESS,
    EDITOR,
    KEY,
    PROMPT,
    SEED,
    STUDENT,
    WRONG_KEY,
    check,
    drawn,
    fetched,
    finish,
    png,
    raised,
    size_of,
)  # fmt: skip

print(f"openai {openai.__version__} (Python)")
client = openai.OpenAI(base_url=ADDRESS, api_key=KEY)
seeded = {"extra_body": {"seed": SEED}}

result = client.images.generate(model=STUDENT, prompt=PROMPT, n=2, size="16x16", **seeded)
check("generates", [base64.b64decode(one.b64_json) for one in result.data] == drawn(n=2), result)
check("gets no address it did not ask for", result.data[0].url is None)
result = client.images.generate(prompt=PROMPT, response_format="url", **seeded)
check("fetches by address", fetched(result.data[0].url) == (drawn()[0], "image/png"), result)
options = {
    "quality": "high",
    "style": "vivid",
    "user": "somebody",
    "background": "opaque",
    "moderation": "low",
}
result = client.images.generate(
    prompt=PROMPT, output_format="webp", output_compression=80, **options, **seeded
)
check(
    "chooses a format",
    base64.b64decode(result.data[0].b64_json)[8:12] == b"WEBP" and result.output_format == "webp",
)

events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, **seeded))
kinds = [event.type for event in events]
check("streams", kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], kinds)
check("streams the same image", base64.b64decode(events[-1].b64_json) == drawn()[0])
check("numbers its previews", [event.partial_image_index for event in events[:2]] == sorted(
    event.partial_image_index for event in events[:2]))  # fmt: skip

result = client.images.edit(model=EDITOR, image=("a.png", png()), prompt=PROMPT, n=2, size="16x16", **seeded)
check("edits", [size_of(base64.b64decode(one.b64_json)) for one in result.data] == [(16, 16)] * 2, result)
mask = ("mask.png", png(transparent=True))
result = client.images.edit(
    model=EDITOR, image=[("a.png", png())], mask=mask, prompt=PROMPT, response_format="url"
)
check("edits by list and mask, to an address", fetched(result.data[0].url)[1] == "image/png", result)
events = list(
    client.images.edit(model=EDITOR, image=io.BytesIO(png()), prompt=PROMPT, stream=True, partial_images=1)
)
kinds = [event.type for event in events]
check("streams edits", kinds == ["image_edit.partial_image", "image_edit.completed"], kinds)

check("lists models", [model.id for model in client.models.list()] == [STUDENT, EDITOR])
check("asks for one", client.models.retrieve(EDITOR).owned_by == "fewstep")

error = raised(client.images.generate, prompt=PROMPT, n=99)
check(
    "400",
    isinstance(error, openai.BadRequestError) and error.param == "n" and "at most 10" in str(error),
    error,
)
error = raised(client.images.generate, prompt=PROMPT, stream=True, n=99)
check("400 of a stream", isinstance(error, openai.BadRequestError), error)
error = raised(client.images.generate, prompt=PROMPT, model="nope")
check("404", isinstance(error, openai.NotFoundError) and error.code == "model_not_found", error)
stranger = openai.OpenAI(base_url=ADDRESS, api_key=WRONG_KEY)
error = raised(stranger.images.generate, prompt=PROMPT)
check("401", isinstance(error, openai.AuthenticationError), error)
# Uploads that are refused before they are read: the answer must reach a client that still sends.
error = raised(stranger.images.edit, image=("a.png", bytes(8 * 2**20)), prompt=PROMPT)
check("401 of a large upload", isinstance(error, openai.AuthenticationError), repr(error))
error = raised(client.images.edit, image=("a.png", bytes(40 * 2**20)), prompt=PROMPT)
check("413 of a larger one", getattr(error, "status_code", None) == 413, repr(error))
finish()
