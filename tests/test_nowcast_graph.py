"""Graphs: the reference's for MLP, CNN and GPT-2, and proofs that ends of edges are neurons of matching index."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nino
import numpy as np
import pytest

from lopt import nowcast
from lopt.nowcast import network as N
from lopt.nowcast.graph import Block


@pytest.fixture(scope="module")
def recorded():
    return nino.fixture()


def of_case(recorded, case):
    return {k.removeprefix(f"{case}/"): x for k, x in recorded.items() if k.startswith(f"{case}/")}


def places(z):
    """By name, the place of each element in the recording's flat vector."""
    out, start = {}, 0
    for name, shape in nino.leaves(z):
        size = int(np.prod(shape))
        out[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return out


def sequential(z):
    """The recorded Sequential as flax would name and store it: channels last, [in, out]."""
    found, flat = {}, places(z)
    names = sorted({n.rsplit(".", 1)[0] for n in flat}, key=lambda n: int(n.split(".")[1]))
    convs = denses = 0
    for name in names:
        w = flat[f"{name}.weight"]
        if w.ndim == 4:
            layer, convs = f"Conv_{convs}", convs + 1
            w = np.transpose(w, (2, 3, 1, 0))
        else:
            layer, denses, w = f"Dense_{denses}", denses + 1, w.T
        found[layer] = {"kernel": w, "bias": flat[f"{name}.bias"]}
    return found


def like(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), tree)


@pytest.mark.parametrize("case", ["mlp_digits", "cnn_digits"])
def test_sequential_networks_are_wired_as_in_the_reference(case, recorded):
    z = of_case(recorded, case)
    where = sequential(z)
    params = like(where)
    graph = nowcast.recognise(params)
    assert nino.mismatch(graph, params, where, z) is None
    # A bias that ends at the neurons before, and a type that is another, would be seen.
    blocks = graph.blocks
    bias = next(i for i, b in enumerate(blocks) if b.kind == N.BIAS)
    graph.blocks = [b._replace(target=b.target - 1) if i == bias else b for i, b in enumerate(blocks)]
    assert nino.mismatch(graph, params, where, z)
    graph.blocks = [b._replace(kind=N.NORM) if i == bias else b for i, b in enumerate(blocks)]
    assert nino.mismatch(graph, params, where, z)


def gpt2(z):
    """Named as the JAX port of GPT-2 names them, fused attention [in, 3 · out]."""
    tree: dict = {}
    for name, x in places(z).items():
        *path, last = name.split(".")
        table = path[-1] in ("wte", "wpe")
        leaf = "embedding" if table else "bias" if last == "bias" else "scale" if x.ndim == 1 else "kernel"
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = x
    return tree


@pytest.mark.parametrize("turned", [False, True])
def test_gpt2_is_wired_as_in_the_reference(recorded, turned):
    z = of_case(recorded, "gpt2_tiny")
    where = gpt2(z)
    if turned:  # the JAX port keeps [out, in]
        where = jax.tree.map_with_path(lambda path, x: x.T if path[-1].key == "kernel" else x, where)
    params = like(where)
    graph = nowcast.recognise(params, heads=3)
    assert nino.mismatch(graph, params, where, z) is None
    blocks = graph.blocks

    def changed(kind, **new):
        first = next(i for i, b in enumerate(blocks) if b.kind == kind)
        other = blocks[first]._replace(**{k: f(blocks[first]) for k, f in new.items()})
        graph.blocks = [other if i == first else b for i, b in enumerate(blocks)]
        return nino.mismatch(graph, params, where, z)

    assert changed(N.KEY, source=lambda b: b.source[::-1])
    assert changed(N.RESIDUAL, target=lambda b: np.roll(b.target, 1))
    assert changed(N.HEAD, target=lambda b: b.target + 1)


# Proofs: a network computes the same with the hidden neurons of its graph in another order.


def shuffled(n, seed=0):
    """An order that leaves no place as it is."""
    return np.roll(np.arange(n), 1 + seed % (n - 1))


