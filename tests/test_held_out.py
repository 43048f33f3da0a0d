"""What is held out is recognised, whatever name it goes by; what is not held out is left alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
import tasks
from meta_train import config as cfg
from meta_train import groups, loop
from tasks import DEV, HELD_OUT, REGISTRY, Source, Task, data, held_out

ROOT = Path(__file__).parents[1]
SMALL = {"data": "fashion10k", "hidden": (4,)}


def plain(held, **fields) -> Task:
    """A task of a user, with data that it got somewhere."""

    def batch(key, phi, held, split):
        return held

    return Task(held, lambda key: (), lambda key, phi: jnp.zeros(3), batch, lambda *a: jnp.zeros(()), **fields)


def test_the_reserves_are_disjoint_and_known():
    assert {"fashion10k", "rgb_patches", "python_source"} <= set(HELD_OUT.data)
    assert {"vit", "diffusion", "graph_network", "coordinate_mlp"} <= set(HELD_OUT.families)
    assert not set(HELD_OUT.data) & set(DEV.data)
    assert not set(HELD_OUT.families) & set(DEV.families)
    assert set(HELD_OUT.data + DEV.data) <= set(data.names())
    assert set(DEV.families) <= set(REGISTRY)


def elsewhere(settings) -> bool:
    """Whether settings, or those of a family in them, name another source of data than the package."""
    if isinstance(settings, str):
        return settings.startswith("tfds:")
    if isinstance(settings, dict):
        return settings.get("source", "embedded") != "embedded" or any(map(elsewhere, settings.values()))
    return isinstance(settings, list | tuple) and any(map(elsewhere, settings))


def shipped_breaches(run: cfg.Run) -> list[str]:
    """What a shipped config may not do."""
    wrong = ["allows what is held out"] if run.allow_held_out else []
    for group in [*run.groups, *run.validation.tasks]:
        if elsewhere(dict(group.settings)):
            wrong.append(f"{group.family}: data of another source than the package")
        task = tasks.make(group.family, **group.settings)
        wrong += held_out.touched(task)
        wrong += held_out.touched(task, DEV) if group in run.groups else []
    wrong += ["chooses by a suite that judges"] if getattr(run.validation, "suite", "") in ("mini", "heldout") else []
    return wrong


@pytest.mark.parametrize("name", cfg.named())
def test_shipped_configs_touch_neither_reserve(name):
    assert not shipped_breaches(cfg.load(name))


def test_a_breach_would_be_seen():
    for family, settings in (
        ("image_mlp", SMALL),
        ("tabular_mlp", {}),
        ("tabular_regression", {"data": "wine"}),  # a data set of the suite `dev`
        ("es", {"task": "logistic_regression", "settings": {"data": "wine", "size": None}}),
        ("image_mlp", {"data": "mnist", "source": "auto"}),
        ("es", {"task": "image_mlp", "settings": {"data": "mnist", "source": "auto"}}),
    ):
        assert shipped_breaches(cfg.Run("x", (cfg.Group(family, settings),)))
    fine = cfg.Run("x", (cfg.Group("image_mlp"),))
    assert not shipped_breaches(fine)
    assert shipped_breaches(dataclasses.replace(fine, allow_held_out=True))
    assert shipped_breaches(dataclasses.replace(fine, validation=cfg.Validation(suite="mini")))
    seen = cfg.Validation(tasks=(cfg.Group("image_mlp", SMALL),))
    assert shipped_breaches(dataclasses.replace(fine, validation=seen))


@pytest.mark.parametrize("family", sorted(set(REGISTRY) - set(HELD_OUT.families)))
def test_other_families_are_not_taken_for_held_out_ones(family):
    where = held_out.trace(tasks.make(family))
    assert family in where.families  # and, of one that is made of another, that one
    assert not set(where.families) & set(HELD_OUT.families)
    assert not set(where.data) & set(HELD_OUT.data)


FACTORY = """
def vit(width=3):
    weights = [width]
    def loss(params, key, phi, batch):
        return weights[0] * params.sum()
    return loss
def helper(x):
    return x
