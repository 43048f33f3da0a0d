"""Whole networks against their equations in NumPy, which shares no line with the families.

That a loss falls says little: a residual network without its skips, an autoencoder whose latents are not drawn and a
denoiser that is not told the time learn too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import tasks

FAST: Any = {"xla_backend_optimization_level": 0}  # compiling is most of the time
KEYS = jax.random.split(jax.random.key(5), 4)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits, y):
    p = softmax(logits).reshape(-1, logits.shape[-1])
    return -np.mean(np.log(p[np.arange(len(p)), np.ravel(y)]))


def bernoulli(logits, x):
    p = sigmoid(logits)
    return -(x * np.log(p) + (1 - x) * np.log(1 - p))


def standard(x, axes, epsilon):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def layer_norm(p, x, epsilon=1e-5):
    return standard(x, (-1,), epsilon) * p["scale"] + p["bias"]


def group_norm(p, x, groups=2):
    parts = np.split(x, groups, -1)
    return np.concatenate([standard(one, (1, 2, 3), 1e-5) for one in parts], -1) * p["scale"] + p["bias"]


def conv(x, w, stride):
    """SAME, pixel by pixel."""
    n = x.shape[1]
    out = -(-n // stride)
    low = max((out - 1) * stride + 3 - n, 0) // 2
    x = np.pad(x, ((0, 0), (low, 3), (low, 3), (0, 0)))
    found = np.zeros((len(x), out, out, w.shape[-1]))
    for i in range(out):
        for j in range(out):
            seen = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            found[:, i, j] = np.einsum("bhwc,hwco->bo", seen, w)
    return found


def linear(p, x):
    return x @ p["w"] + p["b"]


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def image_mlp(p, phi, batch):
    x = batch.x
    for i in range(2):
        x = relu(linear(p[f"layer{i}"], x))
    return cross_entropy(linear(p["layer2"], x), batch.y)


def logistic_regression(p, phi, batch):
    return cross_entropy(linear(p, batch.x), batch.y) + 0.5 * phi.decay * (p["w"] ** 2).sum()


def cnn(p, phi, batch):
    x = relu(conv(batch.x, p["layer0"]["w"], 1) + p["layer0"]["b"])
    x = relu(conv(x, p["layer1"]["w"], 2) + p["layer1"]["b"])
    return cross_entropy(linear(p["layer2"], x.reshape(len(x), -1)), batch.y)


def resnet(p, phi, batch):
    x = conv(batch.x, p["stem"], 1)
    for name, stride in (("stage0_0", 1), ("stage0_1", 1), ("stage1_0", 2), ("stage1_1", 1)):
        q = p[name]
        y = relu(group_norm(q["norm1"], x))
        skip = np.einsum("bhwi,io->bhwo", y[:, ::stride, ::stride], q["skip"][0, 0]) if "skip" in q else x
        y = conv(y, q["conv1"], stride)
        x = skip + conv(relu(group_norm(q["norm2"], y)), q["conv2"], 1)
    return cross_entropy(linear(p["output"], relu(group_norm(p["norm"], x)).mean((1, 2))), batch.y)


def attend(q, x, heads, causal):
    mixed = np.zeros_like(x)
    for columns in np.split(np.arange(x.shape[-1]), heads):
        query, key, value = (x @ q[name][:, columns] for name in ("query", "key", "value"))
        for t in range(x.shape[1]):
            seen = slice(t + 1) if causal else slice(None)
            weights = softmax(np.einsum("bd,bkd->bk", query[:, t], key[:, seen]) / np.sqrt(len(columns)))
            mixed[:, t, columns] = np.einsum("bk,bkd->bd", weights, value[:, seen])
    return mixed @ q["merge"]


def blocks(p, x, *, causal):
    for name in ("block0", "block1"):
        q = p[name]
        x = x + attend(q, layer_norm(q["norm1"], x), 2, causal)
        x = x + linear(q["down"], gelu(linear(q["up"], layer_norm(q["norm2"], x))))
    return layer_norm(p["norm"], x)


def cut(x, side):
    """Patches [B, L, P], row by row."""
    n = x.shape[1]
    corners = [(i, j) for i in range(0, n, side) for j in range(0, n, side)]
    return np.stack([x[:, i : i + side, j : j + side].reshape(len(x), -1) for i, j in corners], 1)


def vit(p, phi, batch):
    x = linear(p["patches"], cut(batch.x, 4)) + p["embed_position"]
    return cross_entropy(linear(p["output"], blocks(p, x, causal=False).mean(1)), batch.y)


def transformer_lm(p, phi, batch):
    x = p["embed"][batch[:, :-1]] + p["embed_position"]
    return cross_entropy(linear(p["output"], blocks(p, x, causal=True)), batch[:, 1:])


def mlp_mixer(p, phi, batch):
    x = dense(p["patches"], cut(batch.x, 4))
    of = {q["kernel"].shape: q for name, q in p.items() if name.startswith("Dense")}  # all of them differ
    y = layer_norm(p["LayerNorm_0"], x, 1e-6).swapaxes(1, 2)
    x = x + dense(of[5, 4], gelu(dense(of[4, 5], y))).swapaxes(1, 2)
    x = x + dense(of[7, 6], gelu(dense(of[6, 7], layer_norm(p["LayerNorm_1"], x, 1e-6))))
    return cross_entropy(dense(p["output"], layer_norm(p["LayerNorm_2"], x, 1e-6).mean(1)), batch.y)


def autoencoder(p, phi, batch):
    x = relu(linear(p["linear"], batch.x))
    x = relu(linear(p["linear_1"], linear(p["code"], x)))
    return bernoulli(linear(p["output"], x), batch.x).mean()


def vae(p, phi, batch):
    hk = pytest.importorskip("haiku")
    mean, log_std = np.split(linear(p["output_code"], relu(linear(p["linear"], batch.x))), 2, -1)
    noise = np.asarray(jax.random.normal(next(hk.PRNGSequence(KEYS[2])), mean.shape))
    logits = linear(p["output"], relu(linear(p["linear_1"], mean + np.exp(log_std) * noise)))
    divergence = 0.5 * (mean**2 + np.exp(2 * log_std) - 2 * log_std - 1).sum(-1)
    return (bernoulli(logits, batch.x).sum(-1) + 2 * divergence).mean() / batch.x.shape[1]  # beta is 2


def diffusion(p, phi, batch):
    time_key, noise_key = jax.random.split(KEYS[2])
    time = (float(jax.random.uniform(time_key)) + np.arange(len(batch.x)) / len(batch.x)) % 1
    noise = np.asarray(jax.random.normal(noise_key, batch.x.shape))
    angle = 0.5 * np.pi * time[:, None]
    x = dense(p["image"], np.cos(angle) * (2 * batch.x - 1) + np.sin(angle) * noise)
    angles = angle * 2.0 ** np.linspace(0, 6, 4)
    told = silu(dense(p["time"], np.concatenate([np.sin(angles), np.cos(angles)], -1)))
    y = dense(p["Dense_0"], layer_norm(p["LayerNorm_0"], x, 1e-6)) + dense(p["Dense_1"], told)
    x = x + dense(p["Dense_2"], silu(y))
    return ((dense(p["output"], layer_norm(p["LayerNorm_1"], x, 1e-6)) - noise) ** 2).mean()


def coordinate_mlp(p, phi, batch):
    x = batch.place
    for i in range(2):
        x = np.sin(phi.omega * linear(p[f"layer{i}"], x))
    return ((linear(p["layer2"], x) - batch.colour) ** 2).mean()


def graph_network(p, phi, batch):
    x = relu(batch.graph.mix @ batch.graph.features @ p["layer0"]["w"] + p["layer0"]["b"])
    x = batch.graph.mix @ x @ p["layer1"]["w"] + p["layer1"]["b"]
    return cross_entropy(x[batch.node], batch.graph.label[batch.node])


def matrix_factorisation(p, phi, batch):
    return 0.5 * ((np.einsum("br,br->b", p["u"][batch.row], p["v"][batch.column]) - batch.value) ** 2).mean()


def rnn_lm(cell):
    def loss(p, phi, batch):
        x = p["embed"][batch[:, :-1]]
        for i in range(2):
            q, outputs = p[f"layer{i}"], []
            h = c = np.zeros((len(x), len(q["recurrent"])))
            for t in range(x.shape[1]):
                new, old = x[:, t] @ q["w"] + q["b"], h @ q["recurrent"]
                if cell == "vanilla":
                    h = np.tanh(new + old)
                elif cell == "gru":
                    (r, z, n), (old_r, old_z, old_n) = np.split(new, 3, -1), np.split(old, 3, -1)
                    z = sigmoid(z + old_z)
                    h = z * h + (1 - z) * np.tanh(n + sigmoid(r + old_r) * old_n)
                else:
                    enter, forget, leave, g = np.split(new + old, 4, -1)
                    c = sigmoid(forget + 1) * c + sigmoid(enter) * np.tanh(g)
                    h = sigmoid(leave) * np.tanh(c)
                outputs.append(h)
            x = np.stack(outputs, 1)
        return cross_entropy(linear(p["output"], x), batch[:, 1:])

    return loss


PLAIN = {"data": "digits", "batch_size": 3}
TEXT = {"batch_size": 2, "length": 5}
CASES = {
    "autoencoder": (autoencoder, PLAIN | {"hidden": (5,), "code": 2}),
    "cnn": (cnn, PLAIN | {"size": 8, "channels": (3, 4)}),
    "coordinate_mlp": (coordinate_mlp, {"hidden": (5, 4), "batch_size": 3}),
    "diffusion": (diffusion, PLAIN | {"depth": 1, "width": 5, "frequencies": 4}),
    "graph_network": (graph_network, {"hidden": (5,), "batch_size": 3}),
    "image_mlp": (image_mlp, PLAIN | {"hidden": (5, 4)}),
    "logistic_regression": (logistic_regression, PLAIN | {"log10_decay": (-1.0, 0.0)}),
    "matrix_factorisation": (matrix_factorisation, {"rows": 8, "columns": 6, "batch_size": 3}),
    "mlp_mixer": (
        mlp_mixer,
        PLAIN | {"patch": 4, "depth": 1, "width": 6, "token_hidden": 5, "channel_hidden": 7},
    ),
    "resnet": (resnet, PLAIN | {"channels": (4, 6), "blocks": 2}),
    "rnn_lm gru": (rnn_lm("gru"), TEXT | {"depth": 2, "width": 4, "embedding": 3, "cell": "gru"}),
    "rnn_lm lstm": (rnn_lm("lstm"), TEXT | {"depth": 2, "width": 4, "embedding": 3, "cell": "lstm"}),
    "rnn_lm vanilla": (rnn_lm("vanilla"), TEXT | {"depth": 2, "width": 4, "embedding": 3, "cell": "vanilla"}),
    "transformer_lm": (transformer_lm, TEXT | {"depth": 2, "width": 6}),
    "vae": (vae, PLAIN | {"hidden": (5,), "latents": 2, "beta": 2.0}),
    "vit": (vit, PLAIN | {"patch": 4, "depth": 2, "width": 6}),
}
# Losses that are formulas, simulations or other families', which other tests hold against theirs.
OTHERS = {"es", "pinn", "policy_gradient", "quadratic", "synthetic", "tabular_mlp", "tabular_regression"}
OTHERS |= {"lasso", "logistic_l1", "matrix_completion", "structured_regression"}


def test_every_network_has_a_case():
    assert {name.split()[0] for name in CASES} | OTHERS == set(tasks.REGISTRY)
    assert not {name.split()[0] for name in CASES} & OTHERS


@pytest.mark.parametrize("name", CASES)
def test_networks_are_what_their_equations_say(name):
    """At random params, biases and scales too, which an init leaves at 0 and 1."""
    family, (reference, settings) = name.split()[0], CASES[name]
    if family in ("autoencoder", "vae"):
        pytest.importorskip("haiku")
    if family in ("mlp_mixer", "diffusion"):
        pytest.importorskip("flax")
    task = tasks.make(family, **settings)
    rng = np.random.default_rng(0)

    def drawn(held):
        phi = task.sample(KEYS[0])
        return phi, task.batch(KEYS[1], phi, held, "train")

    phi, batch = jax.jit(drawn, compiler_options=FAST)(task.data)
    shapes = jax.eval_shape(task.init, KEYS[0], phi)
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    found = jax.jit(task.loss, compiler_options=FAST)(params, KEYS[2], phi, batch)
    wide = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: np.asarray(x, np.float64) if np.issubdtype(x.dtype, np.floating) else np.asarray(x), tree
    )
    assert float(found) == pytest.approx(reference(wide(params), wide(phi), wide(batch)), rel=1e-4)
