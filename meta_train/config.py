"""Run configs: frozen dataclasses that say everything a meta-training result depends on.

A named config is a file in `configs/` whose `RUN` is a `Run`; a user's own is one anywhere. Nothing here imports JAX,
so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from meta_train.estimators import WHOLE_EPISODES

NO_RESULT = ("log_every", "checkpoint_every", "compare")  # keys of a run that change nothing in theta


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _json_object(words: list[str]) -> dict[str, Any]:
    """A JSON object of a command line. Raises ValueError."""
    value = _from_json(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"got {words[0]!r}; valid: a JSON object")
    return value


def _from_json(word: str) -> Any:
    """The value, None where there is none. Raises ValueError for NaN and infinity."""
    try:
        return json.loads(word, parse_constant=_no_constant)
    except json.JSONDecodeError:
        return None


Settings = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def sha256(tree: Any) -> str:
    """Of a JSON tree, in hex."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def require(ok: bool, where: str, got: Any, valid: str) -> None:
    if not ok:
        raise ValueError(f"{where}, got {got}; valid: {valid}.")


@dataclass(frozen=True)
class Group:
    """Tasks that share one compiled program."""

    family: str  # of tasks.REGISTRY, or a user's own as package.module:function
    settings: Settings = field(default_factory=dict)  # arguments of its factory
    weight: float = 1.0  # of the group's gradient in the average
    reference_loss: float = 0.0  # what a good optimizer reaches on it, where the run has normalise = "reference"
    processes: tuple[int, ...] = ()  # that hold it, where the run has several; none: all of them. Changes no result

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, f"group {self.family}: weight", self.weight, "> 0")
        got = self.reference_loss
        require(0 <= got < math.inf, f"group {self.family}: reference_loss", got, ">= 0, finite")
        held = self.processes
        ok = len(set(held)) == len(held) and all(isinstance(p, int) and p >= 0 for p in held)
        require(ok, f"group {self.family}: processes", list(held), "different numbers of processes, from 0")


def listed(kind: Any, name: str) -> Any:
    """How a command line gives a tuple of dataclasses: as a JSON list."""

    def parse(words: list[str]) -> tuple[Any, ...]:
        value = _from_json(words[0])
        keys = ", ".join(f.name for f in dataclasses.fields(kind))
        require(isinstance(value, list), name, repr(words[0]), f"a JSON list of objects with the keys {keys}")
        return tuple(build(kind, x, f"{name}.{i}") for i, x in enumerate(value))

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(x, kind) for x in value),
        str_from_instance=lambda value: [json.dumps([dataclasses.asdict(x) for x in value])],
    )


Groups = Annotated[tuple[Group, ...], listed(Group, "validation.tasks")]


@dataclass(frozen=True)
class Validation:
    """Meta-validation: the theta that would be exported, on tasks that are not in the mixture; the best one is kept.

    The score is the run's meta-loss over whole inner runs on validation batches. Tasks, inits and batches are the same
    each time.
    """

    tasks: Groups = ()  # their weights count in the mean; none: no meta-validation
    every: int = 200  # meta-steps; also at the start and at the end
    inner_steps: int = 500  # of an inner run, of whatever task
    seeds: int = 4  # inner runs a task
    suite: str = ""  # of lopt-eval, e.g. dev: lopt-train puts its tasks among those above, and records them there

    def __post_init__(self) -> None:
        for key in ("every", "inner_steps", "seeds"):
            got = getattr(self, key)
            require(1 <= got < 2**31, f"validation.{key}", got, "1 to 2^31 - 1")
        placed = [task.family for task in self.tasks if task.processes]
        require(not placed, f"validation.tasks: {placed}: processes", "some", "none, all processes hold them")


@dataclass(frozen=True)
class Horizon:
    """Horizons of inner runs are log-uniform integers in [low, high]; equal ends make them constant."""

    low: int = 100
    high: int = 1000
    # Cut the first episodes short at random, so that particles do not march in step: the first meta-steps would see the
    # first inner steps alone. Constant horizons keep them in step for ever, varied ones for some episodes.
    stagger: bool = True

    def __post_init__(self) -> None:
        require(self.low >= 1, "horizon.low", self.low, ">= 1")
        got = f"{self.low} and high = {self.high}"
        require(self.low <= self.high < 2**31, "horizon.low", got, "low <= high < 2^31")


@dataclass(frozen=True)
class Stage:
    """A later part of a curriculum: what replaces the horizons and the truncation from a meta-step on."""

    start: int  # meta-step
    low: int  # of horizons
    high: int
    truncation: int

    def __post_init__(self) -> None:
        where = f"stage from meta-step {self.start}"
        require(self.start >= 0, "stages: start", self.start, ">= 0")
        require(self.truncation >= 1, f"{where}: truncation", self.truncation, ">= 1")
        require(self.low >= 1, f"{where}: low", self.low, ">= 1")
        require(self.low <= self.high < 2**31, f"{where}: high", self.high, f"low = {self.low} to 2^31 - 1")


