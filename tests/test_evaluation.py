"""lopt-eval run, tune, report and sweep: who takes part, tuning, cells, standings, the report, the command line."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
import types
import zlib
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
import tasks
from lopt import baselines, rules
from lopt.baselines.base import Baseline, Space
from meta_test import (
    cells,
    cli,
    commands,
    drawing,
    entrants,
    metrics,
    page,
    runs,
    session,
    standings,
    suites,
    sweep,
    tuning,
)
from meta_test.cells import Cell
from meta_test.entrants import Entrant
from meta_test.runs import CURVES, Contender, Curves
from meta_test.suites import Problem
from meta_test.tuning import Point
from tasks.base import Task

INF, NAN = math.inf, math.nan
LR = Space(1e-3, 1.0, True, 0.1)
TINY = Problem("quadratic", {"dim": 4}, 20, "tiny", "tiny")


def entrant(**space: Space) -> Entrant:
    return Entrant(
        "sgd", Contender("sgd", lambda shared, *, num_steps, cosine, lr: optax.sgd(lr)), "1", space or {"lr": LR}
    )


def plain_sgd(num_steps):
    """A user's optimizer."""
    return optax.sgd(0.05)


TUNABLE = Baseline("mine", lambda *, num_steps, schedule, lr: optax.sgd(lr), {"lr": LR})
NOT_ONE = 3


# Who takes part.


def test_resolve_finds_all_kinds(tmp_path):
    rule = rules.make("tiny")
    folder = lopt.save(tmp_path / "mine" / "artifact", rule, rule.init_theta(jax.random.key(0)), provenance={}, card="")
    learned, own = entrants.resolve(str(folder)), entrants.resolve("tests.test_evaluation:plain_sgd")
    assert (learned.name, learned.tuned, own.tuned) == ("mine/artifact", False, False)
    assert entrants.resolve("lopt:quickstart").name == "lopt:quickstart"
    tuned = entrants.resolve("tests.test_evaluation:TUNABLE")
    assert (tuned.name, list(tuned.space)) == ("tests.test_evaluation:TUNABLE", ["lr"])
    adamw = entrants.resolve("adamw")
    assert adamw.tuned
    assert adamw.schedules == ("constant", "cosine")
    assert entrants.resolve("schedule_free_adamw").schedules == ("constant",)
    assert entrants.resolve("schedule_free_adamw").contender.eval_params is not None
    other = lopt.save(tmp_path / "other" / "artifact", rule, rule.init_theta(jax.random.key(1)), provenance={}, card="")
    assert entrants.resolve(str(other)).version != learned.version  # other weights are another optimizer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adamww", "Did you mean 'adamw'"),
        ("quickstart", "valid: lopt:quickstart"),
        ("lopt:quikstart", "quickstart"),
        ("tests.test_evaluation:nothing", "has no function 'nothing'"),
        ("tests.test_evaluation:NOT_ONE", "has no function 'NOT_ONE'"),
        ("no_such_module:f", "No module named"),
        ("optax:adam", "Wrap it in a file of yours: def mine(num_steps): return optax.adam(learning_rate=…)"),
    ],
)
def test_resolve_refuses(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        entrants.resolve(spec)


def linear_task() -> Task:
    """loss = p · b from p = 1, b normal about 3 on each batch; evaluated at b = 3."""
    return Task(
        data=(),
        sample=lambda key: jnp.zeros(()),
        init=lambda key, phi: jnp.ones(()),
        batch=lambda key, phi, data, split: 3 + jax.random.normal(key, ()),
        loss=lambda p, key, phi, batch: p * batch,
        eval_batches=lambda phi, data, split: jnp.full((1,), 3.0),
    )


def moved(contender: Contender, exams=()) -> Curves:
    """Steps 0, 1, 2 of seeds 0 and 1: losses are three times p, on every split."""
    program = runs.prepare(contender, linear_task(), 2)
    return runs.run(program, {}, np.arange(2), np.arange(3), exams, lambda n: None)


def test_functions_of_the_same_batch_are_given_to_who_needs_them():
    def update(grads, state, params, *, value, **extra):
        if "grad_fn" not in extra:
            return -grads, state
        # Linear: the gradient is the batch everywhere, and the loss the batch times what it is taken at.
        assert set(extra) == {"grad_fn", "value_fn", "key"}
        wrong = jnp.abs(extra["grad_fn"](params + 1) - grads) + jnp.abs(extra["value_fn"](params) - value)
        wrong += 3 + jax.random.normal(extra["key"], ()) == grads  # draws of its own, not those of the batch
        return -(extra["value_fn"](jnp.ones(())) + 100 * wrong), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    needy = Contender("needy", lambda shared: tx, needs=frozenset({"grad_fn"}))
    plain = moved(Contender("plain", lambda shared: tx))
    np.testing.assert_allclose(moved(needy).losses["train"], plain.losses["train"], rtol=1e-5)


def test_averages_are_what_is_evaluated():
    tx = lambda shared: optax.sgd(0.1)  # noqa: E731
    plain = moved(Contender("plain", tx))
    shifted = moved(Contender("shifted", tx, eval_params=lambda state, params: params + 1), (2,))
    for split in CURVES:
        np.testing.assert_allclose(shifted.losses[split], plain.losses[split] + 3, rtol=1e-5)
    np.testing.assert_allclose(shifted.test["loss"][:, 0], shifted.losses["validation"][:, 2], rtol=1e-6)


# Tuning.


def test_the_grid_is_rates_by_schedules_by_choices():
    points = tuning.grid(entrant(lr=LR))
    assert len(points) == 2 * tuning.LRS == len({(p.schedule, *p.hyper.values()) for p in points})
    lrs = [p.hyper["lr"] for p in points[: tuning.LRS]]
    np.testing.assert_allclose(np.diff(np.log(lrs)), math.log(1000) / (tuning.LRS - 1))
    np.testing.assert_allclose([lrs[0], lrs[-1]], [1e-3, 1.0])
    decay = Space(0.0, 0.1, False, 0.0, (0.0, 0.01, 0.1))
    assert len(tuning.grid(entrant(lr=LR, weight_decay=decay, b1=Space(0.5, 0.99, False, 0.9)))) == 3 * len(points)
    assert {p.hyper["alpha"] for p in tuning.grid(entrant(alpha=Space(1, 12, False, 5)))} == set(range(1, 13))
    for name in ("adamw", "nadamw", "sgd"):
        assert {p.hyper["weight_decay"] for p in tuning.grid(entrants.resolve(name))} == {0.0, 0.01, 0.1}


def test_trials_are_a_head_of_more_and_inside():
    one = entrant(lr=LR, b=Space(0.5, 0.9, False, 0.6), c=Space(0, 2, False, 0, (0, 1, 2)))
    many = tuning.trials(one, 100)
    assert tuning.trials(one, 10) == many[:10]
    lrs, bs = (np.array([p.hyper[name] for p in many]) for name in ("lr", "b"))
    assert lrs.min() >= 1e-3
    assert lrs.max() <= 1.0
    assert abs(np.log10(lrs).mean() + 1.5) < 0.3  # log-uniform; uniform it would be about -0.4
    assert abs(bs.mean() - 0.7) < 0.05
    assert {p.hyper["c"] for p in many} == {0, 1, 2}
    assert {p.schedule for p in many} == {"constant", "cosine"}


class FakeBench:
    """Final losses are a function of point and seed, in training another if there is one; counts runs."""

    def __init__(self, one: Entrant, loss, train=None) -> None:
        self.entrant, self.by_split, self.ran = one, {"train": train or loss, "validation": loss}, []

    def run(self, points, seeds, horizon, steps, exams) -> Curves:
        self.ran += [(p.hyper.get("lr"), p.schedule, seed) for p in points for seed in seeds]
        finals = {
            split: np.array([[loss(p, seed) for seed in seeds] for p in points], float)
            for split, loss in self.by_split.items()
        }
        losses = {split: np.repeat(x[:, :, None], len(steps), 2) for split, x in finals.items()}
        return Curves(steps, losses, {"loss": finals["validation"][:, :, None] + 100})


def bowl(best: float, schedule: str = "cosine"):
    """Least at a learning rate and a schedule."""
    return lambda p, seed: 1 + math.log(p.hyper["lr"] / best) ** 2 + (p.schedule != schedule)


def tuned(loss, search: str = "grid", train=None) -> tuple[FakeBench, dict]:
    bench = FakeBench(entrant(), loss, train)
    return bench, tuning.tune(bench, Cell(TINY, "sgd", search, 1), 5)


def test_tuning_finds_the_best_and_runs_it_on_other_seeds():
    bench, record = tuned(bowl(0.0123))
    lrs = tuning.first_axis(bench.entrant)[1]
    nearest = lrs[np.abs(np.log(lrs / 0.0123)).argmin()]
    chosen = record["rows"][""]["chosen"]["validation"]
    np.testing.assert_allclose(chosen["hyper"]["lr"], nearest)
    assert chosen["schedule"] == "cosine"
    assert record["edge"] == {"train": False, "validation": False}
    tried = [run for run in bench.ran if run[2] in tuning.TUNING_SEEDS]
    assert len([run for run in tried if run[2] == tuning.TUNING_SEEDS[0]]) == len(set(tried[:24])) == 24
    assert len(tried) == 24 + 2 * tuning.FINALISTS
    assert {run[2] for run in bench.ran if run not in tried} == set(range(5))
    assert not set(range(5)) & set(tuning.TUNING_SEEDS)


def near(rate: float) -> float:
    lrs = tuning.first_axis(entrant())[1]
    return lrs[np.abs(np.log(lrs / rate)).argmin()]


def test_each_column_has_its_own_choice():
    """Training loss is least elsewhere: who confuses the splits is seen."""
    _, record = tuned(validation := bowl(0.0123), train=bowl(0.2, "constant"))
    row = record["rows"][""]
    expected = {"validation": (near(0.0123), "cosine"), "train": (near(0.2), "constant")}
    for split, (lr, schedule) in expected.items():
        assert row["chosen"][split] == {"hyper": {"lr": pytest.approx(lr)}, "schedule": schedule}
        least = 1 + math.log(lr / {"validation": 0.0123, "train": 0.2}[split]) ** 2
        np.testing.assert_allclose(cells.array(row["losses"][split]), least, rtol=1e-4)
    test = cells.array(row["test"]["loss"])
    np.testing.assert_allclose(
        test, 100 + cells.array(row["losses"]["validation"])[:, 0], rtol=1e-4
    )  # of validation's choice
    points = tuning.grid(entrant())
    drawn = np.random.default_rng(zlib.crc32(b"tiny")).permutation(len(points))[: tuning.TRIALS]
    best = min((points[i] for i in drawn), key=lambda p: validation(p, 0))
    for chosen in record["rows"]["10 trials"]["chosen"].values():
        assert chosen == cells.plain(best)


def test_a_sweep_chooses_on_validation_loss(monkeypatch):
    monkeypatch.setattr(tuning, "Bench", lambda one, task, tick: FakeBench(one, bowl(0.0123), bowl(0.2, "constant")))
    todo = [TINY._replace(note="a"), TINY._replace(note="b", settings={"dim": 5})]
    (line,) = sweep.lines(todo, [entrant()], 2, lambda text: None)
    assert line.chosen == f"lr {near(0.0123):.4g}, cosine"
    np.testing.assert_allclose(line.finals, np.full((2, 2), 1 + math.log(near(0.0123) / 0.0123) ** 2))


def test_a_bench_is_a_plain_loop(monkeypatch):
    """Rates, decays and schedules of SGD against optax in a loop of one's own."""
    monkeypatch.setattr(tuning, "RUNS", 2)  # on two devices of eight: four chunks, and less to compile
    task, num_steps = tasks.make("quadratic", dim=4, log10_noise=(-1.0, -0.5)), 20
    points = [
        Point({"lr": lr, "weight_decay": decay}, schedule)
        for lr, decay in ((0.05, 0.0), (0.4, 0.1))
        for schedule in ("constant", "cosine")
    ]
    bench = tuning.Bench(entrants.resolve("sgd"), task, lambda updates: None)
    found = bench.run(points, (0, 7), num_steps, np.array([0, 5, num_steps]), (num_steps,))
    # The warm-up is one step, a twentieth of 20; then from 1 to 0 in the 19 that are left.
    cosine = [1.0, *(0.5 * (1 + math.cos(math.pi * t / 19)) for t in range(19))]
    factors = {"constant": jnp.ones(num_steps), "cosine": jnp.array(cosine)}

    @jax.jit
    def loop(seed, lr, decay, factor):
        key = jax.random.key(seed)
        phi = task.sample(jax.random.fold_in(key, 0))
        tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(lambda count: lr * factor[count]))
        params = task.init(jax.random.fold_in(key, 1), phi)

        def one(carry, t):
            params, state = carry
            batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), t))
            batch = task.batch(batch_key, phi, (), "train")
            updates, state = tx.update(jax.grad(task.loss)(params, loss_key, phi, batch), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), 0.5 * params @ phi.hessian @ params

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(num_steps))[1]

    for i, point in enumerate(points):
        for j, seed in enumerate((0, 7)):
            expected = loop(seed, point.hyper["lr"], point.hyper["weight_decay"], factors[point.schedule])
            np.testing.assert_allclose(found.losses["validation"][i, j, 1:], expected[np.array([4, 19])], rtol=2e-4)
            np.testing.assert_allclose(found.test["loss"][i, j, 0], expected[-1], rtol=2e-4)
    finals = found.losses["validation"][:, :, -1]
    assert len(np.unique(finals.round(6))) == finals.size  # the points can be told apart


