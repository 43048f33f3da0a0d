"""`lopt-eval l2o`: gaps, what is tuned, the table."""

from __future__ import annotations

import csv

import jax
import numpy as np
import pytest
from composite import classical

import lopt
from lopt import prox, proximal
from meta_test import cli, l2o_methods, l2o_problems
from meta_test import l2o as judge
from tasks import certified


@pytest.fixture(scope="module")
def few():
    with jax.enable_x64(True):
        return judge.draw(judge.PROBLEMS["lasso"], "20x40", 3, 0)


def test_gaps_are_those_of_the_methods_own_iterates(few):
    with jax.enable_x64(True):
        task, instances = few
        assert instances.gap < l2o_problems.FLOOR
        methods = l2o_methods.classical(judge.PROBLEMS["lasso"])
        at = [0, 1, 7, 30]
        at_y, at_x = l2o_methods.gaps(task, methods["FISTA"], instances, at)
        for i, best in enumerate(instances.best):
            phi = jax.tree.map(lambda leaf, i=i: leaf[i], instances.phi)
            r = prox.l1(phi.strength)
            for gap, point in ((at_x, lambda y, state: state.x), (at_y, lambda y, state: y)):
                tx = proximal.fista(lipschitz=phi.lipschitz, prox=r)
                objective, _ = classical(tx, phi.W, phi.b, r, 30, objective_at=point)
                np.testing.assert_allclose(gap[:, i], (objective[np.array(at)] - best) / best, rtol=1e-6)
        slow, quick = (l2o_methods.gaps(task, methods[name], instances, [30])[1, -1] for name in ("ISTA", "FISTA"))
        assert (quick < slow).all()


def test_what_is_tuned_is_the_best_of_its_grid_at_each_k(few, monkeypatch):
    monkeypatch.setattr(l2o_methods, "TUNED_AT", (3, 30))
    with jax.enable_x64(True):
        task, instances = few
        methods, values = l2o_methods.classical(judge.PROBLEMS["lasso"]), (0.0, 0.5, 0.9)
        method = methods["momentum"]._replace(grid={"a": values})
        chosen = l2o_methods.tune(task, method, instances)
        found = np.array([l2o_methods.gaps(task, method, instances, [3, 30], a=a)[0].mean(1) for a in values])
        assert chosen == {k: {"a": values[i]} for k, i in zip((3, 30), np.argmin(found, 0), strict=True)}
        assert l2o_methods.tune(task, methods["ISTA"], instances) == {0: {}}
        # What is level, at the floor of gaps, is not told by the order of the grid.
        monkeypatch.setattr(l2o_methods, "FLOOR", 10.0)
        monkeypatch.setattr(l2o_methods, "TUNED_AT", (0, 3))
        assert l2o_methods.tune(task, method, instances)[3] == {"a": 0.0}
    for a, edge in ((0.0, False), (0.5, False), (0.9, True)):
        assert l2o_methods.at_edge(method, {"a": a}) == edge


def test_a_rule_that_asks_for_gradients_at_x_is_entered(tmp_path, few):
    rule = lopt.rules.make("l2o_pa", form="PBA", hidden=4)
    lopt.save(tmp_path / "a", rule, rule.init_theta(jax.random.key(0)), provenance={}, card="x")
    with jax.enable_x64(True):
        task, instances = few
        for method in l2o_methods.learned(str(tmp_path / "a")).values():
            found = l2o_methods.gaps(task, method, instances, [0, 5])
            assert np.isfinite(found).all()
            assert (found[:, 1] < found[:, 0]).all()
    other = lopt.rules.make("velo")
    lopt.save(tmp_path / "b", other, other.init_theta(jax.random.key(0)), provenance={}, card="x")
    with pytest.raises(ValueError, match="velo, which needs num_steps, value; valid: at most grad_fn"):
        l2o_methods.learned(str(tmp_path / "b"))


def test_what_is_of_fewer_instances_is_not_compared():
    """Of three instances the first alone at k = 1,000: that number says so and is not bold, though the least."""
    at, few_of = (10, 50, 100, 1000), np.full((2, 4, 3), 1e-3)
    few_of[:, 3, 1:] = np.nan
    few_of[:, 3, 0] = 1e-9
    results = [
        judge.Result("learned", "set", "", at, few_of),
        judge.Result("FISTA, tuned for 10", "set", "a 0.9, an end of its grid", at, np.full((2, 4, 3), 1e-2)),
    ]
    record = {
        "command": "x",
        "sets": {"set": {"instances": 3, "certified_to": 1e-15}},
        "constrained": False,
        "tuned": [["set", "FISTA, tuned for 10", "a 0.9, an end of its grid"]],
        "safeguard_steps": 10,
        "far": 1,
        "rows": [],
    }
    page = judge.as_markdown(record, results)
    learned, fista = (line for line in page.splitlines() if line.startswith(("| learned", "| FISTA")))
    assert "| 1.0e-09 ± inf / 1e-09 (1 instances) |" in learned
    assert "**1.0e-03" in learned.split("|")[2]
    assert "**1.0e-02" in fista.split("|")[5]
    assert "a 0.9, an end of its grid" in page
    assert {row["count"] for row in judge.rows(results) if row["method"] == "learned"} == {1, 3}


def test_the_command(tmp_path, monkeypatch, capsys):
    assert tuple(judge.PROBLEMS) == cli.L2O
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(judge, "KS", (1, 2, 3, 5))
    monkeypatch.setattr(judge, "unrolled", lambda problem, sets, cache: {})
    sets = {"5x8": l2o_problems.Set({"rows": 5, "columns": 8, "nonzeros": 2}, 3), "other": l2o_problems.Set({})}
    monkeypatch.setitem(judge.PROBLEMS, "lasso", judge.PROBLEMS["lasso"]._replace(sets=sets))
    monkeypatch.setattr(
        judge,
        "classical",
        lambda problem: {
            "ISTA": judge.Method(lambda one: proximal.ista(lipschitz=one.lipschitz, prox=one.prox)),
        },
    )
    out, cache = tmp_path / "l2o", tmp_path / "cache"
    words = ["l2o", "--sets", "5x8", "--instances", "9", "--out", str(out), "--cache", str(cache)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "| ISTA |" in said
    assert "3 instances" in said
    assert {path.name for path in out.iterdir()} == set(judge.FILES)
    held = list(csv.DictReader((out / "l2o.csv").read_text().splitlines()))
    assert [(row["at"], row["k"]) for row in held] == [(at, str(k)) for at in "yx" for k in (1, 2, 3, 5)]
    assert float(held[3]["mean"]) < float(held[0]["mean"])
    # Optima are kept, and read where instances and solver are the same.
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2  # instances to tune on, instances to judge on
    monkeypatch.setattr(certified, "minimum", None)
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    with pytest.raises(TypeError):
        cli.main([*words, "--seed", "5"])
    assert cli.main([*words, "--sets", "6x8"]) == 2
    assert cli.main([*words, "--rows", "IST A"]) == 2
    assert cli.main([*words, "--rows", "FISTA, gr; ISTA"]) == 0
