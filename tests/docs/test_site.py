"""The documentation: it builds without a warning, needs no other server, and has a page for everything."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewstep.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = (ROOT / "platform", ROOT / "serve")
FOUNDATION = {
    "assets", "cluster", "config", "draws", "errors", "files", "home", "hub", "images", "passwords", "storage", "text",
}  # fmt: skip
WITHOUT_A_PAGE = {
    "recipes",  # has commands/recipes
    "export",  # only forwards names of before fewstep 0.2
}
LOADED = {
    "audio": "src", "embed": "src", "iframe": "src", "img": "src", "object": "data", "script": "src", "source": "src",
    "video": "src",
}  # fmt: skip
"""By element: the attribute whose address a browser loads when it shows the page."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


class Addresses(HTMLParser):
    """Gathers what a page loads, its links, its anchors, and the text of its style elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.style = ""
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if address := given.get(LOADED.get(tag, "")):
            self.loaded.append(address)
        if tag == "link" and given.get("href") and given.get("rel") not in {"canonical", "next", "prev"}:
            self.loaded.append(str(given["href"]))
        if given.get("srcset"):
            self.loaded.append(str(given["srcset"]))
        self.anchors.add(given.get("id") or "")
        self.classes.update((given.get("class") or "").split())
        self.style += given.get("style") or ""
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        found = Addresses(page.read_text())
        foreign = [address for address in found.loaded if re.match(r"(https?:)?//", address)]
        assert not foreign, f"{page.relative_to(site)}: {foreign}"
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", found.style), page
        assert "mermaid" not in found.classes, f"{page}: the theme loads mermaid from elsewhere"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_every_command_has_a_page_with_its_options_and_what_it_writes(site: Path) -> None:
    for name in COMMANDS:
        page = (site / "commands" / f"{name.replace(' ', '-')}.html").read_text()
        assert {"usage", "options", "examples", "what-it-writes"} <= Addresses(page).anchors, name
        assert f"fewstep {name}" in page
        assert "{program}" not in page
    index = (site / "commands" / "index.html").read_text()
    assert all(f"fewstep {name}</code>" in index for name in COMMANDS)


def test_pages_of_training_commands_document_every_recipe_field(site: Path) -> None:
    from fewstep.config import document
    from fewstep.train.recipe import DistillRecipe, TeacherRecipe

    for name, kind in (("distill", DistillRecipe), ("train-teacher", TeacherRecipe)):
        page = (site / "commands" / f"{name}.html").read_text()
        missing = [key for key, _, _ in document(kind) if f"<td><code>{key}</code></td>" not in page]
        assert not missing


def packages() -> set[str]:
    """Every package and lone module of the library, by the name of its page."""
    library = ROOT / "platform" / "fewstep"
    inner = {
        path.stem for path in library.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"
    }
    return inner - {"__init__"} - WITHOUT_A_PAGE


def test_every_package_has_a_page_of_its_public_names(site: Path) -> None:
    documented = set()
    for package in packages():
        page = site / "reference" / f"{'foundation' if package in FOUNDATION else package}.html"
        assert page.exists(), f"docs/reference has no page for fewstep.{package}"
        documented |= Addresses(page.read_text()).anchors
    documented |= Addresses((site / "reference" / "serve.html").read_text()).anchors
    missing = [name for name in public_names() if name not in documented]
    assert not missing


def public_names() -> Iterator[str]:
    """Dotted names of all public classes and functions that have docstrings."""
    for source in SOURCES:
        for file in source.rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part in WITHOUT_A_PAGE or part.startswith("_") for part in parts):
                continue
            for node in ast.parse(file.read_text()).body:
                kept = isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
                if kept and not node.name.startswith("_"):
                    yield ".".join((*parts, node.name))


def test_the_method_and_the_glossary_are_pages(site: Path) -> None:
    method = (site / "method.html").read_text()
    for heading in re.findall(r"^## \d+\. (.+)$", (ROOT / "METHOD.md").read_text(), re.MULTILINE):
        if heading != "Glossary":
            assert heading.split("(")[0].strip() in method
    glossary = (site / "glossary.html").read_text()
    assert "network evaluations" in glossary
    assert "acceptance criteri" in glossary


def test_the_notebook_is_a_page_and_can_be_downloaded(site: Path) -> None:
    page = (site / "tutorials" / "own_images.html").read_text()
    assert 'href="own_images.ipynb"' in page
    assert "%%bash\n" not in page
    assert (site / "tutorials" / "own_images.ipynb").exists()


def test_the_picture_of_the_architecture_shows_imports_that_exist() -> None:
    picture = ElementTree.parse(DOCS / "architecture.svg").getroot()
    boxes = {element.get("data-package") for element in picture.iter()} - {None}
    ours = packages() - FOUNDATION | {"fewstep_serve", "fewstep_loadtest", "foundation"}
    assert boxes == ours
    heights = {
        element.get("data-package"): float(element[0].get("y", 0))
        for element in picture.iter()
        if element.get("data-package")
    }
    arrows = [(one.get("data-from"), one.get("data-to")) for one in picture.iter() if one.get("data-from")]
    assert len(arrows) > 15
    for importer, imported in arrows:
        assert heights[importer] < heights[imported], f"{importer} → {imported} points up"
        assert imports(str(importer), str(imported)), f"{importer} does not import {imported}"


def imports(importer: str, imported: str) -> bool:
    """Whether any file of one package names the other: in an import, or in the command line's table of modules."""
    folder = next(
        path
        for source in SOURCES
        for path in (source / importer, source / "fewstep" / importer)
        if path.is_dir()
    )
    name = imported if imported.startswith("fewstep_") else f"fewstep.{imported}"
    pattern = re.compile(rf"(from|import) {re.escape(name)}\b|\"{re.escape(name)}\.")
    return any(pattern.search(file.read_text()) for file in folder.rglob("*.py"))


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "serve/README.md"])
def test_links_between_files_of_the_repository_lead_somewhere(file: str) -> None:
    path = ROOT / file
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"https?://|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{file}: {target}"