def test_training_is_on_training_batches():
    """Batches 1, 2 and 5 of the three splits, p from 1: two steps of 0.1 on training batches leave 0.8."""
    values = {"train": 1.0, "validation": 2.0, "test": 5.0}
    task = linear_task()._replace(
        batch=lambda key, phi, data, split: jnp.asarray(values[split]),
        eval_batches=lambda phi, data, split: jnp.full((1,), values[split]),
    )
    program = runs.prepare(Contender("sgd", lambda shared: optax.sgd(0.1)), task, 1)
    found = runs.run(program, {}, np.arange(1), np.array([0, 2]), (2,), lambda n: None)
    np.testing.assert_allclose(found.losses["train"], [[1.0, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(found.losses["validation"], [[2.0, 1.6]], rtol=1e-6)
    np.testing.assert_allclose(found.test["loss"], [[4.0]], rtol=1e-6)


def test_a_point_that_is_lucky_on_one_seed_is_not_chosen():
    good = bowl(0.0123)
    first = tuning.grid(entrant())

    def lucky(p, seed):  # another point is far better on the first tuning seed, and worse on the others
        extra = -8 if seed == tuning.TUNING_SEEDS[0] else 8
        return good(p, seed) + extra * (p == first[8])

    _, record = tuned(lucky)
    assert record["rows"][""]["chosen"]["validation"]["schedule"] == "cosine"
    finals = cells.array(record["finals"]["validation"])
    assert np.nanargmin(finals[:, 0]) == 8  # who looks at one seed is taken in


@pytest.mark.parametrize("best", [30.0, 3e-5])
def test_the_grid_is_extended_where_its_best_is_at_the_edge(best):
    _, record = tuned(bowl(best))
    found = record["rows"][""]["chosen"]["validation"]["hyper"]["lr"]
    assert abs(math.log(found / best)) <= math.log(1000) / 11 / 2 + 1e-6
    assert not record["edge"]["validation"]
    assert len(record["points"]) > 24


def test_an_edge_that_is_never_left_is_flagged():
    bench, record = tuned(lambda p, seed: 1 / p.hyper["lr"])
    assert record["edge"] == {"train": True, "validation": True}
    assert len(record["points"]) == 24 + 2 * tuning.EXTENSIONS * tuning.EXTENSION
    assert tuning.beyond(tuning.grid(bench.entrant), [5], bench.entrant) == []


def test_a_method_without_a_learning_rate_is_extended_in_its_first_parameter():
    cell = Cell(TINY, "cocob", "grid", 1)
    alone = entrant()._replace(space={"alpha": Space(10.0, 1000.0, True, 100.0), "b": Space(0.1, 1.0, False, 0.5)})
    record = tuning.tune(FakeBench(alone, lambda p, seed: abs(math.log(p.hyper["alpha"] / 5000))), cell, 5)
    assert record["rows"][""]["chosen"]["validation"]["hyper"]["alpha"] == pytest.approx(5000, rel=0.25)
    assert not record["edge"]["validation"]
    record = tuning.tune(FakeBench(alone, lambda p, seed: 1 / p.hyper["alpha"]), cell, 5)
    assert standings.ends({"cell": ["tiny", "cocob", "grid", 1], **record}, "validation") == ["alpha"]


def test_divergence_is_never_chosen_and_all_diverged_is_a_result():
    _, record = tuned(
        lambda p, seed: NAN if p.hyper["lr"] > 0.05 or seed == tuning.TUNING_SEEDS[1] else bowl(9)(p, seed)
    )
    assert record["status"] == "done"
    _, record = tuned(lambda p, seed: NAN if p.hyper["lr"] > 0.05 else bowl(9)(p, seed))
    assert record["rows"][""]["chosen"]["validation"]["hyper"]["lr"] < 0.05
    _, record = tuned(lambda p, seed: NAN)
    assert record["status"] == "done"
    assert record["rows"][""]["losses"]["train"][0][0] is None


def test_small_budgets():
    _, record = tuned(bowl(0.0123))
    assert record["rows"]["1 trial"]["chosen"]["validation"] == {"hyper": {"lr": 0.1}, "schedule": "cosine"}
    finals, points = np.arange(24.0)[:, None], tuning.grid(entrant())
    drawn = {tuning.ten_trials(points, finals, draw) for draw in range(200)}
    assert 0 in drawn  # with probability 10/24
    assert max(drawn) <= 14  # ten of 24: at least one is among the best 15
    assert tuning.ten_trials(points, finals, 3) == tuning.ten_trials(points, finals, 3)
    hits = [tuning.ten_trials(points, finals, draw) == 0 for draw in range(2000)]
    np.testing.assert_allclose(np.mean(hits), 10 / 24, atol=0.04)
    _, random = tuned(bowl(0.0123), "random-10")
    assert len(random["points"]) == 10
    assert list(random["rows"]) == [""]


def test_least_mean_rank():
    points = [Point({"lr": lr}, "cosine") for lr in (1.0, 2.0, 3.0)]
    # Mean ranks 2, 2 and 2 on the first three, of which the first counts; the least mean loss would be the third's.
    # With the last 2⅛, 1¾ and 2⅛.
    finals = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [100.0, 101.0, 1.0], [NAN, 1.0, INF]])
    assert session.least_mean_rank(points, finals[:3]) == points[0]
    assert session.least_mean_rank(points, finals[1:3]) == points[2]  # 2½, 2 and 1½
    assert session.least_mean_rank(points, finals) == points[1]
    assert finals[:3].mean(0).argmin() == 2


# Cells.


def inputs(**changed):
    values = {"cell": Cell(TINY, "sgd", "grid", 1), "entrant": entrant(), "task": linear_task(), "seeds": 5} | changed
    return tuning.inputs(*values.values())


def test_a_key_changes_with_whatever_matters():
    keys = {
        cells.key_of(one)
        for one in (
            inputs(),
            inputs(seeds=4),
            inputs(cell=Cell(TINY, "sgd", "grid", 2)),
            inputs(cell=Cell(TINY, "sgd", "random-10", 1)),
            inputs(cell=Cell(TINY._replace(num_steps=21), "sgd", "grid", 1)),
            inputs(cell=Cell(TINY._replace(settings={"dim": 5}), "sgd", "grid", 1)),
            inputs(entrant=entrant()._replace(version="2")),
            inputs(entrant=entrant()._replace(name="other")),
            inputs(entrant=entrant()._replace(schedules=("constant",))),
            inputs(entrant=entrant(lr=LR._replace(high=2.0))),
            inputs(task=linear_task()._replace(version=2)),
            inputs(task=linear_task()._replace(provenance=(tasks.Source("x", "y"),))),
        )
    }
    assert len(keys) == 12
    assert cells.key_of({"a": 1, "b": (2.0, None)}) == cells.key_of({"b": [2.0, None], "a": 1})
    note = Cell(TINY._replace(note="other words"), "sgd", "grid", 1)
    assert cells.key_of(inputs(cell=note)) == cells.key_of(inputs())


def test_records_survive_and_changed_ones_are_refused(tmp_path):
    cell, given = Cell(TINY, "a/b:c", "grid", 1), inputs()
    key = cells.key_of(given)
    record = {"inputs": given, "status": "done", "x": np.array([1.0, NAN, INF])}
    path = cells.write(tmp_path / cells.folder_of("mini"), cells.file_of(cell, key), record)
    assert cells.find([tmp_path], cell, key) == path
    assert cells.find([tmp_path], cell, cells.key_of(inputs(seeds=4))) is None
    assert cells.read(path)["x"] == [1.0, None, None]
    assert not list(path.parent.glob(".*"))
    path.write_text(path.read_text().replace('"seeds":[[1000', '"seeds":[[1001'))
    with pytest.raises(ValueError, match="was changed"):
        cells.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no record"):
        cells.read(path)


def test_rounded():
    assert cells.rounded({"a": np.array([[1.2345678, NAN]]), "b": (INF, 3)}) == {"a": [[1.2346, None]], "b": [None, 3]}


@functools.cache
def shipped_once(suite: str, optimizer: str):
    todo = session.jobs(suites.SUITES[suite], [entrants.resolve(optimizer)])
    folder = cells.SHIPPED / cells.folder_of(suite)
    return session.once(todo[-1], todo, session.Store(None, folder, (folder,)), session.SEEDS)


def test_records_that_ship_are_of_what_is_here():
    """A key that nobody asks for any more is dead weight: tune again, or remove it."""
    paths = sorted(cells.SHIPPED.glob("*/*.json"))
    assert paths
    assert sum(path.stat().st_size for path in paths) < 8e6
    made = {}
    for path in paths:
        record, suite = cells.read(path), path.parent.name.rsplit("-v", 1)[0]
        assert path.parent.name == cells.folder_of(suite)
        name, optimizer, search, part = record["cell"]
        problem = next(p for p in suites.SUITES[suite] if p.name == name)
        if name not in made:
            made[name] = tasks.make(problem.family, **problem.settings)
        point = None
        if search == "once":  # chosen anew from what ships
            point = shipped_once(suite, optimizer)
        assert record["optax"], path
        cell = Cell(problem, optimizer, search, part)
        assert record["status"] == "done"
        now = tuning.inputs(cell, entrants.resolve(optimizer), made[name], session.SEEDS, point)
        assert path.name == cells.file_of(cell, cells.key_of(now)), path


def fill(tmp_path, monkeypatch, tune, names=("adamw", "sgd"), problems=(TINY,), store=None):
    """Fill with a function in place of `tuning.tune`; returns counts, what was computed, what was said."""
    computed, said = [], []

    def counted(bench, cell, seeds, point=None):
        computed.append((cell.problem.name, cell.label))
        return tune(bench, cell, seeds, point)

    monkeypatch.setattr(tuning, "tune", counted)
    monkeypatch.setattr(session.jax, "clear_caches", lambda: None)
    todo = session.jobs(problems, [entrants.resolve(name) for name in names])
    store = store or session.Store(tmp_path, tmp_path, (tmp_path,))
    counts = session.fill(todo, store, 5, lambda s, note: None, said.append)
    return counts, computed, said


def finals_record(bench, cell, seeds, point):
    finals = {split: np.arange(len(tuning.grid(bench.entrant)), dtype=float)[:, None] for split in CURVES}
    return {"status": "done", "finals": finals, "rows": {}, "point": point}


def test_an_interrupted_session_resumes_at_the_next_cell(tmp_path, monkeypatch):
    def interrupted(bench, cell, seeds, point):
        if cell.part == 3:
            raise KeyboardInterrupt
        return finals_record(bench, cell, seeds, point)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, monkeypatch, interrupted)
    counts, computed, _ = fill(tmp_path, monkeypatch, finals_record)
    assert computed == [("tiny", "adamw, T/3"), ("tiny", "sgd"), ("tiny", "adamw, once")]
    assert counts == {"kept": 2, "computed": 3, "failed": 0}
    counts, computed, _ = fill(tmp_path, monkeypatch, finals_record)
    assert (counts["kept"], computed) == (5, [])


