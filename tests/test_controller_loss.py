"""When Ray Train's controller is lost, another goes on; a loss that repeats itself ends the command, in words."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import ray.train
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError

from nanochat_ray.cluster import Cluster
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.train import ray_trainer
from nanochat_ray.train.events import EventLog
from nanochat_ray.train.ray_trainer import run_training

WHY = "The actor is dead because its worker process has died."
STEP = {"loss": 1.0, "tok_per_s": 9.0, "mfu": None, "workers": 2, "data_wait_s": 0.0, "seconds": 1.0}
LOST = ActorDiedError(
    ActorDiedErrorContext(class_name="TrainController", actor_id=bytes(16), error_message=WHY, never_started=True)
)


@dataclass
class Job:
    """As much of a `TrainingJob` as the driver's side asks for."""

    stage: Folder
    attempt: str = ""
    attempt_began: float = 0.0
    plan = SimpleNamespace(steps=10, to_dict=dict)

    def saved_state(self):
        return None


@pytest.fixture
def controllers(monkeypatch, tmp_path):
    """Called with what becomes of each controller, the step it reaches and its error: trains; the names of all."""

    def train(*ends) -> list[str]:
        job, names, left = Job(Folder.at(tmp_path)), [], list(ends)
        events = EventLog(job.stage, resume_step=0)

        def fit(name, *_):
            names.append(name)
            step, error = left.pop(0)
            events.append("step", step=step, **STEP)
            if error is not None:
                raise error

        monkeypatch.setattr(ray_trainer, "_trainer", lambda *_, name: name)
        monkeypatch.setattr(ray_trainer, "_fit", fit)
        monkeypatch.setattr(ray_trainer, "give_back_reservations", lambda: None)
        try:
            run_training(job, Cluster("127.0.0.1:1", cpus=4, gpus=0, nodes=1), (1, 2))
        finally:
            events.close()
        return names

    return train


def test_another_controller_goes_on_by_a_name_of_its_own(controllers, capsys):
    lost_with_a_worker = ray.train.ControllerError(LOST)
    names = controllers((3, LOST), (5, lost_with_a_worker), (10, None))
    assert len(set(names)) == 3
    said = capsys.readouterr().err
    assert f"lost after step 5, another one goes on: {str(LOST).splitlines()[0]}" in said
    assert WHY in said  # Ray's last line, that the actor never ran, says nothing


def test_controllers_that_are_lost_again_and_again_without_a_step_end_the_command(controllers):
    with pytest.raises(UserError, match=f"training failed: .*{WHY}"):
        controllers((3, LOST), (4, LOST), (4, LOST), (4, LOST))


def test_a_mistake_inside_a_controller_is_not_repeated(controllers):
    mistake = RayTaskError("run", "Traceback\nValueError: no such thing", ValueError("no such thing"))
    for error in (ray.train.ControllerError(ValueError("no such thing")), mistake):
        with pytest.raises(UserError, match=r"training failed: .*no such thing"):
            controllers((3, error))
