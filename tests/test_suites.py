"""Suites: how many and how hard, what they share, what they cost, and that none changes unnoticed.

python -m tests.test_suites    # writes tests/fixtures/suites.json anew, after a version was raised
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from meta_test import runs, suites
from meta_test.cost import flops, run_flops
from meta_test.runs import Contender
from meta_test.suites import CAPS, DEFAULT_BASELINES, SUITES, VERSIONS, Problem
from tasks import DEV, HELD_OUT
from tasks.held_out import Trace, touched, trace

FINGERPRINTS = Path(__file__).parent / "fixtures/suites.json"
SLOW_LOSS = 3e7  # FLOPs of a step from which on the loss is looked at in the slow tests
FAST = {"xla_backend_optimization_level": 0}
JUDGING = ("mini", "heldout")


@functools.cache
def made(suite: str) -> dict[str, tuple[Problem, tasks.Task]]:
    return {p.name: (p, tasks.make(p.family, **p.settings)) for p in SUITES[suite]}


@functools.cache
def traced(suite: str) -> dict[str, Trace]:
    return {name: trace(task) for name, (_, task) in made(suite).items()}


def shape_of(task: tasks.Task) -> str:
    """Hash of the shapes and types of phi, params, batches and data, and of where the data come from."""
    key = jax.random.key(0)
    phi = jax.eval_shape(task.sample, key)
    params = jax.eval_shape(task.init, key, phi)
    batch = jax.eval_shape(lambda k, p, d: task.batch(k, p, d, "train"), key, phi, task.data)
    shapes = [(str(path), x.shape, str(x.dtype)) for path, x in jax.tree.leaves_with_path((phi, params, batch))]
    shapes += [(x.shape, str(x.dtype)) for x in jax.tree.leaves(task.data)]
    words = json.dumps([shapes, [list(source) for source in task.provenance], task.version])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


LENGTH = 0.1  # of the second kind of step, in parameter units
KINDS = np.arange(2)  # SGD at 1e-3, and steps of LENGTH along the gradient
RTOL, SEEN, SHARE = 5e-3, 1e-3, 1e-4  # of losses, of what steps see, of the sum of a leaf's sizes
POSITIONS = 997  # weights of a leaf's elements repeat after so many


def _told(grads, state, params, *, value, kind):
    """A step of a kind; its state is what it was told."""
    loss, batch = value
    norm = optax.tree.norm(grads)
    return optax.tree.scale(-jnp.where(kind == 0, 1e-3, LENGTH / norm), grads), (loss, norm, batch)


def _contender(kind):
    update = lambda *args, value, **extra: _told(*args, value=value, kind=kind)  # noqa: E731
    return Contender("told", lambda shared: optax.GradientTransformationExtraArgs(lambda params: (), update))


def first(task: tasks.Task, key, data):
    """Of seed 0: loss of a batch at init; of each kind what two steps saw, validation and test loss; and batches."""
    value_and_grad = task.value_and_grad or jax.value_and_grad(task.loss)

    def with_batch(params, key, phi, batch):
        value, grads = value_and_grad(params, key, phi, batch)
        return (value, batch), grads

    shown = task._replace(value_and_grad=with_batch)

    def of_a_kind(kind):
        def step(run, t):
            run = runs.step(shown, _contender(kind), data, (), {}, 0, t, run)
            return run._replace(opt_state=()), run.opt_state

        run, (losses, norms, batches) = jax.lax.scan(step, begun, jnp.arange(2))
        after = [runs.evaluate(task, data, split, run, metrics=False)["loss"] for split in ("validation", "test")]
        return jnp.stack(after), losses, norms, batches

    phi, begun = task.sample(key), runs.begin(task, _contender(0).make, (), {}, 0)
    before = task.loss(task.init(key, phi), key, phi, task.batch(key, phi, data, "train"))
    if task.eval_batches is None:
        judged = task.batch(key, phi, data, "validation")
    else:
        judged = jax.tree.map(lambda x: x[0], task.eval_batches(phi, data, "validation"))
    return before, jax.lax.map(of_a_kind, KINDS), judged


def sums(leaf) -> list[float]:
    """Sum of sizes, and sum of elements weighted by their places; of integers exact."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    x = np.asarray(leaf)
    x = x.astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64).ravel()
    found = np.abs(x).sum(), (x * (1 + np.arange(x.size) % POSITIONS)).sum()
    return [float(f"{one:.7g}") if x.dtype == np.float64 else int(one) for one in found]


