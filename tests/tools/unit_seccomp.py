"""The system-call filters that a unit's directives come to, made by libseccomp for `unit_sandbox.py`."""

import ctypes
import ctypes.util
import errno
import os
import socket
import stat

from unit_file import expanded, fail, only

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000
# The kinds of namespaces that clone and unshare take, CLONE_NEWTIME apart, which only unshare does.
CLONE_NEW = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "net": 0x40000000, "mnt": CLONE_NEWNS, "pid": 0x20000000,
    "user": 0x10000000, "uts": CLONE_NEWUTS,
}
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
