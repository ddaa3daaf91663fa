"""CORE of any causal language model in Hugging Face's format, through the same questions and the same judge."""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.eval.core import CoreTask
from nanochat_ray.eval.exam import CONTEXT_TIMES, Grade, core_grader
from nanochat_ray.eval.measure import Subject
from nanochat_ray.eval.question import EndScore, Question
from nanochat_ray.eval.reading import Reading, readings_of
from nanochat_ray.storage import Folder

BATCH_TOKENS = 4096  # padding included
OUR_MODEL_TYPE = "nanochat_ray"  # in the config.json of jobs.export
_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIGURATION = ("*.json", "*.model", "*.txt", "*.py", "*.tiktoken")


@dataclass(frozen=True)
class HuggingFaceExam:
    """CORE's tasks for a model folder.

    trust_code   whether Python code that comes with the model may run
    """

    path: str
    tasks: Sequence[CoreTask]
    dtype: str
    trust_code: bool = False

    def begin(self) -> Grade:
        from nanochat_ray.device import pick_device, pick_dtype

        device, _ = pick_device()
        dtype, _ = pick_dtype(device, self.dtype)
        model, tokenizer = _load(self.path, self.trust_code)
        return core_grader(self.tasks, tokenizer, HuggingFaceScorer(model.to(device, dtype).eval()))


def model_digest(path: str) -> str:
    """sha256 of everything in a model folder that its answers may depend on: weights, configuration, tokenizer, code.

    Raises:
        UserError: it has none.
    """
    if not [file for pattern in _WEIGHTS for file in Path(path).glob(pattern)]:
        raise UserError(f"no weights (*.safetensors, *.bin) in {path}; --hf wants the folder of a downloaded model")
    hasher = hashlib.sha256()
    for file in sorted(file for pattern in (*_WEIGHTS, *_CONFIGURATION) for file in Path(path).glob(pattern)):
        with open(file, "rb") as stream:
            hasher.update(f"\0{file.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()


def subject_of(path: str, stage: Folder, dtype: str) -> Subject:
    """The model of a folder, whose evaluations are kept in `stage`."""
    return Subject(Path(path).name, stage, 0, model_digest(path), dtype)


class HuggingFaceScorer:
    """Scores questions in batches of equally padded readings; what sequences share is read again by each."""

    def __init__(self, model: Any, batch_tokens: int = BATCH_TOKENS) -> None:
        self.limit = _limit(model.config)
        self._model = model
        self._batch_tokens = batch_tokens
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[EndScore]]]:
        """Each question with the scores of its sequences' ends."""
        found: dict[int, dict[int, EndScore]] = {number: {} for number in range(len(questions))}
        todo = [(number, reading) for number, question in enumerate(questions) for reading in readings_of(question)]
        todo.sort(key=lambda pair: -len(pair[1].ids))
        while todo:
            count = max(1, self._batch_tokens // len(todo[0][1].ids))
            batch, todo = todo[:count], todo[count:]
            for (number, reading), logits_RV in zip(batch, self._logits([r for _, r in batch]), strict=True):
                nats_RV = -torch.log_softmax(logits_RV, dim=-1)
                likeliest_R = logits_RV.argmax(dim=-1).numpy()
                for member in reading.members:
                    targets = torch.tensor(questions[number].sequences[member][reading.first + 1 :])
                    nats = nats_RV.gather(1, targets.unsqueeze(1)).squeeze(1)
                    found[number][member] = EndScore(nats.numpy(), likeliest_R)
        for number, question in enumerate(questions):
            yield question, [found[number][member] for member in range(len(question.sequences))]

    @torch.inference_mode()
    def _logits(self, readings: Sequence[Reading]) -> list[torch.Tensor]:
        """fp32 (rows, V) of each reading."""
        length = max(len(reading.ids) for reading in readings)
        # Padding stands behind, where causal attention does not look; its ids mean nothing.
        ids_BT = torch.zeros(len(readings), length, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, reading in enumerate(readings):
            ids_BT[row, : len(reading.ids)] = torch.tensor(reading.ids)
            mask_BT[row, : len(reading.ids)] = 1
        first = min(reading.first for reading in readings)
        kept = {"logits_to_keep": length - first} if self._keeps else {}
        device = self._model.device
        output = self._model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, **kept)
        begin = length - output.logits.shape[1]
        return [
            output.logits[row, reading.first - begin : len(reading.ids) - begin].float().cpu()
            for row, reading in enumerate(readings)
        ]


def _limit(config: Any) -> int | None:
    """Most tokens that the model reads; None: any number. An export of ours reads as far as the run it came from."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions * CONTEXT_TIMES if positions and config.model_type == OUR_MODEL_TYPE else positions


class _TextTokenizer:
    """What rendering asks of a tokenizer; special tokens are those of the model, and text makes none."""

    def __init__(self, tokenizer: Any, path: str) -> None:
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise UserError(f"the tokenizer of {path} has no token that begins a text (bos_token or eos_token)")
        self.bos: int = bos
        # Where its files are missing, transformers may make an empty one without a word.
        if set(self.encode("The fox is red.")) <= {tokenizer.unk_token_id}:
            raise UserError(f"the tokenizer of {path} knows no words; its files are missing or damaged")

    def encode(self, text: str) -> list[int]:
        """Ids of any number; too many are cut later, so transformers need not warn of them."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _load(path: str, trust_code: bool) -> tuple[Any, _TextTokenizer]:
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("--hf needs the package transformers: pip install 'nanochat_ray[hf]'") from error
    logging.set_verbosity_error()  # what matters is said by our own errors
    logging.disable_progress_bar()
    how = {"trust_remote_code": trust_code, "local_files_only": True}
    # Weights that do not fit are told of below, together with those that are missing.
    how_model = how | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **how_model)
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        hint = "" if trust_code else "; if it comes with code that you trust, give --trust-code"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no causal language model can be loaded from {path}: {reason}{hint}") from error
    model, found = loaded
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in sorted(found[kind], key=str)]
    if wrong:  # which would stay as they were initialised: at random
        raise UserError(
            f"no causal language model can be loaded from {path}: {len(wrong)} of its weights are missing or have "
            f"another shape than its config.json says, {wrong[0]} first"
        )
    return model, _TextTokenizer(tokenizer, path)
