"""Several instances of `taod ingest` share one topic and one table on S3, each under a CPU quota of its own.

usage: scale.py --binary TAOD --work FOLDER [--rows N] [--quota PERCENT]

Runs 1, 2 and 3 instances from the start of the same topic into a new table each; then 3 that commit more rarely; then 3
of which one is killed in the middle and started again. After each run every (partition, offset) of the topic must be in the table
once. The broker and the store are real (Apache Kafka, SeaweedFS) and have no quota: with a small quota the instances are
the limit. Rows per second are taken between 20 % and 80 % of the rows, by the times in the table's log.

A commit that others overtook was begun on an older version than the one before it: the difference is how many did. How
many conditional writes were lost to them is what the store counts as answers 412.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import sys
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests/chaos"))

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from deltalake import DeltaTable, QueryBuilder
import pyarrow

import parts
from stores import Bucket

TOPIC, PARTITIONS = "queries", 12
WORDS = ["lorem", "ipsum\n", '"dolor"', "sit", "ämet", "消息", "plain", "words", "of", "a", "conversation"]
PERIOD_US = 100_000


class Quota:
    """A control group that may use a share of one core; version 1 or 2, whichever is mounted."""

    def __init__(self, name, percent):
        quota = PERIOD_US * percent // 100
        old = pathlib.Path("/sys/fs/cgroup/cpu")
        self.folder = (old if old.is_dir() else old.parent) / name
        self.folder.mkdir()
        limits = {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": quota} if old.is_dir() else {
            "cpu.max": f"{quota} {PERIOD_US}"}
        for file, value in limits.items():
            (self.folder / file).write_text(str(value))

    def take(self, pid):
        (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self):
        # The kernel may take a moment to forget the last process.
        parts.wait_for("an empty control group", lambda: not (self.folder / "cgroup.procs").read_text(), 10)
        self.folder.rmdir()


class Instance:
    def __init__(self, run, number):
        self.quota = Quota(f"taod-scale-{os.getpid()}-{number}", run.options.quota)
        self.process = parts.Taod(run.options.binary, run.config(number), run.folder / f"taod{number}.log")
        self.quota.take(self.process.process.pid)
        self.cpu = 0.0

    def sample(self):
        """Returns the CPU seconds used so far."""
        try:
            fields = pathlib.Path(f"/proc/{self.process.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            self.cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except FileNotFoundError:
            pass
        return self.cpu

    def end(self, kill=False):
        self.sample()
        self.process.kill() if kill else self.process.stop()
        self.quota.remove()


class Run:
    """One table, filled by some instances from the start of the topic to its end."""

    def __init__(self, options, kafka, s3, name, count, interval_s, batch_bytes, kill=False):
        self.options, self.kafka, self.s3, self.name = options, kafka, s3, name
        self.count, self.interval_s, self.batch_bytes, self.kill = count, interval_s, batch_bytes, kill
        self.folder = options.work / name
        self.folder.mkdir()
        self.bucket = Bucket(s3.port, parts.S3.BUCKET, name)
        self.commits, self.next_version = [], 0
        self.offsets = {}

    def config(self, number):
        path = self.folder / f"taod{number}.toml"
        path.write_text(f"""
