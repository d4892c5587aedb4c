"""Runs a command under the directives of a systemd unit, without systemd as the machine's first process.

    unit_sandbox.py UNIT [--as UID:GID] [--state FOLDER] [--bind SOURCE:PATH]... [--environment NAME=VALUE]... -- COMMAND...
    unit_sandbox.py --can

Every directive of [Service] is read from the unit and applied, as root and in a mount namespace of its own: mounts over an
overlay of the root, so that the machine's files stay as they are; then the user, the capabilities, and system-call filters that
libseccomp makes of what `systemd-analyze syscall-filter` says is in each set. A directive that this script does not know makes
it fail by its name; those that have nothing to do with what a process may do are in LEFT_OUT with the reason.

`--as` stands in for User= and Group=, who need not exist here; `--state` is mounted where StateDirectory= says, `--bind` puts
files where the unit looks for them. `--can` tells why this machine cannot do all that, or nothing.
"""

import argparse
import ctypes
import ctypes.util
import errno
import grp
import os
import pwd
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys

LEFT_OUT = {
    "Type": "when the manager takes the unit to be started",
    "NotifyAccess": "whom the manager listens to",
    "WatchdogSec": "when the manager takes the unit to hang",
    "ExecStart": "the command is given",
    "ExecReload": "a command of the manager's",
    "KillMode": "how the manager ends it",
    "TimeoutStartSec": "how long the manager waits",
    "TimeoutStopSec": "how long the manager waits",
    "Restart": "when the manager starts it again",
    "RestartSec": "when the manager starts it again",
    "RestartPreventExitStatus": "when the manager starts it again",
    "SuccessExitStatus": "what the manager takes for a failure",
    "OOMPolicy": "what the manager does after the kernel has killed",
    "MemoryMax": "a limit of the control group that the manager makes",
    "MemorySwapMax": "a limit of the control group that the manager makes",
    "CPUWeight": "a share of the control group that the manager makes",
    "RemoveIPC": "what the manager removes after the end",
}

libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
# Where the new root is put together: nothing else of a server's is there.
BASE = "/media"
CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000
# The kinds of namespaces that clone and unshare take, CLONE_NEWTIME apart, which only unshare does.
CLONE_NEW = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "net": 0x40000000, "mnt": CLONE_NEWNS, "pid": 0x20000000,
    "user": 0x10000000, "uts": CLONE_NEWUTS,
}
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_SET_MDWE = 24, 38, 47, 65
PR_CAP_AMBIENT_CLEAR_ALL, PR_MDWE_REFUSE_EXEC_GAIN = 4, 1
IOPRIO_WHO_PROCESS, IOPRIO_CLASSES = 1, {"idle": 3, "best-effort": 2, "realtime": 1}


def fail(what):
    sys.exit(f"unit_sandbox: {what}")


def checked(result, what):
    if result != 0:
        fail(f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind=None, flags=0, data=None):
    encoded = [None if text is None else str(text).encode() for text in (source, target, kind, data)]
    checked(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"cannot mount {target}")


def remount(target, flags, without=0):
    """Adds flags to a mount, which keeps those it has but for some."""
    has = os.statvfs(target).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC) & ~without
    mount(None, target, flags=MS_REMOUNT | MS_BIND | has | flags)


# The unit.


def directives(path):
    """Yields the directives of [Service] in their order."""
    section = None
    with open(path, encoding="utf-8") as lines:
        for line in lines.read().replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and line[0] not in "#;":
                key, _, value = line.partition("=")
                yield key.strip(), value.strip()


def is_yes(key, value):
    if value in ("yes", "true", "1", "on"):
        return True
    if value in ("no", "false", "0", "off"):
        return False
    fail(f"{key}={value} is not known to this script")


def only(key, value, known):
    if value not in known:
        fail(f"{key}={value} is not known to this script")


