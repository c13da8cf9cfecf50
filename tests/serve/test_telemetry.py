"""Spans of a request's parts, and what is said where they can't be sent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fewstep.cli import main
from fewstep.engine.generation import ImageTimings
from fewstep.errors import UserError
from fewstep_serve.telemetry import otlp, trace_parts

IMAGES = [
    SimpleNamespace(timings=ImageTimings(0.5, queue_s, 1.0, 0.25, 0.125)) for queue_s in (1.0, 2.0, 0.0)
]


def test_the_parts_of_a_request_are_spans_of_the_one_that_is_under_way(monkeypatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    begin = 10**18
    trace_parts(begin, "order 66", IMAGES)
    assert exporter.get_finished_spans() == (), "nobody traces"
    with provider.get_tracer("serve").start_as_current_span("replica") as replica:
        trace_parts(begin, "order 66", IMAGES)
    *parts, _ = exporter.get_finished_spans()
    seconds = {part.name: ((part.start_time - begin) / 1e9, (part.end_time - begin) / 1e9) for part in parts}
    assert seconds == {
        "encode": (0, 0.5), "queue": (0.5, 2.5), "network": (2.5, 3.5), "policy": (3.5, 3.75), "decode": (3.75, 3.875)
    }  # fmt: skip
    for part in parts:
        assert part.attributes["request_id"] == "order 66"
        assert part.parent.span_id == replica.get_span_context().span_id


def test_where_the_exporter_is_missing_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'fewstep\[telemetry\]'"):
        otlp()


def test_the_command_says_so_before_anything_is_deployed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = tmp_path / "config.yaml"
    config.write_text(
        "tracing_config: {enabled: true, exporter_import_path: 'fewstep_serve.telemetry:otlp'}\n"
        "applications: [{name: fewstep, import_path: 'fewstep_serve.app:build'}]\n"
    )
    assert main(["serve", "--config", str(config)]) == 2
    assert "pip install 'fewstep[telemetry]'" in capsys.readouterr().err
