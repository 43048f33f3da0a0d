"""Recordings of training runs: made on the device, kept as array_record with a sha256 each, read through Grain.

A folder holds a file a task, one record a trajectory (its states, [states, parameters] in order), and manifest.json:
what the states are of, where the tasks come from, and the identity of the config that they were recorded for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tasks
from meta_train.nowcast_config import Nowcasting, Problem, Recorded, Recording, recording_identity
from meta_train.placement import usable_devices
from meta_train.record import write_whole
from tasks import held_out

if TYPE_CHECKING:
    from jaxtyping import Array, Float

MANIFEST = "manifest.json"
PIECES = 20  # a trajectory is recorded in, to report and to be stopped between them
PREFETCHED = 8  # batches


class StoppedError(Exception):
    """Somebody asked to stop while a task was being recorded."""


class Held(NamedTuple):
    """What the manifest says of a task's file."""

    file: str
    sha256: str
    family: str
    families: list[str]  # that it is made of
    sources: list[list[str]]  # id and sha256 of its data
    leaves: list[list[Any]]  # path and shape of each, in the order of a state
    trajectories: list[dict[str, float]]  # lr, weight_decay, seed, and how many states were finite

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.leaves)


def task_of(group: Recorded | Problem) -> tasks.Task:
    """The task of a group, or one to validate on."""
    return tasks.make(group.family, **group.settings)


def make(group: Recorded) -> tasks.Task:
    """The task of a group. Raises ValueError if its gradients are not those of its loss."""
    task = task_of(group)
    if task.value_and_grad is not None or task.grad_transform is not None or task.window is not None:
        raise ValueError(
            f"recording.groups: {group.family}: gradients of its own, or data in windows; valid: a task whose "
            "gradients are those of its loss on data that are on the device."
        )
    return task


def pinned(group: Recorded | Problem) -> dict[str, Any]:
    """Settings that build the same task wherever they are read."""
    return tasks.pin(group.family, group.settings)


def refuse(run: Nowcasting, found: Sequence[tasks.Task | Held]) -> None:
    """Raise ValueError if a task or a recording touches what tasks.HELD_OUT keeps for evaluation."""
    for one in found if not run.allow_held_out else ():
        if isinstance(one, Held):
            words = held_out.touched_by([tasks.Source(*s) for s in one.sources], one.families)
        else:
            words = held_out.touched(one)
        if words:
            name = one.file if isinstance(one, Held) else one.name
            raise ValueError(
                f"lopt-train {run.name}: {name} touches what is held out for evaluation: {', '.join(words)}; "
                "valid: other tasks, or --allow-held-out, after which no score on these means anything."
            )


def settings_of(recording: Recording) -> list[dict[str, float]]:
    """Rate, decay and seed of each trajectory of a task, in the order of its records."""
    return [
        {"lr": lr, "weight_decay": decay, "seed": seed}
        for seed in range(recording.seeds)
        for lr in recording.lrs
        for decay in recording.weight_decays
    ]


def record(
    run: Nowcasting, folder: Path, report: Callable[[int, str], None] = lambda *_: None, stop: Any = lambda: 0
) -> list[Held]:
    """Record what is missing in a folder.

    Args:
      run: its `recording` and seed.
      folder: made if need be; what is there is used if it was recorded for the same config and is undamaged.
      report: `(states recorded of all trajectories' together, note)`.
      stop: asked between pieces.

    Raises:
      ValueError: for held-out tasks, and for files of another config or with another sha256.
      StoppedError: when told to; tasks that were recorded whole stay.
    """
    folder.mkdir(exist_ok=True)
    held, done = read_manifest(run, folder), 0
    refuse(run, held)
    for i, group in enumerate(run.recording.groups):
        states = group.steps // run.recording.interval
        if i >= len(held):
            task = make(group)
            refuse(run, [task])
            say = lambda n, task=task, done=done: report(done + n, f"{task.name}")  # noqa: E731
            held.append(_record_one(run, i, group, task, folder, say, stop))
            write_whole(folder / MANIFEST, _manifest(run, held))
        done += states
    return held