def test_a_crash_is_a_result(tmp_path, monkeypatch):
    def crashing(bench, cell, seeds, point):
        if cell.optimizer == "sgd":
            raise RuntimeError("out of luck")
        return finals_record(bench, cell, seeds, point)

    counts, _, said = fill(tmp_path, monkeypatch, crashing)
    assert counts == {"kept": 0, "computed": 5, "failed": 1}
    assert said == ["tiny, sgd: crashed: RuntimeError: out of luck"]
    (crashed,) = tmp_path.glob("*--sgd--*")  # in the folder of the run
    assert json.loads(crashed.read_text())["status"] == "crashed"
    counts, computed, _ = fill(tmp_path, monkeypatch, finals_record)
    assert (counts["kept"], computed) == (4, [("tiny", "sgd")])  # it is tried again, and what ended replaces it
    assert json.loads(crashed.read_text())["status"] == "done"


def test_no_crash_is_kept_in_a_cache(tmp_path, monkeypatch):
    def crashing(bench, cell, seeds, point):
        raise MemoryError

    cache, own = tmp_path / "cache", tmp_path / "own"
    for place in (None, own):
        counts, *_ = fill(tmp_path, monkeypatch, crashing, store=session.Store(place, cache, (cache,)))
        assert counts["failed"] == 5
    assert not cache.exists()
    assert len(list(own.iterdir())) == 5
    # What is found in a cache is copied to a run, and to none when a cache is filled.
    fill(tmp_path, monkeypatch, finals_record, store=session.Store(None, cache, (cache,)))
    before = sorted(path.name for path in cache.iterdir())
    counts, *_ = fill(tmp_path, monkeypatch, finals_record, store=session.Store(own, tmp_path / "new", (own, cache)))
    assert counts["kept"] == 5
    assert sorted(path.name for path in own.iterdir()) == before
    assert not (tmp_path / "new").exists()


