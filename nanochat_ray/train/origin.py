"""Where the weights of a stage came from that were not trained here: `<stage>/origin.json`.

A stage with an origin stands, at step 0, where others stand with random weights: its checkpoint of step 0 holds the
imported ones. It can be evaluated, served, finetuned and exported as it is, and trained on like any stage: the first
step begins at those weights, with a fresh optimizer and the stream at its beginning. They are kept beside the newer
checkpoints, also by --fresh, so that a run can always begin with them again.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.plan import ModelShape
from nanochat_ray.storage import Folder

ORIGIN = "origin.json"
START = 0  # the step of the checkpoint that holds what was imported
CHECKPOINTS = "checkpoints"  # their folder, in a stage


@dataclass(frozen=True)
class Origin:
    """The source of imported weights.

    Attributes:
        kind: what was read, as "nanochat checkpoint".
        digest: hex sha256 that stands for weights, configuration and tokenizer; equal for the same source.
        model: the shape of the network.
        facts: what else people may ask (JSON-able): path, step, generation, when. Not part of identity.
    """

    kind: str
    digest: str
    model: ModelShape
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def write(self, stage: Folder) -> None:
        stage.write_json(ORIGIN, asdict(self))

    @staticmethod
    def of(stage: Folder) -> "Origin | None":
        """The origin of a stage; None when it was, or will be, trained from random weights.

        Raises:
            UserError: the file is damaged; names it.
        """
        if not stage.exists(ORIGIN):
            return None
        stored = stage.read_json(ORIGIN)
        try:
            return Origin(**{**stored, "model": ModelShape(**stored["model"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{stage / ORIGIN} does not fit this version of nanochat_ray ({error})") from error

    def require_free_shape(self, **flags: Any) -> None:
        """Check that none of the flags that shape a model was given: the imported one has its shape.

        Raises:
            UsageError: names those that were.
        """
        given = [f"--{name.replace('_', '-')} {value}" for name, value in flags.items() if value is not None]
        if given:
            model = self.model
            raise UsageError(
                f"the model of this run is imported ({model.n_layer} layers, context {model.sequence_len:,}, "
                f"vocabulary {model.vocab_size:,}) and keeps its shape: leave out {', '.join(given)}"
            )


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:06d}"
