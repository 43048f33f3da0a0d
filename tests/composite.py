"""What the tests of composite problems share: recorded instances, their losses, and the path of a method."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lopt import prox


def lasso(W, b, x):
    return 0.5 * jnp.sum((W @ x - b) ** 2)


def logistic(W, b, x):
    t = W @ x
    return jnp.mean(jnp.logaddexp(0.0, t) - b * t)


RHO = 0.1
TOYS = [f"lasso_toy_{i}" for i in range(4)]


def classical(tx, W, b, r, steps, smooth=lasso, objective_at=lambda y, state: state.x):
    """Objectives [K + 1] and iterates at x from 0."""

    def value(x):
        return smooth(W, b, x) + r.value(x)

    def step(carry, _):
        y, state = carry
        x = objective_at(y, state)
        updates, state = tx.update(jax.grad(lambda y: smooth(W, b, y))(y), state, y, value_fn=value)
        return (y + updates, state), (value(x), x)

    y = jnp.zeros(W.shape[1], W.dtype)
    return jax.jit(lambda y: jax.lax.scan(step, (y, tx.init(y)), None, length=steps + 1)[1])(y)


PENALTIES = {
    "l1": prox.l1(0.3),
    "elastic_net": prox.elastic_net(0.3, 0.7),
    "box": prox.box(-0.2, 0.5),
    "nonnegative": prox.nonnegative(),
    "group_l1": prox.group_l1(0.5),
    "nuclear": prox.nuclear(0.4),
    "simplex": prox.simplex(2.0),
}