def test_a_torn_copy_of_a_record_costs_nothing(tmp_path, monkeypatch):
    """Of the run's own folder; what a cache holds is nobody's to write over."""
    own, cache = tmp_path / "own", tmp_path / "cache"
    store = session.Store(own, cache, (own, cache))
    assert fill(tmp_path, monkeypatch, finals_record, store=store)[0]["computed"] == 5
    whole = {path.name: path.read_text() for path in own.iterdir()}
    assert whole == {path.name: path.read_text() for path in cache.iterdir()}
    torn = sorted(whole)[1]
    (own / torn).write_text(whole[torn][:40])
    counts, computed, said = fill(tmp_path, monkeypatch, finals_record, store=store)
    assert (counts["kept"], computed) == (5, [])
    (line,) = said
    assert str(own / torn) in line
    assert line.endswith("It is passed over and written anew.")
    assert "\n" not in line
    assert (own / torn).read_text() == whole[torn]
    # Without a good one elsewhere it is computed again.
    (own / torn).write_text("")
    (cache / torn).unlink()
    counts, computed, said = fill(tmp_path, monkeypatch, finals_record, store=store)
    assert (counts["kept"], len(computed), len(said)) == (4, 1, 1)
    assert (own / torn).read_text() == whole[torn]
    (cache / torn).write_text("")
    (own / torn).unlink()
    with pytest.raises(ValueError, match="is no record"):
        fill(tmp_path, monkeypatch, finals_record, store=store)


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    """Killed while it is written, what stood there stays."""
    (tmp_path / "own").mkdir()
    for place, text in (("a.json", "new"), ("own/a.json", "old")):
        (tmp_path / place).write_text(text)

    def killed(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cells.copy(tmp_path / "a.json", tmp_path / "own")
    assert (tmp_path / "own/a.json").read_text() == "old"
    monkeypatch.undo()
    assert cells.copy(tmp_path / "a.json", tmp_path / "own").read_text() == "new"


def test_where_ones_own_record_was_found_is_said(tmp_path, monkeypatch):
    own = "tests.test_evaluation:plain_sgd"
    monkeypatch.chdir(Path(__file__).parents[1])
    done = lambda *args: {"status": "done"}  # noqa: E731
    assert fill(tmp_path, monkeypatch, done, (own,))[2] == []
    (said,) = fill(tmp_path, monkeypatch, done, (own,))[2]
    assert str(tmp_path) in said
    assert "to run it again remove it" in said


def test_caches_are_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parse = cli._parser().parse_args
    assert commands.cache_of(parse(["tune"])) == tmp_path / "lopt/eval/mini-v1"
    assert commands.cache_of(parse(["run", "--optimizers", "sgd", "--out", "x"])) == tmp_path / "lopt/eval/mini-v1"
    assert commands.cache_of(parse(["tune", "--cache", str(tmp_path / "c")])) == tmp_path / "c/mini-v1"
    assert commands.cache_of(parse(["tune", "--ship"])) == cells.SHIPPED / "mini-v1"
    with pytest.raises(ValueError, match="--ship, got --cache too"):
        commands.cache_of(parse(["tune", "--ship", "--cache", "c"]))


def test_more_seeds_are_told_what_they_cost(tmp_path, capsys):
    todo = session.jobs([TINY], [entrants.resolve("sgd")], 6)
    store = session.Store(None, tmp_path, (tmp_path,))
    commands._warn_of_seeds(todo, store, 6)
    assert not capsys.readouterr().err  # nothing is lost
    cells.write(tmp_path, cells.file_of(todo[0].cell, "0123456789abcdef"), {})
    commands._warn_of_seeds(todo, store, 6)
    assert "--seeds 6: of 1 cells" in (said := capsys.readouterr().err)
    assert commands.span(session.seconds(todo)) in said
    commands._warn_of_seeds(todo, store, 5)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "settings", "deterministic"),
    [
        ("synthetic", {"dim": 4}, True),
        ("synthetic", {"dim": 4, "noise": 0.1}, False),
        ("synthetic", {"dim": 4, "noise": (0.01, 0.1)}, False),
        ("es", {"task": "quadratic", "settings": {"dim": 4, "log10_noise": None}, "pairs": 4}, False),
        ("quadratic", {"dim": 4, "log10_noise": None, "augment": [("noise_gradient", {})]}, False),
        ("lasso", {"rows": 4, "columns": 8, "nonzeros": 2}, True),
    ],
)
def test_what_calls_itself_deterministic_has_one_gradient(family, settings, deterministic):
    task = tasks.make(family, **settings)
    phi = task.sample(jax.random.key(0))
    params = task.init(jax.random.key(1), phi)
    gradient = task.value_and_grad or jax.value_and_grad(task.loss)
    (_, a), (_, b) = (
        gradient(params, key, phi, task.batch(key, phi, task.data, "train"))
        for key in jax.random.split(jax.random.key(2))
    )
    assert task.deterministic == deterministic == bool((a == b).all())


def test_line_searches_run_where_nothing_is_random(tmp_path, monkeypatch):
    """And the property is true: two keys, one value."""
    monkeypatch.setattr(tuning, "RUNS", 1)
    for noise, status in ((None, "done"), ((-3.0, -1.0), "skipped")):
        task = tasks.make("quadratic", dim=4, log10_noise=noise)
        phi = task.sample(jax.random.key(0))
        params = task.init(jax.random.key(1), phi)
        a, b = (
            task.loss(params, key, phi, task.batch(key, phi, (), "train"))
            for key in jax.random.split(jax.random.key(2))
        )
        assert task.deterministic == (noise is None) == bool(a == b)
        problem = TINY._replace(settings={"dim": 4, "log10_noise": noise})
        todo = session.jobs([problem], [entrants.resolve("lbfgs")], 1)
        session.fill(todo, session.Store(tmp_path, tmp_path, ()), 1, lambda s, note: None, lambda text: None)
        records = [json.loads(path.read_text()) for path in tmp_path.glob("*lbfgs*")]
        (record,) = [one for one in records if one["inputs"]["task"][1]["log10_noise"] == cells.plain(noise)]
        assert record["status"] == status
        if status == "done":
            assert cells.array(record["rows"][""]["losses"]["validation"])[:, -1].max() < 1e-8
        with monkeypatch.context() as patched:
            patched.setattr(tuning, "Bench", lambda one, task, tick: FakeBench(one, lambda p, seed: 1.0))
            (line,) = sweep.lines([problem], [entrants.resolve("lbfgs")], 1, lambda text: None)
        assert (line.error == "") == np.isfinite(line.finals).all() == (status == "done")


def test_once_takes_the_rank_over_all_problems(tmp_path, monkeypatch):
    other = TINY._replace(name="other", settings={"dim": 5})

    def record(bench, cell, seeds, point):
        count = len(tuning.grid(bench.entrant))
        order = np.arange(count) if cell.problem.name == "tiny" else 1000.0 * np.roll(np.arange(count), 1)
        finals = {"train": -order[:, None], "validation": order[:, None]}
        return {"status": "done", "finals": finals, "rows": {}, "point": point}

    fill(tmp_path, monkeypatch, record, ("adamw",), (TINY, other))
    points = [cells.read(path)["point"] for path in tmp_path.glob("*once*")]
    assert len(points) == 2
    assert points[0] == points[1]
    # Ranks 1, 2, 3 … and count, 1, 2 …: the second and the first have means 1.5 and (1 + 72) / 2.
    assert points[0] == cells.plain(tuning.grid(entrants.resolve("adamw"))[1])


def test_what_a_run_consists_of():
    who = [entrants.resolve(name) for name in ("adamw", "muon", "tests.test_evaluation:plain_sgd")]
    labels = [job.cell.label for job in session.jobs([TINY], who)]
    own = "tests.test_evaluation:plain_sgd"
    assert labels == ["adamw", "adamw, T/2", "adamw, T/3", "muon", own, "adamw, once"]
    labels = [job.cell.label for job in session.jobs([TINY], who, trials=10)]
    assert labels == ["adamw, random-10", "muon, random-10", own]
    assert [job.cell.horizon for job in session.jobs([TINY], who)] == [20, 10, 6, 20, 20, 20]
    # One setting for a part of a suite would pass for one for all of it.
    assert "adamw, once" not in [job.cell.label for job in session.jobs([TINY], who, whole=False)]


def test_measure_counts_bytes_and_time():
    task = tasks.make("quadratic", dim=4)
    adam = entrant()._replace(contender=Contender("adam", lambda shared, *, num_steps, cosine, lr: optax.adam(lr)))
    (timing,) = session.in_turn({"adam": session.Stopwatch(adam, task, 20)}).values()
    assert timing.params_bytes == 16
    assert timing.state_bytes == 2 * 16 + 4  # two moments and a count
    assert 0 < timing.ms < 100


