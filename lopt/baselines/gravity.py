"""Gravity: gradients damped beyond half the largest, averaged ever more slowly.

Source: Bahrami & Zadeh (2021), arXiv:2101.09192, Algorithm 1. For each tensor

    ζ = g / (1 + (g/m)²), m = 1 / max|g|;   V ← β_t V + (1-β_t) ζ,  β_t = (βt + 1)/(t + 2);   u = -lr V,

V_0 normal with standard deviation α / lr, so that the first step is of size α whatever lr is. Differs from the paper:
nothing (with its m, g/m is g · max|g|). A tensor whose gradients are all 0 gets ζ = 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import PerTensor, Rate, Space, at, average, define, descend, per_tensor, rate, transform


def gravity(
    learning_rate: Rate, *, peak_lr: Any = None, alpha: Any = 0.01, beta: Any = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Gravity.

    Args:
      learning_rate: as SGD's.
      peak_lr: what V starts in units of; None: the first update's learning rate.
      alpha: size of the first steps, parameter units.
      beta: what β_t goes to.
    """

    def update(g: Any, v: Any, p: Any, t: Any) -> tuple[Any, Any]:
        zeta = g / (1 + (g * jnp.max(jnp.abs(g))) ** 2)
        beta_t = (beta * t + 1) / (t + 2)
        v = beta_t * v + (1 - beta_t) * zeta
        return v, v

    inner = per_tensor(jnp.zeros_like, update)

    def init(params: Any) -> PerTensor:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
        std = alpha / (at(learning_rate, 0) if peak_lr is None else peak_lr)
        drawn = [std * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
        return PerTensor(jnp.zeros((), jnp.int32), tree.unflatten(drawn))

    return descend(transform(init, inner.update), learning_rate)


BASELINES = (
    define(
        "gravity",
        gravity,
        {"lr": rate(0.1, 1e-3, 10.0), "alpha": Space(1e-4, 0.1, True, 0.01), "beta": average(0.9)},
        peak=True,
        source="Bahrami & Zadeh (2021), arXiv:2101.09192",
        notes="V starts from the same draw whatever the seed",
    ),
)
