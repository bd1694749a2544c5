"""An HTTP port for operators: /live, /ready and /metrics in the format of Prometheus."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lm_server.errors import UserError
from lm_server.serving.status import BUCKETS, Report

LOOPBACK = "127.0.0.1"
_COUNTERS = {
    "sentences": "Sentences answered.",
    "partials": "Partial answers.",
    "errors": "Entries or jobs answered by an error.",
    "taken_over": "Jobs taken over from lost workers.",
    "unwanted": "Jobs decoded that had a result already or whose client had left.",
}
_GAUGES = {
    "sessions": "Sessions that the server owns.",
    "waiting_answers": "Answers that wait for rescoring or for Redis.",
    "held_jobs": "Jobs in the hands of the worker.",
    "started": "Unix time of the start, in seconds.",
}
_TIMES = {
    "partial": "From reading an entry to sending its partial answer.",
    "final": "From reading the end of a sentence, or a job, to sending its answer.",
}
_LABELS = ("process", "kind")


class HttpError(UserError, OSError):
    """The HTTP port cannot be opened."""


class OperatorsPort:
    """The HTTP server. It is bound at once and answers once it is started."""

    def __init__(self, address: str, report: Callable[[], Report]) -> None:
        """Bind `address`, PORT or HOST:PORT. Port 0 is any free one.

        Raises:
          HttpError: it is no address, or it is taken.
        """
        host, _, port = address.rpartition(":")
        host = host.strip("[]") or LOOPBACK
        server = _ServerV6 if ":" in host else _Server
        try:
            if not port.isdigit():
                raise ValueError(f"found the port {port[:20]!r}")
            self._server = server((host, int(port)), _handler(report))
        except (OSError, OverflowError, ValueError) as error:
            raise HttpError(
                f"--http {address}: {error}; needed PORT or HOST:PORT that nothing else uses"
            ) from error
        self.url = "http://{}:{}".format(*self._server.server_address[:2])
        # A worker that is forked must not keep the port.
        os.register_at_fork(after_in_child=self._server.socket.close)

    def start(self) -> None:
        """Answer from now on, in threads of its own."""
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _handler(report: Callable[[], Report]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            found, path = report(), self.path.partition("?")[0]
            if path == "/metrics":
                registry = CollectorRegistry()
                registry.register(_Metrics(found))
                self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif path in ("/live", "/ready"):
                good = found.live if path == "/live" else found.live and found.ready
                self._answer(200 if good else 503, f"{found.reason}\n".encode())
            else:
                self._answer(404, b"there are /live, /ready and /metrics\n")

        def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Log nothing: a probe every second is no news."""

    return Handler


class _Metrics(Collector):
    """The metrics of the statuses of a report."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """Yield one family of metrics after another."""
        statuses = [((one["name"], one["kind"]), one) for one in self._report.statuses]
        for name, help_ in _COUNTERS.items():
            counter = CounterMetricFamily(f"lm_server_{name}", help_, labels=_LABELS)
            for labels, status in statuses:
                counter.add_metric(labels, float(status.get(name, 0)))
            yield counter
        failures = CounterMetricFamily(
            "lm_server_failures", "Faults of the server itself.", labels=(*_LABELS, "exception")
        )
        for labels, status in statuses:
            for name, value in status.items():
                if name.startswith("failed_"):
                    failures.add_metric((*labels, name.removeprefix("failed_")), float(value))
        yield failures
        for name, help_ in _GAUGES.items():
            gauge = GaugeMetricFamily(f"lm_server_{name}", help_, labels=_LABELS)
            for labels, status in statuses:
                if name in status:
                    gauge.add_metric(labels, float(status[name]))
            yield gauge
        memory = GaugeMetricFamily("lm_server_memory_bytes", "Resident memory.", labels=_LABELS)
        for labels, status in statuses:
            memory.add_metric(labels, 1e6 * float(status["memory_mb"]))
        yield memory
        for name, help_ in _TIMES.items():
            histogram = HistogramMetricFamily(f"lm_server_{name}_seconds", help_, labels=_LABELS)
            for labels, status in statuses:
                if f"{name}_histogram" in status:
                    counts, total = json.loads(status[f"{name}_histogram"])
                    edges = [*map(str, BUCKETS), "+Inf"]
                    sums = [sum(counts[: i + 1]) for i in range(len(counts))]
                    histogram.add_metric(labels, list(zip(edges, sums, strict=True)), total)
            yield histogram
        if self._report.jobs is not None:
            yield GaugeMetricFamily(
                "lm_server_jobs_waiting",
                "Jobs that no worker has yet, of all workers of this Redis.",
                value=self._report.jobs,
            )
        ready = float(self._report.live and self._report.ready)
        yield GaugeMetricFamily("lm_server_ready", "1 if /ready answers 200.", value=ready)
