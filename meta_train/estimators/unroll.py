"""What the estimators share: perturbations of theta, and the unroll of a window or of an episode. Not one itself.

C is the number of copies of a particle that are unrolled side by side on the same task, batches and init: 2 antithetic
signs, or 1 for backprop. What theta cannot influence has no copy axis, see `Inner.theta_axes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.estimators.base import Estimate
from meta_train.inner import Inner

# On a CPU so many bytes of particles are unrolled at once, a core's cache, and at least so many particles: smaller
# products would cost more than the cache saves.
CACHE, AT_ONCE = 1 << 20, 4

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Score = Callable[[Float[Array, "N C"]], Float[Array, " N"]]  # what is summed of a step's meta-losses


class Window(NamedTuple):
    """K steps of every particle, with resets."""

    particles: Any  # [N, C, ...] where theta has an influence, [N, ...] elsewhere
    before: jax.Array  # [N] score summed over the steps up to the first reset, that step included
    after: jax.Array  # [N] score summed over the steps after it
    was_reset: jax.Array  # [N] bool
    at_end: jax.Array  # [N] bool, the window's last step was an episode's last
    loss: jax.Array  # () mean meta-loss
    diverged: jax.Array  # [N] int32, how often a copy diverged
    resets: jax.Array  # () int32
    updates: jax.Array  # () int32, inner updates of all copies


class Episode(NamedTuple):
    """One whole inner run of every particle."""

    score: jax.Array  # [N] mean score of a step
    loss: jax.Array  # () mean over particles of the episode's mean meta-loss
    diverged: jax.Array  # [N] int32, copies that diverged at some step
    updates: jax.Array  # () int32, inner updates of all copies until their horizons


def difference(loss: Float[Array, "N 2"]) -> Float[Array, " N"]:
    """L(+) - L(-), taken step by step: sums of equal losses then cancel exactly."""
    return loss[:, 0] - loss[:, 1]


def gradient(delta: Float[Array, " N"], eps: Float[Array, "N P"], std: Any) -> Float[Array, " P"]:
    """Mean over pairs of the antithetic estimate; `delta` is L(+) - L(-), `std` () or [P]."""
    return mean_of_pairs(delta[:, None] * eps, std)


def mean_of_pairs(weighted: Float[Array, "N P"], std: Any) -> Float[Array, " P"]:
    """The mean over pairs of their differences times noise, over 2 std²; 0 where nothing is perturbed."""
    if isinstance(std, (int, float)):
        return weighted.mean(0) / (2 * std**2)
    return jnp.where(std > 0, weighted.mean(0) / jnp.where(std > 0, 2 * std**2, 1.0), 0.0)


def signed(delta: Float[Array, " N"], size: float) -> Float[Array, " N"]:
    """The differences, or their signs times `size` where that is not 0: one wild particle then counts like any other.

    Source: Metz et al. (2022), "VeLO: training versatile learned optimizers by scaling up", arXiv:2211.09760.
    """
    return size * jnp.sign(delta) if size else delta


def fold(key: jax.Array, index: jax.Array) -> jax.Array:
    """[N] keys of the particles, by their global numbers."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def split(keys: jax.Array, count: int) -> jax.Array:
    """[count, N] keys of [N] keys."""
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, count))(keys), 1, 0)


def flat_std(std: Any, theta: Any) -> Any:
    """A number as it is; a tree of numbers like theta as an array [P]."""
    if isinstance(std, (int, float)):
        return std
    full = jax.tree.map(lambda s, part: jax.tree.map(lambda x: jnp.full(x.shape, s, x.dtype), part), std, theta)
    return ravel_pytree(full)[0]


def noise(keys: jax.Array, std: Any, theta: Any) -> Float[Array, "N P"]:
    """Normal perturbations of the flat theta, by [N] keys."""
    flat, _ = ravel_pytree(theta)
    return jax.vmap(lambda k: std * jax.random.normal(k, flat.shape, flat.dtype))(keys)


