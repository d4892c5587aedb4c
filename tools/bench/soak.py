"""Memory over time: `taod ingest` catches up with a backlog, then follows a producer for an hour.

    soak.py --taod BIN --models FOLDER [--backlog 1000000] [--minutes 60] [--rate 500]

Prints the largest resident set of each tenth of the time, and at the end the rows and what was produced. Fails where memory
passes the budget (`ingest.memory_mib`, 512 by default) or where a row is missing or doubled.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time

import topic as source
from ingest import ROOT, about, free_ports, rows_of

BUDGET_MIB = 512
TENTHS = 10


def rss_mib(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def files(pid):
    return len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))


def follow(arguments, brokers, pairs, first, child):
    """Produces at the rate and samples the process; returns (phase, second, MiB, open files) of each sample."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": brokers, "compression.type": arguments.codec, "linger.ms": 50})
    begun, sent, samples, seconds = time.monotonic(), 0, [], arguments.minutes * 60
    while (now := time.monotonic() - begun) < seconds:
        if child.poll() is not None:
            sys.exit(f"taod ended with {child.returncode}")
        while sent < now * arguments.rate:
            i = first + sent
            producer.produce(arguments.topic, source.value(pairs, i), partition=i % arguments.partitions)
            sent += 1
        producer.poll(0)
        samples.append((now, rss_mib(child.pid), files(child.pid)))
        time.sleep(1)
    producer.flush()
    return sent, samples


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--taod", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--work", default=str(pathlib.Path.home() / ".cache/taod/bench/soak"))
    parser.add_argument("--backlog", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=int, default=500, help="records a second after the backlog")
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--codec", default="lz4")
    arguments = parser.parse_args()
    arguments.topic, arguments.runs, arguments.rows = "soak", 1, arguments.backlog
    work = pathlib.Path(arguments.work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    script, broker, port = ROOT / "tests/kafka/kafka.sh", work / "broker", free_ports()
    subprocess.run([script, "start", broker, str(port)], check=True)
    child = None
    try:
        brokers = f"127.0.0.1:{port}"
        texts = pathlib.Path(arguments.models) / "alpaca_eval_gpt4_baseline.json"
        size = source.fill(brokers, arguments.topic, arguments.backlog, arguments.partitions, arguments.codec, texts)
        config = work / "taod.toml"
        config.write_text(
            f"[state]\ndir = {json.dumps(str(work / 'state'))}\n[ingest]\nidle_s = 1\n"
            f"[ingest.kafka]\nbrokers = {json.dumps(brokers)}\ntopic = \"{arguments.topic}\"\n"
        )
        command = [arguments.taod, "ingest", "--config", str(config)]
        child = subprocess.Popen(command, stderr=open(work / "taod.log", "wb"))
        sent, samples = follow(arguments, brokers, source.texts(texts), arguments.backlog, child)
        child.terminate()
        child.wait(60)
        subprocess.run([*command, "--until-idle"], check=True, stdout=subprocess.DEVNULL)
        report(arguments, size, sent, samples, rows_of(work / "state/tables/queries"))
    finally:
        if child and child.poll() is None:
            child.kill()
        subprocess.run([script, "stop", broker], check=False)


def report(arguments, size, sent, samples, rows):
    print("| minutes | largest resident set, MiB | open files, at most |\n|---|---|---|")
    seconds = arguments.minutes * 60
    for tenth in range(TENTHS):
        low, high = seconds * tenth / TENTHS, seconds * (tenth + 1) / TENTHS
        inside = [sample for sample in samples if low <= sample[0] < high]
        if inside:
            most = max(mib for _, mib, _ in inside)
            print(f"| {low / 60:.0f} to {high / 60:.0f} | {most:.0f} | {max(count for *_, count in inside)} |")
    print(f"\nBacklog {arguments.backlog:,} records, then {sent:,} at {arguments.rate} a second; {rows:,} rows. "
          + about(arguments, size))
    if rows != arguments.backlog + sent:
        sys.exit(f"{rows} rows, not {arguments.backlog + sent}")
    if max(mib for _, mib, _ in samples) > BUDGET_MIB:
        sys.exit(f"past the budget of {BUDGET_MIB} MiB")


if __name__ == "__main__":
    main()
