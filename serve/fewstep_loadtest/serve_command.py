"""`fewstep benchmark serve`: open-loop load at several rates and batch limits against a running endpoint."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# What is imported here, the help page waits for: the measurements themselves are imported where they begin.
if TYPE_CHECKING:
    from fewstep_loadtest.load import LoadResult

DESCRIPTION = (
    "Measure the service: open-loop load at several rates and batch limits against a running endpoint."
)
"""For the help page."""
EXAMPLES = """\
examples
  {program}                                  # deploys the bundled student itself, on a port of its own
  {program} --batch-limits 1,4,16 --rates 0.25,0.5,0.75,1.0 --seconds 20
  {program} --address http://127.0.0.1:8000  # a running endpoint, with the batch limit that it has

Rates are fractions of the saturated throughput, which is measured first with clients that never pause; requests of
an open loop come at random moments (Poisson), whether or not earlier ones are answered. The bare engine is measured
in a process of its own on the same machine, with the service idle. Every prompt differs, so no cache helps.
Ratios hold within one run on one machine; absolute times can't be compared between machines."""
"""For the help page; `{program}` stands for the command."""


class _Measured(NamedTuple):
    """One endpoint's results."""

    alone: LoadResult
    saturated: LoadResult
    loads: list[LoadResult]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--address", help="of a running endpoint; by default one is deployed for the measurement")
    add("--api-key", help="where the endpoint asks for one")
    add("--model", default="emoji-student", help="what is deployed; default: %(default)s")
    add("--steps", type=int, default=4, help="network evaluations; default: %(default)s")
    add("--batch-limits", default="1,16", help="most images of a batch; default: %(default)s")
    add("--rates", default="0.25,0.5,0.8,1.2", help="fractions of saturation; default: %(default)s")
    add("--seconds", type=float, default=15, help="of each load; default: %(default)s")
    add("--clients", type=int, default=32, help="at saturation; default: %(default)s")
    add("--replicas", type=int, default=1, help="default: %(default)s")
    add("--threads", type=int, default=1, help="torch threads of a replica; default: %(default)s")
    add(
        "--stages",
        choices=("together", "apart"),
        default="together",
        help="encoder and decoder in the replica, or in processes of their own; default: %(default)s",
    )
    add("--port", type=int, default=8765, help="of the own deployment; default: %(default)s")
    add("--tracking-uri", help="log table, plot and figures to MLflow there")
    add(
        "--out",
        type=Path,
        default=Path("out/benchmark_serve"),
        help="folder for table and plots; default: %(default)s",
    )