def test_a_timed_loop_holds_whole_periods_and_the_least_counts(monkeypatch):
    """By a clock of ours: loops of 20 steps take 5, 3, 2, 4 and 9 seconds, the two before them something else."""
    ticks = iter(np.cumsum([0, 7, 0, 1, 0, 5, 0, 3, 0, 2, 0, 4, 0, 9]).tolist())
    monkeypatch.setattr(session, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    watch = session.Stopwatch(entrants.resolve("adamw"), tasks.make("quadratic", dim=4), 20)
    assert session.in_turn({"adamw": watch})["adamw"].ms == pytest.approx(1e3 * 2 / 20)
    for seconds in (1e-7, 3e-5, 1.7e-3, 9.0):
        assert session.timed_steps(seconds) % 20 == 0
    assert session.timed_steps(1.7e-3) * 1.7e-3 >= session.TIMED_SECONDS


def test_loops_are_in_turn():
    class Watch:
        def __init__(self, name):
            self.loop = lambda: said.append(name) or len(said)
            self.timing = list

    said = []
    found = session.in_turn({"a": Watch("a"), "b": Watch("b")})
    assert said == ["a", "b"] * session.TIMINGS
    assert found == {"a": [1, 3, 5, 7, 9], "b": [2, 4, 6, 8, 10]}


def test_what_an_optimizer_asks_for_is_of_the_gradients_that_it_gets():
    task = tasks.make("quadratic", dim=4)
    noisy = task._replace(grad_transform=optax.add_noise(0.1, 0.5, 0))
    for name, lacks in (("sam", "gradients that nothing transforms"), ("adamw", ""), ("momo", "")):
        assert entrants.resolve(name).lacks(task) == ""
        assert entrants.resolve(name).lacks(noisy) == lacks


# Standings.


def curve_record(optimizer: str, curves, search="grid", part=1, problem="tiny", rows=None):
    given = {"cell": [problem, optimizer, search, part], "curves": np.shape(curves)}
    losses = {split: cells.rounded(np.asarray(curves, float)) for split in CURVES}
    one = {
        "chosen": {split: {"hyper": {"lr": 0.1}, "schedule": "cosine"} for split in CURVES},
        "losses": losses,
        "test": {"loss": [1.0, 2.0], "accuracy": [0.5, 0.7], "psnr": [20.0, 22.0]},
    }
    return {
        "inputs": given,
        "cell": [problem, optimizer, search, part],
        "status": "done",
        "steps": list(range(0, 10 * np.shape(curves)[-1], 10)),
        "rows": {"": one}
        | {
            name: {**one, "losses": {s: cells.rounded(np.asarray(c)) for s in CURVES}}
            for name, c in (rows or {}).items()
        },
        "edge": {"train": False, "validation": True} if search == "grid" else {},
    }


def levels(*values: float) -> np.ndarray:
    """Two seeds that stay 5 evaluations at each level."""
    return np.repeat([values, values], 5, axis=1).astype(float)


def make_run(folder: Path, records, timing=None, problems=(TINY,), suite="smoke-v1") -> Path:
    names = []
    for record in records:
        name, optimizer, search, part = record["cell"]
        cell = Cell(TINY._replace(name=name), optimizer, search, part)
        names.append(cells.file_of(cell, cells.key_of(record["inputs"])))
        cells.write(folder / standings.CELLS, names[-1], record)
    machine = {"cpu": "c", "cores": 2, "platform": "p", "python": "3", "jax": "0", "optax": "0"}
    about = {
        "suite": suite,
        "suite_size": 3,
        "seeds": 2,
        "command": "lopt-eval run",
        "date": "d",
        "wall_seconds": 1.0,
        "machine": machine,
    }
    about |= {"problems": {p.name: p._asdict() for p in problems}, "cells": names, "counts": {}}
    cells.write(folder, standings.ABOUT, about)
    if timing:
        cells.write(folder, standings.TIMING, {"timing": {p.name: timing for p in problems}})
    return folder


def timings(**ms: float):
    return {name: {"ms": value, "state_bytes": 32, "params_bytes": 16} for name, value in ms.items()}


CRASH = {
    "inputs": {"cell": "crash"},
    "cell": ["tiny", "bad", "grid", 1],
    "status": "crashed",
    "error": "RuntimeError: <out of luck>",
}


@pytest.fixture
def board(tmp_path) -> standings.Board:
    records = [
        curve_record("adamw", levels(4, 2, 1), rows={"10 trials": levels(4, 2, 2), "1 trial": levels(4, 4, 4)}),
        curve_record("adamw", levels(4, 1), part=2),
        curve_record("mine", levels(4, 1, 0.5), search="untuned"),
        curve_record("slow", levels(4, 3, 2)),
        curve_record("nans", np.full((2, 15), NAN)),
        CRASH,
    ]
    return standings.load([make_run(tmp_path / "a", records, timings(adamw=1.0, mine=4.0, slow=1.0, nans=1.0))])


def test_scores_by_hand(board):
    found = board.scores["tiny"]
    # Smoothed, a level is reached at the third evaluation of its five: the targets 1 at step 120.
    mine = found["mine"]
    assert found["adamw"].hit == {"train": 120, "validation": 120}
    assert mine.hit["validation"] == 70
    np.testing.assert_allclose(mine.speed_up["validation"], 120 / 70)
    np.testing.assert_allclose(mine.paired["validation"], [120 / 70] * 2)
    np.testing.assert_allclose(mine.wall["validation"], 120 / 70 / 4)  # four times as dear a step
    assert mine.final["validation"].tolist() == [0.5, 0.5]
    assert (found["slow"].hit["train"], found["slow"].speed_up["train"]) == (None, 0.0)
    assert found["nans"].diverged == 1.0
    assert found["nans"].speed_up["validation"] == 0.0
    assert found["adamw, T/2"].hit["validation"] == 70
    assert "bad" not in found


def test_totals_by_hand(board):
    labels = board.labels()
    assert labels == ["adamw", "mine", "bad", "nans", "slow"]
    totals = {t.label: t for t in standings.totals(board, labels)}
    np.testing.assert_allclose(totals["mine"].iqm["validation"], 120 / 70)
    np.testing.assert_allclose(totals["mine"].wall, 120 / 70 / 4)
    assert [totals[name].rank for name in ("mine", "adamw", "slow", "nans", "bad")] == [1, 2, 3, 4.5, 4.5]
    assert (totals["mine"].win, totals["slow"].win, totals["adamw"].win) == (1.0, 0.0, 0.5)
    # A crash counts: as never reached and as the worst loss. It has not diverged.
    assert (totals["bad"].iqm["validation"], totals["bad"].failed, totals["bad"].missing) == (0.0, 1, 0)
    assert math.isnan(totals["bad"].diverged)
    assert (totals["nans"].failed, totals["nans"].diverged) == (0, 1.0)
    assert (totals["mine"].relative_ms, totals["mine"].state_bytes) == (pytest.approx(4.0), 8.0)


def test_budgets_by_hand(board):
    found = {(one.optimizer, one.budget): one.total for one in standings.budgets(board)}
    speeds = [found["adamw", budget].iqm["validation"] for budget in standings.BUDGETS]
    assert speeds == [0.0, 0.0, 1.0]
    # Wins are over the tuned AdamW, at every budget.
    assert [found["adamw", budget].win for budget in standings.BUDGETS] == [0.0, 0.0, 0.5]
    for budget in standings.BUDGETS:  # a crash is 0 and the worst at every budget
        crashed = found["bad", budget]
        assert (crashed.iqm["validation"], crashed.interval["validation"], crashed.failed) == (0.0, (0.0, 0.0), 1)
        assert crashed.rank > found["adamw", budget].rank


def two_tasks(tmp_path, mine, timing, **tests) -> standings.Board:
    """AdamW reaches 1 at steps 120 and 70 of two tasks; `mine` gives curves of another on each, or None."""
    other = TINY._replace(name="other")
    adamw = {"tiny": levels(4, 2, 1), "other": levels(4, 1, 1)}
    records = [curve_record("adamw", adamw[name], problem=name) for name in adamw]
    for name, curves in mine.items():
        if curves is not None:
            records.append(curve_record("mine", curves, search="untuned", problem=name))
            records[-1]["rows"][""]["test"] = {"loss": tests.get(name, [1.0, 2.0])}
    folder = make_run(tmp_path, records, problems=(TINY, other))
    cells.write(folder, standings.TIMING, {"timing": timing})
    return standings.load([folder])


def test_speed_up_in_time_is_of_the_same_scores(tmp_path):
    """Paired: the seeds of a task have their own, and the IQM is over all [tasks, seeds]."""
    mine = {
        "tiny": np.stack([levels(4, 1, 1)[0], levels(4, 4, 1)[0]]),  # 120/70 and 120/120
        "other": np.stack([levels(1, 1, 1)[0], levels(9, 9, 9)[0]]),  # 70/40 and never
    }
    timing = {"tiny": timings(adamw=1.0, mine=2.0), "other": timings(adamw=1.0, mine=0.5)}
    board = two_tasks(tmp_path, mine, timing)
    found = standings.totals(board, board.labels())[1]
    # A step twice as dear on the first, half as dear on the second; a level is smoothed at its fifth evaluation at 40.
    scores = [120 / 70 / 2, 1 / 2, 70 / 40 * 2, 0.0]
    np.testing.assert_allclose(board.scores["other"]["mine"].paired_wall["validation"], scores[2:])
    np.testing.assert_allclose(found.wall, np.sort(scores)[1:3].mean())
    of_means = np.array([board.scores[name]["mine"].wall["validation"] for name in ("tiny", "other")])
    assert abs(found.wall - of_means.mean()) > 0.05  # who takes the means' speed-ups gets another number
    low, high = found.wall_interval
    assert low < found.wall < high


def test_totals_of_three_tasks_and_unequal_seeds(tmp_path):
    """Mean, median and IQM differ here, and so do splits, times and seeds."""
    names = ("tiny", "second", "third")
    problems = tuple(TINY._replace(name=name) for name in names)
    never = levels(9, 9, 9)[0]
    adamw = {name: levels(4, 2, 1) for name in names}
    adamw["third"] = np.stack([levels(4, 2, 1)[0], np.full(15, NAN)])  # its second seed has no target
    mine = {
        "tiny": np.stack([levels(4, 1, 0.5)[0], levels(4, 4, 1)[0]]),  # 120/70 and 120/120
        "second": np.stack([levels(1, 1, 1)[0], never]),  # 120/40 and never
        "third": np.stack([never, levels(1, 1, 1)[0]]),  # never, and nothing to reach
    }
    records = [curve_record("adamw", adamw[name], problem=name) for name in names]
    records += [curve_record("mine", mine[name], search="untuned", problem=name) for name in names]
    records[3]["rows"][""]["losses"]["train"] = cells.rounded(np.stack([never, never]))
    folder = make_run(tmp_path, records, problems=problems)
    ms = dict(zip(names, (1.0, 2.0, 8.0), strict=True))
    timing = {name: timings(adamw=2.0, mine=2.0 * ms[name]) for name in names}
    timing["second"]["mine"] |= {"state_bytes": 96}
    cells.write(folder, standings.TIMING, {"timing": timing})
    board = standings.load([folder])
    total = {t.label: t for t in standings.totals(board, board.labels())}["mine"]
    scores = np.array([[12 / 7, 1.0], [3.0, 0.0], [0.0, NAN]])
    np.testing.assert_allclose(total.iqm["validation"], metrics.iqm(scores))
    np.testing.assert_allclose(total.median["validation"], np.median([19 / 14, 1.5, 0.0]))
    assert len({round(float(x), 3) for x in (metrics.iqm(scores), 19 / 14, np.nanmean(scores))}) == 3
    on_train = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, NAN]])
    np.testing.assert_allclose(total.iqm["train"], metrics.iqm(on_train))
    np.testing.assert_allclose(total.median["train"], 0.0)
    boot = metrics.stratified_bootstrap
    assert total.interval["train"] == boot(metrics.iqm, on_train)
    assert total.interval["validation"] == boot(metrics.iqm, scores)
    assert total.median_interval["validation"] == boot(metrics.median_of_means, scores)
    in_time = scores / np.array([[1.0], [2.0], [8.0]])
    np.testing.assert_allclose((total.wall, *total.wall_interval), (metrics.iqm(in_time), *boot(metrics.iqm, in_time)))
    wins = np.array([[1.0, 0.5], [0.5, 0.0], [0.0, 1.0]])
    assert (total.win, *total.win_interval) == (0.5, *boot(metrics.mean_of, wins))
    ranks = np.array([[1.0, 1.5], [1.5, 2.0], [2.0, 1.0]])
    assert (total.rank, *total.rank_interval) == (1.5, *boot(metrics.mean_of, ranks))
    assert len({total.win_interval, total.median_interval["validation"], boot(metrics.iqm, wins)}) == 3
    assert total.relative_ms == pytest.approx(16 ** (1 / 3))
    assert total.state_bytes == pytest.approx((8 + 24 + 8) / 3)
    assert (total.diverged, total.failed, total.missing) == (0.0, 0, 0)