def proves(apply, params, graph, order, *, atol=1e-4):
    """Whether the network computes the same with these groups in other orders (and not what it would by accident)."""
    other = graph.permuted(params, order)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))
    with jax.numpy_rank_promotion("allow"):
        before, after = (jax.jit(apply)(p) for p in (params, other))
    return bool(np.abs(np.asarray(before) - np.asarray(after)).max() < atol * np.abs(np.asarray(before)).max())


def filled(params, seed=0):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([rng.normal(size=np.shape(x)).astype(np.float32) for x in leaves])


def conv(x, w, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def test_conv_flatten_dense_with_norm_and_kernels_of_any_size():
    """The reference wires a dense layer after a flattened picture wrongly."""
    x = np.random.default_rng(1).normal(size=(2, 3, 3, 2)).astype(np.float32)
    zero = jnp.zeros
    params = filled(
        {
            "Conv_0": {"kernel": zero((5, 5, 2, 6)), "bias": zero(6)},
            "BatchNorm_0": {"scale": zero(6), "bias": zero(6)},
            "Conv_1": {"kernel": zero((1, 1, 6, 4))},
            "Dense_0": {"kernel": zero((36, 5)), "bias": zero(5)},
            "Dense_1": {"kernel": zero((5, 3))},
        }
    )

    def apply(p):
        y = conv(x, p["Conv_0"]["kernel"]) + p["Conv_0"]["bias"]
        y = (y - y.mean((0, 1, 2))) / y.std((0, 1, 2)) * p["BatchNorm_0"]["scale"] + p["BatchNorm_0"]["bias"]
        y = jnp.maximum(conv(jnp.maximum(y, 0), p["Conv_1"]["kernel"]), 0).reshape(2, -1)
        return jnp.maximum(y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 0) @ p["Dense_1"]["kernel"]

    graph = nowcast.recognise(params)
    assert graph.validate(params) == []
    order = {"Conv_0": shuffled(6), "Conv_1": shuffled(4, 1), "Dense_0": shuffled(5, 2)}
    assert proves(apply, params, graph, order)
    with jax.numpy_rank_promotion("allow"):
        assert graph.prove(jax.jit(apply), params) == ["Conv_0", "Conv_1", "Dense_0"]
    assert [len(b.view.places()[0, 0]) for b in graph.blocks if b.leaf == "Conv_0/kernel"] == [9, 9, 7]
    # The flattened picture with its axes the other way round, which fits every size, is refuted.
    wrong = [b._replace(source=np.repeat(b.source[:4], 9)) if b.leaf == "Dense_0/kernel" else b for b in graph.blocks]
    graph.blocks = wrong
    assert graph.validate(params) == []
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match="another one with the neurons of Conv_1 in"),
    ):
        graph.prove(jax.jit(apply), params)
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=r"no group to rotate among .*; valid: a graph with hidden groups"),
    ):
        graph.prove(jax.jit(apply), params, skip=[group.name for group in graph.groups])
    assert not proves(apply, params, graph, {"Conv_1": shuffled(4, 1)})


def test_depthwise_and_grouped_kernels():
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 4)).astype(np.float32)
    graph = nowcast.Graph()
    h = graph.stream("input", 4)
    h = graph.conv("a", h, 6, kernel=(1, 1))
    h = graph.conv("depth", h, 6, groups=6)
    h = graph.conv("grouped", h, 8, groups=2)
    graph.conv("out", h, 2, kernel=(1, 1))
    shapes = {"a": (1, 1, 4, 6), "depth": (3, 3, 1, 6), "grouped": (3, 3, 3, 8), "out": (1, 1, 8, 2)}
    params = filled({k: np.zeros(s) for k, s in shapes.items()})

    def apply(p):
        y = conv(jnp.maximum(conv(x, p["a"]), 0), p["depth"], 6)
        return conv(jnp.maximum(conv(y, p["grouped"], 2), 0), p["out"])

    assert graph.validate(params) == []
    both = np.array([1, 2, 0, 5, 3, 4])  # within the groups
    assert proves(apply, params, graph, {"a": both, "depth": both, "grouped": np.r_[shuffled(4), 4 + shuffled(4, 1)]})
    with pytest.raises(ValueError, match="has no edges where the order"):
        graph.permuted(params, {"depth": both[::-1]})


