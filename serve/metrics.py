"""What Prometheus sees, at the metrics port of each Ray node (names there begin with `ray_`)."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from fewstep.engine import BatchReport

MILLISECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000, 60000]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


class EngineMetrics:
    """Of a generator replica."""

    def __init__(self) -> None:
        def milliseconds(name: str, text: str) -> Histogram:
            return Histogram(
                f"fewstep_{name}_ms", text, boundaries=MILLISECONDS, tag_keys=("model", "version")
            )

        by_model = ("model", "version")
        self._images = Counter("fewstep_images_total", "Images drawn.", tag_keys=by_model)
        self._batch_size = Histogram(
            "fewstep_batch_size", "Images of a batch.", boundaries=SIZES, tag_keys=by_model
        )
        self._queue = milliseconds("queue", "Time an image waited for its batch.")
        self._encode = milliseconds("encode", "Time of a batch in the text encoder.")
        self._network = milliseconds("network", "Time of a batch in the network.")
        self._policy = milliseconds("policy", "Time of a batch in policies and their rollouts.")
        self._decode = milliseconds("decode", "Time of a batch in the decoder.")
        self._rate = Gauge(
            "fewstep_images_per_second", "Images per second of the last batch.", tag_keys=by_model
        )
        self._pending = Gauge("fewstep_pending_images", "Images that wait for a batch.")

    def batch(self, report: BatchReport) -> None:
        tags = {"model": report.model.name, "version": report.model.version}
        self._images.inc(report.size, tags)
        self._batch_size.observe(report.size, tags)
        for histogram, seconds in (
            (self._encode, report.encode_s), (self._network, report.network_s),
            (self._policy, report.policy_s), (self._decode, report.decode_s),
        ):  # fmt: skip
            histogram.observe(seconds * 1000, tags)
        total = report.encode_s + report.network_s + report.policy_s + report.decode_s
        self._rate.set(report.size / max(total, 1e-9), tags)

    def waited(self, seconds: float, model: str, version: str) -> None:
        self._queue.observe(seconds * 1000, {"model": model, "version": version})

    def pending(self, images: int) -> None:
        self._pending.set(images)


class RequestMetrics:
    """Of an ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "fewstep_requests_total", "Image requests answered.", tag_keys=("model", "status")
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
        self._retries = Counter("fewstep_retries_total", "Orders sent again because their replica died.")

    def answered(self, model: str, status: int, seconds: float, code: str | None) -> None:
        self._requests.inc(1, {"model": model, "status": str(status)})
        self._latency.observe(seconds * 1000, {"status": str(status)})
        if code is not None:
            self._errors.inc(1, {"code": code})

    def retried(self) -> None:
        self._retries.inc()
