"""Every stage as `ray job submit --working-dir . -- python -m jobs.<stage>`, on a cluster of cluster/local.sh."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from jobs import tokenizer
from nanochat_ray.storage import run_folder
from nanochat_ray.train.checkpoint import Checkpoints
from nanochat_ray.train.events import read_events
from tests.small_corpus import words, write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
STEPS = 80
TINY = f"--depth 2 --sequence-len 128 --micro-batch-rows 4 --batch-tokens 2048 --steps {STEPS} --compile off".split()


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def submit(self, *job: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Submit a job with its flags, and wait for its end unless the options say otherwise."""
        command = [
            RAY,
            "job",
            "submit",
            "--working-dir",
            ".",
            *options,
            "--",
            "python",
            "-m",
            f"jobs.{job[0]}",
            *job[1:],
        ]
        command += ["--storage", str(self.storage)]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=240)

    def run(self, *job: str) -> str:
        """Submit a job that must succeed; returns what it printed."""
        done = self.submit(*job)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self, submission_id: str) -> None:
        """As `ray job stop`, but at once: a process that imports Ray would give the job seconds to finish."""
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{submission_id}/stop"
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        assert httpx.post(url, headers=token, timeout=30).json() == {"stopped": True}


@contextmanager
def local_cluster(folder: Path) -> Iterator[Cluster]:
    """A head with three CPU slots from cluster/local.sh, with its own token, ports and folders."""
    environment = {
        **os.environ,
        "NANOCHAT_RAY_NODE": str(folder / "node"),
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_TMPDIR": str(folder),
        "RAY_worker_niceness": "0",
        "RAY_enable_metrics_collection": "0",
    }
    script = [str(ROOT / "cluster" / "local.sh")]
    head = [*script, "head", "--num-cpus=3", "--object-store-memory=100000000"]
    started = subprocess.run(head, env=environment, capture_output=True, text=True, timeout=180)
    assert started.returncode == 0, started.stderr
    exports = dict(re.findall(r"(RAY_\w+)=(\S+)", started.stdout))  # what a person is told to export
    try:
        yield Cluster(folder, {**environment, **exports})
    finally:
        subprocess.run([*script, "stop"], env=environment, check=True, timeout=120)


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="nj", dir="/tmp") as name:  # short: it becomes part of socket names
        folder = Path(name)
        write_corpus(folder / "corpus")
        random = np.random.default_rng(0)
        with (folder / "chats.jsonl").open("w") as file:
            for _ in range(60):
                turns = [{"role": "user", "content": words(random, 8)}, {"role": "assistant", "content": "the fox"}]
                file.write(json.dumps({"messages": turns}) + "\n")
        with local_cluster(folder) as cluster:
            yield cluster
        left = [each.pid for each in psutil.process_iter(["cmdline"]) if name in " ".join(each.info["cmdline"] or [])]
        assert left == []


def wait_for(what, timeout_s: float = 90):
    deadline = time.time() + timeout_s
    while not (result := what()):
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return result


def test_every_stage_runs_as_a_submitted_job_and_a_stopped_one_continues(cluster):
    run = run_folder(str(cluster.storage), "first")
    corpus = ("--run", "first", "--corpus", str(cluster.folder / "corpus"))

    assert str(run / "tokenizer") in cluster.run("tokenizer", *corpus, "--vocab-size", "300")
    (package,) = (cluster.folder / "ray").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < 5_000_000
    assert {".venv", ".git", "out"}.isdisjoint(path.name for path in package.iterdir())

    pretrain = ("pretrain", *TINY, *corpus, "--checkpoint-every", "0.2", "--eval-every", str(STEPS))
    cluster.submit(*pretrain, options=("--no-wait", "--submission-id", "first-try"))
    wait_for(Checkpoints.of(run / "base").steps)
    cluster.stop("first-try")
    wait_for(lambda: not drivers_of(cluster))
    saved = max(Checkpoints.of(run / "base").steps())
    assert 0 < saved < STEPS
    (went_on_at,) = re.findall(r"continuing at step (\d+)", cluster.run(*pretrain))
    assert saved <= int(went_on_at) < STEPS
    assert [event["step"] for event in read_events(run / "base") if event["kind"] == "step"] == [*range(STEPS)]

    assert "bits per byte" in cluster.run("base_eval", *corpus, "--eval-tokens", "2048")
    chats = ("--sft", str(cluster.folder / "chats.jsonl"), "--steps", "3", "--compile", "off")
    cluster.run("sft", "--run", "first", *chats)
    assert "held-out: " in cluster.run("chat_eval", "--run", "first", "--max-per-task", "2", "--max-tokens", "4")
    cluster.run("report", "--run", "first")
    assert (run / "report").exists("report.html")


def test_a_cluster_that_dies_in_the_middle_is_followed_by_another_and_one_history():
    """As when the head's machine is lost: nothing outlives it but the storage."""
    with tempfile.TemporaryDirectory(prefix="nj", dir="/tmp") as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        corpus = ("--run", "third", "--corpus", str(folder / "corpus"))
        flags = [*corpus, "--storage", str(folder / "storage"), "--vocab-size", "300"]
        tokenizer.main(tokenizer.build_parser().parse_args(flags))
        stage = run_folder(str(folder / "storage"), "third") / "base"
        pretrain = ("pretrain", *TINY, *corpus, "--checkpoint-every", "0.2", "--eval-every", str(STEPS))
        with local_cluster(folder) as first:
            first.submit(*pretrain, options=("--no-wait",))
            wait_for(Checkpoints.of(stage).steps)
            node = psutil.Process(int((folder / "node" / "pid").read_text()))
            processes = [node, *node.children(recursive=True)]  # the driver of the job as well
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(processes, timeout=20)
        saved = max(Checkpoints.of(stage).steps())
        assert 0 < saved < STEPS
        with local_cluster(folder) as second:
            (went_on_at,) = re.findall(r"continuing at step (\d+)", second.run(*pretrain))
        assert saved <= int(went_on_at) < STEPS
        assert [event["step"] for event in read_events(stage) if event["kind"] == "step"] == [*range(STEPS)]


def drivers_of(cluster: Cluster) -> list[int]:
    """Processes of submitted jobs that still run."""
    return [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if each.info["cmdline"]
        and "jobs." in " ".join(each.info["cmdline"])
        and str(cluster.storage) in each.info["cmdline"]
    ]


def test_a_failed_job_says_why_in_one_line_and_fails_the_command(cluster):
    done = cluster.submit("sft", "--run", "second")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("error: ")}  # Ray repeats the log's tail
    assert "run `python -m jobs.pretrain --run second` first" in line


def test_who_has_no_token_is_turned_away(cluster):
    environment = {**cluster.environment, "RAY_AUTH_TOKEN": "0" * 32}
    command = [RAY, "job", "submit", "--", "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
