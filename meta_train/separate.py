"""A meta-step of several programs: one a group, compiled side by side, and one that adds up their gradients.

One program of all groups takes XLA as long as all of them together, on one core, and every change of one group compiles
all of them anew. Gradients meet in the last program alone, which is also the only one with a collective: of programs
with collectives that wait for each other's threads, XLA on a CPU hangs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.estimators.base import Estimate

# (number of the group, data, step, theta, state of the estimator, turn) -> (Estimate with the devices as leading axis,
# state). `turn` is of the group before and unused: it keeps groups from running at once, each with temporary memory of
# its own.
Part = Any
Meet = Any  # (estimates, state without estimators) -> (state, metrics)


def lead(estimate: Estimate) -> Estimate:
    """A device's estimate with an axis for the devices."""
    return jax.tree.map(lambda x: jnp.asarray(x)[None], estimate)


def across(estimates: Estimate) -> Estimate:
    """`Estimate.across`, of estimates whose leading axis is that of the devices."""
    counts = (estimates.diverged, estimates.resets, estimates.steps, estimates.lost)
    means = jax.tree.map(lambda x: jnp.mean(x, 0), (estimates.grad, estimates.loss))
    return Estimate(*means, *(jnp.sum(x, 0) for x in counts))


class Memory(NamedTuple):
    """Bytes a device, as `jax.stages.Compiled.memory_analysis` names them."""

    argument_size_in_bytes: int
    temp_size_in_bytes: int


class Separate:
    """Like a jitted meta-step `(data, State) -> (State, metrics)`; State is donated."""

    def __init__(self, parts: Sequence[Part], meet: Meet, first: jax.Array):
        self._parts, self._meet = tuple(parts), meet
        self._first = first  # turn of the first group, one number a device
        self._compiled: Compiled | None = None

    def __call__(self, data: Sequence[Any], state: Any) -> tuple[Any, Any]:
        if self._compiled is None:
            self._compiled = self.lower(data, state).compile()
        return self._compiled(data, state)

    def trace(self, data: Sequence[Any], state: Any) -> list[jax.stages.Traced]:
        """All programs, of arrays or shapes. Errors of settings surface here."""
        traced: list[jax.stages.Traced] = []
        for i, (part, some, held) in enumerate(zip(self._parts, data, state.estimators, strict=True)):
            turn = traced[-1].out_info[0].loss if traced else self._first
            traced.append(part.trace(np.int32(i), some, state.step, state.theta, held, turn))
        found = [one.out_info[0] for one in traced]
        return [*traced, self._meet.trace(found, state._replace(estimators=()))]

    def lower(self, data: Sequence[Any], state: Any) -> Lowered:
        """Of arrays or shapes."""
        return Lowered([one.lower() for one in self.trace(data, state)], self._first)


class Lowered:
    """All programs of a meta-step, as `jax.stages.Lowered` is one."""

    def __init__(self, programs: Sequence[jax.stages.Lowered], first: jax.Array):
        self._first = first
        self._texts = [one.as_text() for one in programs]
        self._programs = dict(zip(self._texts, programs, strict=True))

    def as_text(self) -> str:
        """Of programs that are not the same: groups that differ in their arrays alone share one."""
        return "\n".join(self._programs)

    def compile(self) -> Compiled:
        """As many at once as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(lambda one: one.compile(), self._programs.values()))
        by_text = dict(zip(self._programs, compiled, strict=True))
        return Compiled([by_text[text] for text in self._texts], self._first)


class Compiled:
    """All programs of a meta-step, as `jax.stages.Compiled` is one."""

    def __init__(self, programs: Sequence[jax.stages.Compiled], first: jax.Array):
        *self._parts, self._meet = programs
        self._first = first

    def memory_analysis(self) -> Memory | None:
        """State and data of all, and temporary memory of the largest: they take turns."""
        each = [one.memory_analysis() for one in (*self._parts, self._meet)]
        known = [one for one in each if one is not None]
        if len(known) < len(each):
            return None
        held = sum(one.argument_size_in_bytes for one in known[:-1])
        return Memory(held, max(one.temp_size_in_bytes for one in known))

    def __call__(self, data: Sequence[Any], state: Any) -> tuple[Any, Any]:
        turn, found, after = self._first, [], []
        for i, (part, some, held) in enumerate(zip(self._parts, data, state.estimators, strict=True)):
            estimate, held = part(np.int32(i), some, state.step, state.theta, held, turn)
            turn = estimate.loss
            found.append(estimate)
            after.append(held)
        if jax.default_backend() == "cpu":
            # A device that is done would wait in the collective with one of the threads that those still at work share,
            # and a product there that wants all threads would never end.
            jax.block_until_ready(found)
        rest, metrics = self._meet(found, state._replace(estimators=()))
        return rest._replace(estimators=tuple(after)), metrics
