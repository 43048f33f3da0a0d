"""What every test shares: JAX's settings, the reference data, and the switch for slow tests."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("LOPT_SHARED", ROOT.parent / "shared"))

# By the configuration and not by XLA_FLAGS, which subprocesses would inherit. Measured: 8 cost no time.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Almost all the time goes into compiling.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache/jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too (make test-all)")


def pytest_configure(config):
    # Writes are not atomic: a file that is being written, or was cut short, is compiled anew with this warning.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that is not part of the repository."""
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"no reference data: {SHARED}/parity is not a folder (set LOPT_SHARED)")
    return SHARED
