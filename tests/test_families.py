"""The contract of a task, over every registered family at a small size.

Two programs with a gradient are compiled a family, one mapped and one alone, and one that judges.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import closing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from tasks import SPLITS, checks, data
from tasks.__main__ import ONE_LOSS
from tasks.augment import AUGMENTATIONS, wrap
from tasks.supervised import Examples

STEPS, SEEDS = 200, 16
# Compiling is most of the time: with the last two a transformer's mapped step takes a quarter of 1.8 s of CPU.
FAST: Any = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
KEYS = jax.random.split(jax.random.key(0), 5)
BEGUN = jax.random.split(KEYS[0], SEEDS)


class Case(NamedTuple):
    settings: dict[str, Any]
    lr: float = 3e-3
    ratio: float = 0.6  # of the validation loss after 200 steps of Adam to that before


spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "benchmarks/families.py")
assert spec is not None
assert spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
sys.modules["families"] = benchmark  # where its NamedTuple looks for its types
spec.loader.exec_module(benchmark)

CASES = {
    "autoencoder": Case({"hidden": (16,), "code": 4}),
    "cnn": Case({"size": 8, "channels": (4, 8), "batch_size": 32}),
    "coordinate_mlp": Case({"hidden": (16, 16), "batch_size": 32}, lr=0.01, ratio=0.5),
    "diffusion": Case({"depth": 1, "width": 32, "frequencies": 4}, lr=0.01, ratio=0.7),
    "es": Case({"pairs": 16}, lr=0.03, ratio=0.9),
    "graph_network": Case({}, lr=0.01),
    "image_mlp": Case({}, ratio=0.5),
    "lasso": Case({"noise": 0.01}, lr=0.03, ratio=0.6),
    "logistic_l1": Case({"noise": 0.01}, lr=0.03, ratio=0.98),
    "logistic_regression": Case({}, lr=0.03, ratio=0.4),
    "matrix_completion": Case({"gradient_noise": 0.01}, lr=0.03, ratio=0.6),
    "matrix_factorisation": Case({"rows": 32, "columns": 16, "true_rank": 2}, lr=0.03, ratio=0.4),
    "mlp_mixer": Case({"depth": 1, "width": 16, "token_hidden": 8, "channel_hidden": 16, "batch_size": 32}),
    "pinn": Case({"hidden": (16,), "batch_size": 32}, lr=0.01),
    "policy_gradient": Case({"episodes": 8, "length": 80}, lr=0.03, ratio=0.8),
    "quadratic": Case({}, lr=0.03, ratio=0.1),
    "resnet": Case({"channels": (8,), "batch_size": 16}, lr=0.01, ratio=0.7),
    "rnn_lm": Case({"width": 16, "embedding": 8, "length": 16, "batch_size": 16}, lr=0.02, ratio=0.75),
    "structured_regression": Case({"gradient_noise": 0.01}, lr=0.03, ratio=0.6),
    "synthetic": Case({"noise": 0.01}, lr=0.01, ratio=0.2),
    "tabular_mlp": Case({}, ratio=0.3),
    "tabular_regression": Case({}, ratio=0.8),  # half of the variance is noise
    "transformer_lm": Case({"depth": 1, "width": 16, "length": 16, "batch_size": 16}, lr=0.01, ratio=0.75),
    "vae": Case({"hidden": (16,), "latents": 4}),
    "vit": Case({"depth": 1, "width": 16, "batch_size": 32}, lr=0.01),
}
FAMILIES = sorted(tasks.REGISTRY)


@functools.cache
def make(family):
    if family in ("autoencoder", "vae"):
        pytest.importorskip("haiku")
    return tasks.make(family, **CASES[family].settings)


def test_every_family_has_a_case():
    assert set(CASES) == set(FAMILIES)


def step(task, params, key, phi, held):
    """Batch, loss and gradient."""
    batch_key, loss_key = jax.random.split(key)
    batch = task.batch(batch_key, phi, held, "train")
    return batch, *(task.value_and_grad or jax.value_and_grad(task.loss))(params, loss_key, phi, batch)


def begin(task, key, held):
    """phi, params, batch, loss and gradient of one key."""
    phi_key, init_key, step_key = jax.random.split(key, 3)
    phi = task.sample(phi_key)
    params = task.init(init_key, phi)
    return phi, params, *step(task, params, step_key, phi, held)


@functools.cache
def begun(family):
    """`begin` of SEEDS keys, mapped, in NumPy's arrays: whatever is done with JAX's is compiled for each shape."""
    task = make(family)
    mapped = jax.jit(jax.vmap(functools.partial(begin, task), (0, None)), compiler_options=FAST)
    found = mapped(BEGUN, task.data)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(found[:2]))  # an update would make them strong
    return jax.device_get(found)


@functools.cache
def advancing(family):
    """A step of Adam, jitted, which two tests share, its state before the first, and a list that grows when traced.

    Its key is given as numbers, rows of a NumPy array: JAX compiles what takes its own arrays apart.
    """
    task, traces = make(family), []
    adam = optax.flatten(optax.adam(CASES[family].lr))  # in as many operations as for one leaf

    def advance(params, state, key, phi, held):
        traces.append(1)
        found = step(task, params, jax.random.wrap_key_data(key), phi, held)
        updates, state = adam.update(found[2], state)
        return found, optax.apply_updates(params, updates), state

    shapes = jax.eval_shape(adam.init, pick(begun(family)[1], 0))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(advance, compiler_options=FAST), state, traces


@functools.cache
def numbers(name):
    """Keys as numbers: those that `begin` makes its steps with, or those of the training."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3)[2])(BEGUN) if name == "begun" else None
    return np.asarray(jax.random.key_data(jax.random.split(KEYS[4], STEPS) if keys is None else keys))


