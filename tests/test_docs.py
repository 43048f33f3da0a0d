"""What the documentation shows is run: doctests and the README's first lines of code."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["lopt.mup", "lopt.pretrained"])
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

    Keys that are younger than the weights have defaults that leave everything as it was.
    """
    import json

    from meta_train.config import Run, load

    provenance = json.loads((ROOT / "checkpoints/quickstart/config.json").read_text())["provenance"]
    run = load("quickstart")
    assert Run.from_json(provenance["run"]) == run
    assert provenance["meta_steps"] == run.meta_steps