Stages = Annotated[tuple[Stage, ...], listed(Stage, "stages")]


@dataclass(frozen=True)
class Estimator:
    """How the meta-gradient is estimated."""

    name: str = "pes"  # of meta_train.estimators.REGISTRY
    pairs: int = 8  # antithetic pairs a group; for backprop, which has no pairs, particles
    std: float = 0.01  # of the perturbation of theta; backprop has none
    truncation: int = 50  # inner steps a window; full_es and full_backprop have none
    std_parts: Settings = field(
        default_factory=dict
    )  # other stds of parts of theta, by dotted path, e.g. {"mlp": 0.02}
    sign: float = 0.0  # > 0: a pair's mean difference of meta-losses counts as ± this much (VeLO), 0: as it is

    def __post_init__(self) -> None:
        require(self.pairs >= 1, "estimator.pairs", self.pairs, ">= 1")
        require(0 < self.std < math.inf, "estimator.std", self.std, "> 0, finite")
        require(self.truncation >= 1, "estimator.truncation", self.truncation, ">= 1")
        require(0 <= self.sign < math.inf, "estimator.sign", self.sign, ">= 0, finite")
        for part, std in self.std_parts.items():
            ok = isinstance(std, (int, float)) and not isinstance(std, bool) and 0 < std < math.inf
            require(ok, f"estimator.std_parts: {part}", std, "> 0, finite")


META_SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class MetaOptimizer:
    """One of optax's on theta: clip, warm-up, schedule, decay."""

    name: str = "adam"  # of optax or optax.contrib, e.g. adamw, nadamw, lion, muon
    settings: Settings = field(default_factory=dict)  # its arguments besides the learning rate
    lr: float = 2e-3  # peak
    final_lr: float = 1e-5
    warmup: int = 100  # updates
    schedule: str = "cosine"  # from lr to final_lr, or "linear", or "constant"
    clip: float = 1.0  # each element of the meta-gradient is clipped to ± this; 0: no limit
    clip_norm: float = 0.0  # before that its norm; 0: no limit
    clip_step: float = 0.0  # an element of theta moves by at most this; 0: no limit
    clip_step_norm: float = 0.0  # before that the norm of theta's step; 0: no limit
    weight_decay: float = 0.0  # decoupled: times the learning rate
    accumulate: int = 1  # meta-gradients that are averaged for one update
    ema: float = 0.0  # decay, an update, of a moving average of theta, which is exported then; 0: none

    def __post_init__(self) -> None:
        for key in ("clip", "clip_norm", "clip_step", "clip_step_norm", "weight_decay"):
            got = getattr(self, key)
            require(0 <= got < math.inf, f"meta_optimizer.{key}", got, ">= 0, finite")
        require(self.schedule in META_SCHEDULES, "meta_optimizer.schedule", self.schedule, ", ".join(META_SCHEDULES))
        require(self.accumulate >= 1, "meta_optimizer.accumulate", self.accumulate, ">= 1")
        require(0 <= self.ema < 1, "meta_optimizer.ema", self.ema, "[0, 1)")
        require(0 < self.lr < math.inf, "meta_optimizer.lr", self.lr, "> 0, finite")
        got = f"{self.lr} and final_lr = {self.final_lr}"
        require(0 <= self.final_lr <= self.lr, "meta_optimizer.lr", got, "0 <= final_lr <= lr")
        require(self.warmup >= 0, "meta_optimizer.warmup", self.warmup, ">= 0")


