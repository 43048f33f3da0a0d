"""The wrapper: when nowcasts happen, what they leave alone, and that the guard takes harm back."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt import nowcast

PERIOD = 40  # captures every 8 calls
SETTINGS = {"max_steps": 4 * PERIOD, "period": PERIOD, "probe": 3}


def distance(params, target=10.0):
    return jnp.sum(jnp.square(params["x"] - target))


def run(tx, params, calls, loss=distance, state=None, start=0, **extra):
    """Parameters after each call, and the last state, in one scan."""

    def step(carry, i):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        given = {name: f(i) for name, f in extra.items()}
        updates, state = tx.update(grads, state, params, value=value, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    state = tx.init(params) if state is None else state
    (_, state), path = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(start, start + calls)))((params, state))
    return path, state


def start(n=3):
    return {"x": jnp.zeros(n)}


def slow(lr=0.125):
    """A base whose steps are exact in binary: x after n steps is n/8."""
    return optax.chain(optax.sign_sgd(lr))


def counts(state):
    return {name: int(x) for name, x in state.counts._asdict().items() if x}


def test_nowcasts_replace_calls_and_leave_moments_alone():
    rates = lambda count: 1e-2 / (1 + count)  # noqa: E731
    base = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rates))
    path, state = run(nowcast.linefit(base, guard=False, **SETTINGS), start(), PERIOD)
    alone, before = run(base, start(), PERIOD - 1)
    np.testing.assert_allclose(path["x"][: PERIOD - 1], alone["x"], rtol=1e-6)
    adam, schedule = state.base
    np.testing.assert_allclose(adam.mu["x"], before[0].mu["x"], rtol=1e-6)
    assert (adam.count, schedule.count, state.count) == (PERIOD - 1, PERIOD, PERIOD)
    assert before[1].count == PERIOD - 1
    # Five states, each captured before its call's update; the slope of least squares times k/4.
    states = np.stack([np.asarray(alone["x"])[i - 1] for i in (7, 15, 23, 31, 39)])
    slope = np.polyfit(np.arange(5), states, 1)[0]
    np.testing.assert_allclose(path["x"][-1], states[-1] + 40 / 4 * slope, rtol=1e-5)
    late = np.stack([np.asarray(alone["x"])[i] for i in (7, 15, 23, 31)] + [states[-1]])
    assert np.abs(path["x"][-1] - states[-1] - 10 * np.polyfit(np.arange(5), late, 1)[0]).max() > 1e-6
    _, fresh = run(nowcast.linefit(base, guard=False, reset_moments=True, **SETTINGS), start(), PERIOD)
    assert (fresh.base[0].count, fresh.base[1].count) == (0, PERIOD)


def test_guard_takes_the_best_horizon():
    """From x = 4.875, of 8 calls the speed 1: 40/4 overshoots the target 10 by as much, 20/4 nearly hits it."""
    tx = nowcast.linefit(slow(), loss_fn=distance, cap=100.0, **SETTINGS)
    path, state = run(tx, start(), PERIOD)
    np.testing.assert_allclose(path["x"][-1], 4.875 + 5, rtol=1e-6)
    assert counts(state) == {"applied": 1, "shortened": 1}
    assert state.probing == 3
    free, _ = run(nowcast.linefit(slow(), guard=False, **SETTINGS), start(), PERIOD)
    np.testing.assert_allclose(free["x"][-1], 4.875 + 10, rtol=1e-6)


def test_guard_refuses_what_is_worse_and_takes_the_base_step():
    tx = nowcast.linefit(slow(), factor=-1.0, loss_fn=distance, **SETTINGS)
    path, state = run(tx, start(), PERIOD + 5)
    alone, _ = run(slow(), start(), PERIOD + 5)
    np.testing.assert_array_equal(path["x"], alone["x"])  # not even a step is lost
    assert counts(state) == {"rejected": 1}
    assert run(nowcast.linefit(slow(), factor=-1.0, guard=False, **SETTINGS), start(), PERIOD)[0]["x"][-1, 0] < 0


def test_slack_leaves_the_decision_to_the_probe():
    """Half a unit back raises the loss by a fifth at once: allowed with a slack, and then taken back."""
    tx = nowcast.linefit(slow(), factor=-0.05, loss_fn=distance, slack=0.6, **SETTINGS)
    path, state = run(tx, start(), PERIOD + 4)
    assert counts(state) == {"applied": 1, "shortened": 1, "restored": 1}
    assert path["x"][PERIOD - 1, 0] == 4.375
    assert path["x"][-1, 0] == 4.875
    tight = nowcast.linefit(slow(), factor=-0.05, loss_fn=distance, slack=0.01, **SETTINGS)
    assert counts(run(tight, start(), PERIOD + 4)[1]) == {"rejected": 1}


def moving(params, target):
    return distance(params, target)


def test_guard_restores_after_the_probe():
    """The target jumps back when the nowcast was just accepted."""
    target = lambda i: jnp.where(i < PERIOD, 10.0, 3.0)  # noqa: E731
    tx = nowcast.linefit(slow(), loss_fn=moving, cap=100.0, **SETTINGS)
    path, state = run(tx, start(), PERIOD + 6, batch=target)
    x = np.asarray(path["x"])[:, 0]
    assert counts(state) == {"applied": 1, "shortened": 1, "restored": 1}
    assert x[PERIOD - 1] > 9
    np.testing.assert_allclose(x[PERIOD - 1 : PERIOD + 3], [9.875, 10.0, 10.0, 10.0], rtol=1e-6)  # three base steps
    assert x[PERIOD + 3] == x[PERIOD - 2] == 4.875  # the snapshot, at the fourth call
    np.testing.assert_array_equal(x[PERIOD + 4 :], [5.0, 5.125])
    _, kept = run(nowcast.linefit(slow(), loss_fn=moving, cap=100.0, margin=1e3, **SETTINGS), start(), 50, batch=target)
    assert counts(kept) == {"applied": 1, "shortened": 1}
    assert kept.probing == -1


def test_guard_judges_by_the_values_of_updates():
    """Without a loss function a nowcast is applied first, and taken back when the losses of the probe are worse."""
    far = nowcast.linefit(slow(), factor=1.0, cap=1e3, **SETTINGS)
    path, state = run(far, start(), PERIOD + 4)
    assert counts(state) == {"applied": 1, "restored": 1}
    assert path["x"][PERIOD - 1, 0] > 40
    assert path["x"][-1, 0] == 4.875
    near = nowcast.linefit(slow(), factor=0.1, cap=1e3, **SETTINGS)
    assert counts(run(near, start(), PERIOD + 4)[1]) == {"applied": 1}
    with pytest.raises(ValueError, match="nothing to judge by; valid: loss_fn=, or value=loss"):
        near.update(start(), near.init(start()), start())


def test_cap_is_relative_to_the_tensor():
    path, state = run(nowcast.linefit(slow(), loss_fn=distance, cap=0.5, **SETTINGS), start(), PERIOD)
    np.testing.assert_allclose(path["x"][-1], 1.5 * 4.875, rtol=1e-6)
    assert state.counts.capped == 1


def test_what_is_not_finite_is_refused():
    """A state that was NaN when it was captured makes no nowcast, and does not stay in the history."""
    tx = nowcast.linefit(slow(), loss_fn=lambda p: distance(p, 100.0), **SETTINGS)
    far = {"loss": lambda p: distance(p, 100.0)}
    _, state = run(tx, start(), PERIOD - 1, **far)
    broken = state._replace(history={"x": state.history["x"].at[1, 0].set(jnp.nan)})
    params = {"x": jnp.full(3, 4.875)}
    path, state = run(tx, params, 1 + PERIOD, state=broken, start=PERIOD - 1, **far)
    assert path["x"][0, 0] == 5.0
    assert int(state.counts.rejected) == 1
    assert np.isfinite(path["x"]).all()
    assert int(state.counts.applied) == 1  # the next one
    none = nowcast.linefit(slow(), loss_fn=lambda p: jnp.nan * distance(p), **SETTINGS)
    assert counts(run(none, start(), PERIOD)[1]) == {"rejected": 1}


def test_leaves_of_all_kinds():
    """None, integers, scalars and bfloat16; dtypes and the state's structure stay."""
    params = {"x": jnp.zeros(3), "none": None, "scalar": jnp.zeros(()), "half": jnp.zeros((2, 2), jnp.bfloat16)}
    everything = lambda p: sum(jnp.sum((x.astype(jnp.float32) - 5) ** 2) for x in jax.tree.leaves(p))  # noqa: E731
    tx = nowcast.linefit(optax.adam(0.1), loss_fn=everything, cap=100.0, **SETTINGS)
    state = tx.init(params)
    assert state.history["half"].dtype == jnp.bfloat16
    path, after = run(tx, params, PERIOD + 5, loss=everything)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert {k: x.dtype for k, x in path.items() if x is not None} == {
        k: x.dtype for k, x in params.items() if x is not None
    }
    assert counts(after)["applied"] == 1
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(path))
    table = {"x": jnp.zeros(3), "ids": jnp.arange(3)}
    history = nowcast.linefit(optax.sgd(1.0), **SETTINGS).init(table).history
    assert history["ids"] is None


