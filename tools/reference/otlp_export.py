"""Writes what taod's exporter must send for one span and one event, by OpenTelemetry's own message classes.

    pip install opentelemetry-proto==1.44.0
    python tools/reference/otlp_export.py

Writes tests/golden/otlp_export_traces.pb and otlp_export_logs.pb; src/telemetry/tests.rs sends the same values. Bytes are compared:
protobuf's writer and taod's both write fields in the order of their numbers.
"""

import pathlib
import tomllib

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO, LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]


def text(key, value):
    return KeyValue(key=key, value=AnyValue(string_value=value))


resource = Resource(attributes=[text("service.name", "taod"), text("service.version", VERSION)])
scope = InstrumentationScope(name="taod", version=VERSION)
span = Span(
    trace_id=b"\x01" * 16,
    span_id=b"\x02" * 8,
    parent_span_id=b"\x03" * 8,
    name="taod.stage gate",
    kind=Span.SPAN_KIND_INTERNAL,
    start_time_unix_nano=1_796_700_000_000_000_000,
    end_time_unix_nano=1_796_700_060_000_001_000,
    attributes=[
        KeyValue(key="taod.stage.rows", value=AnyValue(int_value=-7)),
        text("taod.round", "round-00001"),
    ],
    status=Status(message="it diverged", code=Status.STATUS_CODE_ERROR),
)
spans = ScopeSpans(scope=scope, spans=[span])
traces = ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[spans])])
record = LogRecord(
    time_unix_nano=1_796_700_000_000_000_000,
    observed_time_unix_nano=1_796_700_009_000_000_000,
    severity_number=SEVERITY_NUMBER_INFO,
    trace_id=b"\x09" * 16,
    event_name="gen_ai.evaluation.result",
    attributes=[KeyValue(key="gen_ai.evaluation.score.value", value=AnyValue(double_value=0.625))],
)
records = ScopeLogs(scope=scope, log_records=[record])
logs = ExportLogsServiceRequest(resource_logs=[ResourceLogs(resource=resource, scope_logs=[records])])
for name, request in [("otlp_export_traces", traces), ("otlp_export_logs", logs)]:
    (GOLDEN / f"{name}.pb").write_bytes(request.SerializeToString())
