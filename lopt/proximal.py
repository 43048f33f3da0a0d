"""Classical methods for F = f + r, f smooth and r with a proximal operator, as optax transforms.

    tx = lopt.proximal.fista(lipschitz=L, prox=lopt.prox.l1(0.1), restart="gradient")
    updates, state = tx.update(gradient_of_f, state, y)
    x = state.x

Parameters are the point y at which the gradient of f is taken, `state.x` is what the proximal operator returned last.
Pytrees have one momentum for all tensors; the penalty is that of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import positive, unknown
from lopt.prox import Penalty, check, none

SAFE = 0.9999  # of the step 1 / L
RESTARTS = ("never", "gradient", "function")


class State(NamedTuple):
    x: Any  # like params; the last output of the proximal operator
    t: jax.Array  # () FISTA's t; the momentum is (t - 1) / t⁺
    value: jax.Array  # () F at x, where it is asked for


def ista(*, lipschitz: Any, prox: Penalty | None = None) -> optax.GradientTransformationExtraArgs:
    """Proximal gradient descent, y = x.

    Source: Daubechies, Defrise & De Mol (2004), doi:10.1002/cpa.20042.

    Args:
      lipschitz: L, the Lipschitz constant of ∇f; the step is .9999 / L. A number or traced.
      prox: r, None for 0.

    Raises:
      ValueError: on an argument out of range.
    """
    return momentum(lipschitz=lipschitz, prox=prox, a=0.0)


def momentum(*, lipschitz: Any, prox: Penalty | None = None, a: Any) -> optax.GradientTransformationExtraArgs:
    """The same with y⁺ = x⁺ + a (x⁺ - x) for a constant a in [0, 1)."""
    if not isinstance(a, jax.Array) and not 0 <= a < 1:
        raise ValueError(f"lopt.proximal.momentum: a, got {a}; valid: [0, 1).")
    return _accelerated("momentum", lipschitz, prox, lambda t: (t, a), "never")


def fista(
    *, lipschitz: Any, prox: Penalty | None = None, restart: str = "never"
) -> optax.GradientTransformationExtraArgs:
    """Accelerated proximal gradient descent.

    Source: Beck & Teboulle (2009), doi:10.1137/080716542, section 4; restarts: O'Donoghue & Candès (2015),
    doi:10.1007/s10208-013-9150-3, section 3.2.

    Args:
      lipschitz: as in `ista`.
      prox: as in `ista`.
      restart: "never"; "gradient": the momentum is dropped where it points against the step, (y - x⁺) · (x⁺ - x) > 0;
        "function": where F(x⁺) > F(x), for which `update(…, value_fn=)` is needed, F at any params.

    Raises:
      ValueError: on an argument out of range.
    """
    if restart not in RESTARTS:
        raise unknown("lopt.proximal.fista", "restart", restart, RESTARTS)

    def growing(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        following = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return following, (t - 1) / following

    return _accelerated("fista", lipschitz, prox, growing, restart)


def _accelerated(
    name: str, lipschitz: Any, prox: Penalty | None, next_momentum: Callable[[jax.Array], Any], restart: str
) -> optax.GradientTransformationExtraArgs:
    if not isinstance(lipschitz, jax.Array):
        positive(f"lopt.proximal.{name}", lipschitz=lipschitz)
    r, step = prox or none(), SAFE / lipschitz

    def init(params: Any) -> State:
        check(r, params, f"lopt.proximal.{name}")
        dtype = wide(params)
        return State(params, jnp.ones((), dtype), jnp.full((), jnp.inf, dtype))

    def update(updates, state, params=None, *, value_fn=None, **extra):
        del extra
        if params is None:
            raise ValueError(f"lopt.proximal.{name}: update got params=None; call tx.update(grads, state, params).")
        if restart == "function" and value_fn is None:
            raise ValueError(f"lopt.proximal.{name}: restart='function' needs F; call tx.update(…, value_fn=).")
        x = plain_step(r, step, params, updates)
        moved = jax.tree.map(jnp.subtract, x, state.x)
        value, again = state.value, jnp.zeros((), bool)
        if restart == "gradient":
            against = jax.tree.map(lambda y, x, d: jnp.sum((y - x) * d), params, x, moved)
            again = jnp.greater(sum(jax.tree.leaves(against)), 0.0)
        elif value_fn is not None and restart == "function":
            value = jnp.asarray(value_fn(x), state.value.dtype)
            again = value > state.value
        t, a = next_momentum(jnp.where(again, 1.0, state.t))
        y = jax.tree.map(lambda x, d: (x + a * d).astype(x.dtype), x, moved)
        return jax.tree.map(jnp.subtract, y, params), State(x, jnp.asarray(t, state.t.dtype), value)

    return optax.GradientTransformationExtraArgs(init, update)


def wide(params: Any) -> Any:
    """The type of numbers that belong to all tensors: float32, or float64 where a tensor is."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def plain_step(r: Penalty, step: Any, params: Any, gradients: Any) -> Any:
    """prox(y - step ∇f(y)) of every tensor, in its own type whatever that of a traced step."""
    return jax.tree.map(lambda y, g: jnp.asarray(r.apply(y - step * g, step), y.dtype), params, gradients)


class Split(NamedTuple):
    x: Any  # like params; the last output of r's proximal operator
    dual: Any  # like params; scaled


def admm(
    *, prox_f: Callable[[Any, Any], Any], prox: Penalty, step: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Alternating direction method of multipliers; gradients are ignored, parameters are x.

    Source: Boyd et al. (2011), doi:10.1561/2200000016, section 3.1.1.

    Args:
      prox_f: `(v, step) -> argmin over x of f(x) + Σ (x - v)² / (2 step)`, of params.
      prox: r.
      step: 1/ρ of the augmented Lagrangian.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("lopt.proximal.admm", step=step)

    def init(params: Any) -> Split:
        check(prox, params, "lopt.proximal.admm")
        return Split(params, jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, **extra):
        del updates, extra
        smooth = prox_f(jax.tree.map(jnp.subtract, state.x, state.dual), step)
        held = jax.tree.map(jnp.add, smooth, state.dual)
        x = jax.tree.map(lambda v: prox.apply(v, step), held)
        return jax.tree.map(jnp.subtract, x, params), Split(x, jax.tree.map(jnp.subtract, held, x))

    return optax.GradientTransformationExtraArgs(init, update)


class Hyper(NamedTuple):
    adam: Any  # of optax
    lr: jax.Array  # ()
    direction: Any  # like params; of the last update


def adam_hd(
    *, lr: float = 1e-3, beta: float = 1e-7, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam whose learning rate descends its own gradient: lr ← lr + beta · g · last direction. For subgradients of F.

    Source: Baydin et al. (2018), "Online learning rate adaptation with hypergradient descent", arXiv:1703.04782.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("lopt.proximal.adam_hd", lr=lr, eps=eps)
    if not beta >= 0:
        raise ValueError(f"lopt.proximal.adam_hd: beta, got {beta}; valid: >= 0.")
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> Hyper:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Hyper(adam.init(params), jnp.asarray(lr, wide(params)), zeros)

    def update(updates, state, params=None, **extra):
        del extra
        rate = (state.lr + beta * optax.tree.vdot(updates, state.direction)).astype(state.lr.dtype)
        direction, inner = adam.update(updates, state.adam, params)
        return jax.tree.map(lambda d: (-rate * d).astype(d.dtype), direction), Hyper(inner, rate, direction)

    return optax.GradientTransformationExtraArgs(init, update)
