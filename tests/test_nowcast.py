"""Nowcasts against recordings of the reference, and that wrong variants of the arithmetic would be seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nino
import numpy as np
import pytest

from lopt import nowcast
from lopt.nowcast import network as N
from lopt.nowcast import predict, released


@pytest.fixture(scope="module")
def recorded():
    return nino.fixture()


@pytest.fixture(scope="module")
def small(recorded):
    """The random network of the recorded batch."""
    name, settings, theta = released._of_released({k[2:]: x for k, x in recorded.items() if k.startswith("w/")})
    return N.Network(name, settings, jax.tree.map(jnp.asarray, theta))


def outputs(z, network, **changed):
    """[E, 9, 40] in training mode: changes plus the last state."""
    x = {k.removeprefix("batch_"): z[k] for k in z if k.startswith("batch_")} | changed
    out = jax.jit(N.apply_gnn, static_argnums=(0, 5))(
        Hashed(network),
        network.theta,
        x["edge_attr"],
        x["edge_type"],
        x["edge_index"],
        76,
        positions=x["pos"],
        words=x["pos_w"],
    )
    return out + x["edge_attr"].reshape(-1, 9, 5)[:, :, 4:]


class Hashed:
    """What `apply_gnn` reads of a network, hashable by identity."""

    def __init__(self, network):
        self.settings = network.settings


def test_training_mode_is_reproduced(recorded, small):
    out = np.asarray(outputs(recorded, small))
    assert np.abs(out[:49].reshape(49, -1) - recorded["out_graph0_full"]).max() < 2e-5  # of values up to 15
    assert np.abs(out[:, 0] - recorded["out_feat0"]).max() < 2e-5
    assert np.abs(out[49:, 0, 12:13] - recorded["eval_g1_k13"]).max() < 2e-5
    for wrong in (
        {"edge_index": recorded["batch_edge_index"][::-1]},  # edges the other way round
        {"pos_w": 0 * recorded["batch_pos_w"]},  # words not looked up
        {"edge_type": np.where(recorded["batch_edge_type"] == 3, 1, recorded["batch_edge_type"])},
    ):
        assert np.abs(outputs(recorded, small, **wrong)[:, 0] - recorded["out_feat0"]).max() > 1e-2


@pytest.mark.slow  # compiles the backward pass
def test_training_mode_loss_and_gradients(shared):
    with np.load(shared / "parity/nino/train_mode_batch.npz") as z:
        z = dict(z)
    theta = {}
    for group in ("w/", "grad/"):
        arrays = {k.removeprefix(group): x for k, x in z.items() if k.startswith(group)}
        name, settings, theta[group] = released._of_released(arrays)
    weights = jax.tree.map(jnp.asarray, theta["w/"])

    def loss(weights):
        out = outputs(z, N.Network(name, settings, weights))
        return N.masked_l1(out.reshape(427, -1), z["batch_y"], z["batch_y_mask"])

    got, grads = jax.value_and_grad(loss)(weights)
    assert abs(got - z["loss"]) < 1e-6 * z["loss"] * 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4), grads, theta["grad/"])


def test_masked_l1_ignores_what_is_masked():
    out, target = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, jnp.nan, 5.0])
    mask = jnp.array([True, False, True])
    value, grad = jax.value_and_grad(N.masked_l1)(out, target, mask)
    assert value == 1.5
    assert np.array_equal(grad, [0.5, 0.0, -0.5])
    assert N.masked_l1(out, target, jnp.zeros(3, bool)) == 0


def test_schedules(recorded):
    cases = [k for k in recorded if k.startswith("k_")]
    assert len(cases) == 8
    for case in cases:
        steps, period, power = (int(x) for x in case.replace("p", "").split("_")[1:])
        assert np.array_equal(nowcast.schedule(steps, period, power=power), recorded[case]), case
    assert not np.array_equal(nowcast.schedule(10_000, 1000, power=3), recorded["k_10000_1000_p2"])


@pytest.mark.parametrize("weights", nino.WEIGHTS)
@pytest.mark.parametrize(
    "case", [x if x == "cnn_digits" else pytest.param(x, marks=pytest.mark.slow) for x in nino.CASES]
)
def test_predictions(case, weights, shared):
    with np.load(shared / f"parity/nino/{case}.npz") as z:
        z = dict(z)
    network = nowcast.read(shared / f"weights/nino/{weights}.npz")
    at = nino.horizons(z, weights)
    wanted = np.stack([z[f"pred_{weights}_k{k}"] for k in at])
    got = nino.predictions(network, z, at, positions=z["pos"])
    assert np.abs(got - wanted).max() < nino.TOLERANCE
    assert np.abs(got[::-1] - wanted).max() > 10 * nino.TOLERANCE  # another horizon


@pytest.mark.slow
def test_scaling_is_the_references_to_the_epsilon(shared):
    """Undoing the scale with std + 1e-6, as one would, is outside of the tolerance, and so are biased deviations."""
    with np.load(shared / "parity/nino/gpt2_tiny.npz") as z:
        z = dict(z)
    network = nowcast.read(shared / "weights/nino/nino_no_posw.npz")
    wanted = z["pred_nino_no_posw_k40"]
    for name, wrong in (("moved", lambda last, change, mean, std: change * (std + N.EPS)),):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(N, name, wrong)
            got = nino.predictions(network, z, [40], positions=z["pos"])[0]
        assert np.abs(got - wanted).max() > nino.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["nino_no_posw", "nino_mlp_h32"])
def test_loop_of_thirty_calls(weights, shared):
    ours, theirs = nino.loop(shared, weights)
    assert np.abs(ours - theirs).max() < nino.TOLERANCE
    if weights == "nino_mlp_h32":
        for wrong in ({"power": 1.0}, {"max_steps": 20}, {"reset_moments": True}, {"upd_scale": 0.99}):
            assert np.abs(nino.loop(shared, weights, **wrong)[0] - theirs).max() > 1e-4


def made(key=0, **settings):
    """A small network with weights large enough that nothing is lost in rounding."""
    network = nowcast.make("gnn", jax.random.key(key), **({"hidden": 8, "horizons": 4} | settings))
    return network._replace(theta=jax.tree.map(lambda x: 10 * x, network.theta))


def net():
    """conv 4×3 (two edges a pair, of 9 and 3 taps) → flatten → dense, with a transposed matrix and a vector."""
    graph = nowcast.Graph()
    x = graph.stream("input", 2)
    x = graph.conv("conv", x, 3, kernel=(4, 3), bias="b")
    x = graph.dense("fc", x, 7, positions=4)
    graph.dense("out", x, 5, transposed=True)
    shapes = {"b": (3,), "conv": (4, 3, 2, 3), "fc": (12, 7), "out": (5, 7)}
    return graph, {k: jnp.zeros(s) for k, s in shapes.items()}


def by_tiles(network, graph, params, history, at, small, tile=6):
    """Right, and with a mean by another count of edges."""
    layout = predict.plan(graph, params, list(params), taps=network.settings["taps"], small=small)

    @jax.jit
    def run(history, at, degree):
        scales = [N.statistics(x) for x in history]
        return predict.gnn_changes(network, layout._replace(degree=degree), history, scales, at, tile=tile)

    return [run(history, at, layout.degree + more) for more in (0, 1)]


def all_at_once(network, graph, params, history, at):
    """The same by `apply_gnn`, of all edges."""
    blocks, _ = graph.fitted(params)
    source, target, types = graph.edges()
    scaled = {k: np.asarray(N.scale(h, *N.statistics(h))).reshape(5, -1) for k, h in zip(params, history, strict=True)}
    features = np.zeros((len(types), 9, 5), np.float32)
    start, places = 0, []
    for block in blocks:
        index = block.places()
        places.append((block.leaf, slice(start, start + len(index)), index))
        features[start : start + len(index), : index.shape[1]] = np.moveaxis(scaled[block.leaf][:, index], 0, -1)
        start += len(index)
    features[types == N.SELF, 0] = 2.0
    edges = np.stack([source, target])
    out = jax.jit(lambda theta, x: N.apply_gnn(network, theta, x, types, edges, graph.count))(
        network.theta, features.reshape(-1, 45)
    )
    found = {k: np.zeros((len(at), np.size(x))) for k, x in params.items()}
    for leaf, rows, index in places:
        found[leaf][:, index] = np.moveaxis(np.asarray(out)[rows][:, : index.shape[1]][..., at - 1], -1, 0)
    return [x.reshape(len(at), *np.shape(params[k])) for k, x in found.items()]


# A second layer sends on what the first one moved: its tiles compute the edges' vectors anew.
SLOWER = [pytest.param(small, layers, marks=pytest.mark.slow) for small in (0, 6, 10**6) for layers in (1, 2)]


@pytest.mark.parametrize(("small", "layers"), [(6, 1), *(x for x in SLOWER if x.values != (6, 1))])
def test_tiles_are_the_whole(small, layers):
    """Packed edges and tiles that do not divide their matrix give what all edges at once give."""
    network, (graph, params) = made(layers=layers), net()
    keys = jax.random.split(jax.random.key(1), len(params))
    history = [jax.random.normal(k, (5, *x.shape)) for k, x in zip(keys, params.values(), strict=True)]
    at = np.array([1, 4])
    wanted = all_at_once(network, graph, params, history, at)
    assert max(np.abs(x).max() for x in wanted) > 1e-2
    # At 6 the vector is packed and the rest in tiles, at 0 all is in tiles, at a million all is packed.
    got, wrong = by_tiles(network, graph, params, history, jnp.asarray(at), small)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), rtol=1e-4)
        assert np.abs(wrong[2] - wanted[2]).max() > 1e-3 * np.abs(wanted[2]).max()
