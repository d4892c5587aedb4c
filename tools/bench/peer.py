"""Writes a topic into a Delta table with what Python offers: one commit per batch, offsets in the same commit.

    peer.py python|duckdb BROKERS TOPIC TABLE

`python` parses with json and builds columns with pyarrow; `duckdb` takes the columns out of the JSON with SQL. Both read
with confluent-kafka, write with delta-rs and store the offsets as app transactions. They know one log format, mark no
row and keep no dead letters: less than what taod does.
"""

import hashlib
import json
import sys

import pyarrow as pa
from confluent_kafka import Consumer, TopicPartition
from deltalake import CommitProperties, Transaction, WriterProperties, write_deltalake

BATCH_BYTES = 64 << 20
# What one call of `consume` hands over at most.
RECORDS = 10_000
TAKEN = ("id", "trace_id", "model", "model_group", "messages", "response", "model_parameters", "startTime", "endTime",
         "prompt_tokens", "completion_tokens", "status")


def text(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def by_python(records):
    columns = {name: [] for name in (
        "topic", "partition", "offset", "kafka_time", "request_id", "trace_id", "model", "model_group", "status",
        "event_time", "duration_ms", "messages", "prompt_hash", "params", "response", "finish_reason", "prompt_tokens",
        "completion_tokens", "extra")}
    for record in records:
        call = json.loads(record.value())
        messages = json.dumps(call["messages"], ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        choice = call["response"]["choices"][0]
        row = (
            record.topic(), record.partition(), record.offset(), record.timestamp()[1] * 1000, call["id"],
            call["trace_id"], call["model"], call["model_group"], call["status"], int(call["startTime"] * 1e6),
            (call["endTime"] - call["startTime"]) * 1e3, messages, hashlib.sha256(messages.encode()).hexdigest(),
            text(call["model_parameters"]), choice["message"]["content"], choice["finish_reason"],
            call["prompt_tokens"], call["completion_tokens"],
            text({name: value for name, value in call.items() if name not in TAKEN}),
        )
        for column, value in zip(columns.values(), row):
            column.append(value)
    return pa.table(columns)


SQL = """
select topic, "partition", "offset", kafka_time,
  j->>'$.id' request_id, j->>'$.trace_id' trace_id, j->>'$.model' model, j->>'$.model_group' model_group,
  j->>'$.status' status, ((j->'$.startTime')::double * 1e6)::bigint event_time,
  ((j->'$.endTime')::double - (j->'$.startTime')::double) * 1e3 duration_ms,
  (j->'$.messages')::varchar messages, sha256((j->'$.messages')::varchar) prompt_hash,
  (j->'$.model_parameters')::varchar params, j->>'$.response.choices[0].message.content' response,
  j->>'$.response.choices[0].finish_reason' finish_reason, (j->'$.prompt_tokens')::bigint prompt_tokens,
  (j->'$.completion_tokens')::bigint completion_tokens, json_merge_patch(j, '{%s}')::varchar extra
from (select *, value::json j from raw)
""" % ",".join(f'"{name}":null' for name in TAKEN)


def by_duckdb(records):
    import duckdb

    raw = pa.table({
        "topic": [record.topic() for record in records],
        "partition": [record.partition() for record in records],
        "offset": [record.offset() for record in records],
        "kafka_time": [record.timestamp()[1] * 1000 for record in records],
        "value": [record.value().decode() for record in records],
    })
    connection = duckdb.connect()
    connection.register("raw", raw)
    return connection.execute(SQL).to_arrow_table()


def main():
    kind, brokers, topic, table = sys.argv[1:]
    columns = {"python": by_python, "duckdb": by_duckdb}[kind]
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "peer", "enable.auto.commit": False,
                         "queued.max.messages.kbytes": 65536, "fetch.queue.backoff.ms": 10})
    partitions = list(consumer.list_topics(topic, timeout=15).topics[topic].partitions)
    ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=15)[1] for p in partitions}
    consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
    offsets, written = dict.fromkeys(partitions, 0), 0
    while offsets != ends:
        chunks, size = [], 0
        while size < BATCH_BYTES and offsets != ends:
            records = consumer.consume(RECORDS, timeout=1)
            if records:
                chunks.append(columns(records))
                size += sum(len(record.value()) for record in records)
                for record in records:
                    offsets[record.partition()] = record.offset() + 1
        batch = pa.concat_tables(chunks)
        moves = [Transaction(app_id=f"{topic}/{p}", version=offset) for p, offset in offsets.items()]
        write_deltalake(table, batch, mode="append",
                        writer_properties=WriterProperties(compression="ZSTD", compression_level=1),
                        commit_properties=CommitProperties(app_transactions=moves))
        written += batch.num_rows
    print(written, "rows")


if __name__ == "__main__":
    main()
