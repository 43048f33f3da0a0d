"""Importers: weights in the originals' formats become the theta that parity is tested with; hostile files do not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
from safetensors.numpy import save as dump_safetensors

import lopt
from lopt import convert, rules, weights

msgpack = pytest.importorskip("msgpack")
ROOT = Path(__file__).parents[1]
FORMATS = {"pylo": "model.safetensors", "learned_optimization": "theta.state"}


def ext(array, shape=None, dtype=None, raw=None, code=1):
    """An array as flax writes it, or a lie about it."""
    shape, dtype = list(array.shape) if shape is None else shape, dtype or array.dtype.name
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, array.tobytes() if raw is None else raw)))


def nested(arrays):
    tree = {}
    for name, x in arrays.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = ext(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    return tree


def flax_bytes(arrays):
    return msgpack.packb(nested(arrays))


def pylo_bytes(arrays):
    return dump_safetensors({k: np.ascontiguousarray(x) for k, x in arrays.items()})


def write(folder, format, arrays):
    """The original's folder; returns what `load` is given."""
    folder.mkdir(parents=True)
    (folder / FORMATS[format]).write_bytes((pylo_bytes if format == "pylo" else flax_bytes)(arrays))
    if format == "pylo":
        (folder / "config.json").write_text(json.dumps({"hidden_layers": 1}))
        return folder
    return folder / FORMATS[format]