[state]
dir = "{self.folder / f'state{number}'}"
tables = "{self.bucket.url}"
store_options = {{ endpoint = "http://127.0.0.1:{self.s3.port}", region = "us-east-1", allow_http = "true" }}
[ingest]
batch_bytes = {self.batch_bytes}
commit_interval_s = {self.interval_s}
[ingest.kafka]
brokers = "127.0.0.1:{self.kafka.advertised}"
topic = "{TOPIC}"
group = "{self.name}"
[ingest.kafka.properties]
"session.timeout.ms" = "3000"
"heartbeat.interval.ms" = "500"
""")
        return path

    def advance(self):
        """Reads new log entries; returns the number of offsets that the table has reached, over all partitions."""
        while (data := self.bucket.read(f"queries/_delta_log/{self.next_version:020}.json")) is not None:
            lines = [json.loads(line) for line in data.decode().splitlines()]
            commit = {"version": self.next_version, "rows": 0, "bytes": 0, "overtaken": 0, "entry": len(data)}
            for line in lines:
                if info := line.get("commitInfo"):
                    commit["at"] = info["timestamp"] / 1000
                    if "readVersion" in info:
                        commit["overtaken"] = self.next_version - 1 - info["readVersion"]
                if add := line.get("add"):
                    commit["rows"] += json.loads(add["stats"])["numRecords"]
                    commit["bytes"] += add["size"]
                if txn := line.get("txn"):
                    self.offsets[txn["appId"]] = txn["version"]
            (self.folder / "newest.json").write_bytes(data)
            self.commits.append(commit)
            self.next_version += 1
        return sum(self.offsets.values())

    def lost_writes(self):
        """Returns how often the store has refused to create what was there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.s3.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines
                   if line.startswith("SeaweedFS_s3_request_total{") and 'code="412"' in line)

    def go(self):
        lost = self.lost_writes()
        instances = [Instance(self, number) for number in range(self.count)]
        killed, spent, deadline = 0, 0.0, time.monotonic() + self.options.deadline
        try:
            while (reached := self.advance()) < self.options.rows:
                for instance in instances:
                    instance.sample()
                    if not instance.process.is_alive():
                        raise RuntimeError(f"{self.name}: an instance ended:\n{instance.process.said()}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name}: {reached} of {self.options.rows} rows at the deadline\n"
                                       f"{instances[0].process.said()}")
                if self.kill and not killed and reached > self.options.rows * 0.4:
                    victim = instances.pop(0)
                    victim.end(kill=True)
                    spent, killed = victim.cpu, reached
                    instances.append(Instance(self, self.count))
                time.sleep(0.2)
        finally:
            for instance in instances:
                instance.end()
                spent += instance.cpu
        self.check()
        return self.report(spent, killed, self.lost_writes() - lost)

    def check(self):
        """Every offset of the topic is in the table once, read by python deltalake."""
        url = f"http://127.0.0.1:{self.s3.port}"
        table = DeltaTable(f"{self.bucket.url}/queries", storage_options={
            "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": parts.KEY_ID, "AWS_SECRET_ACCESS_KEY": parts.KEY})
        sql = ('select "partition" as p, count(*) as n, count(distinct "offset") as d, min("offset") as low, '
               'max("offset") as high from t group by "partition"')
        found = pyarrow.table(QueryBuilder().register("t", table).execute(sql).read_all()).to_pylist()
        wanted = self.options.rows // PARTITIONS
        for row in found:
            if (row["n"], row["d"], row["low"], row["high"]) != (wanted, wanted, 0, wanted - 1):
                raise RuntimeError(f"{self.name}: not exactly once: {row}, wanted 0 to {wanted - 1}")
        if len(found) != PARTITIONS:
            raise RuntimeError(f"{self.name}: only {len(found)} partitions are there")

    def report(self, spent, killed, lost):
        data = [commit for commit in self.commits if commit["rows"]]
        total, middle = 0, []
        for commit in data:
            total += commit["rows"]
            if 0.2 * self.options.rows <= total <= 0.8 * self.options.rows:
                middle.append(commit)
        span = middle[-1]["at"] - middle[0]["at"]
        rows = sum(commit["rows"] for commit in middle[1:])
        return {"run": self.name, "instances": self.count, "interval_s": self.interval_s,
                "rows_per_s": round(rows / span), "rows_per_cpu_s": round(self.options.rows / spent),
                "commits": len(data), "commits_per_s": round(len(middle) / span, 2),
                "rows_per_commit": round(total / len(data)), "bytes_per_row": round(sum(c["bytes"] for c in data) / total),
                "entry_bytes": round(sum(c["entry"] for c in data) / len(data)),
                "overtaken_per_commit": round(sum(c["overtaken"] for c in data) / len(data), 2),
                "lost_writes_per_commit": round(lost / len(data), 2), "killed_at": killed}


def produce(kafka, rows):
    """Fills the topic with calls of about 1.5 KB, the same number in each partition."""
    admin = AdminClient({**parts.QUIET, "bootstrap.servers": kafka.brokers})
    admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])[TOPIC].result(30)
    rng, failed = random.Random(1), []
    calls = []
    for i in range(2000):
        messages = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=90))}]
        answer = {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=90))}
        calls.append(json.dumps({
            "timestamp": "2026-05-01T12:00:00.25Z", "status": 200, "request": {"model": "m", "messages": messages},
            "response": {"id": f"r{i}", "object": "chat.completion", "model": "m", "usage": {"prompt_tokens": 90},
                         "choices": [{"index": 0, "message": answer, "finish_reason": "stop"}]}}).encode())
    producer = Producer({**parts.QUIET, "bootstrap.servers": kafka.brokers, "compression.type": "zstd",
                         "enable.idempotence": True, "linger.ms": 20})
    for i in range(rows):
        while True:
            try:
                producer.produce(TOPIC, calls[i % len(calls)], partition=i % PARTITIONS,
                                 on_delivery=lambda error, _: failed.append(error) if error else None)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    if producer.flush(120) or failed:
        raise RuntimeError(f"not everything was produced: {failed[:1]}")
    return sum(map(len, calls)) // len(calls)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--quota", type=int, default=10, help="per cent of a core for each instance")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for each run")
    options = parser.parse_args()
    options.rows -= options.rows % PARTITIONS
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    kafka, s3 = parts.Kafka(options.work), None
    try:
        s3 = parts.S3(options.work)
        # No proxy in between.
        kafka.advertised = kafka.inner
        kafka.stop()
        kafka.start()
        size = produce(kafka, options.rows)
        print(f"{options.rows} records of {size} bytes; {options.quota} % of a core for each instance", flush=True)
        for name, count, interval, batch, kill in [
            ("one", 1, 1, 1 << 22, False), ("two", 2, 1, 1 << 22, False), ("three", 3, 1, 1 << 22, False),
            ("three-rarely", 3, 5, 1 << 26, False), ("three-killed", 3, 1, 1 << 22, True),
        ]:
            print(json.dumps(Run(options, kafka, s3, name, count, interval, batch, kill).go()), flush=True)
    finally:
        if s3:
            s3.close()
        kafka.stop("-9")


if __name__ == "__main__":
    main()
