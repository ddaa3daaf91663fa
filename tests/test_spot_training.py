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
# Relative, of losses in fp32 with different numbers of workers. Training amplifies rounding: weights that differ by
# 1e-7 at the start give losses that differ by 1e-5 after 50 steps and 1e-4 after 140, in one process.
SAME, SAME_LATER, LATER = 1e-4, 5e-4, 50


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
    write_finished_base(run)
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
    """What `require_undisturbed_history` needs to know of it."""
    source = PretrainingRows(Tokenizer.load(run / "tokenizer"), LENGTH)
    return source, open_corpus(corpus, Folder.at(root / "data")).train, None


def write_finished_base(run: Folder) -> None:
    """As if it had been trained: at step 1 of 1."""
    plan = make_plan(depth=2, vocab_size=300, sequence_len=LENGTH, micro_batch_rows=ROWS, batch_tokens=BATCH, steps=1)
    identity = StreamIdentity(
        "none", Tokenizer.load(run / "tokenizer").fingerprint, LENGTH, ROWS, plan.micro_batches, plan.seed
    )
    state = TrainState(plan, Cursor(identity, step=1, tokens=BATCH))
    Checkpoints.of(run / "base").save(state, build_model(plan).state_dict(), {})


def require_undisturbed_history(chaos: Chaos, source, units, initial_model: Folder | None) -> None:
    """Each step once, with the rows and the loss of a plain loop over the units in this process."""
    done = chaos.run.events("step")
    assert [step["step"] for step in done] == list(range(len(done)))
    checkpoints = Checkpoints.of(chaos.stage)
    state = checkpoints.state(checkpoints.steps()[-1])
    plan, cursor = state.plan, Cursor(state.cursor.identity)
    model = build_model(plan)
    if initial_model is not None:
        before = Checkpoints.of(initial_model)
        model.load_state_dict(before.model(before.steps()[-1]))
    optimizer = build_optimizer(model, plan.rates, torch.float32)
    stream = micro_batches(source, units, plan.micro_batch_rows, RowId(0, 0, 0), plan.seed)

    def summed_loss(inputs_BT, targets_BT):
        return model(inputs_BT, targets_BT, reduction="sum")

    for step in done:
        result = run_step(plan, summed_loss, optimizer, cursor, 0, stream, World(0, 1, torch.device("cpu")))
        cursor = cursor.advanced(result.last_row, plan.batch_tokens)
        assert step["stream_hash"] == result.stream_hash
        assert step["loss"] == pytest.approx(result.loss, rel=SAME if step["step"] < LATER else SAME_LATER)