def pick(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *jax.device_get((one, other)))))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_finite_and_every_leaf_has_a_gradient(family):
    task = make(family)
    phi, params, batch, loss, grads = begun(family)
    assert loss.shape == (SEEDS,)
    assert np.isfinite(loss).all()
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf.reshape(SEEDS, -1) != 0, axis=1).all(), path
    assert jax.tree.map(np.shape, grads) == jax.tree.map(np.shape, params)
    if task.metrics:
        found = jax.eval_shape(task.metrics, pick(params, 0), KEYS[2], pick(phi, 0), pick(batch, 0))
        assert found
        assert all(value.shape == () for value in found.values())
    assert task.name.startswith(family)
    assert task.version >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_at_init_is_near_its_closed_form(family):
    task = make(family)
    if task.init_loss is None:
        assert family in ("coordinate_mlp", "pinn", "policy_gradient", "synthetic", "vae")
        return
    losses = begun(family)[3]
    assert abs(losses.mean() - task.init_loss) < 0.1 * task.init_loss + 4 * losses.std() / SEEDS**0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_mapped_are_the_same_and_compile_once(family):
    """vmap over phi, params and keys; one key gives one batch; other values of the same shapes do not recompile."""
    task, (advance, state, traces) = make(family), advancing(family)
    phi, params, *mapped = begun(family)
    keys = numbers("begun")

    def alone(params, *arguments):
        return jax.device_get(advance(params, state, *arguments)[0])

    for i in (0, 1):
        found = alone(pick(params, i), keys[i], pick(phi, i), task.data)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, found, tuple(pick(mapped, i)))
    assert equal(found, alone(pick(params, 1), keys[1], pick(phi, 1), task.data))
    other = alone(pick(params, 1), keys[2], pick(phi, 1), task.data)
    assert not equal(found, other)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, pick(params, 1), found[2])
    alone(moved, keys[3], pick(phi, 2), jax.device_get(task.data))
    assert len(traces) == 1


