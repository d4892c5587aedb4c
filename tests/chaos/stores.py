"""The table's files as the harness sees them: a folder or a bucket, read and written without any of taod's code."""

import http.client
import os
import urllib.parse
import uuid
import xml.etree.ElementTree as xml


class Folder:
    """A table root on a local disk."""

    def __init__(self, root):
        self.root = root
        self.url = root

    def read(self, path):
        """Returns the bytes of a file, or None where there is none."""
        try:
            with open(os.path.join(self.root, path), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def create(self, path, data):
        """Writes a file unless it exists; False where it does."""
        full = os.path.join(self.root, path)
        staging = f"{full}#{uuid.uuid4().int}"
        with open(staging, "wb") as file:
            file.write(data)
        try:
            os.link(staging, full)
        except FileExistsError:
            return False
        finally:
            os.unlink(staging)
        return True

    def delete(self, path):
        os.unlink(os.path.join(self.root, path))

    def list(self, prefix):
        folder = os.path.join(self.root, prefix)
        found = []
        for base, _, names in os.walk(folder):
            found += [os.path.relpath(os.path.join(base, name), self.root) for name in names if "#" not in name]
        return found


class Bucket:
    """A table root in a bucket, reached without signatures on the server's own port, past the faulty proxy."""

    def __init__(self, port, bucket, prefix):
        self.port, self.base = port, f"/{bucket}/{prefix}"
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}"
        self.connection = None

    def ask(self, method, target, body=None, headers=None):
        for attempt in range(3):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                self.connection.request(method, target, body, headers or {})
                answer = self.connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, OSError):
                self.connection = None
                if attempt == 2:
                    raise

    def target(self, path):
        return urllib.parse.quote(f"{self.base}/{path}")

    def read(self, path):
        status, data = self.ask("GET", self.target(path))
        if status == 404:
            return None
        if status != 200:
            raise RuntimeError(f"GET {path}: {status} {data[:200]}")
        return data

    def create(self, path, data):
        status, answer = self.ask("PUT", self.target(path), data, {"If-None-Match": "*"})
        if status not in (200, 412, 409):
            raise RuntimeError(f"PUT {path}: {status} {answer[:200]}")
        return status == 200

    def delete(self, path):
        self.ask("DELETE", self.target(path))

    def list(self, prefix):
        found, token = [], None
        while True:
            query = {"list-type": "2", "prefix": f"{self.prefix}/{prefix}"}
            if token:
                query["continuation-token"] = token
            status, data = self.ask("GET", f"/{self.bucket}?{urllib.parse.urlencode(query)}")
            if status != 200:
                raise RuntimeError(f"LIST {prefix}: {status} {data[:200]}")
            tree = xml.fromstring(data)
            space = tree.tag.partition("}")[0] + "}"
            keys = [item.text for item in tree.iter(f"{space}Key")]
            found += [key[len(self.prefix) + 1:] for key in keys]
            token = next((item.text for item in tree.iter(f"{space}NextContinuationToken")), None)
            if not token:
                return found


class Memory:
    """A table root in memory, for the tests of the checker."""

    def __init__(self):
        self.files = {}

    def read(self, path):
        return self.files.get(path)
