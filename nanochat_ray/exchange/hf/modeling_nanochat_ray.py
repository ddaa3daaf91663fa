"""A nanochat_ray model for Hugging Face transformers 5. This file travels with the weights and imports nothing of ours.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

A decoder-only transformer: rotary positions, RMS norms without weights, squared ReLU, a sliding attention window in
some layers, soft-capped logits. What the configuration switches on besides: learned mixtures of each layer's input with
the embedding, *smear* (a gated part of the previous token's embedding), value embeddings, *backout* (a part of the
middle layer's output is subtracted at the end). Parameters are named as in the public nanochat.

Shapes: B rows, T new positions, S positions with keys, D width, H query heads, G key and value heads, K channels of a
head, P = K/2, E = G·K, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

VALUE_GATE_CHANNELS = 12
VALUE_GATE_RANGE = 3.0
SMEAR_GATE_CHANNELS = 24
LOGIT_CAP = 15.0
# Later versions of transformers 5 have renamed it.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanochatRayConfig(PreTrainedConfig):
    """What the network is built from.

    Args:
        attention_windows: per layer w, so that position i sees the keys i−w … i.
        layer_types: per layer, what its cache keeps: "full_attention", or "sliding_attention" for
            `sliding_window` − 1 positions besides the new one.
        value_embedding_layers: layers that have a value embedding.
    """

    model_type = "nanochat_ray"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers wants a list)

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        max_position_embeddings: int = 2048,
        attention_windows: list[int] | None = None,
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        rotary_base: float = 100_000.0,
        query_key_scale: float = 1.2,
        layer_scalars: bool = True,
        smear: bool = True,
        backout: bool = True,
        value_embedding_layers: list[int] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.attention_windows = attention_windows or [max_position_embeddings] * num_hidden_layers
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.rotary_base = rotary_base
        self.query_key_scale = query_key_scale
        self.layer_scalars = layer_scalars
        self.smear = smear
        self.backout = backout
        self.value_embedding_layers = value_embedding_layers or []
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BHTK: torch.Tensor, cos_B1TP: torch.Tensor, sin_B1TP: torch.Tensor) -> torch.Tensor:
    """Turn each channel pair (c, c + K/2) by minus its angle."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TP + second * sin_B1TP, second * cos_B1TP - first * sin_B1TP), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: NanochatRayConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.window = config.attention_windows[layer]
        self.head_size = config.head_dim
        self.scale = config.query_key_scale
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        has_gate = layer in config.value_embedding_layers
        self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.num_key_value_heads, bias=False) if has_gate else None

    def forward(
        self, x_BTD: torch.Tensor, value_BTE: torch.Tensor | None, step: "Step", memory_BTD: torch.Tensor | None
    ) -> torch.Tensor:
        heads = (-1, self.head_size)
        q_BHTK = self.c_q(x_BTD).unflatten(-1, heads).transpose(1, 2)
        k_BGTK = self.c_k(x_BTD).unflatten(-1, heads).transpose(1, 2)
        v_BTGK = self.c_v(x_BTD).unflatten(-1, heads)
        if value_BTE is not None and self.ve_gate is not None:
            gate_BTG = VALUE_GATE_RANGE * torch.sigmoid(self.ve_gate(x_BTD[..., :VALUE_GATE_CHANNELS]))
            v_BTGK = v_BTGK + gate_BTG.unsqueeze(-1) * value_BTE.unflatten(-1, heads)
        v_BGTK = v_BTGK.transpose(1, 2)
        q_BHTK = self.scale * norm(rotate(q_BHTK, *step.rotary))
        k_BGTK = self.scale * norm(rotate(k_BGTK, *step.rotary))
        if step.cache is not None:
            if memory_BTD is not None:
                k_BGTK = torch.cat((k_BGTK, _by_head(memory_BTD, k_BGTK.shape[1])), dim=-1)
            k_BGTK, v_BGTK = step.cache.update(k_BGTK, v_BGTK, self.layer)
            k_BGTK = k_BGTK[..., : self.head_size]
        mask = step.mask(self.window, k_BGTK.shape[2])
        grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, enable_gqa=grouped)
        return self.c_proj(y_BHTK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: NanochatRayConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTD)).square())


