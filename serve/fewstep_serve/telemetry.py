"""Traces by OpenTelemetry. Ray Serve makes the spans of its proxy, of the ingress and of the generators, where
`tracing_config` of a configuration asks for them; here are those of the parts of a request, and where spans are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.engine.generation import GeneratedImage

OTLP = "fewstep_serve.telemetry:otlp"
"""How a configuration names `otlp`."""
PARTS = ("encode", "queue", "network", "policy", "decode")
"""Of a request, as `ImageTimings` has them."""


def otlp() -> list[Any]:
    """Send spans to the collector of `OTEL_EXPORTER_OTLP_ENDPOINT`, as OTLP by HTTP.

    `tracing_config.exporter_import_path` names this function.

    Raises:
        UserError: the extra `telemetry` is not installed.
    """
    exporter = otlp_exporter()
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(exporter())]


def otlp_exporter() -> Any:
    """The class that sends spans.

    Raises:
        UserError: the extra `telemetry` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise UserError(
            "tracing_config: sending traces needs OpenTelemetry's exporter: pip install 'fewstep[telemetry]'."
        ) from error
    return OTLPSpanExporter


def trace_parts(begin_ns: int, request_id: str, images: Sequence[GeneratedImage]) -> None:
    """Add a span for each part of a request to the present span, if there is one.

    They are those of the image that took longest, one after the other: the times that it waited for are one span, and
    so are its evaluations, between which it waited.

    Args:
        begin_ns: when the engine was given the request, by `time.time_ns`.
        request_id: an attribute of the spans.
        images: what it gave.
    """
    if not trace.get_current_span().get_span_context().is_valid:
        return
    tracer = trace.get_tracer("fewstep")
    longest = max(
        (image.timings for image in images), key=lambda one: one.queue_s + one.network_s + one.policy_s
    )
    for part in PARTS:
        span = tracer.start_span(part, start_time=begin_ns, attributes={"request_id": request_id})
        begin_ns += round(1e9 * getattr(longest, f"{part}_s"))
        span.end(begin_ns)