def test_test_loss_has_wins_and_ranks_of_its_own(tmp_path):
    mine = {"tiny": levels(4, 1, 0.5), "other": levels(4, 1, 0.5)}  # better in validation
    board = two_tasks(tmp_path, mine, {}, tiny=[0.5, 9.0], other=[9.0, 9.0])  # and worse in three tests of four
    adamw, found = standings.totals(board, board.labels())
    assert (found.win, found.test_win) == (1.0, 0.25)
    assert (found.rank, found.test_rank, adamw.test_rank) == (1.0, 1.75, 1.25)
    assert math.isnan(found.wall)  # nothing was timed
    boot = metrics.stratified_bootstrap
    wins, ranks = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 2.0], [2.0, 2.0]])
    assert found.test_win_interval == boot(metrics.mean_of, wins)
    assert found.test_rank_interval == boot(metrics.mean_of, ranks) != found.rank_interval == (1.0, 1.0)
    table = page._totals([adamw, found])  # of both the page and the Markdown
    line = dict(zip(table.header, table.rows[1], strict=True))
    assert (line["win rate, test"].value, line["mean rank, test"].value) == (0.25, 1.75)
    rows = list(csv.DictReader(io.StringIO(page.summary_csv([adamw, found]))))
    assert (rows[1]["test_win"], rows[1]["test_rank"]) == ("0.25", "1.75")


def test_what_was_not_run_is_neither_a_crash_nor_divergence(tmp_path):
    mine = {"tiny": levels(4, 1, 0.5), "other": None}
    board = two_tasks(tmp_path, mine, {})
    adamw, found = standings.totals(board, board.labels())
    assert (found.missing, found.failed, found.diverged, adamw.missing) == (1, 0, 0.0, 0)
    np.testing.assert_allclose(found.iqm["validation"], 120 / 70)  # with a 0 for the other it would be half of that
    assert found.win == 1.0
    assert "not run: on other mine" in page.not_run(board)
    table = page._totals([adamw, found])
    line = dict(zip(table.header, table.rows[1], strict=True))
    assert [line[f"{word}, tasks"].text for word in ("crashed", "not run")] == ["0", "1"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    """Two runs of the same name: rows and timings of each stand side by side, on every problem."""
    curves = {"x": levels(4, 1, 0.5), "y": levels(4, 4, 1)}
    for place, ms in (("x", 2.0), ("y", 8.0)):
        mine = {"tiny": curves[place], "other": levels(4, 1, 1)}
        times = timings(adamw=1.0, mine=ms)
        two_tasks(tmp_path / place / "run", mine, {"tiny": times, "other": times})
    board = standings.load([tmp_path / "x/run", tmp_path / "y/run"])
    assert board.labels() == ["adamw", "mine", "mine (y/run)"]
    first, second = standings.totals(board, board.labels())[1:]
    assert (first.relative_ms, second.relative_ms) == (pytest.approx(2.0), pytest.approx(8.0))
    assert (first.missing, second.missing) == (0, 0)  # though on one problem they are equal
    assert (board.scores["tiny"]["mine"].wall["validation"]) == pytest.approx(120 / 70 / 2)
    assert (board.scores["tiny"]["mine (y/run)"].wall["validation"]) == pytest.approx(1 / 8)


def test_ends_of_a_grid_are_flagged():
    """Of a decay its largest, not 0; each split its own; the rate as the record has it."""
    record = curve_record("adamw", levels(4, 2, 1))
    record["points"] = [{"hyper": {"lr": 0.1, "weight_decay": x}, "schedule": "cosine"} for x in (0.0, 0.01, 0.1)]
    chosen = record["rows"][""]["chosen"]
    for validation, train, expected in ((0.1, 0.0, ["lr", "weight_decay"]), (0.01, 0.1, ["lr"])):
        chosen["validation"], chosen["train"] = (
            {"hyper": {"lr": 0.1, "weight_decay": x}, "schedule": "cosine"} for x in (validation, train)
        )
        assert standings.ends(record, "validation") == expected
        assert standings.ends(record, "train") == ["weight_decay"] * (train == 0.1)


def test_no_test_loss_stands_beside_another_choice(tmp_path):
    record = curve_record("adamw", levels(4, 2, 1))
    record["rows"][""]["chosen"]["train"] = {"hyper": {"lr": 0.2}, "schedule": "constant"}
    board = standings.load([make_run(tmp_path, [record, curve_record("same", levels(4, 2, 1))])])
    rows = csv.DictReader(io.StringIO(page.results_csv(board)))
    shown = {(row["optimizer"], row["split"]): row["test_loss"] for row in rows}
    assert [shown[name, split] for name in ("adamw", "same") for split in ("validation", "train")] == [
        "1.5", "", "1.5", "1.5",
    ]  # fmt: skip
    table = page._problem(board, "tiny", []).tables[0]
    assert next(row for row in table.rows if row[0].text == "adamw")[-1].text == "lr 0.2, constant"


def test_a_second_row_of_an_optimizer_is_not_ranked(tmp_path):
    records = [curve_record("adamw", levels(4, 2, 1)), curve_record("adamw", levels(4, 2, 0.5), search="once")]
    records.append(curve_record("slow", levels(4, 3, 2)))
    board = standings.load([make_run(tmp_path, records)])
    found = {t.label: t.rank for t in standings.totals(board, board.labels())}
    assert (found["adamw"], found["slow"]) == (1.0, 2.0)
    assert math.isnan(found["adamw, once"])


def test_among_random_searches_the_reference_takes_part_once(tmp_path):
    """The tuned one is the target; of the ranks it would be a second AdamW, with another budget."""
    records = [curve_record("adamw", levels(4, 2, 1)), curve_record("adamw", levels(4, 3, 3), search="random-1")]
    records.append(curve_record("slow", levels(4, 3, 2), search="random-1"))
    board = standings.load([make_run(tmp_path, records)])
    found = {t.label: t.rank for t in standings.totals(board, board.labels())}
    assert math.isnan(found.pop("adamw"))
    assert found == {"adamw, random-1": 2.0, "slow, random-1": 1.0}
    # Joined with fewer trials, and with one that a grid was searched for: those had other budgets.
    more = [curve_record("slow", levels(4, 2, 0.5), search="random-10"), curve_record("mine", levels(4, 1, 0.5))]
    more.append(curve_record("free", levels(4, 3, 1.5), search="untuned"))
    board = standings.load([make_run(tmp_path / "joined", [*records, *more])])
    found = {t.label: t.rank for t in standings.totals(board, board.labels()) if not math.isnan(t.rank)}
    assert found == {"slow, random-10": 1.0, "free": 2.0}


def test_what_an_optimizer_has_met_is_said(tmp_path):
    quick = entrants.met(entrants.resolve("lopt:quickstart"))
    assert quick == {"families": ["image_mlp"], "data": ["digits", "mnist5k"]}
    rule = rules.make("tiny")
    theta = rule.init_theta(jax.random.key(0))
    for number, provenance in enumerate(({}, {"run": {"groups": []}}, {"run": {"groups": [{"family": "my:own"}]}})):
        folder = lopt.save(tmp_path / f"{number}/artifact", rule, theta, provenance=provenance, card="")
        assert entrants.met(entrants.resolve(str(folder))) is None
    assert entrants.met(entrants.resolve("adamw")) == {"families": [], "data": []}
    record = curve_record("mine", levels(4, 1, 0.5), search="untuned")
    record["inputs"]["data"] = [["fashion10k", "x"]]
    records = [curve_record("adamw", levels(4, 2, 1)), record]
    problem = TINY._replace(note="data never met")
    folder = make_run(tmp_path / "run", records, problems=(problem,))
    about = json.loads((folder / standings.ABOUT).read_text())
    words = {}
    for met in (None, {"families": ["cnn"], "data": ["digits"]}, {"families": ["cnn"], "data": ["fashion10k"]}):
        cells.write(folder, standings.ABOUT, about | {"met": {"mine": met}})
        board = standings.load([folder])
        about_it = dict(page.environment(board))["mine"]
        words[str(met)] = " ".join([page.history(board), *page._problem(board, "tiny", []).text, about_it])
    unknown, fresh, stale = words.values()
    assert "may be wrong, for mine" in unknown
    assert unknown.endswith("meta-trained on: unknown")
    assert "was checked for mine" in fresh
    assert "has met" not in fresh
    assert "mine has met fashion10k in meta-training" in stale
    # What has nothing to tune is not for that a learned rule.
    cells.write(folder, standings.ABOUT, about | {"met": {"mine": entrants.met(entrants.resolve("lbfgs"))}})
    board = standings.load([folder])
    assert "mine" not in page.history(board)
    assert "mine" not in dict(page.environment(board))


def test_of_one_seed_there_are_no_intervals(tmp_path):
    board = standings.load([make_run(tmp_path, [curve_record("adamw", levels(4, 2, 1))])], seeds=1)
    (total,) = standings.totals(board, board.labels())
    assert total.iqm["validation"] == 1.0
    assert all(map(math.isnan, (*total.interval["validation"], *total.win_interval, *total.rank_interval)))
    words = page.files(board, [total])["report.md"]
    assert "| 1.00× | 1.00× |" in words
    assert "[nan" not in words
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.errorbar", lambda self, *args, xerr, **kwargs: seen.append(xerr))
        drawing.bars([total])
        drawing.rank_plot([total], NAN)
    assert len(seen) == 3
    assert not np.any(seen)


def test_a_learned_rule_is_known_by_its_code_too(monkeypatch):
    before = entrants.resolve("lopt:quickstart").version
    monkeypatch.setattr(entrants, "code", lambda: b"another")
    assert entrants.resolve("lopt:quickstart").version != before
    monkeypatch.undo()
    entrants.code.cache_clear()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "tiny.py"))
    assert entrants.resolve("lopt:quickstart").version != before
    entrants.code.cache_clear()


