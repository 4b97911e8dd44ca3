"""What Prometheus reads from /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from laserrec.server.service import Service

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """Of one server; its own registry, so that several can live in one process."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.requests = Counter("laserrec_requests", "Requests answered.", ["route", "method", "status"],
                                registry=self.registry)
        self.seconds = Histogram("laserrec_request_seconds", "Seconds from a request to its answer.", ["route"],
                                 buckets=_SECONDS, registry=self.registry)
        self.shed = Counter("laserrec_shed", "Requests turned away or given up because too many waited.",
                            registry=self.registry)
        self.cache = Counter("laserrec_cache", "Requests for recommendations, by whether the answer was kept.",
                             ["found"], registry=self.registry)
        batches = Histogram("laserrec_batch_size", "Requests that went through the model together.", buckets=_SIZES,
                            registry=self.registry)
        service.worker.batched = batches.observe
        for name, text, read in (
            ("laserrec_queue", "Requests that wait for the model.", lambda: service.worker.waiting),
            ("laserrec_queue_seconds", "How long a request that comes now would take.",
             lambda: service.worker.expected_seconds),
            ("laserrec_items", "Items that can be recommended.", lambda: len(service.listing)),
            ("laserrec_cached_answers", "Answers in the cache.", lambda: len(service.served.cache)),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
