"""What is added to a smooth loss, F = f + r, as penalties with a proximal operator.

    r = lopt.prox.l1(0.1)
    x = r.apply(v, step)  # argmin_x  r(x) + Σ (x - v)² / (2 step)

Source: Parikh & Boyd (2014), "Proximal algorithms", doi:10.1561/2400000003, chapter 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Kind(NamedTuple):
    """The mathematics of a penalty on one tensor.

    Fields:
      value: `(strength, x, axis) -> () r(x)`; of a set's indicator 0, whether x is in it or not.
      apply: `(strength, v, step, axis) -> x`, step like v.
      pool: `(step, axis) -> step`, what is averaged where the operator has a closed form for one step only.
      rank: of the tensor, where it must have one.
    """

    value: Callable[..., Array]
    apply: Callable[..., Array]
    pool: Callable[..., Array] | None = None
    rank: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalty:
    """A penalty r on a tensor; a pytree, so that its strength may be traced and vmapped."""

    strength: tuple[Any, ...]  # numbers or () arrays
    kind: str = dataclasses.field(metadata={"static": True})  # of KINDS
    axis: int = dataclasses.field(default=-1, metadata={"static": True})  # along which a group lies

    @property
    def separable(self) -> bool:
        """Whether elements do not know of each other."""
        return KINDS[self.kind].pool is None

    def check(self, shape: Sequence[int], where: str) -> None:
        """Refuse a tensor that the penalty is not defined for.

        Raises:
          ValueError: naming the place, usually a leaf, and its shape.
        """
        rank, words = KINDS[self.kind].rank, {1: "a vector", 2: "a matrix"}
        if rank is not None and len(shape) != rank:
            raise ValueError(f"{where}: {self.kind} of shape {tuple(shape)}; valid: {words[rank]}.")
        if self.kind == "group_l1" and not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"{where}: group_l1 along axis {self.axis} of shape {tuple(shape)}; valid: an axis it has."
            )

    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        """r(x); 0 for an indicator."""
        self.check(x.shape, "lopt.prox.value")
        return KINDS[self.kind].value(self.strength, x, self.axis)

    def apply(self, v: Float[Array, "..."], step: Any) -> Float[Array, "..."]:
        """argmin over x of r(x) + Σ (x - v)² / (2 step), step a positive number or an array like v.

        Of a penalty that is not separable the step is averaged over a group, or the tensor, first.
        """
        self.check(v.shape, "lopt.prox.apply")
        kind = KINDS[self.kind]
        step = jnp.broadcast_to(step, v.shape)
        return kind.apply(self.strength, v, step if kind.pool is None else kind.pool(step, self.axis), self.axis)

    def pooled(self, step: Float[Array, "..."]) -> Float[Array, "..."]:
        """The step that `apply` takes for each element: the same where elements do not know of each other."""
        pool = KINDS[self.kind].pool
        return step if pool is None else jnp.broadcast_to(pool(step, self.axis), step.shape)


def check(r: Penalty, params: Any, where: str) -> None:
    """`Penalty.check` of every tensor. Raises ValueError naming the leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        r.check(jnp.shape(leaf), f"{where}: {name}")


def soft(v: Array, threshold: Array) -> Array:
    """v moved towards 0 by the threshold, and not beyond."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0.0)


def _length(x: Array, axis: int) -> Array:
    squares = jnp.sum(x * x, axis, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _group(strength: Any, v: Array, step: Array, axis: int) -> Array:
    length = _length(v, axis)
    return v * jnp.maximum(1 - strength[0] * step / jnp.where(length > 0, length, 1.0), 0.0)


def _nuclear(strength: Any, v: Array, step: Array, axis: int) -> Array:
    left, values, right = jnp.linalg.svd(v, full_matrices=False)
    return (left * soft(values, strength[0] * step.reshape(()))[None]) @ right


def _simplex(strength: Any, v: Array, step: Array, axis: int) -> Array:
    return optax.projections.projection_simplex(v, strength[0])


def _over_axis(step: Array, axis: int) -> Array:
    return jnp.mean(step, axis, keepdims=True)


def _over_tensor(step: Array, axis: int) -> Array:
    return jnp.mean(step, keepdims=True)


KINDS: dict[str, Kind] = {
    "none": Kind(lambda s, x, axis: jnp.zeros((), x.dtype), lambda s, v, step, axis: v),
    "l1": Kind(lambda s, x, axis: s[0] * jnp.sum(jnp.abs(x)), lambda s, v, step, axis: soft(v, s[0] * step)),
    "elastic_net": Kind(
        lambda s, x, axis: s[0] * jnp.sum(jnp.abs(x)) + s[1] / 2 * jnp.sum(x * x),
        lambda s, v, step, axis: soft(v, s[0] * step) / (1 + s[1] * step),
    ),
    "box": Kind(lambda s, x, axis: jnp.zeros((), x.dtype), lambda s, v, step, axis: jnp.clip(v, s[0], s[1])),
    "group_l1": Kind(lambda s, x, axis: s[0] * jnp.sum(_length(x, axis)), _group, _over_axis),
    "nuclear": Kind(lambda s, x, axis: s[0] * jnp.sum(jnp.linalg.svd(x, compute_uv=False)), _nuclear, _over_tensor, 2),
    "simplex": Kind(lambda s, x, axis: jnp.zeros((), x.dtype), _simplex, _over_tensor, 1),
}


def none() -> Penalty:
    """r = 0."""
    return Penalty((), "none")


def l1(strength: Any) -> Penalty:
    """strength · Σ |x|."""
    return Penalty((_least("l1", strength=strength),), "l1")


def elastic_net(l1: Any, l2: Any) -> Penalty:
    """l1 · Σ |x| + l2 / 2 · Σ x²."""
    return Penalty((_least("elastic_net", l1=l1), _least("elastic_net", l2=l2)), "elastic_net")


def box(low: Any, high: Any) -> Penalty:
    """The indicator of low ≤ x ≤ high; either may be infinite."""
    if not (isinstance(low, jax.Array) or isinstance(high, jax.Array)) and not low <= high:
        raise ValueError(f"lopt.prox.box: low, high, got {low}, {high}; valid: low <= high.")
    return Penalty((low, high), "box")


def nonnegative() -> Penalty:
    """The indicator of x ≥ 0."""
    return box(0.0, float("inf"))


def group_l1(strength: Any, axis: int = -1) -> Penalty:
    """strength · Σ over groups of the group's Euclidean length; a group lies along an axis."""
    return Penalty((_least("group_l1", strength=strength),), "group_l1", axis)


def nuclear(strength: Any) -> Penalty:
    """strength · the sum of a matrix's singular values."""
    return Penalty((_least("nuclear", strength=strength),), "nuclear")


def simplex(scale: Any = 1.0) -> Penalty:
    """The indicator of x ≥ 0, Σ x = scale > 0, of a vector."""
    if not isinstance(scale, jax.Array) and not scale > 0:
        raise ValueError(f"lopt.prox.simplex: scale, got {scale}; valid: > 0.")
    return Penalty((_least("simplex", scale=scale),), "simplex")


def _least(where: str, **number: Any) -> Any:
    ((name, got),) = number.items()
    if not isinstance(got, jax.Array) and not got >= 0:
        raise ValueError(f"lopt.prox.{where}: {name}, got {got}; valid: >= 0.")
    return got