@dataclass(frozen=True)
class Run:
    """Everything a meta-training result depends on, and nothing it does not (no time, no place)."""

    name: str
    groups: tuple[Group, ...]
    rule: str = "tiny"  # of lopt.rules.REGISTRY
    rule_settings: Settings = field(default_factory=dict)  # arguments of its factory
    estimator: Estimator = Estimator()
    horizon: Horizon = Horizon()
    meta_loss: str = "validation"  # measured on the "train" batch, a "fresh" one, or a "validation" batch
    loss_limit: float = 3.0  # meta-losses above it count as this much, after normalising
    objective: str = "mean"  # of an episode's meta-losses; or the "final" one, or the mean of the "last" ones
    last_steps: int = 50  # inner steps of objective "last"
    judge_average: bool = False  # meta-losses at the average that the rule keeps (its setting), not at the parameters
    normalise: str = "none"  # or divide meta-losses by the loss at "init", or by the group's "reference" loss
    stages: Stages = ()  # curriculum: later horizons and truncations, by growing start
    validation: Validation = Validation()
    meta_optimizer: MetaOptimizer = MetaOptimizer()
    meta_steps: int = 1000
    init_from: str = ""  # name or folder of an artifact whose theta is the start, or none
    freeze: tuple[str, ...] = ()  # parts of theta that are not meta-trained, by dotted path, e.g. "bank"
    allow_held_out: bool = False  # meta-train on what tasks.HELD_OUT keeps for evaluation
    window_steps: int = 100  # meta-steps for which a part of data that do not fit as a whole is used
    skip_limit: float = 0.1  # share of meta-gradients that are not finite at which a run stops
    seed: int = 0
    log_every: int = 20  # meta-steps
    checkpoint_every: int = 200  # meta-steps
    compare: str = ""  # suite of `lopt-eval compare` to run at the end, or none

    def __post_init__(self) -> None:
        require(len(self.groups) >= 1, "groups", self.groups, "one or more")
        word = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
        require(bool(re.fullmatch(word, self.name)), "name", repr(self.name), "letters, digits, '.', '-' and '_'")
        require(0 < self.loss_limit < math.inf, "loss_limit", self.loss_limit, "> 0, finite")
        require(self.window_steps >= 1, "window_steps", self.window_steps, ">= 1")
        require(0 <= self.skip_limit <= 1, "skip_limit", self.skip_limit, "[0, 1]")
        require(1 <= self.meta_steps < 2**31, "meta_steps", self.meta_steps, "1 to 2^31 - 1")
        if self.normalise == "reference":
            for where, groups in (("groups", self.groups), ("validation.tasks", self.validation.tasks)):
                for i, group in enumerate(groups):
                    here = f"{where}.{i}.reference_loss of {group.family} with normalise = 'reference'"
                    require(group.reference_loss > 0, here, group.reference_loss, "> 0, losses are divided by it")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        each, most = self.meta_optimizer.accumulate, self.meta_steps
        require(each <= most, "meta_optimizer.accumulate", each, f"at most meta_steps = {most}, or nothing is learned")
        require(self.log_every >= 1, "log_every", self.log_every, ">= 1")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, ">= 1")
        if self.estimator.name not in WHOLE_EPISODES:
            k = self.estimator.truncation
            require(self.horizon.low >= k, "horizon.low", self.horizon.low, f">= estimator.truncation = {k}")
            for stage in self.stages:
                where = f"stage from meta-step {stage.start}: low"
                require(stage.low >= stage.truncation, where, stage.low, f">= its truncation = {stage.truncation}")
        starts = [stage.start for stage in self.schedule()]
        require(starts == sorted(set(starts)), "stages: starts", starts[1:], "meta-steps that grow, from 1")

    def schedule(self) -> tuple[Stage, ...]:
        """All stages, the first one of meta-step 0 on."""
        first = Stage(0, self.horizon.low, self.horizon.high, self.estimator.truncation)
        return (first, *self.stages)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """sha256 of all that changes the result: checkpoints of another identity are refused."""
        tree = {k: v for k, v in self.to_json().items() if k not in NO_RESULT}
        tree["groups"] = [{k: v for k, v in group.items() if k != "processes"} for group in tree["groups"]]
        return sha256(tree)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Run:
        """Inverse of `to_json`. Raises ValueError naming the unknown or missing key."""
        return build(cls, tree, "config")


PLAIN: dict[Any, tuple[Any, str]] = {
    tuple[str, ...]: (str, "strings"),
    tuple[int, ...]: (int, "integers"),
    tuple[float, ...]: ((int, float), "numbers"),
}


def build(kind: Any, tree: Any, where: str) -> Any:
    """A dataclass from nested dicts and lists, refusing keys it does not have."""
    require(isinstance(tree, Mapping), where, repr(tree), "an object")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}.{hint} valid: {', '.join(hints)}.")
    values = {}
    for key, value in tree.items():
        hint, here = hints[key], f"{where}.{key}"
        if hint == dict[str, Any]:
            require(isinstance(value, Mapping), here, repr(value), "an object")
        elif dataclasses.is_dataclass(hint):
            value = build(hint, value, here)
        elif hint in PLAIN:
            kind_of, name = PLAIN[hint]
            valid = isinstance(value, (list, tuple))
            valid = valid and all(isinstance(x, kind_of) and not isinstance(x, bool) for x in value)
            require(valid, here, repr(value), f"a list of {name}")
            value = tuple(value)
        elif isinstance(hint, types.GenericAlias) and hint.__origin__ is tuple:
            require(isinstance(value, (list, tuple)), here, repr(value), "a list")
            value = tuple(build(hint.__args__[0], x, f"{here}.{i}") for i, x in enumerate(value))
        elif hint in (int, float, str, bool):
            allowed = (int, float) if hint is float else (hint,)
            ok = isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
            require(ok, here, repr(value), hint.__name__)
        values[key] = value
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, where, f"no {', '.join(missing)}", "all keys without a default")
    return kind(**values)


