"""The launcher: help at once, bad input in one line with exit code 2, and nothing overwritten."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

import lopt
from meta_train import config as cfg
from meta_train import dry_run, launch, loop, nowcast
from meta_train.groups import programs
from meta_train.nowcast_config import Nowcasting

ROOT = Path(__file__).parents[1]
QUICK = ["--meta-steps", "1", "--compare", ""]
SMALL = [
    *("--estimator.pairs", "2", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *("--rule", "nn_adam", "--groups.0.settings", '{"data": ["digits"], "hidden": [4]}'),  # it compiles quickly
]


def failure(capsys, *arguments: str) -> str:
    """The one line of error that these arguments give."""
    assert launch.main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quickstar"], "Did you mean 'quickstart'?"),
        (["quickstart", "--estimator.pears", "3"], "--estimator.pairs"),
        (["quickstart", "--meta-stepz", "3"], "--meta-steps"),
        (["quickstart", "--meta-steps", "many"], "--meta-steps"),
        (["quickstart", "--estimator.std", "-1"], "estimator.std, got -1.0; valid: > 0"),
        (["quickstart", "--horizon.low", "10"], "horizon.low, got 10; valid: >= estimator.truncation = 50"),
        (["quickstart", "--rule", "tinny"], "Did you mean 'tiny'?"),
        (["quickstart", "--rule-settings", '{"hiden": 3}'], "Did you mean 'hidden'?"),
        (["quickstart", "--rule-settings", "hidden=3"], "--rule-settings"),
        (["quickstart", "--groups.0.family", "image_mpl"], "Did you mean 'image_mlp'?"),
        (["quickstart", "--groups.0.settings", '{"data": "mnist"}'], "mnist5k"),
        (["quickstart", "--estimator.name", "pse"], "Did you mean 'pes'?"),
        (["quickstart", "--meta-loss", "test"], "fresh, train, validation"),
        (["quickstart", "--objective", "finale"], "Did you mean 'final'?"),
        (
            ["quickstart", "--normalise", "reference"],
            "groups.0.reference_loss of image_mlp with normalise = 'reference', got 0.0; valid: > 0",
        ),
        (["quickstart", "--meta-steps", "1.5"], "--meta-steps: got '1.5'; valid: an integer"),
        (["quickstart", "--meta-steps", "3000000000"], "meta_steps, got 3000000000; valid: 1 to 2^31 - 1"),
        (["quickstart", "--meta-optimizer.lr", "x"], "--meta-optimizer.lr: got 'x'; valid: a number"),
        (["quickstart", "--meta-optimizer.lr", "1e-6"], "lr, got 1e-06 and final_lr = 1e-05; valid: 0 <= final_lr <="),
        (["quickstart", "--meta-optimizer.settings", '{"b1": 2}'], "settings: adam: b1, got 2; valid: a number in [0"),
        (["quickstart", "--horizon.low", "2000"], "horizon.low, got 2000 and high = 1000; valid: low <= high"),
        (["quickstart", "--stages", "x"], "stages, got 'x'; valid: a JSON list of objects with the keys start, low"),
        (["quickstart", "--freeze", "mlp", "skip", "log_step"], "which is all of theta; valid: a part of it"),
        (["quickstart", "--dry-run", "--distributed"], "what it says is of one process; valid: no --distributed"),
        (["quickstart", "--estimator.sign", "-1"], "estimator.sign, got -1.0; valid: >= 0"),
        (
            ["quickstart", "--estimator.std-parts", '{"mpl": 0.1}'],
            "config.estimator.std_parts: unknown part of theta 'mpl'",
        ),
        (["quickstart", "--estimator.std-parts", '{"mlp": "a"}'], "estimator.std_parts: mlp, got a; valid: > 0"),
        (
            ["quickstart", "--estimator.name", "full_backprop", "--estimator.sign", "1"],
            "config.estimator.sign, got 1.0; valid: none, since full_backprop does not perturb theta",
        ),
        (
            ["quickstart", "--compare", "quikstart"],
            "config.compare: unknown suite 'quikstart'; valid: digits, quickstart",
        ),
        (
            ["quickstart", "--stages", '[{"start": 9, "low": 60, "high": 50, "truncation": 5}]'],
            "stage from meta-step 9: high, got 50; valid: low = 60 to 2^31 - 1",
        ),
        (
            ["quickstart", "--meta-optimizer.name", "lbfgs"],
            "config.meta_optimizer.name, got lbfgs, which wants the loss at other points",
        ),
        (["quickstart", "--groups.0.processes", "1"], "config.groups.0.processes, got 1; valid: 0 to 0"),
        (
            ["quickstart", "--validation.tasks", '[{"family": "image_mlp", "settings": {"data": "digits"}}]'],
            "config.validation.tasks.0, got image_mlp(digits, 8x8, 32, relu, batch 64), which is in the mixture",
        ),
        (["quickstart", "--rule-settings", '{"hidden": "a"}'], "tiny: hidden, got 'a'; valid: int"),
        (["quickstart", "--rule-settings", '{"step_mult": NaN}'], "NaN is not a number"),
        (["quickstart", "--groups.0.settings", '{"hidden": 3}'], "the config cannot be built: TypeError"),
        (["quickstart", "--estimator.std", "inf"], "estimator.std, got inf; valid: > 0, finite"),
        (["quickstart", "--estimator.std", "nan"], "estimator.std, got nan"),
        (["quickstart", "--loss-limit", "inf"], "loss_limit, got inf"),
        (["quickstart", "--seed", "99999999999999999999"], "seed, got 99999999999999999999"),
        (["quickstart", "--horizon.high", "99999999999"], "high = 99999999999; valid: low <= high < 2^31"),
        (["quickstart", "--name", "../../escape"], "name, got '../../escape'"),
        (["resume", "no-such-folder"], "not a run directory"),
        (
            ["resume", str(ROOT / "checkpoints/lopt-base")],
            "checkpoints/lopt-base is an artifact and not a run directory",
        ),
        (["resume"], "lopt-train resume: "),
        (["export", "no-such-folder"], "not a run directory"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "something was written"


def test_an_existing_run_directory_is_left_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("precious")
    assert "exists" in failure(capsys, "quickstart", "--out", "run", *QUICK)
    assert (tmp_path / "run/config.json").read_text() == "precious"
    assert launch._new_folder("", "name") == Path("runs/name")
    assert launch._new_folder("", "name") == Path("runs/name-2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rule_setings": {}}, "unknown key 'rule_setings'. Did you mean 'rule_settings'?"),
        ({"meta_steps": "many"}, "config.meta_steps, got 'many'"),
        ({"estimator": {"pairs": 0}}, "estimator.pairs, got 0"),
        ({"estimator": {"pears": 1}}, "config.estimator: unknown key 'pears'"),
        ({"groups": [{"weight": 1.0}]}, "config.groups.0, got no family"),
        ({"groups": 3}, "config.groups"),
        (
            {"stages": [{"start": 5, "low": 10, "high": 20, "truncation": 50}]},
            "low, got 10; valid: >= its truncation = 50",
        ),
        ({"stages": [{"start": 0, "low": 60, "high": 90, "truncation": 50}]}, "stages: starts, got [0]"),
        ({"stages": [{"start": 5, "low": 60, "truncation": 50}]}, "config.stages.0, got no high"),
        ({"rule_settings": 3}, "config.rule_settings, got 3; valid: an object"),
    ],
)
def test_a_damaged_config_is_named(capsys, tmp_path, change, says):
    tree = {**cfg.load("quickstart").to_json(), **change}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert says in failure(capsys, "resume", str(tmp_path))


def test_a_config_survives_json():
    run = cfg.load("quickstart")
    assert cfg.Run.from_json(json.loads(json.dumps(run.to_json()))) == run


@pytest.mark.parametrize("arguments", [["--help"], ["quickstart", "--help"], ["list"]])
def test_help_needs_no_jax(arguments):
    code = "import sys; from meta_train.launch import main\n"
    code += f"try: main({arguments!r})\nexcept SystemExit: pass\n"
    code += "sys.exit(' '.join({'jax', 'orbax', 'matplotlib'} & set(sys.modules)) or 0)"
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert "quickstart" in run.stdout or "usage" in run.stdout
    assert time.monotonic() - began < 5  # under a second on an idle machine; this one runs tests beside it


def test_a_folder_that_cannot_be_written_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    """Also where the disk is full in the middle of a checkpoint, which TensorStore says in its own way."""
    monkeypatch.chdir(tmp_path)

    def full(*args, **settings):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    words = ["quickstart", *SMALL, *QUICK, "--out", "run"]
    assert launch.main(words) == 2
    assert "run/checkpoints: No space left on device; valid: a folder that can be written" in capsys.readouterr().err

    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system", "other/config.json")

    monkeypatch.setattr(launch, "_write_config", read_only)
    assert launch.main([*words[:-1], "other"]) == 2
    assert "lopt-train: other/config.json: Read-only file system; valid: a folder" in capsys.readouterr().err


OWN = """
from meta_train.config import Group, Run

