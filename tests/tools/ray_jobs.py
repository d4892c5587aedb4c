"""Checks on a Ray cluster of this machine that a job of the reference trainer never outlives the taod that wanted it.

    ray_jobs.py MODEL DATASET OUT        prints what was seen, one word a line; ends with 1 where it is not as it must be

The submitting program is killed, loses its standard input, and is asked to end, each while the workers train; then it is let be.
"""

import os
import pathlib
import subprocess
import sys

os.environ["RAY_AUTH_MODE"] = "disabled"
import ray  # noqa: E402
from ray.job_submission import JobSubmissionClient  # noqa: E402

SUBMIT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "trainers" / "ray_submit.py"
model, dataset, out = sys.argv[1:]
address = "http://" + ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False).dashboard_url
client = JobSubmissionClient(address)


def begin():
    """Starts a try and returns it when its workers are at work, with what it said so far."""
    command = [sys.executable, SUBMIT, "--address", address, "--python", sys.executable, "--model", model, dataset, out]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in child.stderr:
        said += line
        if "Setting up process group" in line:
            return child, said
    sys.exit(f"ended before its workers began:\n{said[-3000:]}")


def running():
    return [info.submission_id for info in client.list_jobs() if info.submission_id and not info.status.is_terminal()]


def expect(what, holds):
    if not holds:
        sys.exit(f"{what}: not as it must be; running: {running()}")
    print(what)


killed, _ = begin()
killed.kill()
killed.wait()
orphans = running()
expect("orphaned", len(orphans) == 1)
closed, said = begin()
expect("taken-over", f"stopping {orphans[0]}" in said and len(running()) == 1 and running() != orphans)
closed.stdin.close()
expect("closed", closed.wait() == 1 and not running())
asked, _ = begin()
asked.terminate()
expect("terminated", asked.wait() == 1 and not running())
let_be, _ = begin()
rest = let_be.stderr.read()
expect("trained", let_be.wait() == 0 and "ray_train: trained" in rest and not running())
