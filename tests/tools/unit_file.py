"""What a systemd unit asks for in [Service], read for `unit_sandbox.py`: a directive that is not known is refused by its name."""

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


def fail(what):
    sys.exit(f"unit_sandbox: {what}")


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
