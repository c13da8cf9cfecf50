"""The command line: one command per job, each in a module that is imported only when it is asked for.

A command's module has four names:

    DESCRIPTION                what it does, for its help page
    EXAMPLES                   what its help page shows below the options: command lines, where `{program}` stands for
                               the program's name, and notes
    add_arguments(parser)      declares its options
    run(options)               does it; returns nothing, or an exit status

and, if it can do a part of its work without the extra that `COMMANDS` names, needs_extra(options), which tells so.

`fewstep COMMAND` runs one; the scripts in jobs/ run the same ones through `run_job`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fewstep import __version__
from fewstep.cli.extras import missing_extra, require
from fewstep.errors import UserError
from fewstep.home import enter_home


class Command(NamedTuple):
    """Where a command lives. What `fewstep --help` shows is here, because reading it from the modules takes seconds."""

    module: str
    """Import path of its module."""
    summary: str
    """One line for the list of commands."""
    extra: str | None = None
    """The extra of the package that it needs, if the core is not enough."""


COMMANDS = {
    "generate": Command("fewstep.cli.generate", "write images from prompts with a distilled student"),
    "generate-batch": Command(
        "fewstep.cli.generate_batch", "write an image of each of many prompts, on a Ray cluster", "train"
    ),
    "export": Command("fewstep.cli.export", "write a student as a folder that diffusers loads as a pipeline"),
    "push": Command("fewstep.cli.push", "push a student to the Hugging Face hub, with a model card"),
    "serve": Command(
        "fewstep.cli.serve", "put students behind HTTP: a page, OpenAI's API, live previews", "serve"
    ),
    "prepare-data": Command(
        "fewstep.cli.prepare_data", "turn captions (and images) into a training set", "train"
    ),
    "distill": Command("fewstep.cli.distill", "distil a teacher into a few-step student", "train"),
    "evaluate": Command(
        "fewstep.cli.evaluate", "measure a student against its teacher's own sampler", "train"
    ),
    "ablate": Command(
        "fewstep.cli.ablate",
        "train and measure variants of a recipe on equal compute, with several seeds",
        "train",
    ),
    "train-teacher": Command("fewstep.cli.train_teacher", "train a small flow-matching teacher", "train"),
    "train-autoencoder": Command(
        "fewstep.cli.train_autoencoder", "train a small autoencoder for teachers of one's own", "train"
    ),
    "train-classifier": Command(
        "fewstep.cli.train_classifier", "train the classifier that judges class-conditional students", "train"
    ),
    "promote": Command(
        "fewstep.cli.promote", "give the alias that is served to another version of a model", "train"
    ),
    "resend": Command("fewstep.cli.resend", "send to MLflow what finished or killed jobs could not", "train"),
    "copy-runs": Command(
        "fewstep.cli.copy_runs", "copy the runs of an sqlite file to PostgreSQL and a bucket", "train"
    ),
    "benchmark rollout": Command(
        "fewstep.benchmarks.rollout", "time the policies' integration against its plain port and its floor"
    ),
    "benchmark train-step": Command(
        "fewstep.benchmarks.train_step", "time one distillation step: rollouts, data, Ray", "train"
    ),
    "benchmark scaling": Command(
        "fewstep.benchmarks.scaling",
        "check the planned step of several processes against a real one",
        "train",
    ),
    "benchmark cached-conditions": Command(
        "fewstep.benchmarks.cached_conditions", "count what texts that are computed once save a step", "train"
    ),
    "benchmark stream": Command(
        "fewstep.benchmarks.stream", "read samples of real sizes as a training worker does", "train"
    ),
    "benchmark full-size": Command(
        "fewstep.benchmarks.full_size", "generate and train with full-size networks on one GPU", "train"
    ),
    "benchmark serve": Command(
        "fewstep_loadtest.serve_command", "load the service at several rates", "serve"
    ),
    "benchmark soak": Command(
        "fewstep_loadtest.soak_command",
        "try the service for long, with failures, and check every image",
        "serve",
    ),
}
"""All commands, in the order of the help page."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `fewstep …`.

    Args:
        arguments: what follows the program's name; by default those of this process.

    Returns:
        The exit status: 0, or 2 where the user gave something that can't be used, or what the command returned.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] == "--version":
        print(f"fewstep {__version__}")
        return 0
    # "benchmark serve" is a command of two words, and "serve" is another command of one.
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return _run(name, words[length:], program=f"fewstep {name}")
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else None
    rest = words[1:] if group else words
    if rest and rest[0] in {"-h", "--help"}:
        print(_overview(group))
        return 0
    if not rest:
        print(_overview(group), file=sys.stderr)
        return 2
    print(f"error: {_unknown(' '.join(filter(None, (group, rest[0]))))}", file=sys.stderr)
    return 2


def run_job(
    command: str, *, description: str | None = None, examples: str | None = None, **given: Any
) -> NoReturn:
    """Run a command as the script in jobs/ that this process was started with, and exit.

    Args:
        command: a key of `COMMANDS`.
        description: instead of the command's own, for a script that does a part of what the command can.
        examples: likewise.
        given: keyword arguments of the command's `add_arguments`.
    """
    program = f"jobs/{Path(sys.argv[0]).name}"
    sys.exit(_run(command, sys.argv[1:], program, description=description, examples=examples, **given))


def _run(
    name: str,
    arguments: Sequence[str],
    program: str,
    *,
    description: str | None = None,
    examples: str | None = None,
    **given: Any,
) -> int:
    """Parse a command's arguments and run it; a `UserError` becomes one line on stderr and exit status 2."""
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=program,
            description=description or module.DESCRIPTION,
            epilog=examples or module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser, **given)
        # Not str.format: examples hold braces of their own.
        parser.epilog = (parser.epilog or "").replace("{program}", program)
        options = parser.parse_args(arguments)
        if command.extra and getattr(module, "needs_extra", _always)(options):
            require(program, command.extra)
        enter_home()
        return module.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except ModuleNotFoundError as error:
        sentence = missing_extra(program, command.extra, error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def _always(options: argparse.Namespace) -> bool:
    return True


def _overview(group: str | None) -> str:
    """The help page of all commands, or of those whose names begin with the word `group`."""
    named = {name: command for name, command in COMMANDS.items() if group is None or name.split()[0] == group}
    width = max(map(len, named))
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in named.items())
    program = " ".join(filter(None, ("fewstep", group)))
    return (
        f"usage: {program} COMMAND [OPTIONS]\n\n"
        "Diffusion and flow models that generate in a few network evaluations.\n\n"
        f"commands\n{listed}\n\n"
        f"examples\n  {program if group is None else 'fewstep'} {next(iter(named))} --help"
        + ('\n  fewstep generate --prompt "strawberry, fluent style"' if group is None else "")
        + "\n\n`fewstep COMMAND --help` explains a command; `fewstep --version` tells the version."
    )


def _unknown(name: str) -> str:
    """One sentence about a command that there is not."""
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else "`fewstep --help` lists them."
    return f"there is no command {name!r}; {hint}"
