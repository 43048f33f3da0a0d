"""`tasks.check` says what is wrong; own families are found, checked, and meta-trained on from both command lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from meta_test import cli
from meta_train import groups, launch
from tasks import REGISTRY, Task
from tasks.augment import wrap
from tasks.checks import check, problems

ROOT = Path(__file__).parents[1]
ROWS = np.random.default_rng(0).random((32, 4), np.float32)


def good(**change) -> Task:
    """A task with nothing wrong, and what is changed of it."""

    def batch(key, phi, data, split):
        start = {"train": 0, "validation": 16, "test": 24}[split]
        return data[start + jax.random.randint(key, (8,), 0, 8)]

    def loss(params, key, phi, batch):
        return jnp.mean((batch @ params["w"] - phi) ** 2)

    fields = dict(
        data=jnp.asarray(ROWS),
        sample=jax.random.normal,
        init=lambda key, phi: {"w": jax.random.normal(key, (4,))},
        batch=batch,
        loss=loss,
        metrics=lambda params, key, phi, batch: {"size": jnp.sum(params["w"] ** 2)},
        eval_batches=lambda phi, data, split: data.reshape(4, 8, 4),
        name="mine",
    )
    return Task(**{**fields, **change})


def impure(key, phi):
    return {"w": jnp.asarray(np.random.random(4), jnp.float32)}


CALLS = []


def counted(key):
    """Impure by a counter, on which nothing random depends."""
    CALLS.append(1)
    return {"w": len(CALLS) + jax.random.normal(key, (4,))}


def called_back(params, key, phi, batch):
    """Impure when it runs: the trace is the same each time."""
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    drawn = jax.pure_callback(lambda _: np.float32(np.random.random()), shape, phi, vmap_method="sequential")
    return drawn * jnp.mean((batch @ params["w"] - phi) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(REGISTRY))
def test_our_own_families_pass(family):
    assert problems(tasks.make(family)) == []


def test_a_good_task_passes():
    assert check(good(value_and_grad=jax.value_and_grad(good().loss))) is None
    assert problems(good(metrics=None, eval_batches=None)) == []
    assert problems(good(batch=lambda key, phi, data, split: data[: 8 if split == "train" else 4])) == []


def test_a_reduced_batch_passes():
    assert check(wrap(good(metrics=None, eval_batches=None), [("reduce_batch", {"rows": 4})])) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": lambda p, k, phi, b: (b @ p["w"]) ** 2}, r"loss has shape float32\[8\]; valid: a floating scalar"),
        ({"loss": lambda p, k, phi, b: jnp.sum(b @ p["w"] > 0)}, r"loss has shape int32\[\]; valid: a floating scalar"),
        ({"loss": lambda p, k, phi, b: (jnp.mean(b), {})}, r"loss has \{\[0\] float32\[\]\}; valid: a floating scalar"),
        ({"loss": lambda p, k, phi, b: jnp.log(-jnp.sum(p["w"] ** 2))}, "loss is not finite at init"),
        ({"loss": lambda p, phi, b: 0.0}, r"loss takes \(p, phi, b\); valid: \(params, key, phi, batch\)"),
        ({"loss": lambda p, k, phi, b: jnp.mean(b)}, "the gradient at init is zero everywhere"),
        ({"loss": lambda p, k, phi, b: jnp.sum(jnp.sqrt(0 * p["w"]))}, r"the gradient\['w'\] is not finite at init"),
        (
            {"loss": lambda p, k, phi, b: np.mean(np.asarray(b))},
            r"loss uses NumPy on what jit traces \(test_check.py:\d+\); valid: jax.numpy",
        ),
        (
            {"loss": lambda p, k, phi, b: p["w"][0] if phi > 0 else phi},
            r"loss needs a number that jit does not know yet \(test_check.py:\d+\)",
        ),
        ({"loss": lambda p, k, phi, b: p["v"]}, r"loss raised KeyError: 'v' \(test_check.py:\d+\)"),
        (
            {"loss": lambda params, batch, key, phi: jnp.mean((batch @ params["w"] - phi) ** 2)},
            r"loss takes \(params, batch, key, phi\), in another order; valid: \(params, key, phi, batch\)",
        ),
        ({"loss": 3.0}, r"loss is a float; valid: a function of \(params, key, phi, batch\)"),
        ({"init": lambda key, phi: {"w": jnp.arange(4)}}, r"params\['w'\] is int32; valid: a floating type"),
        ({"init": lambda key, phi: {"w": jnp.full(4, jnp.nan)}}, r"params\['w'\] is not finite at init"),
        ({"init": lambda key, phi: {}}, "init returns no params"),
        ({"init": lambda key, phi: {"w": 1.0 * jax.numpy.ones(())}}, None),
        (
            {"init": lambda key, phi: {"w": jnp.ones(4), "batch_stats": {"mean": jnp.ones(4)}}},
            "params hold batch_stats, which a model changes by itself; valid: GroupNorm or LayerNorm, no BatchNorm",
        ),
        ({"init": impure}, "the same key gives another result when traced again"),
        ({"init": jax.jit(impure)}, "the same key gives another result when traced again"),
        ({"init": lambda key, phi: jax.jit(counted)(key)}, "the same key gives another result when traced again"),
        ({"loss": called_back}, "the same key gives another result when run again"),
        ({"data": [1.0, 2.0]}, r"data\[0\] is a float; valid: an array"),
        (
            {"batch": lambda key, phi, data, split: jnp.asarray(np.tile(ROWS, (1000, 1)))[:8]},
            "128,000 numbers are closed over and would be copied into every compiled program",
        ),
        (
            {"batch": lambda key, phi, data, split: jax.jit(lambda: jnp.asarray(np.tile(ROWS, (1000, 1))))()[:8]},
            "128,000 numbers are closed over and would be copied into every compiled program",
        ),
        (
            {"batch": lambda key, phi, data, split: data[:8] if split == "train" else data[:8, :2]},
            r"batch: the validation split has shape float32\[8, 2\]; valid: rows of shape float32\[8, 4\], as train",
        ),
        ({"metrics": lambda p, k, phi, b: b}, "metrics has .*; valid: a dict of scalars"),
        ({"eval_batches": lambda phi, data, split: jnp.ones(())}, "eval_batches: train has .*; valid: a leading axis"),
        ({"value_and_grad": lambda p, k, phi, b: jnp.ones(())}, "value_and_grad has .*; valid: "),
        ({"value_and_grad": lambda p, k, phi, b: (jnp.ones(()), jnp.ones(3))}, "value_and_grad's gradient has .*"),
    ],
)
def test_what_is_wrong_is_said(change, says):
    if says is None:
        change["loss"] = lambda p, k, phi, b: p["w"] ** 2
        return check(good(**change))
    with pytest.raises(ValueError, match=f"tasks.check: mine: .*{says}"):
        check(good(**change))


def test_integers_are_said_once():
    assert problems(good(init=lambda key, phi: {"w": jnp.ones(4), "n": jnp.arange(3)})) == [
        "params['n'] is int32; valid: a floating type, other numbers go into phi"
    ]


def test_every_fault_is_listed():
    task = good(init=lambda key, phi: {"w": jnp.ones(4), "steps": jnp.arange(3)}, loss=lambda p, k, phi, b: b @ p["w"])
    wrong = problems(task)
    assert len(wrong) == 2
    assert "steps" in wrong[0]
    assert "loss" in wrong[1]
    assert problems("task") == ["it is a str; valid: a tasks.Task"]


OWN = """
import jax, jax.numpy as jnp, numpy as np
import tasks
from tasks.data import table

