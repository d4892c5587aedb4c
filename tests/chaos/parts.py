"""The real parts: an Apache Kafka, an S3 server, Toxiproxy between taod and Kafka, and instances of taod.

Every process is a child that is remembered by its id and ended by it.
"""

import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "taod"
# Clients of the harness say nothing of a broker that is down on purpose.
QUIET = {"log_level": 0, "reconnect.backoff.max.ms": 500}
KEY_ID, KEY = "chaos", "chaoschaos"


def wait_for(what, check, seconds=60.0, pause=0.05):
    """Polls until `check` is true; the deadline is a failure of the part, not of taod."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not so within {seconds:.0f} s")
        time.sleep(pause)


def listens(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count):
    """Returns ports that are free now, each together with the next one.

    They lie below those that the system gives to outgoing connections: one of these may hold a port for a while that was
    free a moment ago, and a part that is started again needs its own once more.
    """
    found = []
    while len(found) < count:
        port = random.SystemRandom().randrange(15_000, 32_000, 2)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


def end(process, seconds=20):
    """Ends a child in order, and by force where it does not end."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class Kafka:
    """One broker. Producers reach it straight, taod through a listener whose advertised port is the proxy's."""

    def __init__(self, folder):
        self.folder = folder / "kafka"
        self.port, self.inner, self.advertised = free_ports(3)
        self.start()

    @staticmethod
    def script(*arguments):
        script = REPOSITORY / "tests/kafka/kafka.sh"
        subprocess.run([str(script), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    @property
    def brokers(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        listeners = f"PLAINTEXT://127.0.0.1:{self.port},TAOD://127.0.0.1:{self.inner}"
        self.script(
            "start", self.folder, self.port,
            f"listeners={listeners},CONTROLLER://127.0.0.1:{self.port + 1}",
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{self.port},TAOD://127.0.0.1:{self.advertised}",
            "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,TAOD:PLAINTEXT",
            "inter.broker.listener.name=PLAINTEXT",
            "group.min.session.timeout.ms=500",
            "group.consumer.min.session.timeout.ms=500",
            "group.consumer.session.timeout.ms=1000",
            "log.cleaner.backoff.ms=200",
            "log.cleaner.min.cleanable.ratio=0.01",
        )

    def stop(self, *force):
        self.script("stop", self.folder, *force)


class Toxiproxy:
    """Between taod and the broker."""

    BINARY = CACHE / "toxiproxy/server"

    def __init__(self, folder, listen, upstream):
        self.api = free_ports(1)[0]
        self.process = subprocess.Popen(
            [str(self.BINARY), "-host", "127.0.0.1", "-port", str(self.api)], stdout=subprocess.DEVNULL,
            stderr=open(folder / "toxiproxy.log", "ab"), env={**os.environ, "LOG_LEVEL": "error"})
        wait_for("toxiproxy", lambda: listens(self.api), 20)
        self.ask("POST", "/proxies", {"name": "kafka", "listen": f"127.0.0.1:{listen}",
                                      "upstream": f"127.0.0.1:{upstream}", "enabled": True})

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.api, timeout=10)
        connection.request(method, path, json.dumps(body) if body is not None else None,
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"toxiproxy: {method} {path}: {answer.status} {text[:200]}")
        return json.loads(text or b"null")

    def toxic(self, kind, stream, attributes, toxicity=1.0):
        self.ask("POST", "/proxies/kafka/toxics", {"name": "t", "type": kind, "stream": stream,
                                                   "toxicity": toxicity, "attributes": attributes})

    def heal(self):
        for toxic in self.ask("GET", "/proxies/kafka/toxics"):
            self.ask("DELETE", f"/proxies/kafka/toxics/{toxic['name']}")
        self.enable(True)

    def enable(self, enabled):
        self.ask("POST", "/proxies/kafka", {"enabled": enabled})

    def close(self):
        end(self.process)


class S3:
    """A SeaweedFS that knows one signer; without a signature everything is allowed, for the harness."""

    BUCKET = "chaos"

    def __init__(self, folder):
        data = folder / "s3"
        data.mkdir(parents=True, exist_ok=True)
        rights = ["Admin", "Read", "Write", "List"]
        identities = [{"name": "taod", "credentials": [{"accessKey": KEY_ID, "secretKey": KEY}], "actions": rights},
                      {"name": "anonymous", "actions": rights}]
        config = data / "identities.json"
        config.write_text(json.dumps({"identities": identities}))
        *ports, self.port, self.metrics = free_ports(5)
        (master, volume, filer), grpc = ports, [port + 1 for port in (*ports, self.port)]
        weed = pathlib.Path(sys.executable).parent / "weed"
        arguments = [
            weed, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}", f"-master.port.grpc={grpc[0]}", f"-volume.port={volume}",
            f"-volume.port.grpc={grpc[1]}", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={grpc[2]}", "-s3",
            f"-s3.port={self.port}", f"-s3.port.grpc={grpc[3]}", f"-s3.config={config}", "-volume.max=100",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
            # Further services, at fixed ports that another server of this kind may hold.
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-metricsPort={self.metrics}",
        ]
        self.process = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.DEVNULL,
                                        stderr=open(folder / "s3.log", "wb"))
        wait_for("the S3 server", self.is_ready, 60, 0.2)

    @classmethod
    def start(cls, folder):
        """Starts one; a port that somebody else took meanwhile is no failure yet."""
        for attempt in range(5):
            try:
                return cls(folder)
            except RuntimeError:
                if attempt == 4:
                    raise

    def is_ready(self):
        if self.process.poll() is not None:
            raise RuntimeError("the S3 server ended; see s3.log")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("PUT", f"/{self.BUCKET}")
            return connection.getresponse().status in (200, 409)
        except OSError:
            return False

    def close(self):
        end(self.process)


