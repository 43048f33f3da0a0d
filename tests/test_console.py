"""What the command-line tools set JAX up with."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import console

FAST = {"xla_cpu_enable_fast_math": True} | {
    f"xla_cpu_fast_math_honor_{what}": False for what in ("nans", "infs", "division", "functions")
}


def judged(x):
    """What meta-training asks of a loss, over an array so that it is vectorised."""
    mean = jnp.mean(x)
    finite = jnp.isfinite(x)
    return finite, jnp.where(finite, jnp.minimum(x, 3.0), 3.0), jnp.isfinite(mean), jnp.exp(x) - x, 1.0 / x


def equal(options) -> bool:
    x = jnp.tile(jnp.array([1.0, jnp.nan, -2.0, jnp.inf, -jnp.inf, 0.0, 1e38, 1e-30]), 9)
    plain, other = jax.jit(judged)(x), jax.jit(judged, compiler_options=options)(x)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, other, strict=True))


def test_what_is_not_finite_stays_so():
    assert equal(console.compiler_options())


def test_devices_of_one_cpu_do_not_wait_for_each_others_threads():
    assert jax.local_device_count() > 1  # as conftest.py says
    threads = "xla_cpu_multi_thread_eigen"
    assert console.compiler_options(devices=jax.local_device_count())[threads] is False
    assert threads not in console.compiler_options()


def test_plain_fast_math_would_lose_it():
    assert not equal(FAST)


def test_a_jaxlib_that_knows_none_of_it_gets_none(monkeypatch):
    monkeypatch.setattr(console, "CPU_OPTIONS", {"xla_cpu_no_such_option": True})
    assert console.compiler_options.__wrapped__() == {}


@pytest.mark.parametrize("length", [1000, 4096])
def test_sums_are_right(length):
    x = jax.random.normal(jax.random.key(0), (4, length))
    summed = jax.jit(lambda x: x.sum(1), compiler_options=console.compiler_options())(x)
    np.testing.assert_allclose(summed, np.asarray(x, np.float64).sum(1), rtol=1e-4, atol=1e-4)


def test_what_is_left_is_reckoned_without_the_preparations(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def lines(*reports: tuple[float, int]) -> list[str]:
        clock[0] = 0.0
        with console.progress("step", 100, every=0.0) as report:
            for at, done in reports:
                clock[0] = at
                report(done)
        return capsys.readouterr().err.splitlines()

    told = lines((60, 0), (62, 2), (70, 10))  # a step a second
    assert told == ["step 0/100  1:00", "step 2/100  1:02  ETA 1:38", "step 10/100  1:10  ETA 1:30"]
    # Who does not say when they are over is believed as soon as there are two reports.
    assert lines((60, 10), (70, 20)) == ["step 10/100  1:00  ETA 9:00", "step 20/100  1:10  ETA 1:20"]
