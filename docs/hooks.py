"""What MkDocs does beside its own work: it fills in the parts of pages that come from the code.

A line of a page that is one of these comments is replaced, so that the site can't say something else than the code:

    <!-- file PATH -->                   a Markdown file of the repository
    <!-- file PATH "HEADING" … -->       some sections of it
    <!-- file PATH without "HEADING" --> the whole file, but for a section
    <!-- body PATH "HEADING" -->         a section of it without its heading
    <!-- source PATH -->                 a source file, as a block of code
    <!-- commands -->                    the table of all commands
    <!-- command NAME -->                what `fewstep NAME --help` says
    <!-- fields NAME -->                 the recipe's fields of that command
    <!-- recipes -->                     the recipes of the package, with their leading comments
    <!-- modules NAME … -->              API pages of packages or modules, from their docstrings

Notebooks (*.ipynb) become pages of the same name, and can be downloaded from there.
"""

from __future__ import annotations

import argparse
import ast
import html
import importlib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "platform", ROOT / "serve")


# MkDocs calls these two.


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb") and file.abs_src_path is not None:
            text = notebook_page(Path(file.abs_src_path))
            files.append(File.generated(config, file.src_uri.removesuffix("ipynb") + "md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the comments of a page that ask for something."""

    def replacement(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[1])
        if name not in DIRECTIVES:
            return match[0]
        try:
            return DIRECTIVES[name](*arguments)
        except (OSError, LookupError, TypeError) as error:
            raise PluginError(f"{page.file.src_uri}: <!-- {match[1]} -->: {error}") from error

    return re.sub(r"^<!-- (.+?) -->$", replacement, markdown, flags=re.MULTILINE)


# Markdown files and notebooks


def markdown_file(path: str, *headings: str) -> str:
    """A Markdown file of the repository, or some sections of it, as pages of the site have it.

    Args:
        path: from the repository's root.
        headings: of the sections to take, without number signs and numbers; none for all. After the word `without`:
            those to leave out.
    """
    text = (ROOT / path).read_text()
    if headings and headings[0] == "without":
        for heading in headings[1:]:
            text = text.replace(section(text, heading), "")
    elif headings:
        text = "\n".join(section(text, heading) for heading in headings)
    # Links to pictures and pages are relative to the repository there, and to docs/ here.
    return python_markdown(text).replace("](docs/", "](")


def section_body(path: str, heading: str) -> str:
    """A section of a Markdown file without its heading, for a page whose title says the same."""
    return markdown_file(path, heading).partition("\n")[2]


def section(text: str, heading: str) -> str:
    """A section of a Markdown text, from its heading (without its number) to the next one of its level or above."""
    lines = text.split("\n")
    fenced = False
    start = level = None
    for number, line in enumerate(lines):
        if line.startswith("```"):
            fenced = not fenced
        match = None if fenced else re.match(r"(#+) (.*)", line)
        if match is None:
            continue
        if start is None and re.sub(r"^\d+\. ", "", match[2].strip()) == heading:
            start, level = number, len(match[1])
        elif start is not None and level is not None and len(match[1]) <= level:
            return "\n".join(lines[start:number])
    if start is None:
        raise LookupError(f"there is no section {heading!r}")
    return "\n".join(lines[start:])


def python_markdown(text: str) -> str:
    """Markdown as GitHub reads it → as Python-Markdown does.

    Python-Markdown wants a blank line before a list, and what belongs to an item indented by four columns, not two.
    """
    lines: list[str] = []
    in_list = fenced = False
    loose = False  # whether the item at hand has a blank line inside
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        item = not fenced and re.match(r"[-*] |\d+\. ", line) is not None
        if item:
            if (loose or not in_list) and lines and lines[-1].strip():
                lines.append("")
            loose = False
        elif in_list and not line.strip():
            loose = True
        if not item and in_list and line.strip() and not line.startswith(" "):
            in_list = False
        in_list = in_list or item
        lines.append(f"  {line}" if in_list and line.startswith("  ") else line)
    return "\n".join(lines)


def source_file(path: str) -> str:
    """A source file as a block of code."""
    return f"```python\n{(ROOT / path).read_text().strip()}\n```"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, and its cells as blocks of code."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(python_markdown(text))
            continue
        language, text = ("bash", text.partition("\n")[2]) if text.startswith("%%bash") else ("python", text)
        parts.append(f"```{language}\n{text.strip()}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    note = f"This page is a notebook: [download {path.name}]({path.name})."
    return f"{title}\n\n{note}\n{rest}\n"


# Commands


def command_table() -> str:
    """All commands with their summaries, the extra that each needs, and the script that does the same."""
    from fewstep.cli import COMMANDS

    rows = []
    for name, command in COMMANDS.items():
        link = f'<a href="{page_name(name)}.html"><code>fewstep {name}</code></a>'
        extra = f"<code>{command.extra}</code>" if command.extra else "–"
        scripts = "<br>".join(f"<code>{script}</code>" for script in job_scripts(name)) or "–"
        rows.append((link, cell(command.summary), extra, scripts))
    return table(("command", "what it does", "extra", "script"), rows)


def command_help(*words: str) -> str:
    """The help of a command: description, usage, options, examples.

    Args:
        words: of its name, such as `benchmark`, `serve`.
    """
    from fewstep.cli import COMMANDS

    name = " ".join(words)
    command = COMMANDS[name]
    with warnings.catch_warnings(
        action="ignore"
    ):  # of libraries about each other, when they are first imported
        module = importlib.import_module(command.module)
    program = f"fewstep {name}"
    parser = argparse.ArgumentParser(prog=program, formatter_class=WideHelp)
    module.add_arguments(parser)
    parts = [help_text(module.DESCRIPTION)]
    if command.extra:
        parts.append(f"It needs the extra `{command.extra}`: `pip install 'fewstep[{command.extra}]'`.")
    else:
        parts.append("It needs the core of the package alone: `pip install fewstep`.")
    if scripts := job_scripts(name):
        word = "Scripts" if len(scripts) > 1 else "Script"
        parts.append(f"{word} in a checkout: {', '.join(f'`{script}`' for script in scripts)}.")
    usage = parser.format_usage().removeprefix("usage: ")
    parts.append(f"## Usage\n\n```text\n{usage.strip()}\n```")
    parts.append(f"## Options\n\n{options_tables(parser)}")
    parts.append(help_text(module.EXAMPLES.replace("{program}", program)))
    return "\n\n".join(parts)


class WideHelp(argparse.HelpFormatter):
    """A usage of the same width wherever the site is built."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=90)


def options_tables(parser: argparse.ArgumentParser) -> str:
    """The options of a parser: those without a group of their own first."""
    parts = []
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
                continue
            shown = action.metavar or (
                "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
            )
            value = "" if action.nargs == 0 else f" {shown or action.dest.upper()}"
            names = [f"{option}{value}" for option in action.option_strings] or [str(shown or action.dest)]
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            rows.append(("<br>".join(f"<code>{html.escape(name)}</code>" for name in names), cell(text)))
        if rows:
            own = group.title not in {"positional arguments", "options"}
            heading = f"### {str(group.title).capitalize()}\n\n" if own else ""
            parts.append(heading + table((option_or_argument(group), "meaning"), rows))
    return "\n\n".join(parts)


def option_or_argument(group: argparse._ArgumentGroup) -> str:
    """What the rows of a group are."""
    return "argument" if group.title == "positional arguments" else "option"


def recipe_fields(name: str) -> str:
    """The fields of the recipe that a command takes, a table for each section of the recipe."""
    from fewstep.config import document
    from fewstep.train.recipe import DistillRecipe, TeacherRecipe

    kind = {"distill": DistillRecipe, "train-teacher": TeacherRecipe}[name]
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, default, text in document(kind):
        head = key.rpartition(".")[0] or "top level"
        sections.setdefault(head, []).append((f"<code>{key}</code>", as_yaml(default), cell(text)))
    return "\n\n".join(
        f"### {head}\n\n{table(('field', 'default', 'meaning'), rows)}" for head, rows in sections.items()
    )


def as_yaml(default: str) -> str:
    """A default as it is written in a recipe, not in Python."""
    words = {"None": "null", "True": "true", "False": "false"}
    text = words.get(default, default)
    if text.startswith("("):
        text = f"[{text[1:-1].removesuffix(',')}]"
    return f"<code>{html.escape(text)}</code>"


def recipe_table() -> str:
    """Every recipe of the package: its name and the comment that it begins with."""
    parts = []
    for file in sorted((ROOT / "platform/fewstep/recipes").glob("*.yaml")):
        lines = file.read_text().split("\n")
        comment = [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
        rest = "\n".join(line for line in lines if not line.startswith("#")).strip()
        command = "train-teacher" if "flow_matching:" in rest else "distill"
        parts.append(
            f"## {file.stem}\n\n{help_text(chr(10).join(comment))}\n\n"
            f"`fewstep {command} --recipe {file.stem}`\n\n```yaml\n{rest}\n```"
        )
    return "\n\n".join(parts)


def help_text(text: str) -> str:
    """A text of a help page → Markdown: headings, examples and columns are told apart by their indentation."""
    parts: list[str] = []
    lines = text.split("\n")
    heading, block = "", []  # of lines that belong together

    def finish() -> None:
        if not block:
            return
        body = "\n".join(line.removeprefix("  ") for line in block) if block[0].startswith(" ") else None
        if body is None:
            parts.append(prose("\n".join(block)))
        elif heading != "examples" and not any(re.search(r"\S {2,}\S|[={]", line) for line in block):
            parts.append(prose(body))
        else:
            parts.append(f"```{'bash' if heading == 'examples' else 'text'}\n{body}\n```")
        block.clear()

    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        indented = line.startswith(" ")
        if not line.strip():
            finish()
        elif not indented and following.startswith("  ") and not re.search(r"[.,:;]$", line):
            finish()
            heading = line
            parts.append(f"## {line[0].upper()}{line[1:]}")
        else:
            if block and block[0].startswith(" ") != indented:
                finish()
            block.append(line)
    finish()
    return "\n\n".join(parts)


def prose(text: str) -> str:
    """Plain text that may hold what Markdown and HTML would take for their own."""
    return html.escape(text, quote=False).replace("*", "\\*")


def job_scripts(command: str) -> list[str]:
    """The scripts of jobs/ that run a command."""
    scripts = sorted((ROOT / "jobs").glob("*.py"))
    return [f"jobs/{file.name}" for file in scripts if f'run_job("{command}"' in file.read_text()]


def page_name(command: str) -> str:
    """The name of a command's page, without its suffix."""
    return command.replace(" ", "-")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in HTML, whose cells may hold any character."""
    names = "".join(f"<th>{name}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def cell(text: str) -> str:
    """Plain text with names in backticks → HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(text.split()), quote=False))


# API reference


def api(*names: str) -> str:
    """The API of packages and modules, each module below a heading of its own."""
    return "\n\n".join(_package(name) for name in names)


def _package(name: str) -> str:
    file = source_of(name)
    if file.name != "__init__.py":
        return f"## {name}\n\n::: {name}"
    tree = ast.parse(file.read_text())
    own = any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body)
    options = "" if own else "\n    options:\n      members: false"
    parts = [f"## {name}\n\n::: {name}{options}"]
    if exports := list(exported(tree)):
        rows = "\n".join(f"| {entry} | {sentence} |" for entry, sentence in exports)
        parts.append(f"`from {name} import …` gives:\n\n| name | what it is |\n|---|---|\n{rows}")
    for inner in sorted(file.parent.iterdir()):
        if inner.suffix == ".py" and inner.name != "__init__.py" and not inner.stem.startswith("_"):
            parts.append(f"## {name}.{inner.stem}\n\n::: {name}.{inner.stem}")
        elif (inner / "__init__.py").exists():
            parts.append(_package(f"{name}.{inner.name}"))
    return "\n\n".join(parts)


