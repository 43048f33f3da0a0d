"""Data of TFDS without TensorFlow: sets that we prepare ourselves as array_record, its mock data, and the errors."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time

import jax
import numpy as np
import pytest

import tasks
from meta_train import groups
from tasks import SPLITS, data, held_out
from tasks.data import PREFIX, stream

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("grain")
from tasks.data import tfds  # noqa: E402

rng = np.random.default_rng(0)
TRAIN = rng.integers(0, 256, (300, 28, 28)).astype(np.uint8)
TEST = rng.integers(0, 256, (60, 28, 28)).astype(np.uint8)
LINES = [f"line {i} of a text — with a dash" for i in range(500)]


def rows(x):
    return [{"image": image, "label": int(image.sum() % 10)} for image in x]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TFDS folder with sets of ours, prepared as array_record without TensorFlow."""
    at = tmp_path_factory.mktemp("tfds")
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.prepare("noise", {"train": rows(TRAIN), "test": rows(TEST)}, at, classes=10)
    tfds.prepare("lines", {"train": [{"text": line} for line in LINES]}, at)
    with np.load(data.FOLDER / "fashion10k.npz") as held:
        clothes = held["x"][:80]
    tfds.prepare("renamed", {"train": rows(np.concatenate([TRAIN[:200], clothes]))}, at, classes=10)
    modules = data.text("python_source")
    source = modules.decode(modules.tokens[:60_000]).split("\n")
    tfds.prepare("modules", {"train": [{"text": line} for line in source]}, at)
    colour = rng.integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    tfds.prepare("colour", {"train": rows(colour)}, at, classes=10)
    return at


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    tfds._content.cache_clear()
    assert "tensorflow" not in sys.modules


def test_images_are_those_that_were_prepared():
    held = data.images("noise", 28, "tfds")
    assert held.splits == {"train": (0, 270), "validation": (270, 300), "test": (300, 360)}
    assert held.classes == 10
    seen = np.round(held.x * 255).astype(np.uint8)
    assert {row.tobytes() for row in seen[:300]} == {row.tobytes() for row in TRAIN}
    assert {row.tobytes() for row in seen[300:]} == {row.tobytes() for row in TEST}
    assert not np.array_equal(seen[:270], TRAIN[:270])  # in a seeded order
    assert np.array_equal(held.y, seen.sum((1, 2), dtype=int) % 10)
    assert held.source.id == "tfds:noise:1.0.0"
    again = data.load("tfds:noise", size=28)
    assert np.array_equal(again.x, held.x)
    small = data.images("noise", 8, "tfds").x
    padded = np.pad(held.x, ((0, 0), (2, 2), (2, 2)))
    np.testing.assert_allclose(small[5, 3, 4], padded[5, 12:16, 16:20].mean(), rtol=1e-5)
    assert data.images("colour", 28, "tfds").x.shape == (40, 28, 28, 3)


def test_a_set_is_decoded_once(monkeypatch):
    calls, decode = [], tfds._decode
    monkeypatch.setattr(tfds, "_decode", lambda *a: calls.append(a[1]) or decode(*a))
    tasks.make("image_mlp", data="noise", source="tfds", hidden=[4])
    data.images("tfds:noise:1.0.0", 28)
    assert calls == ["train", "test"]


def test_text_is_characters():
    held = data.text("lines", "tfds")
    text = held.decode(held.tokens)
    assert text == "".join(line.replace("—", "?") + "\n" for line in LINES)
    assert [held.splits[split][0] for split in SPLITS] == sorted(held.splits[split][0] for split in SPLITS)
    assert held.splits["test"][1] - held.splits["test"][0] > 0.05 * len(text)


def test_a_family_takes_it_and_its_config_pins_it(monkeypatch):
    settings = {"data": "noise", "source": "tfds", "hidden": [4]}
    task = tasks.make("image_mlp", **settings)
    assert task.provenance == (data.load("noise", size=8, source="tfds").source,)
    pinned = tasks.pin("image_mlp", settings)
    name = pinned["data"]
    assert name == f"tfds:noise:1.0.0#{task.provenance[0].sha256[:12]}"
    assert tasks.pin("image_mlp", pinned) == pinned
    assert np.array_equal(tasks.make("image_mlp", **pinned).data.x, task.data.x)
    monkeypatch.setattr(tfds, "_decode", lambda *a: (TRAIN[::-1][:200], np.zeros(200, np.int32)))
    tfds._content.cache_clear()
    with pytest.raises(ValueError, match=r"noise.* has changed: sha256 .*; valid: the content that the config pins"):
        tasks.make("image_mlp", **pinned)


