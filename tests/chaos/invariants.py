"""The invariants, held at every version of the tables.

The Delta log is read entry by entry and each data file once, so that a cycle costs what is new. At every version of
`queries`: no coordinate (partition, offset, record index) stands there twice; no offset went back; every visible record
below a partition's offset is there as its rows, its dead letters or nothing (where it is nothing), and no record at or
beyond it is; every file that the log names exists whole; each row's bytes are the producer's; nothing that stood there
before is gone. `dead_letters` holds each letter once, with the record's own bytes, and shares no coordinate with the rows but for letters
that were replayed.
"""

import io
import json
import urllib.parse
from collections import Counter

import pyarrow.parquet as parquet

from ledger import sha


class Violation(Exception):
    """Something that must never be. The message names the table, the version and the exact coordinates."""


def log_path(table, version):
    return f"{table}/_delta_log/{version:020}.json"


class Table:
    """One table, followed version by version: what stands in it now."""

    COLUMNS = {
        "queries": ["partition", "offset", "record_index", "messages", "response"],
        "dead_letters": ["partition", "offset", "record_index", "payload"],
    }

    def __init__(self, store, name, erased=frozenset()):
        self.store, self.name = store, name
        # The coordinates that may go, and may not come back.
        self.erased = erased
        self.version = -1
        self.files = {}
        self.present = {}
        self.txns = {}

    def fail(self, what):
        raise Violation(f"{self.name} at version {self.version}: {what}")

    def next_entry(self):
        """Returns the actions of the next version, or None where it is not there yet."""
        data = self.store.read(log_path(self.name, self.version + 1))
        if data is None:
            return None
        self.version += 1
        try:
            return [json.loads(line) for line in data.decode().split("\n") if line]
        except ValueError as error:
            self.fail(f"the log entry is not JSON lines: {error}")

    def rows_of(self, add):
        """Reads a data file: coordinate to the hash of what the row holds."""
        path = urllib.parse.unquote(add["path"])
        data = self.store.read(f"{self.name}/{path}")
        if data is None:
            self.fail(f"the log names {path}, which does not exist")
        if len(data) != add["size"]:
            self.fail(f"{path} has {len(data)} bytes, the log says {add['size']}")
        try:
            # Without Arrow's pool of threads: where one still starts as the process ends, the process aborts.
            columns = parquet.ParquetFile(io.BytesIO(data)).read(self.COLUMNS[self.name], use_threads=False).to_pydict()
        except Exception as error:
            self.fail(f"{path} cannot be read: {error}")
        rows = {}
        for row in zip(*(columns[name] for name in self.COLUMNS[self.name])):
            place = tuple(row[:3])
            if place in rows:
                self.fail(f"{place} stands twice in {path}")
            rows[place] = content(self.name, row)
        stats = json.loads(add.get("stats") or "{}")
        if stats.get("numRecords", len(rows)) != len(rows):
            self.fail(f"{path} holds {len(rows)} rows, the log says {stats['numRecords']}")
        return rows

    def apply(self, actions):
        """Takes in one version; returns the rows of its new files and the offsets it moved."""
        added, gone, moved = {}, Counter(), {}
        for action in actions:
            if "remove" in action:
                path = action["remove"]["path"]
                if path not in self.files:
                    self.fail(f"it removes {path}, which it does not hold")
                gone.update(self.files.pop(path))
            elif "txn" in action:
                txn = action["txn"]
                before = self.txns.get(txn["appId"])
                if before is not None and txn["version"] < before:
                    self.fail(f"{txn['appId']} went back from {before} to {txn['version']}")
                moved[txn["appId"]] = (before, txn["version"])
                self.txns[txn["appId"]] = txn["version"]
        for place in gone:
            self.present.pop(place, None)
        for action in actions:
            if "add" not in action:
                continue
            add = action["add"]
            rows = self.rows_of(add)
            self.files[add["path"]] = list(rows)
            for place, digest in rows.items():
                if place in self.present:
                    self.fail(f"{place} stands twice: in {add['path']} and before")
                self.present[place] = digest
                added[place] = digest
        lost = [place for place in gone if place not in added and place not in self.erased]
        if lost:
            self.fail(f"{len(lost)} rows are gone, the first {min(lost)}")
        return added, moved

    def jump(self, version, files, txns):
        """Goes to a later version at once, where entries on the way are gone or name files that are."""
        actions = [{"txn": {"appId": app_id, "version": offset}} for app_id, offset in txns.items()]
        actions += [{"remove": {"path": path}} for path in self.files if path not in files]
        actions += [{"add": {"path": path, "size": size}} for path, size in files.items() if path not in self.files]
        self.version = version
        return self.apply(actions)


