"""The chaos harness: `taod ingest` between real parts that fail, and the proof that no row is lost or doubled.

    main.py --binary target/release/taod --work DIR [--cycles 1000] [--seed 1] [--minutes M]

A run lives in DIR: with the same seed it goes on where it was cut short. It ends with a summary in DIR/summary.md and code
0; at the first violation it stops with code 1, keeps everything in DIR and says the exact coordinates.
"""

import argparse
import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

from confluent_kafka.admin import AdminClient

import faults
import parts
from era import ASSIGNORS, STORES, Era
from invariants import Violation
from proxy import Proxy


class Run:
    def __init__(self, options):
        self.seed, self.binary = options.seed, pathlib.Path(options.binary).resolve()
        self.work = pathlib.Path(options.work).resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.work / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another sitting is at work in {self.work}")
        self.state_file = self.work / "run.json"
        self.state = {"seed": self.seed, "cycles": 0, "eras": 0, "attempt": 0, "seconds": 0.0, "faults": {}, "counts": {},
                      "skipped": {}, "violations": []}
        if self.state_file.exists():
            self.state = json.loads(self.state_file.read_text())
            if self.state["seed"] != self.seed:
                sys.exit(f"{self.work} holds the run of seed {self.state['seed']}; give that seed or another folder")
        self.assignors, self.stores = options.assignors.split(","), options.stores.split(",")
        self.only, self.now = options.only, "the beginning"
        self.faults, self.counts = Counter(self.state["faults"]), Counter(self.state["counts"])

    def say(self, text):
        print(text, flush=True)

    def count(self, what, by=1):
        self.counts[what] += by

    def skip(self, fault, why):
        if fault not in self.state["skipped"]:
            self.say(f"SKIPPED: {fault}: {why}")
        self.state["skipped"][fault] = why

    def save(self):
        self.state.update(faults=dict(self.faults), counts=dict(self.counts))
        staging = self.state_file.with_suffix(".tmp")
        staging.write_text(json.dumps(self.state, indent=1))
        staging.replace(self.state_file)

    def start_parts(self):
        self.sitting = self.work / "parts"
        shutil.rmtree(self.sitting, ignore_errors=True)
        self.sitting.mkdir(parents=True)
        self.kafka = parts.Kafka(self.sitting)
        self.admin = AdminClient({**parts.QUIET, "bootstrap.servers": self.kafka.brokers})
        self.s3 = parts.S3.start(self.sitting)
        self.proxy = Proxy(self.s3.port)
        knows = lambda *command: subprocess.run([self.binary, *command, "--help"], capture_output=True).returncode == 0
        self.has_maintenance, self.has_erasure = knows("table", "maintain"), knows("table", "erase")
        self.has_replay = knows("replay")
        self.clock = parts.build_clock(self.sitting)
        if self.clock is None:
            self.skip("clock", "there is no C compiler")
        self.toxiproxy = None
        if parts.Toxiproxy.BINARY.exists():
            self.toxiproxy = parts.Toxiproxy(self.sitting, self.kafka.advertised, self.kafka.inner)
        else:
            self.skip("network", "Toxiproxy is not installed (it needs Go)")
            self.kafka.advertised = self.kafka.inner
            self.kafka.stop()
            self.kafka.start()

    def stop_parts(self):
        if self.toxiproxy:
            self.toxiproxy.close()
        self.proxy.close()
        self.s3.close()
        self.kafka.stop("-9")

    def era(self, cycles, sabotage, until):
        """Runs one era; false where the time was up before its end."""
        self.state["attempt"] += 1
        self.save()
        era = Era(self, self.state["eras"], self.state["attempt"])
        done, keep, before = Counter(), True, Counter(self.counts)
        begun = time.monotonic()
        try:
            self.say(f"era {self.state['eras']}: {era.describe()}")
            for cycle in range(cycles):
                era.rng.seed(f"{self.seed}/{self.state['eras']}/{cycle}")
                fault = faults.pick(era, self.only)
                self.now = fault.__name__
                at = time.monotonic()
                fault(era)
                era.settle()
                done[fault.__name__] += 1
                number = self.state["cycles"] + cycle + 1
                self.say(f"  {number:5} {fault.__name__:32} {time.monotonic() - at:5.1f} s  "
                         f"version {era.checker.queries.version}, {len(era.checker.queries.present)} rows, "
                         f"{len(era.checker.letters.present)} dead letters")
                if sabotage and cycle == 1:
                    faults.SABOTAGE[sabotage](era)
                if until and time.monotonic() > until:
                    cycles = cycle + 1
                    break
            self.now = "the end"
            era.finish()
            keep = False
        except (Violation, RuntimeError) as error:
            error.add_note(f"seed {self.seed}, era {self.state['eras']} in {era.folder}, after {sum(done.values())} cycles, "
                           f"in {self.now}")
            raise
        except BaseException:
            # Cut short from outside: the era will be done again.
            keep, self.counts = False, before
            raise
        finally:
            era.close(keep)
        self.faults += done
        self.state["cycles"] += cycles
        self.state["eras"] += 1
        self.state["seconds"] += time.monotonic() - begun
        self.save()
        return True

    def summary(self, target):
        lines = [
            f"Seed {self.seed}: {self.state['cycles']} cycles in {self.state['eras']} eras, "
            f"{self.state['seconds'] / 60:.0f} minutes, "
            f"**{len(self.state['violations'])} violations**.", "",
            *[f"- {violation}" for violation in self.state["violations"]], "",
            "| fault | cycles |", "|---|---|", *[f"| {name} | {n} |" for name, n in sorted(self.faults.items())], "",
            "| counted | |", "|---|---|", *[f"| {name} | {n:,} |" for name, n in sorted(self.counts.items())], "",
        ]
        lines += [f"Skipped: {fault} ({why})." for fault, why in self.state["skipped"].items()]
        target.write_text("\n".join(lines) + "\n")
        self.say(target.read_text())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--era-cycles", type=int, default=20, help="cycles on the same tables")
    parser.add_argument("--minutes", type=float, help="end after this time, with whatever is done by then")
    parser.add_argument("--sabotage", choices=sorted(faults.SABOTAGE), help="wreck the table; the run must fail")
    parser.add_argument("--assignors", default=",".join(ASSIGNORS), help="any of " + ",".join(ASSIGNORS))
    parser.add_argument("--stores", default=",".join(STORES), help="any of " + ",".join(STORES))
    parser.add_argument("--only", help="only the faults whose names begin so, for looking into one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop; the same command goes on from here"))
    run = Run(options)
    run.say(f"chaos: seed {run.seed}, {run.state['cycles']} of {options.cycles} cycles done")
    until = time.monotonic() + options.minutes * 60 if options.minutes else None
    run.start_parts()
    try:
        while run.state["cycles"] < options.cycles and not (until and time.monotonic() > until):
            run.era(min(options.era_cycles, options.cycles - run.state["cycles"]), options.sabotage, until)
    except Violation as violation:
        run.state["violations"].append(f"{violation}"[:300])
        run.save()
        run.say(f"VIOLATION: {violation}\n" + "\n".join(violation.__notes__))
        return 1
    finally:
        run.stop_parts()
    run.summary(run.work / "summary.md")
    # A run that goes on after a violation says so at its end, too.
    return 1 if run.state["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
