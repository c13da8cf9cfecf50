"""`POST /v1/images/edits`: the form of OpenAI's API, with uploads that are checked before they are decoded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from fewstep_serve.config import Limits
from fewstep_serve.errors import explained
from fewstep_serve.schema import EditRequest, Refusal, Refused

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from fewstep.engine.edit import Edit
    from fewstep.student import FewStepPipeline

FORMATS = ("PNG", "JPEG", "WEBP")
"""Of images that may be uploaded, as Pillow has their names."""
IMAGES, MASK = ("image", "image[]"), "mask"
"""Names of the files; OpenAI's client calls several images `image[]`."""
STYLES = "lora"
"""Name of the field whose text is JSON, as a form has no lists of its own."""
MOST_TEXTS, MOST_TEXT_BYTES = 64, 64 * 1024
"""Of the form's other fields."""


async def read_edit(request: Request, limits: Limits, *, lenient: bool) -> tuple[EditRequest, list[str]]:
    """The form of a request, with images whose headers are checked, and the names of fields that were ignored.

    Args:
        request: whose body is still to be read.
        limits: of uploads.
        lenient: whether unknown fields are ignored; otherwise they are refused.

    Raises:
        Refused: it is no such form, or says what it may not.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(Refusal(400, "the body is no form: send it as multipart/form-data.", "invalid_form"))
    try:
        async with request.form(
            max_files=limits.max_uploads + 1, max_fields=MOST_TEXTS, max_part_size=MOST_TEXT_BYTES
        ) as form:
            images = [await _uploaded(name, part, limits) for name in IMAGES for part in form.getlist(name)]
            masks = [await _uploaded(MASK, part, limits) for part in form.getlist(MASK)]
            texts, unknown = _texts(form, lenient=lenient)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        # Such as a form that breaks off, or has too many files
        raise Refused(Refusal(400, f"the form can't be read: {error.detail}", "invalid_form")) from None
    for name, files, most in (("image", images, limits.max_uploads), ("mask", masks, 1)):
        if len(files) > most:
            raise _refused(name, f"{len(files)} files are too many, at most {most}: send fewer.")
    if not images:
        raise Refused(Refusal(400, "image: this field is needed; add it.", "missing_parameter", "image"))
    try:
        body = EditRequest.model_validate_strings(texts, strict=False)  # all are texts
    except ValidationError as error:
        errors: Any = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise Refused(explained(RequestValidationError(errors))) from None
    uploaded = {"image": tuple(images), "mask": masks[0] if masks else None}
    return body.model_copy(update=uploaded), unknown


def _texts(form: FormData, *, lenient: bool) -> tuple[dict[str, Any], list[str]]:
    """The form's fields that are no images, with texts as leaves, and the names of those that are to be ignored."""
    texts: dict[str, Any] = {}
    unknown = []
    for name, value in form.multi_items():
        if name in (*IMAGES, MASK):
            continue
        if lenient and name not in EditRequest.model_fields:
            unknown.append(name)
        elif isinstance(value, UploadFile):
            raise _refused(name[:64], "it is a file: send images as image, and all else as text.")
        elif name in texts:
            raise _refused(name[:64], "the form has it twice: send it once.")
        elif name == STYLES:
            try:
                texts[name] = json.loads(value, parse_float=str, parse_int=str)
            except (ValueError, RecursionError):  # the second where it is nested too deeply
                raise _refused(
                    name, 'it is no JSON: send a list, as [{"name": "ink", "scale": 1}].'
                ) from None
        else:
            texts[name] = value
    return texts, unknown


async def _uploaded(name: str, part: UploadFile | str, limits: Limits) -> bytes:
    """The content of an uploaded image.

    Raises:
        Refused: it is no file, no image of `FORMATS`, or one of too many pixels.
    """
    from fewstep.images import measure  # with Pillow

    if not isinstance(part, UploadFile):
        raise _refused(name, "it is a text: send the image as a file, with its name.")
    content = await part.read()
    try:
        measure(content, limits.max_upload_pixels, FORMATS)  # by its header: nothing is decoded yet
    except ValueError as error:
        raise _refused(name, f"no image that can be used ({error}): send a png, jpeg or webp file.") from None
    return content


def edit_of(request: EditRequest, pipeline: FewStepPipeline, size: tuple[int, int] | None) -> Edit:
    """What the engine is asked for: the images of an edit at the size of the result, and what of the first may change.

    Args:
        request: of the edit, of as many images as the pipeline takes.
        pipeline: that edits them.
        size: (height, width) of the result; None: about as many pixels as trained, at the first image's aspect ratio.

    Raises:
        Refused: an image or the mask is broken, the mask doesn't fit, or the model can't take the size.
    """
    from fewstep.engine.edit import Edit
    from fewstep.errors import UserError
    from fewstep.images import open_image

    try:
        images = [open_image(content, formats=FORMATS) for content in request.image]
    except ValueError as error:
        raise _refused("image", f"it can't be decoded ({error}): send a whole file.") from None
    size = size or pipeline.size_like(images[0].height, images[0].width)
    try:
        pixels = pipeline.fitted(images, pipeline.latent_shape(*size))
    except UserError as error:
        raise Refused(Refusal(400, str(error), "invalid_value", "size")) from None
    return Edit(pixels, None if request.mask is None else _changes(request.mask, images[0], size))


def _changes(mask: bytes, image: Image, size: tuple[int, int]) -> np.ndarray:
    """Where an image may change, (height, width) bool: where the mask is fully transparent, as OpenAI defines it.

    Raises:
        Refused: the mask is broken, of another size than the image, or without transparency.
    """
    import io

    import numpy as np
    import PIL.Image
    from PIL import ImageOps

    try:
        with PIL.Image.open(io.BytesIO(mask), formats=FORMATS) as opened:
            if opened.size != image.size:
                raise _refused(
                    MASK, f"it has {opened.size[0]}x{opened.size[1]} pixels, and the image {image.size[0]}x"
                    f"{image.size[1]}: send one of the image's size."
                )  # fmt: skip
            if not opened.has_transparency_data:
                raise _refused(MASK, "it has no transparent part, which says where to edit: add one.")
            alpha = opened.convert("RGBA").getchannel("A")
    except Refused:
        raise
    except Exception as error:  # Pillow's plug-ins raise errors of many kinds
        raise _refused(MASK, f"it can't be decoded ({error}): send a whole file.") from None
    height, width = size
    return np.asarray(ImageOps.fit(alpha, (width, height), PIL.Image.Resampling.NEAREST)) == 0


def _refused(param: str, message: str) -> Refused:
    return Refused(Refusal(400, f"{param}: {message}", "invalid_value", param))


def form_schema() -> dict[str, Any]:
    """How the API's document describes the form."""
    schema = EditRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    properties = schema["properties"]
    properties["image"] |= {"type": "array", "items": file, "minItems": 1}
    properties["mask"] = file | {"description": properties["mask"]["description"]}
    return schema | {"required": ["image", "prompt"]}