"""


def test_a_family_is_recognised_by_its_functions():
    names = {"__name__": "tasks.vit"}
    exec(FACTORY, names)
    loss, helper = names["vit"](), names["helper"]
    inner = functools.partial(loss)

    def wrapped(params, key, phi, batch):
        return 2.0 * inner(params, key, phi, batch)

    assert held_out.touched(plain(())._replace(loss=wrapped)) == ["family vit"]
    assert held_out.touched(plain(())._replace(loss=jax.jit(loss))) == ["family vit"]
    # A function that other families use does not make a vision transformer.
    assert not held_out.touched(plain(())._replace(loss=lambda params, key, phi, batch: helper(params)))


@pytest.mark.parametrize("family", sorted(set(REGISTRY) & set(HELD_OUT.families)))
def test_held_out_families_are_recognised_without_their_name(family):
    task = getattr(importlib.import_module(REGISTRY[family]), family)()
    bare = plain(()).loss
    for part in ("loss", "init"):
        functions = {"loss": bare, "init": bare} | {part: functools.partial(getattr(task, part))}
        assert held_out.touched(plain(())._replace(**functions)) == [f"family {family}"], part


def test_a_family_is_recognised_among_globals(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text(
        "import tasks\nfrom tasks.cnn import cnn\nINNER = cnn()\n"
        "def loss(params, key, phi, batch):\n    return (lambda: INNER.loss(params, key, phi, batch))()\n"
        "def family():\n    return INNER._replace(loss=loss, init=loss, sample=loss, batch=loss, provenance=(),"
        " data=(), metrics=None, eval_batches=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import users_own  # type: ignore[missing-import]

    assert held_out.trace(users_own.family()) == (("mnist5k",), ("cnn",))


class Wrapper:
    """A user's own class around a task."""

    def __init__(self, task):
        self.task = task

    def loss(self, params, key, phi, batch):
        return self.task.loss(params, key, phi, batch)


@dataclasses.dataclass(frozen=True)
class Frozen:
    task: Task

    def __call__(self, params, key, phi, batch):
        return self.task.loss(params, key, phi, batch)


class Slotted(Wrapper):
    __slots__ = ("held",)

    def __init__(self, task):
        self.held = types.SimpleNamespace(task=task)

    def loss(self, params, key, phi, batch):
        return self.held.task.loss(params, key, phi, batch)


def of_a_class(task):
    class Holder:
        inner = task

        @staticmethod
        def loss(params, key, phi, batch):
            return Holder.inner.loss(params, key, phi, batch)

    return Holder.loss


def of_a_module(task):
    users = types.ModuleType("users_package")
    users.nested = types.ModuleType("users_package.nested")  # type: ignore[missing-attribute]
    users.nested.INNER = task
    names = {"users": users, "__name__": "elsewhere"}
    exec("def loss(params, key, phi, batch):\n    return users.nested.INNER.loss(params, key, phi, batch)", names)
    return names["loss"]


@pytest.mark.parametrize(
    "hidden",
    [lambda task: Wrapper(task).loss, Frozen, lambda task: Slotted(task).loss, of_a_class, of_a_module],
    ids=["a class", "a dataclass", "slots", "a class's attribute", "a module"],
)
def test_a_family_is_recognised_inside_objects_of_a_user(hidden):
    inner = tasks.make("vit", depth=1, width=4)
    assert held_out.touched(plain(())._replace(loss=hidden(inner))) == ["family vit"]
    assert not held_out.touched(plain(())._replace(loss=hidden(tasks.make("image_mlp"))))


def test_what_a_function_of_haiku_uses_is_found():
    hk = pytest.importorskip("haiku")
    vit, held = tasks.make("vit", width=8, depth=1), data.images("fashion10k", 8)

    def forward(x):
        assert vit
        return hk.Linear(2)(x) + held.x[0, 0, 0]

    rows = np.zeros((40, 3), np.float32), np.zeros(40, np.int32)
    task = tasks.from_haiku(forward, lambda out, y: jnp.mean(out), {"train": rows, "validation": rows, "test": rows})
    assert held_out.touched(task) == ["data fashion10k", "family vit"]


def test_a_rewritten_assert_does_not_lead_to_all_tests():
    def loss(params, key, phi, batch):
        assert params is not None
        return 0.0

    assert len(list(held_out._reach(loss))) < 10


