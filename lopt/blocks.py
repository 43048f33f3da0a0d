"""Elementwise work on large arrays block by block, in place, so that what lies between is as small as a block.

XLA gives every intermediate array of an update memory of its own. Thirty of them for a large tensor are slow because
they leave the caches and because their pages are new to the process at every call; for a block they are neither.

A block is contiguous: one index of each axis before the one that is cut, a part of that, all of those after it. Read
through a view whose leading axis counts the blocks it costs nothing, while XLA does not vectorise a loop that reads
a dynamic slice of any other axis of a large array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lopt import precision

BLOCK = 1 << 16  # elements; measured: half as many are as good, twice as many up to a half slower


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a tensor, and what is shaped like it or reduced along some axes, is cut into equal blocks.

    Arrays that have one axis more than the tensor, in front, are seen as tuples if they are otherwise like it.
    """

    shape: tuple[int, ...]  # of the tensor
    axis: int  # that is cut; of those before it, a block has one index
    size: int  # of the block along it, a divisor of its length

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of a block, of the tensor's rank."""
        return (1,) * self.axis + (self.size, *self.shape[self.axis + 1 :])

    @property
    def count(self) -> int:
        return math.prod(self.shape) // math.prod(self.block)

    def view(self, x: jax.Array) -> jax.Array:
        """[blocks, …] of an array like the tensor, or of several along a leading axis one after the other."""
        return x.reshape(-1, *self.block[self.axis :])

    def read(self, view: jax.Array, i: Any, like: Any) -> Any:
        """Block i of the view of an array with as many axes as `like`."""
        shape = (1, *view.shape[1:])

        def part(k: int) -> jax.Array:
            return _slice(view, [k * self.count + i], shape).reshape(self.block)

        return part(0) if like.ndim == len(self.shape) else tuple(part(k) for k in range(like.shape[0]))

    def write(self, view: jax.Array, part: Any, i: Any) -> jax.Array:
        """The view with block i replaced by what `read` might have returned."""
        parts = part if isinstance(part, tuple | list) else (part,)
        count = view.shape[0] // len(parts)
        for k, x in enumerate(parts):
            view = _put(view, x.reshape(1, *view.shape[1:]), [k * count + i])
        return view

    def settled(self, parts: Any) -> Any:
        """See `Stack`."""
        return parts

    def windows(self, size: int) -> int:
        """In how many parts an array of low precision with so many bytes is written, see `LOW`."""
        least = min(math.ceil(size / WINDOW), self.count)
        return next((n for n in range(least, 2 * least) if self.count % n == 0), least) if least > 1 else 1

    def take(self, x: Any, i: Any) -> Any:
        """What belongs to block i of any array: a scalar whole, a part along the axes that are not reduced."""
        lead = jnp.ndim(x) - len(self.shape)
        if lead < 0:
            return x
        if jnp.shape(x)[lead:] == self.shape:
            return self.read(self.view(x), i, x)
        size = [b if n > 1 else 1 for b, n in zip(self.block, x.shape[lead:], strict=True)]
        return _slice(x, self._start(x.shape, i), (*x.shape[:lead], *size))

    def add(self, total: jax.Array, part: jax.Array, i: Any) -> jax.Array:
        """Put block i's result into the whole one: at its place, or into the average where axes are reduced."""
        if total.ndim < len(self.shape):
            return total + part / self.count
        reduced = [j for j, n in enumerate(total.shape[total.ndim - len(self.shape) :]) if n == 1]
        weight = math.prod(self.block[j] for j in reduced) / math.prod(self.shape[j] for j in reduced)
        start = self._start(total.shape, i)
        return _put(total, _slice(total, start, part.shape) + part * weight, start)

    def _start(self, shape: Sequence[int], i: Any) -> list[Any]:
        """Of block i in an array of this shape."""
        lead, rank = len(shape) - len(self.shape), self.axis + 1
        counts = [n // b for n, b in zip(self.shape[:rank], self.block[:rank], strict=True)]
        at = [i // math.prod(counts[j + 1 :]) % n * b for j, (n, b) in enumerate(zip(counts, self.block, strict=False))]
        return [0] * lead + [s if n > 1 else 0 for s, n in zip(at, shape[lead:], strict=False)]


@dataclasses.dataclass(frozen=True)
class Stack:
    """How equal tensors in a stack are cut into as many at once; every array has the leading axis.

    Arrays that have one axis more than that and the tensor's, between them, are seen as tuples: XLA does not vectorise
    a loop that reads a part of a dynamic slice.
    """

    shape: tuple[int, ...]  # of a tensor
    length: int
    size: int  # a divisor of the length

    @property
    def count(self) -> int:
        return self.length // self.size

    def view(self, x: jax.Array) -> jax.Array:
        # No axis over batches: XLA gives one of length 1 another place in memory and copies the stack to get there.
        return x

    def read(self, view: jax.Array, i: Any, like: Any) -> Any:
        # Of n x 1 a factored average looks like a momentum, and is not read element by element.
        whole = like.ndim != len(self.shape) + 2 or like.shape[2:] != self.shape or 1 in self.shape
        if whole:
            return _slice(view, [i * self.size], (self.size, *view.shape[1:]))
        shape = (self.size, 1, *self.shape)
        parts = [_slice(view, [i * self.size, k], shape) for k in range(like.shape[1])]
        return tuple(part.reshape(self.size, *self.shape) for part in parts)

    def write(self, view: jax.Array, part: Any, i: Any) -> jax.Array:
        if not isinstance(part, tuple):
            return _put(view, part, [i * self.size])
        for k, x in enumerate(part):
            view = _put(view, x[:, None], [i * self.size, k])
        return view

    def settled(self, parts: Any) -> Any:
        """Parts that were read, those smaller than tensors in memory: XLA does not vectorise a loop in which they are
        read by a slice."""
        flat, treedef = jax.tree.flatten(parts)
        small = {k: x for k, x in enumerate(flat) if x.shape[1:] != self.shape}
        small = _once(lambda _: small, jax.tree.map(jnp.zeros_like, small)) if small else small
        return treedef.unflatten([small.get(k, x) for k, x in enumerate(flat)])

    def windows(self, size: int) -> int:
        return 1  # a stack is small

    def take(self, x: jax.Array, i: Any) -> Any:
        return self.read(x, i, x)

    def add(self, total: jax.Array, part: jax.Array, i: Any) -> jax.Array:
        return _put(total, part, [i * self.size])


def _indices(start: Sequence[Any], rank: int) -> list[jax.Array]:
    return [jnp.asarray(s, jnp.int32) for s in (*start, *[0] * (rank - len(start)))]


def _slice(x: jax.Array, start: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_slice(x, _indices(start, x.ndim), shape, allow_negative_indices=False)


def _put(x: jax.Array, part: jax.Array, start: Sequence[Any]) -> jax.Array:
    at = _indices(start, x.ndim)
    return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), at, allow_negative_indices=False)


@functools.cache
def cut(shape: tuple[int, ...]) -> Cut | None:
    """Two or more blocks of about BLOCK elements; None: whole, if it is small or has no length with such a divisor."""
    wanted = min(BLOCK, math.prod(shape) // 2)
    choices = [
        (abs(math.log(size * math.prod(shape[axis + 1 :]) / wanted)), axis, size)
        for axis, n in enumerate(shape)
        for size in range(1, n + 1 if wanted >= BLOCK // 2 else 0)
        if n % size == 0
    ]
    far, axis, size = min(choices, default=(math.inf, 0, 0))
    found = Cut(shape, axis, size)
    return found if far < math.log(32) and found.count > 1 else None


def over(f: Callable[..., Any], buffers: Any, xs: Any, cut: Cut | Stack | None, measure: Any = None) -> tuple[Any, Any]:
    """Apply f to corresponding blocks; what it writes replaces the buffers' blocks.

    Args:
      f: `(buffers, xs) -> (buffers, results)`; the new buffers may be of higher precision and are rounded when written.
        Results are put together or averaged, see `Cut.add`.
      buffers: pytree of arrays like the tensor, or with a leading axis more.
      xs: pytree of arrays of which f sees the corresponding part.
      cut: None for one call on everything.
      measure: `new buffers, before rounding -> results` in place of those of f; they are in memory by then, where XLA
        would compute the results of f and what they are made of once more.

    Returns:
      The new buffers and the results.
    """
    if cut is not None and cut.count > 1:
        return _loop(f, buffers, xs, cut, measure)
    if cut is None:
        new, results = f(buffers, xs)
    else:
        # What a loop wrote is in memory, where XLA would compute the network once more for every tensor that is taken
        # out of a stack.
        def at_once(carry: Any) -> Any:
            new, parts = f(_rounded(carry[0], buffers), xs)
            return jax.tree.map(precision.wide, new), () if measure else parts

        zeros = () if measure else _zeros(lambda *xs: f(*xs)[1], buffers, xs)
        new, results = _once(at_once, (jax.tree.map(precision.wide, buffers), zeros))
    return _rounded(new, buffers), measure(new) if measure else results


def _rounded(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, old: x.astype(old.dtype), new, old)


def _zeros(f: Callable[..., Any], *args: Any) -> Any:
    """Like what f returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))


def _loop(f: Callable[..., Any], buffers: Any, xs: Any, cut: Cut | Stack, measure: Any) -> tuple[Any, Any]:
    flat, treedef = jax.tree.flatten(buffers)
    low = [x.dtype in LOW for x in flat]
    windows = cut.windows(sum(x.size * x.dtype.itemsize for x, is_low in zip(flat, low, strict=True) if is_low))
    size = math.ceil(cut.count / windows)

    def add(results: Any, parts: Any, i: Any) -> Any:
        return jax.tree.map(lambda total, part: cut.add(total, part, i), results, parts)

    def sweep(views: list[jax.Array], results: Any, first: Any, last: Any) -> tuple[list[jax.Array], Any]:
        """Of some blocks: new views, of low precision only these blocks, in bits."""

        def read(into: list[jax.Array], i: Any) -> Any:
            now = [view if is_low else new for view, new, is_low in zip(views, into, low, strict=True)]
            return treedef.unflatten([cut.read(_varying(x, i), i, like) for x, like in zip(now, flat, strict=True)])

        def write(into: list[jax.Array], parts: Any, i: Any) -> list[jax.Array]:
            each = zip(into, treedef.flatten_up_to(parts), flat, low, strict=True)
            return [
                cut.write(new, _bits(part, x.dtype), i - first) if is_low else cut.write(new, part, i)
                for new, part, x, is_low in each
            ]

        def block(into: list[jax.Array], i: Any) -> Any:
            new, parts = f(*cut.settled((read(into, i), jax.tree.map(lambda x: cut.take(_varying(x, i), i), xs))))
            return jax.tree.map(precision.wide, new), parts

        # A block is written one iteration late. Were it read and written in the same one, XLA would see no order
        # between the two and copy the whole buffer, every time.
        def body(i: jax.Array, carry: Any) -> Any:
            into, late, results = carry
            before = jnp.maximum(i - 1, first)
            into = write(into, late, before)
            if measure:
                results = jax.lax.cond(i == first, lambda: results, lambda: add(results, measure(late), before))
            late, parts = block(into, i)
            return into, late, results if measure else add(results, parts, i)

        into = [_window(x, size, cut.count) if is_low else x for x, is_low in zip(views, low, strict=True)]
        late = jax.tree.map(precision.wide, read(into, first))
        into, late, results = jax.lax.fori_loop(first, last, body, (into, late, results))
        if measure:
            results = add(results, measure(late), last - 1)
        if windows == 1:
            return write(into, late, last - 1), results
        # In a loop, or the kernel that selects would write this block too, and not in place.
        return jax.lax.fori_loop(last - 1, last, lambda i, into: write(into, late, i), into), results

    def window(w: Any, carry: Any) -> Any:
        views, results = carry
        new, results = sweep(views, results, w * size, jnp.minimum((w + 1) * size, cut.count))
        each = zip(views, new, low, strict=True)
        return [_put_window(x, bits, w, cut.count) if is_low else bits for x, bits, is_low in each], results

    def all_results(buffers: Any, xs: Any) -> Any:
        # Of the buffers themselves, as if they were new: f takes long to trace.
        return measure(jax.tree.map(precision.wide, buffers)) if measure else f(buffers, xs)[1]

    results = _zeros(all_results, buffers, xs)
    views = [cut.view(x) for x in flat]
    if windows > 1:
        views, results = jax.lax.fori_loop(0, windows, window, (views, results))
    else:
        views, results = sweep(views, results, 0, cut.count)
        views = [_floats(view, x.dtype) for view, x in zip(views, flat, strict=True)]
    return treedef.unflatten([view.reshape(x.shape) for view, x in zip(views, flat, strict=True)]), results


# What is stored in low precision. XLA's CPU compiler has no slices of it, neither for reading nor for writing: it
# converts what is sliced, whole, and in a loop every time or, where it does not change, once and for all. Therefore:
# - what is read looks as if it changed in the loop; the conversion is then fused with the slice, and costs nothing;
# - what is written is kept as integers, of as many blocks as WINDOW allows, and selected into the whole array by a
#   kernel that works in place.
LOW = (jnp.bfloat16, jnp.float16)
WINDOW = 32 << 20  # bytes


def _varying(x: Any, i: Any) -> Any:
    """x, of low precision as if it depended on i."""
    return jax.lax.optimization_barrier((x, i))[0] if jnp.result_type(x) in LOW else x


def _bits(parts: Any, dtype: Any) -> Any:
    """An array, or several, rounded and as integers."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16), parts)


def _floats(bits: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _window(view: jax.Array, size: int, count: int) -> jax.Array:
    """Room for the bits of `size` of a view's blocks; it may have several times `count`, see `Cut.view`."""
    return jnp.zeros((view.shape[0] // count * size, *view.shape[1:]), jnp.uint16)


def _put_window(view: jax.Array, bits: jax.Array, w: Any, count: int) -> jax.Array:
    """A view whose w-th blocks in a row are those of a window."""
    several, block = view.shape[0] // count, view.shape[1:]
    size = bits.shape[0] // several
    windows = math.ceil(count / size)
    new = _floats(bits, view.dtype).reshape(several, 1, size, *block)
    new = jnp.broadcast_to(new, (several, windows, size, *block)).reshape(several, windows * size, *block)
    ours = jnp.arange(view.shape[0]) % count // size == w
    # The view keeps its shape, or XLA does not see that the kernel may work in place.
    return jnp.where(ours.reshape(-1, *[1] * len(block)), new[:, :count].reshape(view.shape), view)


def means(f: Callable[[Any], Any], xs: Any, cut: Cut | None) -> Any:
    """Results of `over` without buffers: f maps xs to means."""
    return over(lambda _, xs: ((), f(xs)), (), xs, cut)[1]


SLABS = 4  # added elementwise by a kernel
SUMS = 8  # in one kernel; measured: of twice as many features or slabs XLA does not unroll the sum, nor vectorise it


def mean_squares(xs: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """[F, …] of F arrays of one shape, over `axes`, which are kept with length 1 and are the last ones.

    A sum of floats is a chain of scalar additions, since XLA keeps their order, and the features that are summed are
    then computed one element at a time too. Sums of a few slabs, element by element, are vectorised, and what is left
    to be summed is cheap to read.
    """
    shape, first = xs[0].shape, min(axes)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    lead, rows, last = shape[:first], math.prod(shape[first:-1]), shape[-1]
    if rows == 1:
        rows, last = (SLABS**2, last // SLABS**2) if last % SLABS**2 == 0 else (last, 1)
    sums, at_once = [(x * x).reshape(*lead, rows, last) for x in xs], SUMS
    for _ in range(2):
        if rows % SLABS == 0:
            rows //= SLABS
            slabs = [x.reshape(*lead, SLABS, rows, last) for x in sums]
            parts = [slabs[i : i + at_once] for i in range(0, len(slabs), at_once)]
            sums, at_once = [x for part in parts for x in _sums(part, (first,))], len(xs)
    sums = jnp.stack(_sums(sums, (first, first + 1)))
    return (sums * (math.prod(kept) / math.prod(shape))).reshape(len(xs), *kept)


def _sums(xs: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Of several arrays, in one kernel."""
    zeros = [jnp.zeros((), x.dtype) for x in xs]
    return jax.lax.reduce(xs, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], axes)


def stack(xs: Sequence[jax.Array]) -> jax.Array:
    """`jnp.stack`; what is of one low precision is not converted on the way, as XLA would (see `LOW`)."""

    def stacked(whole: bool, *xs: jax.Array) -> jax.Array:
        dtype = jnp.result_type(*xs)
        if whole or dtype not in LOW:
            return jnp.stack(xs)
        return _floats(jnp.stack([_bits(x, dtype) for x in xs]), dtype)

    return derivable(stacked)(*xs)


def unstack(x: jax.Array) -> list[jax.Array]:
    """The entries along the leading axis."""
    if x.shape[0] == 1:
        return [x[0]]

    def apart(whole: bool, x: jax.Array) -> list[jax.Array]:
        if whole:
            return list(x)
        # XLA compiles a kernel for every slice at an index it knows, and one for all that it does not. The roots keep
        # it from adding the indices up: i² is (i - 1)² + … computed as it goes.
        bits = _bits(x, x.dtype) if x.dtype in LOW else x
        root, out = _hidden_zero().astype(jnp.float32), []
        for _ in range(x.shape[0]):
            i = jnp.round(root * root).astype(jnp.int32)
            out.append(_floats(_slice(bits, [i], (1, *x.shape[1:]))[0], x.dtype))
            root = jnp.sqrt(root * root + 1)
        return out

    return derivable(apart)(x)


def _hidden_zero() -> jax.Array:
    """() int32 0 in a way that XLA does not see: how often `_once` turns, less one."""
    return _turned(lambda _: (), ())[0] - 1


def _once(f: Callable[[Any], Any], x: Any) -> Any:
    """f(x), of the same shapes and types, by a loop of which XLA does not see that it turns once."""
    return _turned(f, x)[2]


def _turned(f: Callable[[Any], Any], x: Any) -> Any:
    """Two variables on which the end of the loop depends, and f(x)."""
    start = jnp.int32(0), jnp.int32(1), x
    return jax.lax.while_loop(lambda c: c[0] + c[1] < 2, lambda c: (c[0] + 1, c[1] + 2, f(c[2])), start)


def derivable(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(whole: bool, *args)` as a function of args: in blocks, but differentiated as it is on whole tensors.

    The derivative of a loop in place would keep every buffer of every iteration.
    """
    blocked = jax.custom_jvp(functools.partial(f, False))
    blocked.defjvp(lambda primals, tangents: jax.jvp(functools.partial(f, True), primals, tangents))
    return blocked
