"""Training on machines that come and go, by the command a user types: one history, whatever happens to them."""

import time

import pytest
import torch

from jobs import tokenizer
from nanochat_ray import cli
from nanochat_ray.bench.spot_cluster import SpotCluster, spot_cluster
from nanochat_ray.bench.spot_run import SpotRun
from nanochat_ray.data.corpus import open_corpus
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.stream.cursor import Cursor, RowId
from nanochat_ray.stream.rows import PretrainingRows, micro_batches
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, build_model
from nanochat_ray.train.ledger import Ledger
from nanochat_ray.train.step import World, run_step
from tests.small_corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

RUN = "spot"
STEPS = 2000  # more than any test waits for
SHAPE = f"--depth 2 --sequence-len 128 --micro-batch-rows 4 --batch-tokens 3072 --steps {STEPS}".split()
SETTINGS = ["--eval-every", str(STEPS), "--eval-tokens", "1024", "--compile", "off", "--dtype", "fp32"]
WORKERS_END_AFTER_S = 6.0  # their driver
SAME = 1e-4  # relative, of losses in fp32 with different numbers of workers


@pytest.fixture
def workplace(tmp_path):
    write_corpus(tmp_path / "corpus", documents=600, lengths=(50, 2000), per_unit=100)
    assert cli.run(tokenizer.main, tokenizer.build_parser(), [*where(tmp_path), "--vocab-size", "300"]) == 0
    return tmp_path


def where(root) -> list[str]:
    return ["--storage", str(root), "--run", RUN, "--corpus", str(root / "corpus")]


def pretrain(cluster: SpotCluster, root, *more: str) -> SpotRun:
    flags = [*where(root), *SHAPE, *SETTINGS, *more]
    return SpotRun(cluster, "pretrain", run_folder(str(root), RUN) / "base", flags)


def test_whatever_happens_to_machines_driver_and_checkpoint_there_is_one_history(workplace):
    flags = ["--workers", "1:2", "--checkpoint-every", "1"]
    with spot_cluster(machines=2) as cluster:
        training = pretrain(cluster, workplace, *flags)
        training.wait_for_step(lambda step: step["workers"] == 2 and step["step"] >= 5)

        noticed = cluster.machines[0]
        deadline = cluster.drain(noticed, notice_s=10)
        training.wait_for_step(lambda step: step["workers"] == 1)
        assert training.events("leave")[0]["time"] <= deadline
        time.sleep(max(0.0, deadline - time.time()))
        cluster.kill(noticed)
        cluster.add()
        training.wait_for_step(lambda step: step["workers"] == 2)
        groups = training.events("start")
        assert [group["workers"] for group in groups] == [2, 1, 2]
        assert [group["step"] for group in groups[1:]] == [leave["step"] for leave in training.events("leave")]
        assert Ledger(training.events()).steps_lost == 0  # to a notice, or to growth

        cluster.kill(cluster.machines[0])
        training.wait_for_step(lambda step: step["workers"] == 1)
        training.kill()
        time.sleep(WORKERS_END_AFTER_S)  # else one of them may still write a newer checkpoint than the damaged one
        checkpoints = Checkpoints.of(training.stage)
        newest = checkpoints.steps()[-1]
        damage(checkpoints.folder / f"step_{newest:06d}")
        cluster.add()
        training = pretrain(cluster, workplace, *flags)
        training.wait_for_step(lambda step: step["workers"] == 2)
        assert f"step_{newest:06d} is damaged" in training.interrupt()

    assert Ledger(training.events()).steps_lost > 0
    require_undisturbed_history(workplace, training)


def damage(checkpoint: Folder) -> None:
    content = bytearray(checkpoint.read("model.safetensors"))
    content[-1] ^= 1
    checkpoint.write("model.safetensors", bytes(content))


def require_undisturbed_history(root, training: SpotRun) -> None:
    """Each step once, with the rows and the loss of a plain loop over the corpus in this process."""
    done = training.events("step")
    assert [step["step"] for step in done] == list(range(len(done)))
    checkpoints = Checkpoints.of(training.stage)
    state = checkpoints.state(checkpoints.steps()[-1])
    corpus = open_corpus(str(root / "corpus"), Folder.at(root / "data"))
    source = PretrainingRows(Tokenizer.load(run_folder(str(root), RUN) / "tokenizer"), 128)
    plan, cursor = state.plan, Cursor(state.cursor.identity)
    model = build_model(plan)
    optimizer = build_optimizer(model, plan.rates, torch.float32)
    stream = micro_batches(source, corpus.train, plan.micro_batch_rows, RowId(0, 0, 0), plan.seed)

    def summed_loss(inputs_BT, targets_BT):
        return model(inputs_BT, targets_BT, reduction="sum")

    for step in done:
        result = run_step(plan, summed_loss, optimizer, cursor, 0, stream, World(0, 1, torch.device("cpu")))
        cursor = cursor.advanced(result.last_row, plan.batch_tokens)
        assert step["stream_hash"] == result.stream_hash
        assert step["loss"] == pytest.approx(result.loss, rel=SAME)
