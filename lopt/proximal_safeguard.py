"""A learned proximal optimizer that hands over to FISTA: whatever it has learned, F converges to its minimum.

    learned = lopt.load("l2o-lasso", prox=r, lipschitz=L)
    tx = safeguard(learned, prox=r, lipschitz=L)

With T(y) = prox(y - s ∇f(y)) of the plain step s = .9999 / L, ‖y - T(y)‖ is 0 at a minimum alone, and known at no cost
where the gradient is. The learned optimizer is used for at most `steps` updates, and only while that residual stays
below its first value and keeps finding new least ones. Then FISTA with gradient restarts begins at the T(y) of the
least.

Proof. FISTA begun at x₀ has F(x_k) - F* ≤ 2L ‖x₀ - x*‖² / (k + 1)² (Beck & Teboulle 2009, theorem 4.4) until its first
restart. With restarts at any times: let v_k = F(x_k) - F* and u_k = t_k x_k - (t_k - 1) x_{k-1} - x*. Their lemma 4.1
says that 2s t_k² v_k + ‖u_k‖² does not grow, and x_k - x* is u_k / t_k + (1 - 1 / t_k)(x_{k-1} - x*). Hence from one
restart to the next E = 2s v + ‖x - x*‖² loses at least 2s (t_end - 1) v_end, for every minimum x*. There t_end ≥ 1.6,
so over restarts v tends to 0, x is bounded, and E of one of its limits tends to 0: x converges to a minimum.

Heaton et al. (2023), "Safeguarded learned convex optimization", AAAI, arXiv:2003.01880, also judge by that residual,
against a sequence that learned steps must undercut, and fall back to single plain steps. Theirs ask for a residual that
grows without bound far away (coercive), which LASSO with more columns than rows has not, and have no rate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt import transform
from lopt.base import positive
from lopt.prox import Penalty, none
from lopt.proximal import SAFE, fista, plain_step, wide
from lopt.rules.l2o_pa import solution_of


class State(NamedTuple):
    count: jax.Array  # () int32, updates so far
    learning: jax.Array  # () bool, whether the learned optimizer is still used
    since: jax.Array  # () int32, updates since the least residual
    first: jax.Array  # () residual of the first update
    least: jax.Array  # () least residual
    best: Any  # like params; T(y) where it was
    learned: Any  # state of the learned optimizer
    plain: Any  # of FISTA
    x: Any  # like params; the last output of a proximal operator


def last(state: Any, params: Any) -> Any:
    """The last output of the proximal operator: of an optimizer's state, or the params where it has none."""
    return solution_of(state, params) if isinstance(state, transform.State) else getattr(state, "x", params)


def safeguard(
    learned: optax.GradientTransformation,
    *,
    lipschitz: Any,
    prox: Penalty | None = None,
    steps: int = 100,
    patience: int = 30,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer of F = f + r whose gradients are those of f at the parameters; f and r convex.

    Args:
      learned: the optimizer; its updates may be anything, also not finite.
      lipschitz: L, the Lipschitz constant of ∇f, a number or traced.
      prox: r, None for 0.
      steps: updates after which FISTA takes over: what the shipped weights were meta-trained on, or fewer where they
        gain little later (10 on logistic regression, docs/l2o.md).
      patience: updates without a new least residual after which it does so before.

    Returns:
      An optax transform with one gradient an update. `state.x` is the last output of a proximal operator.

    Raises:
      ValueError: on an argument out of range.
    """
    if not isinstance(lipschitz, jax.Array):
        positive("lopt.proximal_safeguard", lipschitz=lipschitz)
    for name, got in {"steps": steps, "patience": patience}.items():
        if not isinstance(got, int) or got < 1:
            raise ValueError(f"lopt.proximal_safeguard: {name}, got {got!r}; valid: integers from 1.")
    r, step = prox or none(), SAFE / lipschitz
    plain = fista(lipschitz=lipschitz, prox=prox, restart="gradient")
    follow = optax.with_extra_args_support(learned)

    def init(params: Any) -> State:
        count, dtype = jnp.zeros((), jnp.int32), wide(params)
        least = jnp.full((), jnp.inf, dtype)
        on = jnp.ones((), bool)
        return State(count, on, count, least, least, params, learned.init(params), plain.init(params), params)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("lopt.proximal_safeguard: update got params=None; call tx.update(grads, state, params).")
        where = lambda condition, one, other: jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)  # noqa: E731

        def learning(_: None) -> tuple[Any, State]:
            here = plain_step(r, step, params, updates)
            squares = jax.tree.map(lambda y, x: jnp.sum((y - x).astype(state.least.dtype) ** 2), params, here)
            residual = jnp.sqrt(sum(jax.tree.leaves(squares)))
            lower = residual < state.least  # never where it is not a number
            since = jnp.where(lower, 0, state.since + 1)
            best, least = where(lower, here, state.best), jnp.where(lower, residual, state.least)
            first = jnp.where(state.count == 0, residual, state.first)
            theirs, of_learned = follow.update(updates, state.learned, params, **extra)
            # Before it is done: no update is the way back from what is not a number.
            finite = jnp.all(jnp.asarray([jnp.isfinite(u).all() for u in jax.tree.leaves(theirs)]))
            good = (since < patience) & (residual <= first) & jnp.isfinite(residual) & finite
            on = state.learning & good & (state.count + 1 < steps)
            ours, of_plain = plain.update(updates, state.plain, params)
            back = jax.tree.map(jnp.subtract, best, params)
            leaving = state.learning & ~on
            moved = where(on, theirs, where(leaving, back, ours))
            of_plain = where(leaving | on, plain.init(best), of_plain)
            followed = last(of_learned, jax.tree.map(jnp.add, params, theirs))
            followed = jax.tree.map(lambda x, y: x.astype(y.dtype), followed, params)  # rules keep float32 of bfloat16
            x = where(on, followed, last(of_plain, params))
            return moved, State(state.count + 1, on, since, first, least, best, of_learned, of_plain, x)

        def after(_: None) -> tuple[Any, State]:
            moved, of_plain = plain.update(updates, state.plain, params)
            return moved, state._replace(count=state.count + 1, plain=of_plain, x=last(of_plain, params))

        # Not of `learning`: under vmap all instances have one count, and what depends on it alone stays a branch.
        return jax.lax.cond(state.count < steps, learning, after, None)

    return optax.GradientTransformationExtraArgs(init, update)