def total(run: Nowcasting) -> int:
    """States of a trajectory, of all tasks together."""
    return sum(group.steps // run.recording.interval for group in run.recording.groups)


def _record_one(
    run: Nowcasting, number: int, group: Recorded, task: tasks.Task, folder: Path, report: Any, stop: Any
) -> Held:
    from array_record.python.array_record_module import ArrayRecordWriter

    recording, which = run.recording, settings_of(run.recording)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), number), seed))(
        jnp.array([int(one["seed"]) for one in which])
    )
    rates = tuple(jnp.array([one[name] for one in which], jnp.float32) for name in ("lr", "weight_decay"))
    mesh = mesh_over(len(which))
    begin, piece = _recorder(task, recording, mesh)
    states = group.steps // recording.interval
    carry, parts, each = begin(keys, rates), [], -(-states // PIECES)
    for start in range(0, states, each):
        if stop():
            raise StoppedError
        n = min(each, states - start)
        carry, seen = piece(task.data, keys, rates, carry, start * recording.interval, n)
        parts.append(np.asarray(seen))
        report(start + n)
    found = np.concatenate(parts, axis=1)
    for one, x in zip(which, found, strict=True):
        bad = np.flatnonzero(~np.isfinite(x.astype(np.float32)).all(1))
        one["states"] = int(bad[0]) if bad.size else states
    path = folder / f"{number:02d}-{task.family.replace(':', '.')}.array_record"
    partial_path = path.with_suffix(".partial")
    writer = ArrayRecordWriter(str(partial_path), "group_size:1,uncompressed")
    for x in found:
        writer.write(np.ascontiguousarray(x).tobytes())
    writer.close()
    partial_path.replace(path)
    params = jax.eval_shape(lambda key: task.init(key, task.sample(key)), jax.random.key(0))
    sources, families = held_out.origins(task)
    return Held(
        path.name,
        _sha256(path),
        task.family,
        families,
        [list(source) for source in sources],
        [[path, list(shape)] for path, shape in _leaves(params)],
        which,
    )


def _recorder(task: tasks.Task, recording: Recording, mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`begin(keys, rates) -> carry` and `piece(data, keys, rates, carry, first, n) -> (carry, states [N, n, P])`."""
    dtype = jnp.dtype(recording.dtype)

    def base(rate: Any) -> optax.GradientTransformation:
        return optax.adamw(rate[0], weight_decay=rate[1])  # Adam where the decay is 0

    def first(key: jax.Array, rate: Any) -> Any:
        phi = task.sample(jax.random.fold_in(key, 0))
        params = task.init(jax.random.fold_in(key, 1), phi)
        return phi, params, base(rate).init(params)

    def one(data: Any, key: jax.Array, rate: Any, carry: Any, start: jax.Array, n: int) -> Any:
        phi, params, state = carry

        def step(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), t))
            batch = task.batch(batch_key, phi, data, "train")
            updates, state = base(rate).update(jax.grad(task.loss)(params, loss_key, phi, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        def state_after(carry: Any, t: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, t + jnp.arange(recording.interval))
            return carry, flat(carry[0]).astype(dtype)

        carry, seen = jax.lax.scan(state_after, (params, state), start + recording.interval * jnp.arange(n))
        return (phi, *carry), seen

    over = PartitionSpec(mesh.axis_names[0])

    @partial(jax.jit, static_argnums=5)
    def piece(data: Any, keys: Any, rates: Any, carry: Any, start: Any, n: int) -> Any:
        run = jax.vmap(partial(one, n=n), in_axes=(None, 0, 0, 0, None))
        specs = (PartitionSpec(), over, over, over, PartitionSpec())
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)(
            data, keys, rates, carry, start
        )

    return jax.jit(jax.vmap(first), out_shardings=NamedSharding(mesh, over)), piece


def mesh_over(count: int) -> Mesh:
    """The most devices among which so many trajectories can be shared out."""
    devices = jax.local_devices()
    return Mesh(np.array(devices[: usable_devices(count, len(devices))]), ("trajectories",))


def flat(params: Any) -> Float[Array, "P"]:
    """All parameters one after the other."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])


def _leaves(params: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]


def _manifest(run: Nowcasting, held: Sequence[Held]) -> str:
    tree = {"identity": recording_identity(run), "dtype": run.recording.dtype, "interval": run.recording.interval}
    return json.dumps(tree | {"tasks": [one._asdict() for one in held]}, indent=1) + "\n"


def read_manifest(run: Nowcasting, folder: Path) -> list[Held]:
    """What is recorded in a folder. Raises ValueError for files of another config or that have changed."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        tree = json.loads(path.read_text())
        held, identity = [Held(**one) for one in tree["tasks"]], tree["identity"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"lopt-train: {path} is damaged: {e}; valid: delete {folder}, and the tasks are recorded again."
        ) from e
    if identity != recording_identity(run):
        raise ValueError(
            f"lopt-train: {folder} was recorded for another config; valid: the config it was recorded for, or delete "
            "the folder, and the tasks are recorded again."
        )
    for one in held:
        file = folder / one.file
        if not file.is_file() or _sha256(file) != one.sha256:
            what = "has another sha256 than when it was recorded" if file.is_file() else "is missing"
            raise ValueError(f"lopt-train: {file} {what}; valid: delete {folder}, and the tasks are recorded again.")
    return held


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Records:
    """Some records of a file, for Grain: number and states."""

    def __init__(self, path: Path, one: Held, which: Sequence[int], dtype: str):
        from grain.python import ArrayRecordDataSource

        self._held = ArrayRecordDataSource([str(path)])
        self._one, self._which, self._dtype = one, list(which), jnp.dtype(dtype)

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> np.ndarray:
        number = self._which[index]
        x = np.frombuffer(self._held[number], self._dtype).reshape(-1, self._one.parameters)
        return x[: int(self._one.trajectories[number]["states"])]


def batches(run: Nowcasting, folder: Path, held: Sequence[Held], *, first: int = 0, validation: bool = False) -> Any:
    """An iterator over batches from number `first` on: a function of the seed and the number alone.

    A batch is a dict of `task` [N] (the same number N times), `states` [N, S, P] float32 with
    S = context + windows - 1 + horizons, a stride apart, zeros where the trajectory has ended, and `valid` [N], how
    many states there are.

    Raises:
      ValueError: if no trajectory of a task is long enough.
    """
    import grain

    sets = []
    for i, one in enumerate(held):
        most = run.recording.seeds - run.recording.held
        which = [
            n
            for n, trajectory in enumerate(one.trajectories)
            if (trajectory["seed"] >= most) == validation and trajectory["states"] >= run.context + run.training.windows
        ]
        if not which:
            raise ValueError(f"lopt-train: {folder / one.file}: no trajectory is long enough; valid: lower rates.")
        records = grain.MapDataset.source(_Records(folder / one.file, one, which, run.recording.dtype))
        records = records.seed(run.seed + 2 * i + validation).shuffle().repeat()
        cut = records.random_map(partial(_span, run, i))
        sets.append(cut.batch(run.training.trajectories))
    weights = [group.weight for group in run.recording.groups]
    mixed = grain.MapDataset.mix(sets, [w / sum(weights) for w in weights])
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCHED)
    return iter(mixed.slice(slice(first, len(mixed))).to_iter_dataset(options))


def _span(run: Nowcasting, number: int, states: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Consecutive states of a trajectory, from anywhere in it."""
    least = run.context + run.training.windows
    fit = [stride for stride in run.training.strides if least * stride <= len(states)] or [1]
    stride = int(rng.choice(fit))
    start = int(rng.integers(len(states) - least * stride + 1))
    size = least - 1 + run.horizons
    found = states[start : start + size * stride : stride].astype(np.float32)
    padded = np.zeros((size, states.shape[1]), np.float32)
    padded[: len(found)] = found
    return {"task": np.int32(number), "states": padded, "valid": np.int32(len(found))}
