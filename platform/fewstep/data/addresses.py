"""Files of a source as users write them: names, folders, patterns with `*` and `**`, and ranges in braces."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fewstep.errors import UserError
from fewstep.storage import Storage


def find_files(paths: Sequence[str], suffix: str) -> tuple[Storage, list[str]]:
    """The files that addresses mean.

    Args:
        paths: files, folders (all files in them with the suffix, however deep) or patterns, local or s3:// and the
            like; `{000..012}` and `{a,b}` stand for several.
        suffix: of the files, such as ".tar".

    Returns:
        The storage of their common folder; and their names relative to it, in order and without repetition.

    Raises:
        UserError: an address means no file, or not all are in one storage.
    """
    addresses = [_plain(address) for path in paths for address in in_braces(path)]
    folders = [_fixed(address, suffix) for address in addresses]
    root = _common(folders)
    if root is None:
        raise UserError(
            f"{addresses[0]} and {next(a for a in addresses if _common([a, addresses[0]]) is None)} are in different "
            "storages: prepare them with --source mix, or copy one to the other's."
        )
    names: dict[str, None] = {}
    listed: dict[str, list[str]] = {}
    for address, folder in zip(addresses, folders, strict=True):
        rest = address.removeprefix(folder).lstrip("/")
        below = folder.removeprefix(root).lstrip("/")
        if not re.search(r"[*?\[]", rest) and rest:
            names[posixpath.join(below, rest)] = None
            continue
        if folder not in listed:
            listed[folder] = sorted(name for name in Storage.at(folder).list() if _is_ours(name, suffix))
        found = [name for name in listed[folder] if not rest or _matches(name, rest)]
        if not found:
            network = (
                " (or there is no network, no such dataset, or no right to read it)"
                if "://" in address
                else ""
            )
            raise UserError(f"there is no {suffix} file at {address}{network}: check the address.")
        names.update(dict.fromkeys(posixpath.join(below, name) for name in found))
    return Storage.at(root), list(names)


def in_braces(text: str) -> list[str]:
    """The texts that one with braces stands for, as in a shell: `{000..012}` counts, `{a,b}` lists; none twice."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        return [text]
    first, last, listed = match.groups()
    if listed is None:
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        parts = listed.split(",")
    before, behind = text[: match.start()], text[match.end() :]
    return list(dict.fromkeys(found for part in parts for found in in_braces(before + part + behind)))


def _plain(address: str) -> str:
    """An address without a slash at its end; absolute, if it is local."""
    remote = "://" in address and not address.startswith("file:")
    return address.rstrip("/") if remote else Storage.at(address).root


def _fixed(address: str, suffix: str) -> str:
    """The folder of an address: the part of it before any pattern."""
    components = address.split("/")
    for number, component in enumerate(components):
        if re.search(r"[*?\[]", component):
            return "/".join(components[:number]) or "/"
    return address.rpartition("/")[0] or "/" if address.casefold().endswith(suffix) else address


def _common(folders: Sequence[str]) -> str | None:
    """The deepest folder that all are in; None if they are in different storages."""
    columns = zip(*(folder.rstrip("/").split("/") for folder in folders), strict=False)
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)]
    # Of s3://bucket/a, the parts "s3:", "" and "bucket" name the storage.
    if len(shared) < (3 if "://" in folders[0] else 1):
        return None
    return "/".join(shared) or "/"


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, in which `*` stops at a slash and `**` doesn't."""
    if "**" in pattern:
        return fnmatchcase(name, pattern.replace("**/", "*"))
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _is_ours(name: str, suffix: str) -> bool:
    """Whether a file of a folder is meant: not what programs leave there, such as .cache and __MACOSX."""
    hidden = any(part.startswith((".", "__")) for part in name.split("/"))
    return name.casefold().endswith(suffix) and not hidden
