"""Checkpoints: only what was saved comes back, whatever happened to the files."""

from __future__ import annotations

import shutil
from functools import partial

import jax
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


def test_a_step_under_another_number_is_passed_over(folder):
    (folder / "3").rename(folder / "9")
    step, _, remarks = restored(folder)
    assert step == 2
    assert "checkpoint 9 is damaged or cannot be read (OSError: it was saved as 3)" in remarks[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_if_none_can_be_read_all_are_left_as_they_are(folder):
    for step in (1, 2, 3):
        flip(largest(folder, step))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"checkpoint 3 is damaged.*checkpoint 2 is.*1 is.*nothing was changed; valid"):
        restored(folder)
    assert contents(folder) == before


def test_what_cannot_be_read_is_kept_until_a_newer_step_is_safe(folder):
    whole = largest(folder, 3).read_bytes()
    flip(largest(folder, 3))
    checkpoints = Checkpoints(folder, "mine")
    assert checkpoints.restore(tree(0))[0] == 2
    checkpoints.set_aside_after(2)
    assert checkpoints.steps() == [1, 2]
    aside = folder / "damaged-3"
    largest(folder, "damaged-3").write_bytes(whole)  # it was the disk that stuttered
    aside.rename(folder / "3")
    assert restored(folder)[0] == 3
    checkpoints.close()
    flip(largest(folder, 3))
    checkpoints = Checkpoints(folder, "mine")
    checkpoints.set_aside_after(2)
    checkpoints.close()  # a run that is stopped before it has come as far
    assert aside.exists()
    checkpoints = Checkpoints(folder, "mine")
    checkpoints.save(3, tree(3), loss=0.0)
    checkpoints.close()
    assert restored(folder)[0] == 3
    assert not aside.exists()


X, N = jnp.zeros(4096), jnp.zeros((), int)
OTHERS = [
    ({"x": X[1:], "n": N}, r"3 has x float32\[4096\], where the run now has x float32\[4095\]"),
    ({"y": X, "n": N}, r"3 has x float32\[4096\], where the run now has y float32\[4096\]"),
    ({"x": X}, r"3 has n int32\[\], where the run now has no such"),
    ({"x": X, "n": N, "z": N}, r"3 has no z int32\[\], where the run now has z int32\[\]: a task, the rule or"),
]


@pytest.mark.parametrize(("like", "says"), OTHERS)
def test_steps_of_other_leaves_are_refused_and_kept(folder, like, says):
    before = contents(folder)
    checkpoints = Checkpoints(folder, "mine")
    with pytest.raises(ValueError, match=says):
        checkpoints.restore(like)
    checkpoints.close()
    assert contents(folder) == before


def test_steps_of_other_batches_are_refused(tmp_path):
    eight, four = ({"batch": jax.ShapeDtypeStruct((size, 64), jnp.float32)} for size in (8, 4))
    checkpoints = Checkpoints(tmp_path, "mine", beside=eight)
    checkpoints.save(1, tree(1), loss=0.0)
    checkpoints.close()
    assert restored(tmp_path)[0] == 1  # who does not ask
    with pytest.raises(ValueError, match=r"has batch float32\[8, 64\], where the run now has batch float32\[4, 64\]"):
        Checkpoints(tmp_path, "mine", beside=four).restore(tree(0))


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
