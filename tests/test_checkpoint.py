"""Checkpoints: only what was saved comes back, whatever happened to the files."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from meta_train.checkpoint import Checkpoints


def tree(step):
    return {"x": jnp.arange(4096.0) + step, "n": jnp.asarray(step)}


@pytest.fixture
def folder(tmp_path):
    """Steps 1, 2 and 3; the best loss is the first's."""
    checkpoints = Checkpoints(tmp_path, "mine")
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), loss=float(step))
    checkpoints.close()
    return tmp_path


def restored(folder, identity="mine"):
    checkpoints = Checkpoints(folder, identity)
    try:
        return checkpoints.restore(tree(0))
    finally:
        checkpoints.close()


def largest(folder, step):
    files = (path for path in (folder / str(step) / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def test_the_newest_is_restored(folder):
    step, found, remarks = restored(folder)
    assert (step, remarks) == (3, [])
    np.testing.assert_array_equal(found["x"], tree(3)["x"])


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, "mine")
    for step, loss in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0), (5, 2.0)):
        checkpoints.save(step, tree(step), loss=loss)
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [2, 4, 5]


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_step_is_passed_over(folder, harm):
    HARM[harm](largest(folder, 3))
    step, found, remarks = restored(folder)
    assert step == 2
    assert "checkpoint 3 is damaged" in remarks[0]
    np.testing.assert_array_equal(found["x"], tree(2)["x"])


def test_if_all_are_damaged_a_run_can_start_again(folder):
    for step in (1, 2, 3):
        flip(largest(folder, step))
    step, found, remarks = restored(folder)
    assert (step, len(remarks)) == (-1, 3)
    np.testing.assert_array_equal(found["x"], tree(0)["x"])
    checkpoints = Checkpoints(folder, "mine")
    checkpoints.drop_after(step)
    checkpoints.save(1, tree(7), loss=0.0)
    checkpoints.close()
    np.testing.assert_array_equal(restored(folder)[1]["x"], tree(7)["x"])


def test_another_configs_steps_are_refused(folder):
    with pytest.raises(ValueError, match=r"checkpoint 3 belongs to another config: config\.json was changed"):
        restored(folder, "another")
