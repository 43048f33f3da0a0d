"""Non-convex functions of n variables with known minima, shifted, rotated and scaled by phi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Split, Task
from tasks.space import Choice, LogInt
from tasks.supervised import is_range, log_uniform, require_positive, require_range, split_index, spoken

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SPACE = {
    "function": Choice(("rosenbrock", "rastrigin", "styblinski_tang", "ackley")),
    "dim": LogInt(2, 64),
    "rotate": Choice((False, True)),
    "noise": Choice((0.0, 0.01, 0.1)),
}
STYBLINSKI_MINIMUM = (-2.9035340, -39.1661657)  # of one coordinate: where, and the value halved below


def rosenbrock(x: Float[Array, " D"]) -> Float[Array, ""]:
    """A curved valley; minimum 0 at 1. Source: Rosenbrock (1960)."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def rastrigin(x: Float[Array, " D"]) -> Float[Array, ""]:
    """A bowl with a grid of minima; minimum 0 at 0. Source: Rastrigin (1974)."""
    return jnp.sum(x**2 + 10.0 * (1.0 - jnp.cos(2.0 * jnp.pi * x)))


def styblinski_tang(x: Float[Array, " D"]) -> Float[Array, ""]:
    """Two minima a coordinate; shifted to a minimum of 0, at -2.9035340. Source: Styblinski & Tang (1990)."""
    return jnp.sum(0.5 * (x**4 - 16.0 * x**2 + 5.0 * x) - STYBLINSKI_MINIMUM[1])


def ackley(x: Float[Array, " D"]) -> Float[Array, ""]:
    """A funnel in a nearly flat, rippled plain; minimum 0 at 0. Source: Ackley (1987)."""
    # The small constant makes the cone's tip smooth.
    radius = jnp.sqrt(jnp.mean(x**2) + 1e-12)
    return 20.0 * (1.0 - jnp.exp(-0.2 * radius)) + jnp.e - jnp.exp(jnp.mean(jnp.cos(2.0 * jnp.pi * x)))


# name -> (function, each coordinate of its minimum, half the side of the usual domain, divisor of a coordinate's part)
FUNCTIONS = {
    "rosenbrock": (rosenbrock, 1.0, 2.0, 100.0),
    "rastrigin": (rastrigin, 0.0, 5.12, 10.0),
    "styblinski_tang": (styblinski_tang, STYBLINSKI_MINIMUM[0], 5.0, 40.0),
    "ackley": (ackley, 0.0, 32.0, 1.0),
}


class Phi(NamedTuple):
    """Task parameters: the function's argument is `rotation @ params + shift`."""

    rotation: Float[Array, "D D"]
    shift: Float[Array, " D"]
    noise: Any = ()  # standard deviation of the gradient's, where it is drawn


def synthetic(
    *, function: str = "rosenbrock", dim: int = 8, rotate: bool = False, noise: float | Sequence[float] = 0.0
) -> Task:
    """A test function over its number of coordinates, in units that make typical values about 1.

    Inits are uniform in the middle half of the usual domain. The minimum is 0 at the task's `optimum`.

    Args:
      function: rosenbrock, rastrigin, styblinski_tang or ackley.
      dim: D ≥ 2.
      rotate: phi draws a random rotation, which couples the coordinates.
      noise: standard deviation of the gradient's noise along each axis; validation and test have none. Of a range (low,
        high) phi draws log-uniformly.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"synthetic: function, got {function!r}; valid: {', '.join(FUNCTIONS)}.")
    require_positive("synthetic", "dim", [dim])
    if dim < 2:
        raise ValueError(f"synthetic: dim, got {dim}; valid: 2 or more.")
    require_range("synthetic", "noise", noise, 1e-9, 1e6, zero=True)
    evaluate, _, radius, unit = FUNCTIONS[function]
    # Ackley's is a mean already; the others are sums.
    divisor = unit if function == "ackley" else unit * dim

    def sample(key: PRNGKeyArray) -> Phi:
        rotation_key, shift_key = jax.random.split(key)
        shift = 0.1 * radius * jax.random.uniform(shift_key, (dim,), minval=-1.0, maxval=1.0)
        std = log_uniform(key, noise) if is_range(noise) else ()
        if not rotate:
            return Phi(jnp.eye(dim), shift, std)
        return Phi(jnp.linalg.qr(jax.random.normal(rotation_key, (dim, dim)))[0], shift, std)

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Float[Array, " D"]:
        z = jax.random.normal(key, (dim,))
        std: Any = phi.noise if is_range(noise) else noise
        return std * z if split_index(split) == 0 else jnp.zeros_like(z)

    def loss(params: Float[Array, " D"], key: PRNGKeyArray, phi: Phi, batch: Float[Array, " D"]) -> Float[Array, ""]:
        return evaluate(phi.rotation @ params + phi.shift) / divisor + batch @ params

    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: 0.5 * radius * jax.random.uniform(key, (dim,), minval=-1.0, maxval=1.0),
        batch=batch,
        loss=loss,
        name=f"synthetic({function}, {dim}{', rotated' if rotate else ''}, noise {spoken(noise)})",
        deterministic=not is_range(noise) and not noise,
    )


def optimum(function: str, phi: Phi) -> Float[Array, " D"]:
    """The params whose loss is 0."""
    return phi.rotation.T @ (FUNCTIONS[function][1] - phi.shift)
