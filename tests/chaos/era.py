"""One era of a run: a fresh topic and fresh tables, some cycles of faults, and a check of everything at its end.

A run is made of eras so that it can span several sittings (an era that was cut short is done again) and so that local
disk, a small file system in memory and S3, cooperative and eager assignment, plain and compacted topics all have their turn.
"""

import json
import random
import shutil
import signal
import subprocess
import time

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import NewTopic

import parts
import readers
from invariants import Checker, Violation, log_path
from ledger import MAPPING, Log
from stores import Bucket, Folder

STORES = ["disk", "s3", "tmpfs"]
TMPFS_MIB = 48
# How partitions are shared out, as properties of the client; the last is KIP-848, where the broker holds the time-outs.
CLASSIC = '"session.timeout.ms" = "1000"\n"heartbeat.interval.ms" = "300"\n"partition.assignment.strategy" = "{}"'
ASSIGNORS = {
    "range": CLASSIC.format("range"),
    "cooperative-sticky": CLASSIC.format("cooperative-sticky"),
    "KIP-848": '"group.protocol" = "consumer"',
}
# How long ingestion may take to store everything once nothing is in its way.
PROGRESS_S = 90


class Era:
    def __init__(self, run, number, attempt):
        self.run, self.number = run, number
        self.rng = random.Random(f"{run.seed}/{number}")
        self.name = f"era{number}-{attempt}"
        self.folder = run.work / self.name
        # What a sitting that was killed left here.
        parts.unmount(self.folder / "tables")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.kind = run.stores[number % len(run.stores)]
        self.mounted = self.kind == "tmpfs" and parts.mount_tmpfs(self.folder / "tables", TMPFS_MIB)
        if self.kind == "tmpfs" and not self.mounted:
            run.skip("disk_full", "no file system can be mounted here")
            self.kind = "disk"
        self.assignor = self.rng.choice(run.assignors)
        self.compacted = self.rng.random() < 0.2
        self.mapped = self.rng.random() < 0.5
        self.partitions = self.rng.randint(3, 6)
        self.store, self.root = self.make_store()
        self.create_topic()
        self.log = Log(run.kafka.brokers, self.name, self.partitions, self.rng, self.compacted)
        self.checker = Checker(self.store, self.log.ledger, f"taod/kafka/0/{self.name}/")
        self.instances = []

    def make_store(self):
        if self.kind == "s3":
            bucket = Bucket(self.run.s3.port, parts.S3.BUCKET, self.name)
            return bucket, bucket.url
        folder = self.folder / "tables"
        folder.mkdir(exist_ok=True)
        return Folder(str(folder)), str(folder)

    def describe(self):
        topic = "compacted topic" if self.compacted else "topic"
        return f"{self.kind}, {self.assignor}, {topic} of {self.partitions} partitions"

    def create_topic(self):
        config = {}
        if self.compacted:
            config = {"cleanup.policy": "compact", "segment.ms": "1500", "min.cleanable.dirty.ratio": "0.01",
                      "segment.bytes": "1048576", "max.compaction.lag.ms": "2000"}
        topic = NewTopic(self.name, num_partitions=self.partitions, replication_factor=1, config=config)
        self.run.admin.create_topics([topic])[self.name].result(30)

    def config(self):
        """Writes what taod is told at this moment and returns the file."""
        path = self.folder / "taod.toml"
        options = ""
        if self.kind == "s3":
            endpoint = f"http://127.0.0.1:{self.run.proxy.port}"
            options = (f'store_options = {{ endpoint = "{endpoint}", region = "us-east-1", allow_http = "true", '
                       'timeout = "2 s", connect_timeout = "1 s" }')
        text = f"""
[state]
dir = "{self.folder / 'state'}"
tables = "{self.root}"
{options}
[ingest]
batch_bytes = 65536
commit_interval_s = 1
{"[maintenance]" if self.run.has_maintenance else ""}
{"compact_from_files = 3" if self.run.has_maintenance else ""}
[ingest.kafka]
brokers = "127.0.0.1:{self.run.kafka.advertised}"
topic = "{self.name}"
group = "{self.name}"
connect_timeout_s = 5
rebalance_timeout_s = 5
[ingest.kafka.properties]
"topic.metadata.refresh.interval.ms" = "1000"
"reconnect.backoff.max.ms" = "300"
{ASSIGNORS[self.assignor]}
{MAPPING if self.mapped else ""}"""
        # An instance that was started a moment ago may be reading it: the file is never half there.
        staging = path.with_suffix(".tmp")
        staging.write_text(text)
        staging.replace(path)
        return path

    # Instances of taod. The first of the list is the one that stays.

    def start(self, environment=None):
        instance = parts.Taod(self.run.binary, self.config(), self.folder / "taod.log", environment)
        self.instances.append(instance)
        return instance

    @property
    def main(self):
        if not self.instances:
            self.start()
        return self.instances[0]

    def kill(self, instance):
        self.run.count("kills")
        instance.kill()
        self.instances.remove(instance)

    def stop(self, instance):
        self.run.count("orderly stops")
        # A signal may come before there is a handler for it.
        if instance.stop() not in (0, -signal.SIGTERM):
            raise Violation(f"an instance that was told to stop ended with {instance.process.returncode}:\n{instance.said()}")
        self.instances.remove(instance)

    def end(self, instance):
        """Ends an instance in one of the two ways."""
        if self.rng.random() < 0.5:
            self.kill(instance)
        else:
            self.stop(instance)

    def replace(self, environment=None):
        """Ends what runs and starts another with more environment."""
        for instance in list(self.instances):
            self.end(instance)
        return self.start(environment)

    def tool(self, *arguments, crash_at=None):
        """Runs another command of taod on these tables beside what runs; a crash is run again to its end."""
        environment = parts.environment({"TAOD_CRASH_AT": crash_at} if crash_at else {})
        command = [str(self.run.binary), *arguments, "--config", str(self.config())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        # It may be the child of the command that killed itself; the command then ends with an error.
        killed = crash_at is not None and done.returncode != 0
        self.run.count(f"{' '.join(arguments[:2])}{f', killed {crash_at}' if killed else ''}")
        if killed:
            return self.tool(*arguments)
        return done

    # What happens in a cycle.

    def produce(self, low=20, high=200):
        self.log.send(self.rng.randint(low, high))

    def pause(self, low, high):
        time.sleep(self.rng.uniform(low, high))

    def settle(self):
        """Lets ingestion go on until everything produced is stored, checking each new version on the way."""
        self.log.flush()
        while len(self.instances) > 1:
            self.end(self.instances[-1])
        begun, nudged = time.monotonic(), time.monotonic()
        while True:
            self.advance()
            if self.checker.lag(self.ends()) == 0:
                return
            now = time.monotonic()
            if not self.main.is_alive():
                raise Violation(f"taod ended with {self.main.process.returncode}:\n{self.main.said()}")
            if now - begun > PROGRESS_S:
                (self.folder / "stacks.txt").write_text(self.main.stacks())
                raise Violation(f"no progress within {PROGRESS_S} s: {self.behind()}\n{self.main.said()}")
            if now - nudged > 6 and "wait_s=" in self.main.said() and not self.is_short_wait():
                # It waits longer than a cycle before it tries again, as it should; a cycle does not.
                self.run.count("waits cut short")
                self.replace()
                nudged = now
            time.sleep(0.05)

    def is_short_wait(self):
        return int(self.main.said().rsplit("wait_s=", 1)[1].split()[0]) <= 2

    def advance(self):
        self.run.count("versions", self.checker.advance())

    def ends(self):
        ends = {}
        for partition, offset in self.log.ledger.entries:
            ends[partition] = max(ends.get(partition, 0), offset + 1)
        return ends

    def behind(self):
        offsets = self.checker.offsets
        return {p: (offsets.get(p, 0), end) for p, end in self.ends().items() if offsets.get(p, 0) < end}

    def foreign_commit(self, actions):
        """Commits to `queries` as another writer would; returns the version."""
        lines = [{"commitInfo": {"timestamp": int(time.time() * 1000), "operation": "FOREIGN"}}, *actions]
        data = "\n".join(json.dumps(line) for line in lines).encode()
        version = self.checker.queries.version + 1
        while not self.store.create(log_path("queries", version), data):
            version += 1
        return version

    # The end of an era.

    def finish(self):
        """Stores the rest, then reads everything with readers that share no code with taod."""
        for instance in list(self.instances):
            self.stop(instance)
        self.log.flush()
        last = parts.Taod(self.run.binary, self.config(), self.folder / "taod.log", until_idle=True)
        if last.process.wait(180) != 0:
            raise Violation(f"taod ingest --until-idle ended with {last.process.returncode}:\n{last.said()}")
        self.advance()
        self.check_ends()
        for table in (self.checker.queries, self.checker.letters):
            readers.compare(self, table)
        self.run.count("rows", len(self.checker.queries.present))
        self.run.count("dead letters", len(self.checker.letters.present))
        self.run.count("records produced", self.log.produced)

    def check_ends(self):
        """Every partition's offset is the log's very end, control records included."""
        consumer = Consumer({"bootstrap.servers": self.run.kafka.brokers, "group.id": "harness"})
        try:
            for partition in range(self.partitions):
                _, high = consumer.get_watermark_offsets(TopicPartition(self.name, partition), timeout=30)
                stored = self.checker.offsets.get(partition, 0)
                if stored != high:
                    raise Violation(f"partition {partition} is stored to {stored}, and the log ends at {high}")
        finally:
            consumer.close()

    def close(self, keep):
        for instance in list(self.instances):
            instance.kill()
        if keep:
            return
        if self.mounted:
            parts.unmount(self.folder / "tables")
        if self.kind == "s3":
            for path in self.store.list(""):
                self.store.delete(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        # Not waited for: the broker goes with the sitting.
        self.run.admin.delete_topics([self.name])