def test_history_is_resumed(tmp_path):
    """Orbax saves the state in the middle of a window, and the rest of the run is the same bit for bit."""
    import orbax.checkpoint as ocp

    tx = nowcast.linefit(optax.adam(0.125), loss_fn=distance, cap=100.0, **SETTINGS)
    whole, _ = run(tx, start(), PERIOD + 10)
    path, state = run(tx, start(), 21)
    now = {"params": {"x": path["x"][-1]}, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "21", now)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), now)
        back = checkpointer.restore(tmp_path / "21", like)
    rest, state = run(tx, back["params"], PERIOD - 11, state=back["state"], start=21)
    np.testing.assert_array_equal(rest["x"], whole["x"][21:])
    assert counts(state)["applied"] == 1
    # One that forgets its history goes on otherwise: the reference's bug.
    fresh = back["state"]._replace(history={"x": jnp.zeros((5, 3))}, filled=jnp.zeros((), jnp.int32))
    assert not np.array_equal(run(tx, back["params"], PERIOD - 11, state=fresh, start=21)[0]["x"], whole["x"][21:])


@pytest.mark.slow  # of compilation
def test_propose_and_accept_are_the_same_from_outside():
    tx = nowcast.linefit(slow(), loss_fn=distance, cap=100.0, **SETTINGS)
    inside, wanted = run(tx, start(), PERIOD)
    path, state = run(tx, start(), PERIOD - 1)
    params = {"x": path["x"][-1]}
    assert bool(tx.due(state))
    assert not bool(tx.due(state._replace(count=state.count - 1)))
    proposals = tx.propose(state, params)
    assert proposals.horizons.tolist() == [40, 20, 10]
    params, state = tx.accept(state, params, proposals, [distance(p) for p in (params, *proposals.params)])
    np.testing.assert_allclose(params["x"], inside["x"][-1], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state.counts), jax.tree.leaves(wanted.counts), strict=True):
        assert a == b
    assert (state.count, state.filled, state.probing) == (PERIOD, 0, 3)
    same, refused = tx.accept(state, params, proposals, [0.0, 1.0, 2.0, jnp.nan])
    np.testing.assert_array_equal(same["x"], params["x"])
    assert refused.counts.rejected == 1
    with pytest.raises(ValueError, match="one of params and one each of 3 proposals"):
        tx.accept(state, params, proposals, [0.0])


