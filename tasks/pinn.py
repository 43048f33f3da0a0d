"""Physics-informed networks. Source: Raissi et al. (2019), doi:10.1016/j.jcp.2018.10.045.

Both equations have exact solutions, which give the boundary values and the metric, and which phi draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Split, Task
from tasks.space import INIT, Choice, LogFloat, LogInt, Widths
from tasks.supervised import (
    ERRORS,
    activation_named,
    init_layers,
    init_scales,
    is_range,
    log_uniform,
    mlp,
    require_init_scale,
    require_positive,
    require_range,
    split_key,
    spoken,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    from tasks.supervised import Params

    Field = Callable[[Float[Array, " B"], Float[Array, " B"]], Float[Array, " B"]]

SPACE = {
    "equation": Choice(("heat", "burgers")),
    "hidden": Widths(1, 4, 16, 64),
    "activation": Choice(("tanh", "gelu", "silu")),  # twice differentiable
    "boundary_weight": LogFloat(1.0, 100.0),
    "batch_size": LogInt(16, 128),
    "log10_init_scale": INIT,
    "loss": Choice(("squared", "absolute", "huber")),
}


class Heat(NamedTuple):
    """u_t = ν u_xx with u = Σ a_k sin(kπx) exp(-ν k²π² t), k = 1, 2, 3."""

    viscosity: Float[Array, ""]  # ν
    amplitude: Float[Array, " 3"]  # a_k
    scale: Any = ()  # [L] multiplies weight matrix l at init
    weight: Any = ()  # of the error at the edges, where it is drawn

    @classmethod
    def sample(cls, key: PRNGKeyArray) -> Heat:
        viscosity_key, amplitude_key = jax.random.split(key)
        viscosity = 10.0 ** jax.random.uniform(viscosity_key, minval=-2.0, maxval=-1.0)
        return cls(viscosity, jax.random.uniform(amplitude_key, (3,), minval=-1.0, maxval=1.0))

    def exact(self, x: Float[Array, " B"], t: Float[Array, " B"]) -> Float[Array, " B"]:
        rate = jnp.pi * jnp.arange(1.0, 4.0, dtype=x.dtype)[None]
        waves = jnp.sin(rate * x[:, None]) * jnp.exp(-self.viscosity * rate**2 * t[:, None])
        return waves @ self.amplitude

    def residual(self, u: Field, x: Float[Array, " B"], t: Float[Array, " B"]) -> Float[Array, " B"]:
        _, _, u_t, u_xx = derivatives(u, x, t)
        return u_t - self.viscosity * u_xx


class Burgers(NamedTuple):
    """u_t + u u_x = ν u_xx with a travelling front, u = c - a tanh(a (x - x₀ - c t) / 2ν)."""

    viscosity: Float[Array, ""]  # ν
    speed: Float[Array, ""]  # c
    height: Float[Array, ""]  # a, half the front's
    place: Float[Array, ""]  # x₀
    scale: Any = ()  # [L] multiplies weight matrix l at init
    weight: Any = ()  # of the error at the edges, where it is drawn

    @classmethod
    def sample(cls, key: PRNGKeyArray) -> Burgers:
        unit = jax.random.uniform(key, (4,))
        return cls(0.03 + 0.07 * unit[0], 0.5 * unit[1], 0.3 + 0.4 * unit[2], 0.2 + 0.4 * unit[3])

    def exact(self, x: Float[Array, " B"], t: Float[Array, " B"]) -> Float[Array, " B"]:
        along = x - self.place - self.speed * t
        return self.speed - self.height * jnp.tanh(self.height * along / (2 * self.viscosity))

    def residual(self, u: Field, x: Float[Array, " B"], t: Float[Array, " B"]) -> Float[Array, " B"]:
        value, u_x, u_t, u_xx = derivatives(u, x, t)
        return u_t + value * u_x - self.viscosity * u_xx


# Of one residual or error.
PENALTIES: dict[str, Callable[[Any], Any]] = {
    "squared": lambda error: error**2,
    "absolute": ERRORS["absolute"],
    "huber": lambda error: 2 * ERRORS["huber"](error),
}
EQUATIONS = {"heat": Heat, "burgers": Burgers}


class Points(NamedTuple):
    """Where the residual is taken, and where the solution is known, in the unit square of (x, t)."""

    inside: Float[Array, "B 2"]
    edge: Float[Array, "B 2"]  # t = 0, or x in {0, 1}


def derivatives(u: Field, x: Float[Array, " B"], t: Float[Array, " B"]) -> tuple[Float[Array, " B"], ...]:
    """u, u_x, u_t and u_xx of a function of each point alone, in forward mode."""
    one = jnp.ones_like(x)

    def along_x(x: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda x: u(x, t), (x,), (one,))

    (value, u_x), (_, u_xx) = jax.jvp(along_x, (x,), (one,))
    return value, u_x, jax.jvp(lambda t: u(x, t), (t,), (one,))[1], u_xx


def pinn(
    *,
    equation: str = "heat",
    hidden: Sequence[int] = (32, 32),
    activation: str = "tanh",
    boundary_weight: float | Sequence[float] = 10.0,
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "squared",
) -> Task:
    """Mean squared residual of a PDE inside the unit square of space and time, and mean squared error at its edges.

    Args:
      equation: heat or burgers; phi draws the viscosity and which solution.
      hidden: widths of the network from (x, t) to u.
      activation: tanh, gelu or silu (relu has no second derivative).
      boundary_weight: of the error at t = 0, x = 0 and x = 1. Of a range (low, high) phi draws log-uniformly.
      batch_size: B points inside and B at the edges, fresh each batch.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: squared (not halved), or absolute or huber (quadratic as squared is, up to 1) in place of it, in both means.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    if equation not in EQUATIONS:
        raise ValueError(f"pinn: equation, got {equation!r}; valid: {', '.join(EQUATIONS)}.")
    require_positive("pinn", "hidden", hidden, least=1)
    require_positive("pinn", "batch_size", [batch_size])
    if activation == "relu":
        raise ValueError("pinn: activation, got 'relu'; valid: tanh, gelu, silu.")
    require_range("pinn", "boundary_weight", boundary_weight, 1e-6, 1e6, zero=True)
    require_init_scale("pinn", log10_init_scale)
    if loss not in PENALTIES:
        raise ValueError(f"pinn: loss, got {loss!r}; valid: {', '.join(PENALTIES)}.")
    penalty = PENALTIES[loss]
    activate, gain = activation_named("pinn", activation)
    shapes = list(itertools.pairwise((2, *hidden, 1)))

    def field(params: Params) -> Field:
        return lambda x, t: mlp(params, 2 * jnp.stack([x, t], axis=-1) - 1, activate)[:, 0]

    def sample(key: PRNGKeyArray) -> Any:
        phi = EQUATIONS[equation].sample(key)._replace(scale=init_scales(key, len(shapes), log10_init_scale))
        return phi._replace(weight=log_uniform(key, boundary_weight)) if is_range(boundary_weight) else phi

    def batch(key: PRNGKeyArray, phi: Any, data: Any, split: Split) -> Points:
        inside_key, along_key, side_key = jax.random.split(split_key(key, split), 3)
        along = jax.random.uniform(along_key, (batch_size,))
        side = jax.random.randint(side_key, (batch_size,), 0, 3)
        x = jnp.where(side == 0, along, (side == 2).astype(along.dtype))
        edge = jnp.stack([x, jnp.where(side == 0, 0.0, along)], axis=-1)
        return Points(jax.random.uniform(inside_key, (batch_size, 2)), edge)

    def objective(params: Params, key: PRNGKeyArray, phi: Any, batch: Points) -> Float[Array, ""]:
        u, edge = field(params), (batch.edge[:, 0], batch.edge[:, 1])
        residual = phi.residual(u, batch.inside[:, 0], batch.inside[:, 1])
        weight: Any = phi.weight if is_range(boundary_weight) else boundary_weight
        return jnp.mean(penalty(residual)) + weight * jnp.mean(penalty(u(*edge) - phi.exact(*edge)))

    def metrics(params: Params, key: PRNGKeyArray, phi: Any, batch: Points) -> dict[str, Array]:
        inside = batch.inside[:, 0], batch.inside[:, 1]
        exact = phi.exact(*inside)
        return {"relative_error": jnp.linalg.norm(field(params)(*inside) - exact) / jnp.linalg.norm(exact)}

    other = "" if loss == "squared" else f", {loss} loss"
    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: init_layers(key, shapes, phi.scale, gain),
        batch=batch,
        loss=objective,
        metrics=metrics,
        name=f"pinn({equation}, {'-'.join(map(str, hidden))}, {activation}, boundary {spoken(boundary_weight)}, "
        f"batch {batch_size}{other}{spread})",
        version=2,  # validation and test have batches of their own
    )
