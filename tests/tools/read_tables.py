"""Reads Delta tables with python deltalake, DuckDB and Polars: prints counts and a hash over all rows and columns.

usage: read_tables.py FOLDER...

One JSON line per table: {"table", "version", "columns", "deltalake": {"rows", "sha256"}, "duckdb": {...}, "polars": {...}}.
"""

import glob
import json
import os
import sys
import tempfile

import duckdb
import duckdb_extension_delta
import polars
import pyarrow
from deltalake import DeltaTable, QueryBuilder

from digest import digest


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


def by_polars(folder, columns):
    return digest(polars.scan_delta(folder).select(columns).collect().rows())


def main():
    for folder in sys.argv[1:]:
        version, columns, first = by_deltalake(folder)
        line = {"table": os.path.basename(folder.rstrip("/")), "version": version, "columns": columns}
        line.update(deltalake=first, duckdb=by_duckdb(folder, columns), polars=by_polars(folder, columns))
        print(json.dumps(line), flush=True)


main()
