"""Training on machines that come and go, by the command a user types: one history, whatever happens to them."""

import json

import numpy as np
import pytest
import torch

from jobs import tokenizer
from nanochat_ray import cli
from nanochat_ray.bench.spot_cluster import spot_cluster
from nanochat_ray.data.corpus import open_corpus
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import make_plan
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.stream.rows import ChatRows, PretrainingRows, micro_batches
from nanochat_ray.tasks.mixture import open_mixture
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model
from nanochat_ray.train.step import World, run_step
from tests.chaos import Chaos
from tests.small_corpus import words, write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

RUN = "spot"
STEPS = 2000  # more than any test waits for
LENGTH, ROWS, BATCH = 128, 4, 3072
SHAPE = f"--depth 2 --sequence-len {LENGTH} --micro-batch-rows {ROWS} --batch-tokens {BATCH} --steps {STEPS}".split()
SETTINGS = f"--eval-every {STEPS} --eval-tokens 1024 --compile off --dtype fp32 --checkpoint-every 1".split()
SAME = 1e-4  # relative, of losses in fp32 with different numbers of workers
# Pretraining at its full rate amplifies rounding: one process with one thread instead of two, or with weights that
# differ by 1e-7, differs by 1e-5 after 50 steps and by up to 3e-4 within 150. A lost optimizer state would be 1e-2.
SAME_LATER, LATER = 1e-3, 50


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", documents=600, lengths=(50, 2000), per_unit=100)
    return str(tmp_path / "corpus")


def with_tokenizer(storage: str, corpus: str) -> list[str]:
    """A run that holds only a tokenizer; the flags that name it."""
    where = ["--storage", storage, "--run", RUN]
    flags = [*where, "--corpus", corpus, "--vocab-size", "300"]
    assert cli.run(tokenizer.main, tokenizer.build_parser(), flags) == 0
    return where


def test_whatever_happens_to_machines_driver_and_checkpoint_there_is_one_history(corpus, tmp_path):
    where, run = with_tokenizer(str(tmp_path), corpus), run_folder(str(tmp_path), RUN)
    flags = [*where, "--corpus", corpus, *SHAPE, *SETTINGS, "--workers", "1:3"]
    with spot_cluster(machines=2) as cluster:
        chaos = Chaos(cluster, "pretrain", run / "base", flags)
        chaos.wait_for(workers=2)
        chaos.drain(rank=0, notice_s=10)
        chaos.wait_for(workers=1)
        chaos.add_nodes(2)
        chaos.wait_for(workers=3)
        groups, left = chaos.run.events("start"), chaos.run.events("leave")
        assert [group["step"] for group in groups[1:]] == [leave["step"] for leave in left]
        assert chaos.ledger.steps_lost == 0  # to a notice, or to growth

        chaos.kill(rank=0)
        chaos.wait_for(workers=2)
        assert "(raylet)" not in chaos.run.output()  # Ray's own reports of lost machines
        chaos.kill_driver()
        damaged = chaos.corrupt_newest_checkpoint()
        chaos.rerun()
        chaos.wait_for(workers=2)
        assert f"{damaged} is damaged" in chaos.run.interrupt()

    assert chaos.ledger.steps_lost > 0
    require_undisturbed_history(chaos, *pretraining(corpus, tmp_path, run))


def test_neither_a_store_that_fails_nor_a_lost_head_changes_the_history(corpus, s3_store, tmp_path):
    storage = s3_store.new_bucket()
    where, run = with_tokenizer(storage, corpus), run_folder(storage, RUN)
    flags = [*where, "--corpus", corpus, *SHAPE, *SETTINGS, "--workers", "2"]
    with spot_cluster(machines=2) as cluster:
        chaos = Chaos(cluster, "pretrain", run / "base", flags, s3_store)
        chaos.wait_for(workers=2)
        began, ended = chaos.storage_fails(seconds=20)
        chaos.run.wait_for_step(lambda step: step["time"] > ended)
        meanwhile = [step for step in chaos.run.events("step") if began + 5 < step["time"] < ended]
        assert len(meanwhile) > 5
        assert len(chaos.run.events("start")) == 1

        chaos.kill_head()
        said = chaos.run.wait_for_failure()
        assert "error: the head of the cluster" in said
        assert "run the same command to continue" in said
    with spot_cluster(machines=2) as chaos.cluster:
        chaos.rerun()
        chaos.wait_for(workers=2)
        chaos.run.interrupt()
    require_undisturbed_history(chaos, *pretraining(corpus, tmp_path, run))


