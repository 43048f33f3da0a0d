"""RNNprop: an LSTM that is given a coordinate's RMSprop and Adam directions and says a bounded step.

Source: Lv et al. (2017), "Learning gradient descent: better generalization and longer horizons", arXiv:1703.03633, with
the two averages at .95 of the form that Liu et al. (2023), arXiv:2305.18577, compare with.

For F = f + r the gradients are subgradients of F.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt.base import LearnedOptimizer, positive
from lopt.features import Layer, init_mlp, safe_sqrt
from lopt.rules.l2o_pa import LAYERS, Recurrent, dense, init_lstm, lstm
from lopt.transform import Arithmetic, define

EPS = 1e-8  # beside the root


class Theta(NamedTuple):
    inputs: Layer  # [2, H]
    lstm: tuple[Recurrent, ...]
    head: Layer  # [H, 1]


class Memory(NamedTuple):
    m: jax.Array  # like the tensor; EMA of the gradient
    v: jax.Array  # like the tensor; EMA of its square
    memory: jax.Array  # [2 · 2H, …] hidden and cell of each layer


def rnnprop(*, hidden: int = 20, step_mult: float = 0.1, b1: float = 0.95, b2: float = 0.95) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of the first layer and of the LSTM's two (20: 6,641 meta-parameters).
      step_mult: the longest step of a coordinate.
      b1: decay of the average of gradients.
      b2: decay of the average of their squares.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("rnnprop", hidden=hidden, step_mult=step_mult)
    for name, value in {"b1": b1, "b2": b2}.items():
        if not 0 < value < 1:
            raise ValueError(f"rnnprop: {name}, got {value}; valid: (0, 1).")

    def init_theta(key: jax.Array) -> Theta:
        in_key, lstm_key, head_key = jax.random.split(key, 3)
        (first,), (head,) = init_mlp(in_key, (2, hidden)), init_mlp(head_key, (hidden, 1))
        return Theta(first, init_lstm(lstm_key, hidden, hidden), head)

    def init_leaf(leaf, p):
        memory = jnp.zeros((2 * LAYERS * hidden, *p.shape), p.dtype)
        return Memory(jnp.zeros_like(p), jnp.zeros_like(p), memory)

    def update(tensor, common, own):
        theta, told = common

        def direction(g, y, state, _):
            t = (told.count + 1).astype(g.dtype)
            m, v = b1 * state.m + (1 - b1) * g, b2 * state.v + (1 - b2) * g * g
            root = safe_sqrt(v / (1 - b2**t)) + EPS
            inputs = jax.lax.stop_gradient(jnp.stack([g / root, m / (1 - b1**t) / root]))
            out, memory = lstm(theta.lstm, jax.nn.elu(dense(theta.inputs.w, theta.inputs.b, inputs)), state.memory)
            out = jnp.tanh(dense(theta.head.w, theta.head.b, out)[0])
            return step_mult * out, Memory(m, v, memory)

        return tensor.move(direction, tensor.state)

    settings = {"hidden": hidden, "step_mult": step_mult, "b1": b1, "b2": b2}
    return define("rnnprop", settings, init_theta, lambda theta: Arithmetic(init_leaf, update, theta))