class Block(nn.Module):
    def __init__(self, config: NanochatRayConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: torch.Tensor, value_BTE: torch.Tensor | None, step: "Step", memory_BTD: torch.Tensor | None
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(norm(x_BTD), value_BTE, step, memory_BTD)
        return x_BTD + self.mlp(norm(x_BTD))


class Step:
    """What all layers of one forward pass share: where the new positions stand, and what they may see.

    Args:
        attention_mask: (B, positions so far and new ones), 0 where there is padding; None: there is none.
    """

    def __init__(
        self,
        config: NanochatRayConfig,
        ids_BT: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        dtype: torch.dtype,
    ):
        self.cache = cache
        self.start = cache.get_seq_length() if cache is not None else 0
        self.end = self.start + ids_BT.shape[1]
        self.device = ids_BT.device
        if attention_mask is not None and attention_mask.shape != (ids_BT.shape[0], self.end):
            shape, wanted = tuple(attention_mask.shape), (ids_BT.shape[0], self.end)
            raise ValueError(f"attention_mask has shape {shape}; expected {wanted}: all positions, old and new")
        self.is_token = attention_mask.bool() if attention_mask is not None else None
        if position_ids is None:
            if self.is_token is not None:
                position_ids = (self.is_token.long().cumsum(-1) - 1).clamp(min=0)[:, self.start :]
            else:
                position_ids = torch.arange(self.start, self.end, device=self.device).unsqueeze(0)
        channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=self.device)
        angles = position_ids[:, None, :, None].float() * config.rotary_base ** (-channels / config.head_dim)
        self.rotary = angles.cos().to(dtype), angles.sin().to(dtype)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def mask(self, window: int, keys: int) -> torch.Tensor:
        """bool (B or 1, 1, T, keys), True where a new position may look; the keys are the last ones so far."""
        if (window, keys) not in self._masks:
            query_T1 = torch.arange(self.start, self.end, device=self.device).unsqueeze(1)
            key_S = torch.arange(self.end - keys, self.end, device=self.device)
            back_TS = query_T1 - key_S
            mask_11TS = ((back_TS >= 0) & (back_TS <= window))[None, None]
            if self.is_token is not None:
                # Padding sees itself, because a softmax over nothing is NaN.
                mask_11TS = mask_11TS & self.is_token[:, None, None, self.end - keys :] | (back_TS == 0)
            self._masks[window, keys] = mask_11TS
        return self._masks[window, keys]


class NanochatRayForCausalLM(PreTrainedModel, GenerationMixin):
    config: NanochatRayConfig
    config_class = NanochatRayConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers has it)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]  # noqa: RUF012

    def __init__(self, config: NanochatRayConfig):
        super().__init__(config)
        vocab, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
        kv_width = config.num_key_value_heads * config.head_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "h": nn.ModuleList(Block(config, layer) for layer in range(layers)),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(layers)) if config.layer_scalars else None
        self.x0_lambdas = nn.Parameter(torch.zeros(layers)) if config.layer_scalars else None
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False) if config.smear else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(vocab, kv_width) for layer in config.value_embedding_layers}
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in fp32 after ids (B, T), which follow what the cache holds.

        Raises:
            ValueError: there are embeddings instead of ids, the mask does not fit, or the cache has a fixed size.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model reads input_ids: its value embeddings cannot be told from inputs_embeds")
        cache = cache if cache is not None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if getattr(cache, "is_compileable", False):
            raise ValueError("this model does not run with a cache of fixed size; leave out cache_implementation")
        x_BTD = norm(self.transformer["wte"](input_ids))
        step = Step(self.config, input_ids, attention_mask, position_ids, cache, x_BTD.dtype)
        x_BTD = self._layers(input_ids, *self._smear(x_BTD, step), step)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, kept]).float()
        logits_BTV = LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE_FIELD: cache if use_cache else None})

    def _smear(self, x_BTD: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The smeared embeddings, and what the next positions need of these: the embeddings, zero for padding.

        They are kept with the keys of the first layer, where whatever happens to a cache (beams that change places,
        positions that are taken back) happens to them, too.
        """
        if self.smear_gate is None or self.smear_lambda is None:
            return x_BTD, None
        memory_BTD = x_BTD
        if step.is_token is not None:
            memory_BTD = x_BTD * step.is_token[:, step.start :, None].to(x_BTD.dtype)
        before_B1D = torch.zeros_like(x_BTD[:, :1])
        if step.start:
            stored_BGC = step.cache.layers[0].keys[:, :, -1, self.config.head_dim :]
            before_B1D = stored_BGC.flatten(1).unsqueeze(1).to(x_BTD.device)
        previous_BTD = torch.cat((before_B1D, memory_BTD[:, :-1]), dim=1)
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTD[..., :SMEAR_GATE_CHANNELS]))
        return x_BTD + self.smear_lambda.to(x_BTD.dtype) * gate_BT1 * previous_BTD, memory_BTD

    def _layers(
        self, ids_BT: torch.Tensor, x0_BTD: torch.Tensor, memory_BTD: torch.Tensor | None, step: Step
    ) -> torch.Tensor:
        x_BTD = middle_BTD = x0_BTD
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            value_BTE = self.value_embeds[str(layer)](ids_BT) if str(layer) in self.value_embeds else None
            if self.resid_lambdas is not None and self.x0_lambdas is not None:
                x_BTD = self.resid_lambdas[layer] * x_BTD + self.x0_lambdas[layer] * x0_BTD
            x_BTD = block(x_BTD, value_BTE, step, memory_BTD if layer == 0 else None)
            if layer == self.config.num_hidden_layers // 2:
                middle_BTD = x_BTD
        if self.backout_lambda is not None:
            x_BTD = x_BTD - self.backout_lambda.to(x_BTD.dtype) * middle_BTD
        return norm(x_BTD)


def _by_head(x_BTD: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, D) as (B, heads, T, D / heads)."""
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)
