"""Where a run stands: all that must survive a restart besides weights and optimizer state."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat_ray.errors import UserError


@dataclass(frozen=True, order=True)
class RowId:
    """The place of a row in the global sequence: the `row`-th row of the `position`-th unit visited in `epoch`."""

    epoch: int
    position: int
    row: int

    def next(self) -> "RowId":
        """Where to go on after this row; `row` may lie past the unit's end, which means the next unit."""
        return replace(self, row=self.row + 1)


@dataclass(frozen=True)
class StreamIdentity:
    """What the sequence of rows depends on. A resume with any other identity is refused."""

    corpus: str
    tokenizer: str
    sequence_len: int
    micro_batch_rows: int
    micro_batches: int
    seed: int


@dataclass(frozen=True)
class Cursor:
    """State of the stream before `step`: the next row to read and what was done so far.

    Randomness needs no field: every draw is keyed by (seed, epoch, unit) or by (seed, step).
    """

    identity: StreamIdentity
    step: int = 0
    tokens: int = 0
    next_row: RowId = RowId(0, 0, 0)

    def advanced(self, last_row: RowId, tokens: int) -> "Cursor":
        """The cursor after a step whose last row was `last_row` and that trained on `tokens` tokens."""
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens, next_row=last_row.next())

    def require_identity(self, identity: StreamIdentity) -> None:
        """Refuse to continue with other data.

        Raises:
            UserError: naming each difference.
        """
        saved, given = asdict(self.identity), asdict(identity)
        differences = [f"{name} was {saved[name]}, now {given[name]}" for name in saved if saved[name] != given[name]]
        if differences:
            raise UserError(
                f"this run cannot continue at step {self.step} with another stream: {'; '.join(differences)}. "
                "Restore these, use another --run, or start anew with --fresh"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "Cursor":
        return Cursor(
            identity=StreamIdentity(**value["identity"]),
            step=value["step"],
            tokens=value["tokens"],
            next_row=RowId(**value["next_row"]),
        )
