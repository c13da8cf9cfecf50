"""Metrics for Prometheus, at the metrics port of each Ray node (names there begin with `ray_`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from fewstep.engine.generation import EvaluationReport, GeneratedImage
    from fewstep.engine.models import LoadedModel

MILLISECONDS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000, 60000]
"""Bounds of the histograms of times."""
SIZES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]
"""Bounds of the histogram of batch sizes."""

# Any, because Ray annotates tag keys as tuples of length one.
_BY_MODEL: Any = ("model", "version")
_BY_MODEL_AND_STATUS: Any = ("model", "status")


class EngineMetrics:
    """The metrics of a generator replica."""

    def __init__(self) -> None:
        def milliseconds(name: str, text: str) -> Histogram:
            return Histogram(f"fewstep_{name}_ms", text, boundaries=MILLISECONDS, tag_keys=_BY_MODEL)

        self._images = Counter("fewstep_images_total", "Images generated.", tag_keys=_BY_MODEL)
        self._batch_size = Histogram(
            "fewstep_batch_size", "Images of an evaluation.", boundaries=SIZES, tag_keys=_BY_MODEL
        )
        self._queue = milliseconds("queue", "Time an image waited for its turns.")
        self._encode = milliseconds("encode", "Time until an image's prompt was encoded.")
        self._network = milliseconds("network", "Time of an evaluation in the network.")
        self._policy = milliseconds("policy", "Time of an evaluation in policies and their rollouts.")
        self._decode = milliseconds("decode", "Time until an image's latent was decoded.")
        self._rate = Gauge(
            "fewstep_images_per_second",
            "Images per second at the last evaluation's rate.",
            tag_keys=_BY_MODEL,
        )
        self._pending = Gauge("fewstep_pending_images", "Images that wait for a turn.")

    def evaluation(self, report: EvaluationReport) -> None:
        """Count a network evaluation of a batch."""
        tags = _tags(report.model)
        self._batch_size.observe(report.size, tags)
        self._network.observe(report.network_s * 1000, tags)
        self._policy.observe(report.policy_s * 1000, tags)
        self._rate.set(report.share / max(report.network_s + report.policy_s, 1e-9), tags)

    def image(self, model: LoadedModel, image: GeneratedImage) -> None:
        """Count a finished image."""
        tags = _tags(model)
        self._images.inc(1, tags)
        self._encode.observe(image.timings.encode_s * 1000, tags)
        self._queue.observe(image.timings.queue_s * 1000, tags)
        self._decode.observe(image.timings.decode_s * 1000, tags)

    def pending(self, images: int) -> None:
        """Tell how many images wait."""
        self._pending.set(images)


def _tags(model: LoadedModel) -> dict[str, str]:
    return {"model": model.name, "version": model.version}


class RequestMetrics:
    """The metrics of an ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "fewstep_requests_total", "Image requests answered.", tag_keys=_BY_MODEL_AND_STATUS
        )
        self._errors = Counter(
            "fewstep_errors_total", "Image requests refused or failed.", tag_keys=("code",)
        )
        self._latency = Histogram(
            "fewstep_request_ms",
            "Time from request to response.",
            boundaries=MILLISECONDS,
            tag_keys=("status",),
        )
        self._retries = Counter("fewstep_retries_total", "Requests sent again because their replica died.")

    def answered(self, model: str, status: int, seconds: float, code: str | None) -> None:
        """Count an answered request; `code` is that of its error, if it was one, and `model` may be empty then."""
        self._requests.inc(1, {"model": model, "status": str(status)})
        self._latency.observe(seconds * 1000, {"status": str(status)})
        if code is not None:
            self._errors.inc(1, {"code": code})

    def retried(self) -> None:
        """Count a request that was sent to another replica."""
        self._retries.inc()