@pytest.mark.slow  # of compilation
def test_accept_counts_tensors_that_were_cut_and_goes_on_in_schedules():
    base = optax.chain(optax.sign_sgd(0.125), optax.scale_by_schedule(lambda count: 1.0))
    tx = nowcast.linefit(base, loss_fn=distance, cap=0.5, **SETTINGS)
    _, wanted = run(tx, start(), PERIOD)
    path, state = run(tx, start(), PERIOD - 1)
    params = {"x": path["x"][-1]}
    proposals = tx.propose(state, params)
    assert proposals.capped.tolist() == [1, 1, 1]
    _, accepted = tx.accept(state, params, proposals, [distance(p) for p in (params, *proposals.params)])
    _, refused = tx.accept(state, params, proposals, [0.0, 1.0, 2.0, 3.0])
    assert counts(accepted) == counts(wanted) == {"applied": 1, "capped": 1}
    assert counts(refused) == {"rejected": 1}
    assert {int(x.base[1].count) for x in (wanted, accepted, refused)} == {PERIOD}


@pytest.mark.slow  # of compilation
def test_composes_with_optax():
    """In a chain, under MultiSteps, and around injected learning rates, whose schedules go on."""
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(1e-2, 0.0, 100))
    tx = nowcast.linefit(inner, guard=False, **SETTINGS)
    _, state = run(optax.chain(optax.clip(1.0), tx), start(), PERIOD)
    assert state[1].base.count == PERIOD
    every = optax.MultiSteps(nowcast.linefit(slow(), guard=False, **SETTINGS), 2).gradient_transformation()
    path, state = run(every, start(), 2 * PERIOD)
    assert state.inner_opt_state.counts.applied == 1
    np.testing.assert_allclose(path["x"][-1], 14.875)


def tiny(kind="gnn", **settings):
    network = nowcast.make(kind, jax.random.key(0), hidden=4, horizons=40, **settings)
    return network._replace(theta=jax.tree.map(lambda x: 20 * x, network.theta))


