"""The network: a decoder-only transformer whose numbers follow the public nanochat of July 2026, or of October 2025.

    model = GPT(GPTConfig.from_shape(plan.model)); model.init_weights(seed); model.set_dtype(torch.bfloat16)
    model(ids_BT) → logits_BTV      model(ids_BT, targets_BT) → loss
    cache = model.new_cache(rows, max_len); model.extend(ids_BT, cache) → logits_BV of the last position

Weights are kept in fp32; each is cast to the activations' dtype where it is used. What a shape switches off has no
parameters: the older generation is the newer one without its extras.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from nanochat_ray.model.attention import RotaryTables
from nanochat_ray.model.cache import Cache
from nanochat_ray.model.loss import softcap
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, ModelShape

VALUE_GATE_RANGE = 3.0
BACKOUT_INIT = 0.2


@dataclass(frozen=True)
class GPTConfig(ModelShape):
    """The plan's model shape, as the network's constructor takes it."""

    @staticmethod
    def from_shape(shape: ModelShape) -> "GPTConfig":
        return GPTConfig(**asdict(shape))


class Attend(Protocol):
    """How a layer's queries meet the keys and values of its positions; all (B, T, heads, K)."""

    def __call__(
        self, layer: int, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int
    ) -> torch.Tensor: ...


