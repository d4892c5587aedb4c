"""The faults. Each is a function of an era: it produces, breaks something, and leaves it whole again.

Which one comes, and with which numbers, is drawn by the era's seed; when exactly it strikes is left to the machine.
"""

import json
import os
import signal
import time
import uuid

from confluent_kafka.admin import NewPartitions

import parts
import readers
from invariants import Violation, log_path
from proxy import KINDS, Rule

POINTS = ["after_poll", "after_seal", "during_upload", "after_upload", "after_put", "during_checkpoint",
          "between_letters_and_rows"]
CHECKPOINT_EVERY = 100


def kill(era):
    """SIGKILL at a random moment."""
    era.main
    era.produce()
    era.pause(0, 1.2)
    era.kill(era.main)
    era.start()


def wait_for_crash(era, instance):
    """Feeds an armed instance until it has killed itself."""
    begun = fed = time.monotonic()
    while instance.is_alive() and time.monotonic() - begun < 12:
        era.log.plain.poll(0.02)
        if time.monotonic() - fed > 1:
            era.produce(40, 80)
            fed = time.monotonic()
    if instance.is_alive():
        era.run.count(f"{instance.crash_at.split(':')[0]} not come by")
        return era.kill(instance)
    if instance.process.returncode != -signal.SIGKILL:
        raise Violation(f"an armed instance ended with {instance.process.returncode}:\n{instance.said()}")
    era.run.count("kills")
    era.instances.remove(instance)


def crash(point):
    def fault(era):
        if point == "during_checkpoint":
            era.main
            wait_for_table(era)
        for instance in list(era.instances):
            era.end(instance)
        nth = era.rng.choice([1, 1, 2, 3])
        if point == "during_checkpoint":
            nth = 1
            pad(era)
        armed = era.start({"TAOD_CRASH_AT": f"{point}:{nth}"})
        era.produce(150, 400)
        wait_for_crash(era, armed)
        era.start()

    fault.__name__ = f"crash_{point}"
    fault.__doc__ = f"SIGKILL at the crash point {point}."
    return fault


def pad(era):
    """Brings the log to where the next commits make a checkpoint due."""
    era.log.flush()
    era.checker.advance()
    while era.checker.queries.version % CHECKPOINT_EVERY not in (97, 98):
        era.foreign_commit([])
        era.checker.advance()


def zombie(era):
    """SIGSTOP for longer than the session time-out while a second instance takes over, then SIGCONT."""
    first = era.main
    era.produce()
    era.pause(0, 0.8)
    first.signal(signal.SIGSTOP)
    second = era.start()
    era.produce()
    era.pause(1.4, 2.4)
    first.signal(signal.SIGCONT)
    era.produce()
    era.pause(0.1, 0.8)
    era.end(era.rng.choice([first, second]))


def rebalance(era):
    """A second instance that comes and goes."""
    era.main
    for _ in range(2):
        other = era.start()
        era.produce(10, 100)
        era.pause(0.3, 1.0)
        era.end(other)


def broker_kill(era):
    """The broker is killed and started again."""
    era.main
    era.produce()
    era.pause(0, 0.4)
    era.run.kafka.stop("-9")
    era.run.kafka.start()
    era.produce()


def broker_restart(era):
    """The broker is stopped in order and started again."""
    era.main
    era.produce()
    era.run.kafka.stop()
    era.run.kafka.start()
    era.produce()


def partitions(era):
    """The topic gets another partition."""
    era.main
    era.produce()
    if era.partitions < 12:
        era.log.flush()
        total = era.partitions + 1
        era.run.admin.create_partitions([NewPartitions(era.name, total)])[era.name].result(30)
        known = lambda: len(era.log.plain.list_topics(era.name, timeout=10).topics[era.name].partitions) == total
        parts.wait_for("the new partition", known, 30)
        era.partitions = era.log.partitions = total
        if era.log.transactional:
            era.log.transactional.list_topics(era.name, timeout=10)
    era.produce()