def residual_orders(graph, order):
    """The same order for all groups of the stream."""
    names = [g.name for g in graph.groups if g.name == "stream" or g.name.endswith((":middle", ":out"))]
    return dict.fromkeys(names, order)


def norm(x, scale, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + bias


def attend(q, k, v):
    logits = jnp.einsum("qhd,khd->hqk", q, k)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, -1), v)


def test_llama_style_with_grouped_queries_and_gates():
    """Pre-norms, up_proj and o_proj are what the reference wires wrongly here."""
    d, heads, groups, size, m, vocabulary = 8, 4, 2, 3, 10, 7
    zero = jnp.zeros
    block = {
        "input_layernorm": {"weight": zero(d)},
        "self_attn": {
            "q_proj": {"kernel": zero((d, heads * size))},
            "k_proj": {"kernel": zero((d, groups * size))},
            "v_proj": {"kernel": zero((d, groups * size))},
            "o_proj": {"kernel": zero((heads * size, d))},
        },
        "post_attention_layernorm": {"weight": zero(d)},
        "mlp": {n: {"kernel": zero(s)} for n, s in (("gate_proj", (d, m)), ("up_proj", (d, m)), ("down_proj", (m, d)))},
    }
    params = filled(
        {
            "embed_tokens": {"embedding": zero((vocabulary, d))},
            "layers": {"0": block, "1": block},
            "norm": {"weight": zero(d)},
            "lm_head": {"kernel": zero((d, vocabulary))},
        }
    )
    tokens = np.array([1, 4, 2, 0])

    def apply(p):
        x = p["embed_tokens"]["embedding"][tokens, :]
        for i in "01":
            b = p["layers"][i]
            y, a = norm(x, b["input_layernorm"]["weight"]), b["self_attn"]
            q, k, v = ((y @ a[n]["kernel"]).reshape(4, -1, size) for n in ("q_proj", "k_proj", "v_proj"))
            y = attend(q, jnp.repeat(k, heads // groups, 1), jnp.repeat(v, heads // groups, 1))
            x = x + y.reshape(4, -1) @ a["o_proj"]["kernel"]
            y, f = norm(x, b["post_attention_layernorm"]["weight"]), b["mlp"]
            gate, up, down = (f[f"{n}_proj"]["kernel"] for n in ("gate", "up", "down"))
            x = x + (jax.nn.silu(y @ gate) * (y @ up)) @ down
        return norm(x, p["norm"]["weight"]) @ p["lm_head"]["kernel"]

    graph = nowcast.recognise(params, heads=heads)
    assert graph.validate(params) == []
    hidden, inside = shuffled(m), shuffled(size, 3)
    order = residual_orders(graph, shuffled(d, 1))
    order |= {"block0:hidden": hidden, "block0:hidden:gate": hidden}
    base = "layers/1/self_attn"
    within = lambda n: (np.arange(n)[:, None] * size + inside[None]).reshape(-1)  # noqa: E731
    order |= {f"{base}/q_proj/kernel:q": within(heads), f"{base}/k_proj/kernel:k": within(groups)}
    order |= {f"{base}/v_proj/kernel:v": within(groups)}
    # Every head's neurons change places alike: rows of o_proj follow the head of values that they read.
    assert proves(apply, params, graph, order)
    with jax.numpy_rank_promotion("allow"):
        assert len(graph.prove(jax.jit(apply), params)) == 2 * 3 + 2 * 2 + 5  # q, k, v; gate, hidden; the stream
    # Rows of o_proj from the heads in turn, which fits all sizes, as one who forgets the groups' order would have it.
    turned = np.tile(np.arange(groups * size), heads // groups)
    graph.blocks = [
        b._replace(source=np.unique(b.source)[turned]) if b.leaf and "o_proj" in b.leaf else b for b in graph.blocks
    ]
    swap = np.r_[within(1), np.arange(size, 2 * size)]  # of the first head of values alone
    assert graph.validate(params) == []
    assert not proves(apply, params, graph, {f"{base}/v_proj/kernel:v": swap})


def test_vision_transformer_of_linen():
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), strides=4)(x).reshape(1, -1, 8)
            x = jnp.concatenate([jnp.tile(self.param("cls", nn.initializers.normal(), (1, 1, 8)), (1, 1, 1)), x], 1)
            x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 5, 8))
            return nn.Dense(3)(nn.LayerNorm()(Block()(x))[:, 0])

    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        params = filled(jax.eval_shape(ViT().init, jax.random.key(0), x))
        graph = nowcast.recognise(params)
        assert graph.validate(params) == []
        proven = graph.prove(jax.jit(lambda p: ViT().apply(p, x)), params)
    kinds = {name.split("/")[-1].split(":")[-1] for name in proven}
    assert kinds == {"stream", "middle", "out", "hidden", "q", "v"}


