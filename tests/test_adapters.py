"""Models of flax Linen, flax NNX, haiku and plain functions as tasks: meta-trained on, evaluated, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from lopt.base import LearnedOptimizer
from meta_test import runs
from meta_train import config as cfg
from meta_train import groups, loop
from meta_train.estimators.truncated_es import truncated_es
from meta_train.inner import Horizon, make_inner
from tasks import SPLITS, data, held_out
from tasks.augment import wrap

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
hk = pytest.importorskip("haiku")

UNIFORM = jax.nn.initializers.uniform(0.5)  # compiles in a tenth of the time of the default, a truncated normal
WINE = data.table("wine")
WIDTH = 5


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(logits, y):
    return {"accuracy": jnp.mean(jnp.argmax(logits, -1) == y)}


class Linen(nn.Module):
    norm: str = ""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(WIDTH, kernel_init=UNIFORM)(x)
        if self.norm == "batch":
            x = nn.BatchNorm(use_running_average=not train)(x)
        if self.norm == "dropout":
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, kernel_init=UNIFORM)(nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self, rngs, norm=""):
        self.hidden = nnx.Linear(13, WIDTH, kernel_init=UNIFORM, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, kernel_init=UNIFORM, rngs=rngs)
        norms = {"": lambda x: x, "batch": nnx.BatchNorm, "dropout": nnx.Dropout}
        if norm:
            self.norm = norms[norm](*[WIDTH] if norm == "batch" else [0.5], rngs=rngs)

    def __call__(self, x):
        x = self.hidden(x)
        return self.out(nnx.relu(self.norm(x) if hasattr(self, "norm") else x))


def haiku(x, norm=""):
    w_init = hk.initializers.RandomUniform(0.0, 0.5)
    x = hk.Linear(WIDTH, w_init=w_init)(x)
    if norm == "batch":
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
    if norm == "dropout":
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
    return hk.Linear(3, w_init=w_init)(jax.nn.relu(x))


def own(norm=""):
    def init(key):
        one, two = jax.random.split(key)
        w = jax.random.uniform(one, (13, WIDTH)), jax.random.uniform(two, (WIDTH, 3))
        return {"hidden": w[0], "a": jnp.zeros(WIDTH), "out": w[1], "b": jnp.zeros(3)}

    def forward(params, key, x):
        x = x @ params["hidden"] + params["a"][None]
        if norm == "dropout":
            x = 2 * x * jax.random.bernoulli(key, shape=x.shape)
        return jax.nn.relu(x) @ params["out"] + params["b"][None]

    def loss(params, key, batch):
        return cross_entropy(forward(params, key, batch[0]), batch[1])

    return init, loss, lambda params, key, batch: accuracy(forward(params, key, batch[0]), batch[1])


def build(kind: str, norm: str = "", held=WINE, **settings) -> tasks.Task:
    settings = {"batch_size": 16, **settings}
    if kind == "linen":
        return tasks.from_linen(Linen(norm), cross_entropy, held, metrics=accuracy, **settings)
    if kind == "nnx":
        return tasks.from_nnx(lambda rngs: Nnx(rngs, norm), cross_entropy, held, metrics=accuracy, **settings)
    if kind == "haiku":
        return tasks.from_haiku(lambda x: haiku(x, norm), cross_entropy, held, metrics=accuracy, name="hk", **settings)
    init, loss, metrics = own(norm)
    return tasks.from_functions(init, loss, held, metrics=metrics, **settings)


# One meta-parameter, the logarithm of a step size: what is tested are tasks, and this compiles in no time.
RULE = LearnedOptimizer(
    "log_sgd",
    settings={},
    needs=frozenset(),
    init_theta=lambda key: {"log_lr": jnp.full((), -3.0)},
    bind=lambda theta, **given: optax.with_extra_args_support(optax.sgd(jnp.exp(theta["log_lr"]))),
)
KINDS = ("linen", "nnx", "haiku", "functions")


def family(kind="linen"):
    """What a user would name as tests.test_adapters:family."""
    return build(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_models_pass_the_check(kind):
    task = build(kind)
    assert tasks.check(task) is None
    assert task.provenance == (WINE.source,)
    params = jax.eval_shape(lambda key: task.init(key, ()), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 13 * WIDTH + WIDTH + 3 * WIDTH + 3


def test_all_adapters_give_the_same_loss():
    """The same weights in each library's names: the four losses are one number."""
    tree, losses = {}, {}
    key = jax.random.key(1)
    for kind in ("functions", "linen", "nnx", "haiku"):
        task = build(kind)
        leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key, task=task: task.init(key, ()), key))
        for leaf in leaves:  # the four shapes differ from each other
            tree.setdefault(
                leaf.shape, np.random.default_rng(len(leaf.shape) * 100 + leaf.size).normal(size=leaf.shape)
            )
        params = treedef.unflatten([jnp.asarray(tree[leaf.shape], jnp.float32) for leaf in leaves])
        batch = task.batch(key, (), task.data, "train")
        losses[kind] = float(task.loss(params, key, (), batch))
        assert 0 <= float(task.metrics(params, key, (), batch)["accuracy"]) <= 1
    assert losses == pytest.approx(dict.fromkeys(losses, losses["functions"]), rel=1e-5)


