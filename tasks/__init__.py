"""Inner problems. `tasks.make(family, **settings)` builds one; `tasks.REGISTRY` lists the families.

Imports nothing else of ours. A family is one file with one factory of the file's name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from tasks import space
from tasks.base import SPLITS, Source, Split, Task
from tasks.data import PREFIX, resolve
from tasks.faults import is_ours, said
from tasks.held_out import DEV, HELD_OUT, Reserved

REGISTRY: dict[str, str] = {
    "autoencoder": "tasks.autoencoder",
    "cnn": "tasks.cnn",
    "coordinate_mlp": "tasks.coordinate_mlp",
    "diffusion": "tasks.diffusion",
    "es": "tasks.es",
    "graph_network": "tasks.graph_network",
    "image_mlp": "tasks.image_mlp",
    "lasso": "tasks.lasso",
    "logistic_l1": "tasks.logistic_l1",
    "logistic_regression": "tasks.logistic_regression",
    "matrix_completion": "tasks.matrix_completion",
    "matrix_factorisation": "tasks.matrix_factorisation",
    "mlp_mixer": "tasks.mlp_mixer",
    "pinn": "tasks.pinn",
    "policy_gradient": "tasks.policy_gradient",
    "quadratic": "tasks.quadratic",
    "resnet": "tasks.resnet",
    "rnn_lm": "tasks.rnn_lm",
    "structured_regression": "tasks.structured_regression",
    "synthetic": "tasks.synthetic",
    "tabular_mlp": "tasks.tabular_mlp",
    "tabular_regression": "tasks.tabular_regression",
    "transformer_lm": "tasks.transformer_lm",
    "vae": "tasks.vae",
    "vit": "tasks.vit",
}

# Imported on demand: they need JAX, which looking for a name should not.
_LATER = {
    "check": "tasks.checks",
    "from_functions": "tasks.adapters",
    "from_haiku": "tasks.adapters",
    "from_linen": "tasks.adapters",
    "from_nnx": "tasks.adapters",
}

__all__ = [
    "DEV",
    "HELD_OUT",
    "REGISTRY",
    "SPLITS",
    "Reserved",
    "Source",
    "Split",
    "Task",
    "make",
    "mup_base",
    "pin",
    "sample_family",
    "sample_settings",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def make(family: str, **settings) -> Task:
    """Build a task.

    Args:
      family: of REGISTRY, or a user's own as "package.module:function"; the current directory is then appended to the
        import path, so that nothing installed is shadowed. Own tasks are checked by `tasks.check`.
      settings: arguments of the family's factory. For families that take `data` there is also `source`: "embedded",
        "tfds" or "auto", see `tasks.data.load`; and `window`: how many training rows of a set of TFDS are on the device
        at a time, see `tasks.data.stream`. For all there is `augment`: wrappers to apply, the first innermost, as
        `[("reparametrise", {"decades": 2}), …]`, see `tasks.augment`.

    Raises ValueError naming the nearest valid family or setting, or what is wrong with an own task.
    """
    factory = _factory(family)
    settings = pin(family, settings)
    wrappers = settings.pop("augment", ())
    _complete(family, factory, settings)
    task = _called(family, factory, settings) if ":" in family else factory(**settings)
    if "?rows=" in str(settings.get("data", "")):
        task = task._replace(window=lambda i: factory(**settings | {"data": _window(settings["data"], i)}).data)
    if wrappers:
        from tasks.augment import wrap

        task = wrap(task, wrappers)
    return task._replace(family=task.family or family)


def mup_base(family: str, settings: Mapping[str, Any]) -> Task | None:
    """The base network's task of one under the maximal-update parametrisation; None without `mup_base` in settings."""
    base = settings.get("mup_base")
    if base is None:
        return None
    rest = {name: value for name, value in settings.items() if name != "mup_base"}
    parameters = inspect.signature(_factory(family)).parameters
    if "hidden" in parameters:
        return make(family, **rest | {"hidden": base})
    if "channel_hidden" in parameters:
        wide = {name: rest.get(name, parameters[name].default) for name in ("channel_hidden", "width")}
        rest["channel_hidden"] = wide["channel_hidden"] * base // wide["width"]
    return make(family, **rest | {"width": base})