def transactions(era):
    """Transactions, some of them aborted, and sometimes a kill between."""
    era.main
    for _ in range(era.rng.randint(2, 4)):
        commit = era.rng.random() < 0.5
        era.log.transaction(era.rng.randint(3, 40), commit)
        era.run.count("transactions committed" if commit else "transactions aborted")
        if era.rng.random() < 0.2:
            era.kill(era.main)
            era.start()


def store(era):
    """The store answers wrongly, late or not at all."""
    rules = []
    for number in range(era.rng.randint(1, 3)):
        kind = era.rng.choice(sorted(KINDS))
        method, part = era.rng.choice([("PUT", "part-"), ("PUT", ""), ("GET", "_delta_log"), ("*", "")])
        if number == 0:
            # A commit cannot do without this one.
            method, part = "PUT", "_delta_log"
        seconds = era.rng.uniform(0.2, 1.0) if kind == "slow" else 2.5
        rules.append(Rule(kind, method, part, era.rng.randint(1, 4), seconds))
    era.main
    era.run.proxy.set(rules)
    era.produce()
    era.pause(0.8, 2.0)
    for rule in rules:
        era.run.count(f"store: {rule.kind}", rule.used)
    era.run.proxy.clear()


def slow_rebalance(era):
    """The store is slow to read while a second instance comes and goes: rebalances run into their time-out."""
    era.main
    era.run.proxy.set([Rule("slow", "GET", "", 10_000, era.rng.uniform(0.5, 1.9))])
    for _ in range(2):
        other = era.start()
        era.produce(10, 100)
        era.pause(1.0, 12.0)
        era.end(era.rng.choice([era.main, other]))
    era.run.count("store: slow", era.run.proxy.clear())


def network(era):
    """The network between taod and Kafka is slow, cut, or loses connections."""
    toxics = [
        ("latency", "downstream", {"latency": 400, "jitter": 300}),
        ("timeout", "downstream", {"timeout": 0}),
        ("timeout", "upstream", {"timeout": 0}),
        ("reset_peer", "downstream", {"timeout": 100}),
        ("bandwidth", "downstream", {"rate": 20}),
        ("limit_data", "downstream", {"bytes": 20_000}),
        ("slicer", "downstream", {"average_size": 200, "size_variation": 100, "delay": 500}),
    ]
    toxic = era.rng.choice([None, *toxics])
    era.main
    era.produce()
    if toxic is None:
        era.run.toxiproxy.enable(False)
    else:
        era.run.toxiproxy.toxic(*toxic)
    era.run.count(f"network: {toxic[0] if toxic else 'cut'}")
    era.produce(10, 60)
    era.pause(0.8, 2.2)
    era.run.toxiproxy.heal()


def disk_full(era):
    """The disk is full for a while."""
    era.main
    filler = era.folder / "tables/filler"
    free = os.statvfs(era.folder / "tables")
    # Not buffered: a buffer would be written, and fail, when the file is closed.
    with open(filler, "wb", buffering=0) as file:
        left = free.f_bavail * free.f_frsize - era.rng.choice([0, 4096, 20_000])
        try:
            for _ in range(max(0, left) // 4096):
                file.write(bytes(4096))
        except OSError:
            pass
    era.produce()
    era.pause(1.0, 2.0)
    filler.unlink()


def clock(era):
    """The clock of an instance is wrong from its start, or jumps while it runs."""
    hours = era.rng.choice([30, -720, -2, 1])
    jumps = era.rng.random() < 0.5
    era.run.count(f"clock: {hours:+} h{', while running' if jumps else ''}")
    wrong = parts.Clock(era.run.clock, era.folder / "clock")
    wrong.set(0 if jumps else hours * 3600)
    era.replace(wrong.environment)
    era.produce()
    era.pause(0.2, 1.5)
    wrong.set(hours * 3600)
    era.produce()


def mapping(era):
    """Killed between the commit of the dead letters and that of the rows, then started with another mapping."""
    for instance in list(era.instances):
        era.end(instance)
    armed = era.start({"TAOD_CRASH_AT": "between_letters_and_rows"})
    era.produce(100, 250)
    wait_for_crash(era, armed)
    era.mapped = not era.mapped
    era.start()


def protocol(features):
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"],
                         "writerFeatures": ["appendOnly", "invariants", "deletionVectors", *features]}}


