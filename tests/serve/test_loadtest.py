"""The load and soak commands: their options, and what they conclude from measurements."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from fewstep_loadtest import serve_command, soak_command
from fewstep_loadtest.client import Answer
from fewstep_loadtest.load import PARTS, LoadResult, as_metrics, plot_parts, summary, table
from fewstep_loadtest.serve_command import _Measured, _verdicts
from fewstep_loadtest.soak import MALFORMED, mixture
from fewstep_serve.schema import ImageRequest

RESULT = LoadResult(
    name="alone", offered_per_s=None, images_per_s=20.0, p50_ms=50.0, p99_ms=60.0, mean_batch=1.0,
    outside_engine=0.1, refused=0, errors=0,
)  # fmt: skip


@pytest.mark.parametrize("command", [serve_command, soak_command])
def test_a_command_has_options_and_a_help_page(command) -> None:
    parser = argparse.ArgumentParser(
        description=command.DESCRIPTION, epilog=command.EXAMPLES.format(program="fewstep benchmark x")
    )
    command.add_arguments(parser)
    assert "fewstep benchmark x" in parser.format_help()
    assert parser.parse_args([]).replicas >= 1
    assert callable(command.run)


def test_the_acceptance_criteria_compare_the_service_with_the_engine_and_with_itself() -> None:
    def measured(limit: int, most: float) -> _Measured:
        saturated = replace(RESULT, images_per_s=most, mean_batch=float(limit))
        loads = [
            replace(
                RESULT, name=f"batch limit {limit}: 0.5 of saturation", offered_per_s=most / 2, p99_ms=100.0
            ),
            replace(
                RESULT,
                name=f"batch limit {limit}: 1.2 of saturation",
                offered_per_s=1.2 * most,
                images_per_s=0.9 * most,
            ),
        ]
        return _Measured(RESULT, saturated, loads)

    engines = {
        (size, in_flight): replace(RESULT, name=f"engine of {size}", images_per_s=size * 10.0 * in_flight)
        for size in (1, 4)
        for in_flight in (1, 2)
    }
    assert list(_verdicts({1: measured(1, 9.0), 4: measured(4, 36.0)}, engines)) == [
        "batch limit 1: saturated throughput is 0.90 of the engine of 1 (criterion: at least 0.85)",
        "batch limit 1: saturated throughput is 0.45 of the engine of 1",
        "batch limit 1: at half the saturated rate, p99 is 2.00 times the lone request's median (criterion: at most 3)",
        "batch limit 1: 1.2 of saturation: 0.90 of its throughput, the rest is refused (criterion: at least 0.6)",
        "batch limit 4: saturated throughput is 0.90 of the engine of 4 (criterion: at least 0.85)",
        "batch limit 4: saturated throughput is 0.45 of the engine of 4",
        "batch limit 4: at half the saturated rate, p99 is 2.00 times the lone request's median (criterion: at most 3)",
        "batch limit 4: 1.2 of saturation: 0.90 of its throughput, the rest is refused (criterion: at least 0.6)",
        "batching gains a factor 4.00 (criterion: at least 1.5)",
    ]


def test_results_become_a_table_and_metrics() -> None:
    result = replace(RESULT, name="batch limit 4: 0.5 of saturation", offered_per_s=10.0, refused=2)
    assert table([result]).splitlines()[-1] == (
        "| batch limit 4: 0.5 of saturation | 10.0 | 20.0 | 50 | 60 | 1.0 | 10% | 2 | 0 |"
    )
    assert as_metrics([result])["serve/batch limit 4 0.5 of saturation/images_per_s"] == 20.0
    assert "serve/alone/offered_per_s" not in as_metrics([RESULT])


def answered(seconds: float, service_ms: int, **timings: float) -> Answer:
    """A response for one image."""
    body = {
        "data": [{"batch_size": 1.0, "timings": {f"{name}_ms": value for name, value in timings.items()}}]
    }
    return Answer(200, body, {"openai-processing-ms": str(service_ms)}, seconds)


def test_the_parts_of_a_request_add_up_to_its_latency_and_become_a_plot(tmp_path: Path) -> None:
    engine = {"queue": 1.0, "encode": 5.0, "network": 20.0, "policy": 3.0, "decode": 1.0}
    refusal = Answer(429, {"error": {}}, {}, 0.001)
    answers = [answered(0.040, 36, **engine), answered(0.060, 44, **(engine | {"queue": 3.0})), refusal]
    parts = summary("alone", None, answers, elapsed=1.0).parts_ms
    assert tuple(parts) == PARTS
    assert parts == pytest.approx(engine | {"queue": 2.0, "ingress": 9.0, "client and proxy": 10.0})
    assert sum(parts.values()) == pytest.approx(50.0)
    plot_parts([replace(RESULT, parts_ms=parts), RESULT], tmp_path / "parts.png")  # RESULT has none: no bar
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")
    assert summary("none", None, [refusal], elapsed=1.0).parts_ms == {}


def test_the_mixture_repeats_and_its_wellformed_requests_fit_the_schema() -> None:
    requests = mixture(400, seed=3, malformed_share=0.1)
    assert requests == mixture(400, seed=3, malformed_share=0.1)
    bodies = [request for request in requests if isinstance(request, dict)]
    assert 320 < len(bodies) < 400
    for body in bodies:
        ImageRequest.model_validate(body)
    assert {body.get("h") for body in bodies} == {None, 0.5}
    with pytest.raises(ValidationError):
        ImageRequest.model_validate_json(MALFORMED[0])