def command_lines() -> Iterator[tuple[str, str, list[str]]]:
    """(file, program, arguments) of every line of the documentation that starts a command or a script of ours."""
    for path in [ROOT / "README.md", *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]:
        if path.suffix == ".ipynb":
            sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
            text = "\n".join(
                f"```bash\n{one[7:]}\n```" if one.startswith("%%bash") else one for one in sources
            )
        else:
            text = path.read_text()
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").split("\n"):
                found = re.search(r"(?:^|\s|bin/)(fewstep|jobs/\w+\.py) (.*)", line.split("#")[0])
                if found and not line.strip().startswith(("docker", "kubectl", "pip")):
                    yield path.name, found[1], shlex.split(re.sub(r"[|>].*", "", found[2]))


def test_command_lines_in_the_documentation_are_understood() -> None:
    from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe

    seen = 0
    for file, program, words in command_lines():
        if program == "fewstep":
            name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
            if words == ["--help"]:
                continue
            assert name is not None, f"{file}: fewstep {' '.join(words)}"
            words = words[len(name.split()) :]
            given = {}
        else:
            call = re.search(r"run_job\(\"(.+?)\"(?:.*recipe=\"(.+?)\")?", (ROOT / program).read_text())
            assert call is not None, f"{file}: {program}"
            name, given = call[1], {"recipe": call[2]} if call[2] else {}
        parser = argparse.ArgumentParser(prog=f"{file}: {name}")
        importlib.import_module(COMMANDS[name].module).add_arguments(parser, **given)
        options = parser.parse_args(words)
        if name in {"distill", "train-teacher"}:
            kind = DistillRecipe if name == "distill" else TeacherRecipe
            load_recipe(kind, options.recipe or options.default_recipe, options.set)
        seen += 1
    assert seen > 25


def test_documented_arguments_are_arguments() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {where} documents {name!r}"
        for source in SOURCES
        for file in source.rglob("*.py")
        for where, name in undocumentable(ast.parse(file.read_text()))
    ]
    assert not wrong


def undocumentable(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(function or class, name) of what docstrings describe under Args and the signature does not have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = arguments(node)
        elif isinstance(node, ast.ClassDef):
            inits = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            fields = {
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            }
            signature = arguments(inits[0]) if inits else fields
        else:
            continue
        match = re.search(r"^Args:\n((?: +.*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
        for entry in re.findall(r"^ {4}(\S[^:]*?):", match[1], re.MULTILINE) if match else ():
            for name in entry.split(","):
                if name.strip().lstrip("*") not in signature:
                    yield node.name, name.strip()


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names of a function's parameters."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return {one.arg for one in named}
