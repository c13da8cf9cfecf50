#!/usr/bin/env python
"""Measure the service: open-loop load at several rates and batch limits against a running endpoint."""

import argparse
import asyncio
import sys
from pathlib import Path

from fewstep.cli import connect_ray, run_job

EXAMPLES = """\
examples
  jobs/benchmark_serve.py                                  # deploys the bundled student itself, on a port of its own
  jobs/benchmark_serve.py --batch-limits 1,4,16 --rates 0.25,0.5,0.75,1.0 --seconds 20
  jobs/benchmark_serve.py --address http://127.0.0.1:8000  # a running endpoint, with the batch limit that it has

Rates are fractions of the saturated throughput, which is measured first with clients that never pause; requests of
an open loop come at random moments (Poisson), whether or not earlier ones are answered. The bare engine is measured
in a process of its own on the same machine, with the service idle. Every prompt differs, so no cache helps.
Ratios hold within one run on one machine; absolute times don't travel."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--address", help="of a running endpoint; by default one is deployed for the measurement"
    )
    parser.add_argument("--api-key", help="where the endpoint asks for one")
    parser.add_argument("--model", default="emoji-student", help="what is deployed; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations; default: %(default)s")
    parser.add_argument("--batch-limits", default="1,16", help="most images of a batch; default: %(default)s")
    parser.add_argument(
        "--rates", default="0.25,0.5,0.8,1.2", help="fractions of saturation; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=15, help="of each load; default: %(default)s")
    parser.add_argument("--clients", type=int, default=32, help="at saturation; default: %(default)s")
    parser.add_argument("--replicas", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of a replica; default: %(default)s"
    )
    parser.add_argument(
        "--stages",
        choices=("together", "apart"),
        default="together",
        help="encoder and decoder in the replica, or in processes of their own; default: %(default)s",
    )
    parser.add_argument("--port", type=int, default=8765, help="of the own deployment; default: %(default)s")
    parser.add_argument("--tracking-uri", help="log table, plot and figures to MLflow there")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/benchmark_serve"),
        help="folder for table and plot; default: %(default)s",
    )
    options = parser.parse_args()

    from serve.benchmark import Row, as_metrics, bare_engine, lone_latency, open_loop, plot, saturated, table
    from serve.running import deployment

    def measure(address: str, limit: int | None) -> tuple[Row, Row, list[Row]]:
        prefix = "" if limit is None else f"batch limit {limit}: "
        shared = {"steps": options.steps, "api_key": options.api_key}
        show = lambda row: print(table([row]).splitlines()[-1], flush=True)  # noqa: E731
        alone = asyncio.run(lone_latency(address, **shared))
        show(alone)
        most = asyncio.run(
            saturated(address, options.clients, options.seconds, name=f"{prefix}saturated", **shared)
        )
        show(most)
        loads = []
        for share in map(float, options.rates.split(",")):
            rate = share * most.images_per_s
            name = f"{prefix}{share:g} of saturation"
            loads.append(asyncio.run(open_loop(address, rate, options.seconds, name=name, **shared)))
            show(loads[-1])
        return alone, most, loads

    print(table([]))
    results = {}
    if options.address:
        results[None] = measure(options.address, None)
    else:
        connect_ray(show_logs=False)
        for limit in map(int, options.batch_limits.split(",")):
            settings = {
                "offer": {
                    "models": [{"name": "model", "source": options.model}],
                    "batching": {"max_batch_size": limit},
                },
                "engine": {"threads": options.threads, "stages": options.stages},
            }
            with deployment(settings, port=options.port, replicas=options.replicas) as address:
                results[limit] = measure(address, limit)
    sizes = sorted({max(1, round(most.mean_batch)) for _, most, _ in results.values()})
    same_kind = {"steps": options.steps, "threads": options.threads}
    bare = {
        (size, in_flight): bare_engine(options.model, size, options.seconds, in_flight=in_flight, **same_kind)
        for size in sizes
        for in_flight in (1, 2)
    }
    rows = [row for alone, most, loads in results.values() for row in (alone, most, *loads)]
    rows += bare.values()

    verdicts = []
    for limit, (alone, most, loads) in results.items():
        named = "" if limit is None else f"batch limit {limit}: "
        size = max(1, round(most.mean_batch))
        verdicts += [
            f"{named}saturated throughput is {most.images_per_s / same.images_per_s:.2f} of the {same.name}"
            for same in (bare[size, 1], bare[size, 2])
        ]
        verdicts[-2] += " (promise: at least 0.85)"
        for load in loads:
            if load.name.endswith("0.5 of saturation"):
                verdicts.append(
                    f"{named}at half the saturated rate, p99 is {load.p99_ms / alone.p50_ms:.2f} times the lone "
                    "request's median (promise: at most 3)"
                )
            if load.offered_per_s > most.images_per_s:
                verdicts.append(
                    f"{load.name}: {load.images_per_s / most.images_per_s:.2f} of its throughput, the rest is refused "
                    "(promise: at least 0.6)"
                )
    if 1 in results and len(results) > 1:
        best = max(most.images_per_s for limit, (_, most, _) in results.items() if limit != 1)
        gain = best / results[1][1].images_per_s
        verdicts.append(f"batching gains a factor {gain:.2f} (promise: at least 1.5)")
    report = table(rows) + "\n\n" + "\n".join(f"- {verdict}" for verdict in verdicts) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(report)
    plot(rows, bare[sizes[-1], 1], options.out / "load.png")
    print(f"\n{report}\nplot  {(options.out / 'load.png').absolute()}")
    if options.tracking_uri:
        from fewstep.tracking.address import check_reachable, connect

        client = connect(check_reachable(options.tracking_uri))
        experiment = client.get_experiment_by_name("serve")
        run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("serve"))
        for key, value in as_metrics(rows).items():
            client.log_metric(run.info.run_id, key, value)
        client.log_artifacts(run.info.run_id, str(options.out))
        client.set_terminated(run.info.run_id)
        print(f"MLflow run {run.info.run_id}", file=sys.stderr)


if __name__ == "__main__":
    run_job(main)
