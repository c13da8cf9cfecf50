"""Open WebUI's own module of images on the service: its code, not a copy of its requests.

Open WebUI is a whole application. Its router of images (`routers/images.py`) is loaded from its package, and all that
it imports from the rest of the application is replaced by the little that it uses: settings, and a place for files.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from client_checks import ADDRESS, EDITOR, KEY, PROMPT, SEED, STUDENT, WRONG_KEY, check, drawn, finish, png
from fastapi import HTTPException

WHEEL = Path(sys.argv[1])
files: list[tuple[bytes, str]] = []
"""What the application would have shown: content and media type."""
settings: dict[str, Any] = {}
"""Of its administrator."""


class Stub(types.ModuleType):
    """A module that has whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        async def nothing() -> None: ...

        return nothing


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for each module of the application, and for libraries that reach its files and database."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if name.split(".")[0] not in ("open_webui", "aiofiles", "sqlalchemy"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def defaults(source: str) -> dict[str, str]:
    """Variable → its default, of `NAME = os.getenv('NAME', DEFAULT)` in its settings."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(call := node.value, ast.Call):
            words = [one.value for one in call.args if isinstance(one, ast.Constant)]
            if ast.unparse(call.func) == "os.getenv" and len(words) == 2:
                found[str(words[0])] = words[1]
    return found


class Config:
    """Its table of settings."""

    @staticmethod
    async def get_many(*names: str) -> dict[str, Any]:
        return {name: settings.get(name) for name in names}


async def keep(request: Any, *, file: Any, metadata: dict[str, Any], **options: Any) -> Any:
    """Takes a finished image, as the application's store of files does."""
    json.dumps(metadata)  # it is written to a database
    files.append((await file.read(), file.content_type))
    return types.SimpleNamespace(id=str(len(files) - 1), meta=None, filename=file.filename)


session: aiohttp.ClientSession


async def get_session() -> aiohttp.ClientSession:
    return session


def load() -> Any:
    """The module, with the settings that it has by default."""
    with zipfile.ZipFile(WHEEL) as wheel:
        source = wheel.read("open_webui/routers/images.py")
        chosen = defaults(wheel.read("open_webui/config.py").decode())
    sys.meta_path.insert(0, Finder())
    import open_webui.config as config  # type: ignore[import-not-found]
    import open_webui.constants as constants  # type: ignore[import-not-found]
    import open_webui.env as env  # type: ignore[import-not-found]
    import open_webui.models.config as stored  # type: ignore[import-not-found]
    import open_webui.retrieval.web.utils as web  # type: ignore[import-not-found]
    import open_webui.routers.files as uploads  # type: ignore[import-not-found]
    import open_webui.utils.images.comfyui as comfyui  # type: ignore[import-not-found]
    import open_webui.utils.json_codec as codec  # type: ignore[import-not-found]
    import open_webui.utils.session_pool as pool  # type: ignore[import-not-found]

    config.CACHE_DIR = Path(tempfile.mkdtemp())
    config.ENABLE_OPENAI_IMAGE_EDIT_NORMALIZATION = True
    for name in ("IMAGE_AUTO_SIZE_MODELS_REGEX_PATTERN", "IMAGE_URL_RESPONSE_MODELS_REGEX_PATTERN"):
        setattr(config, name, chosen[name])
    constants.ERROR_MESSAGES = types.SimpleNamespace(
        DEFAULT=lambda error="", otherwise="": str(error) or otherwise
    )
    env.AIOHTTP_CLIENT_ALLOW_REDIRECTS, env.AIOHTTP_CLIENT_SESSION_SSL = False, True
    env.ENABLE_FORWARD_USER_INFO_HEADERS = False
    stored.Config = Config
    # Of addresses it lets through public ones alone, unless ENABLE_LOCAL_WEB_FETCH is set; here, as if it were.
    web.validate_url, web.get_ssrf_safe_session = lambda address: True, aiohttp.ClientSession
    uploads.upload_file_handler, pool.get_session = keep, get_session
    for name in ("ComfyUICreateImageForm", "ComfyUIEditImageForm", "ComfyUIWorkflow"):
        setattr(comfyui, name, object)
    codec.JSONCodec = json
    settings.update({
        "image_generation.engine": "openai",
        "image_generation.model": chosen["IMAGE_GENERATION_MODEL"],
        "image_generation.size": chosen["IMAGE_SIZE"],
        "image_generation.openai.api_base_url": ADDRESS,
        "image_generation.openai.api_key": KEY,
        "images.edit.engine": "openai",
        "images.edit.model": chosen["IMAGE_EDIT_MODEL"],
        "images.edit.size": chosen["IMAGE_EDIT_SIZE"],
        "images.edit.openai.api_base_url": ADDRESS,
        "images.edit.openai.api_key": KEY,
    })  # fmt: skip
    module = types.ModuleType("open_webui_images_router")
    sys.modules[module.__name__] = module
    exec(compile(source, "open_webui/routers/images.py", "exec"), module.__dict__)
    return module


