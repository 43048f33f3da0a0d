"""The tasks of a run's groups: what they may be made of, and where their data comes from."""

from __future__ import annotations

import dataclasses

import tasks
from meta_train import config as cfg
from tasks import Task, held_out


def make_tasks(run: cfg.Run) -> list[Task]:
    """The tasks of the groups, in their order.

    Raises ValueError for an unknown family or setting, and for a task that touches what is held out unless the run
    allows it.
    """
    made = [tasks.make(group.family, **group.settings) for group in run.groups]
    if not run.allow_held_out:
        held_out.refuse("lopt-train", made)
    return made


def pinned(run: cfg.Run) -> cfg.Run:
    """The run with the data sets that its sources serve here and now, by version and sha256: what is to be recorded."""
    groups = tuple(dataclasses.replace(g, settings=tasks.pin(g.family, g.settings)) for g in run.groups)
    return dataclasses.replace(run, groups=groups)