class Numbers(NamedTuple):
    """What a task gives in its first two steps on seed 0."""

    losses: list[float]  # of a batch at init; validation and test loss after two steps of SGD at 1e-3; three digits
    seen: list[float]  # of steps of LENGTH: two losses, two gradient norms, validation and test loss after; five digits
    batches: list[list[list[float]]]  # `sums` of the leaves of the two training batches and of one of validation


def numbers_of(task: tasks.Task) -> Numbers:
    compiled = jax.jit(partial(first, task)).lower(jax.random.key(0), task.data).compile(compiler_options=FAST)
    before, (after, losses, norms, batches), judged = jax.device_get(compiled(jax.random.key(0), task.data))
    drawn = [jax.tree.map(lambda x, t=t: x[0, t], batches) for t in range(2)]
    return Numbers(
        [float(f"{float(x):.3g}") for x in (before, *after[0])],
        [float(f"{float(x):.5g}") for x in (*losses[1], *norms[1], *after[1])],
        [[sums(leaf) for leaf in jax.tree.leaves(batch)] for batch in (*drawn, judged)],
    )


def differs(found: Numbers, held: Numbers) -> str:
    """Which numbers differ beyond what another machine may do to them; empty if none."""
    pairs = [(x, y) for a, b in zip(found.batches, held.batches, strict=True) for x, y in zip(a, b, strict=True)]

    def same(x: list[float], y: list[float]) -> bool:
        whole = all(isinstance(one, int) for one in (*x, *y))
        return x == y if whole else bool(np.allclose(x, y, rtol=SHARE, atol=SHARE * POSITIONS / 2 * y[0]))

    bad = {
        "losses": not np.allclose(found.losses, held.losses, rtol=RTOL, atol=0),
        "seen": not np.allclose(found.seen, held.seen, rtol=SEEN, atol=0),
        "batches": not all(same(x, y) for x, y in pairs),
    }
    return ", ".join(name for name, one in bad.items() if one)


@pytest.mark.parametrize("suite", sorted(CAPS))
def test_names_are_unique_and_every_task_can_be_made(suite):
    assert len(made(suite)) == len(SUITES[suite])
    assert all(task.family == p.family for p, task in made(suite).values())
    assert set(VERSIONS) == set(SUITES)


def test_counts():
    assert len(SUITES["smoke"]) == 3
    assert 6 <= len(SUITES["dev"]) <= 8
    assert len(SUITES["mini"]) == 10
    assert len(SUITES["heldout"]) >= 30
    assert all(p in SUITES["heldout"] for p in SUITES["mini"])
    assert sum(p.num_steps > 10_000 for p in SUITES["heldout"]) <= 4
    assert len(DEFAULT_BASELINES) >= 12
    assert {p.name for problems in SUITES.values() for p in problems} == set(suites.MS)  # what a step costs is known


def test_line_searches_have_a_suite():
    from meta_test import entrants

    assert not any(entrants.resolve("lbfgs").lacks(task) for _, task in made("deterministic").values())
    assert all(entrants.resolve("lbfgs").lacks(task) for _, task in made("smoke").values())


