"""Runs a command under the directives of a systemd unit, without systemd as the machine's first process.

    unit_sandbox.py UNIT [--as UID:GID] [--state FOLDER] [--bind SOURCE:PATH]... [--environment NAME=VALUE]... -- COMMAND...
    unit_sandbox.py --can

Every directive of [Service] is read from the unit and applied, as root and in a mount namespace of its own: mounts over an
overlay of the root, so that the machine's files stay as they are; then the user, the capabilities, and system-call filters that
libseccomp makes of what `systemd-analyze syscall-filter` says is in each set. A directive that this script does not know makes
it fail by its name; those that have nothing to do with what a process may do are in `unit_file.LEFT_OUT` with the reason.

`--as` stands in for User= and Group=, who need not exist here; `--state` is mounted where StateDirectory= says, `--bind` puts
files where the unit looks for them. `--can` tells why this machine cannot do all that, or nothing.
"""

import argparse
import ctypes
import errno
import grp
import os
import pwd
import re
import resource
import shutil
import sys

from unit_file import Unit, fail, only
from unit_seccomp import CLONE_NEWNS, CLONE_NEWUTS, filters, libc, seccomp

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
# Where the new root is put together: nothing else of a server's is there.
BASE = "/media"
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_SET_MDWE = 24, 38, 47, 65
PR_CAP_AMBIENT_CLEAR_ALL, PR_MDWE_REFUSE_EXEC_GAIN = 4, 1
IOPRIO_WHO_PROCESS, IOPRIO_CLASSES = 1, {"idle": 3, "best-effort": 2, "realtime": 1}


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
