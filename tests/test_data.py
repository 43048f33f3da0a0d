"""The embedded data sets: whole, verified, split once and for all."""

from __future__ import annotations

import hashlib
import json
import lzma
import platform
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tasks import SPLITS, data
from tasks.data import build

ROWS = [*data.names("images"), *data.names("table")]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the data folder that may be damaged."""
    for file in [*data.FOLDER.glob("*.npz"), data.FOLDER / "manifest.json"]:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    data._arrays.cache_clear()
    yield tmp_path
    data._arrays.cache_clear()


@pytest.mark.parametrize("name", ROWS)
def test_dataset_is_what_the_manifest_says(name):
    entry = json.loads((data.FOLDER / "manifest.json").read_text())[name]
    held = data.load(name)
    assert list(held.x.shape) == entry["shape"]
    assert (held.x.dtype, held.y.dtype) == (np.float32, np.int32 if held.classes else np.float32)
    assert held.source == (name, hashlib.sha256((data.FOLDER / entry["file"]).read_bytes()).hexdigest())
    assert held.classes == entry["classes"]
    assert not held.classes or set(held.y) == set(range(held.classes))
    assert np.isfinite(held.x).all()
    assert held.provenance == (held.source,)
    assert all(entry[field] for field in ("licence", "source"))
    assert not held.x.flags.writeable  # one array serves every caller
    assert not held.y.flags.writeable


@pytest.mark.parametrize("name", ROWS)
def test_splits_partition_the_rows_and_are_shuffled(name):
    held = data.load(name)
    assert list(held.splits) == list(SPLITS)
    assert np.concatenate([np.arange(*held.splits[split]) for split in SPLITS]).tolist() == list(range(len(held.x)))
    if not held.classes:
        assert max(abs(held.y[start:stop].mean()) for start, stop in held.splits.values()) < 0.25
        return
    share = np.bincount(held.y) / len(held.y)
    for start, stop in held.splits.values():
        assert (np.bincount(held.y[start:stop], minlength=held.classes) / (stop - start) > share / 2).all()


def test_every_set_has_its_licence():
    held = {path.stem: path.read_text() for path in (data.FOLDER / "licences").glob("*.txt")}
    first = " ".join(text.split("\n")[0] for text in held.values())
    assert [name for name in data.names() if name not in held and not re.search(rf"\b{name}\b", first)] == []
    for name, words in {"mnist5k": "by-sa/3.0", "scikit_learn": "scikit-learn developers"}.items():
        assert words in held[name]
        assert "THIS SOFTWARE IS PROVIDED" in held[name]


def test_no_row_is_in_two_splits():
    for name in ROWS:
        assert len({row.tobytes() for row in data.load(name).x}) == len(data.load(name).x), name


@pytest.mark.parametrize("name", data.names("table"))
def test_features_are_scored_by_the_training_split(name):
    held = data.table(name)
    for values in (held.x, held.y) if not held.classes else (held.x,):
        train = values[slice(*held.splits["train"])]
        np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
        assert abs(values.mean(0)).max() > 1e-3


@pytest.mark.parametrize("name", data.names("text"))
def test_texts_are_whole_and_cut_in_contiguous_parts(name):
    held = data.text(name)
    entry = json.loads((data.FOLDER / "manifest.json").read_text())[name]
    content = (data.FOLDER / entry["file"]).read_bytes()
    assert held.source == (name, hashlib.sha256(content).hexdigest())
    plain = lzma.decompress(content).decode("ascii")
    assert held.decode(held.tokens[-5000:]) == plain[-5000:]
    assert [len(plain)] == entry["shape"] == [len(held.tokens)]
    assert held.tokens.dtype == np.uint8
    assert held.tokens.max() == len(held.vocabulary) - 1
    assert list(held.vocabulary) == sorted(set(plain))
    stops = [0]
    for split in SPLITS:
        start, stop = held.splits[split]
        assert start == stops[-1]
        assert plain[stop - 1] == "\n"  # where a verse or a file ends
        stops.append(stop)
    assert stops[-1] == len(plain)
    assert np.diff(stops)[1:].min() > 200_000
    assert not held.tokens.flags.writeable


def test_texts_are_what_they_are_called():
    assert (
        data.text("kjv").decode(data.text("kjv").tokens[:56])
        == "In the beginning God created the heaven and the earth.\nA"
    )
    source = data.text("python_source")
    assert source.decode(source.tokens).count("\ndef ") > 1000


def test_patches_of_a_block_stay_together():
    photo = np.zeros((300, 420, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(300)[:, None] // 32, np.arange(420)[None] // 32
    cut = build.patches(photo, np.random.RandomState(0))
    where = {split: {tuple(patch[0, 0, :2]) for patch in part} for split, part in cut.items()}
    assert all((patch == patch[:1, :1]).all() for part in cut.values() for patch in part)  # nothing overlaps
    assert len(set.union(*where.values())) == sum(map(len, where.values())) == 9 * 13
    blocks = [{(row // 4, column // 4) for row, column in part} for part in where.values()]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 3 * 4


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in data.POOLING for size in data.POOLING[name]])
def test_images_are_block_means_in_the_unit_range(name, size):
    full, held = data.load(name), data.images(name, size)
    assert held.x.shape == (len(full.x), size, size, *full.x.shape[3:])
    assert held.x.dtype == np.float32
    assert 0 <= held.x.min() < 0.1
    assert 0.9 < held.x.max() <= 1
    native = full.x.shape[1]
    side = max(1, -(-native // size)) if size <= 16 else 1
    pad = (size * side - native) // 2  # negative: what is cut off
    row, column = size // 2, size // 3
    top, left = row * side - pad, column * side - pad
    block = full.x[7, top : top + side, left : left + side]
    np.testing.assert_allclose(held.x[7, row, column], block.mean((0, 1)), atol=1e-6)
    if pad >= 0:
        sums = [x.sum((1, 2), dtype=np.float64) for x in (held.x, full.x)]
        np.testing.assert_allclose(sums[0] * side**2, sums[1], rtol=1e-5)


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
        (lambda: data.images("mnist5k", 12), "mnist5k size, got 12; valid: 8, 14, 16, 28"),
        (lambda: data.images("breast_cancer", 8), "holds a table; valid: digits, fashion10k, mnist5k, rgb"),
        (lambda: data.table("digits"), "holds images; valid: breast_cancer, diabetes, wine"),
        (lambda: data.text("digits"), "holds images; valid: kjv, python_source"),
        (lambda: data.load("kjv", source="web"), "kjv source, got 'web'; valid: embedded, tfds, auto"),
    ],
)
def test_errors_name_the_valid(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_are_small_and_complete():
    files = [path for kind in ("*.npz", "*.xz") for path in data.FOLDER.glob(kind)]
    assert sorted(path.name.split(".")[0] for path in files) == list(data.names())
    assert sum(path.stat().st_size for path in files) < 12_000_000


def test_loading_needs_numpy_alone():
    code = (
        "import sys; sys.modules.update(sklearn=None, mlxtend=None, jax=None)\n"
        "from tasks import data; [data.load(name) for name in data.names()]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=data.FOLDER.parents[1])


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "digits", "python_source", "wine"])
def test_build_reproduces_the_embedded_rows_and_its_own_bytes(name, tmp_path):
    pytest.importorskip("sklearn")
    entry = json.loads((data.FOLDER / "manifest.json").read_text())[name]
    if name == "python_source" and entry["source"] != f"CPython {platform.python_version()}":
        pytest.skip(f"its text is that of {entry['source']}")
    says = build.check([name])[name]
    assert says in (build.SAME, build.RECOMPRESSED)  # which of them is the compressor's affair
    if name == "python_source":
        return
    made = build.RECIPES[name].make()
    found = build.write(name, made, tmp_path)
    assert (found["sha256"] == entry["sha256"]) == (says == build.SAME)
    assert build.write(name, made, tmp_path)["sha256"] == found["sha256"]
    # A member dated by the clock would change the hash two seconds later.
    assert {one.date_time for one in zipfile.ZipFile(tmp_path / f"{name}.npz").infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_another_content_would_be_seen(monkeypatch):
    def not_installed():
        raise ImportError("No module named 'sklearn'")

    pytest.importorskip("sklearn")
    recipe = build.RECIPES["wine"]
    made = recipe.make()
    x = np.array(made.x)
    x[3, 5] += 1e-3
    monkeypatch.setitem(build.RECIPES, "wine", recipe._replace(make=lambda: made._replace(x=x)))
    assert build.check(["wine"])["wine"].startswith("DIFFERENT: of scikit-learn")
    monkeypatch.setitem(build.RECIPES, "wine", recipe._replace(make=not_installed))
    assert build.check(["wine"])["wine"] == "not rebuilt: No module named 'sklearn'"
