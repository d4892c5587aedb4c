"""Reads Delta tables with python deltalake and with DuckDB: prints counts and a hash over all rows and columns.

usage: read_tables.py FOLDER...

One JSON line per table: {"table", "version", "columns", "deltalake": {"rows", "sha256"}, "duckdb": {...}}.
The hash does not depend on the order of rows: each row becomes one line (see `encode`), the lines are sorted by their
bytes, and SHA-256 goes over the lines with a line break after each. tests/it/readers.rs does the same.
"""

import datetime
import glob
import hashlib
import json
import os
import struct
import sys
import tempfile

import duckdb
import duckdb_extension_delta
import pyarrow
from deltalake import DeltaTable, QueryBuilder

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
DAY_0 = EPOCH.date()


def encode(value):
    """One value as bytes: a letter for its type, and for text and bytes its length, so that rows cannot run together."""
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"b1" if value else b"b0"
    if isinstance(value, float):
        return b"d" + struct.pack(">d", value).hex().encode()
    if isinstance(value, int):
        return b"i%d" % value
    if isinstance(value, str):
        data = value.encode()
        return b"s%d:" % len(data) + data
    if isinstance(value, (bytes, bytearray)):
        return b"x" + bytes(value).hex().encode()
    if isinstance(value, datetime.datetime):
        delta = value.astimezone(datetime.timezone.utc) - EPOCH
        return b"t%d" % (delta // datetime.timedelta(microseconds=1))
    if isinstance(value, datetime.date):
        return b"D%d" % (value - DAY_0).days
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(encode(item) for item in value) + b"]"
    raise TypeError(f"no encoding for {type(value)}")


def digest(rows):
    lines = sorted(b"|".join(encode(value) for value in row) for row in rows)
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line + b"\n")
    return {"rows": len(lines), "sha256": whole.hexdigest()}


def rows_of(found):
    return zip(*(column.to_pylist() for column in found.columns))


def by_deltalake(folder):
    table = DeltaTable(folder)
    query = QueryBuilder().register("t", table).execute("select * from t")
    found = pyarrow.table(query.read_all())
    return table.version(), found.column_names, digest(rows_of(found))


def by_duckdb(folder, columns):
    root = os.path.dirname(duckdb_extension_delta.__file__)
    extension = glob.glob(root + "/**/*.duckdb_extension", recursive=True)[0]
    with tempfile.TemporaryDirectory() as extensions:
        connection = duckdb.connect(config={"extension_directory": extensions})
        connection.execute(f"INSTALL '{extension}'")
        connection.execute("LOAD delta")
        connection.execute("SET TimeZone = 'UTC'")
        names = ", ".join(f'"{name}"' for name in columns)
        found = connection.execute(f"SELECT {names} FROM delta_scan('{folder}')").to_arrow_table()
    return digest(rows_of(found))


def main():
    for folder in sys.argv[1:]:
        version, columns, first = by_deltalake(folder)
        line = {"table": os.path.basename(folder.rstrip("/")), "version": version, "columns": columns}
        line.update(deltalake=first, duckdb=by_duckdb(folder, columns))
        print(json.dumps(line), flush=True)


main()
