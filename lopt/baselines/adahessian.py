"""AdaHessian: Adam whose second moment is of the Hessian's diagonal and not of the gradient.

Source: Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney (2020), arXiv:2006.00719, Algorithm 1.

    D = z · (H z), z of random signs (Hutchinson);  D ← mean of |D| over the window of a convolution
    m ← β1 m + (1-β1) g;  v ← β2 v + (1-β2) D²;  u = -lr · m̂ / (v̂^(k/2) + ε),   m̂, v̂ bias-corrected.

k is the Hessian power. H z is one forward derivative of the gradient, about twice a gradient's cost. Differs from the
paper: matrices are not averaged over blocks (there only for attention).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import positive
from lopt.baselines.base import Rate, Space, decay, define, descend, rate, transform, when
from lopt.baselines.of_optax import ADAM


class State(NamedTuple):
    count: jax.Array  # () int32, updates so far
    m: Any  # like params, average of gradients
    v: Any  # like params, average of the squared diagonal
    seen: jax.Array  # () int32, estimates that v has


def adahessian(
    learning_rate: Rate,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    power: Any = 1.0,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian.

    Its update takes `hessian_diag=`, or `grad_fn=` and then makes the estimate, with `key=` or without: see `Baseline`.

    Args:
      learning_rate: about a hundred times Adam's (the paper: .15).
      b1: decay of m.
      b2: decay of v.
      power: k, of the diagonal in the denominator, in (0, 1].
      eps: added to the denominator.
      weight_decay: decoupled.
      every: updates between estimates.

    Raises:
      ValueError: at the update, if it is given neither `hessian_diag` nor `grad_fn`.
    """
    positive("adahessian", every=every)

    def init(params: Any) -> State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros((), jnp.int32), zeros, zeros, jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: State,
        params: Any = None,
        *,
        hessian_diag: Any = None,
        grad_fn: Any = None,
        key: Any = None,
        **extra: Any,
    ) -> tuple[Any, State]:
        if hessian_diag is None and grad_fn is None:
            raise ValueError("adahessian: update needs hessian_diag= or grad_fn=, got neither.")
        t: Any = optax.safe_increment(state.count)

        def fresh() -> tuple[Any, Any]:
            diag = hessian_diag
            if diag is None:
                draw = jax.random.fold_in(jax.random.key(0), state.count) if key is None else key
                diag = hutchinson(grad_fn, params, draw)
            squared = jax.tree.map(lambda v, d: b2 * v + (1 - b2) * over_window(d) ** 2, state.v, diag)
            return squared, state.seen + 1

        v, seen = when((t - 1) % every == 0, fresh, (state.v, state.seen))
        m = jax.tree.map(lambda old, g: b1 * old + (1 - b1) * g, state.m, updates)

        def direction(m: Any, v: Any) -> Any:
            v = v / (1 - b2**seen)
            root = jnp.where(v > 0, jnp.where(v > 0, v, 1.0) ** (power / 2), 0.0)
            return m / (1 - b1**t) / (root + eps)

        return jax.tree.map(direction, m, v), State(t, m, v, seen)

    return descend(transform(init, update), learning_rate, weight_decay)


def hutchinson(grad_fn: Any, params: Any, key: Any) -> Any:
    """z · (H z), an unbiased estimate of the Hessian's diagonal, like params; the key is consumed."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    z = tree.unflatten(signs)
    return jax.tree.map(lambda a, b: a * b, z, jax.jvp(grad_fn, (params,), (z,))[1])


def over_window(d: Any) -> Any:
    """The mean size over height and width of a convolution's kernel [H, W, in, out]; others as they are."""
    if d.ndim != 4 or not d.size:
        return d
    return jnp.broadcast_to(jnp.mean(jnp.abs(d), axis=(0, 1), keepdims=True), d.shape)


BASELINES = (
    define(
        "adahessian",
        adahessian,
        {"lr": rate(0.15, 1e-3, 1.0), "power": Space(0.5, 1.0, False, 1.0), "weight_decay": decay()} | ADAM,
        needs=frozenset({"hessian_diag"}),
        source="Yao et al. (2020), arXiv:2006.00719",
        version=2,  # lopt-eval's key of the signs is no longer the one that draws the batch
        notes="one estimate a step, about twice a gradient's cost; matrices are not averaged over blocks",
    ),
)
