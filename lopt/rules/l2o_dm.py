"""L2O-DM: an LSTM that is given a coordinate's gradient and value and says the step, without mathematical structure.

Source: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent", arXiv:1606.04474, in
the form of Liu et al. (2023), arXiv:2305.18577, whose baseline it is: no preprocessing, y⁺ = y + .1 elu(out).

For F = f + r the gradients are subgradients of F.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt.base import LearnedOptimizer, positive
from lopt.features import Layer, init_mlp
from lopt.rules.l2o_pa import LAYERS, Recurrent, dense, init_lstm, lstm
from lopt.transform import Arithmetic, define


class Theta(NamedTuple):
    lstm: tuple[Recurrent, ...]
    head: Layer  # [H, 1]


class Memory(NamedTuple):
    memory: jax.Array  # [2 · 2H, …] hidden and cell of each layer


def l2o_dm(*, hidden: int = 20, step_mult: float = 0.1) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of the LSTM's two layers (20: 5,141 meta-parameters).
      step_mult: size of a step where the network says 1.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("l2o_dm", hidden=hidden, step_mult=step_mult)

    def init_theta(key: jax.Array) -> Theta:
        lstm_key, head_key = jax.random.split(key)
        (head,) = init_mlp(head_key, (hidden, 1))
        return Theta(init_lstm(lstm_key, 2, hidden), head)

    def init_leaf(leaf, p):
        return Memory(jnp.zeros((2 * LAYERS * hidden, *p.shape), p.dtype))

    def update(tensor, common, own):
        theta, _ = common

        def direction(g, y, state, _):
            out, memory = lstm(theta.lstm, jax.lax.stop_gradient(jnp.stack([g, y])), state.memory)
            return -step_mult * jax.nn.elu(dense(theta.head.w, theta.head.b, out)[0]), Memory(memory)

        return tensor.move(direction, tensor.state)

    settings = {"hidden": hidden, "step_mult": step_mult}
    return define("l2o_dm", settings, init_theta, lambda theta: Arithmetic(init_leaf, update, theta))