def validation(task, params, phi, held):
    if not task.eval_batches:
        batches = jax.lax.map(lambda key: task.batch(key, phi, held, "validation"), jax.random.split(KEYS[3], 4))
    else:
        batches = task.eval_batches(phi, held, "validation")
    return jnp.mean(jax.lax.map(lambda batch: task.loss(params, KEYS[3], phi, batch), batches))


@pytest.mark.parametrize("family", FAMILIES)
def test_adam_lowers_the_validation_loss(family):
    task, (advance, state, _) = make(family), advancing(family)
    phi, params, *_ = pick(begun(family), 0)
    judge = jax.jit(functools.partial(validation, task), compiler_options=FAST)
    first = judge(params, phi, task.data)
    for key in numbers("training"):
        _, params, state = advance(params, state, key, phi, task.data)
    assert judge(params, phi, task.data) < CASES[family].ratio * first


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_adam_lowers_the_validation_loss_at_the_defaults(family):
    """As in docs/tasks.md."""
    if family in ("autoencoder", "vae"):
        pytest.importorskip("haiku")
    found = benchmark.curves(tasks.make(family), benchmark.RATES)
    losses = found[benchmark.best(found)]
    assert losses[-1, 1] < CASES[family].ratio * losses[0, 1]
    assert losses[-1, 0] < CASES[family].ratio * losses[0, 0]


def test_a_rate_at_the_grids_edge_is_marked_and_times_are_kept():
    task, losses = make("quadratic"), np.ones((2, 2))
    rows = [benchmark.Row("quadratic", task, 32, 9, 1234.0, at, losses) for at in (0.03, 1.0, 1e-4)]
    cells = [line.split(" | ") for line in benchmark.table(rows).splitlines()[2:]]
    assert [row[5] for row in cells] == ["0.03", "1 (edge)", "0.0001 (edge)"]
    assert benchmark.kept(benchmark.table(rows[:1])) == {("`quadratic`", benchmark.defaults(task)): 1234.0}
    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text()
    named = {family.strip("`") for family, _ in benchmark.kept(page)}
    assert named == set(FAMILIES)
    for family in FAMILIES:  # the page's defaults are the factory's
        assert (f"`{family}`", benchmark.defaults(tasks.make(family))) in benchmark.kept(page)


def test_flops_are_counted_by_hand():
    """Two products forward and four backward, whatever a loop or a wrapper hides them in."""

    def loss(w, x):
        def step(x, _):
            return jax.jit(jnp.tanh)(x @ w["a"]) @ w["b"], None

        return jnp.sum(jax.lax.scan(step, x, length=7)[0])

    shapes = {"a": jnp.ones((30, 40)), "b": jnp.ones((40, 30))}, jnp.ones((20, 30))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*shapes).jaxpr
    products = 6 * 2 * 20 * 30 * 40
    assert 7 * products < benchmark.flops(jaxpr) < 1.2 * 7 * products


def traced(task):
    """The jaxpr of all that a task computes: what `begin` does, and an evaluation set."""

    def everything(key, held):
        phi, *rest = begin(task, key, held)
        return rest, task.eval_batches(phi, held, "test") if task.eval_batches else ()

    return jax.make_jaxpr(jax.jit(everything))(KEYS[2], task.data)


def constants(jaxpr) -> int:
    """Numbers baked into what was traced."""
    return sum(np.size(const) for const in checks._constants(jaxpr))


@pytest.mark.parametrize("family", FAMILIES)
def test_data_is_never_closed_over_and_a_familys_tests_are_cheap(family):
    task = make(family)
    found = traced(task)
    assert constants(found) < 500
    steps, count = cost(found)
    assert steps <= MOST_FLOPS
    assert count <= MOST_EQUATIONS
    leaky = lambda key, phi, held: task.batch(key, phi, task.data, "train")  # noqa: E731
    phi = pick(begun(family)[0], 0)
    closed = jax.make_jaxpr(jax.jit(leaky))(KEYS[2], phi, task.data)
    assert not jax.tree.leaves(task.data) or constants(closed) > 3000


