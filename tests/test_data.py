"""The embedded data sets: whole, verified, split once and for all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tasks import SPLITS, data


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the data folder that may be damaged."""
    for file in [*data.FOLDER.glob("*.npz"), data.FOLDER / "manifest.json"]:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    data.load.cache_clear()
    yield tmp_path
    data.load.cache_clear()


@pytest.mark.parametrize("name", data.names())
def test_dataset_is_what_the_manifest_says(name):
    entry = json.loads((data.FOLDER / "manifest.json").read_text())[name]
    held = data.load(name)
    assert list(held.x.shape) == entry["shape"]
    assert (held.x.dtype, held.y.dtype) == (np.float32, np.int32)
    assert held.source == (name, hashlib.sha256((data.FOLDER / entry["file"]).read_bytes()).hexdigest())
    assert set(held.y) == set(range(entry["classes"])) == set(range(held.classes))
    assert np.isfinite(held.x).all()
    assert all(entry[field] for field in ("licence", "source"))
    assert not held.x.flags.writeable  # one array serves every caller
    assert not held.y.flags.writeable


@pytest.mark.parametrize("name", data.names())
def test_splits_partition_the_rows_and_are_shuffled(name):
    held = data.load(name)
    assert list(held.splits) == list(SPLITS)
    assert np.concatenate([np.arange(*held.splits[split]) for split in SPLITS]).tolist() == list(range(len(held.x)))
    share = np.bincount(held.y) / len(held.y)
    for start, stop in held.splits.values():
        assert (np.bincount(held.y[start:stop], minlength=held.classes) / (stop - start) > share / 2).all()


def test_no_row_is_in_two_splits():
    for name in data.names():
        x = data.load(name).x
        assert len(np.unique(x.reshape(len(x), -1), axis=0)) == len(x), name


def test_features_are_scored_by_the_training_split():
    x = data.table("breast_cancer").x
    train = x[slice(*data.load("breast_cancer").splits["train"])]
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    assert abs(x.mean(0)).max() > 1e-3


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in data.POOLING for size in data.POOLING[name]])
def test_images_are_block_means_in_the_unit_range(name, size):
    full, held = data.load(name), data.images(name, size)
    assert held.x.shape == (len(full.x), size, size)
    assert held.x.dtype == np.float32
    assert held.x.min() == 0
    assert 0.9 < held.x.max() <= 1
    side = -(-full.x.shape[1] // size)
    pad = (size * side - full.x.shape[1]) // 2
    row, column = size // 2, size // 3
    block = np.pad(full.x[7], pad)[row * side : (row + 1) * side, column * side : (column + 1) * side]
    np.testing.assert_allclose(held.x[7, row, column], block.mean(), atol=1e-6)
    np.testing.assert_allclose(held.x.sum((1, 2)) * side**2, full.x.sum((1, 2)), rtol=1e-5)


def test_a_damaged_file_is_refused(copied):
    content = bytearray((copied / "digits.npz").read_bytes())
    content[1000] ^= 1
    (copied / "digits.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"digits\.npz is damaged: sha256"):
        data.load("digits")
    assert data.load("breast_cancer").classes == 2


def test_a_missing_file_is_refused(copied):
    (copied / "digits.npz").unlink()
    with pytest.raises(ValueError, match=r"digits\.npz is missing"):
        data.load("digits")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load("mnist"), "'mnist'; valid, nearest first: mnist5k, "),
        (lambda: data.load("breastcancer"), "nearest first: breast_cancer, "),
        (lambda: data.images("digits", 14), "digits size, got 14; valid: 8"),
        (lambda: data.images("mnist5k", 16), "mnist5k size, got 16; valid: 8, 14, 28"),
        (lambda: data.images("breast_cancer", 8), "holds no images; valid: digits, mnist5k"),
        (lambda: data.table("digits"), "holds images; valid: breast_cancer"),
    ],
)
def test_errors_name_the_valid(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_are_small_and_complete():
    files = sorted(path.name for path in data.FOLDER.glob("*.npz"))
    assert files == [f"{name}.npz" for name in data.names()]
    assert sum((data.FOLDER / file).stat().st_size for file in files) < 2_000_000


def test_loading_needs_numpy_alone():
    code = (
        "import sys; sys.modules.update(sklearn=None, mlxtend=None, jax=None)\n"
        "from tasks import data; [data.load(name) for name in data.names()]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=data.FOLDER.parents[1])


def test_build_reproduces_the_embedded_rows_and_its_own_bytes(tmp_path):
    pytest.importorskip("sklearn")
    from tasks.data import build

    for name in ("breast_cancer", "digits"):
        made = build.arrays(name)
        with np.load(data.FOLDER / f"{name}.npz") as held:
            assert {field: held[field].dtype for field in held} == {field: made[field].dtype for field in made}
            assert all(np.array_equal(held[field], made[field]) for field in held)
        entry = build.write(name, made, tmp_path)
        assert build.write(name, made, tmp_path)["sha256"] == entry["sha256"]
        assert list(data.load(name).splits.values())[-1][1] == sum(entry["splits"].values())
        # A member dated by the clock would change the hash two seconds later.
        dates = {one.date_time for one in zipfile.ZipFile(tmp_path / f"{name}.npz").infolist()}
        assert dates == {(1980, 1, 1, 0, 0, 0)}
