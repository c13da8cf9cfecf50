"""Names of files as tables write them, looked up among the files that there are."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable


class FileNames:
    """Files below a root, found by any of the usual ways of writing their names.

    Args:
        root: address of the folder, as absolute names begin with it.
        files: paths relative to the root.
    """

    def __init__(self, root: str, files: Iterable[str]) -> None:
        self.root = root.rstrip("/") + "/"
        self._files = frozenset(files)
        # An accent may be written as one character (NFC) or as two (NFD), which some file systems prefer. Two files
        # that differ in nothing else are told apart by their exact names alone.
        self._by_form: dict[str, str | None] = {}
        for file in self._files:
            form = unicodedata.normalize("NFC", file)
            self._by_form[form] = None if form in self._by_form else file

    def find(self, written: str, folder: str = "") -> str | None:
        r"""The path of the file that a table means, relative to the root; None if there is none.

        Names as `./a.png`, `sub\a.png`, `sub//a.png`, absolute ones below the root, and accents of either Unicode form
        are understood. A file whose name is exactly the written one comes first.

        Args:
            written: as the table has it.
            folder: of the table, relative to the root; names are relative to it or else to the root.
        """
        for spelling in (written, written.replace("\\", "/")):
            absolute = spelling.startswith(self.root)
            if spelling.startswith("/") and not absolute:
                continue  # not below the root
            name = spelling.removeprefix(self.root).lstrip("/")
            for base in ("",) if absolute else (folder, ""):
                for candidate in (posixpath.join(base, name), posixpath.normpath(posixpath.join(base, name))):
                    if candidate in self._files:
                        return candidate
                    if found := self._by_form.get(unicodedata.normalize("NFC", candidate)):
                        return found
        return None

    def hint(self, written: str) -> str:
        """The end of a message about a name that was not found: a file that differs in its capitals alone, if any."""
        last = posixpath.basename(written.replace("\\", "/")).casefold()
        near = sorted(file for file in self._files if posixpath.basename(file).casefold() == last)
        return f" (but {near[0]})" if near else ""