def test_auto_prefers_what_is_prepared_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "tasks.data"):
        assert data.images("noise", 8, "auto").source.id == "tfds:noise:1.0.0"
        assert data.images("mnist", 8, "auto").source.id == "mnist5k"
        assert data.images("fashion_mnist:3.0.1", 8, "auto").source.id == "fashion10k"
        assert data.images("digits", 8, "auto").source.id == "digits"
    assert "data noise: tfds:noise:1.0.0#" in caplog.text
    assert "data mnist: mnist5k, which is embedded" in caplog.text
    with pytest.raises(ValueError, match=r"kmnist with source='auto': TFDS has none that can be read in .*; valid:"):
        data.images("kmnist", 8, "auto")


def test_content_that_is_held_out_is_recognised_under_another_name():
    task = tasks.make("image_mlp", data="renamed", source="tfds")
    assert [source.id for source in task.provenance] == ["tfds:renamed:1.0.0", "fashion10k"]
    with pytest.raises(ValueError, match="touches what is held out for evaluation: data fashion10k"):
        held_out.refuse("lopt-train", [task])
    assert not held_out.touched(tasks.make("image_mlp", data="noise", source="tfds"))


GREY = ("mnist", "fashion_mnist", "kmnist", "emnist", "emnist/letters")
COLOUR = ("cifar10", "cifar100", "svhn_cropped", "imagenet_resized/8x8")


@pytest.mark.parametrize("name", [*GREY, *COLOUR, "lm1b"])
def test_its_own_sets_are_read_as_mock_data(name, monkeypatch):
    with tensorflow_datasets.testing.mock_data(num_examples=40):
        builder = tensorflow_datasets.builder(name)

        def prepared(name):
            read = lambda split: builder.as_data_source(split=split)  # noqa: E731
            return tfds.Prepared(f"{name}:{builder.version}", builder.info.features, read, ("train", "test"))

        monkeypatch.setattr(tfds, "open_set", prepared)
        if name == "lm1b":
            held = tfds.text(name)
            assert held.tokens.max() < len(held.vocabulary)
            return
        held = tfds.images(name, 8)
        colour = () if name in GREY else (3,)
        assert held.x.shape == (80, 8, 8, *colour)
        assert held.splits["test"] == (40, 80)
        assert held.y.max() < held.classes
        classes = {"cifar100": 100, "emnist": 62, "emnist/letters": 37, "imagenet_resized/8x8": 1000}
        assert held.classes == classes.get(name, 10)
        assert bool(held_out.aliases(held.source)) == (name in ("mnist", "fashion_mnist"))