@pytest.mark.parametrize("cell", ["linen", "haiku", "vanilla"])
def test_recurrent_cells(cell):
    """Four gates of an LSTM from four matrices or from one, and a plain cell."""
    n, h = 3, 4
    zero = jnp.zeros
    if cell == "linen":
        of = {f"i{g}": {"kernel": zero((n, h))} for g in "ifgo"}
        of |= {f"h{g}": {"kernel": zero((h, h)), "bias": zero(h)} for g in "ifgo"}
        params = {"cell": of, "Dense_0": {"kernel": zero((h, 2))}}
    elif cell == "haiku":
        params = {"lstm/linear": {"w": zero((n + h, 4 * h)), "b": zero(4 * h)}, "linear": {"w": zero((h, 2))}}
    else:
        of = {"linear": {"w": zero((n, h)), "b": zero(h)}, "linear_1": {"w": zero((h, h)), "b": zero(h)}}
        params = {f"vanilla_rnn/{k}": x for k, x in of.items()} | {"linear": {"w": zero((h, 2))}}
    params = filled(params)
    xs = np.random.default_rng(0).normal(size=(5, n)).astype(np.float32)

    def apply(p):
        c = state = np.zeros(h, np.float32)
        for x in xs:
            if cell == "vanilla":
                a, b = p["vanilla_rnn/linear"], p["vanilla_rnn/linear_1"]
                state = jnp.tanh(x @ a["w"] + a["b"] + state @ b["w"] + b["b"])
                continue
            if cell == "linen":
                gates = [
                    x @ p["cell"]["i" + g]["kernel"] + state @ p["cell"]["h" + g]["kernel"] + p["cell"]["h" + g]["bias"]
                    for g in "ifgo"
                ]
            else:
                one = p["lstm/linear"]
                gates = jnp.split(jnp.concatenate([x, state]) @ one["w"] + one["b"], 4)
            i, f, g, o = gates
            c = c / (1 + jnp.exp(-f)) + jnp.tanh(g) / (1 + jnp.exp(-i))
            state = jnp.tanh(c) / (1 + jnp.exp(-o))
        return state @ (p["Dense_0"]["kernel"] if cell == "linen" else p["linear"]["w"])

    graph = nowcast.recognise(params)
    assert graph.validate(params) == []
    home = {"linen": "cell", "haiku": "lstm", "vanilla": "vanilla_rnn"}[cell]
    names = [g.name for g in graph.groups if len(g) == h and g.name.startswith(home)]
    assert len(names) == (1 if cell == "vanilla" else 5)
    assert set(graph.prove(jax.jit(apply), params)) == set(names)
    assert cell == "vanilla" or not proves(apply, params, graph, dict.fromkeys(names[:2], shuffled(h)))