def recording(name, request):
    """The fixture, or where there is none the original."""
    path = parity.fixture(name)
    return parity.read(path if path.exists() else request.getfixturevalue("shared") / f"parity/{name}.npz")


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def stranger(folder):
    """Weights for the tests that need some: PyLO's MetaMLP of hidden width 3."""
    rng = np.random.default_rng(0)
    layers = {"input": (3, 39), "linear_0": (3, 3), "output": (2, 3)}
    arrays = {f"network.{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in layers.items()}
    arrays |= {f"network.{k}.bias": rng.normal(size=s[0]).astype(np.float32) for k, s in layers.items()}
    return write(folder, "pylo", arrays), arrays


@pytest.mark.parametrize("name", parity.CASES)
def test_every_recorded_theta_is_imported(name, tmp_path, request):
    case, theta, format = parity.CASES[name], recording(name, request).theta, name.split("/")[0]
    guessed = case.rule if case.rule not in ("mulo", "elo") else "small_fc"
    source = write(tmp_path / "x", format, theta)
    assert convert.load(source, format=format)[0].name == guessed
    rule, got = convert.load(source, format=format, rule=case.rule)
    assert rule.name == case.rule
    assert_same(got, case.theta(theta))
    seen = {k: v for k, v in case.settings.items() if k in ("hidden", "bank", "lstm_hidden", "step_mult")}
    assert {k: rule.settings[k] for k in seen} == seen  # shapes, and the published step_mult
    if "compat" in rule.settings:
        assert rule.settings["compat"] == ("pylo" if format == "pylo" else "")


def test_velo_of_two_folders(tmp_path, request):
    both = recording("pylo/velo", request).theta
    mlp, rnn = ({k[4:]: x for k, x in both.items() if k.startswith(part)} for part in ("mlp.", "rnn."))
    scratch = {"input_weights": mlp["input_weights_"][0]}  # the live copy that PyLO saves too
    pair = [write(tmp_path / "mlp", "pylo", mlp | scratch), write(tmp_path / "rnn", "pylo", rnn)]
    rule, theta = convert.load(pair, format="pylo")
    assert rule.settings == rules.make("velo", bank=32, lstm_hidden=64, compat="pylo").settings
    assert_same(theta, parity.CASES["pylo/velo"].theta(both))
    digests = [hashlib.sha256((p / "model.safetensors").read_bytes()).hexdigest() for p in pair]
    convert.load(pair, format="pylo", sha256=digests)
    with pytest.raises(ValueError, match="has sha256"):  # the second one is checked too
        convert.load(pair, format="pylo", sha256=[digests[0], digests[0]])
    with pytest.raises(ValueError, match="sha256, got 1 for 2 sources"):
        convert.load(pair, format="pylo", sha256=digests[0])
    with pytest.raises(ValueError, match="is in both sources"):
        convert.load([pair[0], pair[0]], format="pylo")
    configs = [path / "config.json" for path in pair]
    configs[0].write_text('{"param_inits": 33}')
    with pytest.raises(ValueError, match=r"its config\.json has param_inits 33, its weights 32"):
        convert.load(pair, format="pylo")
    configs[1].write_text('{"param_inits": 32}')
    with pytest.raises(ValueError, match=r"'param_inits' is not the same in the two config\.json"):
        convert.load(pair, format="pylo")


def test_released_celo(shared, monkeypatch):
    name, source = "learned_optimization/celo_pretrained", shared / "weights/celo.theta.state"
    rule, theta = convert.load(source, format="celo")
    case = parity.CASES.get(name, parity.Case("celo", {}, dict(num_steps=100), None))
    monkeypatch.setitem(
        parity.CASES, name, case._replace(rule=rule.name, settings=rule.settings, theta=lambda _: theta)
    )
    assert parity.mismatch(name, parity.read(shared / f"parity/{name}.npz")) is None
    for rule in (None, "celo", "velo"):
        with pytest.raises(ValueError, match=r"celo_adam\.theta\.state .* has no per-parameter network"):
            convert.load(shared / "weights/celo_adam.theta.state", format="celo", rule=rule)


def test_settings_that_the_file_does_not_say(tmp_path):
    source, _ = stranger(tmp_path / "x")
    rule, theta = convert.load(source, format="pylo")
    assert (rule.settings["step_mult"], rule.settings["compat"]) == (0.01, "pylo")
    assert convert.load(source, format="pylo", step_mult=0.5, compat="")[0].settings["step_mult"] == 0.5
    assert convert.load(source, format="pylo", learned_decays=False)[1].decays is None
    (source / "config.json").write_text('{"hidden_size": 3, "step_mult": 0.25}')  # not PyLO's own habit
    assert convert.load(source, format="pylo")[0].settings["step_mult"] == 0.25
    with pytest.raises(ValueError, match=r"step_mult, got 0\.5; the file says 0\.25"):
        convert.load(source, format="pylo", step_mult=0.5)
    (source / "config.json").write_text('{"momenta": [0.1, 0.2, 0.3]}')
    for same in ((0.1, 0.2, 0.3), [0.1, 0.2, 0.3], np.asarray([0.1, 0.2, 0.3])):
        assert convert.load(source, format="pylo", momenta=same)[0].settings["momenta"] == (0.1, 0.2, 0.3)
    (source / "config.json").unlink()
    _, other = convert.load(source, format="pylo", decays={"m": [0.9, 0.99, 0.999], "v": [0.95]})
    np.testing.assert_allclose(other.decays.m, 0, atol=1e-7)  # offsets from these very decays
    from lopt.rules.small_fc import decay_at

    np.testing.assert_allclose(decay_at((0.999,), other.decays.v), [0.95], atol=1e-6)
    raw, _ = convert.load(source, format="pylo", rule="elo", momenta=[0.8, 0.9, 0.95])
    assert raw.settings["momenta"] == (0.8, 0.9, 0.95)  # where they are not learned they are settings
    np.testing.assert_array_equal(other.decays.factored, theta.decays.factored)


BAD_ARGUMENTS = {
    r"unknown format 'pilo'. Did you mean 'pylo'": {"format": "pilo"},
    r"unknown rule 'mula'. Did you mean 'mulo'": {"rule": "mula"},
    r"is not a theta of velo: it has no 'input_weights_'": {"rule": "velo"},
    r"Did you mean 'step_mult'": {"step_malt": 1.0},
    r"small_fc: unknown setting 'name'": {"name": "x"},
    r"step_mult, got 'much'; valid: float": {"step_mult": "much"},
    r"hidden, got 4; the file says 3": {"hidden": 4},
    r"decays m, got \[2\]; valid: 3 in \(0, 1\)": {"decays": {"m": [2]}},
    r"unknown decay 'w'": {"decays": {"w": [0.5]}},
    r"decays, got .* for elo; valid: a mapping.*settings of the rule: momenta": {"decays": {"m": [0.5]}, "rule": "elo"},
    r"sha256, got 'abc'; valid: 64 hex digits": {"sha256": "abc"},
    r"has sha256 .*valid: 0000": {"sha256": "0" * 64},
}


@pytest.mark.parametrize("says", BAD_ARGUMENTS)
def test_bad_arguments(says, tmp_path):
    with pytest.raises(ValueError, match=says):
        convert.load(stranger(tmp_path / "x")[0], **{"format": "pylo", **BAD_ARGUMENTS[says]})


def test_a_network_of_another_form_is_refused(tmp_path):
    source, arrays = stranger(tmp_path / "x")
    deeper = write(tmp_path / "deep", "pylo", arrays | {"network.linear_1.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"1 arrays more than it has, e\.g\. 'network.linear_1\.weight'"):
        convert.load(deeper, format="pylo")
    configs = {
        '{"activation": "tanh"}': "activation 'tanh'",
        '{"hidden_size": 32}': "its config.json has hidden_size 32, its weights 3",
        '{"hidden": 5}': "its config.json has hidden 5, its weights 3",
        '{"input_size": 40}': "its config.json has input_size 40, its weights 39",
        '{"exp_mult": NaN}': "not JSON: NaN is not a number",
        '{"exp_mult": 1, "exp_mult": 2}': "not JSON: a key is in it twice",
        '{"step_mult": -1}': "step_mult, got -1; valid: > 0",
        '{"compat": ["pylo"]}': "compat, got \\('pylo',\\); valid: str",
        "[" * 10**5: "not JSON",
        "3": "is a int",
    }
    for config, says in configs.items():
        (source / "config.json").write_text(config)
        with pytest.raises(ValueError, match=says):
            convert.load(source, format="pylo")


def test_hub(tmp_path, monkeypatch):
    source, _ = stranger(tmp_path / "x")
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(source)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    good = {"revision": "a" * 40, "sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()}
    for change, says in (
        ({"revision": None}, "revision, got None; valid: a commit of 40 hex"),
        ({"revision": "main"}, "revision, got 'main'"),
        ({"sha256": None}, "sha256 is None"),
    ):
        with pytest.raises(ValueError, match=says):
            convert.load("hf:me/mine", format="pylo", **good | change)
    with pytest.raises(ValueError, match=r"hub repository, got '\.\./\.\./etc'"):
        convert.load("hf:../../etc", format="pylo", **good)
    assert not asked  # refused before anything is fetched
    with pytest.raises(ValueError, match="has sha256"):
        convert.load("hf:me/mine", format="pylo", **good | {"sha256": "0" * 64})
    assert_same(convert.load("hf:me/mine", format="pylo", **good)[1], convert.load(source, format="pylo")[1])
    assert asked == [("me/mine", "a" * 40)] * 2


def test_no_pickle(tmp_path, monkeypatch):
    arrays, path = {"w": np.ones(2, np.float32)}, tmp_path / "theta.state"
    np.savez(tmp_path / "theta.npz", x=np.array([{}], dtype=object))
    hostile = {
        "pickle": pickle.dumps(arrays),
        "npz": (tmp_path / "theta.npz").read_bytes(),
        "object array": msgpack.packb({"w": ext(arrays["w"], [1], "object", pickle.dumps(1).ljust(8))}),
        "flax's npscalar": msgpack.packb({"w": msgpack.ExtType(3, b"x")}),
    }
    called = []
    for where, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (np, "load")):
        monkeypatch.setattr(where, name, lambda *a, **k: called.append(1))
    for content in hostile.values():
        for format, file in (("celo", path), ("pylo", tmp_path / "model.safetensors")):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"is not a readable|claims a header"):
                convert.load(file, format=format)
    assert not called


def test_oversized_is_refused_unread(tmp_path):
    for name, format in (("theta.state", "celo"), ("model.safetensors", "pylo")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(65 * 2**30)  # sparse
        began = time.perf_counter()
        with pytest.raises(ValueError, match=f"{65 * 2**30} bytes; valid: at most"):
            convert.load(tmp_path / name, format=format)
        assert time.perf_counter() - began < 1


def flax_attacks(good):
    """Name -> bytes, made with knowledge of the format. `good`: arrays of a small_fc theta."""
    b = np.ascontiguousarray(good["nn/~/b0"])
    n, big = len(b), b"\xc1" * 20

    def put(x, name="nn/~/b0"):
        return msgpack.packb(nested(good | {name: x}))

    shapes = [[n + 1], [n, 1], [], [0], [-n], [2**62, 2**62], [n, 2**40], ["4"], [[n]], [4.0], [1] * 9, n]
    out = {f"shape {s}": put(ext(b, s)) for s in shapes}
    dtypes = ["object", "O", "int32", "bfloat16", "<f4", "V16", "U4", "../../x", "complex64", "float128", "M8[s]"]
    out |= {f"dtype {d}": put(ext(b, dtype=d)) for d in dtypes}
    out |= {f"ext {c}": put(ext(b, code=c)) for c in (0, 2, 3, 5, 42, 127)}
    inner = [msgpack.packb(x) for x in ([1], [[n], "float32"], [[n], 2**31, b.tobytes()], [[n], b"float32", 2**33])]
    inner += [b"", b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 4000]
    inner += [b"\xdc\xff\xff" + b"\x98" + b"\x90" * 10**6, b"\x98" * 300 + b"\x90" * 10**6]
    out |= {f"inner {i}": put(msgpack.ExtType(1, x)) for i, x in enumerate(inner)}
    claims = [b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc9\xff\xff\xff\xf0\x01", b"\xc6\xff\xff\xff\xff"]
    claims += [b"\xdb\xff\xff\xff\xff", b"\x81\xa1w\xc9\x7f\xff\xff\xff\x01", b"\x81\xdb\xff\xff\xff\xff"]
    out |= {f"claims {i}": x + big for i, x in enumerate(claims)}
    roots = [[], [1], 3, None, "x", b"x", True, 1.5, {}, {"x": {}}, {"nn": 3}, {"nn": [1]}, {"x": None}, {1: 2}]
    out |= {f"root {r!r}": msgpack.packb(r) for r in roots} | {"root array": msgpack.packb(ext(b))}
    out |= {f"deep {d}": b"\x81\xa1a" * d + b"\x80" for d in (17, 400, 5000, 10**6)} | {"deep lists": b"\x91" * 10**6}
    out |= {"many dicts": b"\x80" * 10**6, "list of nils": b"\xdd\x01\x00\x00\x00" + b"\xc0" * 2**24}
    wide = {f"{i:04x}": 0 for i in range(499)}
    out["wide and deep"] = b"".join(b"\xde\x01\xf4" + msgpack.packb(wide)[3:] + b"\xa1a" for _ in range(1000)) + b"\x80"
    out["long names"] = b"".join(b"\x81\xda\xff\xff" + b"a" * 65535 for _ in range(100)) + b"\x80"
    names = ["../../x", "/etc/passwd", "a\nb", "\x1b[2J", "x" * 5000, "", "nn/~/w0 ", "C:\\x", "\u202e"]
    out |= {f"name {k[:9]!r}": put(b, k) for k in names}
    out["twice"] = b"\x82" + 2 * (msgpack.packb("w") + msgpack.packb(ext(b)))
    out["twice, joined"] = msgpack.packb({**nested(good), "nn/~": {"b0": ext(b)}})
    out |= {f"without {k}": msgpack.packb(nested({j: x for j, x in good.items() if j != k})) for k in good}
    for value in (np.nan, np.inf, -np.inf):
        out[f"weight {value}"] = put(np.full_like(b, value))
    out["overflow"], out["f16"] = put(np.full(n, 1e300)), put(b.astype(np.float16))
    out["all empty"], out["bad utf-8"] = put(np.zeros((0, 2**40), np.float32)), b"\x81\xa2\xff\xfe\x80"
    return out | {"empty": b""}


def safetensors_attacks(good):
    content = pylo_bytes(good)
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    first = next(iter(header))

    def put(head, raw=data):
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
        return struct.pack("<Q", len(text)) + text + raw

    def change(**what):
        return put(header | {first: header[first] | what})

    out = {f"header of {n}": struct.pack("<Q", n) + content[8:] for n in (0, 1, 2**20, 2**33, 2**63, 2**64 - 1)}
    offsets = [[0, 2**40], [2**63, 2**64], [-4, 0], [4, 0], [0, 0], [0], [0, 4, 8], "x", None, [1, 5], [0.0, 4.0]]
    out |= {f"offsets {o}": change(data_offsets=o) for o in offsets}
    dtypes = ["BF16", "I32", "F8_E4M3", "F8_E5M2", "BOOL", "U8", "O", "F32 ", 3, None, "F64", "F16"]
    out |= {f"dtype {d}": change(dtype=d) for d in dtypes}
    shapes = [[2**62, 2**62], [-1], [0], [], [2**64], [2**32, 2**32], ["3"], [1.5], None, [0, 2**63], [1] * 99]
    out |= {f"shape {s}"[:40]: change(shape=s) for s in shapes}
    overlap = dict(header)
    overlap[list(header)[1]] = header[first]
    out |= {"overlap": put(overlap), "hole": put(header, data + b"\0" * 64), "no data": put(header, b"")}
    for k in ("../../x", "/etc/passwd", "a\nb", "\x1b[2J", "x" * 5000, ""):
        out[f"name {k[:9]!r}"] = pylo_bytes(good | {k: np.ones(3, np.float32)})
    heads = [b"{" * 10**6, b"[]", b"3", b"", b"{}", b"\xff\xfe", b'{"a":' * 10**5, b'{"__metadata__": {"a": 3}}']
    out |= {f"head {i}": put(x) for i, x in enumerate(heads)}
    out["many"] = put({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(15000)}, b"")
    for value in (np.nan, np.inf):
        out[f"weight {value}"] = pylo_bytes(good | {first: np.full_like(good[first], value)})
    return out


def config_attacks():
    """Contents of config.json beside good weights; what our rules call settings is believed only if it fits them."""
    values = ["NaN", "-Infinity", "1e999", "null", "true", '"a"', "[]", "{}", "-1", "0", "3", "9" * 5000, "[" * 10**5]
    names = [
        "step_mult",
        "exp_mult",
        "compat",
        "hidden",
        "hidden_size",
        "learned_decays",
        "max_grad_norm",
    ]
    out = {f"config {name} {value[:9]}": f'{{"{name}": {value}}}' for name in names for value in values}
    return out | {"config cut": '{"step_mult": 0.', "config name": '{"\\u001b[2J": 1}', "config list": "[1]"}


def random_damage(content, rng, count):
    for i in range(count):
        x, where = bytearray(content), rng.integers(len(content))
        if i % 3 == 0:
            for at in rng.integers(0, min(len(x), 400 if i % 2 else len(x)), 1 + i % 8):
                x[at] = rng.integers(256)
        elif i % 3 == 1:
            x = x[:where]
        else:
            x[where:where] = rng.bytes(1 + i)
        yield f"damage {i}", bytes(x)


def fuzz(folder):
    """Run in a process of its own; prints how many files, structured, accepted, the most seconds, and MB of growth."""
    import resource

    rng, fixture = np.random.default_rng(0), parity.read(parity.fixture("learned_optimization/adafac_mlp_h4"))
    small, (_, meta) = dict(fixture.theta), stranger(folder / "x")
    files = [("theta.state", "celo", k, x) for k, x in flax_attacks(small).items()]
    files += [("theta.state", "celo", *x) for x in random_damage(flax_bytes(small), rng, 70)]
    files += [("model.safetensors", "pylo", k, x) for k, x in safetensors_attacks(meta).items()]
    files += [("model.safetensors", "pylo", *x) for x in random_damage(pylo_bytes(meta), rng, 70)]
    files += [("model.safetensors", "pylo", "good again", pylo_bytes(meta))]
    files += [("config.json", "pylo", k, x.encode()) for k, x in config_attacks().items()]
    seconds, grown = 0.0, 0
    for name, format, good in (
        ("theta.state", "celo", flax_bytes(small)),
        ("model.safetensors", "pylo", pylo_bytes(meta)),
    ):
        (folder / name).write_bytes(good)
        convert.load(folder / name, format=format)
    accepted, peak = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, format, what, content in files:
        (folder / name).write_bytes(content)
        began = time.process_time()
        try:
            source = folder / ("model.safetensors" if format == "pylo" else name)
            rule, theta = convert.load(source, format=format)
        except ValueError as e:
            if len(str(e)) >= 500 or not str(e).isprintable():
                raise AssertionError(f"{format}, {what}: {e}") from e
        except BaseException as e:
            raise AssertionError(f"{format}, {what}: {type(e).__name__}: {e}") from e
        else:
            accepted += 1
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(theta)), what
            like = jax.eval_shape(rule.init_theta, jax.random.key(0))
            assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, like), what
        took, now = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert took < 1, (what, took)
        grown, seconds = max(grown, (now - peak) // 1024), max(seconds, took)
        assert grown < 200, (what, grown)
    structured = sum(not what.startswith("damage") for _, _, what, _ in files)
    print(json.dumps([len(files), structured, accepted, seconds, grown]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fuzz(tmp_path):
    code = f"import pathlib, test_convert; test_convert.fuzz(pathlib.Path({str(tmp_path)!r}))"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    files, structured, accepted, _, _ = json.loads(run.stdout)
    assert files >= 200
    assert structured >= files / 2
    assert 0 < accepted < files / 3  # flipped bits of a weight are a weight


def test_command_line(tmp_path, capsys):
    source, to = str(stranger(tmp_path / "x")[0]), tmp_path / "new" / "mine"
    words = ["import", source, "--format", "pylo", "--rule", "mulo", "--set", "step_mult=0.5", "--to", str(to)]
    assert weights.main(words) == 0
    config = json.loads((to / "config.json").read_text())
    assert (config["rule"], config["settings"]["step_mult"]) == ("mulo", 0.5)
    origin = config["provenance"]
    assert origin["settings_not_in_file"] == {k: v for k, v in config["settings"].items() if k != "hidden"}
    assert origin["imported_from"] == [source]
    assert [*origin["sha256"].values()] == [hashlib.sha256(Path(source, "model.safetensors").read_bytes()).hexdigest()]
    assert set(origin["theta_not_in_file"]) == {"decays.m", "decays.v", "decays.factored"}
    assert lopt.load(to).init({"w": np.ones((2, 2), np.float32)})
    assert_same(lopt.read(to)[1], convert.load(source, format="pylo", rule="mulo")[1])
    capsys.readouterr()
    assert weights.main(["show", str(to)]) == 0
    shown = capsys.readouterr().out
    assert "rule: mulo\n" in shown
    assert "needs: nothing\nsha256: ok" in shown
    assert weights.main(["list"]) == 0
    assert "quickstart  " in capsys.readouterr().out
    for wrong in (
        words,  # --to exists
        ["import", source, "--format", "pylo", "--to", str(to / "x"), "--set", "hidden"],
        ["import", source, "--format", "pylo", "--to", str(to / "x"), "--set", "step_mult=NaN"],
        ["import", source, "--format", "pylo", "--to", str(to / "x"), "--rule", "elo", "--set", 'clip_norm="a"'],
        ["import", source, "--format", "celo", "--to", str(to / "x")],
        ["import", source, "--format", "pylo", "--to", str(to / "config.json" / "x")],
        ["show", str(tmp_path)],
    ):
        assert weights.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        weights.main(["import", source])
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in to.parent.iterdir()] == ["mine"]


def test_help_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; from lopt.weights import main; main(['import', '--help'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--format" in run.stdout
    assert set(weights.FORMATS) == set(convert.REGISTRY)
