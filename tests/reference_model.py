"""The network and its optimizer written down slowly and obviously, one position and one matrix at a time.

Only what the specification says, in fp64, with no code shared with nanochat_ray/model. The tests compare the two.
"""

import math

import torch


def windows(config) -> list[int | None]:
    """Per layer: how far back a position looks; None = all the way."""
    short = math.ceil(config.sequence_len / 4 / 128) * 128
    pattern = [config.window_pattern[layer % len(config.window_pattern)] for layer in range(config.n_layer)]
    pattern[-1] = "L"
    return [short if letter == "S" else None for letter in pattern]


def rms_norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


def rotate(x_K, position):
    """Channel c is paired with c + K/2; each pair turns by −position · 100000^(−2c/K)."""
    half = len(x_K) // 2
    out = torch.empty_like(x_K)
    for c in range(half):
        angle = -position * 100_000 ** (-2 * c / len(x_K))
        cos, sin = math.cos(angle), math.sin(angle)
        out[c] = x_K[c] * cos - x_K[c + half] * sin
        out[c + half] = x_K[c] * sin + x_K[c + half] * cos
    return out


def attend(q_THK, k_TGK, v_TGK, window):
    """Softmax attention, position by position and head by head."""
    length, heads, head_size = q_THK.shape
    group = heads // k_TGK.shape[1]
    rows = []
    for i in range(length):
        first = 0 if window is None else max(0, i - window)
        row = []
        for h in range(heads):
            scores = torch.stack([q_THK[i, h] @ k_TGK[j, h // group] for j in range(first, i + 1)])
            weights = torch.softmax(scores / math.sqrt(head_size), 0)
            row.append(sum(weights[n] * v_TGK[first + n, h // group] for n in range(len(weights))))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def logits(weights, config, ids):
    """Soft-capped logits (T, V) of one row of token ids."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    length, head_size = len(ids), config.n_embd // config.n_head
    embedded = rms_norm(w["transformer.wte.weight"][ids])
    x0 = embedded.clone()
    for t in range(1, length):
        gate = w["smear_lambda"] * torch.sigmoid(w["smear_gate.weight"] @ embedded[t, :24])
        x0[t] = embedded[t] + gate * embedded[t - 1]
    x = x0
    middle = None
    for layer, window in enumerate(windows(config)):
        prefix = f"transformer.h.{layer}."
        x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        normed = rms_norm(x)
        q, k, v = (
            (normed @ w[f"{prefix}attn.c_{letter}.weight"].T).view(length, -1, head_size) for letter in ("q", "k", "v")
        )
        if f"value_embeds.{layer}.weight" in w:
            extra = w[f"value_embeds.{layer}.weight"][ids].view(length, -1, head_size)
            gates = 3 * torch.sigmoid(normed[:, :12] @ w[f"{prefix}attn.ve_gate.weight"].T)
            v = v + gates[:, :, None] * extra
        q, k = (
            torch.stack([torch.stack([1.2 * rms_norm(rotate(head, t)) for head in x_t]) for t, x_t in enumerate(heads)])
            for heads in (q, k)
        )
        x = x + attend(q, k, v, window).reshape(length, -1) @ w[f"{prefix}attn.c_proj.weight"].T
        hidden = torch.relu(rms_norm(x) @ w[f"{prefix}mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ w[f"{prefix}mlp.c_proj.weight"].T
        if layer == config.n_layer // 2:
            middle = x
    x = rms_norm(x - w["backout_lambda"] * middle)
    z = x @ w["lm_head.weight"].T
    return 15 * torch.tanh(z[:, : config.vocab_size] / 15)


def adamw_step(weight, grad, m, v, step, rate, betas, decay):
    """New (weight, m, v); step counts from 1."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return weight - rate * decay * weight - rate * m_hat / (torch.sqrt(v_hat) + 1e-10), m, v


def polar_express(matrix):
    """Five quintic steps on the singular values, which is what the matrix iteration does to them."""
    coefficients = [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]
    u, s, vt = torch.linalg.svd(matrix / (torch.linalg.norm(matrix) * 1.01 + 1e-6), full_matrices=False)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def muon_step(weight, grad, momentum_buffer, second, momentum, rate, decay):
    """New (weight, momentum buffer, second moment) of one matrix."""
    rows, columns = weight.shape
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
    update = momentum * momentum_buffer + (1 - momentum) * grad  # Nesterov: look ahead by one more step
    target = torch.linalg.norm(update) / math.sqrt(rows)
    update = torch.stack([row * target / torch.linalg.norm(row) for row in update])
    update = polar_express(update)
    update = update * math.sqrt(min(rows, columns)) / torch.linalg.norm(update)
    axis = 1 if rows >= columns else 0
    mean_square = (update**2).mean(axis, keepdim=True)
    second = 0.9 * second + 0.1 * mean_square
    scaled = update / torch.sqrt(second)
    update = scaled * torch.linalg.norm(update) / torch.linalg.norm(scaled)
    decayed = torch.where(update * weight >= 0, decay * weight, 0.0)
    return weight - rate * math.sqrt(max(1, rows / columns)) * (update + decayed), momentum_buffer, second