def test_a_set_with_configs_is_found_without_one(folder, tmp_path, monkeypatch):
    """As TFDS lays it out: emnist/byclass/1.0.0."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    shutil.copytree(folder / "noise", tmp_path / "emnist/byclass")
    held = data.images("emnist", 8, "tfds")
    assert held.source.id == "tfds:emnist/byclass:1.0.0"
    assert np.array_equal(held.x, data.images("emnist/byclass:1.0.0", 8, "tfds").x)
    assert tfds.pinned("tfds:emnist").startswith("tfds:emnist/byclass:1.0.0#")
    assert data.images("emnist", 8, "auto").source == held.source
    shutil.copytree(folder / "noise", tmp_path / "emnist/letters")
    for source in ("tfds", "auto"):
        with pytest.raises(ValueError, match="emnist is prepared in several configs; valid: emnist/byclass, emnist/l"):
            data.images("emnist", 8, source)
    assert data.images("emnist/letters", 8, "tfds").source.id == "tfds:emnist/letters:1.0.0"


def test_tfrecord_is_refused_with_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist/3.0.1").mkdir(parents=True)
    (tmp_path / "mnist/3.0.1/dataset_info.json").write_text(json.dumps({"name": "mnist", "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"prepared as tfrecord, .*tfds convert_format --dataset_version_dir=\S+3.0.1"):
        data.images("mnist", 8, "tfds")
    assert data.images("mnist", 8, "auto").source.id == "mnist5k"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: data.images("mnist", 8, "tfds"),
            "tfds:mnist is not prepared in .*; valid: set TFDS_DATA_DIR, prepare",
        ),
        (lambda: data.images("noise:2.0.0", 8, "tfds"), "not prepared"),
        (lambda: data.images("noise", 40, "tfds"), "tfds:noise:1.0.0 size, got 40; valid: what 28 can be cut"),
        (lambda: data.images("lines", 8, "tfds"), "holds text; valid"),
        (lambda: data.text("noise", "tfds"), "holds images; valid"),
        (lambda: data.images("no name", 8, "tfds"), "'no name' is no name of TFDS; valid: NAME, NAME/CONFIG"),
        (lambda: tasks.make("image_mlp", data="noise", window=9), "window, got 9 with source=None; valid: 'tfds'"),
        (
            lambda: tasks.make("image_mlp", data="noise", source="tfds", window=9000),
            "window, got 9000 rows; valid: 1 to",
        ),
        (lambda: tasks.make("image_mlp", data="noise", source="tfds", window=0), "window, got 0 rows; valid: 1 to 270"),
        (lambda: tasks.make("image_mlp", data="lines", source="tfds", window=9), "holds text; valid"),
        (lambda: tasks.make("rnn_lm", data="noise", source="tfds", window=9), "holds images; valid"),
    ],
)
def test_errors_name_the_fix(call, says):
    with pytest.raises(ValueError, match=says):
        call()


CLEAN = {"image": TRAIN[0], "label": 3}


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ({"test": [CLEAN]}, {}, "own splits, got test of 1; valid: train, and each of one row or more"),
        ({"train": [CLEAN], "test": []}, {}, "own splits, got train of 1, test of 0"),
        (
            {"train": [CLEAN, CLEAN | {"image": TRAIN[0] / 255}]},
            {},
            r"train\[1\], got an image float64\[28, 28\]",
        ),
        ({"train": [CLEAN | {"image": TRAIN[0][:20]}]}, {}, r"got an image uint8\[20, 28\]; valid: uint8 \[s, s\]"),
        (
            {"train": [CLEAN, CLEAN | {"image": TRAIN[0][:20, :20]}]},
            {},
            r"got an image uint8\[20, 20\]; .* of one",
        ),
        ({"train": [CLEAN | {"label": 10}]}, {}, "got label 10; valid: integers from 0, below 10 classes"),
        ({"train": [CLEAN | {"label": "cat"}]}, {}, "got label 'cat'; valid: integers"),
        ({"train": [{"image": TRAIN[0]}]}, {}, "got image; valid: a dict of image and label"),
        ({"train": [CLEAN]}, {"classes": 0}, "got image, label; valid: a dict of text; images need classes=N"),
        ({"train": [{"text": b"bytes"}]}, {"classes": 0}, "got a text of bytes; valid: str"),
        ({"train": ["words"]}, {"classes": 0}, "got str; valid: a dict of text"),
        ({"train": [CLEAN]}, {"name": "my-set"}, "name, got 'my-set'; valid: letters, digits and underscores"),
        ({"train": [CLEAN]}, {"name": "noise"}, "noise is prepared already, in .*; valid: another name"),
    ],
)
def test_what_would_not_be_read_as_it_was_given_is_not_prepared(rows, settings, says, folder):
    """Among it a second set of a name: TFDS would keep the first and say nothing."""
    with pytest.raises(ValueError, match=says):
        tfds.prepare(settings.get("name", "own"), rows, folder, classes=settings.get("classes", 10))
    assert not (folder / "own").exists()


def test_a_set_that_is_too_small_to_split_is_refused(tmp_path, monkeypatch):
    """Batches of an empty split would be rows of the next one."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    tfds.prepare("two", {"train": [CLEAN | {"image": TRAIN[0][..., None]}] * 2}, classes=10)
    with pytest.raises(ValueError, match=r"two:1\.0\.0 is too small to split: train 0, validation 1, test 1; valid"):
        data.images("two", 28, "tfds")


def test_what_does_not_fit_is_pointed_to_windows(monkeypatch):
    monkeypatch.setattr(tfds, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"GiB of a device; valid: a smaller size, or .* window=ROWS"):
        data.images("noise", 8, "tfds")


def test_nothing_is_downloaded_unless_asked_and_no_network_is_said_at_once(monkeypatch):
    def connect(*arguments):
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", connect)
    began = time.monotonic()
    with pytest.raises(ValueError, match="mnist cannot be downloaded: no network"):
        tfds.download("mnist")
    assert time.monotonic() - began < 5
    with pytest.raises(SystemExit, match="no network"):
        tfds.main(["download", "mnist"])