def antithetic(theta: Any, eps: Float[Array, "N P"], *, centre: bool = False) -> Any:
    """Thetas [N, 2, ...] at ± eps; [N, 3, ...] with the unperturbed one last where `centre`."""
    flat, unravel = ravel_pytree(theta)
    flat = flat[None]
    copies = [flat + eps, flat - eps] + ([jnp.broadcast_to(flat, eps.shape)] if centre else [])
    return jax.vmap(jax.vmap(unravel))(jnp.stack(copies, axis=1))


def unperturbed(theta: Any, particles: int) -> Any:
    """Thetas [N, 1, ...], a copy for each particle, so that each has a gradient of its own."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (particles, 1, *x.shape)), theta)


def finite(tree: Any) -> Bool[Array, ""]:
    """Whether every element of all arrays is."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def of_each(holds: Callable[[jax.Array], jax.Array], tree: Any) -> Bool[Array, " N"]:
    """For which particles it holds of all elements of all arrays [N, ...]."""
    leaves = jax.tree.leaves(tree)
    return jnp.stack([holds(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]).all(axis=0)


def finite_mean(grads: Any, diverged: Int[Array, " N"]) -> tuple[Any, Int[Array, ""]]:
    """Mean over the particles of gradients [N, 1, ...], and the number of those that have none and count as 0.

    Chaotic trajectories overflow in reverse: one of them must not cost all the others a meta-step. Where none is left
    the mean is 0 and no gradient; only whoever knows of all devices' particles can tell, by `Estimate.lost`.
    """
    finite = of_each(jnp.isfinite, grads)
    kept = _select(finite, grads, jax.tree.map(jnp.zeros_like, grads))
    lost = ~finite | untold(diverged, grads)
    return jax.tree.map(lambda g: g[:, 0].mean(0), kept), jnp.sum(lost, dtype=jnp.int32)


def untold(diverged: Int[Array, " N"], told: Any) -> Bool[Array, " N"]:
    """Which particles diverged before theta made a difference: their losses are the limit, their gradient is 0.

    Where all are like this the mean is 0, finite and no gradient, see `Estimate.lost`.

    Args:
      diverged: how often a particle did.
      told: arrays [N, ...] of what they say of theta, differences between copies or gradients.
    """
    return (diverged > 0) & of_each(lambda x: x == 0, told)


def estimate(theta: Any, grad: Float[Array, " P"], seen: Window) -> Estimate:
    """What pairs of perturbed copies say after a window, given their gradient."""
    lost = untold(seen.diverged, (seen.before, seen.after)).sum(dtype=jnp.int32)
    return Estimate(ravel_pytree(theta)[1](grad), seen.loss, seen.diverged.sum(), seen.resets, seen.updates, lost)


def reset(inner: Inner, keys: jax.Array, copies: int, *, first: bool = False) -> Any:
    """Fresh particles by [N] keys; the `first` of a meta-training may be staggered, see `Inner.first`."""
    draw = inner.first if first and inner.first else inner.reset
    return repeat(inner, jax.vmap(draw)(keys), copies)


def repeat(inner: Inner, particles: Any, copies: int) -> Any:
    """Particles [N, ...] with their copy axis."""
    on = lambda x: jnp.repeat(x[:, None], copies, axis=1)  # noqa: E731
    return _map_axes(on, lambda x: x, inner.theta_axes, particles)


def pick(inner: Inner, particles: Any, copy: int) -> Any:
    """One copy of the particles, without the copy axis."""
    return _map_axes(lambda x: x[:, copy], lambda x: x, inner.theta_axes, particles)


def step_copies(inner: Inner) -> Callable[..., tuple[Any, jax.Array, jax.Array, jax.Array]]:
    """`inner.step` over N particles and C copies: losses and divergence are [N, C], ends [N]."""
    axes = inner.theta_axes
    return jax.vmap(jax.vmap(inner.step, in_axes=(0, axes, None), out_axes=(axes, 0, None, 0)))


def step_shared(inner: Inner) -> Callable[..., tuple[Any, jax.Array, jax.Array, jax.Array]]:
    """The same of one theta for all particles, without a copy axis; these lie behind their features."""
    step = jax.vmap(inner.step, in_axes=(None, inner.features, 0), out_axes=(inner.features, 0, 0, 0))

    def of_one_copy(theta: Any, particles: Any, keys: jax.Array):
        particles, loss, done, bad = step(theta, particles, keys)
        return particles, loss[:, None], done, bad[:, None]

    return of_one_copy


def window(
    inner: Inner,
    thetas: Any,
    particles: Any,
    fresh: Any,
    keys: jax.Array,
    *,
    steps: int,
    score: Score,
    renewed: Any = None,
    remat: bool = False,
    shared: bool = False,
) -> Window:
    """Unroll a window; a particle is reset when its horizon is reached or one of its copies diverges.

    Particles know nothing of each other: on a CPU those that do not fit the cache together are unrolled part after
    part, except where they are differentiated, since all that a backward pass needs is kept anyway.

    Args:
      inner: see `Inner`.
      thetas: [N, C, ...], or one theta that is shared.
      particles: where the window begins; without a copy axis where theta is shared.
      fresh: particles that take the place of those that end. Inits are dear beside an inner step and a window resets a
        particle once unless it diverges, so there is one a window.
      keys: [N], consumed.
      steps: K.
      score: what to sum of a step's meta-losses.
      renewed: thetas of the episodes that begin inside the window, or None where they go on with the same.
      remat: recompute a step's inside in the backward pass, so that only its particles are stored.
      shared: whether there is one theta, and one copy of each particle. The particles' axis is then behind those of
        features until the end, since products with one theta want them so.
    """
    part = len(keys) if shared or remat else at_once(particles, len(keys))
    if part < len(keys):

        def one(cut: tuple[Any, ...]) -> Window:
            thetas, particles, fresh, keys, renewed = cut
            return window(inner, thetas, particles, fresh, keys, steps=steps, score=score, renewed=renewed)

        cut = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), (thetas, particles, fresh, keys, renewed))
        seen = jax.lax.map(one, cut)
        totals = {"loss": seen.loss.mean(), "resets": seen.resets.sum(), "updates": seen.updates.sum()}
        joined = seen._replace(**dict.fromkeys(totals))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), joined)._replace(**totals)

    step, features = (step_shared(inner), inner.features) if shared else (step_copies(inner), 0)
    particles, fresh = _moved(0, features, particles), _moved(0, features, fresh)

    def begun(particles, current, ended):
        return _select(ended, (fresh, renewed), (particles, current), (features, 0))

    def body(carry, k):
        particles, current, ended, before, after, was_reset, diverged = carry
        # Reset by the step after the one that ended, whose reads of the state XLA fuses the selection into. A `cond`
        # where it ended would copy the whole state at every step.
        particles, current = begun(particles, current, ended)
        now = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
        particles, loss, done, bad = step(thetas if renewed is None else current, particles, now)
        gained = score(loss)
        before = before + jnp.where(was_reset, 0.0, gained)
        after = after + jnp.where(was_reset, gained, 0.0)
        ended = done | bad.any(axis=1)
        carry = particles, current, ended, before, after, was_reset | ended, diverged + bad.sum(axis=1, dtype=jnp.int32)
        return carry, (loss.mean(), ended)

    zero, never = jnp.zeros(len(keys)), jnp.zeros(len(keys), bool)
    renewing = None if renewed is None else thetas
    start = (particles, renewing, never, zero, zero, never, jnp.zeros(len(keys), jnp.int32))
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    last, (losses, ends) = jax.lax.scan(body, start, jnp.arange(steps))
    particles, current, ended, before, after, was_reset, diverged = last
    particles = _moved(features, 0, begun(particles, current, ended)[0])
    resets = ends.sum(dtype=jnp.int32)
    updates = jnp.full((), steps * len(keys) * (1 if shared else _copies(thetas)), jnp.int32)
    return Window(particles, before, after, was_reset, ends[-1], losses.mean(), diverged, resets, updates)