# Which examples the splits hold


def numbered(task):
    """The task's data with each example replaced by its number."""
    if isinstance(task.data, Examples):
        rows, x = np.arange(len(task.data.y), dtype=np.int32), task.data.x
        return Examples(np.broadcast_to(rows.reshape(-1, *[1] * (x.ndim - 1)), x.shape), rows)
    return np.arange(len(task.data), dtype=np.int32) if getattr(task.data, "ndim", 0) == 1 else task.data


# family -> which examples a batch holds; `None`: fresh draws, of which none comes twice
NOISY = ("lasso", "logistic_l1", "matrix_completion", "quadratic", "structured_regression", "synthetic")
EXAMPLES = {
    "coordinate_mlp": lambda batch: batch.place[..., 0] * 1000 + batch.place[..., 1],
    "graph_network": lambda batch: batch.node,
    "matrix_factorisation": lambda batch: batch.row * 1000 + batch.column,
    "rnn_lm": lambda batch: batch,
    "transformer_lm": lambda batch: batch,
} | dict.fromkeys(("pinn", "policy_gradient", *NOISY))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_example_is_in_two_splits(family):
    task, which = make(family), EXAMPLES.get(family, lambda batch: batch.y)
    phi = pick(begun(family)[0], 0)
    if which is None:
        assert task.data == ()
        assert task.eval_batches is None
        each = jax.jit(lambda key, phi: [task.batch(key, phi, (), split) for split in SPLITS], compiler_options=FAST)
        drawn = jax.device_get(each(KEYS[1], phi))  # of one key
        for one, other in itertools.combinations(drawn, 2):
            if family in NOISY:  # whose batches hold noise, of which only training has any
                assert not np.any(other)
            else:
                assert np.mean(jax.tree.leaves(one)[0] == jax.tree.leaves(other)[0]) < 0.5  # a pole's 1 is equal
        return

    def examples(phi, held):
        drawn = lambda split: jax.vmap(lambda key: which(task.batch(key, phi, held, split)))(KEYS)  # noqa: E731
        return [(which(task.eval_batches(phi, held, split)), drawn(split)) for split in SPLITS]

    found = jax.device_get(jax.jit(examples, compiler_options=FAST)(phi, numbered(task)))
    used = [{number for batch in one for number in np.ravel(batch).tolist()} for one in found]
    assert min(map(len, used)) > 5
    for one, other in itertools.combinations(used, 2):
        assert not one & other


# Wrappers

CLASSIFIERS = {"cnn", "es", "image_mlp", "logistic_regression", "mlp_mixer", "resnet", "tabular_mlp", "vit"}
REFUSED = {
    "noise_labels": set(FAMILIES) - CLASSIFIERS,  # no classes, or the loss does not look at them
    "reduce_batch": {"graph_network", *NOISY},  # no rows
}


def products(jaxpr) -> list[Any]:
    """Matrix products, wherever they are: operands' types."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({str(operand.aval.dtype) for operand in equation.invars})
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(sub, "jaxpr", sub)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


STACK = (
    "noise_labels",
    "reduce_batch",
    "reparametrise",
    "scale_loss",
    "noise_gradient",
    "normalise_gradient",
    "delay_gradient",
    "sparsify_gradient",
)


def tried(family):
    """The task, and the family whose refusals are its own."""
    if family == "pendulum":
        return tasks.make("policy_gradient", environment=family, episodes=8, length=9), "policy_gradient"
    return make(family), family


def gradients(task):
    """The jaxpr of a step's gradient, which is traced and not run, after a look at the types of what it gives."""

    def before(key, held):
        phi = task.sample(key)
        return task.init(key, phi), key, phi, task.batch(key, phi, held, "train")

    arguments = jax.eval_shape(before, KEYS[0], task.data)
    gradient = jax.make_jaxpr(task.value_and_grad or jax.value_and_grad(task.loss), return_shape=True)
    jaxpr, (loss, grads) = gradient(*arguments)
    typed = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert typed(grads) == typed(arguments[0])
    if task.grad_transform:
        state = jax.eval_shape(task.grad_transform.init, arguments[0])
        updates, state = jax.eval_shape(task.grad_transform.update, grads, state)
        assert typed(updates) == typed(arguments[0])
    return jaxpr


