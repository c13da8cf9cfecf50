"""Writes docs/chaos.md from the results of the tests beside it: `python tests/chaos/page.py`."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results.jsonl")
SERVICE = Path(__file__).with_name("service.jsonl")
NODES = Path(__file__).with_name("nodes.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "chaos.md"

MOMENTS = {
    "start": "before the first step",
    "step": "at a step",
    "checkpoint": "while a checkpoint is written",
    "upload": "while it is uploaded",
    "evaluation": "during the evaluation",
    "model_files": "while the model's files go to MLflow",
    "version": "as its version is made",
    "alias": "as the alias moves",
}

INTRODUCTION = """\
# What a run stands

Machines die, storage goes away, disks fill up. `make chaos` lets all that happen to small runs, on clusters of its
own, and checks each time what is promised. It is for those who change the training, the tracking or the checkpoints;
to read this table nothing need be run.

Each row is one run: two workers on two nodes of a Ray cluster whose head keeps its state in Redis, data and
checkpoints on S3, tracking in an MLflow server, both behind a proxy that can be slow, answer 503, cut its answers or
be away. A fault happens once, at a moment that is told from outside: a line of progress at a random step, a file that
is being written, a request that is held. Then the run goes on by itself, or it is resumed with `--resume`, and in any
case

- its losses are those of a run without a fault, bit for bit (float32, CPU), each step once in MLflow, in one MLflow
  run, which is finished;
- the weights that it registers are that run's, byte for byte;
- the alias points at a whole version at the moment of the fault, and at the end at the new one;
- every checkpoint that Ray Train lists is whole.

*Seconds* are those to the next new step, to the end where no step was left, or to the sentence with which a run ended
that could not go on; after a resume they count from it. They hold for the machine that they were measured on: two
shared cores.
"""

NODES_INTRODUCTION = """
## Runs that shrink and grow

With `train.workers=[1, 2]` a run goes on with the workers that the cluster has room for. Its losses are then those of
one worker but for rounding, as sums are taken in another order: *difference* is the largest of any step, relative.
"""

SERVICE_INTRODUCTION = """
## What the service stands

The same for the service: two generators on two nodes, two ingresses, proxy and controller on the head, a registered
model whose files lie on S3. Eight clients ask without a pause for one to three images, a tenth of their requests
malformed; each row is at least 500 requests, with one fault while they are under way. Every image is compared with one
that the test draws from the version that the answer names, to one level of 255. A client tries again, as OpenAI's do,
what was answered 429 or 5xx, and where a connection was refused or broke; so no request is without its images in the
end. *5xx* are all such answers; *broken* are connections. *Trouble* are the seconds from the fault's beginning to the
last answer that shows it: an error, or a version that the alias had left; *whole* those until both generators could
generate (faults that last have their own 15 to 20 seconds in it).
"""


def page(results: Path, nodes: Path, service: Path) -> str:
    """The page, with a table of all cells that have been tried."""
    cells = [json.loads(line) for line in results.read_text().splitlines()]
    whole = sum(not one["broken"] for one in cells)
    lines = [
        INTRODUCTION,
        f"{whole} of {len(cells)} cells hold.\n",
        "| fault | moment | what came of it | seconds | claims |",
        "|---|---|---|---|---|",
    ]
    for one in cells:
        lines.append(
            f"| {one['fault']} | {MOMENTS[one['moment']]} | {one['outcome'] or '–'} | {one['seconds']:.0f} "
            f"| {_claims(one)} |"
        )
    said = [one for one in cells if one["said"]]
    if said:
        lines.append("\nThe sentences of the runs that could not go on:\n")
        lines += [f"- {one['fault']}, {MOMENTS[one['moment']]}: `{_cell(one['said'], 600)}`" for one in said]
    lines.append(
        "\nOne cell again, with other random moments:\n\n```bash\nCHAOS_SEED=2 make chaos "
        "ARGS=\"-k 'driver and killed and upload'\"\npython tests/chaos/page.py\n```"
    )
    return "\n".join(lines) + "\n" + _nodes_table(nodes) + _service_table(service)


def _nodes_table(results: Path) -> str:
    lines = [NODES_INTRODUCTION, "| what happened | difference | what the run said |", "|---|---|---|"]
    for one in map(json.loads, results.read_text().splitlines()):
        difference = "–" if one["difference"] is None else f"{one['difference']:.1e}"
        lines.append(f"| {one['what']} | {difference} | {_cell(one['said'], 400)} |")
    return "\n".join(lines) + "\n"


def _service_table(results: Path) -> str:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    requests, errors = sum(one["requests"] for one in rows), sum(one["server_errors"] for one in rows)
    whole = sum(not one["broken"] for one in rows)
    lines = [
        SERVICE_INTRODUCTION,
        f"{whole} of {len(rows)} rows hold: {requests:,} requests, {sum(one['images'] for one in rows):,} images "
        f"compared, {errors} answers of 5xx ({errors / requests:.2%}).\n",
        "| fault | requests | images | 5xx | 429 | broken | trouble | whole | median, p99 in ms | claims |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        lines.append(
            f"| {one['fault']} | {one['requests']} | {one['images']} | {one['server_errors']} | {one['full']} "
            f"| {one['broken_connections']} | {one['trouble_seconds']:.0f} | {one['whole_seconds']:.0f} "
            f"| {one['median_ms']:.0f}, {one['p99_ms']:.0f} "
            f"| {_claims(one)} |"
        )
    return "\n".join(lines) + "\n"


def _claims(result: dict) -> str:
    return "; ".join(_cell(text) for text in result["broken"]) or "hold"


def _cell(text: str, most: int = 160) -> str:
    """A text that fits into a cell of a table, without the names of temporary folders."""
    return " ".join(text.replace("|", "/").split())[:most]


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS, NODES, SERVICE))
