"""Writes the protobuf form of the OTLP fixtures, by OpenTelemetry's own message classes.

    pip install opentelemetry-proto==1.44.0
    python tools/reference/otlp_protobuf.py

Reads tests/fixtures/logs/otlp_spans.json and otlp_logs.json, writes the .pb files beside them.
"""

import base64
import json
import pathlib

from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

LOGS = pathlib.Path(__file__).parents[2] / "tests" / "fixtures" / "logs"


def with_base64_ids(value):
    """OTLP's JSON has ids in hex, protobuf's own JSON mapping wants base64."""
    if isinstance(value, list):
        return [with_base64_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    ids = ("traceId", "spanId", "parentSpanId")
    return {
        key: base64.b64encode(bytes.fromhex(item)).decode() if key in ids else with_base64_ids(item)
        for key, item in value.items()
    }


for name, request in [("otlp_spans", ExportTraceServiceRequest()), ("otlp_logs", ExportLogsServiceRequest())]:
    batch = json.loads((LOGS / f"{name}.json").read_text())
    ParseDict(with_base64_ids(batch), request)
    (LOGS / f"{name}.pb").write_bytes(request.SerializeToString())