def run(options: argparse.Namespace) -> None:
    """Measure, print a table with the acceptance criteria, and write it and plots to `options.out`.

    Raises:
        UserError: Serve already runs on this cluster, the deployment did not become ready, or MLflow is out of reach.
    """
    from fewstep_loadtest.load import as_metrics, plot, plot_parts, table

    print(table([]))
    measured = dict(_measure_each(options))
    engines = _bare_engines(options, measured)
    results = [one for m in measured.values() for one in (m.alone, m.saturated, *m.loads)] + list(
        engines.values()
    )
    report = (
        table(results) + "\n\n" + "\n".join(f"- {verdict}" for verdict in _verdicts(measured, engines)) + "\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(report)
    largest = max(size for size, _ in engines)
    plot(results, engines[largest, 1], options.out / "load.png")
    plot_parts(results, options.out / "parts.png")
    print(
        f"\n{report}\nplots  {(options.out / 'load.png').absolute()}, {(options.out / 'parts.png').absolute()}"
    )
    if options.tracking_uri:
        _log(options.tracking_uri, as_metrics(results), options.out)


def _measure_each(options: argparse.Namespace) -> Iterator[tuple[int | None, _Measured]]:
    """Per batch limit, the results of a deployment with it; None stands for the limit of a running endpoint."""
    from fewstep.cluster import connect_ray
    from fewstep_loadtest.running import deployment

    if options.address:
        yield None, _measure(options, options.address, None)
        return
    connect_ray(show_logs=False)
    for limit in map(int, options.batch_limits.split(",")):
        config = {
            "offer": {
                "models": [{"name": "model", "source": options.model}],
                "batching": {"max_batch_size": limit},
            },
            "engine": {"threads": options.threads, "stages": options.stages},
        }
        with deployment(config, port=options.port, replicas=options.replicas) as address:
            yield limit, _measure(options, address, limit)


def _measure(options: argparse.Namespace, address: str, limit: int | None) -> _Measured:
    from fewstep_loadtest.load import lone_latency, open_loop, saturated, table

    shared = {"steps": options.steps, "api_key": options.api_key}

    def shown(result: LoadResult) -> LoadResult:
        print(table([result]).splitlines()[-1], flush=True)
        return result

    prefix = _prefix(limit)
    alone = shown(asyncio.run(lone_latency(address, **shared)))
    most = shown(
        asyncio.run(saturated(address, options.clients, options.seconds, name=f"{prefix}saturated", **shared))
    )
    loads = []
    for share in map(float, options.rates.split(",")):
        rate, name = share * most.images_per_s, f"{prefix}{share:g} of saturation"
        loads.append(shown(asyncio.run(open_loop(address, rate, options.seconds, name=name, **shared))))
    return _Measured(alone, most, loads)


def _bare_engines(
    options: argparse.Namespace, measured: dict[int | None, _Measured]
) -> dict[tuple[int, int], LoadResult]:
    """The engine alone, by (images of a batch, batches in flight): with the batch sizes that the service had."""
    from fewstep_loadtest.load import bare_engine

    same_kind = {"steps": options.steps, "threads": options.threads}
    return {
        (size, in_flight): bare_engine(options.model, size, options.seconds, in_flight=in_flight, **same_kind)
        for size in sorted({_batch_size(one) for one in measured.values()})
        for in_flight in (1, 2)
    }


def _verdicts(
    measured: dict[int | None, _Measured], engines: dict[tuple[int, int], LoadResult]
) -> Iterator[str]:
    """What the results say of the acceptance criteria."""
    for limit, (alone, most, loads) in measured.items():
        size, prefix = _batch_size(measured[limit]), _prefix(limit)
        for in_flight, criterion in ((1, " (criterion: at least 0.85)"), (2, "")):
            same = engines[size, in_flight]
            share = most.images_per_s / same.images_per_s
            yield f"{prefix}saturated throughput is {share:.2f} of the {same.name}{criterion}"
        for load in loads:
            if load.name.endswith("0.5 of saturation"):
                yield (
                    f"{prefix}at half the saturated rate, p99 is {load.p99_ms / alone.p50_ms:.2f} times the lone "
                    "request's median (criterion: at most 3)"
                )
            if (load.offered_per_s or 0.0) > most.images_per_s:
                yield (
                    f"{load.name}: {load.images_per_s / most.images_per_s:.2f} of its throughput, the rest is refused "
                    "(criterion: at least 0.6)"
                )
    if 1 in measured and len(measured) > 1:
        best = max(one.saturated.images_per_s for limit, one in measured.items() if limit != 1)
        gain = best / measured[1].saturated.images_per_s
        yield f"batching gains a factor {gain:.2f} (criterion: at least 1.5)"


def _batch_size(measured: _Measured) -> int:
    return max(1, round(measured.saturated.mean_batch))


def _prefix(limit: int | None) -> str:
    return "" if limit is None else f"batch limit {limit}: "


def _log(tracking_uri: str, metrics: dict[str, float], folder: Path) -> None:
    """Log figures and files as a run of the MLflow experiment "serve"."""
    from fewstep.tracking.address import check_reachable, connect

    client = connect(check_reachable(tracking_uri))
    experiment = client.get_experiment_by_name("serve")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("serve"))
    for key, value in metrics.items():
        client.log_metric(run.info.run_id, key, value)
    client.log_artifacts(run.info.run_id, str(folder))
    client.set_terminated(run.info.run_id)
    print(f"MLflow run {run.info.run_id}", file=sys.stderr)
