"""Suites: how many and how hard, what they share, what they cost, and that none changes unnoticed.

python -m tests.test_suites    # writes tests/fixtures/suites.json anew, after a version was raised
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import jax
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


SGD = Contender("sgd", lambda shared: optax.sgd(1e-3))


def losses_of(task: tasks.Task) -> list[float]:
    """Of seed 0, to three digits: of a batch at init; validation and test loss after two steps of SGD."""

    def first(key, data):
        phi, one = task.sample(key), runs.begin(task, SGD.make, (), {}, 0)
        before = task.loss(task.init(key, phi), key, phi, task.batch(key, phi, data, "train"))
        for t in range(2):
            one = runs.step(task, SGD, data, (), {}, 0, t, one)
        after = [runs.evaluate(task, data, split, one, metrics=False)["loss"] for split in ("validation", "test")]
        return [before, *after]

    compiled = jax.jit(first).lower(jax.random.key(0), task.data).compile(compiler_options=FAST)
    return [float(f"{float(x):.3g}") for x in compiled(jax.random.key(0), task.data)]


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


def fingerprints(suite: str, slow: bool) -> dict[str, list]:
    """Task -> shapes and, of cheap ones or of all, losses."""
    out = {}
    for name, (p, task) in made(suite).items():
        cheap = run_flops(task, 1) < SLOW_LOSS
        out[name] = [shape_of(task), p.num_steps, losses_of(task) if cheap or slow else None]
    return out


def check(suite: str, slow: bool) -> None:
    held = json.loads(FINGERPRINTS.read_text())[f"{suite}-v{VERSIONS[suite]}"]
    found = fingerprints(suite, slow)
    assert set(held) == set(found)
    for name, (shape, steps, losses) in found.items():
        message = f"{suite}/{name} has changed: raise its version in meta_test/suites.py, or that of the task"
        assert held[name][:2] == [shape, steps], message
        if losses is not None:
            np.testing.assert_allclose(losses, held[name][2], rtol=5e-3, err_msg=message)


@pytest.mark.parametrize("suite", sorted(set(CAPS) - {"heldout"}))
def test_no_task_changes_without_a_new_version(suite):
    check(suite, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("suite", sorted(CAPS))
def test_no_task_changes_without_a_new_version_all(suite):
    check(suite, slow=True)


def test_a_changed_task_has_another_fingerprint():
    task = made("smoke")["digits"][1]
    assert shape_of(task) != shape_of(task._replace(version=2))
    assert shape_of(task) != shape_of(tasks.make("image_mlp", data="digits", hidden=(17,)))
    doubled = task._replace(loss=lambda *args: 2 * task.loss(*args))
    assert shape_of(task) == shape_of(doubled)
    before = losses_of(task)
    assert all(a != b for a, b in zip(before, losses_of(doubled), strict=True))
    half = task._replace(eval_batches=lambda *args: jax.tree.map(lambda x: x[:1], task.eval_batches(*args)))
    clipped = task._replace(grad_transform=optax.scale(1e3))
    for other in (half, clipped):  # what is evaluated, what the optimizer sees
        after = losses_of(other)
        assert after[0] == before[0]
        assert after[1:] != before[1:]


if __name__ == "__main__":
    FINGERPRINTS.write_text(
        json.dumps({f"{s}-v{VERSIONS[s]}": fingerprints(s, slow=True) for s in sorted(CAPS)}, indent=1) + "\n"
    )
