"""The tasks of a run's groups: what they may be made of, and where their data comes from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

import tasks
from meta_train import config as cfg
from tasks import Task, held_out


def make_tasks(run: cfg.Run, groups: Sequence[cfg.Group]) -> list[Task]:
    """The tasks of groups of the run, in their order.

    Raises ValueError for an unknown family or setting, and for a task that touches what is held out unless the run
    allows it.
    """
    made = [tasks.make(group.family, **group.settings) for group in groups]
    if not run.allow_held_out:
        held_out.refuse("lopt-train", made)
    return made


def pinned(run: cfg.Run) -> cfg.Run:
    """The run with the data sets that its sources serve here and now, by version and sha256: what is to be recorded."""

    def pin(groups: Sequence[cfg.Group]) -> tuple[cfg.Group, ...]:
        return tuple(dataclasses.replace(g, settings=tasks.pin(g.family, g.settings)) for g in groups)

    on = dataclasses.replace(run.validation, tasks=pin(run.validation.tasks))
    return dataclasses.replace(run, groups=pin(run.groups), validation=on)


def param_shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """Shapes of a task's params by "/"-joined key path."""
    params = jax.eval_shape(lambda key: task.init(key, task.sample(key)), jax.random.key(0))
    named = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in named}


def batch_shapes(task: Task) -> Any:
    """Shapes of a training batch of a task."""

    def batch(key: jax.Array, data: Any) -> Any:
        return task.batch(key, task.sample(key), data, "train")

    return jax.eval_shape(batch, jax.random.key(0), task.data)


def programs(run: cfg.Run) -> Iterator[str]:
    """Lines for people: the groups, each of them a program, its params, what shares it, and which groups could."""
    made = [tasks.make(group.family, **group.settings) for group in run.groups]
    for i, (group, task) in enumerate(zip(run.groups, made, strict=True)):
        shapes = param_shapes(task)
        size = sum(math.prod(shape) for shape in shapes.values())
        listed = ", ".join(f"{name or 'params'} {list(shape)}" for name, shape in shapes.items())
        data = " and ".join(source.id for source in task.provenance)
        shared = f"; {data} share it" if len(task.provenance) > 1 else f"; data {data}" if data else ""
        yield f"program {i}: group {group.family}: {size:,} params ({listed}){shared}"
    for alike in _apart_by_data_alone(run.groups):
        names = [name for i in alike for name in _data_of(run.groups[i])]
        together = run.groups[alike[0]].settings | {"data": names}
        try:
            tasks.make(run.groups[alike[0]].family, **together)
        except ValueError:  # other sizes, or a family of one data set
            continue
        numbers = " and ".join(map(str, alike))
        yield f"groups {numbers} differ in their data alone: one group with data {json.dumps(names)} is one program"


def _data_of(group: cfg.Group) -> list[str]:
    """Names of its data sets; none where it does not say them by name."""
    named = group.settings.get("data", ())
    named = [named] if isinstance(named, str) else named
    return list(named) if isinstance(named, (list, tuple)) and all(isinstance(x, str) for x in named) else []


def _apart_by_data_alone(groups: Sequence[cfg.Group]) -> list[list[int]]:
    """Numbers of the groups of one family whose settings are the same but for the data sets that they name."""
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if _data_of(group):
            rest = {name: value for name, value in group.settings.items() if name != "data"}
            found.setdefault(json.dumps([group.family, rest], sort_keys=True, default=str), []).append(i)
    return [numbers for numbers in found.values() if len(numbers) > 1]


def feed(
    made: Sequence[Task], data: tuple[Any, ...], every: int, put: Callable[[tuple[Any, ...]], tuple[Any, ...]]
) -> Callable[[int], tuple[Any, ...]]:
    """The groups' data at a meta-step: window `step // every` of the tasks that have any; the next one is made ready.

    Which window it is depends on the meta-step alone, so a resumed run goes on with the same one.

    Args:
      made: the tasks.
      data: their first windows, on the devices.
      every: meta-steps that a window is used for.
      put: puts host data on the devices.
    """
    if all(task.window is None for task in made):
        return lambda step: data

    def load(index: int) -> tuple[Any, ...]:
        return put(tuple(task.data if task.window is None else task.window(index) for task in made))

    pool = ThreadPoolExecutor(1, thread_name_prefix="window")
    ready: dict[int, Future] = {}

    def at(step: int) -> tuple[Any, ...]:
        index = step // every
        wanted = {one: ready.get(one) or pool.submit(load, one) for one in (index, index + 1)}
        ready.clear()
        ready.update(wanted)
        return wanted[index].result()

    return at
