"""The optimizer over real gloo groups: the number of workers changes nothing but rounding."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from tests.test_optim import RATES

# 3 layers: with 2, backout is without effect and its gradient is rounding. Tables are sharded, gates and scalars not.
CONFIG = GPTConfig(16, 181, 3, 2, 1, 24, "SL")
MICRO_BATCHES, ROWS = 4, 2
multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # import torch once, not per worker


def train(first_step, steps, rank, world, start=None):
    """Micro-batch i of a step is run by worker i mod W, as in a real run. Returns weights and optimizer state."""
    model = GPT(CONFIG)
    model.init_weights(0)
    optimizer = build_optimizer(model, RATES)
    if start is not None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    losses = []
    for step in range(first_step, first_step + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 181, (MICRO_BATCHES, ROWS, 17), generator=generator)
        total = torch.zeros(())
        for i in range(rank, MICRO_BATCHES, world):
            loss = model(ids[i, :, :-1], ids[i, :, 1:], reduction="sum")
            loss.backward()
            total += loss.detach()
        targets = MICRO_BATCHES * ROWS * 16
        optimizer.step(lr_multiplier=0.2, momentum=0.9, weight_decay=0.2, grad_scale=1 / targets)
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / targets)
    return model.state_dict(), optimizer.state_dict(), losses


def run_worker(rank, world, folder, first_step, steps, start_file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{world}", rank=rank, world_size=world)
    start = torch.load(start_file)[:2] if start_file else None
    weights, state, losses = train(first_step, steps, rank, world, start)
    if rank == 0:
        torch.save((weights, state, losses), f"{folder}/world_{world}.pt")
    else:
        assert state == {}
    other = weights["lm_head.weight"].clone()
    dist.broadcast(other, 0)
    assert torch.equal(other, weights["lm_head.weight"])  # all workers hold the same weights, bit for bit
    dist.destroy_process_group()


def in_processes(world, folder, first_step, steps, start_file=None):
    arguments = (world, str(folder), first_step, steps, start_file)
    mp.start_processes(run_worker, arguments, nprocs=world, start_method="forkserver")
    return torch.load(f"{folder}/world_{world}.pt")


def assert_same_training(ours, expected):
    assert ours[2] == pytest.approx(expected[2], rel=1e-5)
    for part, tolerance in ((0, 2e-3), (1, 5e-3)):
        assert ours[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            error = (ours[part][name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-8)
            assert error <= tolerance, f"{name}: relative difference {error:.2g}"


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 5))])
def test_any_number_of_workers_trains_the_same(world, tmp_path):
    assert_same_training(in_processes(world, tmp_path, 0, 5), train(0, 5, 0, 1))


@pytest.mark.slow
def test_more_workers_than_matrices_and_than_micro_batches_train_the_same(tmp_path):
    matrices = sum(name.startswith("transformer.h.") for name in GPT(CONFIG).state_dict())
    assert_same_training(in_processes(matrices + 2, tmp_path, 0, 2), train(0, 2, 0, 1))


@pytest.mark.slow
def test_thirty_steps_follow_the_same_loss_curve_for_one_two_and_three_workers(tmp_path):
    _, _, losses = train(0, 30, 0, 1)
    for world in (2, 3):
        assert in_processes(world, tmp_path, 0, 30)[2] == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_state_saved_by_three_workers_continues_with_two_and_with_one(tmp_path):
    undisturbed = train(0, 5, 0, 1)
    saved = in_processes(3, tmp_path, 0, 3)
    for continued in (
        in_processes(2, tmp_path, 3, 2, f"{tmp_path}/world_3.pt"),
        train(3, 2, 0, 1, saved[:2]),
    ):
        assert_same_training((*continued[:2], saved[2] + continued[2]), undisturbed)
