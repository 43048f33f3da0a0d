"""Artifacts: what is saved is what is loaded, and whatever is wrong with a folder is said by file and reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lopt
from lopt import pretrained, rules


@pytest.fixture
def artifact(tmp_path):
    """A saved artifact of non-default settings, with its rule and theta."""
    rule = rules.make("small_fc", hidden=3, step_mult=0.02, learned_decays=False)
    theta = rule.init_theta(jax.random.key(0))
    return lopt.save(tmp_path / "mine", rule, theta, provenance={"seed": 0}, card="# mine\n"), rule, theta


def reseal(folder):
    """Make the sha256 right again, so that what it seals is looked at."""
    import hashlib

    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip(artifact):
    folder, rule, theta = artifact
    got_rule, got = lopt.read(folder)
    assert got_rule.name == rule.name
    assert got_rule.settings == rule.settings
    assert jax.tree.structure(got) == jax.tree.structure(theta)
    jax.tree.map(np.testing.assert_array_equal, got, theta)
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.full((3, 2), 0.1)}
    ours, theirs = rule.bind(theta), lopt.load(folder)
    u, _ = ours.update(grads, ours.init(params), params)
    v, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_array_equal(u["w"], v["w"])


def test_every_setting_is_saved(artifact):
    """Also those at their default: another version's defaults may differ."""
    import inspect

    from lopt.rules.small_fc import small_fc

    config = json.loads((artifact[0] / "config.json").read_text())
    assert set(config["settings"]) == set(inspect.signature(small_fc).parameters)
    for name in rules.REGISTRY:
        module = __import__(rules.REGISTRY[name], fromlist=[name])
        assert set(rules.make(name).settings) == set(inspect.signature(getattr(module, name)).parameters), name


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _edit(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    reseal(folder)


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAK = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors cannot be read"),
    "weights truncated": (_truncate, r"model\.safetensors is damaged: sha256"),
    "weights flipped": (_flip, r"model\.safetensors is damaged: sha256"),
    "not safetensors": (
        lambda f: ((f / "model.safetensors").write_bytes(b"junk"), reseal(f)),
        r"model\.safetensors is not a safetensors file",
    ),
    "wrong shape": (
        lambda f: _edit(f, lambda a: a.update({"mlp.0.b": np.zeros(4, np.float32)})),
        r"'mlp\.0\.b' is float32\[4\], rule 'small_fc' has float32\[3\]",
    ),
    "missing array": (lambda f: _edit(f, lambda a: a.pop("mlp.0.b")), r"missing \['mlp\.0\.b'\]"),
    "not finite": (lambda f: _edit(f, lambda a: a["mlp.0.b"].fill(np.nan)), r"'mlp\.0\.b' is not finite"),
    "config missing": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "config not an object": (
        lambda f: (f / "config.json").write_text("3"),
        r"config\.json is not an artifact's config",
    ),
    "newer format": (lambda f: _config(f, format_version=99), r"format_version 99, this lopt reads 1"),
    "unknown rule": (lambda f: _config(f, rule="smal_fc"), r"config\.json .*Did you mean 'small_fc'"),
    "unknown setting": (lambda f: _config(f, settings={"hiden": 3}), r"config\.json .*Did you mean 'hidden'"),
    "setting of another type": (lambda f: _config(f, settings={"hidden": "3"}), r"config\.json describes no rule"),
    "settings not an object": (lambda f: _config(f, settings=3), r"config\.json describes no rule"),
    "rule not a name": (lambda f: _config(f, rule=["small_fc"]), r"config\.json describes no rule"),
    "sha256 not a text": (lambda f: _config(f, sha256=None), r"model\.safetensors is damaged: sha256 .* says None"),
}


@pytest.mark.parametrize("case", sorted(BREAK))
def test_what_is_wrong_is_said(artifact, case):
    harm, says = BREAK[case]
    harm(artifact[0])
    with pytest.raises(ValueError, match=says):
        lopt.load(artifact[0])


