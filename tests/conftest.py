"""What every test shares: JAX's settings, the reference data, and the switch for slow tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lopt.console import span

ROOT = Path(__file__).parents[1]
L2O = Path(__file__).parent / "fixtures/l2o.npz"
SHARED = Path(os.environ.get("LOPT_SHARED", ROOT.parent / "shared"))

# By the configuration and not by XLA_FLAGS, which subprocesses would inherit. Measured: 8 cost no time.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Almost all the time goes into compiling, a quarter of that into passes of LLVM's that no test is about, and a third of
# the rest into XLA's newer emitters of fusions and splitting a program over threads. XLA reads its flags once, when a
# program is compiled for the first time, so that subprocesses need not inherit these.
FLAGS = (
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
theirs = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = " ".join([theirs or "", *FLAGS]).strip()
jax.jit(lambda: 0).lower().compile()
if theirs is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = theirs
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache/jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too (make test-all)")


def pytest_configure(config):
    # Two workers share the cache and its writes are not atomic: what cannot be read or written is compiled anew.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


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
        if os.environ.get("LOPT_SHARED_REQUIRED"):  # .ci/run: there a skip would be a lie
            pytest.fail(f"no reference data: {SHARED}/parity is not a folder, and LOPT_SHARED_REQUIRED is set")
        pytest.skip(f"no reference data: {SHARED}/parity is not a folder (set LOPT_SHARED)")
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """Programs of an ended module are never run again, and together they take gigabytes."""
    yield
    jax.clear_caches()


class Eta:
    """A line every ten seconds instead of dots: tests done, time, ETA."""

    def __init__(self, reporter):
        self.reporter, self.done, self.began, self.last = reporter, set(), time.monotonic(), 0.0

    def pytest_report_teststatus(self, report):
        return ("passed" if report.when == "call" else "", "", "") if report.passed else None

    def pytest_runtest_logreport(self, report):
        if report.when != "teardown":
            return
        self.done.add(report.nodeid)
        elapsed, total = time.monotonic() - self.began, self.reporter._session.testscollected
        if elapsed - self.last >= 10 and total:
            self.last = elapsed
            left = elapsed / len(self.done) * (total - len(self.done))
            self.reporter.write_line(f"tests {len(self.done)}/{total}  {span(elapsed)}  ETA {span(left)}")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Eta(reporter), "eta")


@pytest.fixture(scope="session")
def committed():
    """Recordings of L2O-PA and of its instances, by `fixtures/make_l2o.py`."""
    return dict(np.load(L2O))
