"""A count and a hash over rows that do not depend on their order; tests/it/readers.rs computes the same.

Each row becomes one line (see `encode`), the lines are sorted by their bytes, and SHA-256 goes over the lines with a line
break after each.
"""

import datetime
import hashlib
import struct

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
