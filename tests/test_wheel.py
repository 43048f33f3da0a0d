"""The wheel, in an empty environment: the weights are inside and need nothing but the core."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import importlib.util, pathlib, jax.numpy as jnp, lopt
assert "site-packages" in lopt.__file__, lopt.__file__
for module in ("flax", "orbax", "matplotlib", "tyro", "tensorflow_datasets", "sklearn"):
    assert importlib.util.find_spec(module) is None, module
assert lopt.available(), "no weights in the wheel"
for name in lopt.available():
    tx = lopt.load(name, num_steps=10)
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params, value=1.0)
    assert float(abs(updates["w"]).max()) > 0
print(*lopt.available())
"""


def test_the_wheel_works_in_an_empty_environment(tmp_path):
    # Out of the source tree: nothing may come from the checkout.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert {name.split("/")[0] for name in names} == {"lopt", "tasks", "meta_train", "meta_test"}
        shipped = {name.removeprefix("lopt/_checkpoints/"): name for name in names if "lopt/_checkpoints/" in name}
        tracked = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "checkpoints"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert set(shipped) == {path.removeprefix("checkpoints/") for path in tracked}
        for path in tracked:
            inside = archive.read(shipped[path.removeprefix("checkpoints/")])
            assert inside == (ROOT / path).read_bytes(), path
        kept = {str(path.relative_to(ROOT)) for path in (ROOT / "tasks/data").rglob("*") if path.suffix != ".pyc"}
        kept = {path for path in kept if (ROOT / path).is_file()}
        assert {name for name in names if name.startswith("tasks/data/")} == kept  # data sets and their licences
        assert sum(len(archive.read(path)) for path in kept) < 12_000_000
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty/bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel))
    assert "quickstart" in run(python, "-I", "-c", USE)