def mlp():
    return {"fc1": jnp.ones((3, 4)), "fc2": jnp.ones((4, 2)), "odd": {"table": jnp.ones((5, 3))}}


def squares(params):
    return sum(jnp.sum((x - 3.0) ** 2) for x in jax.tree.leaves(params))


def graph(params):
    g = nowcast.Graph()
    g.dense("fc2", g.dense("fc1", g.stream("input", 3), 4), 2)
    return g


def test_leaves_without_a_place_are_said_once_and_fall_back():
    settings = {"network": tiny(layers=1), "graph": graph, "guard": False} | SETTINGS
    for fallback in (None, tiny("wnn")):
        tx = nowcast.nino(optax.adam(0.1), fallback=fallback, **settings)
        says = "graph-free network moves them" if fallback else "leave them where they are"
        with pytest.warns(UserWarning, match=f"does not place odd/table; .*{says}") as said:
            tx.init(mlp())
        assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, _ = run(tx, mlp(), PERIOD, loss=squares)
    for leaf in jax.tree.leaves(path):
        assert np.abs(leaf[-1] - leaf[-2]).max() > 1e-3


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("judged_by", ["loss_fn", "value"])
def test_the_guard_of_a_network(x64, judged_by):
    """Nowcasts and restored snapshots are branches of one condition: the same leaves, of the same type."""
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda x: x.astype(float), mlp()) | {"step": jnp.arange(2)}
        loss_fn = squares if judged_by == "loss_fn" else None
        for kind in (nowcast.nino, nowcast.wnn):
            network = tiny(layers=1) if kind is nowcast.nino else tiny("wnn")
            tx = kind(optax.identity(), network=network, graph=graph, loss_fn=loss_fn, **SETTINGS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = jax.eval_shape(tx.init, params)
                given = params | {"step": None, "odd": {"table": None}}
                updates, after = jax.eval_shape(functools.partial(tx.update, value=1.0), given, state, params)
            assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, given)
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.slow  # compiles both networks with their guards
@pytest.mark.parametrize("kind", ["nino", "wnn"])
def test_the_guard_applies_and_restores_a_networks_nowcast(kind):
    """One that lowers the loss is applied; when the target has jumped by the probe the snapshot is restored."""
    params = {"fc1": jnp.zeros((3, 4)), "fc2": jnp.zeros((4, 2))}
    network = tiny(layers=1) if kind == "nino" else tiny("wnn")
    extra = {"graph": graph} if kind == "nino" else {}

    def loss(params, target):
        return sum(jnp.sum((x - target) ** 2) for x in jax.tree.leaves(params))

    base = optax.chain(optax.sign_sgd(0.02))
    free = getattr(nowcast, kind)(base, network=network, guard=False, **extra, **SETTINGS)
    path, _ = run(free, params, PERIOD, loss=lambda p: loss(p, 9.0))
    moved = jax.tree.map(lambda x: x[-1] - x[-2], path)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-4

    # The guard's loss is the distance to where this nowcast leads, then to where the snapshot was.
    there = jax.tree.map(lambda x: x[-1], path)
    back = jax.tree.map(lambda x: x[-2], path)

    def judged(params, late):
        to = jax.tree.map(lambda a, b: jnp.where(late, b, a), there, back)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(to), strict=True)
        return 1.0 + sum(jnp.sum((x - y) ** 2) for x, y in pairs)  # the margin is a share of it

    tx = getattr(nowcast, kind)(base, network=network, loss_fn=judged, cap=1e3, **extra, **SETTINGS)
    late = lambda count: (count >= PERIOD) * 1.0  # noqa: E731
    path, state = run(tx, params, PERIOD + 4, loss=lambda p: loss(p, 9.0), batch=late)
    assert counts(state) == {"applied": 1, "restored": 1}
    for now, wanted, snapshot in zip(*map(jax.tree.leaves, (path, there, back)), strict=True):
        np.testing.assert_allclose(now[PERIOD - 1], wanted, rtol=1e-5)
        np.testing.assert_allclose(now[-1], snapshot, rtol=1e-5)
    stays = getattr(nowcast, kind)(base, network=network, loss_fn=judged, cap=1e3, margin=1e9, **extra, **SETTINGS)
    assert counts(run(stays, params, PERIOD + 4, loss=lambda p: loss(p, 9.0), batch=late)[1]) == {"applied": 1}


