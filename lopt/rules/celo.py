"""Celo: VeLO's per-parameter MLP without a bank, and an LSTM that schedules each tensor's step size.

Source: Moudgil et al. (2025), "Celo: Training versatile learned optimizers on a compute diet", arXiv:2501.12670.

Meta-trained in two phases: 1 trains the per-parameter network with the scheduler unused (`scheduler=False`), 2 the
scheduler with the network frozen (`lopt-train --freeze bank --init-from PHASE1`, which masks the meta-update: zeroing
gradients alone would let weight decay shrink what is frozen).

Differs from the paper: `weight_decay` is decoupled and multiplied by `lr`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import features as F
from lopt.base import LearnedOptimizer, positive
from lopt.rules import velo as V
from lopt.transform import Arithmetic, define

CONTEXT = 18  # LSTM inputs: 9 of the time, 9 of the loss, the same for every tensor


class Theta(NamedTuple):
    mixer: V.Mixer  # gives the logarithm of ten step sizes; its one control has no influence
    bank: tuple[F.Layer, ...]  # w [1, fan_in, fan_out], b [1, fan_out]


def celo(
    *,
    lstm_hidden: int = 64,
    hidden: int = 4,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.999,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    scheduler: bool = True,
) -> LearnedOptimizer:
    """Build the rule. Defaults are the released size, 37,089 meta-parameters.

    Args:
      lstm_hidden: width of the LSTM.
      hidden: width of both hidden layers of the per-parameter network.
      step_mult: size of a step of direction 1.
      exp_mult: scale of the magnitude output inside its exponential.
      momenta: decays of the three momenta.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      scheduler: False for phase 1: every step size is 1, whatever the scheduler's weights.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("celo", lstm_hidden=lstm_hidden, hidden=hidden, step_mult=step_mult)
    decays = F.decays("celo", momenta, second_moment, factored)

    def init_theta(key: jax.Array) -> Theta:
        mixer_key, bank_key = jax.random.split(key)
        return Theta(V.init_mixer(mixer_key, CONTEXT, lstm_hidden, 1), V.init_bank(bank_key, 1, hidden))

    def init_leaf(leaf, p):
        return F.init_accumulators(p, len(decays.m), F.factored_axes(leaf.shape))

    def init_shared(leaves):
        return V.init_mixed(len(leaves), lstm_hidden)

    def arithmetic(theta: Theta) -> Arithmetic:
        def prepare(groups, shared, told):
            loss, loss_features = V.update_loss_features(shared.loss, told.value, told.num_steps)
            x = jnp.concatenate([V.time_left(told), loss_features])
            x = jnp.broadcast_to(x[None, :], (len(shared.hidden), CONTEXT))
            _, log_size, mixed = V.mix(theta.mixer, x, shared, told.count == 0)
            size = 0.1 * jnp.exp(log_size) if scheduler else jnp.ones_like(log_size)
            return None, [step_mult * size[np.array(group.indices)] for group in groups], mixed._replace(loss=loss)

        def update(tensor, common, size):
            layers = [F.Layer(layer.w[0], layer.b[0]) for layer in common[0]]
            axes = F.factored_axes(tensor.leaf.shape)
            return V.per_parameter(tensor, layers, tensor.mean_square(), size, axes, decays, exp_mult)

        return Arithmetic(init_leaf, update, theta.bank, prepare, init_shared)

    settings = {
        "lstm_hidden": lstm_hidden,
        "hidden": hidden,
        "step_mult": step_mult,
        "exp_mult": exp_mult,
        "momenta": decays.m,
        "second_moment": second_moment,
        "factored": decays.factored,
        "scheduler": scheduler,
    }
    return define("celo", settings, init_theta, arithmetic, needs={"value", "num_steps"})
