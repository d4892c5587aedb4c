"""What a power loss would leave of a table, from the system calls of the process that wrote it.

    power_loss.py TRACE ROOT [--forget files|folders]

TRACE is the output of `strace -f -y`, ROOT the folder that the traced process kept its tables in. The model keeps, beside what
the running system sees, what is certain to be on the disk: the bytes of a file up to its last fsync, the entries of a folder up
to its own. A disk may write more than it was asked to, at any time, but a log entry must never be there before all it
names: so at the moment a log entry gets its name, its own bytes, every data file it adds, the entry before it, and all their
folders must be certain. At the end every entry must be certain, for then all of them were acknowledged. `--forget` leaves fsyncs
out of the trace, as a writer would that forgot them; the model must find that.
"""

import json
import os
import re
import sys

CALL = re.compile(r"^(?P<pid>\d+)\s+(?P<name>\w+)\((?P<arguments>.*)\)\s+=\s+(?P<result>-?\d+)(?P<more>.*)$")
UNFINISHED = re.compile(r"^(?P<pid>\d+)\s+(?P<head>\w+\(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(?P<pid>\d+)\s+<\.\.\. \w+ resumed>(?P<tail>.*)$")
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
OPENED = re.compile(r"^<(.*?)>")
DESCRIPTOR = re.compile(r"^(\d+)<")
ENTRY = re.compile(r"/_delta_log/(\d{20})\.json$")


class File:
    def __init__(self):
        self.written = self.synced = 0

    def is_certain(self):
        return self.written == self.synced


class Disk:
    """What the running system sees, and what is certain to outlive it."""

    def __init__(self, root, forget):
        self.root, self.forget = root, forget
        self.now, self.certain = {}, {}
        self.descriptors = {}
        self.entries = {}
        self.checks = 0

    def fail(self, what):
        sys.exit(f"power_loss: {what}")

    def inside(self, path):
        return path.startswith(self.root + "/")

    def is_certain(self, path):
        """Returns true where a file and every folder between it and the root will be there, the file whole."""
        file = self.now.get(path)
        if file is None or self.certain.get(path) is not file:
            return False
        if isinstance(file, File) and not file.is_certain():
            return False
        folder = os.path.dirname(path)
        return folder == self.root or self.is_certain(folder)

    def name(self, path, file):
        """A file gets a name. If it is a log entry, all that it rests on must be certain by now."""
        self.now[path] = file
        found = ENTRY.search(path)
        if not found:
            return
        if not file.is_certain():
            self.fail(f"{path} is named before its bytes are synced")
        table, version = path[: found.start()], int(found.group(1))
        with open(path) as lines:
            actions = [json.loads(line) for line in lines if line.strip()]
        needed = [f"{table}/{action['add']['path']}" for action in actions if "add" in action]
        if version > 0:
            needed.append(f"{table}/_delta_log/{version - 1:020}.json")
        for other in needed:
            self.checks += 1
            if not self.is_certain(other):
                self.fail(f"{path} is named while a power loss could still take {other} back")
        self.entries[path] = True

    def sync(self, path, file):
        if isinstance(file, File):
            if self.forget != "files":
                file.synced = file.written
            return
        if self.forget == "folders":
            return
        here = {name for name in (*self.now, *self.certain) if os.path.dirname(name) == path}
        for name in here:
            if name in self.now:
                self.certain[name] = self.now[name]
            else:
                del self.certain[name]

    def call(self, name, arguments, result, more):
        texts = [text for text in TEXT.findall(arguments)]
        if name in ("openat", "open", "creat"):
            opened = OPENED.match(more)
            path = opened.group(1) if opened else texts[0]
            if not self.inside(path) and path != self.root:
                self.descriptors.pop(result, None)
            elif "O_CREAT" in arguments and path not in self.now:
                self.name(path, File())
                self.descriptors[result] = (path, self.now[path])
            else:
                self.descriptors[result] = (path, self.now.get(path, "folder"))
        elif name == "close":
            self.descriptors.pop(self.descriptor(arguments), None)
        elif name in ("write", "pwrite64", "writev"):
            if (found := self.descriptors.get(self.descriptor(arguments))) and isinstance(found[1], File):
                found[1].written += result
        elif name in ("fsync", "fdatasync"):
            if found := self.descriptors.get(self.descriptor(arguments)):
                self.sync(*found)
        elif name in ("link", "linkat"):
            if self.inside(texts[-1]):
                self.name(texts[-1], self.now[texts[-2]])
        elif name in ("rename", "renameat", "renameat2"):
            if self.inside(texts[-1]):
                file = self.now.pop(texts[-2])
                self.name(texts[-1], file)
        elif name in ("unlink", "unlinkat"):
            self.now.pop(texts[-1], None)
        elif name in ("mkdir", "mkdirat"):
            if self.inside(texts[-1]):
                self.now[texts[-1]] = "folder"

    @staticmethod
    def descriptor(arguments):
        found = DESCRIPTOR.match(arguments)
        return int(found.group(1)) if found else -1

    def finish(self):
        for path in self.entries:
            if not self.is_certain(path):
                self.fail(f"{path} was acknowledged, and a power loss could still take it back")


def lines_of(trace):
    """Yields whole calls: strace splits those during which another thread spoke."""
    begun = {}
    with open(trace, errors="replace") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if found := UNFINISHED.match(line):
                begun[found["pid"]] = found["head"]
            elif found := RESUMED.match(line):
                yield f"{found['pid']} {begun.pop(found['pid'], '')}{found['tail']}"
            else:
                yield line


def main():
    trace, root = sys.argv[1], os.path.realpath(sys.argv[2])
    forget = sys.argv[4] if len(sys.argv) > 4 and sys.argv[3] == "--forget" else None
    disk = Disk(root, forget)
    for line in lines_of(trace):
        found = CALL.match(line)
        if found and int(found["result"]) >= 0:
            disk.call(found["name"], found["arguments"], int(found["result"]), found["more"])
    disk.finish()
    if disk.checks == 0:
        sys.exit("power_loss: the trace holds no commit")
    print(json.dumps({"entries": len(disk.entries), "checks": disk.checks}))


main()
