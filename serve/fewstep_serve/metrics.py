"""Metrics for Prometheus, at the metrics port of each Ray node (names there begin with `ray_`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from fewstep.engine.generation import EvaluationReport, GeneratedImage
    from fewstep.engine.models import LoadedModel
    from fewstep_serve.audit import Exchange

MILLISECONDS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000, 60000]
"""Bounds of the histograms of times."""
SIZES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]
"""Bounds of the histogram of batch sizes."""

# Any, because Ray annotates tag keys as tuples of length one.
_BY_MODEL: Any = ("model", "version")
_BY_MODEL_AND_STATUS: Any = ("model", "version", "status")
_BY_STATUS: Any = ("status",)
# Names of keys that are known, and so as few as there are keys.
_BY_KEY: Any = ("key",)
_BY_CODE_AND_KEY: Any = ("code", "key")


class EngineMetrics:
    """The metrics of a generator replica."""

    def __init__(self) -> None:
        def milliseconds(name: str, text: str) -> Histogram:
            return Histogram(f"fewstep_{name}_ms", text, boundaries=MILLISECONDS, tag_keys=_BY_MODEL)

        self._images = Counter("fewstep_images_total", "Images generated.", tag_keys=_BY_MODEL)
        self._failures = Counter(
            "fewstep_failures_total", "Requests that failed in the engine.", tag_keys=_BY_MODEL
        )
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
        self._pending_work = Gauge("fewstep_pending_work", "Work that is under way.")

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

    def failed(self, model: LoadedModel) -> None:
        """Count a request that ended in an error of the engine's."""
        self._failures.inc(1, _tags(model))

    def pending(self, images: int, work: float) -> None:
        """Tell how many images wait, and how much work is under way."""
        self._pending.set(images)
        self._pending_work.set(work)


def _tags(model: LoadedModel) -> dict[str, str]:
    return {"model": model.name, "version": model.version}


class RequestMetrics:
    """The metrics of an ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "fewstep_requests_total", "Image requests answered.", tag_keys=_BY_MODEL_AND_STATUS
        )
        self._work = Counter("fewstep_work_total", "Work of answered requests, by key.", tag_keys=_BY_KEY)
        self._errors = Counter(
            "fewstep_errors_total", "Image requests refused or failed.", tag_keys=_BY_CODE_AND_KEY
        )
        self._latency = Histogram(
            "fewstep_request_ms",
            "Time from request to response.",
            boundaries=MILLISECONDS,
            tag_keys=_BY_STATUS,
        )
        self._retries = Counter("fewstep_retries_total", "Requests sent again because their replica died.")

    def answered(self, exchange: Exchange, seconds: float) -> None:
        """Count a request that was answered after so many seconds."""
        status, images = str(exchange.status), exchange.images
        model, version = (images.model, images.version) if images else ("", "")
        self._requests.inc(1, {"model": model, "version": version, "status": status})
        self._latency.observe(seconds * 1000, {"status": status})
        if images is not None:
            self._work.inc(images.work, {"key": exchange.key})
        if exchange.code is not None:
            self._errors.inc(1, {"code": exchange.code, "key": exchange.key})

    def retried(self) -> None:
        """Count a request that was sent to another replica."""
        self._retries.inc()


class JobMetrics:
    """The metrics of jobs, in an ingress replica."""

    def __init__(self) -> None:
        self._ended = Counter("fewstep_jobs_total", "Jobs that ended here.", tag_keys=_BY_STATUS)
        self._open = Gauge("fewstep_open_jobs", "Jobs of all replicas that wait or are under way.")

    def ended(self, status: str) -> None:
        """Count a job that ended."""
        self._ended.inc(1, {"status": status})

    def open(self, jobs: int) -> None:
        """Tell how many jobs have not ended."""
        self._open.set(jobs)
