"""Who takes part: a name on the command line becomes something that `meta_test.runs` can run."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

import lopt
import tasks
from lopt import baselines
from lopt.baselines.base import Baseline
from lopt.pretrained import CONFIG, find
from meta_test.runs import Contender

WARMUP = 0.05  # of the horizon, of the cosine schedule
SCHEDULES = ("constant", "cosine")
PREFIX = "lopt:"


class Entrant(NamedTuple):
    """An optimizer and what is searched for it.

    Fields:
      name: of tables and files.
      contender: makes it from `num_steps`, `cosine` and the hyper-parameters of `space`, all traced.
      version: what its numbers depend on besides its name; part of a cell's key.
      space: name -> (low, high, log, default, choices) of numeric hyper-parameters; empty: it is not tuned.
      schedules: of SCHEDULES, that are tried.
      deterministic_only: it is undefined on minibatches.
    """

    name: str
    contender: Contender
    version: str
    space: Mapping[str, Any] = {}
    schedules: tuple[str, ...] = SCHEDULES
    deterministic_only: bool = False
    known: bool = True  # all of its code is ours
    artifact: str = ""  # that a learned one was read from

    def lacks(self, task: tasks.Task) -> str:
        """What the optimizer needs and the task does not have, in words; empty if nothing."""
        if self.deterministic_only and not task.deterministic:
            return "a loss without minibatches"
        if self.contender.needs - {"value", "num_steps", "key"} and task.grad_transform is not None:
            return "gradients that nothing transforms"  # those that it asks for would be other ones
        return ""

    @property
    def tuned(self) -> bool:
        return bool(self.space)


def unit_schedule(num_steps: Any, cosine: Any) -> Callable[[Any], Any]:
    """1, or where `cosine` a linear warm-up over the first WARMUP of the horizon and a cosine from 1 to 0.

    The update number `count` is 0 at the first; all may be traced.
    """
    warmup = jnp.ceil(WARMUP * num_steps)

    def schedule(count: Any) -> Any:
        fraction = jnp.clip((count - warmup) / jnp.maximum(num_steps - warmup, 1), 0, 1)
        unit = jnp.where(count < warmup, (count + 1) / warmup, 0.5 * (1 + jnp.cos(jnp.pi * fraction)))
        return jnp.where(cosine, unit, 1.0)

    return schedule


def resolve(spec: str) -> Entrant:
    """An entrant by `lopt:NAME`, a baseline's name, a folder of an artifact or a run, or `module:function`.

    A user's function is called with `num_steps=` (without, if it has no such parameter) and returns an optax transform,
    which is run untuned; or it is a `lopt.baselines.base.Baseline`, which is tuned like ours.

    Raises ValueError naming the nearest valid names, and for what cannot be imported or read.
    """
    if spec.startswith(PREFIX):
        return _learned(spec.removeprefix(PREFIX), spec)
    if spec in baselines.names():
        return of_baseline(baselines.get(spec))
    if Path(spec).is_dir():
        if (Path(spec) / "run.json").is_file():
            raise ValueError(
                f"lopt-eval: optimizer, got {spec!r}, a folder of lopt-eval's results; valid: a folder of weights or "
                "of lopt-train. Reports of results: lopt-eval report."
            )
        return _learned(spec, "/".join(Path(spec).resolve().parts[-2:]))
    if ":" in spec:
        return _own(spec)
    if spec in lopt.available():
        raise ValueError(f"lopt-eval: optimizer, got {spec!r}; valid: {PREFIX}{spec}, the shipped optimizer.")
    baselines.get(spec)  # raises with the nearest names
    raise AssertionError(spec)


def _learned(source: str, name: str) -> Entrant:
    rule, theta = lopt.read(source)
    config = (find(source) / CONFIG).read_bytes()  # holds the sha256 of the weights
    digest = hashlib.sha256(config + code()).hexdigest()[:16]

    def make(theta: Any, *, num_steps: Any, cosine: Any) -> Any:
        return rule.bind(theta, num_steps=num_steps)

    contender = Contender(name, make, theta, rule.needs - {"value", "num_steps"}, lopt.eval_params)
    return Entrant(name, contender, digest, artifact=source)


@functools.cache
def code() -> bytes:
    """Hash of what rules are made of, so that no curve of another version passes for one of this."""
    root = Path(lopt.__file__).parent
    files = sorted([*root.glob("*.py"), *(root / "rules").glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


def met(entrant: Entrant) -> dict[str, list[str]] | None:
    """Families and data that an optimizer was meta-trained or chosen on, none for a baseline of ours.

    None where that is not known: code of a user's own, an artifact whose provenance does not say, whose weights came
    from another run, or which met families or data that are not ours.
    """
    if not entrant.artifact:
        return {"families": [], "data": []} if entrant.known else None
    families, data = set(), set()
    try:
        run = json.loads((find(entrant.artifact) / CONFIG).read_text())["provenance"]["run"]
        if run.get("init_from") or not run["groups"]:
            return None
        for group in [*run["groups"], *(run.get("validation") or {}).get("tasks", ())]:
            made = tasks.make(group["family"], **group.get("settings", {}))
            if made.family not in tasks.REGISTRY:
                return None
            families.add(made.family)
            data |= {one.id for one in made.provenance}
    except (ImportError, KeyError, OSError, TypeError, ValueError):  # as other versions wrote it, or data not here
        return None
    return {"families": sorted(families), "data": sorted(data)}


def of_baseline(baseline: Baseline) -> Entrant:
    """A baseline with the numeric part of its space; what is not a number stays at its default."""
    space = {name: one for name, one in baseline.space.items() if _is_numeric(one)}

    def make(shared: Any, *, num_steps: Any, cosine: Any, **hyper: Any) -> Any:
        return baseline.make(num_steps=num_steps, schedule=unit_schedule(num_steps, cosine), **hyper)

    contender = Contender(baseline.name, make, (), frozenset(baseline.needs), baseline.eval_params)
    schedules = tuple(one for one in SCHEDULES if one in baseline.schedules) or ("constant",)
    return Entrant(baseline.name, contender, str(baseline.version), space, schedules, bool(baseline.deterministic_only))


def _is_numeric(one: Any) -> bool:
    values = [one.default, *(one.choices or ())]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _own(spec: str) -> Entrant:
    held, function = tasks.imported(spec, "lopt-eval")
    if isinstance(function, Baseline):
        return of_baseline(function)._replace(name=spec, version=_digest(held), known=False)
    if not callable(function):
        module, _, name = spec.partition(":")
        raise ValueError(f"lopt-eval: {spec}: {module} has no function {name!r}; valid: package.module:function.")
    parameters = inspect.signature(function).parameters.values()
    told = any(one.name == "num_steps" for one in parameters)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        one.name for one in parameters if one.default is one.empty and one.kind not in kinds and one.name != "num_steps"
    ]
    if missing:
        raise ValueError(
            f"lopt-eval: {spec} wants {', '.join(missing)}; valid: a function without arguments or of num_steps alone. "
            f"Wrap it in a file of yours: def mine(num_steps): return {spec.replace(':', '.')}({missing[0]}=…)."
        )

    def make(shared: Any, *, num_steps: Any, cosine: Any) -> Any:
        tx = function(num_steps=num_steps) if told else function()
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise ValueError(f"lopt-eval: {spec} returned a {type(tx).__name__}; valid: an optax transform.")
        return tx

    return Entrant(spec, Contender(spec, make, eval_params=lopt.eval_params), _digest(held), known=False)


def _digest(module: Any) -> str:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""
