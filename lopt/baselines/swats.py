"""SWATS: Adam that switches to SGD when its step, projected on the gradient, shows a steady learning rate.

Source: Keskar & Socher (2017), arXiv:1712.07628, Algorithm 1. Over all tensors as one vector, with Adam's step p

    γ = p·p / (-p·g)  (where p·g ≠ 0);   λ ← β2 λ + (1-β2) γ;
    if t > 1 and |λ/(1-β2^t) - γ| < ε, from the next update on:  v ← β1 v + g;  u = -(1-β1) Λ v,   Λ = λ/(1-β2^t).

Differs from the paper: γ, λ and Λ are kept in units of lr, so that a schedule of lr goes on after the switch; a switch
needs Λ > 0, as in the authors' experiments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, at, define, descend, rate, transform
from lopt.baselines.of_optax import ADAM


class State(NamedTuple):
    count: jax.Array  # () int32, updates so far
    m: Any  # like params: Adam's average of gradients, after the switch SGD's buffer
    v: Any  # like params, average of squared gradients
    estimate: jax.Array  # () λ / lr
    found: jax.Array  # () Λ / lr, 0 before the switch


def swats(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, tolerance: Any = 1e-9
) -> optax.GradientTransformationExtraArgs:
    """SWATS.

    Args:
      learning_rate: as Adam's.
      b1: decay of m, later SGD's momentum.
      b2: decay of v and of the estimate.
      eps: added to the root of v.
      tolerance: ε, difference between the estimate and its average at which to switch, in units of a learning rate.
    """

    def init(params: Any) -> State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        nothing = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params), jnp.float32))
        return State(jnp.zeros((), jnp.int32), zeros, zeros, nothing, nothing)

    def update(updates: Any, state: State, params: Any = None, **extra: Any) -> tuple[Any, State]:
        t: Any = optax.safe_increment(state.count)
        switched = state.found > 0
        new = jnp.where(switched, 1.0, 1 - b1)
        m = jax.tree.map(lambda old, g: b1 * old + new * g, state.m, updates)
        v = jax.tree.map(lambda old, g: b2 * old + (1 - b2) * g * g, state.v, updates)
        adam = jax.tree.map(lambda m, v: m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), m, v)
        along = dot(adam, updates)
        gamma = dot(adam, adam) / jnp.where(along != 0, along, 1.0)
        estimate = jnp.where(along != 0, b2 * state.estimate + (1 - b2) * gamma, state.estimate)
        steady = estimate / (1 - b2**t)
        near = at(learning_rate, state.count) * jnp.abs(steady - gamma) < tolerance
        now = ~switched & (t > 1) & (along != 0) & (steady > 0) & near
        sgd = (1 - b1) * state.found
        direction = jax.tree.map(lambda a, m: jnp.where(switched, sgd * m, a), adam, m)
        # SGD's buffer starts empty.
        m = jax.tree.map(lambda m: jnp.where(now, 0.0, m), m)
        return direction, State(t, m, v, estimate, jnp.where(now, steady, state.found))

    return descend(transform(init, update), learning_rate)


def dot(a: Any, b: Any) -> Any:
    """Inner product of two trees."""
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


BASELINES = (
    define(
        "swats",
        swats,
        {"lr": rate(1e-3), "tolerance": Space(1e-9, 1e-4, True, 1e-9)} | ADAM,
        source="Keskar & Socher (2017), arXiv:1712.07628",
        notes="the rate found is kept in units of lr, so that a schedule goes on; with the paper's tolerance"
        " a run of a few thousand steps often ends before the switch",
    ),
)
