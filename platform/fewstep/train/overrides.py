"""Overrides of a recipe, `section.key=value`: values are YAML, except where the recipe wants a text."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from fewstep.errors import UserError

_TEXT_TAG = "tag:yaml.org,2002:str"
_INT_TAG = "tag:yaml.org,2002:int"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_BOOL_TAG = "tag:yaml.org,2002:bool"
_NULLS = ("null", "~", "")


def override(tree: dict[str, Any], kind: type[BaseModel], change: str) -> None:
    """Set a field of a recipe's tree, in place.

    Args:
        tree: the recipe's.
        kind: class of the recipe, by whose types texts are recognised: `2024`, `on` or `photos/set #2` stay as they are
            where a text is wanted, and are a number, a truth value or half a path in YAML.
        change: `section.key=value`.

    Raises:
        UserError: the override is written otherwise.
    """
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes section.key=value, for example optimizer.lr=1e-4; got {change!r}.")
    *sections, last = key.split(".")
    wanted: tuple[Any, ...] = (kind,)
    for section in sections:
        # A section that the recipe lacks is made; validation refuses it if there is none of that name.
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {change}: {section!r} is a value, not a section.")
        tree, wanted = child, _inside(wanted, section)
    tree[last] = _value(value, _inside(wanted, last), change)


def _value(text: str, wanted: tuple[Any, ...], change: str) -> Any:
    """The value that a text stands for.

    Args:
        text: as the user wrote it.
        wanted: types that the field may have.
        change: the whole override, for the message.

    Raises:
        UserError: the text is not YAML, and the field is no text.
    """
    if _is_text(wanted) and not (_is_quoted(text) or _is_null(text, wanted)):
        return text
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _keep_types(node, wanted)
        value = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError):  # a date such as 2026-13-45, or 5,000 digits
        raise UserError(f"--set {change}: the value is not YAML; put text in quotes.") from None
    finally:
        loader.dispose()
    return value


def _keep_types(node: yaml.Node | None, wanted: tuple[Any, ...]) -> None:
    """Mark texts and numbers in a YAML value as what the recipe wants, in place."""
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            _keep_types(child, _inside(wanted, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _keep_types(child, _inside(wanted, None))
    elif isinstance(node, yaml.ScalarNode):
        if _is_text(wanted) and not _is_null(node.value, wanted):
            node.tag = _TEXT_TAG
        elif node.style is None:  # not quoted
            _keep_number(node, wanted)


def _keep_number(node: yaml.ScalarNode, wanted: tuple[Any, ...]) -> None:
    """Mark a value as the number that everybody but YAML 1.1 reads, in place.

    There, 1e-4 is a text, 010 is 8 and 1:30 is 90. Where a number is wanted, all but numbers stays text, also `true`,
    which would count as 1: validation refuses it.
    """
    if re.fullmatch(r"[-+]?[0-9][0-9_]*", node.value):
        node.tag, node.value = _INT_TAG, str(int(node.value.replace("_", "")))
    elif re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", node.value, re.IGNORECASE):
        node.tag = _FLOAT_TAG
    elif _is_number(wanted) and (node.tag == _BOOL_TAG or ":" in node.value):
        node.tag = _TEXT_TAG


def _is_quoted(text: str) -> bool:
    """Whether all of a text stands in quotation marks, which users put around what YAML would misread."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return False
    # Not `"a" and "b"`, nor `"a" # "b"`.
    return isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') and node.end_mark.index == len(text)


def _is_null(text: str, wanted: tuple[Any, ...]) -> bool:
    """Whether a text stands for no value, where none is allowed."""
    return text in _NULLS and types.NoneType in wanted


def _is_text(wanted: tuple[Any, ...]) -> bool:
    """Whether all types but None's are texts."""
    kinds = [kind for kind in wanted if kind is not types.NoneType]
    return bool(kinds) and all(kind is str or isinstance(kind, str) for kind in kinds)


def _is_number(wanted: tuple[Any, ...]) -> bool:
    """Whether a number may stand there, and no truth value."""
    return bool not in wanted and any(kind in (int, float) for kind in wanted)


def _inside(wanted: tuple[Any, ...], key: str | None) -> tuple[Any, ...]:
    """Types of what lies in values of some types: of the field `key` of settings, or the elements of a list (None)."""
    found: list[Any] = []
    for kind in wanted:
        if key is None:
            found += [one for one in get_args(kind) if one is not Ellipsis]
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            found.append(kind.model_fields[key].annotation)
    return tuple(one for kind in found for one in _alternatives(kind))


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union, or the values of a Literal, one by one; any other type alone."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return list(get_args(kind)) if get_origin(kind) is Literal else [kind]
