"""When a group of workers saves and leaves: counted from machines that answer and stay. Pure; no cluster."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from nanochat_ray.train import elastic
from nanochat_ray.train.elastic import (
    IN_VAIN_FOR_S,
    STEADY_FOR_S,
    Machines,
    UsableMachinesPolicy,
    WaitUntilGivenBack,
    Watch,
    grew_in_vain,
)

WORKER = {"CPU": 1.0}
SCALING = ScalingConfig(num_workers=(1, 2), resources_per_worker=WORKER)
GPU_WORKER = {"GPU": 1.0, "CPU": 1.0}


class Sky:
    """Machines as a test wants them, and a clock."""

    def __init__(self, usable, leaving=None):
        self.machines, self.now = Machines(usable, leaving or {}), 1000.0

    def watch(self, own, most):
        return Watch(own, len(own), most, WORKER, lambda: self.machines, lambda: self.now)


def cpus(**nodes):
    return {name: {"CPU": float(count)} for name, count in nodes.items()}


@pytest.mark.parametrize(
    ("usable", "per_worker", "places"),
    [
        (cpus(a=2, b=2), WORKER, 2),
        (cpus(a=3), WORKER, 2),
        (cpus(a=1), WORKER, 0),  # no room to read data beside it
        ({"head": {"memory": 1e9}, **cpus(a=2)}, WORKER, 1),
        ({"a": {"GPU": 8.0, "CPU": 96.0}, "b": {"GPU": 8.0, "CPU": 6.0}, "head": {"CPU": 16.0}}, GPU_WORKER, 12),
        ({}, WORKER, 0),
    ],
)
def test_a_place_has_what_a_worker_needs_and_room_to_read_its_data(usable, per_worker, places):
    assert Machines(usable, {}).places(per_worker) == places


@pytest.mark.parametrize(
    ("usable", "least", "places"),
    [
        (cpus(a=10), 8, 8),  # comfortable for six only, but eight were asked for and one task fits
        (cpus(a=8), 8, 7),
        (cpus(a=2, b=2), 1, 2),
        (cpus(a=1), 1, 0),
    ],
)
def test_the_fewest_workers_may_share_room_for_one_task(usable, least, places):
    assert Machines(usable, {}).places(WORKER, least) == places


def test_a_group_that_grew_in_vain_has_patience():
    events = [
        {"kind": "start", "attempt": "a", "workers": 2},
        {"kind": "step"},
        {"kind": "leave", "workers": 2, "why": "growth"},
    ]
    assert grew_in_vain(events, "a", workers=2)
    assert not grew_in_vain(events, "a", workers=3)
    assert not grew_in_vain(events, "another", workers=2)
    assert not grew_in_vain([*events[:2], {"kind": "leave", "workers": 2, "why": "notice"}], "a", workers=1)
    assert not grew_in_vain([], "a", workers=1)

    sky = Sky(cpus(a=2, b=2))
    watch = sky.watch({"a"}, most=4)
    watch.patient = True
    for wait_s, grows in ((0, False), (STEADY_FOR_S, False), (IN_VAIN_FOR_S, True)):
        sky.now += wait_s
        watch.look()
        assert watch.may_grow == grows


def test_a_notice_is_taken_once_per_machine_and_the_first_deadline_counts():
    sky = Sky(cpus(b=2), leaving={"a": 1030.0})
    watch = sky.watch({"a", "b"}, most=4)
    watch.look()
    assert watch.deadline == 1030.0
    assert [watch.take_notice(), watch.take_notice()] == [True, False]
    watch.look()
    assert not watch.take_notice()
    sky.machines = Machines({}, {"a": 1030.0, "b": 1020.0})
    watch.look()
    assert watch.take_notice()
    assert watch.deadline == 1020.0


def test_the_notice_of_a_machine_of_another_job_is_not_ours():
    sky = Sky(cpus(a=2), leaving={"z": 1030.0})
    watch = sky.watch({"a"}, most=1)
    watch.look()
    assert not watch.take_notice()
    assert watch.deadline is None


def test_a_group_grows_once_more_room_has_been_there_for_a_while():
    sky = Sky(cpus(a=2, b=2))
    watch = sky.watch({"a"}, most=4)
    watch.look()
    assert not watch.may_grow
    sky.now += STEADY_FOR_S
    watch.look()
    assert watch.may_grow
    sky.machines = Machines(cpus(a=2), {})  # it was only passing by
    watch.look()
    assert not watch.may_grow


def test_a_group_of_the_largest_size_does_not_grow():
    sky = Sky(cpus(a=2, b=2, c=2))
    watch = sky.watch({"a", "b"}, most=2)
    for _ in range(3):
        sky.now += STEADY_FOR_S
        watch.look()
        assert not watch.may_grow


def test_a_machine_that_is_replaced_before_it_goes_does_not_make_the_group_leave_early():
    sky = Sky(cpus(b=2, c=2), leaving={"a": 1030.0})
    watch = sky.watch({"a", "b"}, most=4)
    for _ in range(3):
        sky.now += STEADY_FOR_S
        watch.look()
    assert not watch.may_grow
    assert watch.deadline == 1030.0


def test_a_controller_takes_over_what_its_predecessor_had_asked_for(monkeypatch):
    asked = []

    class Client:
        def __init__(self, requester):
            self.requester = requester

        def send_resource_request(self, config, workers):
            asked.append((self.requester, workers))

    monkeypatch.setattr(elastic, "TrainAutoscalingCoordinatorClient", Client)
    for run in ("first", "second"):
        policy = UsableMachinesPolicy(SCALING, "train-stage", lambda seconds: None)
        policy.after_controller_start(SimpleNamespace(run_id=run))
    assert asked == [("train-stage", 2)] * 2


def test_a_head_or_machine_that_is_just_going_does_not_end_the_run(monkeypatch, capsys):
    """Ray Train gives up when its policy or a callback raises, whatever `max_failures` is."""
    policy = UsableMachinesPolicy(SCALING, "train-run", lambda seconds: None)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    machines = [RuntimeError("the head is away"), Machines({}, {}), Machines(cpus(a=2), {})]

    def look():
        answer = machines.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(elastic, "look_at_machines", look)
    decisions = [policy.make_decision_for_non_running_worker_group() for _ in range(3)]
    assert [type(decision) for decision in decisions] == [NoopDecision, NoopDecision, ResizeDecision]
    assert decisions[2].num_workers == 1
    assert "the head is away" in capsys.readouterr().err

    machines.append(RuntimeError("the head is away"))
    WaitUntilGivenBack(WORKER).after_worker_group_shutdown(None)

    asked = []

    def execute_async(function):
        asked.append(function)
        raise RuntimeError("the machine of worker 0 has gone")

    worker = SimpleNamespace(metadata=SimpleNamespace(node_id="a"), execute_async=execute_async)
    group = SimpleNamespace(start_time=1.0, workers=[worker])
    monkeypatch.setattr(elastic.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    for looks in (1, 2):
        assert isinstance(policy.make_decision_for_running_worker_group(group), NoopDecision)
        assert "the machine of worker 0 has gone" in capsys.readouterr().err
        assert len(asked) == looks  # again each time: nothing of the group is taken for known
