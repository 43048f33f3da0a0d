"""nn_adam: Adam whose hyper-parameters are meta-parameters, fixed in time or modulated by a small LSTM.

Source: learned hyper-parameters as in Metz et al. (2020), "Using a thousand optimization tasks to learn hyperparameter
search strategies", arXiv:2002.11887; the arithmetic is Adam's, Kingma and Ba (2015), arXiv:1412.6980.

Differs from Adam: each hyper-parameter h is learned as x = log h / 10, so that a perturbation of theta changes all of
them by similar factors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import features as F
from lopt.base import LearnedOptimizer
from lopt.transform import Arithmetic, define

GAIN = 10.0
NAMES = ("lr", "1 - b1", "1 - b2", "eps")


class Clock(NamedTuple):
    """An LSTM over time, H units."""

    lstm: F.Layer  # [11 + H, 4H], gates i g f o
    out: F.Layer  # [H, 4]


class Theta(NamedTuple):
    log: jax.Array  # [4] logarithms of NAMES over GAIN
    clock: Clock | None  # adds to `log` at every step


class Moments(NamedTuple):
    m: jax.Array  # like the tensor; EMA of the gradient
    v: jax.Array  # like the tensor; EMA of its square


class Shared(NamedTuple):
    hidden: jax.Array  # [H]
    cell: jax.Array  # [H]
    kept: jax.Array  # [2] products of b1 and b2 over the steps so far; 1 - kept is the bias correction


def nn_adam(
    *, lr0: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, lstm_hidden: int = 0
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      lr0: initial learning rate.
      b1: initial decay of the first moment.
      b2: initial decay of the second moment.
      eps: initial epsilon, outside the root.
      lstm_hidden: width of the LSTM that moves all four over time; 0 for none (4 meta-parameters).

    Raises:
      ValueError: on an argument out of range.
    """
    for key, value in {"lr0": lr0, "eps": eps}.items():
        if not value > 0:
            raise ValueError(f"nn_adam: {key}, got {value}; valid: > 0.")
    for key, value in {"b1": b1, "b2": b2}.items():
        if not 0 < value < 1:
            raise ValueError(f"nn_adam: {key}, got {value}; valid: (0, 1).")
    if lstm_hidden < 0:
        raise ValueError(f"nn_adam: lstm_hidden, got {lstm_hidden}; valid: >= 0.")
    start = np.log([lr0, 1 - b1, 1 - b2, eps]) / GAIN

    def init_theta(key: jax.Array) -> Theta:
        log = jnp.asarray(start, jnp.float32)
        if not lstm_hidden:
            return Theta(log, None)
        lstm_key, out_key = jax.random.split(key)
        (lstm,) = F.init_mlp(lstm_key, (len(F.TIME_SCALES) + lstm_hidden, 4 * lstm_hidden))
        (out,) = F.init_mlp(out_key, (lstm_hidden, len(NAMES)))
        return Theta(log, Clock(lstm, out._replace(w=0.01 * out.w)))

    def init_leaf(leaf, p):
        return Moments(jnp.zeros_like(p), jnp.zeros_like(p))

    def init_shared(leaves):
        zeros = jnp.zeros(lstm_hidden, jnp.float32)
        return Shared(zeros, zeros, jnp.ones(2, jnp.float32))

    def arithmetic(theta: Theta) -> Arithmetic:
        def hyper(shared: Shared, count: jax.Array) -> tuple[jax.Array, Shared]:
            """The four hyper-parameters of this step."""
            log = theta.log
            if theta.clock is not None:
                x = jnp.concatenate([F.time_features(count), shared.hidden])
                cell, hidden = F.lstm_cell(x @ theta.clock.lstm.w + theta.clock.lstm.b, shared.cell)
                log = log + hidden @ theta.clock.out.w + theta.clock.out.b
                shared = shared._replace(hidden=hidden, cell=cell)
            return jnp.exp(GAIN * log), shared

        def prepare(groups, shared, told):
            (rate, fresh1, fresh2, eps), shared = hyper(shared, told.count)
            # A learned decay may wander to 0; a fresh share above 1 would not be an average.
            fresh1, fresh2 = jnp.minimum(fresh1, 1.0), jnp.minimum(fresh2, 1.0)
            kept = shared.kept * jnp.stack([1 - fresh1, 1 - fresh2])
            return (rate, fresh1, fresh2, eps, kept), [()] * len(groups), shared._replace(kept=kept)

        def update(tensor, common, own):
            _, (rate, fresh1, fresh2, eps, kept) = common

            def direction(g, p, s, _):
                s = Moments(s.m + fresh1 * (g - s.m), s.v + fresh2 * (g * g - s.v))
                m_hat, v_hat = s.m / (1 - kept[0]), s.v / (1 - kept[1])
                return rate * m_hat / (F.safe_sqrt(v_hat) + eps), s

            return tensor.move(direction, tensor.state)

        return Arithmetic(init_leaf, update, (), prepare, init_shared)

    settings = {"lr0": lr0, "b1": b1, "b2": b2, "eps": eps, "lstm_hidden": lstm_hidden}
    return define("nn_adam", settings, init_theta, arithmetic)
