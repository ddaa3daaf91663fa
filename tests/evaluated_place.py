"""A storage with tiny runs in it, and the evaluation jobs as commands on it."""

from pathlib import Path

import pytest

from jobs import base_eval, chat_eval
from nanochat_ray import cli
from nanochat_ray.storage import Folder, run_folder
from tests.small_bundle import write_bundle, write_tasks
from tests.small_corpus import write_corpus
from tests.tiny_runs import make_run


class Place:
    """A storage with tiny runs in it, and all that is asked of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, str(root / "out")
        write_corpus(root / "corpus", documents=20)
        write_bundle(root / "bundle")
        write_tasks(root / "tasks")

    def stage(self, run: str, stage: str = "base") -> Folder:
        return run_folder(self.storage, run) / stage

    def results(self, score: dict, run: str, stage: str = "base") -> Path:
        """The file of every answer behind a score."""
        return Path(str(self.stage(run, stage) / score["results"]))

    def base_eval(self, *flags: str) -> int:
        place = [
            "--storage",
            self.storage,
            "--corpus",
            str(self.root / "corpus"),
            "--bundle",
            str(self.root / "bundle"),
        ]
        return cli.run(
            base_eval.main, base_eval.build_parser(), [*place, "--eval-tokens", "1024", "--dtype", "fp32", *flags]
        )

    def chat_eval(self, *flags: str) -> int:
        place = ["--storage", self.storage, "--dtype", "fp32", "--max-tokens", "8"]
        return cli.run(chat_eval.main, chat_eval.build_parser(), [*place, *flags])

    def core(self, run: str) -> dict:
        return self.stage(run).read_json("base_eval.json")["core"]

    def new_run(self, run: str, seed: int = 0) -> None:
        make_run(run_folder(self.storage, run), stages=("base", "sft"), seed=seed)


def forbid_models(patch: pytest.MonkeyPatch) -> None:
    """From now on, whoever loads a model to ask it something fails."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded although nothing is to be asked")

    patch.setattr("nanochat_ray.engine.load.load_chat_model", load)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said last, which must be one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "this is a bug" not in line
    return line