def test_heldout_is_wider_deeper_and_longer():
    """Relative to width 32, depth 2, horizon 2,000 and batch 64, by the sizes of the parameters and settings."""
    widths, depths = set(), set()
    for p in SUITES["heldout"]:
        hidden = p.settings.get("hidden", ())
        widths |= {w // suites.WIDTH for w in (*hidden, p.settings.get("width", 0))}
        depths |= {d // suites.DEPTH for d in (len(hidden), p.settings.get("depth", 0))}
    assert {4, 8, 16} <= widths
    assert 3 in depths
    horizons = {p.num_steps / suites.HORIZON for p in SUITES["heldout"]}
    assert {5, 10, 25} <= horizons
    batches = {p.settings.get("batch_size", suites.BATCH) for p in SUITES["heldout"]}
    assert min(batches) * 8 <= suites.BATCH
    assert max(batches) >= 8 * suites.BATCH


@pytest.mark.parametrize("suite", JUDGING)
def test_every_task_to_judge_by_is_held_out(suite):
    for name, (_, task) in made(suite).items():
        assert touched(task, HELD_OUT), name


def test_dev_shares_neither_data_nor_family_with_what_judges():
    for suite in JUDGING:
        data = {one for t in traced(suite).values() for one in t.data}
        families = {one for t in traced(suite).values() for one in t.families}
        for name, found in traced("dev").items():
            assert not set(found.data) & data, name
            assert not set(found.families) & families, name


def test_dev_shares_with_nothing_that_shipped_configs_may_touch():
    """It is made of DEV and of nothing else, which tests/test_held_out.py keeps out of shipped configs."""
    data = {one for found in traced("dev").values() for one in found.data}
    families = {one for found in traced("dev").values() for one in found.families}
    assert data == set(DEV.data)
    assert families == set(DEV.families)
    for name, (_, task) in made("smoke").items():
        assert not touched(task, DEV), name


def test_six_tasks_share_neither_data_nor_family_with_any_shipped_config():
    import importlib

    data, families = set(), set()
    for path in (Path(tasks.__file__).parents[1] / "meta_train/configs").glob("[a-z]*.py"):
        for group in importlib.import_module(f"meta_train.configs.{path.stem}").RUN.groups:
            found = trace(tasks.make(group.family, **group.settings))
            data |= set(found.data)
            families |= set(found.families)
    assert data
    assert families
    new = [n for n, t in traced("heldout").items() if not set(t.data) & data and not set(t.families) & families]
    assert len(new) >= 6
    said = [p.name for p in SUITES["heldout"] if p.note.startswith(suites.BOTH)]
    assert set(said) <= set(new)


@pytest.mark.parametrize("suite", sorted(CAPS))
def test_flops_are_under_the_cap(suite):
    for name, (p, task) in made(suite).items():
        assert 0 < run_flops(task, p.num_steps) <= CAPS[suite], name


def test_flops_by_hand():
    import jax.numpy as jnp

    def f(a, b):  # a product of 2·3·4·5, and tanh of 15 numbers; three times
        return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(a @ b), jnp.zeros((3, 5)))

    counted = flops(jax.make_jaxpr(f)(jnp.zeros((3, 4)), jnp.zeros((4, 5))).jaxpr)
    assert 3 * (120 + 15) <= counted <= 3 * (120 + 15) + 40  # and the loop's counter, and the zeros


@functools.cache
def fingerprint(suite: str, name: str) -> Numbers:
    return numbers_of(made(suite)[name][1])


def fingerprints(suite: str, slow: bool) -> dict[str, list]:
    """Task -> shapes, horizon and, of cheap ones or of all, numbers."""
    out = {}
    for name, (p, task) in made(suite).items():
        wanted = slow or run_flops(task, 1) < SLOW_LOSS
        home = "mini" if p in SUITES["mini"] else suite  # heldout has all of mini
        out[name] = [shape_of(task), p.num_steps, fingerprint(home, name) if wanted else None]
    return out


def as_text(found: dict[str, dict[str, list]]) -> str:
    """JSON, a line a task."""
    blocks = []
    for suite, held in found.items():
        lines = ",\n".join(f'  "{name}": {json.dumps(one)}' for name, one in held.items())
        blocks.append(f' "{suite}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def check(suite: str, slow: bool) -> None:
    held = json.loads(FINGERPRINTS.read_text())[f"{suite}-v{VERSIONS[suite]}"]
    found = fingerprints(suite, slow)
    assert set(held) == set(found)
    for name, (shape, steps, numbers) in found.items():
        message = f"{suite}/{name} has changed: raise its version in meta_test/suites.py, or that of the task"
        assert held[name][:2] == [shape, steps], message
        if numbers is not None:
            assert not (other := differs(numbers, Numbers(**held[name][2]))), f"{message} ({other})"


@pytest.mark.parametrize("suite", sorted(set(CAPS) - {"heldout"}))
def test_no_task_changes_without_a_new_version(suite):
    check(suite, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("suite", sorted(CAPS))
def test_no_task_changes_without_a_new_version_all(suite):
    check(suite, slow=True)


def changes(task: tasks.Task) -> dict[str, tasks.Task]:
    """What a mistake makes of a task, by which the shapes stay as they are."""
    gradient = task.value_and_grad or jax.value_and_grad(task.loss)

    def climbing(*args):
        value, grads = gradient(*args)
        return value, jax.tree.map(jnp.negative, grads)

    def other_batch(key, phi, data, split):
        return task.batch(jax.random.fold_in(key, 1) if split == "train" else key, phi, data, split)

    return {
        "climbs": task._replace(value_and_grad=climbing),
        "larger gradients": task._replace(grad_transform=optax.scale(1.01)),
        "other minibatches": task._replace(batch=other_batch),
        "another loss": task._replace(loss=lambda *args: 1.01 * task.loss(*args)),
    }


def assert_told_apart(suite: str, name: str, names: Sequence[str]) -> None:
    task, held = made(suite)[name][1], fingerprint(suite, name)
    assert not differs(held, Numbers(**json.loads(json.dumps(held._asdict()))))
    for change in names:
        assert differs(numbers_of(changes(task)[change]), held), change
        assert shape_of(changes(task)[change]) == shape_of(task), change


def test_a_changed_task_has_another_fingerprint():
    task = made("smoke")["digits"][1]
    assert shape_of(task) != shape_of(task._replace(version=2))
    assert shape_of(task) != shape_of(tasks.make("image_mlp", data="digits", hidden=(17,)))
    assert_told_apart("smoke", "digits", ["climbs", "other minibatches"])
    half = task._replace(eval_batches=lambda *args: jax.tree.map(lambda x: x[1:], task.eval_batches(*args)))
    assert differs(numbers_of(half), fingerprint("smoke", "digits")) == "losses, seen, batches"  # evaluated on others


def test_batches_are_told_apart_by_order_sign_and_size():
    x = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    held = Numbers([1.0], [1.0], [[sums(x), sums(np.arange(64))]])

    def other(x, y):
        return differs(held._replace(batches=[[sums(x), sums(y)]]), held)

    assert other((x * (1 + 1e-6)).astype(np.float32), np.arange(64)) == ""  # of another machine
    for one in (x[::-1], -x, 1.01 * x, x + 0.01):
        assert other(one, np.arange(64)) == "batches"
    for one in (np.arange(64)[::-1], np.arange(64) + (np.arange(64) == 3)):
        assert other(x, one) == "batches"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "graph", "diffusion", "gru"])
def test_a_changed_task_of_mini_has_another_fingerprint(name):
    assert_told_apart("mini", name, ["climbs", "larger gradients", "other minibatches", "another loss"])


if __name__ == "__main__":
    found = {}
    for suite in sorted(CAPS):
        of_suite = fingerprints(suite, slow=True)
        held = {name: [*one, numbers._asdict()] for name, (*one, numbers) in of_suite.items()}
        found[f"{suite}-v{VERSIONS[suite]}"] = held
    FINGERPRINTS.write_text(as_text(found))
