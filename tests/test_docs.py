"""What the documentation shows is run: doctests and the README's first lines of code."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["lopt.mup", "lopt.pretrained", "tasks.data", "tasks.data.tfds", "tasks.held_out"])
def test_doctests(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_readmes_code_trains(capsys):
    """As typed, by a user whose arrays may broadcast."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) <= 25
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 1e-3


def test_the_shipped_quickstart_is_its_recipes():
    """Weights and named config belong together: what the card says to run is what was run.

    Keys that are younger than the weights have defaults that leave everything as it was, or stand in the record too.
    """
    import json

    from meta_train.config import Run, load

    provenance = json.loads((ROOT / "checkpoints/quickstart/config.json").read_text())["provenance"]
    run = load("quickstart")
    assert Run.from_json(provenance["run"]) == run
    assert provenance["meta_steps"] == run.meta_steps


def test_every_table_of_the_benchmark_has_its_place():
    """And what was measured is written there, and nowhere else."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    row = {"pairs": 8, "truncation": 50, "params": 2410, "rule": "velo", "devices": 1, "meta_parameters": 2_320_385}
    row |= {"inner_steps_per_second": 27_000.0, "inner_steps_per_cpu_second": 13_500.0}
    row |= {"inner_steps_per_second_10th_90th": [26_000.0, 28_000.0]}
    parts = {"batch": 1.0, "forward and backward": 10.0, "rule": 20.0, "whole": 37.0}
    floor = {"pairs": 8, "peak_gflops": 50.0, "us": parts}
    floor |= {"flops": {"forward and backward": 647_168, "rule": 701_310}}
    floor |= {"floor_us": {"forward and backward": 12.9, "rule": 14.0}}
    report = {"machine": "a machine", "reference": 2700.0, "speed": [row], "devices": [row, row], "velo": [row]}
    report |= {"scaling": {"pairs": [row], "params": [row]}, "startup": {"cold": 12.0, "warm": 5.0}, "floor": floor}
    assert set(tables.TABLES) <= set(report)
    pages = [(ROOT / page).read_text() for page in tables.PAGES]
    filled = [tables.fill(page, report) for page in pages]
    for name in tables.TABLES:
        assert sum(page.count(f"<!-- {name} -->") for page in pages) == 1, name
        (page,) = (page for page in filled if f"<!-- {name} -->" in page)
        assert page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].count("\n|") >= 3, name
    assert "| 8 | 27,000 (26,000 to 28,000) | 10.0 | yes | 13,500 | 5.0 |" in filled[0]
    # 2 x 512 x 50 x 200,000 = 1.02e10 inner steps at 27,000 a second are 105 hours.
    assert "| `pes`, K = 50 | 200,000 | 512 | 1.0e+10 | 105 | 0.017 | 1.9 |" in filled[1]
    assert [tables.fill(page, {"machine": ""}) for page in pages] == pages


def test_the_table_of_data_is_what_its_command_prints():
    from tasks.data.__main__ import table

    assert table() in (ROOT / "docs/data.md").read_text()


def test_the_own_task_of_the_documentation_works(tmp_path, monkeypatch):
    import sys

    import tasks

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/own-task.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 20
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    task = tasks.make("my_tasks:my_family", width=4)  # which checks it
    assert task.family == "my_tasks:my_family"
