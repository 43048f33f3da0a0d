"""Inner problems. `tasks.make(family, **settings)` builds one; `tasks.REGISTRY` lists the families.

Imports nothing else of ours. A family is one file with one factory of the file's name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect

from tasks.base import SPLITS, Source, Split, Task

REGISTRY: dict[str, str] = {
    "cnn": "tasks.cnn",
    "image_mlp": "tasks.image_mlp",
    "tabular_mlp": "tasks.tabular_mlp",
}

__all__ = ["REGISTRY", "SPLITS", "Source", "Split", "Task", "make"]


def make(family: str, **settings) -> Task:
    """Build a task of a registered family.

    Raises ValueError naming the nearest valid family or setting.
    """
    if family not in REGISTRY:
        near = difflib.get_close_matches(family, REGISTRY, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"tasks.make: unknown family {family!r}.{hint} valid: {', '.join(sorted(REGISTRY))}.")
    factory = getattr(importlib.import_module(REGISTRY[family]), family)
    valid = list(inspect.signature(factory).parameters)
    for name in settings:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tasks.make: {family} has no setting {name!r}.{hint} valid: {', '.join(valid)}.")
    return factory(**settings)._replace(family=family)
