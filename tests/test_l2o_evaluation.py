"""`lopt-eval l2o`: gaps, what is tuned, the table."""

from __future__ import annotations

import csv

import jax
import numpy as np
import pytest
from composite import classical

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


def test_what_is_tuned_is_the_best_of_its_grid(few):
    with jax.enable_x64(True):
        task, instances = few
        methods = l2o_methods.classical(judge.PROBLEMS["lasso"])
        method = methods["momentum, tuned"]._replace(grid={"a": (0.3, 0.8, 0.95)})
        (chosen,) = l2o_methods.tune(task, method, instances).values()
        found = [
            l2o_methods.gaps(task, method, instances, [judge.TUNED_AT], a=a)[0, -1].mean() for a in (0.3, 0.8, 0.95)
        ]
        assert chosen == method.grid["a"][int(np.argmin(found))]
        assert l2o_methods.tune(task, methods["ISTA"], instances) == {}


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(judge, "KS", (1, 2, 3, 5))
    monkeypatch.setattr(judge, "unrolled", lambda problem, cache: {})
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
