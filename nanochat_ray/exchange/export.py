"""From a run to a bundle: the trained model in every file that the rest of the world wants to read.

exported = export(run_folder("out", "demo"), "sft", None, "float32")
exported.write(Folder.at("demo-bundle"), fresh=False)
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.eval.kept import BASE_EVAL, CHAT_EVAL, SCORES, read_evaluation
from nanochat_ray.exchange.bundle import TOKENIZER, WEIGHTS, Content, Facts, write_bundle
from nanochat_ray.exchange.hf_model import (
    MODELING,
    Endings,
    generation_config,
    hf_config,
    is_known_to_transformers,
    modeling_code,
    to_hf,
)
from nanochat_ray.exchange.hf_tokenizer import (
    chat_template,
    hf_tokenizer,
    in_json,
    special_tokens_map,
    tokenizer_config,
)
from nanochat_ray.exchange.model_card import model_card
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Buffer, Folder
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import MODEL, STATE, Checkpoints, Loaded, TrainState, in_safetensors
from nanochat_ray.train.events import read_events
from nanochat_ray.train.origin import Origin

_EVALUATIONS = {"base": BASE_EVAL, "sft": CHAT_EVAL}


@dataclass(frozen=True, eq=False)
class Exported:
    """A bundle that is not written yet."""

    facts: Facts
    files: dict[str, Content]
    step: int

    def write(self, folder: Folder, fresh: bool) -> tuple[str, bool]:
        """Its digest, and whether anything had to be written; as `write_bundle`."""
        return write_bundle(folder, self.facts, self.files, fresh)


def export(run: Folder, stage: str, step: int | None, dtype: str) -> Exported:
    """The newest valid model of a stage of a run, or that of a step.

    Args:
        dtype: of the weights in the bundle: "float32" or "bfloat16", in which the logits are no longer ours.

    Raises:
        UserError: the run has no such model, it was trained with another tokenizer, or the tokenizer has no
            counterpart in Hugging Face's terms.
    """
    tokenizer = Tokenizer.load(run / "tokenizer")
    checkpoints = Checkpoints.of(run / stage)
    loaded = checkpoints.load(warn, (MODEL, STATE), step)
    if loaded is None:
        raise UserError(f"no trained model in {run / stage}; train it first, or choose another --stage")
    state = loaded.state
    if state.cursor.identity.tokenizer != tokenizer.fingerprint:
        raise UserError(f"{run / stage} was trained with another tokenizer than the one that is in its run now")
    source = _source(run, stage, state, checkpoints.digest(state.cursor.step))
    facts = Facts(state.plan.model, stage, tokenizer.fingerprint, source)
    return Exported(facts, _files(run, facts, loaded, tokenizer, dtype), state.cursor.step)


def _files(run: Folder, facts: Facts, loaded: Loaded, tokenizer: Tokenizer, dtype: str) -> dict[str, Content]:
    shape, endings = facts.shape, Endings.of(facts.stage)
    tensors = to_hf(shape, loaded.model, dtype)

    def weights() -> Iterable[Buffer]:
        return in_safetensors(tensors, {"format": "pt"})  # which transformers asks for

    texts = {
        "config.json": in_json(hf_config(shape, tokenizer, endings, dtype)),
        "generation_config.json": in_json(generation_config(tokenizer, endings)),
        "tokenizer.json": in_json(hf_tokenizer(tokenizer)),
        "tokenizer_config.json": in_json(tokenizer_config(shape.sequence_len, endings.names[0])),
        "special_tokens_map.json": in_json(special_tokens_map(endings.names[0])),
        "chat_template.jinja": chat_template(),
        "README.md": model_card(facts, dtype, loaded.state.plan),
    }
    files: dict[str, Content] = {WEIGHTS: weights, **{name: text.encode() for name, text in texts.items()}}
    for name in ("tokenizer.json", "ranks.tiktoken"):
        files[f"{TOKENIZER}/{name}"] = (run / "tokenizer").read(name)
    if not is_known_to_transformers(shape):
        files[f"{MODELING}.py"] = modeling_code()
    if run.exists("report/report.md"):
        files["report.md"] = (run / "report").read("report.md")
    return files


def _source(run: Folder, stage: str, state: TrainState, weights_sha256: str) -> dict[str, Any]:
    """Where the weights come from, as plain data: enough to find their run, their text and their figures again."""
    step = state.cursor.step
    events = read_events(run / stage)
    hashes = [event["stream_hash"] for event in events if event["kind"] == "step" and event["step"] == step - 1]
    bpbs = [event for event in events if event["kind"] == "eval" and event["step"] <= step]
    origin = Origin.of(run / stage)
    return {
        "run": run.uri.rsplit("/", 1)[-1],
        "stage": stage,
        "step": step,
        "tokens": state.cursor.tokens,
        "weights_sha256": weights_sha256,
        "stream": asdict(state.cursor.identity),
        "stream_hash": hashes[-1] if hashes else None,  # of the last step's rows
        "val_bpb": {"step": bpbs[-1]["step"], "value": bpbs[-1]["val_bpb"]} if bpbs else None,
        "began_with": state.initial_model or (origin.digest if origin else None),
        "origin": {"kind": origin.kind, "digest": origin.digest, **origin.facts} if origin else None,
        "benchmark": _benchmark(run / stage, stage, weights_sha256),
        "plan": _plan(state.plan),
    }


def _benchmark(stage: Folder, name: str, weights_sha256: str) -> dict[str, Any] | None:
    """CORE or ChatCORE of these very weights, if it was measured."""
    file = _EVALUATIONS[name]
    found = read_evaluation(stage, file).get(SCORES[file])
    if not found or found.get("model_digest") != weights_sha256:
        return None
    tasks = {
        name: {key: task[key] for key in ("examples", "accuracy", "centred")} for name, task in found["tasks"].items()
    }
    kept = ("name", "mean", "max_per_task", "questions_hash", "seeds")
    return {**{key: found.get(key) for key in kept}, "tasks": tasks}


def _plan(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.to_dict().items() if name not in ("model", "rules")}