def at_once(particles: Any, count: int) -> int:
    """How many of so many particles to unroll side by side: a divisor of their count."""
    if jax.default_backend() != "cpu":
        return count
    each = sum(x.nbytes for x in jax.tree.leaves(particles)) / count
    parts = [n for n in range(AT_ONCE, count + 1) if count % n == 0]
    return max((n for n in parts if n * each <= CACHE), default=min(parts, default=count))


def episode(
    inner: Inner, thetas: Any, particles: Any, keys: jax.Array, *, score: Score, length: int | None = None
) -> Episode:
    """Unroll fresh particles to their horizons, whatever diverges: its later losses count as the limit.

    Args:
      inner: see `Inner`.
      thetas: [N, C, ...].
      particles: at t = 0.
      keys: [N], consumed.
      score: what to sum of a step's meta-losses.
      length: steps to unroll, at least the longest horizon, as reverse mode needs; None: until the last one is done.
    """
    step = step_copies(inner)

    def body(carry, k):
        particles, total, losses, steps, running, bad = carry
        now = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
        moved, loss, done, diverged = step(thetas, particles, now)
        # One that is done stands still: what it would do past its horizon could only poison gradients.
        particles = _select(running, moved, particles)
        total = total + jnp.where(running, score(loss), 0.0)
        losses = losses + jnp.where(running, loss.mean(axis=1), 0.0)
        bad = bad | (diverged & running[:, None])
        return (particles, total, losses, steps + running, running & ~done, bad), None

    zero, count = jnp.zeros(len(keys)), jnp.zeros(len(keys), jnp.int32)
    copies = _copies(thetas)
    start = (particles, zero, zero, count, count == 0, jnp.zeros((len(keys), copies), bool))
    if length is None:
        loop = lambda carry: body(carry[:-1], carry[-1])[0] + (carry[-1] + 1,)  # noqa: E731
        last = jax.lax.while_loop(lambda c: c[4].any(), loop, (*start, jnp.zeros((), jnp.int32)))[:-1]
    else:
        last, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, jnp.arange(length))
    _, total, losses, steps, _, bad = last
    updates = copies * steps.sum(dtype=jnp.int32)
    return Episode(total / steps, (losses / steps).mean(), bad.sum(axis=1, dtype=jnp.int32), updates)