def test_finetuning_has_one_history_too(corpus, tmp_path):
    where, run = with_tokenizer(str(tmp_path), corpus), run_folder(str(tmp_path), RUN)
    write_trained_base(run, *pretraining(corpus, tmp_path, run))
    random = np.random.default_rng(0)
    with (tmp_path / "chats.jsonl").open("w") as file:
        for _ in range(3000):
            turns = [("user", int(random.integers(2, 12))), ("assistant", int(random.integers(2, 40)))]
            messages = [{"role": role, "content": words(random, count)} for role, count in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = [*where, "--sft", str(tmp_path / "chats.jsonl"), "--steps", str(STEPS), *SETTINGS, "--workers", "1:2"]
    with spot_cluster(machines=2) as cluster:
        chaos = Chaos(cluster, "sft", run / "sft", flags)
        chaos.wait_for(workers=2)
        chaos.kill_controller()
        chaos.wait_for(workers=2)
        assert "another one goes on: The actor died" in chaos.run.output()
        chaos.kill(rank=1)
        chaos.wait_for(workers=1)
        chaos.kill(rank=0)
        chaos.run.wait_for_output("waiting for machines: there is room for 0 workers, at least 1 are needed")
        chaos.add_nodes(2)
        chaos.wait_for(workers=2)
        chaos.drain(rank=0, notice_s=10)
        chaos.wait_for(workers=1)
        chaos.run.interrupt()
    source = ChatRows(Tokenizer.load(run / "tokenizer"), LENGTH)
    require_undisturbed_history(chaos, source, open_mixture(run / "sft" / "data").train, run / "base")


def pretraining(corpus: str, root, run: Folder):
    """The rows of a run's pretraining, and the units they come from."""
    source = PretrainingRows(Tokenizer.load(run / "tokenizer"), LENGTH)
    return source, open_corpus(corpus, Folder.at(root / "data")).train


def write_trained_base(run: Folder, source, units, steps: int = 60) -> None:
    """A base model that has learned: from one that has not, finetuning amplifies rounding even more."""
    shape = {"depth": 2, "vocab_size": 300, "sequence_len": LENGTH, "micro_batch_rows": ROWS}
    plan = make_plan(**shape, batch_tokens=BATCH, steps=steps)
    tokenizer = Tokenizer.load(run / "tokenizer").fingerprint
    cursor = Cursor(StreamIdentity("none", tokenizer, LENGTH, ROWS, plan.micro_batches, plan.seed))
    model = build_model(plan)
    for result in plain_loop(plan, model, source, units, steps):
        cursor = cursor.advanced(result.last_row, BATCH)
    Checkpoints.of(run / "base").save(TrainState(plan, cursor), model.state_dict(), {})


def plain_loop(plan, model, source, units, steps: int):
    """What each step of a training does, one after the other in this process."""
    optimizer = build_optimizer(model, plan.rates, torch.float32)
    stream = micro_batches(source, units, plan.micro_batch_rows, RowId(0, 0, 0), plan.seed)
    cursor = Cursor(StreamIdentity("", "", LENGTH, plan.micro_batch_rows, plan.micro_batches, plan.seed))

    def summed_loss(inputs_BT, targets_BT):
        return model(inputs_BT, targets_BT, reduction="sum")

    for _ in range(steps):
        result = run_step(plan, summed_loss, optimizer, cursor, 0, stream, World(0, 1, torch.device("cpu")))
        cursor = cursor.advanced(result.last_row, plan.batch_tokens)
        yield result


def require_undisturbed_history(chaos: Chaos, source, units, base: Folder | None = None) -> None:
    """Each step once, with the rows and the loss of a plain loop over the units.

    Args:
        base: with whose weights the loop begins; None: at random.
    """
    done = chaos.run.events("step")
    assert [step["step"] for step in done] == list(range(len(done)))
    checkpoints = Checkpoints.of(chaos.stage)
    plan = checkpoints.state(checkpoints.steps()[-1]).plan
    model = build_model(plan)
    if base is not None:
        model.load_state_dict(Checkpoints.of(base).model(Checkpoints.of(base).steps()[-1]))
    for step, result in zip(done, plain_loop(plan, model, source, units, len(done)), strict=True):
        assert step["stream_hash"] == result.stream_hash
        strict = base is not None or step["step"] < LATER
        assert step["loss"] == pytest.approx(result.loss, rel=SAME if strict else SAME_LATER)
