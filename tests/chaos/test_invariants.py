"""The checker must find what it is for: each wreck of a small table is told with its coordinates."""

import io
import json
import unittest

import pyarrow
import pyarrow.parquet as parquet

from invariants import Checker, Violation, log_path
from ledger import Entry, Ledger, sha
from stores import Memory

APP = "taod/kafka/0/t/"


class Tables:
    """Tables in memory and the ledger of what was produced: rows at 0/0 and 0/2, a dead letter at 0/1, nothing at 0/3."""

    def __init__(self):
        self.store, self.ledger = Memory(), Ledger()
        self.versions = {"queries": 0, "dead_letters": 0}
        for offset in (0, 2):
            self.ledger.add(0, offset, Entry({0: sha(f"q{offset}", f"a{offset}")}))
        self.ledger.add(0, 1, Entry({}, (0,), payload=b"bad"))
        self.ledger.add(0, 3, Entry())
        self.checker = Checker(self.store, self.ledger, APP)

    def commit(self, table, *actions):
        version = self.versions[table]
        self.store.files[log_path(table, version)] = "\n".join(json.dumps(action) for action in actions).encode()
        self.versions[table] += 1

    def file(self, table, *rows, name):
        names = ["partition", "offset", "record_index"]
        names += ["messages", "response"] if table == "queries" else ["payload"]
        out = io.BytesIO()
        parquet.write_table(pyarrow.table([list(column) for column in zip(*rows)], names=names), out)
        self.store.files[f"{table}/{name}"] = out.getvalue()
        return {"add": {"path": name, "size": len(out.getvalue()), "stats": json.dumps({"numRecords": len(rows)})}}

    def rows(self, *offsets, name="f", text="q"):
        rows = [(0, o, 0, json.dumps([{"role": "user", "content": f"{text}{o}"}]), f"a{o}") for o in offsets]
        return self.file("queries", *rows, name=name)

    def letter(self, offset=1, payload=b"bad"):
        self.commit("dead_letters", self.file("dead_letters", (0, offset, 0, payload), name=f"d{offset}"))

    def whole(self):
        self.letter()
        self.commit("queries", self.rows(0, 2), txn(4))


def txn(version):
    return {"txn": {"appId": f"{APP}0", "version": version}}


class CheckerTest(unittest.TestCase):
    def found(self, tables, *parts):
        with self.assertRaises(Violation) as caught:
            tables.checker.advance()
        for part in parts:
            self.assertIn(part, str(caught.exception))

    def test_what_is_right_passes(self):
        tables = Tables()
        tables.whole()
        self.assertEqual(tables.checker.advance(), 1)
        self.assertEqual(tables.checker.lag({0: 4}), 0)

    def test_a_doubled_row(self):
        tables = Tables()
        tables.whole()
        tables.commit("queries", tables.rows(2, name="again"))
        self.found(tables, "version 1", "(0, 2, 0) stands twice")

    def test_a_lost_row(self):
        tables = Tables()
        tables.letter()
        tables.commit("queries", tables.rows(0), txn(4))
        self.found(tables, "[(0, 2, 0)] lost")

    def test_a_lost_dead_letter(self):
        tables = Tables()
        tables.commit("queries", tables.rows(0, 2), txn(4))
        self.found(tables, "[(0, 1, 0)] lost")

    def test_a_row_beyond_the_offset(self):
        tables = Tables()
        tables.letter()
        tables.commit("queries", tables.rows(0, 2), txn(2))
        self.found(tables, "(0, 2, 0) lies at or beyond")

    def test_an_offset_that_goes_back(self):
        tables = Tables()
        tables.whole()
        tables.commit("queries", txn(3))
        self.found(tables, "went back from 4 to 3")

    def test_other_bytes(self):
        tables = Tables()
        tables.commit("queries", tables.rows(0, text="x"), txn(1))
        self.found(tables, "(0, 0, 0) does not hold what was produced")
        tables = Tables()
        tables.letter(payload=b"worse")
        self.found(tables, "(0, 1, 0) does not hold the bytes")

    def test_a_row_that_is_a_dead_letter_too(self):
        tables = Tables()
        tables.ledger.add(0, 1, Entry({0: sha("q1", "a1")}, (0,), either=True, payload=b"bad"))
        tables.letter()
        tables.commit("queries", tables.rows(0, 1), txn(2))
        self.found(tables, "(0, 1, 0) is a dead letter, too")

    def test_a_row_of_an_aborted_transaction(self):
        tables = Tables()
        tables.ledger.entries[0, 2].visible = False
        tables.whole()
        self.found(tables, "(0, 2, 0) belongs to a transaction that was aborted")

    def test_a_file_that_is_gone(self):
        tables = Tables()
        tables.whole()
        del tables.store.files["queries/f"]
        self.found(tables, "names f, which does not exist")

    def test_merged_files_keep_their_rows(self):
        for kept, part in (((0, 2), None), ((0,), "1 rows are gone, the first (0, 2, 0)")):
            tables = Tables()
            tables.whole()
            tables.commit("queries", {"remove": {"path": "f"}}, tables.rows(*kept, name="merged"))
            if part:
                self.found(tables, part)
            else:
                tables.checker.advance()

    def test_a_record_that_compaction_dropped(self):
        tables = Tables()
        tables.ledger.add(0, 1, Entry({0: sha("q1", "a1")}, key=b"k"))
        tables.ledger.add(0, 2, Entry({0: sha("q2", "a2")}, key=b"k"))
        tables.commit("queries", tables.rows(0, 2), txn(4))
        tables.checker.advance()


if __name__ == "__main__":
    unittest.main()