def require(where: str, **settings: tuple[Any, bool, str]) -> None:
    """Raise ValueError for the first setting, given as (value, whether it is valid, what is), that is not valid."""
    for name, (got, ok, valid) in settings.items():
        if not ok:
            raise ValueError(f"{where}: {name}, got {got}; valid: {valid}.")


def positive(where: str, name: str, std: Any) -> None:
    """Raise ValueError unless a std is positive, or of a tree of them some are and the others 0: not perturbed."""
    each = jax.tree.leaves(std)
    require(where, **{name: (std, min(each) >= 0 < max(each), "> 0, or in a tree of them also 0 for some")})


def fits(where: str, inner: Inner, truncation: int) -> None:
    """Raise ValueError unless a window has room for at most one end of an episode that did not diverge."""
    valid = f"1 to {inner.shortest}, the shortest horizon of an inner run"
    require(where, truncation=(truncation, 1 <= truncation <= inner.shortest, valid))


def _copies(thetas: Any) -> int:
    return jax.tree.leaves(thetas)[0].shape[1]


def _map_axes(on: Any, off: Any, axes: Any, tree: Any) -> Any:
    """Apply `on` to the leaves whose prefix in `axes` is 0 and `off` to the others."""
    return jax.tree.map(
        lambda axis, part: jax.tree.map(off if axis is None else on, part), axes, tree, is_leaf=lambda x: x is None
    )


def _moved(source: Any, to: Any, tree: Any) -> Any:
    """With the particles' axis elsewhere; one of both is 0, the other a prefix of the tree."""
    if source == 0:
        return jax.tree.map(lambda n, part: jax.tree.map(lambda x: jnp.moveaxis(x, 0, n), part), to, tree)
    return jax.tree.map(lambda n, part: jax.tree.map(lambda x: jnp.moveaxis(x, n, 0), part), source, tree)


def _select(mask: Bool[Array, " N"], new: Any, old: Any, at: Any = 0) -> Any:
    """New particles where the mask is set; their axis is `at`, a prefix of the trees."""

    def chosen(axis: int, new: Any, old: Any) -> Any:
        where = lambda n, o: jnp.where(jnp.expand_dims(mask, [i for i in range(n.ndim) if i != axis]), n, o)  # noqa: E731
        return jax.tree.map(where, new, old)

    return jax.tree.map(chosen, at, new, old)
