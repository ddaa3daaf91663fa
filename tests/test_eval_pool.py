"""An exam spread over real Ray actors: each question once, whoever dies."""

import os
import signal
import threading
import time
from collections import Counter

import pytest

from nanochat_ray.errors import UserError
from nanochat_ray.eval.exam import identity, pieces
from nanochat_ray.eval.pool import DEATHS_PER_PIECE, sit
from tests.scripted_exam import Numbers, ScriptedExam

CPU = {"CPU": 1.0}


def answered(exam: ScriptedExam, workers: int, size: int = 4, tell=lambda workers: None) -> Counter:
    """How often each question was answered."""
    todo = pieces(exam.tasks, size, set())
    return Counter(
        (verdict.task, verdict.index)
        for verdicts in sit(exam, todo, workers, CPU, tell_workers=tell)
        for verdict in verdicts
    )


def each_once(exam: ScriptedExam) -> Counter:
    return Counter({(task.name, index): 1 for task in exam.tasks for index in range(len(task.items))})


def test_pieces_hold_what_is_not_done_once_and_the_dearest_come_first():
    cheap, dear = Numbers("cheap", tuple(range(10)), 1.0), Numbers("dear", tuple(range(5)), 100.0)
    found = pieces([cheap, dear], 4, {("cheap", 0), ("dear", 4)})
    assert [piece.task for piece in found[:1]] == ["dear"]
    assert sorted((piece.task, index) for piece in found for index in piece.indices) == sorted(
        [("cheap", n) for n in range(1, 10)] + [("dear", n) for n in range(4)]
    )
    assert max(len(piece.indices) for piece in found) == 4


def test_an_exam_is_another_when_model_dtype_or_questions_are():
    tasks = [Numbers("a", (1, 2))]
    known = identity("CORE", "weights", "bf16", tasks)
    others = [
        identity("ChatCORE", "weights", "bf16", tasks),
        identity("CORE", "other", "bf16", tasks),
        identity("CORE", "weights", "fp32", tasks),
        identity("CORE", "weights", "bf16", [Numbers("a", (1, 2, 3))]),
    ]
    assert known == identity("CORE", "weights", "bf16", [Numbers("a", (1, 2))])
    assert known not in others


@pytest.mark.ray
def test_questions_are_handed_out_to_all_workers_and_each_is_answered_once(ray_cluster, tmp_path):
    exam = ScriptedExam((Numbers("a", tuple(range(30))), Numbers("b", tuple(range(7)))), str(tmp_path), seconds=0.2)
    told: list[int] = []
    assert answered(exam, 2, tell=told.append) == each_once(exam)
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert told == [1, 2]


@pytest.mark.ray
def test_a_killed_worker_costs_only_what_it_had_in_hand(ray_cluster, tmp_path):
    exam = ScriptedExam((Numbers("a", tuple(range(40))),), str(tmp_path), seconds=0.3)

    def kill_the_first() -> None:
        until = time.monotonic() + 60
        while not (pids := sorted(tmp_path.glob("*.pid"))) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(int(pids[0].stem), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    told: list[int] = []
    assert answered(exam, 2, tell=told.append) == each_once(exam)
    killer.join()
    assert len(list(tmp_path.glob("*.pid"))) in (2, 3)  # a third, unless the second was done before it was there
    assert min(told[1:]) < max(told)


@pytest.mark.ray
def test_questions_that_kill_once_are_asked_again_and_those_that_kill_always_end_the_exam(ray_cluster, tmp_path):
    once = ScriptedExam((Numbers("a", tuple(range(12))),), str(tmp_path), deadly=5, deaths=1)
    assert answered(once, 2) == each_once(once)
    always = ScriptedExam((Numbers("a", tuple(range(12))),), str(tmp_path), deadly=5, deaths=10**6)
    with pytest.raises(UserError, match=f"{DEATHS_PER_PIECE} workers died over the same questions of a"):
        answered(always, 1)


@pytest.mark.ray
def test_a_model_that_cannot_be_loaded_is_the_users_error(ray_cluster, tmp_path):
    exam = ScriptedExam((Numbers("a", (1,)),), str(tmp_path), unloadable="no trained model in x")
    with pytest.raises(UserError) as caught:
        answered(exam, 1)
    assert str(caught.value) == "no trained model in x"
