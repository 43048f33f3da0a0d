"""The comparison with tuned AdamW: metrics by hand, pairing, tuning, what is said of a loss, the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
import tasks
from lopt import rules
from lopt.base import LearnedOptimizer
from meta_test import cli, compare, figure, metrics, report, runs
from meta_test.suites import SUITES, Problem
from tasks.base import Task

INF, NAN = math.inf, math.nan
TINY = Problem("tabular_mlp", {"hidden": (8,)}, 30, "tiny")
# Of these, train and validation loss each choose their own, at T and at T/2, and both schedules are chosen.
LRS = (0.01, 0.03, 0.1, 1e30)
QUIET = lambda updates: None  # noqa: E731


# Metrics, by hand.


def test_smoothed_is_the_trailing_median():
    curve = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0])
    np.testing.assert_array_equal(metrics.smoothed(curve), [INF] * 4 + [7.0, 3.0, 6.0])
    np.testing.assert_array_equal(metrics.smoothed(np.stack([curve, -curve]))[1], [INF] * 4 + [-7.0, -3.0, -6.0])
    assert np.isinf(metrics.smoothed(curve[:4])).all()


def test_smoothed_takes_what_is_not_finite_as_infinite():
    np.testing.assert_array_equal(metrics.smoothed(np.array([NAN, 1, INF, 2, 3.0])), [INF] * 4 + [3.0])
    # Minus infinity is no merit either.
    np.testing.assert_array_equal(metrics.smoothed(np.array([NAN, 1, INF, 2, -INF])), [INF] * 5)
    assert metrics.final(np.array([[5.0, 4, 3, 2, 1], [1, NAN, NAN, NAN, 1]])).tolist() == [3.0, INF]


@pytest.mark.parametrize(
    ("curve", "target", "step"),
    [
        ([INF, 3, 2, 1, 1], 1.0, 30),  # the first of a plateau, and equal is reached
        ([INF, 3, 2, 1.5, 1.1], 1.0, None),
        ([INF, 3, 1, 2, 1], 1.0, 20),  # the first, although it leaves it again
        ([INF, NAN, NAN, NAN, NAN], 1.0, None),
        ([INF, 3, 2, 1, 1], INF, None),  # no target
        ([INF, 3, 2, 1, 1], NAN, None),
        ([1, 3, 2, 1, 1], 1.0, 0),
    ],
)
def test_first_hit(curve, target, step):
    assert metrics.first_hit(np.arange(0, 50, 10), np.array(curve, float), target) == step


def test_speed_up():
    assert metrics.speed_up(400, 100) == 4.0
    assert metrics.speed_up(400, 400) == 1.0
    assert metrics.speed_up(100, 400) == 0.25
    assert metrics.speed_up(400, None) == 0.0
    assert math.isnan(metrics.speed_up(None, 100))
    assert math.isnan(metrics.speed_up(None, None))
    assert math.isfinite(metrics.speed_up(400, 0))


def test_choose_is_the_least_mean_and_avoids_divergence():
    assert metrics.choose(np.array([[1.0, 5.0], [2.0, 3.0], [9.0, 0.1]])) == 1
    assert metrics.choose(np.array([[3.0, 3.0], [0.0, NAN], [0.0, INF], [0.0, -INF]])) == 0
    assert metrics.choose(np.array([[2.0], [1.0], [1.0]])) == 1


def test_at_edge():
    grid = np.array([0.1, 0.2, 0.3])
    assert [metrics.at_edge(float(x), grid) for x in grid] == [True, False, True]


def test_verdict():
    ours, worse = np.array([1.0, 2.0]), np.array([2.0, 4.0])
    assert metrics.verdict(ours, worse) == ("won", True)
    assert metrics.verdict(worse, ours) == ("lost", True)
    assert metrics.verdict(worse, ours, higher_is_better=True) == ("won", True)
    assert metrics.verdict(ours, ours) == ("tie", True)
    assert metrics.verdict(np.array([1.0, 2.0]), np.array([0.9, 9.0])) == ("won", False)
    assert metrics.verdict(np.array([0.0, NAN]), worse) == ("lost", False)
    assert metrics.verdict(np.array([NAN, NAN]), np.array([INF, NAN])).outcome == "tie"
    assert metrics.verdict(np.array([NAN]), np.array([0.5]), higher_is_better=True) == ("lost", True)
    assert [metrics.speed_verdict(x).outcome for x in (2.0, 1.0, 0.5, 0.0, NAN)] == [
        "won",
        "tie",
        "lost",
        "lost",
        "tie",
    ]


# Runs.


def linear_task() -> Task:
    """loss = p · b from p = 1: after SGD at rate 1, p is 1 minus the sum of the batches."""
    return Task(
        data=jnp.ones(3),
        sample=lambda key: (),
        init=lambda key, phi: jnp.ones(1),
        batch=lambda key, phi, data, split: jax.random.normal(key, (1,)) + data[0],
        loss=lambda params, key, phi, batch: jnp.sum(params * batch),
        name="linear",
    )


def value_steps(shared, *, num_steps):
    """Moves every parameter by minus the loss it is told."""

    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: jnp.full_like(g, -value), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def sgd(shared, *, lr):
    return optax.sgd(lr)


def theta_sgd(theta, *, num_steps):
    return optax.chain(optax.clip(1e6), optax.scale(theta["rate"]))


def train(contender, hyper, seeds, most, steps=(0, 1, 2, 5), task=None):
    program = runs.prepare(contender, task or linear_task(), most)
    seeds = np.array(seeds)
    return runs.run(program, hyper, seeds, np.array(steps), (steps[-1],), QUIET)


def test_batches_and_init_depend_on_the_seed_alone():
    one = train(runs.Contender("sgd", sgd), {"lr": np.ones(2, np.float32)}, [0, 1], 2)
    # Another optimizer, with theta, in several chunks, the last one filled up, at other places.
    many = [1, 3, 0, 1, 0]
    hyper = {"num_steps": np.full(5, 5, np.int32)}
    two = train(runs.Contender("learned", theta_sgd, {"rate": jnp.asarray(-1.0)}), hyper, many, 2)
    for split in runs.CURVES:
        assert two.losses[split].shape == (5, 4)
        for row, seed in enumerate(many):
            if seed < 2:
                np.testing.assert_allclose(two.losses[split][row], one.losses[split][seed], rtol=1e-5, atol=1e-6)
    assert np.abs(one.losses["train"][0, 1:] - one.losses["train"][1, 1:]).min() > 1e-3  # seeds differ
    first, second = np.diff(one.losses["train"][0, :3])
    assert abs(first - second) > 1e-3  # so do the batches of two steps
    np.testing.assert_allclose(two.test["loss"][2], one.test["loss"][0], rtol=1e-5, atol=1e-6)


def test_the_loss_of_the_step_is_passed_as_value():
    # At p = 1 the loss on a batch is its gradient, so that both optimizers take the same first step, and then differ.
    told = train(runs.Contender("value", value_steps), {"num_steps": np.full(2, 5, np.int32)}, [0, 1], 2)
    plain = train(runs.Contender("sgd", sgd), {"lr": np.ones(2, np.float32)}, [0, 1], 2)
    np.testing.assert_allclose(told.losses["train"][:, :2], plain.losses["train"][:, :2], rtol=1e-5)
    assert np.abs(told.losses["train"][:, 2] - plain.losses["train"][:, 2]).min() > 1e-3


def test_evaluation_is_the_mean_over_the_whole_set():
    task = tasks.make("tabular_mlp", hidden=())
    run = jax.jit(lambda seed: runs.begin(task, sgd, (), {"lr": 0.1}, seed))(0)
    for split in ("train", "test"):
        batches = task.eval_batches(run.phi, task.data, split)
        x, y = (np.concatenate(part) for part in batches)
        logits = x @ np.asarray(run.params["layer0"]["w"]) + np.asarray(run.params["layer0"]["b"])[None, :]
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        found = runs.evaluate(task, task.data, split, run, metrics=True)
        np.testing.assert_allclose(found["loss"], -np.log(chances[np.arange(len(y)), y]).mean(), rtol=1e-4)
        np.testing.assert_allclose(found["accuracy"], (logits.argmax(1) == y).mean(), rtol=1e-4)
    assert len(task.eval_batches(run.phi, task.data, "train").y) > 1


def test_one_compilation_for_all_learning_rates_seeds_and_horizons():
    program = runs.prepare(runs.Contender("sgd", sgd), linear_task(), 4)
    for seeds, lr, stop in (([0, 1, 2, 3], 0.1, 5), ([7, 8], 0.2, 3), ([4, 5, 6, 7, 8], 0.3, 9)):
        hyper = {"lr": np.full(len(seeds), lr, np.float32)}
        runs.run(program, hyper, np.array(seeds), np.array([0, 1, stop]), (stop,), QUIET)
    assert program.advance._cache_size() == program.start._cache_size() == program.examine._cache_size() == 1


def test_updates_are_counted_without_the_filling():
    counted = []
    program = runs.prepare(runs.Contender("sgd", sgd), linear_task(), 2)
    runs.run(program, {"lr": np.ones(5, np.float32)}, np.arange(5), np.array([0, 2, 7]), (), counted.append)
    assert sum(counted) == 5 * 7


def test_chunk_size():
    assert runs.chunk_size(75, 2, 8) == 16  # 5 chunks rather than 4 of 16 and one of 11
    assert runs.chunk_size(3, 2, 100) == 4
    assert runs.chunk_size(72, 8, 1) == 8
    assert runs.chunk_size(72, 8, 0) == 8


@pytest.mark.parametrize("num_steps", [1, 7, 30, 250, 500, 501])
def test_eval_steps_hold_both_ends_and_half_time(num_steps):
    steps = runs.eval_steps(num_steps)
    assert steps[0] == 0
    assert steps[-1] == num_steps
    assert num_steps // 2 in steps
    assert (np.diff(steps) > 0).all()
    assert len(steps) <= runs.EVALS + 1


def test_adamw_follows_its_schedule():
    # Under a constant gradient, Adam's step at 0 is the learning rate.
    units = {}
    for cosine in (False, True):
        tx = compare.adamw((), lr=jnp.asarray(0.5), horizon=jnp.asarray(40), cosine=jnp.asarray(cosine))
        state, params = tx.init(jnp.zeros(1)), jnp.zeros(1)
        sizes = []
        for _ in range(41):
            update, state = tx.update(jnp.ones(1), state, params)
            sizes.append(-float(update[0]) / 0.5)
        units[cosine] = sizes
    np.testing.assert_allclose(units[False], 1.0, rtol=1e-4)
    np.testing.assert_allclose([units[True][t] for t in (0, 1, 2, 21, 40)], [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-4)


# The comparison.


def fixed_rule(rate: float) -> LearnedOptimizer:
    """SGD whose rate is theta."""
    return LearnedOptimizer(
        "sgd", {}, frozenset(), lambda key: jnp.asarray(rate), lambda theta, *, num_steps=None: optax.sgd(theta)
    )


@pytest.fixture(scope="module")
def result() -> compare.Result:
    rule = fixed_rule(1e-6)
    (found,) = compare.compare("lazy", rule, jnp.asarray(1e-6), [TINY], seeds=2, lrs=LRS)
    return found


def test_all_optimizers_start_from_the_same_weights(result):
    for split in runs.CURVES:
        starts = np.stack([row.losses[split][:, 0] for row in result.rows])
        # Each optimizer is a program of its own, which may add up a loss in another order.
        np.testing.assert_allclose(starts, np.broadcast_to(starts[0], starts.shape), rtol=1e-6)
        assert abs(starts[0, 0] - starts[0, 1]) > 1e-3  # not those of the other seed
    assert [row.name for row in result.rows] == ["lazy", compare.TUNED, compare.HALF, compare.UNTUNED]


def test_tuning_picks_the_argmin_of_each_split(result):
    for sweep, row in zip(result.sweeps, result.rows[1:3], strict=True):
        assert row.steps[-1] == sweep.horizon
        for split in runs.CURVES:
            means = [np.mean(seeds) if np.isfinite(seeds).all() else INF for seeds in sweep.finals[split]]
            at = min(range(len(means)), key=means.__getitem__)
            assert row.chosen[split][:2] == sweep.points[at][:2]
            # Run again with all its evaluations, the chosen point ends where it did.
            np.testing.assert_allclose(metrics.final(row.losses[split]), sweep.finals[split][at], rtol=1e-4)
        assert row.chosen["train"] != row.chosen["validation"]
    full, half = result.sweeps
    assert (full.horizon, half.horizon, len(full.points)) == (30, 15, 8)
    assert not np.allclose(full.finals["train"][:2], half.finals["train"][:2], rtol=1e-3)


def test_the_grid_of_half_time_is_of_runs_of_half_the_steps(result):
    program = runs.prepare(
        runs.Contender("AdamW", compare.adamw), tasks.make(TINY.family, **TINY.settings), 16
    )  # as in the fixture: compiled already
    constant = np.repeat([True, False], 6)
    hyper = {
        "lr": np.tile(np.repeat(np.array(LRS[:3], np.float32), 2), 2),
        "horizon": np.where(constant, 10**6, 15).astype(np.int32),
        "cosine": ~constant,
    }
    curves = runs.run(program, hyper, np.tile([0, 1], 6), np.arange(16), (15,), QUIET)
    for split in runs.CURVES:
        expected = metrics.final(curves.losses[split]).reshape(6, 2)
        found = result.sweeps[1].finals[split][[0, 1, 2, 4, 5, 6]]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        # So are the curves shown.
        steps, shown = result.rows[2].steps, result.rows[2].losses[split]
        at = result.sweeps[1].points.index(result.rows[2].chosen[split]._replace(edge=False))
        row = [0, 1, 2, None, 3, 4, 5, None][at]
        np.testing.assert_allclose(shown, curves.losses[split].reshape(6, 2, 16)[row][:, steps], rtol=1e-3, atol=1e-5)
    # The test set is looked at where validation chose.
    at = result.sweeps[1].points.index(result.rows[2].chosen["validation"]._replace(edge=False))
    row = [0, 1, 2, None, 3, 4, 5, None][at]
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(result.rows[2].test[name], curves.test[name].reshape(6, 2)[row], rtol=1e-3)


def test_a_learning_rate_that_diverges_is_a_result(result):
    finals = result.sweeps[0].finals["train"]
    assert not np.isfinite(finals[3]).any()  # constant, 1e30
    assert np.isfinite(finals[:3]).all()
    assert all(point.lr < 1 for row in result.rows for point in row.chosen.values())


def test_the_edge_of_the_grid_is_flagged():
    points = [compare.Point(lr, "constant") for lr in LRS[:3]]
    finals = np.array([[1.0], [2.0], [3.0]])
    low = compare._best(compare.Sweep(30, points, dict.fromkeys(runs.CURVES, finals)), LRS[:3])
    middle = compare._best(compare.Sweep(30, points, dict.fromkeys(runs.CURVES, finals[[1, 0, 2]])), LRS[:3])
    assert [low[split].edge for split in runs.CURVES] == [True, True]
    assert [middle[split].edge for split in runs.CURVES] == [False, False]


def hand_made(ours: float, accuracy: float) -> compare.Result:
    """A result with a rule at a constant loss against a tuned AdamW that falls to 1 over steps 0 … 9."""
    steps = np.arange(10)
    fall = np.stack([np.linspace(10.0, 1.0, 10)] * 2)

    def row(name, losses, right, chosen):
        test = {"loss": losses[:, -1], "accuracy": np.array([right, right])}
        return compare.Row(name, steps, {"train": losses, "validation": losses}, test, chosen)

    chosen = dict.fromkeys(runs.CURVES, compare.Point(1.0, "cosine", edge=True))
    rows = [
        row("mine", np.full((2, 10), ours), accuracy, {}),
        row(compare.TUNED, fall, 0.5, chosen),
        row(compare.HALF, fall + 1, 0.5, chosen),
        row(compare.UNTUNED, np.full((2, 10), NAN), 0.1, chosen),
    ]
    task = SimpleNamespace(name="by hand", version=1, provenance=())
    sweep = compare.Sweep(9, [chosen["train"]], {split: np.full((1, 2), NAN) for split in runs.CURVES})
    return compare.Result(TINY._replace(num_steps=9), task, rows, [sweep], 0.0)


def test_scores_by_hand():
    mine, tuned, half, untuned = compare.scores(hand_made(2.5, 0.5).rows)
    # Smoothed, 10 … 1 is 8 at its fifth evaluation and 3 at its last.
    assert tuned.final["train"].tolist() == [3.0, 3.0]
    assert (tuned.hit["train"], tuned.speed_up["train"]) == (9, 1.0)
    assert (mine.hit["train"], mine.speed_up["train"]) == (4, 9 / 4)
    assert (half.hit["train"], half.speed_up["train"]) == (None, 0.0)
    assert (untuned.hit["train"], untuned.speed_up["train"]) == (None, 0.0)


@pytest.mark.parametrize(
    ("ours", "accuracy", "said"),
    [(3.5, 0.4, "LOST"), (NAN, 0.4, "LOST"), (0.5, 0.6, "WON"), (3.0, 0.5, "TIE")],
)
def test_the_table_says_who_won(ours, accuracy, said):
    result = hand_made(ours, accuracy)
    table = report.table(result)
    words = [cell.strip() for cell in table.rows[-1][1:]]
    # A rule that is at AdamW's best from the start has the same final loss, but was there first; its last test loss
    # is not smoothed, so that AdamW's is better.
    expected = [said] * 6 if said != "TIE" else ["TIE", "TIE", "LOST", "TIE", "WON", "WON"]
    assert words == expected
    assert all(len(line) == len(table.header) for line in table.rows)
    text = report.as_text(table)
    assert f"{said}" in text.splitlines()[-3]
    assert "tiny" in table.title
    assert text.count("(!)") == 4
    assert ("never (0×)" in table.rows[0][-1]) == (said == "LOST")
    if math.isnan(ours):
        assert table.rows[0][1].startswith("diverged (2 of 2)")
    starred = [line[0] for line in table.rows[:-1] if line[1].endswith("*")]
    assert starred == (["mine"] if said in ("WON", "TIE") else [compare.TUNED])
    counted = {"WON": "won 6, lost 0, tied 0", "LOST": "won 0, lost 6, tied 0", "TIE": "won 2, lost 1, tied 3"}
    assert counted[said] in report.summary([result])


def test_the_record_is_strict_json_and_complete(result):
    text = report.dump(report.record([result], {"seeds": 2}))
    held = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (problem,) = held["problems"]
    np.testing.assert_allclose(problem["rows"][0]["losses"]["train"], result.rows[0].losses["train"])
    assert problem["sweeps"][0]["finals"]["train"][3] == [None, None]  # diverged
    assert problem["verdicts"]["validation loss"] == {"outcome": "lost", "unanimous": True}
    assert problem["provenance"][0]["id"] == "breast_cancer"
    assert held["machine"]["jax"] == jax.__version__


def test_the_figure_draws_what_is_not_finite_or_zero():
    for losses in (NAN, 0.0):
        assert figure.draw([hand_made(losses, 0.5)]).startswith(b"\x89PNG")


def test_refuses_bad_grids():
    rule = fixed_rule(0.1)
    with pytest.raises(ValueError, match="seeds, got 0"):
        compare.compare("x", rule, jnp.asarray(0.1), [TINY], seeds=0)
    with pytest.raises(ValueError, match="3 or more"):
        compare.compare("x", rule, jnp.asarray(0.1), [TINY], lrs=(1.0, 2.0))


# The command line.


@pytest.fixture
def artifact(tmp_path) -> Path:
    rule = rules.make("tiny")
    return lopt.save(tmp_path / "mine" / "artifact", rule, rule.init_theta(jax.random.key(0)), provenance={}, card="")


def test_compare_from_the_command_line(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setitem(SUITES, "small", (TINY._replace(settings={"hidden": ()}, num_steps=10),))
    monkeypatch.setattr(compare, "LRS", (1e-3, 1e-2, 1e-1))
    out = tmp_path / "out"
    arguments = ["compare", str(artifact), "--suite", "small", "--out", str(out), "--seeds", "1"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "mine/artifact, verdict" in said.out
    assert "written to" in said.out
    held = json.loads((out / "comparison.json").read_text())
    assert (held["seeds"], held["rule"], held["suite"]) == (1, "tiny", "small")
    assert len(held["problems"][0]["sweeps"][0]["points"]) == 2 * len(held["lrs"])
    assert {"mine/artifact", compare.TUNED} <= {row["name"] for row in held["problems"][0]["rows"]}
    assert "tiny" in (out / "comparison.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(cli.FILES)
    before = (out / "comparison.json").read_bytes()
    assert cli.main(arguments) == 2
    assert "already holds comparison.json" in capsys.readouterr().err
    assert (out / "comparison.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "OPT", "--suite", "quikstart", "--out", "OUT"],
            "unknown suite 'quikstart'. Did you mean 'quickstart'",
        ),
        (["compare", "OPT", "--out", "OUT", "--seeds", "0"], "--seeds, got 0; valid: an integer >= 1"),
        (["compare", "OPT", "--out", "OUT", "--seeds", "many"], "invalid int value: 'many'"),
        (["compare", "nosuch", "--out", "OUT"], "unknown optimizer (and no such folder) 'nosuch'"),
        (["compare", "EMPTY", "--out", "OUT"], "config.json cannot be read"),
        (["compare", "OPT", "--out", "FILE"], "valid: a folder"),
        (["compare", "OPT", "--out", "FILE/deeper"], "Not a directory"),
        (["compare", "OPT"], "--out"),
        (["compar", "OPT"], "compar"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(compare, "compare", lambda *args, **kwargs: pytest.fail("it ran"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"OPT": artifact, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    arguments = [str(places.get(a, a)) if "/" not in a else str(places["FILE"] / "deeper") for a in arguments]
    try:
        code = cli.main(arguments)
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert message in said.err


def test_list_names_every_problem(capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for name, problems in SUITES.items():
        assert name in said
        assert all(problem.note in said and problem.family in said for problem in problems)


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, meta_test.cli as c\n"
        "try: c.main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'numpy', 'matplotlib', 'rich', 'optax'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1]
    )
    assert time.monotonic() - began < 5.0  # a tenth of a second on an idle machine
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "OPTIMIZER" in done.stdout