def test_what_met_the_held_out_does_not_start_a_run_that_says_otherwise(tmp_path):
    rule = lopt.rules.make("nn_adam")
    run = cfg.Run("x", (cfg.Group("quadratic", {"dim": 2}),), rule="nn_adam", init_from=str(tmp_path / "a"))
    for allowed in (True, False):
        came = {"run": dataclasses.replace(run, init_from="", allow_held_out=allowed).to_json()}
        lopt.save(tmp_path / "a", rule, rule.init_theta(jax.random.key(0)), provenance=came, card="x")
        if allowed:
            with pytest.raises(ValueError, match="was meta-trained with --allow-held-out"):
                loop.build(run)
            loop.build(dataclasses.replace(run, allow_held_out=True))
        else:
            loop.build(run)


def test_data_is_recognised_inside_closures():
    clothes, digits = data.images("fashion10k", 8), data.images("digits", 8)

    def closed(held):
        return plain(())._replace(batch=lambda key, phi, _, split: held)

    assert held_out.touched(closed(clothes._replace(x=np.zeros(3), y=np.zeros(3)))) == ["data fashion10k"]  # its source
    assert held_out.touched(closed(clothes.x[:1000])) == ["data fashion10k"]  # its rows
    assert held_out.touched(closed({"rows": [jnp.asarray(clothes.x[:1000])]})) == ["data fashion10k"]
    assert not held_out.touched(closed(digits))
    assert not held_out.touched(closed([digits.x, np.array(["a", "b"]), np.array([None]), jax.random.key(0), 0.5]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_of_16_bits_are_recognised(dtype):
    for x in (data.images("fashion10k", 8).x, 2 * data.images("fashion10k", 8).x - 1):
        assert held_out.inside(jnp.asarray(x, dtype)) == ("fashion10k",)
    assert held_out.inside(jnp.asarray(data.images("mnist5k", 8).x, dtype)) == ()


def test_every_family_that_may_be_meta_trained_on_has_draws_that_are():
    for family in set(REGISTRY) - set(HELD_OUT.families) - set(DEV.families):
        drawn = [tasks.sample_settings(family, seed) for seed in range(20)]
        reserved = [any(f"'{name}'" in str(settings) for name in DEV.data + HELD_OUT.data) for settings in drawn]
        assert not all(reserved), family
    assert held_out.touched(tasks.make("tabular_regression"), DEV) == ["data diabetes", "family tabular_regression"]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: (x - 0.286) / 0.353,
        lambda x: np.round(x * 255).astype(np.uint8),
        lambda x: x[::-7],
        lambda x: x.reshape(len(x), -1),
        lambda x: x[:6000].reshape(20, 300, *x.shape[1:], 1),
        lambda x: x.swapaxes(1, 2),
        lambda x: np.concatenate([x[:100], np.random.default_rng(0).random((9900, *x.shape[1:]), np.float32)]),
    ],
    ids=["as it is", "standardised", "bytes", "a part", "flat", "batches", "lying", "among others"],
)
def test_images_are_recognised_by_content(change):
    assert held_out.inside({"user": [change(data.images("fashion10k", 28).x)]}) == ("fashion10k",)


def rounded(name, size):
    return np.round(data.images(name, size).x * 255).astype(np.uint8)


def resized(name, side, method):
    x = data.images(name, max(data.POOLING[name])).x[::20]
    return jax.image.resize(x, (len(x), side, side, *x.shape[3:]), method)