@pytest.mark.slow  # compiles the graph network once more
def test_leaves_without_a_place_stay():
    settings = {"network": tiny(layers=1), "graph": graph, "guard": False} | SETTINGS
    tx = nowcast.nino(optax.adam(0.1), **settings)
    with pytest.warns(UserWarning, match="leave them where they are"):
        path, _ = run(tx, mlp(), PERIOD, loss=squares)
    assert np.array_equal(path["odd"]["table"][-1], path["odd"]["table"][-2])
    assert np.abs(path["fc1"][-1] - path["fc1"][-2]).max() > 1e-3


@pytest.mark.slow  # of compilation
def test_horizon_follows_the_learning_rate():
    """At five times the rate of meta-training the horizon is a fifth; at a lower one it is the schedule's."""
    params = {"fc1": jnp.ones((3, 4))}
    network = tiny("wnn")._replace(lr=1e-3)
    for lr, wanted in ((5e-3, 8), (1e-4, 40), (lambda count: 1e-3 * (count + 1), 1)):
        tx = nowcast.wnn(optax.sgd(1e-3), network=network, lr=lr, guard=False, **SETTINGS)
        state = tx.init(params)._replace(count=jnp.asarray(PERIOD - 1), filled=jnp.asarray(4))
        assert jax.jit(tx.propose)(state, params)[1][0] == wanted
    with pytest.raises(ValueError, match=r"does not say at which it was meta-trained; valid: .*_replace\(lr=1e-3\)"):
        nowcast.nino(optax.sgd(1e-3), network=tiny(), graph=graph, lr=1e-3, **SETTINGS)


def test_settings_without_meaning_are_refused():
    network = tiny()
    for changed, says in (
        ({"probe": 7}, "probe, got 7; valid: below period // context - 1 = 7"),
        ({"period": 0}, "period, got 0; valid: an integer >= 1"),
        ({"margin": -1.0}, "margin, got -1.0; valid: >= 0"),
        ({"context": 4}, "context, got 4; valid: 5, what the network sees"),
        ({"upd_scale": float("nan")}, "upd_scale, got nan; valid: finite"),
        ({"power": 0.0}, "power, got 0.0; valid: > 0, finite"),
        ({"tile": 0}, "tile, got 0; valid: None or an integer >= 1"),
        ({"small": -1}, "small, got -1; valid: None or an integer >= 0"),
        ({"network": tiny("wnn")}, "network, got 'wnn'; valid: a 'gnn'"),
        ({"fallback": network}, "fallback: network, got 'gnn'; valid: a 'wnn'"),
    ):
        with pytest.raises(ValueError, match=says):
            nowcast.nino(optax.sgd(1.0), **({"network": network, "graph": None} | SETTINGS | changed))
    with pytest.raises(ValueError, match=r"unknown setting 'hiden'. Did you mean 'hidden'"):
        nowcast.make("gnn", jax.random.key(0), hiden=3)


def test_artifacts(tmp_path):
    network = tiny()._replace(lr=3e-3)
    folder = nowcast.save(tmp_path / "mine", network, provenance={"from": "a test"}, card="# mine\n")
    back = nowcast.read(folder)
    assert (back.name, back.settings, back.lr) == ("gnn", network.settings, 3e-3)
    assert nowcast.read(folder, lr=1e-2).lr == 1e-2
    jax.tree.map(np.testing.assert_array_equal, back.theta, network.theta)
    (folder / "model.safetensors").write_bytes(b"\0" + (folder / "model.safetensors").read_bytes()[1:])
    with pytest.raises(ValueError, match="damaged: its sha256"):
        nowcast.read(folder)
    np.savez(tmp_path / "x.npz", **{"layer_embed.weight": np.zeros((15, 4))})
    with pytest.raises(ValueError, match=r"x.npz has no 'edge_proj.fc.0.weight'"):
        nowcast.read(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", **{"layer_embed.weight": np.array([{}], object)})
    with pytest.raises(ValueError, match=r"no .npz of plain arrays"):
        nowcast.read(tmp_path / "y.npz")


def test_shipped_networks():
    """They are read by name, load only where they can be used, and say what made them."""
    names = lopt.available(nowcasts=True)
    assert names == ["nino-small", "wnn-small"]
    assert not set(names) & set(lopt.available())
    gnn, alone = (nowcast.read(name) for name in names)
    assert (gnn.name, alone.name) == ("gnn", "wnn")
    assert gnn.settings["context"] == alone.settings["context"] == 5
    with pytest.raises(ValueError, match=r"holds a network of nowcasts; valid: lopt.nowcast.read\('nino-small'\)"):
        lopt.load("nino-small")
    with pytest.raises(ValueError, match="Did you mean 'nino-small'"):
        nowcast.read("nino-smal")