@pytest.mark.parametrize("family", [*FAMILIES, "pendulum"])
def test_every_wrapper_takes_every_family_or_refuses_it(family):
    """What a family does not refuse is tried in one stack."""
    task, family = tried(family)
    for name in REFUSED:
        if family in REFUSED[name]:
            with pytest.raises(ValueError, match=rf"tasks\.augment\.{name}: task, got \w+\("):
                wrap(task, [(name, {})])
    gradients(wrap(task, [(name, {}) for name in STACK if family not in REFUSED.get(name, ())]))


@pytest.mark.parametrize("family", [*FAMILIES, "pendulum"])
def test_lower_precision_is_that_of_every_product(family):
    task, family = tried(family)
    types = products(gradients(wrap(task, [("lower_precision", {})])).jaxpr)
    assert all(one == {"float32" if family == "es" else "bfloat16"} for one in types)
    assert len(types) > 1 or family == "matrix_factorisation"  # whose products are of vectors


# Init scales where phi holds other things too


@pytest.mark.parametrize("family", ["coordinate_mlp", "pinn", "policy_gradient"])
def test_init_scales_multiply_each_matrix_and_are_in_phi(family):
    plain, task = make(family), tasks.make(family, **CASES[family].settings, log10_init_scale=1.0)
    assert task.name == plain.name[:-1] + ", init 10^±1)"

    def scaled(key):
        phi, still = task.sample(key), plain.sample(key)
        return phi, still, task.init(KEYS[1], phi), plain.init(KEYS[1], still)

    phi, still, params, was = jax.device_get(jax.jit(scaled, compiler_options=FAST)(KEYS[0]))
    assert equal(phi._replace(scale=still.scale), still)  # nothing else is drawn anew
    assert np.array_equal(still.scale, np.ones(len(was)))
    assert ((phi.scale > 0.1) & (phi.scale < 10)).all()
    assert len(set(phi.scale.tolist())) == len(was)
    for index, scale in enumerate(phi.scale):
        np.testing.assert_allclose(params[f"layer{index}"]["w"], scale * was[f"layer{index}"]["w"], rtol=1e-5)
        assert np.array_equal(params[f"layer{index}"]["b"], was[f"layer{index}"]["b"])
    with pytest.raises(ValueError, match=f"{family}: log10_init_scale, got -1.0; valid: a finite number"):
        tasks.make(family, log10_init_scale=-1.0)


SMALLER = {"pinn": {"hidden": (4,)}, "vae": {"hidden": (4,), "latents": 2}}  # what the range multiplies stays
RANGES = {
    ("es", "std"): (0.01, 0.1),
    ("matrix_factorisation", "init_scale"): (0.1, 1.0),
    ("matrix_factorisation", "noise"): (0.1, 1.0),
    ("pinn", "boundary_weight"): (1.0, 100.0),
    ("synthetic", "noise"): (0.01, 1.0),
    ("vae", "beta"): [0.1, 2.0],
}