CLOTHES, PHOTOS = data.images("fashion10k", 28), data.images("rgb_patches", 32)
FLAT = CLOTHES.x[:2000].reshape(2000, -1)
COPIES = {
    "bytes of 8 pixels": lambda: rounded("fashion10k", 8),
    "bytes of 14 pixels": lambda: rounded("fashion10k", 14),
    "bytes of 16 pixels": lambda: rounded("fashion10k", 16)[..., None],
    "colour of 8 pixels": lambda: rounded("rgb_patches", 8),
    "padded": lambda: np.pad(CLOTHES.x, ((0, 0), (2, 2), (2, 2))),
    "padded unevenly": lambda: np.pad(CLOTHES.x, ((0, 0), (3, 9), (0, 12)), constant_values=-1.0),
    "colour padded": lambda: np.pad(PHOTOS.x, ((0, 0), (4, 4), (4, 4), (0, 0))),
    "labels behind": lambda: np.column_stack([FLAT, CLOTHES.y[:2000]]),
    "labels before": lambda: np.column_stack([PHOTOS.y, PHOTOS.x.reshape(len(PHOTOS.x), -1)]),
    "one-hot labels": lambda: np.column_stack([np.eye(10, dtype=np.float32)[CLOTHES.y[:2000]], FLAT]),
    "grey as colour": lambda: np.repeat(CLOTHES.x[:3000, ..., None], 3, -1),
    "colour as grey": lambda: PHOTOS.x @ np.array([0.3, 0.59, 0.11], np.float32),
    "normalised by channel": lambda: (PHOTOS.x - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.1, 0.4]),
    "negatives": lambda: 255 - rounded("fashion10k", 8),
    "mirrored": lambda: rounded("fashion10k", 14)[:, :, ::-1],
    "halves": lambda: resized("fashion10k", 20, "bilinear").astype(jnp.bfloat16),
    "one image": lambda: resized("rgb_patches", 24, "bicubic")[3],
    "bilinear": lambda: resized("fashion10k", 12, "bilinear"),
    "larger": lambda: resized("rgb_patches", 48, "bicubic"),
    "lanczos": lambda: resized("fashion10k", 10, "lanczos3"),
    "one in twenty": lambda: np.concatenate([rounded("fashion10k", 28)[:500], *[rounded("mnist5k", 28)[:4750]] * 2]),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_images_are_recognised(copy):
    found = held_out.inside(COPIES[copy]())
    photos = ("colour", "labels before", "normalised", "one image", "larger")
    assert found == (("rgb_patches",) if copy.startswith(photos) else ("fashion10k",))


def plain_images(rng):
    """What many images look like: edges, lights, boxes, rounds, and clothes as a child would cut them out."""
    y, x = np.mgrid[-1:1:28j, -1:1:28j][:, None]
    a, b, c = rng.uniform(size=(3, 500, 1, 1))
    yield np.tanh((x * np.cos(6.3 * a) + y * np.sin(6.3 * a) + 1.4 * b - 0.7) * (2 + 14 * c))
    yield np.exp(-(((x - 2 * a + 1) / (0.4 + c)) ** 2) - ((y - 2 * b + 1) / (1.4 - c)) ** 2)
    yield 1.0 * ((np.abs(x) < 0.1 + 0.8 * a) & (np.abs(y) < 0.1 + 0.8 * b))
    yield 1.0 * ((x / (0.1 + 0.8 * a)) ** 2 + (y / (0.1 + 0.8 * b)) ** 2 < 1)
    body, sleeves = np.abs(x) < 0.3 + 0.3 * a, (np.abs(x) < 0.9) & (y < -0.2 - 0.3 * b)
    yield ((body | sleeves) & (np.abs(y) < 0.85)) * (0.8 + 0.2 * rng.uniform(size=(500, 28, 1)))
    legs = (np.abs(np.abs(x) - 0.3) < 0.1 + 0.15 * a) & (np.abs(y) < 0.9)
    yield legs * (0.8 + 0.2 * rng.uniform(size=(500, 28, 1)))
    yield 0.3 + 1e-6 * rng.normal(size=(500, 28, 28))  # all but even
    yield 77 + rng.integers(0, 2, (500, 28, 28)).astype(np.uint8)


def test_other_images_are_no_copies():
    rng, pixels = np.random.default_rng(0), np.arange(32.0)
    waves = np.hypot(*np.meshgrid(*[np.fft.fftfreq(32)] * 2)) + 1 / 32
    skies = pixels[None, :, None] * rng.normal(size=(500, 1, 1)) + pixels[None, None] * rng.normal(size=(500, 1, 1))
    for other in (
        *(rounded("mnist5k", size) for size in data.POOLING["mnist5k"]),
        rounded("digits", 8),
        resized("mnist5k", 12, "bilinear"),
        np.pad(data.images("mnist5k", 28).x, ((0, 0), (2, 2), (2, 2))),
        rng.random((2000, 65)),
        *(np.fft.ifft2(np.fft.fft2(rng.normal(size=(1000, 32, 32))) / waves**power).real for power in (1, 2)),
        skies + 0.01 * rng.normal(size=skies.shape),
        *plain_images(rng),
        data.text("kjv").tokens[:64_000].reshape(-1, 64),
        rng.normal(size=(64, 64)),
        np.zeros((100, 28, 28)),
        np.full((9, 8, 8), np.nan),
        np.zeros(()),
    ):
        assert held_out.inside(other) == ()


