"""Tries what a service's sandbox has to refuse, and prints what became of each as one JSON object: "done" or the error's name.

    unit_probe.py STATE

STATE is the service's own folder, where it may write. A call that the filter ends the process for is tried in a child.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import stat
import sys

libc = ctypes.CDLL(None, use_errno=True)
state = sys.argv[1]


def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


def tried(what):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            what()
            said = "done"
        except OSError as error:
            said = errno.errorcode.get(error.errno, str(error))
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode()
    os.close(read)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


def write(path):
    with open(path, "w", encoding="utf-8") as file:
        file.write("x")


def others():
    """Succeeds where another user's process is seen."""
    seen = [name for name in os.listdir("/proc") if name.isdigit() and os.stat(f"/proc/{name}").st_uid != os.geteuid()]
    if not seen:
        raise FileNotFoundError(errno.ENOENT, "")


def executable():
    """Asks for memory that is written and executed, as a compiler at run time does."""
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def executable_later():
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call(libc.mprotect, ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_EXEC)


def own(name):
    path = os.path.join(state, name)
    write(path)
    return path


CLONE_NEWUSER, CLONE_NEWNS, ADDR_NO_RANDOMIZE = 0x10000000, 0x00020000, 0x0040000
TRIES = {
    "write to the state folder": lambda: write(os.path.join(state, "probe")),
    "write beside the state folder": lambda: write(os.path.join(os.path.dirname(state), "probe")),
    "write to /etc": lambda: write("/etc/probe"),
    "write to /usr": lambda: write("/usr/bin/probe"),
    "write to the models": lambda: write("/srv/models/probe"),
    "see another's process": others,
    "read /proc/meminfo": lambda: open("/proc/meminfo", encoding="utf-8").read(),
    "read what the nodes have of memory": lambda: open("/sys/devices/system/node/node0/meminfo", encoding="utf-8").read(),
    "write to /sys": lambda: write("/sys/kernel/profiling"),
    "read a home": lambda: os.listdir("/home"),
    "read the kernel's log": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    "map memory to write and execute": executable,
    "make memory executable": executable_later,
    "make a user namespace": lambda: call(libc.unshare, CLONE_NEWUSER),
    "make a mount namespace": lambda: call(libc.unshare, CLONE_NEWNS),
    "open a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "open a TCP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "change the personality": lambda: call(libc.personality, ctypes.c_ulong(ADDR_NO_RANDOMIZE)),
    "be scheduled in real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "set a set-user-ID bit": lambda: os.chmod(own("setuid"), stat.S_ISUID | 0o700),
    "give a file away": lambda: os.chown(own("given"), 12345, -1),
    "set the host's name": lambda: socket.sethostname("probe"),
    "set the clock": lambda: call(libc.settimeofday, ctypes.byref((ctypes.c_long * 2)(0, 0)), None),
    "become root": lambda: os.setuid(0),
    "ask for the kernel's log": lambda: call(libc.klogctl, 3, ctypes.create_string_buffer(16), 16),
}


def main():
    said = {name: tried(what) for name, what in TRIES.items()}
    facts = {
        "user": os.geteuid(), "group": os.getegid(), "groups": os.getgroups(),
        "mode": oct(stat.S_IMODE(os.stat(os.path.join(state, "probe")).st_mode)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "folder": os.getcwd(),
        "status": {key: value.strip() for key, _, value in (line.partition(":") for line in open("/proc/self/status"))
                   if key in ("CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")},
        "temporary": os.listdir("/tmp"), "devices": sorted(os.listdir("/dev")),
    }
    print(json.dumps({"tried": said, "facts": facts}))


if __name__ == "__main__":
    main()