@pytest.mark.parametrize(("family", "setting"), RANGES)
def test_numbers_that_change_no_shape_may_be_drawn(family, setting):
    """By phi: a range that is one number does what the number does, and of another the draws fill it."""
    low, high = RANGES[family, setting]
    if family == "vae":
        pytest.importorskip("haiku")
    settings = CASES[family].settings | SMALLER.get(family, {})
    settings = {"task": "quadratic", "pairs": 2} if family == "es" else settings
    built = lambda value: tasks.make(family, **{**settings, setting: value})  # noqa: E731
    plain, single, ranged = built(high), built((high, high)), built((low, high))
    assert f"{low:g} to {high:g}" in ranged.name or setting == "init_scale"
    assert plain.init_loss == single.init_loss or family == "matrix_factorisation"  # whose closed form has the number

    def first(task, key):
        phi = task.sample(key)
        params, batch = task.init(key, phi), task.batch(key, phi, plain.data, "train")
        return params, batch, (task.value_and_grad or task.loss)(params, key, phi, batch)

    def everything(key):
        drawn = jax.vmap(ranged.sample)(jax.random.split(key, 100))
        return first(plain, key), first(single, key), first(ranged, key), drawn, plain.sample(key)

    fixed, same, other, phis, phi = jax.device_get(jax.jit(everything, compiler_options=FAST)(KEYS[0]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), fixed, same)
    assert not equal(fixed, other)
    name = {"es": "drawn", "vae": "drawn", "pinn": "weight"}.get(family, setting)
    drawn = getattr(phis, name)
    if drawn.ndim > 1:  # not the number itself, but what it multiplies
        drawn = np.std(drawn, axis=(1, 2)).clip(low, high)
    else:
        assert not jax.tree.leaves(getattr(phi, name, ()))
    assert ((low <= drawn) & (drawn <= high * 1.0001)).all()
    assert np.std(np.log(drawn)) == pytest.approx(np.log(high / low) / 12**0.5, rel=0.2)
    for wrong in ((high, low), (low, high, high), (-1.0, high), "ab"):
        with pytest.raises(
            ValueError, match=rf"{family}: {setting}, got .*; valid: .* to .*, or a range \(low, high\)"
        ):
            built(wrong)


def test_losses_of_noise_and_of_pixels():
    """At init diffusion guesses 0: the mean absolute normal number is sqrt(2/pi)."""
    found = {}
    for family, settings in (("diffusion", {"depth": 1, "width": 4}), ("coordinate_mlp", {"hidden": (4,)})):
        for loss in ("squared", "absolute"):
            task = tasks.make(family, **settings, loss=loss)
            found[family, loss] = jax.jit(functools.partial(begin, task), compiler_options=FAST)(KEYS[0], task.data)[3]
        with pytest.raises(ValueError, match=f"{family}: loss, got 'cubic'; valid: squared, absolute"):
            tasks.make(family, loss="cubic")
    assert found["diffusion", "squared"] == pytest.approx(1, abs=0.1)
    assert found["diffusion", "absolute"] == pytest.approx((2 / np.pi) ** 0.5, abs=0.05)
    assert 0 < found["coordinate_mlp", "absolute"] ** 2 < found["coordinate_mlp", "squared"]


def test_wine_is_regressed_on_what_else_is_known():
    task, held = tasks.make("tabular_regression", data="wine", loss="huber"), data.table("wine")
    assert np.array_equal(np.column_stack([task.data.y, task.data.x]), held.x)
    assert task.provenance == held.provenance
    with pytest.raises(ValueError, match="'breast_cancer', which has classes; valid: diabetes, wine"):
        tasks.make("tabular_regression", data="breast_cancer")


# Draws of settings


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_of_a_family_differ_and_are_valid(family):
    module = importlib.import_module(tasks.REGISTRY[family])
    drawn = [tasks.sample_settings(family, seed) for seed in range(20)]
    assert drawn[3] == tasks.sample_settings(family, 3)
    assert len({str(settings) for settings in drawn}) >= 18
    names = {name for key in module.SPACE for name in ([key] if isinstance(key, str) else key)}
    assert all(set(settings) == names for settings in drawn)
    assert ("loss" in names) != (family in ONE_LOSS)  # or the page says that there is no other
    for name in names:
        alone = name == "data" and family in ("rnn_lm", "transformer_lm")  # the other text is held out
        assert len({str(settings[name]) for settings in drawn}) > 1 or alone, name
    if family in ("autoencoder", "vae"):
        pytest.importorskip("haiku")
    made = [tasks.sample_family(family, seed) for seed in range(4)]
    assert len({task.name for task in made}) == 4
    for task in made[:2] if family not in QUICK else ():
        found = jax.eval_shape(functools.partial(forward, task), KEYS[0], task.data)
        assert jax.tree.leaves(found)[0].shape == ()


