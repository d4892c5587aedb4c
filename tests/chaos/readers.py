"""A table as python deltalake and DuckDB read it, against what the checker made of the log."""

import glob
import os
import tempfile

import duckdb
import duckdb_extension_delta
import pyarrow
from deltalake import DeltaTable, QueryBuilder

import parts
from invariants import Table, Violation, content


def storage_options(era):
    if era.kind != "s3":
        return None
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{era.run.s3.port}", "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": parts.KEY_ID, "AWS_SECRET_ACCESS_KEY": parts.KEY, "AWS_REGION": "us-east-1"}


def open_table(era, name):
    return DeltaTable(f"{era.root}/{name}", storage_options=storage_options(era))


def snapshot(era, name):
    """Returns the newest version of a table, its files with their sizes, and its offsets."""
    table = open_table(era, name)
    actions = pyarrow.table(table.get_add_actions(flatten=True)).to_pydict()
    # Those seen before, and those of partitions that came since.
    app_ids = {*era.checker.queries.txns, *(f"{era.checker.prefix}{p}" for p in range(era.partitions))}
    found = {app_id: table.transaction_version(app_id) for app_id in app_ids}
    txns = {app_id: version for app_id, version in found.items() if version is not None}
    return table.version(), dict(zip(actions["path"], actions["size_bytes"])), txns


def columns_of(name):
    return ", ".join(f'"{column}"' for column in Table.COLUMNS[name])


def by_deltalake(era, name):
    query = QueryBuilder().register("t", open_table(era, name)).execute(f"select {columns_of(name)} from t")
    return pyarrow.table(query.read_all())


def by_duckdb(era, name):
    root = os.path.dirname(duckdb_extension_delta.__file__)
    extension = glob.glob(root + "/**/*.duckdb_extension", recursive=True)[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{era.root}/{name}"
        if era.kind == "s3":
            folder = copy(era, name, scratch)
        connection = duckdb.connect(config={"extension_directory": f"{scratch}/extensions"})
        connection.execute(f"INSTALL '{extension}'")
        connection.execute("LOAD delta")
        return connection.execute(f"SELECT {columns_of(name)} FROM delta_scan('{folder}')").to_arrow_table()


def copy(era, name, scratch):
    """Copies a table out of its bucket."""
    for path in era.store.list(f"{name}/"):
        target = os.path.join(scratch, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(era.store.read(path))
    return os.path.join(scratch, name)


def compare(era, table):
    """Both readers see every coordinate once, with the producer's bytes."""
    if table.version < 0:
        return
    for reader, found in (("deltalake", by_deltalake(era, table.name)), ("DuckDB", by_duckdb(era, table.name))):
        columns = [column.to_pylist() for column in found.columns]
        seen = {}
        for row in zip(*columns):
            place = tuple(row[:3])
            if place in seen:
                raise Violation(f"{table.name}: {reader} reads {place} twice")
            seen[place] = content(table.name, row)
        if seen != table.present:
            lost = sorted(table.present.keys() - seen.keys())
            more = sorted(seen.keys() - table.present.keys())
            other = sorted(place for place in seen.keys() & table.present.keys() if seen[place] != table.present[place])
            raise Violation(f"{table.name}: {reader} does not read {lost[:5]}, reads {more[:5]} beside, "
                            f"and reads other bytes at {other[:5]}")