def foreign_feature(era):
    """Another writer switches a table feature on that ingestion can live with, as Spark does for deletion vectors."""
    era.main
    era.produce()
    wait_for_table(era)
    era.foreign_commit([protocol([])])
    era.produce()


def foreign_refused(era):
    """Another writer switches a feature on that taod must refuse by name; the table is then put back."""
    era.main
    wait_for_table(era)
    version = era.foreign_commit([protocol(["rowTracking", "domainMetadata"])])
    era.produce()
    end = time.monotonic() + 30
    while era.main.is_alive() and time.monotonic() < end:
        era.log.plain.poll(0.05)
    said = era.main.said()
    if era.main.is_alive() or era.main.process.returncode != 1 or "rowTracking" not in said:
        raise Violation(f"a table that asks for rowTracking at version {version} was not refused by name:\n{said}")
    era.instances.remove(era.main)
    era.store.delete(log_path("queries", version))
    era.start()


def foreign_compaction(era):
    """Another writer merges the table's small files while ingestion goes on."""
    era.main
    era.produce()
    wait_for_table(era)
    try:
        merged = readers.open_table(era, "queries").optimize.compact()
        era.run.count("files merged by another writer", merged["numFilesRemoved"])
    except Exception as error:
        # It may lose the race against ingestion; that is its own affair.
        era.run.count("merges by another writer that lost a race")
        era.run.say(f"  a foreign merge failed: {str(error)[:200]}")
    era.produce(10, 60)


