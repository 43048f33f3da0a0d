"""Checkpoints: only what was saved comes back, whatever happened to the files."""

from __future__ import annotations

import shutil
from functools import partial

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


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
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


def test_whatever_is_done_to_a_file_is_told_or_changes_nothing(folder, tmp_path_factory):
    """Each file of the newest step: Orbax reads some of them and not others, such as its copies and marks."""
    harmed = tmp_path_factory.mktemp("harmed") / "steps"

    def met(path, harm) -> str:
        """What comes of it: "told", or "same" where the bits are those that were saved."""
        shutil.rmtree(harmed, ignore_errors=True)
        shutil.copytree(folder, harmed)
        harm(harmed / path)
        step, found, remarks = restored(harmed)
        np.testing.assert_array_equal(found["x"], tree(step)["x"])
        assert (step, remarks) == (3, []) or (step == 2 and "checkpoint 3 is damaged" in remarks[0]), (path, remarks)
        return "told" if remarks else "same"

    files = [path.relative_to(folder) for path in sorted((folder / "3").rglob("*")) if path.is_file()]
    seen = {str(path): {met(path, harm) for harm in HARM.values()} for path in files}
    arrays = str(largest(folder, 3).relative_to(folder))
    assert seen[arrays] == seen["3/seal/metadata"] == seen["3/state/manifest.ocdbt"] == {"told"}
    size = (folder / "3/seal/metadata").stat().st_size
    for at in range(0, size, 11):  # sha256, identity, layout, names and punctuation
        assert met("3/seal/metadata", partial(flip, at=at)) == "told", at


def test_another_configs_steps_are_refused(folder):
    with pytest.raises(ValueError, match=r"checkpoint 3 belongs to another config: config\.json was changed"):
        restored(folder, "another")