async def main() -> None:
    global session
    module = load()
    request = types.SimpleNamespace(
        app=types.SimpleNamespace(url_path_for=lambda name, id: f"/api/v1/files/{id}/content")
    )
    # The pool's own has no base of its own either.
    session = aiohttp.ClientSession()

    async def ask(function: str, form: Any, **changed: Any) -> list[tuple[bytes, str]] | str:
        """The images that the application shows, or its sentence why there are none."""
        before = dict(settings)
        settings.update({name.replace("__", "."): value for name, value in changed.items()})
        files.clear()
        try:
            await getattr(module, function)(request, form, user=None)
        except HTTPException as error:
            return str(error.detail)
        finally:
            settings.clear()
            settings.update(before)
        return list(files)

    def data(**options: Any) -> str:
        return "data:image/png;base64," + base64.b64encode(png(**options)).decode()

    form, edit = module.CreateImageForm, module.EditImageForm
    images = await ask("image_generations", form(prompt=PROMPT))
    check("as installed, it asks for dall-e-2, which the service has not", images == "Not Found", images)
    settings["image_generation.model"] = STUDENT
    images = await ask("image_generations", form(prompt=PROMPT))
    check("as installed, it asks for 512x512, which this model can't", images == "Bad Request", images)
    settings["image_generation.size"] = ""
    settings["image_generation.openai.params"] = {"seed": SEED}
    expected = [(file, "image/png") for file in drawn(n=2)]
    images = await ask("image_generations", form(prompt=PROMPT, n=2))
    check("generates", images == expected, images)
    images = await ask("image_generations", form(prompt=PROMPT, size="16x16"))
    check("generates in a size", images == expected[:1], images)
    params = {"seed": SEED, "response_format": "url"}
    images = await ask("image_generations", form(prompt=PROMPT), image_generation__openai__params=params)
    check("fetches by address", images == expected[:1], images)
    images = await ask(
        "image_generations", form(prompt=PROMPT), image_generation__openai__api_version="2026-01-01"
    )
    check("may add a version to the address", images == expected[:1], images)
    images = await ask("image_generations", form(prompt=PROMPT), image_generation__openai__api_key=WRONG_KEY)
    check("tells the kind of an error, not the service's sentence", images == "Unauthorized", images)

    for name, image in (("one image", data()), ("a list", [data()])):
        images = await ask("image_edits", edit(prompt=PROMPT, image=image, n=2), images__edit__model=EDITOR)
        check(f"edits {name}", len(images) == 2 and isinstance(images, list), images)
    images = await ask("image_edits", edit(prompt=PROMPT, image=data(), size="16x16", model=EDITOR))
    check("edits in a size", isinstance(images, list) and images[0][0].startswith(b"\x89PNG"), images)
    images = await ask("image_edits", edit(prompt=PROMPT, image=data()))
    check(
        "edits with an empty model, as installed: that is the service's default",
        images == "Bad Request",
        images,
    )
    names = {model["id"] for model in await module.get_models(request)}
    check("does not ask which models there are", STUDENT not in names and "dall-e-2" in names, names)
    await session.close()


print(f"Open WebUI {WHEEL.name.split('-')[1]}")
asyncio.run(main())
finish()