def _called(family: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> Task:
    """The task of a user's factory, checked."""
    from tasks.checks import check

    try:
        task = factory(**settings)
    except Exception as error:  # whatever a user's factory raises
        if isinstance(error, ValueError) and is_ours(error):
            raise
        raise ValueError(f"tasks.make: {family} raised {said(error)}.") from error
    if not isinstance(task, Task):
        raise ValueError(f"tasks.make: {family} returned a {type(task).__name__}; valid: a tasks.Task.")
    check(task)
    return task


def _complete(family: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument without a default is not among the settings."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(factory).parameters.values()
    missing = [p.name for p in parameters if p.kind in named and p.default is p.empty and p.name not in settings]
    if missing:
        raise ValueError(
            f"tasks.make: {family} needs {', '.join(missing)}, got {', '.join(settings) or 'no settings'}; valid: a "
            f"value for each, e.g. tasks.make({family!r}, {missing[0]}=...) or --groups.0.settings "
            f"'{{\"{missing[0]}\": ...}}'."
        )


def _window(names: Any, index: int) -> Any:
    """The names of window number `index`; sets that are not fed in windows stay."""
    if isinstance(names, str):
        return f"{names}&window={index}" if "?rows=" in names else names
    return [_window(name, index) for name in names]


def pin(family: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that build the same task wherever they are read: `source` has gone into the names of `data`.

    "auto" is replaced by what it serves here and now; data sets of TFDS get their version and sha256. The settings of a
    family that another one wraps (`es`) are pinned too; what a user's factory calls by itself is not seen.
    """
    parameters = inspect.signature(_factory(family)).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    valid = [
        *parameters,
        "augment",
        *(["source", "window"] if "data" in parameters and "source" not in parameters else []),
    ]
    for name in settings:
        if name not in valid and not open_ended:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tasks.make: {family} has no setting {name!r}.{hint} valid: {', '.join(valid)}.")
    settings = dict(settings)
    if "source" not in parameters and "data" in parameters:
        source, names = settings.pop("source", None), settings.get("data", parameters["data"].default)
        rows, several = settings.pop("window", None), [names] if isinstance(names, str) else list(names)
        if rows is not None:
            if source != "tfds":
                raise ValueError(f"tasks.make: {family} window, got {rows} with source={source!r}; valid: 'tfds'.")
            several = [f"{PREFIX}{name.removeprefix(PREFIX)}?rows={rows}" for name in several]
        if source is not None or any(isinstance(name, str) and name.startswith(PREFIX) for name in several):
            served = [resolve(name, source or "embedded") for name in several]
            settings["data"] = served[0] if isinstance(names, str) else served
    # A family that is made of another names it so.
    if {"task", "settings"} <= set(parameters) and isinstance(settings.get("settings"), Mapping):
        settings["settings"] = pin(settings.get("task", parameters["task"].default), settings["settings"])
    return settings


def _factory(family: str) -> Callable[..., Any]:
    if ":" in family:
        return _own(family)
    if family not in REGISTRY:
        near = difflib.get_close_matches(family, REGISTRY, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"tasks.make: unknown family {family!r}.{hint} valid: {', '.join(sorted(REGISTRY))}, or module:function."
        )
    return getattr(importlib.import_module(REGISTRY[family]), family)


def _own(spec: str) -> Callable[..., Any]:
    """A user's factory. Raises ValueError for a module or a function that is not there or cannot be imported."""
    held, factory = imported(spec, "tasks.make")
    if not callable(factory):
        module, _, name = spec.partition(":")
        if factory is not None:
            raise ValueError(
                f"tasks.make: {spec} is a {type(factory).__name__}; valid: a function that returns a Task."
            )
        near = [n for n in vars(held) if callable(getattr(held, n)) and not n.startswith("_")]
        raise ValueError(f"tasks.make: {spec}: {module} has no function {name!r}; valid: {', '.join(near) or 'none'}.")
    return factory


def imported(spec: str, where: str) -> tuple[types.ModuleType, Any]:
    """The module of `module:name`, also one in the current directory, and what it has of that name, None without.

    Raises ValueError, beginning with `where`, if it cannot be imported.
    """
    module, _, name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        held = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"{where}: {spec}: {said(error)}; valid: package.module:function.") from error
    return held, getattr(held, name, None)


def sample_settings(family: str, seed: int) -> dict[str, Any]:
    """Settings of a family (depth, width, activation, init scale, batch size, loss, data set …) drawn by a seed.

    Drawn on the host, since they change shapes; from the family's `SPACE`, which names no data that is held out but may
    name data of DEV, on which nothing shipped is meta-trained: fix `data` for that, as in
    `sample_family("cnn", seed, data="digits", size=8)`.

    Raises ValueError for an unknown family, one without a `SPACE`, and a seed that is not a natural number.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"tasks.sample_settings: seed, got {seed!r}; valid: integers from 0.")
    held = getattr(sys.modules[_factory(family).__module__], "SPACE", None)
    if held is None:
        raise ValueError(f"tasks.sample_settings: family, got {family!r}, whose module has no SPACE; see tasks.space.")
    return space.draw(family, held, seed)


def sample_family(family: str, seed: int, **fixed) -> Task:
    """The task of a family with settings by `sample_settings`, some of them fixed. Raises ValueError as `make`."""
    return make(family, **(sample_settings(family, seed) | fixed))