class Unit:
    """What a unit asks for, each under the name of what is done for it."""

    def __init__(self, path):
        self.flags, self.values = {}, {}
        self.lists = {key: [] for key in ("ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "Environment")}
        self.calls = None
        for key, value in directives(path):
            if key not in LEFT_OUT:
                read = KNOWN.get(key)
                if read is None:
                    fail(f"{path}: {key}= is not known to this script; apply it, or leave it out with a reason")
                read(self, key, value)

    def flag(self, key, value):
        self.flags[key] = is_yes(key, value)

    def value(self, key, value):
        self.values[key] = value

    def list(self, key, value):
        self.lists[key].extend(value.split()) if value else self.lists[key].clear()

    def capabilities(self, key, value):
        only(key, value, [""])
        self.flags[key] = True

    def filter(self, key, value):
        """The first entry decides whether the list is of what is allowed; later ones add to it or take from it."""
        is_denied, names = value.startswith("~"), value.removeprefix("~").split()
        found = set().union(*(expanded(name) for name in names))
        if self.calls is None:
            self.calls = (not is_denied, expanded("@default") if not is_denied else set())
        allows, calls = self.calls
        self.calls = (allows, calls - found if allows == is_denied else calls | found)

    def wants(self, key):
        return self.flags.get(key, False)


KNOWN = {
    **dict.fromkeys(
        ["LockPersonality", "MemoryDenyWriteExecute", "NoNewPrivileges", "PrivateDevices", "PrivateMounts", "PrivateTmp",
         "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs",
         "ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"],
        Unit.flag),
    **dict.fromkeys(
        ["User", "Group", "StateDirectory", "StateDirectoryMode", "WorkingDirectory", "Nice", "UMask", "ProcSubset",
         "ProtectProc", "ProtectSystem", "IOSchedulingClass", "OOMScoreAdjust", "LimitNOFILE", "RestrictAddressFamilies",
         "SystemCallArchitectures"],
        Unit.value),
    **dict.fromkeys(["ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "Environment"], Unit.list),
    **dict.fromkeys(["CapabilityBoundingSet", "AmbientCapabilities"], Unit.capabilities),
    "SystemCallFilter": Unit.filter,
}


def expanded(name):
    """Returns the system calls of a set, as systemd itself tells."""
    if not name.startswith("@"):
        return {name}
    told = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    calls = [line.strip() for line in told.stdout.splitlines()[1:]]
    return set().union(*(expanded(call) for call in calls if call and not call.startswith("#")))


# Mounts.


def new_root():
    """Returns a root that is the machine's with a memory above it, in a mount namespace of its own."""
    checked(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS), "cannot make a mount namespace")
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("sandbox", BASE, "tmpfs")
    upper, work, root = (os.path.join(BASE, name) for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        os.mkdir(folder, 0o755)
    mount("overlay", root, "overlay", data=f"lowerdir=/,upperdir={upper},workdir={work}")
    # An overlay holds what is on the root's own file system.
    for path in mounted_below("/"):
        if re.match(r"/(usr|lib\w*|bin|sbin|etc|opt)(/|$)", path):
            bind(path, root + path)
    return root


def mounted_below(folder):
    """Returns where something is mounted, at or below a folder."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        paths = [line.split()[4].replace("\\040", " ") for line in lines]
    return [path for path in paths if path == folder or path.startswith(folder.rstrip("/") + "/")]


def bind(source, target, flags=0):
    """Puts a file or a folder somewhere, which is made where it is missing."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a", encoding="utf-8").close()
    mount(source, target, flags=MS_BIND | MS_REC)
    if flags:
        remount(target, flags)


def devices(root):
    """The few devices that PrivateDevices= leaves."""
    dev = os.path.join(root, "dev")
    mount("dev", dev, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        bind(f"/dev/{name}", os.path.join(dev, name))
    os.mkdir(os.path.join(dev, "shm"))
    mount("shm", os.path.join(dev, "shm"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", os.path.join(dev, name))
    os.symlink("/proc/self/fd", os.path.join(dev, "fd"))
    remount(dev, MS_RDONLY | MS_NOEXEC | MS_NOSUID)


def closed(path):
    """Makes a folder empty and unreadable, or a file."""
    if os.path.isdir(path):
        mount("closed", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=000,size=4k")
    elif os.path.exists(path):
        mount("/dev/null", path, flags=MS_BIND)


def proc(unit, root):
    """A /proc of its own where others are invisible; the kernel's tunables in it are read-only."""
    hidden = unit.values.get("ProtectProc", "default")
    only("ProtectProc", hidden, ["default", "invisible", "noaccess", "ptraceable"])
    subset = unit.values.get("ProcSubset", "all")
    only("ProcSubset", subset, ["all", "pid"])
    options = [f"hidepid={hidden}"] * (hidden != "default") + ["subset=pid"] * (subset == "pid")
    target = os.path.join(root, "proc")
    mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ",".join(options) or None)
    if subset == "all" and unit.wants("ProtectKernelTunables"):
        for name in ("sys", "sysrq-trigger", "latency_stats", "mtrr", "apm", "acpi", "timer_stats", "asound", "bus", "fs", "irq"):
            path = os.path.join(target, name)
            if os.path.exists(path):
                mount(path, path, flags=MS_BIND)
                remount(path, MS_RDONLY)


def mounts(unit, root, arguments, user, group):
    inside = lambda path: root + path
    mount("/sys", inside("/sys"), flags=MS_BIND | MS_REC)
    proc(unit, root)
    if unit.wants("PrivateDevices"):
        devices(root)
    else:
        mount("/dev", inside("/dev"), flags=MS_BIND | MS_REC)
    for source, path in (pair.split(":") for pair in arguments.bind):
        bind(source, inside(path))
    writable = [path.lstrip("-") for path in unit.lists["ReadWritePaths"]]
    if "StateDirectory" in unit.values:
        owned(arguments.state, user, group)
        os.chmod(arguments.state, int(unit.values.get("StateDirectoryMode", "0755"), 8))
        writable.append("/var/lib/" + unit.values["StateDirectory"])
        bind(arguments.state, inside(writable[-1]))
    protected = unit.values.get("ProtectSystem", "no")
    only("ProtectSystem", protected, ["strict", "no"])
    for path in mounted_below(root) if protected == "strict" else []:
        # These have directives of their own.
        if not re.match(r"/(proc|sys|dev)(/|$)", path.removeprefix(root)):
            remount(path, MS_RDONLY)
    for path in writable:
        if os.path.exists(inside(path)):
            bind(inside(path), inside(path))
            remount(inside(path), 0, MS_RDONLY)
    for path in unit.lists["ReadOnlyPaths"]:
        if os.path.exists(inside(path.lstrip("-"))):
            bind(inside(path.lstrip("-")), inside(path.lstrip("-")), MS_RDONLY)
        elif not path.startswith("-"):
            fail(f"ReadOnlyPaths={path} is not there")
    if unit.wants("PrivateTmp"):
        for path in ("/tmp", "/var/tmp"):
            mount("tmp", inside(path), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    hidden = {"ProtectHome": ["/home", "/root", "/run/user"], "ProtectKernelModules": ["/usr/lib/modules"],
              "ProtectKernelLogs": ["/dev/kmsg", "/proc/kmsg"]}
    hidden = [path for key, paths in hidden.items() if unit.wants(key) for path in paths]
    for path in hidden + [path.lstrip("-") for path in unit.lists["InaccessiblePaths"]]:
        closed(inside(path))
    kept = {"ProtectKernelTunables": "/sys", "ProtectControlGroups": "/sys/fs/cgroup"}
    for folder in [folder for key, folder in kept.items() if unit.wants(key)]:
        for path in mounted_below(inside(folder)):
            remount(path, MS_RDONLY)


def owned(folder, user, group):
    """Gives a state folder of another owner to the unit's, as the manager does."""
    for path, folders, files in os.walk(folder):
        for name in [path, *(os.path.join(path, name) for name in folders + files)]:
            os.chown(name, user, group, follow_symlinks=False)


# System calls.

SCMP_ACT_KILL_PROCESS, SCMP_ACT_ALLOW = 0x80000000, 0x7FFF0000
SCMP_CMP_NE, SCMP_CMP_LT, SCMP_CMP_EQ, SCMP_CMP_GT, SCMP_CMP_MASKED_EQ = 1, 2, 4, 6, 7
SCMP_FLTATR_ACT_BADARCH = 2


class Compared(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def refusing(number):
    return 0x00050000 | number


def seccomp():
    name = ctypes.util.find_library("seccomp")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Compared)]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    return library


class Filter:
    """One filter, of which the kernel may have several: the strictest word counts."""

    def __init__(self, default):
        self.library = seccomp()
        self.context = self.library.seccomp_init(default)

    def rule(self, action, call, *comparisons):
        number = self.library.seccomp_syscall_resolve_name(call.encode())
        # A call of other processors, or one that is newer than the library.
        if number == -1:
            return
        compared = (Compared * len(comparisons))(*(Compared(*one) for one in comparisons))
        result = self.library.seccomp_rule_add_array(self.context, action, number, len(comparisons), compared)
        # A pseudo call of another processor.
        if result not in (0, -errno.EDOM) and number >= 0:
            fail(f"cannot filter {call}: {os.strerror(-result)}")

    def load(self):
        result = self.library.seccomp_load(self.context)
        if result != 0:
            fail(f"cannot load a filter: {os.strerror(-result)}")


def masked(argument, mask, value=None):
    return (argument, SCMP_CMP_MASKED_EQ, mask, mask if value is None else value)


def families(text):
    if text.startswith("~"):
        fail(f"RestrictAddressFamilies={text} is not known to this script")
    wanted = sorted(int(getattr(socket, name)) for name in text.split())
    made, refused = Filter(SCMP_ACT_ALLOW), refusing(errno.EAFNOSUPPORT)
    # Everything below, between and above those.
    made.rule(refused, "socket", (0, SCMP_CMP_LT, wanted[0], 0))
    for low, high in zip(wanted, wanted[1:]):
        for family in range(low + 1, high):
            made.rule(refused, "socket", (0, SCMP_CMP_EQ, family, 0))
    made.rule(refused, "socket", (0, SCMP_CMP_GT, wanted[-1], 0))
    return made


def filters(unit):
    """Yields the filters that the directives come to."""
    denied = Filter(SCMP_ACT_ALLOW)
    deny = lambda calls: [denied.rule(refusing(errno.EPERM), call) for call in calls]
    sets = {"ProtectKernelModules": ["@module"], "ProtectKernelLogs": ["syslog"], "ProtectClock": ["@clock"],
            "PrivateDevices": ["@raw-io"], "ProtectHostname": ["sethostname", "setdomainname"]}
    for key, names in sets.items():
        for name in names if unit.wants(key) else []:
            deny(expanded(name))
    if unit.wants("RestrictNamespaces"):
        refused = refusing(errno.EPERM)
        denied.rule(refused, "setns")
        for kind in CLONE_NEW.values():
            for call in ("unshare", "clone"):
                denied.rule(refused, call, masked(0, kind))
        # Its flags lie in memory, where no filter looks; the C library then takes clone.
        denied.rule(refusing(errno.ENOSYS), "clone3")
    if unit.wants("RestrictRealtime"):
        # Anything but SCHED_OTHER, SCHED_BATCH and SCHED_IDLE.
        for policy in (1, 2, 4):
            denied.rule(refusing(errno.EPERM), "sched_setscheduler", (1, SCMP_CMP_EQ, policy, 0))
        denied.rule(refusing(errno.EPERM), "sched_setscheduler", (1, SCMP_CMP_GT, 5, 0))
    if unit.wants("LockPersonality"):
        now = libc.personality(ctypes.c_ulong(0xFFFFFFFF))
        denied.rule(refusing(errno.EPERM), "personality", (0, SCMP_CMP_NE, now, 0))
    if unit.wants("RestrictSUIDSGID"):
        modes = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2,
                 "open": 2, "openat": 3, "creat": 1}
        for call, argument in modes.items():
            for bit in (stat.S_ISUID, stat.S_ISGID):
                creating = [masked(argument - 1, os.O_CREAT)] if call in ("open", "openat") else []
                denied.rule(refusing(errno.EPERM), call, masked(argument, bit), *creating)
        denied.rule(refusing(errno.ENOSYS), "openat2")
    if unit.wants("MemoryDenyWriteExecute"):
        write, execute, shared = 2, 4, 0o100000
        denied.rule(refusing(errno.EPERM), "mmap", masked(2, write | execute))
        for call in ("mprotect", "pkey_mprotect"):
            denied.rule(refusing(errno.EPERM), call, masked(2, execute))
        denied.rule(refusing(errno.EPERM), "shmat", masked(2, shared))
    yield denied
    if "RestrictAddressFamilies" in unit.values:
        yield families(unit.values["RestrictAddressFamilies"])
    if "SystemCallArchitectures" in unit.values:
        only("SystemCallArchitectures", unit.values["SystemCallArchitectures"], ["native"])
        native = Filter(SCMP_ACT_ALLOW)
        native.library.seccomp_attr_set(native.context, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS)
        yield native
    if unit.calls is not None:
        allows, calls = unit.calls
        last = Filter(SCMP_ACT_KILL_PROCESS if allows else SCMP_ACT_ALLOW)
        for call in sorted(calls):
            last.rule(SCMP_ACT_ALLOW if allows else SCMP_ACT_KILL_PROCESS, call)
        yield last


# The process.


def identity(unit, given):
    """Returns the user's and the group's number."""
    if given:
        user, group = given.split(":")
        return int(user), int(group)
    try:
        user = pwd.getpwnam(unit.values["User"])
        return user.pw_uid, grp.getgrnam(unit.values["Group"]).gr_gid if "Group" in unit.values else user.pw_gid
    except KeyError as missing:
        fail(f"{missing}: make them with systemd-sysusers, or give --as")


def environment(unit, more):
    """Returns what the manager gives a service."""
    made = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8"}
    if "User" in unit.values:
        home = "/var/lib/" + unit.values["StateDirectory"] if "StateDirectory" in unit.values else "/"
        made |= {"USER": unit.values["User"], "LOGNAME": unit.values["User"], "HOME": home, "SHELL": "/usr/sbin/nologin"}
    if "StateDirectory" in unit.values:
        made["STATE_DIRECTORY"] = "/var/lib/" + unit.values["StateDirectory"]
    pairs = [pair.strip('"') for pair in unit.lists["Environment"]] + more
    return made | dict(pair.split("=", 1) for pair in pairs)


def limits(unit):
    """What is set before the user changes, for it takes rights."""
    if "OOMScoreAdjust" in unit.values:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(unit.values["OOMScoreAdjust"])
    if "Nice" in unit.values:
        os.setpriority(os.PRIO_PROCESS, 0, int(unit.values["Nice"]))
    if "IOSchedulingClass" in unit.values:
        kind = unit.values["IOSchedulingClass"]
        only("IOSchedulingClass", kind, list(IOPRIO_CLASSES))
        number = seccomp().seccomp_syscall_resolve_name(b"ioprio_set")
        checked(libc.syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASSES[kind] << 13), "cannot set the disk's priority")
    if "LimitNOFILE" in unit.values:
        soft, _, hard = unit.values["LimitNOFILE"].partition(":")
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard or soft)))


def become(unit, user, group):
    """Gives up every right, for good."""
    if unit.wants("CapabilityBoundingSet"):
        # The kernel tells by an error that there are no more.
        for capability in range(64):
            if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
                break
    if unit.wants("AmbientCapabilities"):
        checked(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "cannot drop the ambient capabilities")
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    if unit.wants("NoNewPrivileges"):
        checked(libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "cannot set no_new_privs")


def lacking():
    """Returns why this machine cannot do it; nothing where it can."""
    if os.geteuid() != 0:
        return "only root may make the mounts"
    if shutil.which("systemd-analyze") is None:
        return "systemd-analyze is not here: install systemd"
    if seccomp() is None:
        return "libseccomp is not here: install libseccomp2"
    child = os.fork()
    if child == 0:
        try:
            new_root()
        except SystemExit as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return None if os.waitpid(child, 0)[1] == 0 else "no mount namespace with an overlay of the root can be made here"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("unit", nargs="?")
    parser.add_argument("--can", action="store_true")
    parser.add_argument("--as", dest="identity")
    parser.add_argument("--state")
    for name in ("--bind", "--environment"):
        parser.add_argument(name, action="append", default=[])
    given, command = sys.argv[1:], []
    if "--" in given:
        given, command = given[: given.index("--")], given[given.index("--") + 1 :]
    arguments = parser.parse_args(given)
    if arguments.can:
        why = lacking()
        return print(why) if why else None
    unit = Unit(arguments.unit)
    if "StateDirectory" in unit.values and not arguments.state:
        fail("StateDirectory= needs --state")
    if not command:
        fail("no command is given")
    user, group = identity(unit, arguments.identity)
    made = list(filters(unit))
    limits(unit)
    root = new_root()
    mounts(unit, root, arguments, user, group)
    os.chdir(root)
    checked(libc.pivot_root(b".", b"."), "cannot change the root")
    checked(libc.umount2(b".", MNT_DETACH), "cannot leave the old root")
    os.chdir("/")
    become(unit, user, group)
    os.chdir(unit.values.get("WorkingDirectory", "/"))
    os.umask(int(unit.values.get("UMask", "0022"), 8))
    if unit.wants("MemoryDenyWriteExecute") and libc.prctl(PR_SET_MDWE, ctypes.c_ulong(PR_MDWE_REFUSE_EXEC_GAIN), 0, 0, 0) != 0:
        # A kernel before 6.3: the filter does it alone.
        assert ctypes.get_errno() == errno.EINVAL
    values = environment(unit, arguments.environment)
    for one in made:
        one.load()
    os.execvpe(command[0], command, values)


if __name__ == "__main__":
    main()