def content(table, row):
    """Returns the hash that the producer's ledger has for a row."""
    if table == "dead_letters":
        return sha(row[3])
    return sha(json.loads(row[3])[-1]["content"], row[4])


class Checker:
    """Both tables of one topic against its ledger."""

    def __init__(self, store, ledger, prefix):
        self.ledger, self.prefix = ledger, prefix
        self.erased = set()
        # Dead letters that may have become rows since.
        self.replayed = set()
        self.queries = Table(store, "queries", self.erased)
        self.letters = Table(store, "dead_letters")
        self.offsets = {}

    def advance(self):
        """Checks every version that is new; returns how many there were. The producer must have been flushed."""
        versions = 0
        while (actions := self.queries.next_entry()) is not None:
            # Letters are committed before the rows of their epoch: what is there now holds all that belong to these.
            self.advance_letters()
            self.take(*self.queries.apply(actions))
            versions += 1
        self.advance_letters()
        return versions

    def jump(self, snapshot):
        """Checks the newest version of both tables as a whole; `snapshot` tells (version, files, offsets) of a table."""
        queries = snapshot("queries")
        self.take_letters(self.letters.jump(*snapshot("dead_letters"))[0])
        self.take(*self.queries.jump(*queries))

    def advance_letters(self):
        while (actions := self.letters.next_entry()) is not None:
            self.take_letters(self.letters.apply(actions)[0])

    def take_letters(self, added):
        for place, digest in added.items():
            entry = self.entry(self.letters, place)
            if place[2] not in entry.letters:
                self.letters.fail(f"{place} is a dead letter and could have been read")
            if digest != entry.payload:
                self.letters.fail(f"{place} does not hold the bytes that were produced")
            if place in self.queries.present and place not in self.replayed:
                self.letters.fail(f"{place} is a row of queries, too")

    def entry(self, table, place):
        entry = self.ledger.entries.get(place[:2])
        if entry is None:
            table.fail(f"{place} was never produced")
        if not entry.visible:
            table.fail(f"{place} belongs to a transaction that was aborted")
        return entry

    def take(self, added, moved):
        fail = self.queries.fail
        for place, digest in added.items():
            entry = self.entry(self.queries, place)
            if place[2] not in entry.rows:
                fail(f"{place} is a row and cannot be one")
            if digest != entry.rows[place[2]]:
                fail(f"{place} does not hold what was produced")
            if place in self.letters.present and place not in self.replayed:
                fail(f"{place} is a dead letter, too")
            if place in self.erased:
                fail(f"{place} was erased and is there again")
        for app_id, (before, after) in moved.items():
            if not app_id.startswith(self.prefix):
                continue
            rest = app_id[len(self.prefix):]
            if not rest.isdigit():
                # The number of a holding: that it never goes back is checked with all positions.
                continue
            partition = int(rest)
            for offset in range(before or 0, after):
                self.complete(partition, offset)
            self.offsets[partition] = after
        for place in added:
            if place[1] >= self.offsets.get(place[0], 0):
                fail(f"{place} lies at or beyond its partition's offset {self.offsets.get(place[0])}")

    def complete(self, partition, offset):
        """The record must be in the tables, whole."""
        entry = self.ledger.entries.get((partition, offset))
        if entry is None or not entry.visible:
            # A control record, or one that a transaction took back.
            return
        places = [(partition, offset, index) for index in {*entry.rows, *entry.letters}]
        there = (self.queries.present, self.letters.present, self.erased)
        missing = [place for place in places if not any(place in table for table in there)]
        # Compaction may take a record away between a crash and the next reading: its dead letters are then there alone.
        if not missing or self.ledger.is_superseded(partition, offset, entry):
            return
        self.queries.fail(f"{missing} lost: the partition's offset passed them by")

    def lag(self, ends):
        """Returns how many offsets are not stored, given the end of each partition."""
        return sum(max(0, end - self.offsets.get(partition, 0)) for partition, end in ends.items())