def family(width=4, batch_size=8):
    wine = table("wine")
    def batch(key, phi, data, split):
        start, stop = wine.splits[split]
        rows = jax.random.randint(key, (batch_size,), start, stop)
        return data["x"][rows], data["y"][rows]
    def init(key, phi):
        return {"w": 0.3 * jax.random.normal(key, (13, width)), "v": jnp.zeros((width, 3))}
    def loss(params, key, phi, batch):
        x, y = batch
        logits = jnp.tanh(x @ params["w"]) @ params["v"]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, 3), axis=1))
    return tasks.Task({"x": wine.x, "y": wine.y}, lambda key: (), init, batch, loss,
                      name=f"wine-{width}", provenance=wine.provenance)

def wrong():
    return family()._replace(loss=lambda params, key, phi, batch: batch[0] @ params["w"])

def needs(width, batch_size=8):
    return family(width, batch_size)

def nothing():
    return 3

def helper(rows):
    return np.ones(rows) + np.ones(4)

def raises():
    return helper(3)

def adapted():
    return tasks.from_functions(lambda key: jnp.ones(13), lambda params, key, batch: (0.0, {}), table("wine"), name="a")

shadow = "not a function"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of a user's, which is the current directory."""
    (tmp_path / "users_tasks.py").write_text(OWN)
    (tmp_path / "users_broken.py").write_text("import json\nx = undefined\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the user shadows the library')")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("users_tasks", None)


