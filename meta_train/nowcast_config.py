"""Configs of nowcast runs: frozen dataclasses, as in meta_train.config, of recordings and of networks trained on them.

Nothing here imports JAX, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from meta_train import config as cfg
from meta_train.config import Settings, require

NO_RESULT = ("log_every", "checkpoint_every")  # keys of a run that change nothing in theta
NETWORKS = ("gnn", "wnn")
DTYPES = ("float32", "bfloat16")


def _whole(where: str, got: Any, least: int = 1) -> None:
    require(least <= got < 2**31, where, got, f"{least} to 2^31 - 1")


def _positive(where: str, got: float) -> None:
    require(0 < got < math.inf, where, got, "> 0, finite")


@dataclass(frozen=True)
class Recorded:
    """A task whose training is recorded."""

    family: str  # of tasks.REGISTRY, or a user's own as package.module:function
    settings: Settings = field(default_factory=dict)  # arguments of its factory
    steps: int = 10_000  # of the base optimizer
    weight: float = 1.0  # how often it is trained on
    heads: int = 0  # of attention, where the shapes of the parameters do not say; 0: they do, or there is none

    def __post_init__(self) -> None:
        where = f"recording.groups: {self.family}"
        _whole(f"{where}: steps", self.steps)
        _positive(f"{where}: weight", self.weight)
        _whole(f"{where}: heads", self.heads, 0)


Recordings = Annotated[tuple[Recorded, ...], cfg.listed(Recorded, "recording.groups")]


@dataclass(frozen=True)
class Recording:
    """Trajectories of Adam and AdamW: each task at each rate and decay with each seed."""

    groups: Recordings
    interval: int = 50  # inner steps between two recorded states
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0, 1e-2)  # of AdamW, which is Adam at 0
    seeds: int = 2  # inits and orders of batches
    held: int = 1  # of them, the last ones: not trained on, for validation
    dtype: str = "float32"  # of the recorded states

    def __post_init__(self) -> None:
        require(len(self.groups) >= 1, "recording.groups", self.groups, "one or more")
        _whole("recording.interval", self.interval)
        require(len(self.lrs) >= 1, "recording.lrs", self.lrs, "one or more")
        require(len(self.weight_decays) >= 1, "recording.weight_decays", self.weight_decays, "one or more")
        for lr in self.lrs:
            _positive("recording.lrs", lr)
        for decay in self.weight_decays:
            require(0 <= decay < math.inf, "recording.weight_decays", decay, ">= 0, finite")
        _whole("recording.seeds", self.seeds)
        require(0 <= self.held < self.seeds, "recording.held", self.held, f"0 to seeds - 1 = {self.seeds - 1}")
        require(self.dtype in DTYPES, "recording.dtype", self.dtype, ", ".join(DTYPES))


@dataclass(frozen=True)
class Problem:
    """A task of validation, and the rate of Adam on it."""

    family: str
    settings: Settings = field(default_factory=dict)
    lr: float = 1e-3
    heads: int = 0  # of attention, as for recordings

    def __post_init__(self) -> None:
        _positive(f"validation.tasks: {self.family}: lr", self.lr)


Problems = Annotated[tuple[Problem, ...], cfg.listed(Problem, "validation.tasks")]


@dataclass(frozen=True)
class Validation:
    """Real runs on other tasks: steps with nowcasts over steps without, to what Adam reaches; the best theta is kept.

    Also the loss on the recordings that are kept for it.
    """

    tasks: Problems = ()  # none: no validation, the last theta is exported
    every: int = 500  # meta-steps; also at the end
    inner_steps: int = 2000
    seeds: int = 2
    period: int = 250  # inner steps from nowcast to nowcast
    evaluate: int = 25  # inner steps between two evaluations
    guard: bool = False  # with it nothing gets worse, and less is seen of a network

    def __post_init__(self) -> None:
        for name in ("every", "inner_steps", "seeds", "period", "evaluate"):
            _whole(f"validation.{name}", getattr(self, name))
        ok = self.inner_steps % self.evaluate == 0 and self.inner_steps >= self.period
        require(ok, "validation.inner_steps", self.inner_steps, "a multiple of evaluate, at least period")


@dataclass(frozen=True)
class Training:
    """Masked L1 over all horizons."""

    steps: int = 4000  # meta-steps
    trajectories: int = 2  # a meta-step, all of one task
    windows: int = 4  # of each, one recorded state after the other
    strides: tuple[int, ...] = (1, 2, 4)  # recorded states from one state of a window to the next, drawn uniformly
    lr: float = 3e-3  # peak, of AdamW
    final_lr: float = 1e-6  # at the end of the cosine
    warmup: int = 100  # meta-steps
    weight_decay: float = 1e-2
    clip: float = 5.0  # of the gradient's norm
    compute: str = "float32"  # or bfloat16: of the products; theta and the loss are float32

    def __post_init__(self) -> None:
        for name in ("steps", "trajectories", "windows"):
            _whole(f"training.{name}", getattr(self, name))
        require(len(self.strides) >= 1 and min(self.strides) >= 1, "training.strides", self.strides, "integers >= 1")
        for name in ("lr", "clip"):
            _positive(f"training.{name}", getattr(self, name))
        require(0 <= self.final_lr <= self.lr, "training.final_lr", self.final_lr, f"0 to lr = {self.lr}")
        _whole("training.warmup", self.warmup, 0)
        require(0 <= self.weight_decay < math.inf, "training.weight_decay", self.weight_decay, ">= 0, finite")
        require(self.compute in DTYPES, "training.compute", self.compute, ", ".join(DTYPES))


@dataclass(frozen=True)
class Nowcasting:
    """Everything the weights of nowcast networks depend on, and nothing they do not."""

    name: str
    recording: Recording
    networks: tuple[str, ...] = NETWORKS  # all are trained on the same batches; artifacts in this order
    hidden: int = 32  # width of the networks
    layers: int = 2  # of message passing
    horizons: int = 40  # windows of recorded states ahead, in strides
    context: int = 5  # states of a window
    init_gain: float = 1.0  # matrices begin with deviation gain / sqrt(inputs): at N(0, .02) narrow networks are mute
    training: Training = Training()
    validation: Validation = Validation()
    allow_held_out: bool = False  # record what tasks.HELD_OUT keeps for evaluation
    skip_limit: float = 0.1  # share of gradients that are not finite at which a run stops
    seed: int = 0
    log_every: int = 20  # meta-steps
    checkpoint_every: int = 500  # meta-steps

    def __post_init__(self) -> None:
        word = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
        require(bool(re.fullmatch(word, self.name)), "name", repr(self.name), "letters, digits, '.', '-' and '_'")
        ok = len(set(self.networks)) == len(self.networks) >= 1 and set(self.networks) <= set(NETWORKS)
        require(ok, "networks", self.networks, f"some of {', '.join(NETWORKS)}")
        for name in ("hidden", "layers", "horizons", "log_every", "checkpoint_every"):
            _whole(name, getattr(self, name))
        _whole("context", self.context, 2)
        _positive("init_gain", self.init_gain)
        require(0 <= self.skip_limit <= 1, "skip_limit", self.skip_limit, "[0, 1]")
        require(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2^31 - 1")
        for group in self.recording.groups:
            every, least = self.recording.interval, self.context + self.training.windows
            valid = f">= {least * every}, which is {least} intervals of {every}"
            require(group.steps // every >= least, f"recording.groups: {group.family}: steps", group.steps, valid)
        ok = self.validation.period // self.context >= 1
        require(ok, "validation.period", self.validation.period, f"at least context = {self.context}")

    @property
    def groups(self) -> tuple[Recorded, ...]:
        """What is recorded, by the name that tasks have in other runs."""
        return self.recording.groups

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """sha256 of all that changes the result: checkpoints of another identity are refused."""
        return cfg.sha256({k: v for k, v in self.to_json().items() if k not in NO_RESULT})

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Nowcasting:
        """Inverse of `to_json`. Raises ValueError naming the unknown or missing key."""
        return cfg.build(cls, tree, "config")


def recording_identity(run: Nowcasting) -> str:
    """sha256 of all that the recorded states depend on."""
    recording: dict[str, Any] = dict(dataclasses.asdict(run.recording))
    for group in recording["groups"]:
        del group["weight"], group["heads"]
    del recording["held"]
    return cfg.sha256(recording | {"seed": run.seed})
