"""Our network in Hugging Face's terms: names of parameters, `config.json`, `generation_config.json`.

A model of October 2025, which has no extras, is written for transformers' own `NanoChatForCausalLM`. Any other goes
with `hf/modeling_nanochat_ray.py`, whose parameters have the names of ours. In both, tables have a row per token: the
rows that pad our vocabulary stay behind, and come back as zeros, which nothing ever reads.
"""

import importlib.resources
import re
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_ray.plan.shape import ModelShape
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Tensors

MODELING = "modeling_nanochat_ray"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FP32_EPSILON = torch.finfo(torch.float32).eps  # of our norms in fp32, in which transformers' NanoChat computes its own
_TABLES = re.compile(r"transformer\.wte\.weight|lm_head\.weight|value_embeds\.\d+\.weight")
_OWN_NAMES = (  # ours, and those of transformers' NanoChat
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."),
    (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


@dataclass(frozen=True)
class Endings:
    """Which special tokens end what a model writes, by name; the first one is *the* end of sequence."""

    names: tuple[str, ...]

    @staticmethod
    def of(stage: str) -> "Endings":
        """Of a base model: a new document. Of a chat model: whatever has no place inside a reply, as in serving."""
        if stage == "base":
            return Endings(("bos",))
        return Endings(("assistant_end", "bos", "user_start", "user_end", "assistant_start"))


def is_known_to_transformers(shape: ModelShape) -> bool:
    """Whether transformers' own NanoChat computes the same."""
    extras = shape.layer_scalars or shape.smear or shape.backout or shape.value_embeddings
    sees_all = min(shape.windows) >= shape.sequence_len
    return not extras and shape.query_key_scale == 1.0 and sees_all


def hf_config(shape: ModelShape, tokenizer: Tokenizer, endings: Endings, dtype: str) -> dict[str, Any]:
    """The content of `config.json`. `dtype` is a name in DTYPES."""
    common = {
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "max_position_embeddings": shape.sequence_len,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_token_ids(tokenizer),
        "eos_token_id": tokenizer.special(endings.names[0]),
    }
    if is_known_to_transformers(shape):
        return {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            **common,
            "intermediate_size": 4 * shape.n_embd,
            "hidden_act": "relu2",
            "rms_norm_eps": FP32_EPSILON,
            "final_logit_softcapping": 15.0,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        }
    short = min(shape.windows)
    return {
        "architectures": ["NanochatRayForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.NanochatRayConfig",
            "AutoModelForCausalLM": f"{MODELING}.NanochatRayForCausalLM",
        },
        "model_type": "nanochat_ray",
        **common,
        "attention_windows": list(shape.windows),
        "layer_types": [
            "sliding_attention" if window < shape.sequence_len else "full_attention" for window in shape.windows
        ],
        "sliding_window": short + 1 if short < shape.sequence_len else None,  # theirs counts the position itself
        "rotary_base": shape.rotary_base,
        "query_key_scale": shape.query_key_scale,
        "layer_scalars": shape.layer_scalars,
        "smear": shape.smear,
        "backout": shape.backout,
        "value_embedding_layers": list(shape.value_embedding_layers),
    }


def generation_config(tokenizer: Tokenizer, endings: Endings) -> dict[str, Any]:
    """The content of `generation_config.json`: greedy, to the end of the reply or document."""
    ends = [tokenizer.special(name) for name in endings.names]
    return {**_token_ids(tokenizer), "eos_token_id": ends, "do_sample": False}


def modeling_code() -> bytes:
    """The module that a bundle brings along for models that transformers does not know."""
    return importlib.resources.files("nanochat_ray.exchange").joinpath(f"hf/{MODELING}.py").read_bytes()


def to_hf(shape: ModelShape, tensors: Tensors, dtype: str) -> Tensors:
    """A model's tensors under the names that `hf_config` implies. Learned scalars stay in fp32, which costs nothing."""
    theirs = {}
    for name, tensor in tensors.items():
        if _TABLES.fullmatch(name):
            tensor = tensor[: shape.vocab_size]
        if is_known_to_transformers(shape):
            for own, other in _OWN_NAMES:
                name = name.replace(own, other)
        theirs[name] = tensor.to(DTYPES[dtype]) if tensor.dim() > 1 else tensor
    return theirs


def from_hf(shape: ModelShape, tensors: Tensors) -> Tensors:
    """The tensors as our network takes them: fp32, with our names and padded tables."""
    ours = {}
    for name, tensor in tensors.items():
        if is_known_to_transformers(shape):
            for own, other in _OWN_NAMES:
                name = name.replace(other, own)
        tensor = tensor.float()
        if _TABLES.fullmatch(name):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, shape.padded_vocab_size - len(tensor)))
        ours[name] = tensor
    return ours


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Padding is no token that begins a text, or generation without a mask would take that for padding."""
    return {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.special("assistant_end")}