def test_residual_network():
    """A block with a shortcut of its own and one without, and a norm after the blocks."""
    zero = jnp.zeros
    norms = {n: {"scale": zero(n), "bias": zero(n)} for n in (4, 6)}
    params = filled(
        {
            "conv_init": {"kernel": zero((3, 3, 2, 4))},
            "ResNetBlock_0": {
                "Conv_0": {"kernel": zero((3, 3, 4, 6))},
                "BatchNorm_0": norms[6],
                "Conv_1": {"kernel": zero((3, 3, 6, 6))},
                "BatchNorm_1": norms[6],
                "conv_proj": {"kernel": zero((1, 1, 4, 6))},
                "norm_proj": norms[6],
            },
            "ResNetBlock_1": {"Conv_0": {"kernel": zero((3, 3, 6, 6))}, "Conv_1": {"kernel": zero((3, 3, 6, 6))}},
            "norm_final": norms[6],
            "Dense_0": {"kernel": zero((6, 3))},
        }
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)

    def batch_norm(p, y):
        return (y - y.mean((0, 1, 2))) / y.std((0, 1, 2)) * p["scale"] + p["bias"]

    def apply(p):
        y, b = conv(x, p["conv_init"]["kernel"]), p["ResNetBlock_0"]
        z = batch_norm(b["BatchNorm_0"], conv(y, b["Conv_0"]["kernel"]))
        z = batch_norm(b["BatchNorm_1"], conv(jnp.maximum(z, 0), b["Conv_1"]["kernel"]))
        y = jnp.maximum(z + batch_norm(b["norm_proj"], conv(y, b["conv_proj"]["kernel"])), 0)
        b = p["ResNetBlock_1"]
        y = y + conv(jnp.maximum(conv(y, b["Conv_0"]["kernel"]), 0), b["Conv_1"]["kernel"])
        return batch_norm(p["norm_final"], y).mean((1, 2)) @ p["Dense_0"]["kernel"]

    graph = nowcast.recognise(params)
    assert graph.validate(params) == []
    order = {"conv_init": shuffled(4), "ResNetBlock_0/Conv_0": shuffled(6)}
    stream = {"ResNetBlock_0": shuffled(6, 5), "ResNetBlock_1": shuffled(6, 5)}
    assert proves(apply, params, graph, order | stream | {"ResNetBlock_1/Conv_0": shuffled(6, 7)})
    assert not proves(apply, params, graph, {"ResNetBlock_0": shuffled(6, 5)})  # one end of a residual alone


def test_trees_of_nnx_and_haiku_are_read():
    zero = jnp.zeros
    nnx = {
        "conv": {"kernel": {"value": zero((3, 3, 1, 4))}, "bias": {"value": zero(4)}},
        "bn": {"scale": {"value": zero(4)}, "bias": {"value": zero(4)}},
        "layers": {i: {"kernel": {"value": zero(s)}} for i, s in ((0, (4, 5)), (10, (5, 6)), (9, (5, 5)))},
    }
    graph = nowcast.recognise(nnx)
    assert graph.validate(nnx) == []
    dense = [b.leaf for b in graph.blocks if b.leaf and b.leaf.startswith("layers")]
    assert dense == ["layers/0/kernel/value", "layers/9/kernel/value", "layers/10/kernel/value"]
    mlp = {f"mlp/~/linear_{i}": {"w": zero(s), "b": zero(s[1])} for i, s in enumerate([(3, 5), (5, 4)])}
    assert nowcast.recognise(mlp).validate(mlp) == []
    names = ("query", "key", "value", "linear")
    attention = {f"multi_head_attention/{n}": {"w": zero((8, 8)), "b": zero(8)} for n in names}
    norms = {f"layer_norm{i}": {"scale": zero(8), "offset": zero(8)} for i in ("", "_1")}
    haiku = attention | norms | {"linear": {"w": zero((32, 8))}, "linear_1": {"w": zero((8, 32))}}
    assert nowcast.recognise(haiku, heads=2).validate(haiku) == []
    with pytest.raises(ValueError, match="heads of 'multi_head_attention' are not in its shapes; pass heads="):
        nowcast.recognise(haiku)


def of_nnx(kind):
    from flax import nnx

    rngs = nnx.Rngs(0)

    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs) if kind == "cnn" else None
            self.fc1 = nnx.Linear(36 if kind == "cnn" else 18, 5, rngs=rngs)
            self.fc2 = nnx.Linear(5, 6, rngs=rngs)
            self.fc3 = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = x if self.conv is None else nnx.relu(self.conv(x))
            x = nnx.relu(self.fc1(x.reshape(len(x), -1)))
            return self.fc3(nnx.relu(self.fc2(x)))

    definition, params = nnx.split(Net())
    return params, lambda params, x: nnx.merge(definition, params)(x)