class Linear(nn.Linear):
    """Without bias; the fp32 weight is cast to the input's dtype."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention with rotary positions, normed queries and keys, and gated value embeddings."""

    def __init__(self, config: ModelShape, layer: int):
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.head_size = config.head_size
        self.query_key_scale = config.query_key_scale
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_width)
        self.c_v = Linear(config.n_embd, config.kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_value_embedding = layer in config.value_embedding_layers
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if has_value_embedding else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        value_BTE: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        operations: Operations,
    ) -> torch.Tensor:
        heads = (-1, self.head_size)
        q_BTHK = self.c_q(x_BTD).unflatten(-1, heads)
        k_BTGK = self.c_k(x_BTD).unflatten(-1, heads)
        v_BTGK = self.c_v(x_BTD).unflatten(-1, heads)
        if value_BTE is not None and self.ve_gate is not None:
            gate_BTG = VALUE_GATE_RANGE * torch.sigmoid(self.ve_gate(x_BTD[..., :VALUE_GATE_CHANNELS]))
            v_BTGK = v_BTGK + gate_BTG.unsqueeze(-1) * value_BTE.unflatten(-1, heads)
        q_BTHK = operations.rotated_norm(q_BTHK, rotary, self.query_key_scale)
        k_BTGK = operations.rotated_norm(k_BTGK, rotary, self.query_key_scale)
        return self.c_proj(attend(self.layer, q_BTHK, k_BTGK, v_BTGK, self.window).flatten(2))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config: ModelShape):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD: torch.Tensor, operations: Operations) -> torch.Tensor:
        return self.c_proj(operations.linear_squared_relu(x_BTD, self.c_fc.weight))


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normed residual and added to it."""

    def __init__(self, config: ModelShape, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: torch.Tensor,
        normed_BTD: torch.Tensor,
        value_BTE: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        operations: Operations,
    ) -> torch.Tensor:
        """The residual after the layer, from the one before it and its norm."""
        attended_BTD = self.attn(normed_BTD, value_BTE, rotary, attend, operations)
        x_BTD, normed_BTD = operations.mixed_norm(x_BTD, attended_BTD)
        return x_BTD + self.mlp(normed_BTD, operations)


class GPT(nn.Module):
    """The whole network. Building it under `torch.device("meta")` allocates nothing; `to_empty` then makes room."""

    def __init__(self, config: ModelShape):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.operations = Operations()
        vocab, width, layers = config.padded_vocab_size, config.n_embd, config.n_layer
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "h": nn.ModuleList(Block(config, layer) for layer in range(layers)),
            }
        )
        self.lm_head = Linear(width, vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(layers)) if config.layer_scalars else None
        self.x0_lambdas = nn.Parameter(torch.empty(layers)) if config.layer_scalars else None
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1) if config.smear else None
        self.smear_lambda = nn.Parameter(torch.empty(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.empty(1)) if config.backout else None
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(vocab, config.kv_width) for layer in config.value_embedding_layers}
        )
        self.rotary = RotaryTables(config.head_size, config.rotary_base)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def set_dtype(self, dtype: torch.dtype) -> "GPT":
        """Compute activations in `dtype` from now on; the weights stay as they are."""
        self.dtype = dtype
        return self

    def use_operations(self, operations: Operations) -> "GPT":
        """Compute with these from now on."""
        self.operations = operations
        return self

    def freeze(self, dtype: torch.dtype) -> "GPT":
        """For inference only: compute in `dtype`, store the matrices and embeddings in it, and need no gradients."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.to(dtype)
        return self.set_dtype(dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight; the same seed gives the same weights on every device, whatever else drew numbers."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def normal(weight: torch.Tensor, deviation: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

        def uniform(weight: torch.Tensor, low: float, high: float) -> None:
            weight.copy_(torch.rand(weight.shape, generator=generator) * (high - low) + low)

        bound = (3 / self.config.n_embd) ** 0.5  # a uniform distribution of standard deviation 1/sqrt(width)
        normal(cast(nn.Embedding, self.transformer["wte"]).weight, 0.8)
        normal(self.lm_head.weight, 0.001)
        for block in self.blocks:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(projection.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                uniform(block.attn.ve_gate.weight, 0.0, 0.02)
        for embedding in self.value_embeds.values():
            uniform(cast(nn.Embedding, embedding).weight, -bound, bound)
        if self.smear_gate is not None and self.smear_lambda is not None:
            uniform(self.smear_gate.weight, 0.0, 0.02)
            self.smear_lambda.zero_()
        if self.resid_lambdas is not None and self.x0_lambdas is not None:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, self.config.n_layer))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, self.config.n_layer))
        if self.backout_lambda is not None:
            self.backout_lambda.fill_(BACKOUT_INIT)

    def forward(
        self, ids_BT: torch.Tensor, targets_BT: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """Logits (B, T, V) in fp32, or the loss against targets, of which −1 are ignored.

        Args:
            reduction: "mean" over counted targets, "sum", or "none" for losses (B, T), 0 where ignored.
        """
        rotary = self.rotary(ids_BT.shape[1], ids_BT.device, self.dtype)
        x_BTD = self.hidden(ids_BT, rotary)
        return self.logits(x_BTD) if targets_BT is None else self.loss(x_BTD, targets_BT, reduction)

    def hidden(self, ids_BT: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The final normed residual (B, T, D) of whole rows: what training runs, compiled or not."""
        x_BTD = self._embed(ids_BT)
        previous_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
        return self._layers(ids_BT, self._smear(x_BTD, previous_BTD), rotary, self._attend_to_row)

    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Soft-capped fp32 logits (…, V) of final residuals."""
        return softcap(self.lm_head(x_BTD)[..., : self.config.vocab_size].float())

    def loss(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor, reduction: str) -> torch.Tensor:
        """The loss of final residuals; see `forward`."""
        loss = self.operations.linear_cross_entropy(
            x_BTD.flatten(0, -2), self.lm_head.weight, targets_BT.flatten(), self.config.vocab_size, reduction
        )
        return loss.view_as(targets_BT) if reduction == "none" else loss

    def new_cache(self, batch: int, max_len: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `max_len` tokens, in the compute dtype unless told otherwise."""
        config = self.config
        dtype = dtype or self.dtype
        return Cache(
            config.n_layer, batch, max_len, config.n_kv_head, config.head_size, config.n_embd, dtype, self.device
        )

    def extend(self, ids_BT: torch.Tensor, cache: Cache, last_only: bool = True) -> torch.Tensor:
        """Read on where the cache ends: a prompt, a part of one, or one token.

        Returns:
            fp32 logits after the last position (B, V), or after every new one (B, T, V).

        Raises:
            UserError: the cache has no room.
        """
        count = ids_BT.shape[1]
        positions = cache.positions(count)
        cos_SP, sin_SP = self.rotary(positions.stop, ids_BT.device, self.dtype)
        x_BTD = self._embed(ids_BT)
        previous_BTD = torch.cat((cache.previous_BD.unsqueeze(1).to(x_BTD.dtype), x_BTD[:, :-1]), dim=1)
        last_embedding_BD = x_BTD[:, -1]
        rotary = cos_SP[positions], sin_SP[positions]
        x_BTD = self._layers(ids_BT, self._smear(x_BTD, previous_BTD), rotary, cache.attend)
        cache.advance(count, last_embedding_BD)
        return self.logits(x_BTD[:, -1] if last_only else x_BTD)

    def hidden_ragged(
        self,
        ids_N: torch.Tensor,
        previous_N: torch.Tensor,
        positions_N: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """The final normed residual (N, D) of tokens of many sequences.

        Args:
            previous_N: the id before each in its sequence, −1 where there is none.
            positions_N: the index of each in its sequence.
            rotary: cosines and sines of all positions, each (context, K/2); the caller's, so that it can keep them.
            attend: how the tokens, as one row, meet the keys and values of their sequences.
        """
        ids_1N = ids_N.unsqueeze(0)
        cos_SP, sin_SP = rotary
        none_1N1 = (previous_N < 0).view(1, -1, 1)
        previous_1ND = self._embed(previous_N.clamp(min=0).unsqueeze(0)).masked_fill(none_1N1, 0.0)
        x_1ND = self._smear(self._embed(ids_1N), previous_1ND)
        return self._layers(ids_1N, x_1ND, (cos_SP[positions_N], sin_SP[positions_N]), attend)[0]

    def _embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        table_VD = cast(nn.Embedding, self.transformer["wte"]).weight
        return self.operations.norm(self.operations.embedding(ids_BT, table_VD, self.dtype))

    def _smear(self, x_BTD: torch.Tensor, previous_BTD: torch.Tensor) -> torch.Tensor:
        """Add a gated part of the previous embedding, which is zero at the first position."""
        if self.smear_gate is None or self.smear_lambda is None:
            return x_BTD
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTD[..., :SMEAR_GATE_CHANNELS]))
        return x_BTD + self.smear_lambda.to(x_BTD.dtype) * gate_BT1 * previous_BTD

    def _layers(
        self,
        ids_BT: torch.Tensor,
        x0_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        operations = self.operations
        x_BTD = middle_BTD = x0_BTD
        for layer, block in enumerate(self.blocks):
            value_BTE = None
            if str(layer) in self.value_embeds:
                table_VE = cast(nn.Embedding, self.value_embeds[str(layer)]).weight
                value_BTE = operations.embedding(ids_BT, table_VE, self.dtype)
            if self.resid_lambdas is not None and self.x0_lambdas is not None:
                weights = self.resid_lambdas[layer], self.x0_lambdas[layer]
                x_BTD, normed_BTD = operations.mixed_norm(x_BTD, x0_BTD, *weights)
            else:
                normed_BTD = operations.norm(x_BTD)
            x_BTD = block(x_BTD, normed_BTD, value_BTE, rotary, attend, operations)
            if layer == self.config.n_layer // 2:
                middle_BTD = x_BTD
        if self.backout_lambda is None:
            return operations.norm(x_BTD)
        return operations.mixed_norm(x_BTD, middle_BTD, None, -self.backout_lambda[0].to(x_BTD.dtype))[1]

    def _attend_to_row(
        self, layer: int, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int
    ) -> torch.Tensor:
        return self.operations.attention(q_BTHK, k_BTGK, v_BTGK, window)

    @torch.inference_mode()
    def generate(
        self, ids: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
    ) -> Iterator[int]:
        """Continue `ids` by up to `max_tokens` tokens; temperature 0 takes the likeliest. Simple, for samples."""
        generator = torch.Generator("cpu").manual_seed(seed)
        cache = self.new_cache(1, len(ids) + max_tokens)
        new = list(ids)
        for _ in range(max_tokens):
            logits_V = self.extend(torch.tensor([new], device=self.device), cache)[0].cpu()
            if temperature == 0:
                token = int(logits_V.argmax())
            else:
                if top_k is not None:
                    threshold = logits_V.topk(min(top_k, len(logits_V))).values[-1]
                    logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
                probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
                token = int(torch.multinomial(probabilities_V, 1, generator=generator))
            yield token
            new = [token]