def test_own_families_are_made_by_module_and_function(own):
    task = tasks.make("users_tasks:family", width=3)
    assert task.family == "users_tasks:family"
    assert task.name == "wine-3"
    assert sys.path[-1] == str(own)
    assert sys.path[0] != str(own)


def test_the_place_of_an_error_is_the_users_line(own):
    """Not NumPy's, nor the library's, nor the factory's where a helper of its was at fault."""
    with pytest.raises(ValueError, match="operands") as raised:
        tasks.make("users_tasks:raises")
    number = 1 + OWN.splitlines().index("    return np.ones(rows) + np.ones(4)")
    assert f"(users_tasks.py:{number})" in str(raised.value)
    assert isinstance(raised.value.__cause__, ValueError)  # with its traceback
    (own / "users_text.py").write_text("import json\ndef family():\n    return json.loads('{')\n")
    with pytest.raises(ValueError, match=r"JSONDecodeError: .* \(users_text.py:3\)"):
        tasks.make("users_text:family")


def test_the_task_of_the_documentation_works(own):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "def my_family" in block)
    assert len([line for line in code.splitlines() if line]) <= 20
    (own / "users_page.py").write_text(code)
    assert tasks.make("users_page:my_family", batch_size=16).family == "users_page:my_family"  # which checks it


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ("users_tasks:family", {"widht": 3}, "users_tasks:family has no setting 'widht'. Did you mean 'width'?"),
        ("users_tasks:famly", {}, "users_tasks has no function 'famly'; valid: .*family, "),
        ("users_tasks:shadow", {}, "users_tasks:shadow is a str; valid: a function that returns a Task"),
        (
            "users_tasks:raises",
            {},
            r"^tasks.make: users_tasks:raises raised ValueError: operands .* \(users_tasks.py:\d+\)\.$",
        ),
        ("users_tasks:adapted", {}, r"^tasks: the loss of a has \{.*\}; valid: one scalar"),  # which says enough
        ("users_broken:family", {}, r"users_broken:family: NameError: .* \(users_broken.py:2\); valid: package"),
        ("users_taks:family", {}, "ModuleNotFoundError: No module named 'users_taks'; valid: package.module:function"),
        (
            "users_tasks:needs",
            {"batch_size": 3},
            r"users_tasks:needs needs width, got batch_size; valid: .* --groups\.0\.settings '\{\"width\": \.\.\.\}'",
        ),
        ("users_tasks:nothing", {}, "users_tasks:nothing returned a int; valid: a tasks.Task"),
        ("users_tasks:wrong", {}, r"tasks.check: wine-4: loss has shape float32\[8, 4\]; valid: a floating scalar"),
    ],
)
def test_faults_of_own_families_are_said(own, spec, settings, says):
    with pytest.raises(ValueError, match=says):
        tasks.make(spec, **settings)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A command line of ours, as it is when installed: the current directory is not on the import path."""
    code = f"import sys; sys.path[:] = [p for p in sys.path if p]; from {command[0]} import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache/jax")
    words = [sys.executable, "-c", code, *command[1:]]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


TRAIN = [
    *("meta_train.__main__", "quickstart", "--task", "users_tasks:family", "--meta-steps", "2", "--compare", ""),
    *("--estimator.pairs", "2", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *("--rule-settings", '{"hidden": 2}', "--groups.0.settings", '{"width": 3}', "--out", "run"),
]


def test_lopt_train_makes_groups_of_own_families(own):
    launched = launch.parse(TRAIN[1], TRAIN[2:-2])
    pinned = launch._pinned(launched.run)
    (group,) = pinned.groups
    assert (group.family, group.settings) == ("users_tasks:family", {"width": 3})
    assert [task.name for task in groups.make_tasks(pinned, pinned.groups)] == ["wine-3"]
    two = launch.parse("quickstart", ["--task", "users_tasks:family", "--task=cnn", "--groups.1.weight", "2"]).run
    assert [(group.family, group.weight) for group in two.groups] == [("users_tasks:family", 1.0), ("cnn", 2.0)]


@pytest.mark.parametrize("words", [["--task", "users_tasks:wrong"], ["--task=users_tasks:wrong"]])
def test_a_task_alone_is_trained_by_the_quickstarts_recipe(own, capsys, words):
    assert launch.main([*words, "--compare", ""]) == 2
    assert "tasks.check: wine-4: loss has shape" in capsys.readouterr().err
    run = launch.parse(launch.DEFAULT, words).run
    assert (run.name, run.groups[0].family) == ("quickstart", "users_tasks:wrong")


@pytest.mark.slow
def test_lopt_train_takes_own_families(own):
    done = run(own, *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = json.loads((own / "run/config.json").read_text())["groups"]
    assert (group["family"], group["settings"]) == ("users_tasks:family", {"width": 3})
    assert (own / "run/artifact/model.safetensors").exists()


EVAL = ("compare", "quickstart", "--task", "users_tasks:family", "--seeds", "1", "--out", "out")


def test_lopt_eval_hands_own_families_to_the_comparison(own, monkeypatch):
    seen = []

    def compare(label, rule, theta, problems, **settings):
        seen.extend(problems)
        raise KeyboardInterrupt

    monkeypatch.setattr("meta_test.compare.compare", compare)
    assert cli.main([*EVAL, "--steps", "20", "--task-settings", '{"width": 2}']) == 130
    assert [problem[:3] for problem in seen] == [("users_tasks:family", {"width": 2}, 20)]


@pytest.mark.slow
def test_lopt_eval_takes_own_families(own):
    done = run(own, "meta_test.cli", *EVAL, "--steps", "20", "--task-settings", '{"width": 2}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wine-2" in (own / "out/comparison.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*TRAIN[:3], "users_tasks:wrong", *TRAIN[4:]], "loss has shape"),
        (("meta_test.cli", "compare", "quickstart", "--task", "users_tasks:wrong", "--out", "o"), "loss has shape"),
        (
            (
                "meta_test.cli",
                "compare",
                "quickstart",
                "--task",
                "users_tasks:family",
                "--suite",
                "digits",
                "--out",
                "o",
            ),
            "--suite and --task",
        ),
        (
            ("meta_test.cli", "compare", "quickstart", "--task", "cnn", "--task-settings", "[3]", "--out", "o"),
            "--task-settings",
        ),
    ],
)
def test_the_command_lines_say_it_in_one_line(own, words, says):
    words = [word for word in words if word not in ("--groups.0.settings", '{"width": 3}')]
    done = run(own, *words)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not (own / "run").exists()
    assert not (own / "o").exists()