def environment(more):
    """Returns the environment of an instance: ours without what would steer it, and the store's credentials."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TAOD", "AWS"))}
    return {**clean, "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": KEY, **more}


class Taod:
    """One instance of `taod ingest`."""

    def __init__(self, binary, config, log, more=None, until_idle=False):
        self.log = log
        arguments = [str(binary), "ingest", "--config", str(config)] + (["--until-idle"] if until_idle else [])
        clean = environment(more or {})
        self.crash_at = clean.get("TAOD_CRASH_AT")
        with open(log, "ab") as out:
            self.at = out.tell()
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=clean)

    def is_alive(self):
        return self.process.poll() is None

    def signal(self, number):
        if self.is_alive():
            self.process.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        return self.process.wait()

    def stop(self):
        """Ends it in order; it stores what it has read first, however slow the store is."""
        return end(self.process, 60)

    def stacks(self):
        """Returns what each of its threads is doing, where a debugger is at hand."""
        if not shutil.which("gdb") or not self.is_alive():
            return ""
        command = ["gdb", "-p", str(self.process.pid), "-batch", "-ex", "set print frame-arguments none",
                   "-ex", "thread apply all backtrace 40"]
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout

    def said(self):
        """Returns what it wrote since its start, its last lines."""
        with open(self.log, "rb") as file:
            file.seek(self.at)
            return file.read()[-4000:].decode(errors="replace")


def build_clock(folder):
    """Builds the library that moves a process's clock; None where there is no C compiler."""
    library = folder / "clock.so"
    source = pathlib.Path(__file__).parent / "clock.c"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    return library if shutil.which("cc") and subprocess.run(command).returncode == 0 else None


class Clock:
    """How far the clock of a process is off; may change while it runs."""

    def __init__(self, library, path):
        self.path = path
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(path)}

    def set(self, seconds):
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))


def mount_tmpfs(folder, mib):
    """Mounts a small file system in memory; False where this machine does not let us."""
    folder.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mount") or os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "taod-chaos", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def unmount(folder):
    subprocess.run(["umount", "-l", str(folder)], stderr=subprocess.DEVNULL)
