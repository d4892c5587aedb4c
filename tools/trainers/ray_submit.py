"""A trainer for `tuning.command`: submits `ray_train.py` to a Ray cluster through its Jobs API and follows it to its end.

    ray_submit.py [--address http://HEAD:8265] [--python PYTHON] [options of ray_train.py] DATASET OUT

Without an address (`RAY_API_SERVER_ADDRESS` counts as one) a cluster of this machine alone is started and ended with the job.
The job ends with this process: when taod's end of standard input closes, or on SIGTERM, it is stopped. What an earlier try
at the same OUT left running, because its machine was lost, is stopped before a new one begins.
"""

import argparse
import asyncio
import hashlib
import os
import pathlib
import secrets
import shlex
import signal
import sys
import threading
import time

from ray.job_submission import JobStatus, JobSubmissionClient

HERE = pathlib.Path(__file__).resolve().parent


def say(text):
    print(f"ray_submit: {text}", file=sys.stderr, flush=True)


def local_cluster(cpus):
    """Starts Ray on this machine, with its Jobs API, as part of this process."""
    import ray

    context = ray.init(num_cpus=cpus, include_dashboard=True, log_to_driver=False)
    return f"http://{context.dashboard_url}"


def stop_earlier(client, name):
    """Stops what earlier tries at the same adapter left running on the cluster."""
    for info in client.list_jobs():
        job = info.submission_id or ""
        if job.startswith(f"{name}-") and not info.status.is_terminal():
            say(f"stopping {job}, which an earlier try left running")
            stop(client, job)


def stop(client, job):
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)


def end_with_taod(client, job):
    """Stops the job and ends when taod is gone: its end of standard input closes, or SIGTERM comes."""
    ended = threading.Event()

    def end(*_):
        if ended.is_set():
            return
        ended.set()
        say(f"stopping {job}: taod is gone")
        try:
            stop(client, job)
        finally:
            os._exit(1)

    def watch():
        while os.read(0, 4096):
            pass
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()


async def follow(client, job):
    async for text in client.tail_job_logs(job):
        print(text, end="", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ""))
    parser.add_argument("--python", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1)
    options, rest = parser.parse_known_args()
    if len(rest) < 2 or rest[-2].startswith("--"):
        sys.exit("usage: ray_submit.py [options] DATASET OUT")
    out = os.path.abspath(rest[-1])
    rest[-2:] = [os.path.abspath(rest[-2]), out]
    # One more processor than the workers have, for the job's own process.
    address = options.address or local_cluster(options.workers * options.cpus + 1)
    python = options.python or ("python" if options.address else sys.executable)
    client = JobSubmissionClient(address)
    name = "taod-" + hashlib.sha256(out.encode()).hexdigest()[:16]
    stop_earlier(client, name)
    # The cluster keeps a name for a while after its job.
    job = f"{name}-{secrets.token_hex(4)}"
    end_with_taod(client, job)
    command = [python, "ray_train.py", "--workers", str(options.workers), "--cpus", str(options.cpus), *rest]
    client.submit_job(entrypoint=shlex.join(command), submission_id=job, runtime_env={"working_dir": str(HERE)})
    say(f"submitted {job} to {address}")
    asyncio.run(follow(client, job))
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    if status != JobStatus.SUCCEEDED:
        sys.exit(f"ray_submit: {job} ended as {status.value}: {client.get_job_info(job).message}")


if __name__ == "__main__":
    main()