def test_windows_cover_the_set_and_depend_on_their_number_alone():
    settings = {"data": "noise", "source": "tfds", "size": 28, "hidden": [4], "window": 90}
    task = tasks.make("image_mlp", **settings)
    assert tasks.pin("image_mlp", settings)["data"].startswith(f"{PREFIX}noise:1.0.0#")
    assert task.window is not None
    windows = [task.window(i) for i in (0, 1, 2)]
    assert len(task.data.x) == 90 + 30 + 60
    for window in windows:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), window) == jax.tree.map(
            lambda x: (x.shape, x.dtype), task.data
        )
        assert np.array_equal(window.x[90:], task.data.x[90:])  # validation and test stay
    assert np.array_equal(windows[0].x, task.data.x)
    parts = [{row.tobytes() for row in np.asarray(window.x[:90])} for window in windows]
    held = {row.tobytes() for row in np.asarray(task.data.x[90:])}
    assert len(set.union(*parts)) == 270  # each row once before any comes again
    assert not set.union(*parts) & held
    assert np.array_equal(task.window(2).x, windows[2].x)
    assert held_out.touched(task) == []
    assert stream.parse("tfds:noise") is None
    part = stream.Part("noise", 5, 3)
    assert stream.parse(stream.named(part)) == part


def test_a_run_is_fed_by_windows_which_its_meta_step_determines():
    settings = {"data": "noise", "source": "tfds", "hidden": [4], "window": 90}
    made = [tasks.make("image_mlp", **settings), tasks.make("image_mlp", data="digits")]
    first = tuple(task.data for task in made)
    put = lambda held: held  # noqa: E731
    data_at = groups.feed(made, first, 10, put)
    for step, index in ((0, 0), (9, 0), (10, 1), (25, 2)):
        fed, plain = data_at(step)
        assert np.array_equal(fed.x, made[0].window(index).x)
        assert plain is made[1].data
    resumed = groups.feed(made, first, 10, put)(25)[0]
    assert np.array_equal(resumed.x, data_at(29)[0].x)
    assert data_at(25)[0] is data_at(29)[0]  # one window is decoded once
    assert groups.feed(made[1:], first[1:], 10, put)(99)[0] is made[1].data


def characters(held, split):
    return held.decode(held.tokens[slice(*held.splits[split])])


def test_windows_of_a_text_follow_each_other():
    settings = {"data": "lines", "source": "tfds", "width": 4, "length": 8, "window": 90}
    task = tasks.make("rnn_lm", **settings)
    name = tasks.pin("rnn_lm", settings)["data"]
    assert name.startswith(f"{PREFIX}lines:1.0.0#")
    assert name.endswith("?rows=90")
    first = data.text(name)
    text = "".join(line.replace("—", "?") + "\n" for line in LINES)
    assert text.startswith(characters(first, "train"))
    assert [characters(first, split).count("\n") for split in SPLITS] == [90, 50, 45]
    assert text.endswith(characters(first, "test") + characters(first, "validation"))
    for index in (1, 4, 5):  # the last ones begin the set again
        held = data.text(f"{name}&window={index}")
        assert held.splits == first.splits
        assert characters(held, "train").startswith(LINES[90 * index % 405].replace("—", "?") + "\n")
        assert characters(held, "test") == characters(first, "test")
        assert np.array_equal(task.window(index), held.tokens)
    with pytest.raises(ValueError, match=r"lines\S* window, got 900 rows; valid: 1 to 405"):
        tasks.make("rnn_lm", **settings | {"window": 900})


def test_what_is_held_out_is_recognised_in_windows():
    """By what the task keeps as its provenance, as a recording of it would be judged."""
    for family, settings in (
        ("image_mlp", {"data": "renamed", "size": 14, "hidden": [4]}),
        ("rnn_lm", {"data": "modules", "width": 4, "length": 8}),
    ):
        expected = {"image_mlp": "data fashion10k", "rnn_lm": "data python_source"}[family]
        for window in ({}, {"window": 90}):
            task = tasks.make(family, source="tfds", **settings, **window)
            assert held_out.touched_by(task.provenance, [task.family]) == [expected]
            with pytest.raises(ValueError, match=f"touches what is held out for evaluation: {expected}"):
                held_out.refuse("lopt-train", [task])
    for window in ({}, {"window": 90}):
        assert len(tasks.make("rnn_lm", data="lines", source="tfds", width=4, length=8, **window).provenance) == 1