def forward(task, key, held):
    """The loss, and the gradient if it is the task's own."""
    phi = task.sample(key)
    batch = task.batch(key, phi, held, "train")
    return (task.value_and_grad or task.loss)(task.init(key, phi), key, phi, batch)


QUICK = ("logistic_regression", "quadratic", "synthetic", "tabular_mlp")  # a second each to compile


def run_a_draw(family, seed):
    """One step of the task drawn by a seed, of two keys."""
    if family in ("autoencoder", "vae"):
        pytest.importorskip("haiku")
    task = tasks.sample_family(family, seed)
    mapped = jax.jit(jax.vmap(functools.partial(begin, task), (0, None)), compiler_options=FAST)
    *_, loss, grads = jax.device_get(mapped(BEGUN[:2], task.data))
    assert loss.shape == (2,)
    assert np.isfinite(loss).all(), task.name
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), (task.name, path)
        assert leaf.any(), (task.name, path)
    return task


@pytest.mark.parametrize("family", QUICK)
def test_draws_of_a_family_that_compiles_quickly_run(family):
    for seed in range(2):
        run_a_draw(family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_of_a_family_run(family):
    for seed in range(20):
        run_a_draw(family, seed)


def test_a_draw_without_a_gradient_would_be_seen(monkeypatch):
    made = tasks.sample_family
    blind = lambda *given: made(*given)._replace(loss=lambda params, key, phi, batch: 1.0 + 0.0 * params[0])  # noqa: E731
    monkeypatch.setattr(tasks, "sample_family", blind)
    with pytest.raises(AssertionError):
        run_a_draw("quadratic", 0)


# What `make test` may take: some seconds a family, which no clock can demand of a busy machine. So what its tests
# compute and how much there is to compile is bounded.
MOST_FLOPS, MOST_EQUATIONS = 4e9, 800


def equations(jaxpr) -> int:
    """Of a program and of those in it: compiling takes as long."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(sub, "jaxpr", sub)
            total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


def cost(jaxpr) -> tuple[int, int]:
    """FLOPs of the training and of the mapped steps above, and the equations of one step."""
    return (STEPS + SEEDS) * benchmark.flops(jaxpr), equations(jaxpr)


def test_a_dear_family_would_be_seen():
    assert cost(traced(tasks.make("vit")))[0] > MOST_FLOPS  # at its defaults
    assert cost(traced(tasks.make("transformer_lm", depth=4)))[1] > MOST_EQUATIONS


def test_every_wrapper_is_tried():
    assert sorted([*STACK, "lower_precision"]) == sorted(AUGMENTATIONS)


def test_the_last_words_name_the_slowest_families(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<s><testcase classname="tests.test_families" name="test_a[cnn]" time="2.5"/>'
        '<testcase classname="tests.test_families" name="test_b[vit]" time="3"/>'
        '<testcase classname="tests.test_families" name="test_c[cnn-gradual]" time="1"/>'
        '<testcase classname="tests.test_tasks" name="test_d[vit]" time="9"/></s>'
    )
    assert list(closing.families(tmp_path / "junit.xml").items()) == [("cnn", 3.5), ("vit", 3.0)]


def test_fixed_settings_are_not_drawn():
    assert "digits" in tasks.sample_family("cnn", 1, data="digits", size=8, channels=(4,)).name
    with pytest.raises(ValueError, match="seed, got -1; valid: integers from 0"):
        tasks.sample_settings("cnn", -1)
    with pytest.raises(ValueError, match=r"unknown family 'cn'\. Did you mean 'cnn'"):
        tasks.sample_settings("cn", 1)