def of_haiku(kind):
    import haiku as hk

    def mlp(x):
        return hk.nets.MLP([5, 6, 3])(x.reshape(len(x), -1))

    def cnn(x):
        x = jax.nn.relu(hk.Conv2D(4, 3)(x))
        return hk.Linear(3)(jax.nn.relu(hk.Linear(5)(x.reshape(len(x), -1))))

    def gru(x):
        x = x.reshape(len(x), 9, 2).swapaxes(0, 1)
        states, _ = hk.dynamic_unroll(hk.GRU(4), x, jnp.zeros((x.shape[1], 4)))
        return hk.Linear(3)(states[-1])

    net = hk.without_apply_rng(hk.transform({"mlp": mlp, "cnn": cnn, "gru": gru}[kind]))
    return net.init(jax.random.key(0), jnp.zeros((1, 3, 3, 2))), net.apply


SLOWER = [pytest.param(*one, marks=pytest.mark.slow) for one in (("nnx", "mlp"), ("haiku", "mlp"), ("haiku", "cnn"))]


@pytest.mark.parametrize(("library", "kind"), [("nnx", "cnn"), ("haiku", "gru"), *SLOWER])
def test_modules_of_the_libraries_are_recognised(library, kind):
    """As they make their parameters themselves, with nothing to describe."""
    pytest.importorskip({"nnx": "flax", "haiku": "haiku"}[library])
    params, apply = {"nnx": of_nnx, "haiku": of_haiku}[library](kind)
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 2)).astype(np.float32)
    params, apply = filled(params), jax.jit(apply)
    graph = nowcast.recognise(params)
    assert graph.validate(params) == []
    with jax.numpy_rank_promotion("allow"):
        assert len(graph.prove(lambda p: apply(p, x), params)) >= {"mlp": 2, "cnn": 2, "gru": 1}[kind]
        # A graph whose last layer takes two of its neurons for each other would be seen.
        last = max(i for i, b in enumerate(graph.blocks) if b.leaf and b.grid and len(b.source) > 1)
        block = graph.blocks[last]
        graph.blocks[last] = block._replace(source=np.r_[block.source[[1, 0]], block.source[2:]])
        with pytest.raises(ValueError, match="is another one with the neurons of"):
            graph.prove(lambda p: apply(p, x), params)


def test_a_graph_is_drawn(tmp_path):
    graph = nowcast.recognise({"fc1": jnp.zeros((3, 4)), "fc2": jnp.zeros((4, 2))})
    picture = nowcast.draw(graph, tmp_path / "graph.svg").read_text()
    assert picture.count("<circle") == graph.count == 9
    assert picture.count("<line") == 20
    with pytest.raises(ValueError, match="ends in"):
        nowcast.draw(graph, tmp_path / "graph.jpg")


def test_what_does_not_fit_is_named():
    params = {"fc": jnp.zeros((4, 3)), "odd": jnp.zeros((2, 2)), "step": jnp.zeros((), jnp.int32)}
    graph = nowcast.Graph()
    x = graph.stream("input", 4)
    y = graph.dense("fc", x, 3)
    assert graph.validate(params) == ["odd"]
    graph._add(Block(N.FC, x.ids[:1], y.ids, "fc", nowcast.view((4, 3), "sd", s=(1, 1)), True))
    with pytest.raises(ValueError, match=r"'fc': element \(1, 0\) has 2 edges, and 3 of 12 do not have one"):
        graph.validate(params)
    for path, size, says in (("fc", 5, "3 neurons|12 elements|elements as"), ("fx", 3, "unknown leaf 'fx'.*'fc'")):
        other = nowcast.Graph()
        other.dense(path, other.stream("input", 4), size)
        with pytest.raises(ValueError, match=says):
            other.validate(params)
    with pytest.raises(ValueError, match="form several chains"):
        nowcast.recognise({"fc1": jnp.zeros((5, 3)), "fc2": jnp.zeros((4, 5)), "fc3": jnp.zeros((3, 4))})
    with pytest.raises(ValueError, match="form no chain"):
        nowcast.recognise({"fc1": jnp.zeros((3, 4)), "fc2": jnp.zeros((7, 5))})