def by_hand(task: tasks.Task, *, share: float = 1.0) -> tasks.Task:
    """The same inner problem in plain JAX, from the adapted task's params: what an adapter has to amount to.

    Args:
      share: of the hidden layer's output that goes on; another than 1 is wrong.
    """
    held = jnp.asarray(WINE.x), jnp.asarray(WINE.y)

    def init(key, phi):
        one, two, three, four = ((13, WIDTH), (WIDTH,), (WIDTH, 3), (3,))
        drawn = {leaf.shape: leaf for leaf in jax.tree.leaves(task.init(key, phi))}
        return {"hidden": drawn[one], "a": drawn[two], "out": drawn[three], "b": drawn[four]}

    def batch(key, phi, data, split):
        rows = jax.random.randint(key, (16,), *WINE.splits[split])
        return data[0][rows], data[1][rows]

    def loss(params, key, phi, batch):
        x, y = batch
        x = share * jnp.maximum(x @ params["hidden"] + params["a"][None], 0)
        logits = x @ params["out"] + params["b"][None]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * jnp.eye(3)[y], axis=1))

    return tasks.Task(held, lambda key: (), init, batch, loss)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_models_are_meta_trained_on_as_if_they_were_written_by_hand(kind):
    """A few meta-steps of plain descent: same keys, same meta-losses, meta-gradients and theta."""
    task, keys = build(kind), jax.random.split(jax.random.key(1), 3)

    def meta_train(task, held):
        inner = make_inner(RULE, task._replace(data=held), horizon=Horizon(4, 4))
        estimator = truncated_es(inner, pairs=2, std=0.1, truncation=2)

        def meta_step(carry, key):
            theta, state = carry
            found, state = estimator.estimate(key, theta, state)
            theta = jax.tree.map(lambda x, g: x - 0.3 * g, theta, found.grad)
            return (theta, state), (found.loss, found.grad["log_lr"], theta["log_lr"], found.diverged)

        theta = RULE.init_theta(keys[0])
        return jax.lax.scan(meta_step, (theta, estimator.init(keys[0], theta)), keys)[1]

    @jax.jit
    def several(held):
        return [meta_train(one, held) for one in (task, by_hand(task), by_hand(task, share=0.9))]

    found, true, other = jax.device_get(several(task.data))
    loss, gradient, theta, diverged = found
    assert not diverged.any()
    assert (np.abs(gradient) > 1e-3).all()
    for ours, theirs, wrong in zip((loss, gradient, theta), true, other, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
        assert not np.allclose(ours, wrong, rtol=1e-3)


@pytest.mark.slow
def test_a_run_takes_one_of_each(tmp_path):
    """One run whose groups are the four libraries, for a few meta-steps."""
    run = cfg.Run(
        "adapters",
        tuple(cfg.Group("tests.test_adapters:family", {"kind": kind}) for kind in KINDS),
        rule_settings={"hidden": 2},
        estimator=cfg.Estimator(pairs=1, truncation=2),
        horizon=cfg.Horizon(2, 4),
        meta_steps=3,
        log_every=1,
    )
    _, came = loop.train(run, loop.build(run), tmp_path, lambda text: None)
    assert came == 0
    lines = loop.read_metrics(tmp_path)
    assert len(lines) == 3
    assert all(np.isfinite(line[f"meta_loss/{i}"]) and not line["skipped"] for line in lines for i in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_models_are_evaluated(kind):
    program = runs.prepare(runs.Contender("sgd", lambda shared, lr: optax.sgd(lr)), build(kind), 1)
    hyper = {"lr": np.full(1, 0.1, np.float32)}
    curves = runs.run(program, hyper, np.zeros(1, int), np.array([0, 60]), (60,), lambda updates: None)
    assert curves.losses["validation"][0, 1] < 0.8 * curves.losses["validation"][0, 0]
    assert curves.test["accuracy"][0, 0] > 0.5


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("linen", "tasks.from_linen: Linen has state besides its params: batch_stats; valid: none, .* use GroupNorm"),
        ("nnx", "tasks.from_nnx: Nnx has state besides its params: BatchStat; valid: none"),
        ("haiku", "tasks.from_haiku: hk has state besides its params: .*batch_norm.*; valid: none"),
    ],
)
def test_batch_norm_is_refused(kind, says):
    with pytest.raises(ValueError, match=says):
        build(kind, "batch")


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_gets_the_key_of_the_loss(kind):
    task = build(kind, "dropout")
    params = task.init(jax.random.key(0), ())
    params = jax.tree.map(lambda x: x + 0.1, params)
    batch = task.batch(jax.random.key(1), (), task.data, "train")
    losses = [float(task.loss(params, jax.random.key(seed), (), batch)) for seed in (2, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3, kernel_init=UNIFORM)(nn.Dropout(0.5, deterministic=False)(x))


def test_a_stream_of_another_name_gets_a_key_too():
    """Another one than dropout's, and another each loss."""
    task = tasks.from_linen(Noisy(), cross_entropy, WINE)
    params, batch = task.init(jax.random.key(0), ()), task.batch(jax.random.key(1), (), task.data, "train")
    losses = [float(task.loss(params, jax.random.key(seed), (), batch)) for seed in (2, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


class Table(nnx.Module):
    """With arrays that are no variables."""

    def __init__(self, rngs):
        self.out = nnx.Linear(13, 3, kernel_init=UNIFORM, rngs=rngs)
        self.scale, self.shift = 2.0 + jnp.arange(3.0), np.array([1.0, 0.0, 0.0], np.float32)

    def __call__(self, x):
        return self.out(x) * self.scale[None] + self.shift[None]


def test_arrays_of_an_nnx_module_are_constants():
    task = tasks.from_nnx(Table, cross_entropy, WINE)
    assert tasks.check(task) is None
    key = jax.random.key(3)
    params, batch = task.init(key, ()), task.batch(key, (), task.data, "train")
    assert set(params) == {"out"}
    x, y = batch
    logits = x @ params["out"]["kernel"] + params["out"]["bias"][None]
    true = cross_entropy(logits * jnp.array([[2.0, 3.0, 4.0]]) + jnp.array([[1.0, 0.0, 0.0]]), y)
    assert float(task.loss(params, key, (), batch)) == pytest.approx(float(true), rel=1e-5)
    clothes = jnp.asarray(data.images("fashion10k", 8).x[:500])

    class Seen(Table):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.clothes = clothes

    assert held_out.touched(tasks.from_nnx(lambda rngs: Seen(rngs), cross_entropy, WINE)) == ["data fashion10k"]


class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, kernel_init=UNIFORM)(x["a"]) + nn.Dense(3, kernel_init=UNIFORM)(x["b"])


class BothNnx(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(n, 3, kernel_init=UNIFORM, rngs=rngs) for n in (4, 9))

    def __call__(self, x):
        return self.a(x["a"]) + self.b(x["b"])


def test_inputs_may_be_several_arrays():
    w_init = hk.initializers.RandomUniform(0.0, 0.5)
    rows = {
        split: ({"a": WINE.x[slice(*at), :4], "b": WINE.x[slice(*at), 4:]}, WINE.y[slice(*at)])
        for split, at in WINE.splits.items()
    }
    several = (
        tasks.from_linen(Both(), cross_entropy, rows),
        tasks.from_nnx(BothNnx, cross_entropy, rows),
        tasks.from_haiku(
            lambda x: hk.Linear(3, w_init=w_init)(x["a"]) + hk.Linear(3, w_init=w_init)(x["b"]), cross_entropy, rows
        ),
    )
    for task in several:

        def begun(key, held, task=task):
            params = task.init(key, ())
            return params, task.loss(params, key, (), task.batch(key, (), held, "train"))

        params, loss = jax.eval_shape(begun, jax.random.key(0), task.data)
        assert sorted(leaf.shape for leaf in jax.tree.leaves(params)) == [(3,), (3,), (4, 3), (9, 3)]
        assert loss.shape == ()


def test_splits_of_ones_own_are_kept_apart():
    rows = {
        split: (np.full((count, 2), i, np.float32), np.full(count, i))
        for i, (split, count) in enumerate(zip(SPLITS, (40, 7, 11), strict=True))
    }
    init = lambda key: jax.random.normal(key, (2,))  # noqa: E731
    task = tasks.from_functions(init, lambda p, key, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2), rows, name="own")
    for i, split in enumerate(SPLITS):
        x, y = task.batch(jax.random.key(0), (), task.data, split)
        assert x.shape == (64, 2)
        assert set(np.ravel(x)) == set(np.ravel(y)) == {i}
        held = task.eval_batches((), task.data, split)
        assert held[0].shape == (1, (40, 7, 11)[i], 2)
        assert set(np.ravel(held[1])) == {i}
    (source,) = task.provenance
    assert source.id == "own"
    assert len(source.sha256) == 64
    assert not held_out.touched(task)


scalar = jax.random.normal  # an init


def mean_of(params, key, batch):
    return params * jnp.mean(batch[0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: build("functions", held={"train": WINE.x}), r"data, got \['train'\]; valid: a Dataset, or a dict of"),
        (lambda: build("functions", held=3), "data, got int; valid: a Dataset"),
        (
            lambda: build("linen", held=dict.fromkeys(SPLITS, WINE.x)),
            r"data, got rows of a ndarray; valid: pairs \(x, y\)",
        ),
        (lambda: build("functions", held=dict.fromkeys(SPLITS, (WINE.x, WINE.y[:3]))), "data, got train rows of "),
        (
            lambda: build("functions", held={s: WINE.x[:, : i + 1] for i, s in enumerate(SPLITS)}),
            "splits of different layouts",
        ),
        (lambda: build("functions", batch_size=0), r"batch_size, got \[0\]"),
        (lambda: tasks.from_linen(nn.Conv(3, (99, 99, 99)), cross_entropy, WINE, name="c"), "the init of c raised "),
        (lambda: tasks.from_nnx(lambda rngs: 1 / 0, cross_entropy, WINE, name="n"), "the init of n raised ZeroDiv"),
        (
            lambda: tasks.from_functions(lambda: 0.0, mean_of, WINE),
            "the init of from_functions raised TypeError: .*takes 0",
        ),
        (
            lambda: tasks.from_functions(scalar, lambda p, b: 0.0, WINE, name="l"),
            "the loss of l raised TypeError: .*takes 2",
        ),
        (
            lambda: tasks.from_functions(scalar, lambda p, k, b: b[0], WINE, name="v"),
            r"the loss of v has shape float32\[64, 13\]; valid: one scalar",
        ),
        (
            lambda: tasks.from_functions(scalar, lambda p, k, b: (mean_of(p, k, b), {}), WINE, name="t"),
            r"the loss of t has \{\[0\] float32\[\]\}; valid: one scalar, e.g. the mean, others in metrics",
        ),
        (
            lambda: tasks.from_functions(scalar, lambda p, k, b: None, WINE, name="z"),
            "the loss of z has {}; valid: one",
        ),
        (
            lambda: tasks.from_functions(scalar, lambda p, k, b: np.mean(np.asarray(b[0])), WINE, name="u"),
            r"the loss of u uses NumPy on what jit traces \(test_adapters.py:\d+\); valid: jax.numpy",
        ),
        (
            lambda: tasks.from_functions(scalar, mean_of, dict.fromkeys(SPLITS, (np.array(["a"]), np.ones(1)))),
            "data, got arrays of <U1; valid: numbers",
        ),
        (
            lambda: tasks.from_nnx(Nnx(nnx.Rngs(0)), cross_entropy, WINE),
            "from_nnx: make, got a Nnx; valid: a function of nnx.Rngs that returns one",
        ),
        (
            lambda: tasks.from_haiku(hk.transform(haiku), cross_entropy, WINE),
            "from_haiku: forward, got a Transformed; valid: the function that hk.transform would take",
        ),
        (
            lambda: tasks.from_functions(scalar, mean_of, WINE, metrics=lambda p, b: {}, name="m"),
            "the metrics of m raised",
        ),
    ],
)
def test_faults_are_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_held_out_is_recognised_behind_an_adapter():
    clothes = data.images("fashion10k", 8)
    rows = {split: (clothes.x[slice(*clothes.splits[split])] * 2 - 1, np.zeros(1)) for split in SPLITS}
    rows = {split: (x, np.zeros(len(x), np.int32)) for split, (x, _) in rows.items()}
    init = lambda key: jax.random.normal(key, (64,))  # noqa: E731
    task = tasks.from_functions(init, lambda p, key, b: jnp.mean(b[0].reshape(-1, 64) @ p), rows, name="mine")
    assert held_out.touched(task) == ["data fashion10k"]
    with pytest.raises(ValueError, match="mine touches what is held out"):
        held_out.refuse("lopt-train", [task])
    assert groups.make_tasks(cfg.Run("x", (cfg.Group("cnn"),)), (cfg.Group("cnn"),))