def test_names(artifact, monkeypatch, tmp_path):
    zoo = tmp_path / "zoo"
    for name in ("lopt-base", "lopt-tiny", "quickstart"):
        shutil.copytree(artifact[0], zoo / name)
    monkeypatch.setattr(pretrained, "_zoo", lambda: zoo)
    assert lopt.available() == ["lopt-base", "lopt-tiny", "quickstart"]
    assert lopt.load("lopt-tiny")
    with pytest.raises(ValueError, match=r"Did you mean 'lopt-tiny'.*valid: lopt-base, lopt-tiny, quickstart"):
        lopt.load("lopt-tinny")
    with pytest.raises(ValueError, match="neither a folder nor a shipped name"):
        lopt.load("no/such/folder")


def test_a_misspelt_keyword_raises(artifact):
    with pytest.raises(TypeError, match="num_step"):
        lopt.load(artifact[0], num_step=3)


def test_labels_and_decay_through_load(artifact):
    params, grads = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}, {"b": jnp.ones(2), "w": jnp.full((3, 2), 0.1)}
    says = {"b": "no_decay", "w": None}
    plain, decayed, spared, frozen = (
        lopt.load(artifact[0], **keywords)
        for keywords in (
            {},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "labels": lambda path, p: says[path]},
            {"labels": lambda path, p: "freeze" if path == "w" else None},
        )
    )
    updates = [tx.update(grads, tx.init(params), params)[0] for tx in (plain, decayed, spared, frozen)]
    plain, decayed, spared, frozen = updates
    np.testing.assert_allclose(decayed["b"], plain["b"] - 0.1, rtol=1e-5)
    np.testing.assert_array_equal(spared["b"], plain["b"])
    np.testing.assert_array_equal(spared["w"], decayed["w"])
    np.testing.assert_array_equal(frozen["w"], 0)
    np.testing.assert_allclose(frozen["b"], plain["b"], rtol=1e-5)


OLDEST = Path(__file__).parent / "fixtures/artifact_v1"


def test_the_oldest_artifact_still_does_what_it_did():
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3)}
    tx = lopt.load(OLDEST)
    updates, _ = tx.update(params, tx.init(params), params)
    then = [[-0.0027354285, -0.0024648120, -0.0025567794], [-0.0032879859, -0.0032304551, -0.0029324363]]
    np.testing.assert_allclose(updates["w"], then, rtol=1e-5)


def test_an_older_format_is_migrated(monkeypatch):
    """As if version 2 had renamed a setting and version 3 had dropped one."""

    def to_2(config):
        settings = {("width" if k == "hidden" else k): v for k, v in config["settings"].items()}
        return config | {"format_version": 2, "settings": settings | {"obsolete": 1}}

    def to_3(config):
        settings = {("hidden" if k == "width" else k): v for k, v in config["settings"].items() if k != "obsolete"}
        return config | {"format_version": 3, "settings": settings}

    monkeypatch.setattr(pretrained, "FORMAT_VERSION", 3)
    with pytest.raises(ValueError, match="format_version 1, this lopt reads 3"):
        lopt.read(OLDEST)
    monkeypatch.setattr(pretrained, "MIGRATIONS", {1: to_2, 2: to_3})
    rule, _ = lopt.read(OLDEST)
    assert rule.settings["hidden"] == 2


def test_a_learning_rate_can_be_injected_into_load(artifact):
    import optax

    static = ("name", "num_steps", "nonfinite", "diagnostics", "schedule", "labels", "multipliers")
    tx = optax.inject_hyperparams(lopt.load, static_args=static)(str(artifact[0]), lr=0.5, weight_decay=0.0)
    params = {"w": jnp.ones((3, 2))}
    state = tx.init(params)
    assert state.hyperparams["lr"] == 0.5
    half, _ = tx.update(params, state, params)
    whole, _ = lopt.load(artifact[0]).update(params, lopt.load(artifact[0]).init(params), params)
    np.testing.assert_allclose(2 * half["w"], whole["w"], rtol=1e-6)