def test_profile_by_hand(board):
    found = standings.profile(board, ["adamw", "mine", "slow"], np.array([1.0, 1.5, 2.0]))
    np.testing.assert_allclose(found, [[0, 0, 1], [1, 1, 1], [0, 0, 0]])


def test_runs_are_joined(tmp_path, board):
    again = [curve_record("adamw", levels(4, 2, 1)), curve_record("other", levels(4, 1, 1), search="untuned")]
    second = make_run(tmp_path / "b", again, timings(adamw=2.0, other=2.0))
    both = standings.load([tmp_path / "a", second])
    assert {"mine", "other"} <= set(both.rows["tiny"])
    assert both.timing["tiny"]["other"]["ms"] == 1.0  # on a machine half as fast
    assert both.scores["tiny"]["other"].wall["validation"] == pytest.approx(120 / 70)
    assert len(standings.load([tmp_path / "a"], seeds=1).scores["tiny"]["mine"].final["train"]) == 1
    assert len(standings.load([tmp_path / "a"], seeds=9).scores["tiny"]["mine"].final["train"]) == 2
    third = make_run(tmp_path / "c", [curve_record("mine", levels(4, 1, 0.7), search="untuned")])
    assert {"mine", "mine (c)"} <= set(standings.load([tmp_path / "a", third]).rows["tiny"])
    with pytest.raises(ValueError, match="one version of one suite"):
        standings.load([tmp_path / "a", make_run(tmp_path / "d", again, suite="mini-v1")])
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        standings.load([tmp_path])


# The report.


