"""The tasks of a run's groups: what they may be made of, and where their data comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
