"""Tensors as a rule sees them, one at a time, and equal ones updated together.

A rule says what happens to corresponding elements of gradient, parameter and state; here it is done block by block,
in place, with whatever must not be written to memory in between: conversion of low precision, the check that a
gradient is finite, learning rate, decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import blocks, precision

# What is stacked says what a state looks like: with other numbers saved states do not fit.
STACK = 1 << 21  # elements of a stack of equal tensors, which is a copy of them and their gradients
STACKED = 1 << 18  # elements of tensors that are too large to be stacked; they are worth loops of their own


class Leaf(NamedTuple):
    """What is known of a parameter tensor before it is traced."""

    path: str  # "/"-joined key path, e.g. "layer0/w"
    shape: tuple[int, ...]  # scalars are (1,)
    labels: frozenset[str]
    axes: tuple[tuple[str, ...], ...] = ()  # mesh axes that each axis is sharded over, if every device sees its part

    @property
    def group(self) -> str:
        """Its labels joined by "+", or "matrix" or "vector" by its rank."""
        return "+".join(sorted(self.labels)) or ("matrix" if len(self.shape) > 1 else "vector")


class Step(NamedTuple):
    """From a direction to an update: -rate · (factor · direction + decay · p)."""

    rate: Any  # () learning rate times schedule
    count: jax.Array  # () int32 of updates so far
    decay: Any = None  # of the parameter; None for none
    decay_moved: Any = None  # of the moved parameter, scaled by `factor` too; None for none

    def __call__(self, direction: jax.Array, p: jax.Array, factor: Any) -> jax.Array:
        rate = self.rate if factor is None else self.rate * factor
        step = -rate * direction
        if self.decay is not None:
            step = step - self.rate * self.decay * p
        return step if self.decay_moved is None else step - rate * self.decay_moved * (p + step)


class Given(NamedTuple):
    """What comes with a tensor, each in whatever precision it came; of a group all have a leading axis more."""

    g: Any  # gradient, or None
    p: Any
    state: Any  # the rule's
    factor: Any = None  # () of its direction; None for 1
    ok: Any = None  # () bool: a gradient that is not is taken for 0 and moves neither parameter nor state


class Scaled(NamedTuple):
    """A direction whose length is set by a mean square of it."""

    factor: Callable[[jax.Array], jax.Array]  # of the mean squares, axes kept with length 1
    axes: tuple[int, ...] | None = None  # of the means; None for all, as () then
    matrices: Callable[[jax.Array], jax.Array] | None = None  # of the whole direction, before


class Moved(NamedTuple):
    update: jax.Array  # like the tensor, in the parameter's precision
    mean_square: jax.Array  # () of the update, before rounding


class Tensor(NamedTuple):
    """A tensor of rank >= 1 while it is updated."""

    leaf: Leaf
    given: Given
    step: Step
    change: Callable[[jax.Array], jax.Array]  # elementwise, applied to the gradient in float32
    cut: blocks.Cut | None
    plain: bool  # for derivatives, which reductions of several arrays do not have

    @property
    def state(self) -> Any:
        return self.given.state

    def with_state(self, state: Any) -> Tensor:
        """With another state, such as the part of its own that one function looks at."""
        return self._replace(given=self.given._replace(state=state))

    def changed(self, change: Callable[[jax.Array], jax.Array]) -> Tensor:
        """With one more elementwise function applied to the gradient."""
        before = self.change
        return self._replace(change=lambda g: change(before(g)))

    def decayed(self, decay: Any) -> Tensor:
        """With a decay of the parameter more, () of lr times schedule."""
        before = self.step.decay
        return self._replace(step=self.step._replace(decay=decay if before is None else before + decay))

    def keep(self, new: Any, old: Any) -> Any:
        """A new state, or the old one where the gradient is not ok."""
        ok = self.given.ok
        return new if ok is None else jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what this device sees of it; `leaf.shape` is the whole tensor's."""
        return self.given.p.shape

    def pooled(self, mean: Any, axes: tuple[int, ...] | None = None) -> Any:
        """The mean over all devices of means over these axes of the tensor (None: all)."""
        return _pooled(self.leaf, mean, axes)

    def means(
        self, f: Callable[..., Any], extra: Any = (), axes: tuple[int, ...] | list[tuple[int, ...]] | None = None
    ) -> Any:
        """Means that the update needs beforehand.

        Args:
          f: `(g, p, state, extra) -> means`, of blocks in float32; `blocks.Cut.add` says how they are put together.
          extra: arrays that are cut along with the tensor.
          axes: over which f averages; None for all, a list if f returns one and they differ.
        """
        xs = (self.given.g, self.given.p, self.state, extra)
        found = blocks.means(lambda xs: f(*self._wide(*xs[:3]), xs[3]), xs, self.cut)
        if isinstance(axes, list):
            return [self.pooled(*one) for one in zip(found, axes, strict=True)]
        return self.pooled(found, axes)

    def mean_square(self) -> jax.Array:
        """() of the parameters."""
        return self.means(lambda g, p, *_: jnp.mean(p * p))

    def mean_squares(self, f: Callable[..., Sequence[jax.Array]], extra: Any, axes: tuple[int, ...]) -> jax.Array:
        """[F, …] of F features, over `axes`, which are kept with length 1.

        A factored feature is averaged over its own few elements: broadcasting does not change a mean. Features of one
        shape are averaged together, since every kernel has to be compiled.

        Args:
          f: `(g, p, state, extra) -> features`, of blocks.
          extra: as in `means`.
          axes: reduced ones, of the tensor.
        """

        def whole() -> list[jax.Array]:
            return list(f(*self._wide(self.given.g, self.given.p, self.state), extra))

        indices: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, x in enumerate(jax.eval_shape(whole)):
            indices[x.shape].append(i)
        kept = tuple(1 if i in axes else n for i, n in enumerate(self.shape))

        def block(*xs: Any) -> jax.Array:
            features = f(*xs)
            return blocks.mean_squares([features[i] for i in indices[self.shape]], axes)

        def found(shape: tuple[int, ...], of: list[int]) -> jax.Array:
            if shape == self.shape and not self.plain:
                return self.means(block, extra, axes)
            xs = whole()
            x = jnp.stack([xs[i] for i in of])
            mean = self.pooled(jnp.mean(x * x, axis=tuple(a + 1 for a in axes), keepdims=True), axes)
            return jnp.broadcast_to(mean, (len(of), *kept))

        parts = [found(*one) for one in indices.items()]
        # Put in order by one kernel: thirty slices of an array of thirty numbers would be thirty kernels.
        order = np.argsort([i for of in indices.values() for i in of])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)[order]

    def move(
        self, f: Callable[..., Any], buffers: Any, extra: Any = (), scaled: Scaled | None = None
    ) -> tuple[Moved, Any]:
        """The update, and the state that is as large as the tensor.

        Args:
          f: `(g, p, buffers, extra) -> (direction, buffers)`, of blocks in float32.
          buffers: the large part of the state; it is replaced in place, as the gradient is by the update.
          extra: as in `means`.
          scaled: what the whole direction is multiplied by, or None. Between the two passes a tensor in blocks keeps
            its direction where the update is going to be, in bfloat16 if gradient and parameter are.
        """

        def block(written: Any, xs: Any) -> Any:
            (u, old), (g, p, extra) = written, xs
            g, p, wide = self._wide(u if g is None else g, p, old)
            direction, new = f(g, p, wide, extra)
            new = precision.narrow(self.keep(new, wide), old, (g, p, self.step.count))
            return (direction if scaled else self.stepped(direction, p), new), ()

        def second(u: Any, xs: Any) -> Any:
            p, factor = xs
            return self.stepped(precision.wide(u) * factor, precision.wide(p)), ()

        g, p = self.given.g, self.given.p
        small = p.dtype == jnp.bfloat16 and self.cut is not None  # float32 would be temporary, and twice as large
        u, g = room(g, precision.wide(p) if scaled and not small else p)
        axes = scaled.axes if scaled and scaled.matrices is None else None
        (u, buffers), mean_square = blocks.over(
            block, (u, buffers), (g, p, extra), self.cut, lambda new: mean_square_of(new[0], axes)
        )
        if scaled:
            if scaled.matrices:
                u = self.gathered(scaled.matrices, precision.wide(u))
                mean_square = jnp.mean(u * u, axis=scaled.axes, keepdims=True)
            factor = scaled.factor(self.pooled(mean_square, scaled.axes))
            u, mean_square = blocks.over(second, u, (p, factor), self.cut, mean_square_of)
        return Moved(u.astype(p.dtype), self.pooled(mean_square).astype(jnp.float32)), buffers

    def gathered(self, f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """This device's part of f of the whole tensor, for what cannot be computed in parts."""
        whole, start = x, [jnp.zeros((), jnp.int32)] * x.ndim
        for i, names in enumerate(self.leaf.axes):
            if names:
                whole = jax.lax.all_gather(whole, names, axis=i, tiled=True)
                start[i] = jax.lax.axis_index(names) * x.shape[i]
        return jax.lax.dynamic_slice(f(whole), start, x.shape)

    def stepped(self, direction: jax.Array, p: jax.Array) -> jax.Array:
        """The update of a direction before rounding, both of a block or both whole."""
        step = self.step(direction, p, self.given.factor)
        return step if self.given.ok is None else jnp.where(self.given.ok, step, 0.0)

    def _wide(self, g: jax.Array, p: jax.Array, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """Gradient, parameter and state in at least float32."""
        p = precision.wide(p)
        g = g.astype(p.dtype)
        g = self.change(g if self.given.ok is None else jnp.where(self.given.ok, g, 0.0))
        return g, p, jax.tree.map(precision.wide, state)


def _pooled(leaf: Leaf, mean: Any, axes: tuple[int, ...] | None = None) -> Any:
    chosen = leaf.axes if axes is None else [leaf.axes[i] for i in axes if leaf.axes]
    names = tuple(name for axis in chosen for name in axis)
    return jax.lax.pmean(mean, names) if names else mean


def mean_square_of(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """() over all axes; over some of them, they are kept with length 1."""
    return jnp.mean(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis=axes, keepdims=axes is not None)


def room(g: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """An array for the update, and the gradient unless the update may replace it."""
    return (g, None) if g.dtype == p.dtype else (jnp.zeros_like(p), g)


class Turns:
    """Makes stacks wait for each other, since XLA would build all of them first and need memory for all."""

    def __init__(self) -> None:
        self.wait: jax.Array | None = None

    def took(self, x: jax.Array) -> None:
        """What the next one is to wait for."""
        one = x.reshape(-1)[0]
        self.wait = (one < 0) & (one > 0)  # never, which XLA does not see either

    def stack(self, xs: Sequence[Any]) -> jax.Array:
        first, *others = [jnp.asarray(x) for x in xs]
        if not others:
            return first[None]
        if self.wait is not None:
            first = jnp.where(self.wait, jnp.zeros_like(first), first)
        return blocks.stack([first, *others])


class Group(NamedTuple):
    """Tensors that are updated together: equal ones, stacked, or one alone.

    A kernel of a few microseconds and half a second of compilation are dear if there are hundreds.
    """

    leaf: Leaf  # of the first
    indices: tuple[int, ...]  # of each among all tensors
    given: tuple[Given, ...]  # without state
    state: Any  # the rule's of all, with a leading axis over them unless one is alone
    ok: jax.Array | None  # [size] bool, see `Given`
    step: Step
    change: Callable[[jax.Array], jax.Array]
    turns: Turns
    ready: Given | None = None  # `given` stacked, where all stacks together are small

    def stacked(self) -> Given:
        """With a leading axis."""
        stacked = self.ready or jax.tree.map(lambda *xs: self.turns.stack(xs), *self.given)
        state = self.state if self.size > 1 else jax.tree.map(lambda x: x[None], self.state)
        return stacked._replace(state=state, ok=self.ok)

    @property
    def size(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Tensor.shape`."""
        return self.given[0].p.shape

    def where(self, ok: jax.Array) -> Group:
        """With bools [size] of which gradients are ok besides being there."""
        return self._replace(ok=ok if self.ok is None else self.ok & ok)

    def each(self, f: Callable[[Tensor], Any]) -> Any:
        """f of every tensor, where f gives small arrays; these with a leading axis."""

        def run(whole: bool, given: Given) -> Any:
            def some(_: Any, given: Given) -> Any:
                return (), self._map(lambda given: f(self._tensor(given, whole)), given)

            return blocks.over(some, (), given, None if whole else self._batches())[1]

        results = blocks.derivable(run)(self.stacked())
        self.turns.took(jax.tree.leaves(results)[0])
        return results

    def update(self, rule: Rule, common: Any, own: Any) -> tuple[list[jax.Array], Any, jax.Array]:
        """Apply the rule to every tensor; `own` has a leading axis.

        Returns:
          The update of each, the state of all, and [size] mean squares of the updates.
        """

        def run(whole: bool, given: Given, step: Step, common: Any, own: Any) -> tuple[Moved, Any]:
            def one(xs: Any) -> Any:
                given, own = xs
                moved, state = rule(self._replace(step=step)._tensor(given, whole), common, own)
                return (moved.update, state), moved.mean_square

            def some(written: Any, xs: Any) -> Any:
                (u, state), (given, own) = written, xs
                return self._map(one, (given._replace(g=u if given.g is None else given.g, state=state), own))

            batches = None if whole else self._batches()
            if batches is None:
                (u, state), mean_square = self._map(one, (given, own))
                return Moved(u, mean_square), state
            u, g = room(given.g, given.p)
            axes = tuple(range(1, u.ndim))
            (u, state), mean_square = blocks.over(
                some,
                (u, given.state),
                (given._replace(g=g, state=None), own),
                batches,
                lambda new: jnp.mean(jnp.square(new[0].astype(jnp.float32)), axis=axes),
            )
            return Moved(u, _pooled(self.leaf, mean_square)), state

        moved, state = blocks.derivable(run)(self.stacked(), self.step, common, own)
        updates = blocks.unstack(moved.update)
        self.turns.took(updates[-1])
        if self.size == 1:
            state = jax.tree.map(lambda x: x[0], state)
        return updates, state, moved.mean_square

    def _tensor(self, given: Given, whole: bool) -> Tensor:
        return Tensor(self.leaf, given, self.step, self.change, None if whole else blocks.cut(self.shape), plain=whole)

    def _map(self, f: Callable[[Any], Any], xs: Any) -> Any:
        """f over the leading axis of all arrays."""
        if jax.tree.leaves(xs)[0].shape[0] > 1:
            return jax.vmap(f)(xs)
        # A batch of one is not worth its axis.
        return jax.tree.map(lambda x: x[None], f(jax.tree.map(lambda x: x[0], xs)))

    def _batches(self) -> blocks.Stack | None:
        """As many tensors at once as make a block, or somewhat fewer, where their number has such a divisor."""
        if self.size == 1:
            return None
        most = max(1, blocks.BLOCK // math.prod(self.shape))
        return blocks.Stack(self.shape, self.size, max(n for n in range(1, most + 1) if self.size % n == 0))


Rule = Callable[[Tensor, Any, Any], tuple[Moved, Any]]


def stacks(leaves: Sequence[Leaf], kinds: Sequence[Any]) -> list[tuple[int, ...]]:
    """Which tensors are updated together, and have one state: equal ones, if they are small.

    Args:
      leaves: what is known of each.
      kinds: in what else tensors of a stack agree.
    """
    equal: dict[Any, list[int]] = defaultdict(list)
    for i, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        alone = i if math.prod(leaf.shape) >= STACKED else None
        equal[alone, leaf._replace(path=""), kind].append(i)
    found = []
    for indices in equal.values():
        most = max(1, STACK // math.prod(leaves[indices[0]].shape))
        found += [tuple(indices[i : i + most]) for i in range(0, len(indices), most)]
    return found


def groups(
    leaves: Sequence[Leaf],
    given: Sequence[Given],
    stacks: Sequence[tuple[int, ...]],
    step: Callable[[Leaf], Step],
    change: Callable[[jax.Array], jax.Array],
) -> list[Group]:
    """All tensors, stacked.

    Args:
      leaves: what is known of each.
      given: what comes with each; a gradient that is missing is 0. The state of a stack comes with its first tensor.
      stacks: of `stacks`.
      step: of a leaf.
      change: see `Tensor`.
    """
    turns = Turns()
    small = sum(math.prod(leaves[i].shape) for indices in stacks if len(indices) > 1 for i in indices) <= STACK

    def group(indices: tuple[int, ...]) -> Group:
        leaf, state = leaves[indices[0]], given[indices[0]].state
        there = [given[i].g is not None for i in indices]
        some = tuple(_shaped(given[i])._replace(state=None) for i in indices)
        ok = None if all(there) else jnp.asarray(there)
        ready = jax.tree.map(lambda *xs: turns.stack(xs), *some) if small and len(some) > 1 else None
        return Group(leaf, indices, some, state, ok, step(leaf), change, turns, ready)

    return [group(indices) for indices in stacks]


def _shaped(given: Given) -> Given:
    """Scalars as vectors of one, and zeros for a gradient that is missing."""
    p = jnp.atleast_1d(given.p)
    return given._replace(g=jnp.zeros_like(p) if given.g is None else jnp.atleast_1d(given.g), p=p)