class Page(HTMLParser):
    """Ids, references and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.refers, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.refers += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_that_needs_no_network(board):
    files = page.files(board, standings.totals(board, board.labels()))
    found = Page(files["report.html"])
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert all(one.startswith("#") and one[1:] in found.ids for one in found.refers)
    assert not re.search(r"@import|fetch\(|url\((?!#)", files["report.html"])
    assert "width=device-width" in files["report.html"]
    for words in (
        "1 of the suite's 3 tasks",
        "mine",
        "adamw, T/2",
        "adamw, 10 trials",
        "<out of luck>",
        "1.71× (step 70)",
        "0 (never)",
        "lopt-eval run",
    ):
        assert words in found.text, words
    assert "diverged (2 of 2)" in found.text
    assert "at the edge of the grid" in found.text
    assert "1.71× (step 70)" in files["report.md"]
    rows = list(csv.DictReader(io.StringIO(files["results.csv"])))
    mine = next(row for row in rows if (row["optimizer"], row["split"]) == ("mine", "validation"))
    np.testing.assert_allclose(float(mine["speed_up"]), 120 / 70, rtol=1e-5)
    assert (mine["hit_step"], mine["final_mean"], mine["test_loss"], mine["test_psnr"]) == ("70", "0.5", "1.5", "21")
    assert next(row for row in rows if row["optimizer"] == "bad")["status"] == "crashed"
    summary = {row["label"]: row for row in csv.DictReader(io.StringIO(files["summary.csv"]))}
    np.testing.assert_allclose(float(summary["mine"]["iqm_validation"]), 120 / 70, rtol=1e-5)


def test_svg_shortens_places_and_not_what_is_written():
    figure = drawing._figure(2, 2)
    figure.subplots().plot([0, 1 / 3], [0, 2 / 3], label="0.00123")
    figure.legend()
    text = drawing.svg(figure, "a title")
    assert "0.00123" in text
    assert not re.search(r' d="[^"]*\.\d{3}', text)
    assert 'aria-label="a title"' in text


def test_a_report_without_a_reference_says_so(tmp_path):
    made = standings.load([make_run(tmp_path, [curve_record("mine", levels(4, 1, 0.5), search="untuned")])])
    files = page.files(made, standings.totals(made, made.labels()))
    assert "Nothing to compare" in files["report.html"]


# The command line.


def test_run_report_and_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setitem(suites.SUITES, "smoke", (TINY,))
    monkeypatch.chdir(Path(__file__).parents[1])
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = ["run", "--suite", "smoke", "--optimizers", "tests.test_evaluation:plain_sgd", "--seeds", "2"]
    command += ["--out", str(out), "--cache", str(cache)]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "cells: 5 computed, 0 found" in said.out
    assert sorted(p.name for p in out.iterdir()) == sorted([*page.FILES, "cells", "run.json", "timing.json"])
    assert len(list((cache / "smoke-v1").iterdir())) == 4  # AdamW's; one's own is not tuned
    about = json.loads((out / "run.json").read_text())
    assert (about["suite"], about["seeds"], len(about["cells"])) == ("smoke-v1", 2, 5)
    found = standings.load([out]).scores["tiny"]
    assert found["adamw"].speed_up["validation"] == 1.0
    assert np.isfinite(found["tests.test_evaluation:plain_sgd"].final["validation"]).all()
    assert np.isfinite(found["tests.test_evaluation:plain_sgd"].wall["validation"])
    # SGD at 0.05 from what the seeds draw, by hand.
    task = tasks.make(TINY.family, **TINY.settings)
    one = jax.jit(lambda seed: runs.begin(task, lambda shared: optax.sgd(0.05), (), {}, seed))(0)
    contender = Contender("x", lambda shared: optax.sgd(0.05))
    step = jax.jit(lambda t, run: runs.step(task, contender, task.data, (), {}, jnp.asarray(0), t, run))
    for t in range(TINY.num_steps):
        one = step(t, one)
    expected = runs.evaluate(task, task.data, "validation", one, metrics=False)["loss"]
    row = standings.load([out]).rows["tiny"]["tests.test_evaluation:plain_sgd"]
    np.testing.assert_allclose(row.losses["validation"][0, -1], expected, rtol=1e-4)
    assert cli.main([*command, "--no-timing"]) == 0
    assert "cells: 0 computed, 5 found" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="a folder of lopt-eval's results; valid: a folder of weights or of lopt-train"
    ):
        entrants.resolve(str(out))
    said = dict(page.environment(standings.load([out])))
    assert about["date"] in said["steps timed"]  # that of the first command, by its report and by this one
    made_with = said["records made with"]
    assert made_with == f"JAX {jax.__version__}, optax {optax.__version__}"
    assert cli.main(["run", "--suite", "smoke", "--optimizers", "adamw", *command[5:], "--no-timing"]) == 0
    assert "holds 1 cells of an earlier command that this one does not ask for" in capsys.readouterr().err
    untimed = [*command[:-4], "--out", str(tmp_path / "untimed"), "--cache", str(cache), "--no-timing"]
    assert cli.main(untimed) == 0
    assert dict(page.environment(standings.load([tmp_path / "untimed"])))["steps timed"] == "never"
    assert cli.main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/report.html").stat().st_size > 10_000


def test_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(tuning, "RUNS", 2)
    monkeypatch.setattr(sweep, "settings_at", lambda family, axis, value: {"dim": value})
    monkeypatch.chdir(Path(__file__).parents[1])
    command = ["sweep", "--axis", "width", "--family", "quadratic", "--values", "4,8", "--steps", "10", "--seeds", "2"]
    command += ["--optimizers", "tests.test_evaluation:plain_sgd", "--out", str(tmp_path / "s")]
    assert cli.main(command) == 0
    assert "| tests.test_evaluation:plain_sgd |" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "s/sweep.csv").read_text().splitlines()))
    assert [(row["value"], row["seed"]) for row in rows] == [("4", "0"), ("4", "1"), ("8", "0"), ("8", "1")]
    held = json.loads((tmp_path / "s/sweep.json").read_text())
    assert held["lines"][0]["chosen"] == "untuned"
    assert (tmp_path / "s/sweep.svg").read_text().startswith("<svg")


def test_a_crash_in_a_sweep_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "RUNS", 1)

    def crashing(num_steps):
        raise RuntimeError("out of luck")

    bad = entrants.resolve("tests.test_evaluation:plain_sgd")._replace(name="bad")
    bad = bad._replace(contender=bad.contender._replace(make=crashing))
    todo = [TINY._replace(note="dim 4")]
    first, second = sweep.lines(todo, [bad, entrants.resolve("tests.test_evaluation:plain_sgd")], 1, lambda text: None)
    assert first.error.startswith("crashed: ")
    assert np.isinf(first.finals).all()
    assert np.isfinite(second.finals).all()
    record = {"axis": "width", "values": [4], "problems": [TINY._asdict()], "command": "c"}
    text = sweep.as_markdown(record, [first, second])
    assert "| bad | crashed |" in text
    assert f"bad: {first.error}" in text

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(sweep, "sweep", interrupted)
    assert cli.main(["sweep", "--axis", "width", "--optimizers", "adamw", "--out", str(tmp_path / "s")]) == 130
    assert "nothing was kept" in capsys.readouterr().err


def updates_of(one: Entrant, params, grads):
    """Updates on gradients [steps, ...] at parameters that stay where they are."""
    hyper = {name: 0.0 if name == "weight_decay" else space.default for name, space in one.space.items()}
    tx = one.contender.make(one.contender.shared, num_steps=50, cosine=False, **hyper)
    move = lambda state, g: tx.update(g, state, params)[::-1]  # noqa: E731
    return jax.lax.scan(move, tx.init(params), grads)[1]


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        # (w, b) of the layers 64 -> 4 -> 4 -> 10 at four times the width: fan-out 4, both, fan-in 4.
        ("sgd", {"layer0": (4, 4), "layer1": (1, 4), "layer2": (4, 1)}),
        ("adam", {"layer0": (1, 1), "layer1": (0.25, 1), "layer2": (1, 1)}),
        ("lopt:quickstart", {"layer0": (1, 1), "layer1": (0.25, 1), "layer2": (1, 1)}),
    ],
)
def test_a_sweep_in_mup_multiplies_updates_by_the_optimizers_own_rule(name, factors):
    todo = sweep.in_mup("width", sweep.problems("image_mlp", "width", (4, 16), 10))
    assert [one.settings["mup_base"] for one in todo] == [(4, 4), (4, 4)]
    made = [tasks.make(one.family, **one.settings) for one in todo]
    one = entrants.resolve(name)
    params = made[1].init(jax.random.key(0), made[1].sample(jax.random.key(1)))
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases too
    grads = jax.tree.map(lambda x: x[None], params)
    a, b = (updates_of(e, params, grads) for e in (one, sweep._multiplied(one, *made)))
    ratios = jax.tree.map(lambda x, y: float(jnp.sum(x * y) / jnp.sum(x * x)), a, b)
    assert {layer: (r["w"], r["b"]) for layer, r in ratios.items()} == {
        layer: pytest.approx(pair, rel=1e-5) for layer, pair in factors.items()
    }
    with pytest.raises(ValueError, match="valid: --axis width of a family with mup_base"):
        sweep.in_mup("depth", todo)


def test_the_rules_of_mup_are_of_who_is_said_to_follow_them():
    """Linear in the gradient, or whatever its scale at most some learning rates an element; and not of the tensor."""
    shape = {"w": (4, 8), "b": (8,)}
    drawn = {name: jax.random.normal(jax.random.key(len(x)), (6, *x)) for name, x in shape.items()}
    here = jax.tree.map(lambda x: x[0], drawn)
    for rule, names in sweep.RULES.items():
        for name in names:
            one = entrants.resolve(name)
            run = jax.jit(
                lambda scale, at, one=one: updates_of(one, optax.tree.scale(at, here), optax.tree.scale(scale, drawn))
            )
            large, small, elsewhere = run(1e-1, 1.0), run(1e-3, 1.0), run(1e-1, 0.25)
            factor, lr = (100 if rule == "sgd" else 1), one.space["lr"].default
            for x, y, z in zip(*map(jax.tree.leaves, (large, small, elsewhere)), strict=True):
                np.testing.assert_allclose(x, factor * y, rtol=1e-2, atol=2e-3 * lr, err_msg=name)
                if name != "adamp":  # which takes out of a step what lies along the tensor
                    np.testing.assert_array_equal(x, z, err_msg=name)
                assert rule == "sgd" or 0.05 * lr < np.abs(x[-1]).mean() < 2 * lr, name


def test_who_follows_no_rule_of_mup_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(sweep, "lines", lambda *args: pytest.fail("it ran"))
    words = {
        "schedule_free_adamw": "averages of its own",
        "averaged_adamw": "averages of its own",
        "lookahead": "averages of its own",
        "prodigy": "finds the size of its step",
        "cocob": "finds the size of its step",
        "momo_adam": "finds the size of its step",
        "lamb": "no rule for its updates",
        "muon": "no rule for its updates",
        "adafactor": "no rule for its updates",
        "tests.test_evaluation:plain_sgd": "no rule for its updates",
    }
    monkeypatch.chdir(Path(__file__).parents[1])
    command = ["sweep", "--axis", "width", "--mup", "--out", str(tmp_path / "s"), "--optimizers"]
    for name, why in words.items():
        assert cli.main([*command, f"adamw,{name}"]) == 2
        said = capsys.readouterr().err
        assert f"--mup, got {name}: " in said
        assert why in said
        assert "valid: learned optimizers, adabelief, adam, " in said
    assert sweep.rule_of(entrants.resolve("lopt:quickstart")) == "mulo"
    known = {name for names in (*sweep.RULES.values(), sweep.FINDS_ITS_STEP) for name in names}
    assert known <= set(baselines.names())


def test_a_sweep_over_widths_in_mup(monkeypatch):
    monkeypatch.setattr(tuning, "RUNS", 1)
    spaces, found = [], tuning.Found([Point({"lr": 0.1}, "constant")], {})
    monkeypatch.setattr(tuning, "search", lambda bench, cell: (spaces.append(set(bench.entrant.space)), found)[1])
    monkeypatch.setattr(tuning, "choose", lambda found, split: 0)
    todo = sweep.in_mup("width", sweep.problems("image_mlp", "width", (4, 16), 10))
    (line,) = sweep.lines(todo, [entrants.resolve("sgd")], 1, lambda text: None)
    assert (line.name, line.chosen, line.error) == ("sgd, muP", "lr 0.1, constant", "")
    assert np.isfinite(line.finals).all()
    assert spaces == [{"lr"}]  # factors above 1 would multiply the decay


def test_axes_of_a_sweep():
    assert sweep.settings_at("image_mlp", "width", 64) == {"hidden": (64, 64)}
    assert sweep.settings_at("image_mlp", "depth", 3) == {"hidden": (32, 32, 32)}
    assert sweep.settings_at("vit", "width", 64) == {"width": 64}
    assert sweep.settings_at("cnn", "batch", 8) == {"batch_size": 8}
    assert [p.num_steps for p in sweep.problems("cnn", "horizon", (10, 20), 7)] == [10, 20]
    assert [p.num_steps for p in sweep.problems("cnn", "batch", (10, 20), 7)] == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "minni", "--optimizers", "adamw", "--out", "OUT"], "Did you mean 'mini'"),
        (["run", "--optimizers", "adamww", "--out", "OUT"], "Did you mean 'adamw'"),
        (["run", "--optimizers", "adamw", "--only", "nothing", "--out", "OUT"], "--only, got 'nothing'; valid: mlp"),
        (["run", "--optimizers", "adamw", "--seeds", "0", "--out", "OUT"], "--seeds, got 0"),
        (["run", "--optimizers", "adamw", "--trials", "7", "--out", "OUT"], "invalid choice: 7"),
        (["run", "--optimizers", "adamw", "--out", "FILE"], "valid: a folder"),
        (["tune", "--optimizers", "tests.test_evaluation:nothing", "--dry-run"], "has no function"),
        (["report", "OUT"], "holds no run.json"),
        (["report", "OUT", "FILE"], "--out, got none for several folders"),
        (
            ["sweep", "--axis", "depth", "--family", "quadratic", "--optimizers", "adamw", "--out", "OUT"],
            "has no depth",
        ),
        (
            ["sweep", "--axis", "width", "--values", "8,x", "--optimizers", "adamw", "--out", "OUT"],
            "--values, got '8,x'",
        ),
        (["sweep", "--axis", "colour", "--optimizers", "adamw", "--out", "OUT"], "invalid choice: 'colour'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(session, "fill", lambda *args: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    places = {"OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    try:
        code = cli.main([str(places.get(a, a)) for a in arguments])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.count("\n") == 1
    assert message in said.err


def test_the_cost_of_a_tuning_is_printed_and_fits(monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(session, "fill", lambda *args: pytest.fail("it ran"))
    for suite, hours in (("mini", 2), ("heldout", 12)):
        assert cli.main(["tune", "--suite", suite, "--dry-run"]) == 0
        todo = session.jobs(suites.SUITES[suite], commands.entrants("defaults"))
        # Each baseline, AdamW for two shorter horizons, and it and the control once.
        assert len(todo) == len(suites.SUITES[suite]) * (len(suites.DEFAULT_BASELINES) + 2 + 2)
        assert f"{len(todo)} cells" in capsys.readouterr().out.splitlines()[-1]
        assert session.seconds(todo) / 2 <= hours * 3600  # on two cores


def test_costs_count_compiling_once_a_task_and_what_a_dear_optimizer_takes():
    problems = [TINY, TINY._replace(name="other")]
    todo = session.jobs(problems, [entrants.resolve(name) for name in ("adamw", "muon")])
    found = session.costs(todo)
    alone = [job.updates * job.cell.problem.ms / 1e3 for job in todo]
    dear = suites.RELATIVE_MS["muon"]
    assert dear > 1.3
    # AdamW at T, T/2 and T/3, Muon; the same of the other; and once, when nothing compiled is left.
    compiled = [1, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    factors = [1, 1, 1, dear, 1, 1, 1, dear, 1, 1]
    expected = [x * f + session.COMPILE_SECONDS * c for x, f, c in zip(alone, factors, compiled, strict=True)]
    np.testing.assert_allclose(found, expected)
    assert session.seconds(todo) == sum(found)


def test_updates_count_what_is_run():
    one = FakeBench(entrant(), bowl(0.0123))
    tuning.tune(one, Cell(TINY, "sgd", "grid", 1), 5)
    counted = tuning.updates(Cell(TINY, "sgd", "grid", 1), entrant(), 5) / TINY.num_steps
    assert len(one.ran) <= counted <= len(one.ran) + 3 * tuning.RUNS
