"""The page at `/docs`: the API's OpenAPI document as HTML.

FastAPI's own page takes its scripts from a public server: on a closed network it is blank. This one needs no script.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

Schema = dict[str, Any]
"""A JSON schema, or a part of one."""
BOUNDS = {
    "minimum": "from {}", "maximum": "up to {}", "minLength": "from {} characters", "maxLength": "up to {} characters",
    "pattern": "as {}",
}  # fmt: skip
"""How bounds of a value are told, by their name in JSON schema."""


def api_page(document: dict[str, Any]) -> str:
    """The HTML page of an OpenAPI document; it asks for `page/style.css` and nothing else."""
    info = document["info"]
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>{escape(info["title"])}: API</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="page/style.css">
</head>
<body class="reference">
  <header><h1>{escape(info["title"])}: API</h1><p>{_text(info["description"])}</p></header>
  <main>
    <h2>Requests</h2>
    {"".join(operations)}
    <h2>Objects</h2>
    {"".join(schemas)}
  </main>
  <footer><a href="./">Page</a> · <a href="openapi.json">OpenAPI document</a>, for tools</footer>
</body>
</html>
"""


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"<code>{escape(one['name'])}</code>, in the {escape(one['in'])}", _kind(one["schema"]), "")
        for one in operation.get("parameters", [])
    ]
    rows += [("body", kind, "") for kind in _contents(operation.get("requestBody", {}))]
    rows += [
        (f"answer {status}", ", ".join(_contents(answer)), _text(answer["description"]))
        for status, answer in operation["responses"].items()
    ]
    title = f"<code>{method.upper()} {escape(path)}</code> {_text(operation['summary'])}"
    return _entry("", title, "", rows)


def _schema(name: str, schema: Schema) -> str:
    required = schema.get("required", [])
    rows = []
    for field, value in schema.get("properties", {}).items():
        default = "" if field in required else f"; default <code>{escape(str(value.get('default')))}</code>"
        rows.append(
            (f"<code>{escape(field)}</code>", _kind(value) + default, _text(value.get("description", "")))
        )
    return _entry(name, escape(name), _text(schema.get("description", "")), rows)


def _entry(anchor: str, title: str, text: str, rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><th scope='row'>{what}</th><td>{kind}</td><td>{why}</td></tr>" for what, kind, why in rows
    )
    mark = f" id='{escape(anchor)}'" if anchor else ""
    return f"<section class='entry'{mark}><h3>{title}</h3><p>{text}</p><table>{cells}</table></section>"


def _contents(body: dict[str, Any]) -> list[str]:
    return [f"{_kind(one['schema'])} as {escape(media)}" for media, one in body.get("content", {}).items()]


def _kind(schema: Schema) -> str:
    """What values a schema admits."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [text.format(escape(str(schema[name]))) for name, text in BOUNDS.items() if name in schema]
    return " ".join([escape(str(schema.get("type", "anything"))), *bounds])


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
