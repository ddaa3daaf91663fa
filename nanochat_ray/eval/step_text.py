"""Text through a step model, as the engine uses one: what each token costs, and what the model would write."""

import numpy as np
import torch

from nanochat_ray.eval.question import EndScore, Question
from nanochat_ray.eval.scorer import StepScorer
from nanochat_ray.model.ragged import StepModel


class StepText:
    """A model that reads rows of tokens. Takes the model's blocks for itself: not beside an engine."""

    def __init__(self, model: StepModel) -> None:
        self._scorer = StepScorer(model)

    def read(self, tokens_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows (M, T + 1) of tokens: the loss of each but the first in nats, fp32, and the likeliest in its place.

        Returns:
            two arrays (M, T).
        """
        scores = [self._score(row, 1) for row in tokens_MT.tolist()]
        return np.stack([score.nats for score in scores]), np.stack([score.likeliest for score in scores])

    def losses(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Nats fp32 (B, T) for `evaluate_bpb`; the targets are the inputs one place further, none is left out."""
        tokens = torch.cat([inputs_BT, targets_BT[:, -1:]], dim=1)
        return torch.from_numpy(self.read(tokens.cpu().numpy())[0])

    def continued(self, ids: list[int], count: int) -> list[int]:
        """So many tokens that follow, the likeliest each time. Reads all again for each: for a few short texts."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self._score([*ids, 0], len(ids)).likeliest[0]))
        return ids[-count:]

    def _score(self, ids: list[int], start: int) -> EndScore:
        question = Question("text", 0, (tuple(ids),), (start,), None, "")
        ((_, (score,)),) = self._scorer.score([question])
        return score
