"""The polynomial-decay average of the parameters, kept beside any optax transform. Shamir & Zhang (2013).

Iterates of long steps circle around what they are to find; their average is inside long before a schedule has made
the steps short. At the end of a schedule that goes to 0 the two are almost the same, so whoever trains to the end may
ignore it: it is for looking, saving and stopping before. Gradients are still taken at the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt import precision


class Averaged(NamedTuple):
    """State of `averaged`."""

    state: Any  # of the transform inside
    count: jax.Array  # () int32, updates so far
    average: Any  # like params, in float32 (float64 for float64 parameters); what is not floating is as it is


def averaged(tx: optax.GradientTransformation, power: float = 8.0) -> optax.GradientTransformationExtraArgs:
    """A transform whose updates are those of `tx` and whose state has an average of the parameters.

    x_t = (1 - w) x_{t-1} + w p_t, w = (power + 1) / (t + power): p_s weighs about as s^power, so that about the last
    t / power steps count. `eval_params` reads it.

    Args:
      tx: any optax transform.
      power: >= 0; 0 is the mean of all iterates.

    Source: Shamir & Zhang (2013), arXiv:1212.1824, equation 4 (their η is `power`).

    >>> import jax.numpy as jnp, lopt, optax
    >>> tx = lopt.averaged(optax.sgd(1.0), power=0.0)
    >>> params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    >>> for _ in range(3):  # the parameters are 1, 2, 3
    ...     updates, state = tx.update(-jnp.ones(2), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> lopt.eval_params(state, params).tolist()
    [2.0, 2.0]
    """
    if not 0 <= power < float("inf"):
        raise ValueError(f"lopt.averaged: power, got {power!r}; valid: a number >= 0.")
    inside = optax.with_extra_args_support(tx)

    def init(params: Any) -> Averaged:
        # Copies: a caller may donate both parameters and state.
        average = jax.tree.map(lambda p: jnp.copy(precision.wide(p) if _floating(p) else jnp.asarray(p)), params)
        return Averaged(inside.init(params), jnp.zeros((), jnp.int32), average)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("lopt.averaged: params, got None; valid: tx.update(grads, state, params).")
        updates, inner = inside.update(updates, state.state, params, **extra)
        weight = (power + 1) / (state.count + power + 1)

        def one(x: jax.Array, p: jax.Array) -> jax.Array:
            return x + weight.astype(x.dtype) * (p - x) if _floating(p) else p

        average = jax.tree.map(one, state.average, optax.apply_updates(params, updates))
        return updates, Averaged(inner, state.count + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: Any, params: Any) -> Any:
    """The parameters to evaluate: the average that an optimizer's state holds, anywhere in it, or else `params`.

    Args:
      state: of any optax transform (`optax.chain`, `optax.multi_transform`, … around `averaged` or not).
      params: the parameters, for their dtypes and for what the average leaves out.
    """
    for found in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Averaged)):
        if isinstance(found, Averaged):
            params = jax.tree.map(_chosen, params, found.average, is_leaf=lambda x: x is None)
    return params


def _chosen(p: Any, x: Any) -> Any:
    return p if x is None or isinstance(x, optax.MaskedNode) else x.astype(jnp.result_type(p))


def _floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
