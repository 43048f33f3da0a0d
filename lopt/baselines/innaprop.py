"""INNAprop: an inertial Newton-like method (INNA) with RMSprop's scaling.

Source: Bolte, Boustany, Pauwels & Purica (2024), arXiv:2410.08530, as in Algorithm 1 and the authors' code. With
γ = lr, ĝ = g / (sqrt(v̂) + ε)

    ψ ← (1 - γ/β) ψ + γ (1/β - α) θ
    θ ← (1 + γ(1-αβ)/(β-γ)) θ - γ/(β-γ) ψ - γ β ĝ,   ψ_0 = (1-αβ) θ_0.

Here in the variable φ = ψ - (1-αβ) θ, which starts at 0 and needs no difference of large numbers (γ = β is no longer
singular); the same steps:

    u = -γ (φ/β + β ĝ);   φ ← φ - γ α φ + γ β (1-αβ) ĝ.

As in the paper weight decay comes first, θ ← (1-λγ) θ, which adds (1-αβ) λγ θ to φ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, at, average, decay, define, descend, per_tensor, rate


class State(NamedTuple):
    phi: jax.Array  # like p, ψ - (1-αβ) θ, parameter units
    v: jax.Array  # like p, average of squared gradients


def innaprop(
    learning_rate: Rate,
    *,
    alpha: Any = 0.1,
    beta: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """INNAprop.

    Args:
      learning_rate: γ, as AdamW's.
      alpha: viscous damping, > 0.
      beta: Newton-like damping, > 0.
      b2: decay of v (the paper's σ).
      eps: added to the root of v.
      weight_decay: λ, decoupled.
    """

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        lr = at(learning_rate, t - 1)
        v = b2 * s.v + (1 - b2) * g * g
        scaled = g / (jnp.sqrt(v / (1 - b2**t)) + eps)
        rest = 1 - alpha * beta
        phi = s.phi + rest * weight_decay * lr * p
        direction = phi / beta + beta * scaled + weight_decay * p
        return direction, State(phi - lr * alpha * phi + lr * beta * rest * scaled, v)

    return descend(per_tensor(lambda p: State(jnp.zeros_like(p), jnp.zeros_like(p)), update), learning_rate)


BASELINES = (
    define(
        "innaprop",
        innaprop,
        {
            "lr": rate(1e-3),
            "alpha": Space(0.05, 2.0, True, 0.1),
            "beta": Space(0.5, 2.0, True, 0.9),
            "b2": average(0.999),
            "weight_decay": decay(),
        },
        source="Bolte et al. (2024), arXiv:2410.08530",
        notes="the same steps in another variable",
    ),
)
