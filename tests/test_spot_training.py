"""Training on machines that come and go, by the command a user types: one history, and no step lost to a notice."""

import subprocess
import sys
import time

import pytest

from jobs import tokenizer
from nanochat_ray import cli
from nanochat_ray.bench.spot_cluster import ROOT, SpotCluster, spot_cluster
from nanochat_ray.data.corpus import open_corpus
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import PretrainingRows, micro_batches, stream_hash
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.events import read_events
from tests.small_corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 2000  # more than any test waits for
SHAPE = f"--depth 2 --sequence-len 128 --micro-batch-rows 4 --batch-tokens 3072 --steps {STEPS}".split()
ROWS, MICRO_BATCHES, SEED = 4, 6, 42


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("spot")
    write_corpus(root / "corpus", documents=600, lengths=(50, 2000), per_unit=100)
    flags = ["--storage", str(root), "--run", "spot", "--corpus", str(root / "corpus"), "--vocab-size", "300"]
    assert cli.run(tokenizer.main, tokenizer.build_parser(), flags) == 0
    return root


class Training:
    """The user's command on the cluster, and what its events say."""

    def __init__(self, cluster: SpotCluster, root, *more: str):
        self.stage: Folder = run_folder(str(root), "spot") / "base"
        flags = ["--storage", str(root), "--run", "spot", "--corpus", str(root / "corpus"), *SHAPE, *more]
        flags += ["--eval-every", str(STEPS), "--compile", "off", "--address", cluster.address]
        command = [sys.executable, "-m", "jobs.pretrain", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.stage) if event["kind"] == kind]

    def wait_for(self, what, timeout_s: float = 150):
        """What `what` says of the last step, once it is true."""
        deadline = time.time() + timeout_s
        while time.time() < deadline:
            assert self.process.poll() is None, self.process.stdout.read()
            steps = self.events("step")
            if steps and (answer := what(steps[-1])):
                return answer
            time.sleep(0.2)
        raise AssertionError(f"it did not happen in {timeout_s} s: {[*self.events('start'), *self.events('leave')]}")


def test_a_notice_costs_no_step_and_a_new_machine_takes_part(workplace):
    with spot_cluster(machines=2) as cluster:
        training = Training(cluster, workplace, "--workers", "1:2", "--checkpoint-every", "1000")
        training.wait_for(lambda step: step["workers"] == 2 and step["step"] >= 5)
        noticed = cluster.machines[0]
        deadline = cluster.drain(noticed, notice_s=10)
        training.wait_for(lambda step: step["workers"] == 1)
        assert training.events("leave")[0]["time"] <= deadline
        time.sleep(max(0.0, deadline - time.time()))
        cluster.kill(noticed)
        cluster.add()
        training.wait_for(lambda step: step["workers"] == 2)
        training.process.terminate()
        assert "interrupted" in training.process.communicate(timeout=60)[0]

    groups = training.events("start")
    assert [group["workers"] for group in groups] == [2, 1, 2]
    assert [group["step"] for group in groups[1:]] == [leave["step"] for leave in training.events("leave")]
    done = training.events("step")
    assert [step["step"] for step in done] == list(range(len(done)))
    assert [step["stream_hash"] for step in done] == expected_hashes(workplace, len(done))


def expected_hashes(root, steps: int) -> list[str]:
    """Of every step, by a plain loop over the corpus."""
    corpus = open_corpus(str(root / "corpus"), Folder.at(root / "data"))
    source = PretrainingRows(Tokenizer.load(run_folder(str(root), "spot") / "tokenizer"), 128)
    sequence = micro_batches(source, corpus.train, ROWS, RowId(0, 0, 0), SEED)
    return [stream_hash(next(sequence).digest() for _ in range(MICRO_BATCHES)) for _ in range(steps)]