RUN = Run(name="mine", groups=(Group("tabular_mlp"),), meta_steps=7)
make = lambda: RUN
other = 3
"""


def test_a_config_of_ones_own_is_a_file_or_what_a_module_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("own_config_of_a_test.py", "folder/with-a-dash.py"):
        (tmp_path / path).write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = "own_config_of_a_test.py", f"{tmp_path}/folder/with-a-dash.py", "own_config_of_a_test:RUN"
    for name in (*names, "own_config_of_a_test:make", "folder/with-a-dash.py"):
        run = launch.parse(name, ["--seed", "5"]).run
        assert (run.name, run.meta_steps, run.seed) == ("mine", 7, 5)
    assert cfg.command(run) == "lopt-train config.json"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "lopt-train: gone.py: FileNotFoundError"),
        ("broken.py", "RUN = 1 / 0", "lopt-train: broken.py: ZeroDivisionError: division by zero; valid: a file or"),
        ("empty.py", "", "lopt-train: empty.py: RUN, got NoneType; valid: a meta_train.config.Run"),
        ("no_such_module_of_a_test:RUN", None, "ModuleNotFoundError"),
        ("json:loads", None, "lopt-train: json:loads: TypeError"),
        (
            "none.json",
            None,
            "lopt-train: none.json: [Errno 2] No such file or directory: 'none.json'; valid: the config",
        ),
        (
            "list.json",
            "[1]",
            "lopt-train: list.json: config, got [1]; valid: an object.; valid: the config.json of a run",
        ),
        ("math:pi", None, "lopt-train: math:pi: pi, got float; valid: a meta_train.config.Run, or a function"),
    ],
)
def test_what_is_no_config_is_named(capsys, tmp_path, monkeypatch, name, text, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert says in failure(capsys, name)


@pytest.mark.parametrize("name", cfg.named())
def test_every_config_builds(name):
    run = cfg.load(name)
    assert cfg.module(run.name) == name
    assert cfg.load(run.name) is run
    if isinstance(run, Nowcasting):
        assert nowcast.pinned(run) == run
        return
    if len(run.groups) > 1:  # a large rule is traced for seconds in each group and stage; a small one fits them as well
        run = dataclasses.replace(run, rule="nn_adam", rule_settings={})
    assert launch._build(run).stages[0].inner_steps > 0


def test_two_processes_do_not_share_a_run(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cfg.load("quickstart").to_json()))
    with launch._locked(tmp_path):
        assert "is in use by another process" in failure(capsys, "resume", str(tmp_path))


def test_a_run_that_was_edited_is_not_resumed(capsys, tmp_path):
    run = tmp_path / "run"
    assert launch.main(["quickstart", *SMALL, *QUICK, "--out", str(run)]) == 0
    tree = json.loads((run / "config.json").read_text())
    again = cfg.load(str(run / "config.json"))
    assert json.loads(json.dumps(again.to_json())) == tree
    assert cfg.load(str(run / "artifact/config.json")) == again
    for change in ({"rule_settings": {"lr0": 0.5}}, {"seed": 1}):
        (run / "config.json").write_text(json.dumps({**tree, **change}))
        capsys.readouterr()
        assert "belongs to another config" in failure(capsys, "resume", str(run))
        assert "belongs to another config" in failure(capsys, "export", str(run))
    (run / "config.json").write_text(json.dumps({**tree, "log_every": 7}))
    assert launch.main(["export", str(run), "--to", str(tmp_path / "weights")]) == 0
    assert lopt.load(run, num_steps=3)  # a run's folder will do
    assert (tmp_path / "weights/model.safetensors").read_bytes() == (run / "artifact/model.safetensors").read_bytes()


def test_a_dry_run_says_what_would_be_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "SECONDS", 0.0)
    tasks = ["--validation.tasks", '[{"family": "tabular_mlp", "settings": {"hidden": []}}]']
    tasks += ["--validation.inner-steps", "5", "--validation.every", "100"]
    assert launch.main(["quickstart", *SMALL, *tasks, "--meta-steps", "1000", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for says in (
        "program 0: group image_mlp: 310 params (layer0/b [4], layer0/w [64, 4], layer1/b [10], layer1/w [4, 10]); "
        "data digits\n",
        "pairs use 2 of 8 devices; a multiple of 8 uses all",
        "compiled in ",
        " MiB",
        " inner steps/s",
        "1,000 meta-steps would take ",
        ", 11 of them 0:0",
        "\ntogether ",
    ):
        assert says in out, says
    assert not list(tmp_path.iterdir())


def test_a_dry_run_adds_up_the_stages(monkeypatch):
    monkeypatch.setattr(dry_run, "SECONDS", 0.0)
    run = cfg.Run(
        name="x",
        rule="nn_adam",
        groups=(cfg.Group("logistic_regression", {"data": "breast_cancer", "size": None, "batch_size": 8}),),
        estimator=cfg.Estimator(pairs=1, truncation=2),
        horizon=cfg.Horizon(4, 9),
        stages=(cfg.Stage(1_000_000, 400, 900, 400), cfg.Stage(4_000_000, 8, 9, 8)),
        meta_steps=3_000_000,
    )
    said = list(dry_run.report(run, loop.build(run)))
    assert "stage from meta-step 0: 1,000,000 meta-steps, horizons 4 to 9, truncation 2" in said
    assert "stage from meta-step 1,000,000: 2,000,000 meta-steps, horizons 400 to 900, truncation 400" in said
    assert "  it is never reached: the run has 3,000,000 meta-steps" in said
    assert sum(line.startswith("compiled in ") for line in said) == 2
    parts, (whole,) = (
        [seconds(line) for line in said if re.match(start, line)] for start in ("its .* would take", "3,000,000 meta-")
    )
    assert abs(whole - sum(parts)) <= 2  # they are rounded
    assert parts[1] > 4 * parts[0]  # more meta-steps, and longer ones: the first stage tells nothing of the second


def seconds(line: str) -> int:
    """Of the time h:mm:ss that a line ends with."""
    return sum(int(part) * 60**i for i, part in enumerate(reversed(line.rpartition(" ")[2].split(":"))))


def test_it_is_said_what_shares_a_program_and_what_could():
    def image(*data: str, **settings) -> cfg.Group:
        return cfg.Group("image_mlp", {"data": list(data), "hidden": [4]} | settings)

    def said(*groups: cfg.Group) -> list[str]:
        return list(programs(dataclasses.replace(cfg.load("quickstart"), groups=groups)))

    together = said(image("digits", "mnist5k"), cfg.Group("quadratic"))
    assert len(together) == 2
    assert together[0].startswith("program 0: group image_mlp: 310 params")
    assert together[0].endswith("; digits and mnist5k share it")
    assert together[1] == "program 1: group quadratic: 32 params (params [32])"
    could = 'groups 0 and 2 differ in their data alone: one group with data ["digits", "mnist5k"] is one program'
    assert said(image("digits"), cfg.Group("quadratic"), image("mnist5k"))[-1] == could
    assert len(said(image("digits"), image("mnist5k", hidden=[5]))) == 2  # other shapes
    assert len(said(image("digits"), image("mnist5k", size=14))) == 2
    tables = (cfg.Group("tabular_mlp", {"data": name}) for name in ("breast_cancer", "wine"))
    assert len(said(*tables)) == 2  # other widths, and a family of one data set


def test_a_profile_is_written_where_it_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["quickstart", *SMALL, "--meta-steps", "8", "--compare", "", "--profile", "--out", "run"]) == 0
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_the_command_of_a_run_makes_it_again():
    run = launch.parse("quickstart", [*SMALL, "--freeze", "skip", "mlp.0", "--seed", "7", "--log-every", "3"]).run
    words = shlex.split(cfg.command(run))
    assert words[:2] == ["lopt-train", "quickstart"]
    assert launch.parse("quickstart", words[2:]).run.identity() == run.identity()
    assert "--log-every" not in words
    assert cfg.command(cfg.load("quickstart")) == "lopt-train quickstart"


@pytest.mark.parametrize(
    "words",
    [
        ["--stages", '[{"start": 9, "low": 60, "high": 90, "truncation": 5}]'],
        ["--estimator.std-parts", '{"mlp": 0.05}'],
        ["--horizon.stagger", "--allow-held-out"],
        ["--task", "image_mlp", "--task", "cnn", "--groups.1.settings", '{"data": "digits"}', "--groups.1.weight", "2"],
        ["--validation.tasks", '[{"family": "tabular_mlp"}]'],
    ],
)
def test_so_it_does_with_lists_and_mixtures(words):
    run = launch.parse("quickstart", words).run
    assert launch.parse("quickstart", shlex.split(cfg.command(run))[2:]).run.identity() == run.identity()


def test_the_command_turns_off_what_is_on():
    run = cfg.load("quickstart")
    staggered = dataclasses.replace(run, horizon=dataclasses.replace(run.horizon, stagger=True))
    assert cfg.command(staggered) == "lopt-train quickstart --horizon.stagger"
    assert not launch.parse("quickstart", ["--horizon.no-stagger"]).run.horizon.stagger


def test_a_run_carries_what_it_started_at(capsys, tmp_path, monkeypatch):
    """And goes on where that is gone; a setting that is not the start's is said."""
    import shutil

    monkeypatch.chdir(tmp_path)
    assert launch.main(["quickstart", *SMALL, *QUICK, "--out", "first"]) == 0
    again = ["--rule-settings", '{"lr0": 0.5}', "--init-from", "first"]
    assert launch.main(["quickstart", *SMALL, *again, *QUICK, "--out", "second"]) == 0
    said = capsys.readouterr().out
    assert "init_from: lr0 was 0.001 there and is 0.5 here" in said
    assert "meta_optimizer.warmup 100 is longer than the run: it is 0 here" in said
    shutil.rmtree("first")
    assert launch.main(["resume", "second"]) == 0
    assert launch.main(["export", "second", "--to", "exported"]) == 0


def test_without_its_extra_the_launcher_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; from meta_train.__main__ import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (run.returncode, run.stderr.strip()) == (2, "error: lopt-train needs tyro: pip install 'lopt[train]'")