def source_of(name: str) -> Path:
    """The file of a module, or of a package's `__init__`."""
    for source in SOURCES:
        path = source.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.exists():
                return file
    raise LookupError(f"there is no module {name}")


def exported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a package gathers from its modules (`__all__`): each name with a link, and the first sentence about it."""
    named = [node.value for node in tree.body if isinstance(node, ast.Assign) and _target(node) == "__all__"]
    public = set(ast.literal_eval(named[0])) if named else set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep"):
            for alias in (alias for alias in node.names if alias.name in public):
                sentence = documentation(str(node.module), alias.name)
                if sentence is None:
                    yield f"`{alias.name}`", ""
                else:
                    yield f"[`{alias.name}`][{node.module}.{alias.name}]", sentence.replace("|", "\\|")


def documentation(module: str, name: str) -> str | None:
    """The first line of a name's docstring, where it is defined."""
    body = ast.parse(source_of(module).read_text()).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            text = ast.get_docstring(node)
            return None if text is None else " ".join(text.split("\n\n")[0].split())
        if isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) == name:
            value = getattr(following, "value", None)
            text = getattr(value, "value", None) if isinstance(following, ast.Expr) else None
            return " ".join(text.split("\n\n")[0].split()) if isinstance(text, str) else None
    return None


def _target(node: ast.Assign | ast.AnnAssign) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else None


DIRECTIVES: dict[str, Callable[..., Any]] = {
    "file": markdown_file,
    "body": section_body,
    "source": source_file,
    "commands": command_table,
    "command": command_help,
    "fields": recipe_fields,
    "recipes": recipe_table,
    "modules": api,
}