def maintenance(era):
    """taod's own maintenance beside ingestion, twice at once or killed while it merges files."""
    era.main
    era.produce()
    wait_for_table(era)
    crash_at = era.rng.choice([None, "during_compaction:1", "during_compaction:2", "during_checkpoint"])
    done = era.tool("table", "maintain", crash_at=crash_at)
    if done.returncode not in (0, 1) or "panicked" in done.stderr:
        raise Violation(f"maintenance ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    era.produce(10, 60)


def erasure(era):
    """Rows are erased beside ingestion, sometimes with a kill in the midst; they go and do not come back."""
    era.main
    era.produce()
    era.settle()
    here = [(place[:2], entry.request) for place in era.checker.queries.present
            if (entry := era.log.ledger.entries[place[:2]]).request and place not in era.checker.erased]
    if not here:
        return
    chosen = era.rng.sample(sorted(here), min(len(here), era.rng.randint(1, 3)))
    era.checker.erased |= {(*place, 0) for place, _ in chosen}
    era.produce()
    crash_at = era.rng.choice([None, "during_erasure:1", "during_erasure:2", "during_erasure:3"])
    done = era.tool("table", "erase", "--request-id", *[request for _, request in chosen], crash_at=crash_at)
    if done.returncode != 0:
        raise Violation(f"an erasure ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    era.log.flush()
    era.checker.jump(lambda name: readers.snapshot(era, name))
    back = [place for place, _ in chosen if (*place, 0) in era.checker.queries.present]
    if back:
        raise Violation(f"{back} were erased and are still there")
    era.run.count("rows erased", len(chosen))


def replay(era):
    """Dead letters that another mapping can read are replayed beside ingestion, sometimes with a kill in the midst."""
    if era.mapped:
        era.mapped = False
        era.replace()
    era.main
    era.produce()
    era.settle()
    era.mapped = True
    era.replace()
    entries = era.log.ledger.entries
    readable = {place for place in era.checker.letters.present if entries[place[:2]].either}
    era.checker.replayed |= readable
    era.produce(10, 60)
    crash_at = era.rng.choice([None, "during_upload", "after_upload", "after_put"])
    done = era.tool("replay", crash_at=crash_at)
    if done.returncode != 0:
        raise Violation(f"a replay ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    era.log.flush()
    era.advance()
    left = sorted(place for place in readable if place not in era.checker.queries.present)
    if left:
        raise Violation(f"{len(left)} dead letters were not replayed, the first {left[0]}:\n{done.stdout}")
    era.run.count("dead letters replayed", len(readable))


def wait_for_table(era):
    """Ingestion makes the table at its first start."""
    end = time.monotonic() + 60
    while era.checker.queries.version < 0:
        era.log.flush()
        era.advance()
        if time.monotonic() > end:
            raise Violation(f"no table within 60 s:\n{era.main.said()}")
        time.sleep(0.05)


# Each fault with its weight and what it needs.
FAULTS = [
    (kill, 10, None),
    *[(crash(point), 4, None) for point in POINTS],
    (zombie, 8, None),
    (rebalance, 8, None),
    (broker_kill, 2, None),
    (broker_restart, 1, None),
    (partitions, 3, None),
    (transactions, 6, "plain"),
    (store, 24, "s3"),
    (slow_rebalance, 4, "s3"),
    (network, 8, "toxiproxy"),
    (disk_full, 10, "tmpfs"),
    (clock, 8, "clock"),
    (mapping, 6, None),
    (foreign_feature, 2, None),
    (foreign_refused, 2, None),
    (foreign_compaction, 4, None),
    (maintenance, 8, "maintenance"),
    (erasure, 5, "erasure"),
    (replay, 5, "replay"),
]


def fits(era, need):
    """Returns true where an era can have a fault that needs `need`."""
    return {
        None: True,
        "plain": not era.compacted,
        "s3": era.kind == "s3",
        "tmpfs": era.kind == "tmpfs",
        "toxiproxy": era.run.toxiproxy is not None,
        # A store refuses a signature of another day, and rightly so.
        "maintenance": era.run.has_maintenance,
        "erasure": era.run.has_erasure,
        "replay": era.run.has_replay,
        "clock": era.kind != "s3" and era.run.clock is not None,
    }[need]


def pick(era, only=None):
    choices = [(fault, weight) for fault, weight, need in FAULTS
               if fits(era, need) and fault.__name__.startswith(only or "")]
    choices = choices or [(kill, 1)]
    return era.rng.choices([fault for fault, _ in choices], [weight for _, weight in choices])[0]


# Wrecks of the table that the checker must find: `--sabotage NAME` makes one and the run must fail.

def duplicate(era):
    """A data file is added a second time under another name."""
    entry = newest_add(era)
    copy = f"part-00000-{uuid.uuid4()}-c000.zstd.parquet"
    era.store.create(f"queries/{copy}", era.store.read(f"queries/{entry['path']}"))
    era.foreign_commit([{"add": {**entry, "path": copy}}])


def drop(era):
    """A data file is removed."""
    entry = newest_add(era)
    era.foreign_commit([{"remove": {"path": entry["path"], "dataChange": True, "deletionTimestamp": 0}}])


def lose(era):
    """A data file vanishes."""
    entry = newest_add(era)
    era.store.delete(f"queries/{entry['path']}")
    path = f"part-00000-{uuid.uuid4()}-c000.zstd.parquet"
    era.foreign_commit([{"add": {**entry, "path": path}}])


def newest_add(era):
    for version in range(era.checker.queries.version, 0, -1):
        for line in era.store.read(log_path("queries", version)).decode().splitlines():
            action = json.loads(line)
            if "add" in action:
                return action["add"]
    raise RuntimeError("the table has no file yet")


SABOTAGE = {"duplicate": duplicate, "drop": drop, "lose": lose}