def command(run: Run) -> str:
    """The `lopt-train` command of a run: its named config, and the keys that were changed."""
    if module(run.name) not in named():
        return "lopt-train config.json"  # the artifact's own
    words, like = ["lopt-train", run.name], load(run.name)
    if len(run.groups) != len(like.groups):
        words += [word for group in run.groups for word in ("--task", group.family)]
        like = dataclasses.replace(like, groups=tuple(Group(group.family) for group in run.groups))
    default = _flat(like.to_json())
    for key, value in _flat(run.to_json()).items():
        if default.get(key, value) != value or key not in default:
            value = json.dumps(value) if isinstance(value, dict) or key in ("stages", "validation.tasks") else value
            if isinstance(value, bool):
                *parts, last = key.replace("_", "-").split(".")
                words.append("--" + ".".join([*parts, last if value else f"no-{last}"]))
                continue
            words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, without what changes no result; `groups` by number."""
    out = {}
    for key, value in tree.items():
        if key == "groups":
            out |= _flat({str(i): group for i, group in enumerate(value)}, f"{prefix}groups.")
        elif isinstance(value, dict) and not key.endswith(("settings", "std_parts")):
            out |= _flat(value, f"{prefix}{key}.")
        elif key not in (*NO_RESULT, "processes"):
            out[prefix + key] = value
    return out


def named() -> dict[str, str]:
    """Config name -> first line of its docstring."""
    folder = Path(__file__).parent / "configs"
    lines = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            lines[path.stem] = path.read_text().lstrip('"').split("\n", 1)[0].rstrip('"')
    return lines


def load(name: str) -> Any:
    """A named config, or one's own: a Run, or the Nowcasting of meta_train.nowcast_config.

    Of one's own: a file that defines RUN, package.module:name of a Run or of what returns one, or the config.json of a
    run or of an artifact, which is run again.

    Raises ValueError listing the names, the nearest first, or saying what the file or the module does not hold.
    """
    if name.endswith(".json"):
        return _recorded(name)
    if ":" in name or name.endswith(".py"):
        return _own(name)
    names = named()
    if module(name) not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"lopt-train: unknown config {name!r}.{hint} valid: {', '.join(names)}, a file that ends in .py or .json, "
            "or module:name."
        )
    return importlib.import_module(f"meta_train.configs.{module(name)}").RUN


def module(name: str) -> str:
    """A config's file, by its name: that of the weights, l2o-lasso, or the file's own.

    >>> module("l2o-lasso")
    'l2o_lasso'
    """
    return name.replace("-", "_")


def from_json(tree: Any) -> Any:
    """A Run or a Nowcasting, whichever the tree is of. Raises ValueError naming the unknown or missing key."""
    if isinstance(tree, Mapping) and "recording" in tree:
        from meta_train.nowcast_config import Nowcasting

        return Nowcasting.from_json(tree)
    return Run.from_json(tree)


def _recorded(path: str) -> Any:
    """The config of a run or of an artifact. Raises ValueError where there is none."""
    try:
        tree = json.loads(Path(path).read_text())
        return from_json(tree["provenance"]["run"] if "provenance" in tree else tree)
    except (OSError, TypeError, KeyError, ValueError) as e:
        raise ValueError(f"lopt-train: {path}: {e}; valid: the config.json of a run or of an artifact.") from e


def _own(name: str) -> Any:
    """A config of the user's. Raises ValueError where it cannot be imported or is none."""
    from meta_train.nowcast_config import Nowcasting

    path, what = (name, "RUN") if name.endswith(".py") else name.rsplit(":", 1)
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at its end, so that a file of theirs never shadows an installed package
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
            assert spec is not None
            assert spec.loader is not None
            held = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(held)
        else:
            held = importlib.import_module(path)
        found = getattr(held, what, None)
        run = found() if callable(found) else found
    except Exception as e:  # whatever a user's module raises
        raise ValueError(f"lopt-train: {name}: {type(e).__name__}: {e}; valid: a file or a module that runs.") from e
    if not isinstance(run, Run | Nowcasting):
        raise ValueError(
            f"lopt-train: {name}: {what}, got {type(run).__name__}; valid: a meta_train.config.Run, or a function "
            "without arguments that returns one (of nowcasts a meta_train.nowcast_config.Nowcasting)."
        )
    return run
