"""The ingestion bench: one topic, one machine, several writers; prints and writes a Markdown table.

    ingest.py --taod BIN --consume BIN --models FOLDER [--rows N] [--runs N] [--partitions N] [--codec lz4] [--only NAMES]

The primary figure is CPU time of the writer's process (user and system, children included) per million rows; it holds on
a busy machine, where rows per second do not. The broker's and the store's own CPU time is not counted.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests/chaos"))

import parts
import topic as source


def free_ports():
    """Returns a port that is free together with the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue


def measure(command, environment=None):
    """Runs a command; returns its CPU and wall seconds, its peak memory in MiB, and how busy the machine was before."""
    begun, load = time.monotonic(), os.getloadavg()[0]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - begun
    if status:
        sys.exit(f"{command} failed:\n{output.decode(errors='replace')}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "rss": usage.ru_maxrss / 1024, "load": load}


def size_of(table, options=None):
    """Returns how many rows a table holds, and the bytes of its data files, by an independent reader."""
    from deltalake import DeltaTable

    files = DeltaTable(str(table), storage_options=options).get_add_actions(flatten=True)
    return sum(files.column("num_records").to_pylist()), sum(files.column("size_bytes").to_pylist())


class Bench:
    def __init__(self, arguments, brokers, work):
        self.arguments, self.brokers, self.work, self.count, self.s3 = arguments, brokers, work, 0, None

    def folder(self):
        """Returns a new folder, removing the last."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self.work

    def consume(self):
        return measure([self.arguments.consume, self.brokers, self.arguments.topic])

    def taod(self):
        folder = self.folder()
        figures = self.ingest(folder, "", None)
        return self.check(figures, folder / "state" / "tables" / "queries")

    def taod_s3(self):
        """Writes into a bucket of its own part; the server stays for the next run."""
        folder, s3 = self.folder(), self.store()
        tables = f"s3://{parts.S3.BUCKET}/bench-{self.count}"
        reach = {"endpoint": f"http://127.0.0.1:{s3.port}", "region": "us-east-1", "allow_http": "true"}
        options = ", ".join(f"{name} = {json.dumps(value)}" for name, value in reach.items())
        state = f"tables = {json.dumps(tables)}\nstore_options = {{ {options} }}\n"
        figures = self.ingest(folder, state, parts.environment({}))
        reader = {f"aws_{name}": value for name, value in reach.items()}
        reader |= {"aws_access_key_id": parts.KEY_ID, "aws_secret_access_key": parts.KEY}
        return self.check(figures, f"{tables}/queries", reader)

    def store(self):
        """Returns the S3 server, which is started when it is first asked for."""
        if self.s3 is None:
            folder = self.work.parent / "store"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.s3 = parts.S3.start(folder)
        return self.s3

    def close(self):
        if self.s3 is not None:
            self.s3.close()
            shutil.rmtree(self.work.parent / "store", ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def ingest(self, folder, state, environment):
        """Runs taod from the start of the topic to its end."""
        self.count += 1
        config = folder / "taod.toml"
        config.write_text(
            f"[state]\ndir = {json.dumps(str(folder / 'state'))}\n{state}[ingest]\nidle_s = 1\n"
            f"[ingest.kafka]\nbrokers = {json.dumps(self.brokers)}\ntopic = {json.dumps(self.arguments.topic)}\n"
            f"group = \"taod-{os.getpid()}-{self.count}\"\n{self.arguments.settings}\n"
        )
        command = [self.arguments.taod, "ingest", "--until-idle", "--config", str(config)]
        figures = measure(command, environment)
        # The wait for more at the end of the log is no work.
        figures["wall"] -= 1
        return figures

    def peer(self, kind):
        table = self.folder() / "table"
        figures = measure([sys.executable, str(HERE / "peer.py"), kind, self.brokers, self.arguments.topic, str(table)])
        return self.check(figures, table)

    def check(self, figures, table, options=None):
        """Adds the bytes out, and refuses to measure a writer that lost or doubled a row."""
        found, figures["out"] = size_of(table, options)
        if found != self.arguments.rows:
            sys.exit(f"{table} holds {found} rows, not {self.arguments.rows}")
        return figures


WRITERS = {
    "consume": ("librdkafka alone, nothing kept", lambda bench: bench.consume()),
    "taod": ("`taod ingest`, exactly once, local disk", lambda bench: bench.taod()),
    "s3": ("`taod ingest`, exactly once, S3", lambda bench: bench.taod_s3()),
    "python": ("Python: confluent-kafka, json, pyarrow, delta-rs", lambda bench: bench.peer("python")),
    "duckdb": ("Python: confluent-kafka, DuckDB's JSON, delta-rs", lambda bench: bench.peer("duckdb")),
}


def table(arguments, size, results):
    """Returns the Markdown table: medians, the least CPU time beside."""
    lines = [
        "| writer | CPU-s per million rows (least) | rows per CPU-s | CPU x consume | rows/s | MB/s | peak RSS, MiB | MB out | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    millions, base = arguments.rows / 1e6, None
    for name, runs in results.items():
        cpu = statistics.median(run["cpu"] for run in runs)
        least = min(run["cpu"] for run in runs)
        wall = statistics.median(run["wall"] for run in runs)
        rss = max(run["rss"] for run in runs)
        base = base or cpu
        loads = [run["load"] for run in runs]
        out = f"{runs[0]['out'] / 1e6:.0f}" if "out" in runs[0] else "-"
        lines.append(
            f"| {WRITERS[name][0]} | {cpu / millions:.1f} ({least / millions:.1f}) | {arguments.rows / cpu:,.0f} "
            f"| {cpu / base:.1f} | {arguments.rows / wall:,.0f} | {size / 1e6 / wall:.0f} | {rss:.0f} | {out} "
            f"| {min(loads):.1f} to {max(loads):.1f} |"
        )
    return "\n".join(lines)


def about(arguments, size):
    """Returns what must be known to read the table."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return (
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}; {os.cpu_count()} cores of {model}, the "
        f"broker (and the store) on the same machine; {arguments.rows:,} records of {size / arguments.rows:,.0f} bytes "
        f"(mean), {arguments.partitions} partitions, {arguments.codec} by the producer; medians of {arguments.runs} runs. "
        f"Load: of the last minute, when a run began."
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--taod", required=True)
    parser.add_argument("--consume", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/taod/bench"))
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--codec", default="lz4")
    parser.add_argument("--only", default=",".join(WRITERS), help="writers, comma-separated; the first is the ratio's 1")
    parser.add_argument("--settings", default="", help="more lines for taod's settings")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    arguments.topic = f"bench-{arguments.rows}-{arguments.partitions}-{arguments.codec}"
    cache = pathlib.Path(arguments.cache)
    script, broker, port = ROOT / "tests/kafka/kafka.sh", cache / "broker", free_ports()
    subprocess.run([script, "start", broker, str(port)], check=True)
    bench = None
    try:
        brokers = f"127.0.0.1:{port}"
        texts = pathlib.Path(arguments.models) / "alpaca_eval_gpt4_baseline.json"
        print("filling", arguments.topic, file=sys.stderr)
        size = source.fill(brokers, arguments.topic, arguments.rows, arguments.partitions, arguments.codec, texts)
        bench, results = Bench(arguments, brokers, cache / "work"), {}
        # In turn, so that a machine that drifts drifts for all.
        for run in range(arguments.runs):
            for name in arguments.only.split(","):
                figures = WRITERS[name][1](bench)
                print(name, {key: round(value, 2) for key, value in figures.items()}, file=sys.stderr)
                results.setdefault(name, []).append(figures)
        text = f"{table(arguments, size, results)}\n\n{about(arguments, size)}"
        print(text)
        if arguments.out:
            pathlib.Path(arguments.out).write_text(text + "\n")
    finally:
        subprocess.run([script, "stop", broker], check=False)
        if bench is not None:
            bench.close()


if __name__ == "__main__":
    main()
