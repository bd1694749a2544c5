"""The kernels' mathematics in float64 NumPy, written apart from them: values and gradients."""

from __future__ import annotations

import itertools

import numpy as np


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gru(
    projected: np.ndarray,
    h0: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    begins: np.ndarray,
    d_states: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run one GRU layer and its backward pass, with PyTorch's equations.

    Args:
      projected: [P, B, 3H], gates r, z, n.
      h0: [B, H].
      weight: recurrent, [3H, H].
      bias: recurrent, [3H].
      begins: frames at which a trial begins from `h0`, bool [P, B].
      d_states: cotangent of the states, [P, B, H].

    Returns:
      `states` [P, B, H] and the gradients, by name.
    """
    projected, h0, weight, bias, d_states = (
        np.asarray(a, np.float64) for a in (projected, h0, weight, bias, d_states)
    )
    saved, states, h = [], np.empty_like(d_states), h0
    for frame, (x, new) in enumerate(zip(projected, begins, strict=True)):
        h = np.where(new[:, None], h0, h)
        x_r, x_z, x_n = np.split(x, 3, axis=1)
        h_r, h_z, h_n = np.split(h @ weight.T + bias, 3, axis=1)
        r, z = _sigmoid(x_r + h_r), _sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * h_n)
        saved.append((h, r, z, n, h_n))
        states[frame] = h = (1 - z) * n + z * h
    found = {name: np.zeros_like(a) for name, a in (("d_projected", projected), ("d_h0", h0))}
    found |= {"states": states, "d_weight": np.zeros_like(weight), "d_bias": np.zeros_like(bias)}
    d_h = np.zeros_like(h0)
    for frame in reversed(range(len(projected))):
        h, r, z, n, h_n = saved[frame]
        d_h = d_h + d_states[frame]
        d_n = d_h * (1 - z) * (1 - n**2)
        d_z = d_h * (h - n) * z * (1 - z)
        d_r = d_n * h_n * r * (1 - r)
        d_recurrent = np.concatenate([d_r, d_z, d_n * r], axis=1)
        found["d_projected"][frame] = np.concatenate([d_r, d_z, d_n], axis=1)
        found["d_weight"] += d_recurrent.T @ h
        found["d_bias"] += d_recurrent.sum(0)
        d_h = d_h * z + d_recurrent @ weight
        new = begins[frame][:, None]
        found["d_h0"] += np.where(new, d_h, 0)
        d_h = np.where(new, 0, d_h)
    found["d_h0"] += d_h
    return found


def gru_stack(
    projected: np.ndarray,
    h0: np.ndarray,
    weight_ih: np.ndarray,
    bias_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias_hh: np.ndarray,
    begins: np.ndarray,
    d_states: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run L layers as `gru`: recurrent parameters of all, [L, 3H, H], and input parameters of all
    but the first, [L - 1, 3H, H]."""
    nothing, inputs = np.zeros(d_states.shape), [np.asarray(projected, np.float64)]
    for layer, (weight, bias) in enumerate(zip(weight_hh, bias_hh, strict=True)):
        states = gru(inputs[-1], h0, weight, bias, begins, nothing)["states"]
        if layer < len(weight_ih):
            inputs.append(states @ weight_ih[layer].T.astype(np.float64) + bias_ih[layer])
    found: dict[str, list[np.ndarray]] = {"weight_ih": [], "bias_ih": [], "h0": []}
    found |= {"weight_hh": [], "bias_hh": []}
    for layer in reversed(range(len(weight_hh))):
        one = gru(inputs[layer], h0, weight_hh[layer], bias_hh[layer], begins, d_states)
        for name, key in (("h0", "d_h0"), ("weight_hh", "d_weight"), ("bias_hh", "d_bias")):
            found[name].insert(0, one[key])
        if layer:
            below = gru(
                inputs[layer - 1], h0, weight_hh[layer - 1], bias_hh[layer - 1], begins, nothing
            )["states"]
            d_projected = one["d_projected"]
            found["weight_ih"].insert(0, np.einsum("pbk,pbh->kh", d_projected, below))
            found["bias_ih"].insert(0, d_projected.sum((0, 1)))
            d_states = d_projected @ weight_ih[layer - 1].astype(np.float64)
    gradients = {f"d_{name}": np.stack(values) for name, values in found.items()}
    gradients["d_h0"] = gradients["d_h0"].sum(0)
    return {"states": states, "d_projected": one["d_projected"], **gradients}


def ctc(
    logits: np.ndarray, frames: np.ndarray, labels: np.ndarray, label_length: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the CTC loss of each trial by the two recursions in probabilities, scaled by frame.

    Args:
      logits: [B, P, C], class 0 is the blank.
      frames: valid frames, [B].
      labels: [B, L].
      label_length: [B].

    Returns:
      `loss` [B], +inf where no alignment spells the label, and `d_logits` of their sum, there 0.
    """
    loss, gradient = np.full(len(logits), np.inf), np.zeros(logits.shape)
    for b, (count, length) in enumerate(zip(frames, label_length, strict=True)):
        label = labels[b, :length]
        repeats = sum(int(one == two) for one, two in itertools.pairwise(label))
        if length + repeats > count:
            continue
        x = np.asarray(logits[b, :count], np.float64)
        softmax = np.exp(x - x.max(1, keepdims=True))
        softmax /= softmax.sum(1, keepdims=True)
        states = np.zeros(2 * length + 1, int)
        states[1::2] = label
        skips = np.zeros(len(states), bool)
        skips[3::2] = label[1:] != label[:-1]
        emitted = softmax[:, states]
        alpha, log_scale = _forward(emitted, skips)
        backward_skips = np.zeros_like(skips)
        backward_skips[: len(skips) - 2] = skips[2:]
        beta = _forward(emitted[::-1, ::-1], backward_skips[::-1])[0][::-1, ::-1]
        joint = alpha * beta / emitted
        joint /= joint.sum(1, keepdims=True)
        posterior = np.zeros_like(x)
        np.add.at(posterior.T, states, joint.T)
        loss[b] = -log_scale
        gradient[b, :count] = softmax - posterior
    return {"loss": loss, "d_logits": gradient}


def _forward(emitted: np.ndarray, skips: np.ndarray) -> tuple[np.ndarray, float]:
    """Return forward variables, each frame divided by its sum, and the ln probability of all paths
    that end in the last two states."""
    alpha = np.zeros_like(emitted)
    alpha[0, :2] = emitted[0, :2]
    log_scale = 0.0
    for frame in range(len(emitted)):
        if frame:
            before = alpha[frame - 1]
            one = np.concatenate([[0], before[:-1]])
            two = np.concatenate([[0, 0], before[:-2]])[: len(before)] * skips
            alpha[frame] = (before + one + two) * emitted[frame]
        total = alpha[frame].sum()
        alpha[frame] /= total
        log_scale += float(np.log(total))
    return alpha, log_scale + float(np.log(alpha[-1, -2:].sum()))