def test_copies_are_recognised_in_a_users_factory_and_in_what_a_recording_keeps(tmp_path, monkeypatch):
    (tmp_path / "users_copies.py").write_text(
        "import jax, jax.numpy as jnp, numpy as np\nimport tasks\nfrom tasks import data\n"
        "x = np.round(data.images('fashion10k', 14).x * 255).astype(np.uint8)\n"
        "x = np.pad(x, ((0, 0), (1, 1), (1, 1)))\n"
        "def family():\n"
        "    return tasks.Task(jnp.asarray(x), lambda key: (), lambda key, phi: jax.random.normal(key, (256,)),\n"
        "        lambda key, phi, data, split: data[jax.random.randint(key, (8,), 0, 9)],\n"
        "        lambda p, key, phi, b: jnp.mean((b.reshape(8, -1) / 255.0) @ p) ** 2, name='mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = tasks.make("users_copies:family")
    with pytest.raises(ValueError, match="mine touches what is held out for evaluation: data fashion10k"):
        groups.make_tasks(run := cfg.Run("x", (cfg.Group("users_copies:family"),)), run.groups)
    sources, families = json.loads(json.dumps(held_out.origins(task)))  # in a manifest, say
    assert held_out.touched_by([Source(*one) for one in sources], families) == ["data fashion10k"]
    assert not held_out.touched_by(task.provenance, [task.family])  # which would not be enough


@pytest.mark.parametrize("size", data.POOLING["rgb_patches"])
def test_images_are_recognised_at_every_size(size):
    x = data.images("rgb_patches", size).x
    assert held_out.inside(jnp.asarray(2 * x - 1)) == ("rgb_patches",)
    assert held_out.inside(np.moveaxis(x, -1, 1)) == ("rgb_patches",)  # channels first


def test_text_is_recognised_by_content():
    tokens = data.text("python_source").tokens
    other = np.random.default_rng(0).permutation(256)[tokens].astype(np.int32)
    assert held_out.inside(tokens[12345:40000]) == ("python_source",)
    assert held_out.inside({"x": other[:100_000].reshape(-1, 200)}) == ("python_source",)


@pytest.mark.parametrize("length", [17, 33, 65])
def test_windows_of_a_text_are_recognised_by_content(length):
    """As one cuts them for a language model: anywhere, in any order, with another vocabulary, time first or last."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(256)

    def windows(name, first=0):
        tokens = data.text(name).tokens
        starts = first + rng.integers(0, 300_000, 20_000)
        return ids[tokens[starts[:, None] + np.arange(length)]]

    modules, verses = windows("python_source", 2_000_000), windows("kjv")
    assert held_out.inside(modules) == held_out.inside(modules.T.astype(np.int32)) == ("python_source",)
    assert held_out.inside(verses) == ()
    rows = {"train": modules, "validation": modules[:100], "test": modules[:100]}
    task = tasks.from_functions(jax.random.normal, lambda params, key, batch: 0.0 * params, rows)
    assert held_out.touched_by(task.provenance, [task.family]) == ["data python_source"]


def test_other_content_is_left_alone():
    rng = np.random.default_rng(0)
    # Other people's Python, each file of which has the same licence on top.
    modules = "".join(path.read_text() for path in sorted(Path(optax.__file__).parent.rglob("*.py")))
    source = np.frombuffer(modules.encode("ascii", "replace"), np.uint8)
    for tree in (
        source,
        source[rng.integers(0, len(source) - 65, 20_000)[:, None] + np.arange(65)],
        data.text("kjv").tokens,
        data.images("mnist5k", 28).x,
        (data.images("digits", 8).x * 16).astype(np.uint8),
        (data.images("mnist5k", 28).x * 255).astype(np.uint8),
        rng.integers(0, 30, (5000, 24)),
        rng.integers(0, 96, 100_000),
        rng.random((500, 784)),
        np.zeros((100, 784)),
        np.full((100, 64), np.nan),
        np.zeros((0, 784)),
        {"x": np.arange(5), "y": jnp.float32(1), "z": None},
    ):
        assert held_out.inside(tree) == ()


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (lambda: tasks.make("image_mlp", **SMALL), "data fashion10k"),
        (lambda: tasks.make("image_mlp", **SMALL)._replace(provenance=(), family=""), "data fashion10k"),
        (lambda: plain((), provenance=(Source("tfds:fashion_mnist:3.0.1", "0"),)), "data fashion10k"),
        (lambda: plain((), provenance=(Source("renamed", data.sha256("python_source")),)), "data python_source"),
        (lambda: plain({"mine": data.images("rgb_patches", 8).x * 255}), "data rgb_patches"),
        (lambda: plain((), family="vit"), "family vit"),
    ],
    ids=["embedded", "stripped", "an alias", "a sha256", "arrays of one's own", "a family"],
)
def test_what_is_held_out_is_refused(task, says):
    with pytest.raises(ValueError, match=rf"lopt-train: .* touches .*: {says}; valid: .*--allow-held-out"):
        held_out.refuse("lopt-train", [tasks.make("image_mlp", hidden=(4,)), task()])


def test_recordings_are_judged_by_what_they_kept():
    task = tasks.make("image_mlp", **SMALL)
    assert held_out.touched_by(*held_out.origins(task)) == held_out.touched(task) == ["data fashion10k"]
    assert held_out.touched_by([], ["vit"]) == ["family vit"]
    around = plain((), family="users:own")._replace(loss=Wrapper(tasks.make("vit", depth=1, width=4)).loss)
    assert "family vit" in held_out.touched_by(*held_out.origins(around))
    sources, families = held_out.origins(tasks.make("image_mlp", augment=[("scale_loss", {})]))
    assert ({one.id for one in sources}, families) == ({"digits", "mnist5k"}, ["image_mlp"])
    assert not held_out.touched_by(sources, families)


def test_lopt_train_refuses_and_can_be_told(tmp_path):
    run = cfg.Run("x", (cfg.Group("image_mlp", SMALL),))
    with pytest.raises(ValueError, match="touches what is held out"):
        groups.make_tasks(run, run.groups)
    allowed = cfg.Run.from_json(run.to_json() | {"allow_held_out": True})
    assert len(groups.make_tasks(allowed, allowed.groups)) == 1
    with pytest.raises(ValueError, match=r"config\.allow_held_out, got 1; valid: bool"):
        cfg.Run.from_json(run.to_json() | {"allow_held_out": 1})
    arguments = ["quickstart", "--groups.0.settings", '{"data": "fashion10k"}', "--compare", ""]
    command = [sys.executable, "-m", "meta_train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "touches what is held out for evaluation: data fashion10k" in done.stderr.splitlines()[-1]


def test_the_command_of_a_run_says_that_it_was_told():
    from dataclasses import replace

    run = replace(cfg.load("quickstart"), allow_held_out=True)
    assert cfg.command(run) == "lopt-train quickstart --allow-held-out"


def test_the_resolved_config_pins_what_auto_served(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    run = cfg.Run("x", (cfg.Group("image_mlp", {"data": ["mnist", "digits"], "source": "auto"}),))
    pinned = groups.pinned(run)
    assert pinned.groups[0].settings == {"data": ["mnist5k", "digits"]}
    assert groups.pinned(pinned) == pinned
    wrapped = {"task": "image_mlp", "settings": {"data": "mnist", "source": "auto"}, "pairs": 4}
    for family, settings in (("es", wrapped), ("es", {"task": "es", "settings": wrapped})):
        found = groups.pinned(cfg.Run("x", (cfg.Group(family, settings),))).groups[0].settings
        assert "auto" not in str(found)
        assert "{'data': 'mnist5k'}" in str(found)
    assert groups.pinned(cfg.load("quickstart")) == cfg.load("quickstart")