@pytest.mark.parametrize("kind", ["linen", "nnx", "haiku", "functions"])
def test_labels_of_pairs_can_be_noisy(kind):
    plain = build(kind)
    noisy = wrap(plain, [("noise_labels", {"share": 0.6})])
    phi = noisy.sample(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 20)
    for split in SPLITS:
        batches = [[task.batch(key, of, task.data, split) for key in keys] for task, of in ((noisy, phi), (plain, ()))]
        (x, y), (held, true) = (jax.tree.map(lambda *parts: jnp.concatenate(parts), *several) for several in batches)
        assert jnp.array_equal(x, held)
        assert y.dtype == true.dtype
        assert set(y.tolist()) == {0, 1, 2}
        changed = jnp.mean(y != true)
        assert changed == pytest.approx(0.6 * 2 / 3, abs=0.15) if split == "train" else changed == 0
    rows, clean = noisy.eval_batches(phi, noisy.data, "train"), plain.eval_batches((), plain.data, "train")
    assert isinstance(rows, tuple)
    assert jnp.array_equal(rows[0], clean[0])
    assert 0.2 < jnp.mean(rows[1] != clean[1]) < 0.6
    if kind == "functions":  # rows by name
        init, _, _ = own()
        parts = {split: {"x": WINE.x[slice(*at)], "y": WINE.y[slice(*at)]} for split, at in WINE.splits.items()}
        loss = lambda params, key, batch: cross_entropy(batch["x"] @ params["hidden"] @ params["out"], batch["y"])  # noqa: E731
        named = wrap(tasks.from_functions(init, loss, parts, batch_size=16), [("noise_labels", {"share": 0.6})])
        assert jnp.array_equal(named.eval_batches(phi, named.data, "train")["y"], rows[1])


def test_numbers_of_pairs_are_no_labels():
    rows = dict.fromkeys(SPLITS, (WINE.x[:40], WINE.x[:40, 0]))
    error = lambda out, y: jnp.mean((out[:, 0] - y) ** 2)  # noqa: E731
    blind = lambda out, y: jnp.mean(out**2)  # noqa: E731
    for task in (tasks.from_linen(Linen(), error, rows), tasks.from_linen(Linen(), blind, WINE)):
        with pytest.raises(ValueError, match="noise_labels: task, got Linen; valid: tasks with classes y"):
            wrap(task, [("noise_labels", {})])
