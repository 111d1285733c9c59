"""Recording spans with the OpenTelemetry SDK. Imported only while traces are wanted (barista.tracing.open_tracer)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from barista.errors import ConfigError
from barista.tracing import SpanIds

OTLP_PATH = "/v1/traces"
QUEUE_SPANS = 2**14  # spans that wait for the exporter; more are dropped
EXPORT_MILLISECONDS = 250  # a worker that Ray kills loses what it has not exported


class Tracer:
    """Takes spans that have ended and hands them to the exporter in a thread of its own. Safe from any thread.

    ratio: share of the steps to record. Others as barista.tracing.open_tracer. Raises ConfigError as span_exporter.
    """

    def __init__(self, trace_to: str, ratio: float, service: str, instance: str) -> None:
        self.ratio = ratio
        exporter = span_exporter(trace_to)
        self._ids = _GivenIds()
        self._lock = threading.Lock()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what is not to be recorded is not brought here
            resource=Resource.create({"service.name": service, "service.instance.id": instance}),
            id_generator=self._ids,
            shutdown_on_exit=False,  # it may wait long for an endpoint that does not answer
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS, schedule_delay_millis=EXPORT_MILLISECONDS)
        )
        self._tracer = self._provider.get_tracer("barista")

    def record(
        self,
        name: str,
        ids: SpanIds,
        started: float,
        ended: float,
        attributes: Mapping[str, str | int | bool],
        *,
        parent: SpanIds | None = None,
        links: Iterable[SpanIds] = (),
        kind: str = "internal",
        error: str = "",
    ) -> None:
        """Record one span. started, ended: of time.monotonic(). kind: internal, client or server. error: empty if none.

        links: other spans that it has to do with.
        """
        wall = time.time_ns() - time.monotonic_ns()
        with self._lock:
            self._ids.given = ids
            span = self._tracer.start_span(
                name,
                context=set_span_in_context(NonRecordingSpan(_context(parent))) if parent else None,
                kind=SpanKind[kind.upper()],
                attributes=attributes,
                links=[Link(_context(link)) for link in links],
                start_time=wall + int(started * 1e9),
            )
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(wall + int(ended * 1e9))

    def flush(self, seconds: float = 1.0) -> None:
        """Export what has been recorded, within about `seconds`: before the process ends."""
        thread = threading.Thread(target=self._provider.force_flush, name="flush traces", daemon=True)
        thread.start()
        thread.join(seconds)

    def close(self) -> None:
        """Flush, and end the exporter's thread."""
        self.flush()
        self._provider.shutdown()


class _GivenIds(IdGenerator):
    """Gives each new span the ids that were set for it."""

    given = SpanIds(0, 0)

    def generate_trace_id(self) -> int:
        return self.given.trace_id

    def generate_span_id(self) -> int:
        return self.given.span_id


class _Lines(SpanExporter):
    """Adds lines to a file. Processes may share it, because each line is one write to its end."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            os.write(self._fd, span.to_json(indent=None).encode() + b"\n")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self._fd)


def span_exporter(trace_to: str) -> SpanExporter:
    """To an OTLP/HTTP endpoint, or to a file, a line of JSON for each span.

    Raises ConfigError: the package for OTLP is not installed, or the file cannot be written.
    """
    if trace_to.startswith(("http://", "https://")):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"trace_to is {trace_to}, but the package that sends traces there is not installed.",
                "pip install 'barista[traces]', or give a file.",
            ) from error
        return OTLPSpanExporter(trace_to if trace_to.endswith(OTLP_PATH) else trace_to.rstrip("/") + OTLP_PATH)
    if "://" in trace_to:
        raise ConfigError(
            f"trace_to is {trace_to}, which is no endpoint.", "Give one of http:// or https://, or a file."
        )
    try:
        return _Lines(trace_to)
    except OSError as error:
        raise ConfigError(f"cannot write traces to {trace_to}: {error.strerror}.", "Correct --trace-to.") from error


def _context(ids: SpanIds) -> SpanContext:
    return SpanContext(ids.trace_id, ids.span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
