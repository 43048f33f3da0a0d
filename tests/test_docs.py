"""What the documentation shows is run: doctests and the README's first lines of code."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import itertools
import re
import shlex
import types
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


NOWCAST = [f"lopt.nowcast.{name}" for name in ("builders", "graph", "transform")]
NOWCAST += ["meta_train.nowcast_training", "meta_train.nowcast_validation"]
MODULES = ["lopt.mup", "lopt.pretrained", "tasks.data", "tasks.data.tfds", "tasks.held_out", *NOWCAST]


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_readmes_code_trains(capsys):
    """As typed, by a user whose arrays may broadcast."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) <= 25
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 1e-3


def blocks(path: Path, *languages: str) -> str:
    """The fenced code of a page, one block after the other."""
    found = re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", path.read_text(), re.DOTALL)
    return "\n".join(found).replace("\\\n", " ")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def trained() -> list[list[str]]:
    """The words of the `lopt-train` commands of all pages that name a config; CONFIG and DIR are the reader's."""
    found = []
    lines = "\n".join(blocks(page, "bash", "yaml") for page in PAGES).splitlines()
    for line in lines:
        if "lopt-train " in line:
            within = re.search(r'"(lopt-train [^"]*)"', line)  # the argument of another command
            shell = shlex.shlex(within[1] if within else line, posix=True, punctuation_chars=True)
            shell.whitespace_split = True
            words = list(shell)
            words = words[words.index("lopt-train") + 1 :]
            words = list(itertools.takewhile(lambda word: not word or not set(word) <= set(";&|"), words))
            if words[0] not in ("CONFIG", "list", "resume", "export", "$@"):
                found.append(words)
    return found


def test_the_commands_of_the_pages_can_be_typed(tmp_path, monkeypatch):
    from meta_train import launch

    own = [code for code in blocks(ROOT / "docs/own-task.md", "python").split("\nfrom ") if "RUN = Run(" in code]
    (tmp_path / "my_run.py").write_text(f"from {own[-1]}")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    commands = trained()
    assert len(commands) >= 9
    assert any(words[0] == "mixture" for words in commands)
    for words in commands:
        name, arguments = ("quickstart", words) if words[0].startswith("--") else (words[0], words[1:])
        assert launch.parse(name, arguments).run.groups, words
    assert ["my_run.py"] in commands
    with pytest.raises(ValueError, match="unknown config 'my-mixture'"):
        launch.parse("my-mixture", [])


class Server:
    """A stand-in for an API server: what JAX asks of it, answered out of the manifest, if the Role allows it."""

    def __init__(self, manifest: list[dict], index: int):
        self.kinds, self.index = {one["kind"]: one for one in manifest}, index
        job = self.kinds["Job"]
        account = job["spec"]["template"]["spec"]["serviceAccountName"]
        binding = self.kinds["RoleBinding"]
        assert {"kind": "ServiceAccount", "name": account} in binding["subjects"]
        assert binding["roleRef"]["name"] == self.kinds["Role"]["metadata"]["name"]
        assert self.kinds["ServiceAccount"]["metadata"]["name"] == account

    def allowed(self, group: str, resource: str, verb: str) -> None:
        rules = self.kinds["Role"]["rules"]
        assert any(group in r["apiGroups"] and resource in r["resources"] and verb in r["verbs"] for r in rules)

    def list_namespaced_pod(self, namespace, field_selector):
        self.allowed("", "pods", "list")
        job = self.kinds["Job"]
        labels = {"job-name": job["metadata"]["name"]}
        owner = types.SimpleNamespace(controller=True, kind="Job")
        meta = types.SimpleNamespace(name="pod", labels=labels, owner_references=[owner])
        spec = types.SimpleNamespace(subdomain=job["spec"]["template"]["spec"].get("subdomain"))
        return types.SimpleNamespace(items=[types.SimpleNamespace(metadata=meta, spec=spec)])

    def read_namespaced_job(self, name, namespace):
        self.allowed("batch", "jobs", "get")
        job = self.kinds["Job"]
        assert name == job["metadata"]["name"]
        meta = types.SimpleNamespace(name=name, labels={})
        return types.SimpleNamespace(metadata=meta, spec=types.SimpleNamespace(parallelism=job["spec"]["parallelism"]))


def test_jaxs_detection_finds_its_way_in_the_manifest(monkeypatch):
    import yaml
    from jax._src.clusters import k8s_cluster

    manifest = list(yaml.safe_load_all(blocks(ROOT / "docs/scaling.md", "yaml")))
    server = Server(manifest, 3)

    class Cluster(k8s_cluster.K8sCluster):
        opt_in_only_method = True  # not to be found by others
        _core_api = _batch_api = server
        _ApiException = RuntimeError

        @classmethod
        def _namespace(cls):
            return "default"

    monkeypatch.setenv("HOSTNAME", "localhost")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    try:
        assert Cluster.get_coordinator_address(None, None) == "lopt-0.lopt:55527"
        job, service = server.kinds["Job"]["spec"], server.kinds["Service"]
        assert Cluster.get_process_count() == job["completions"] == 8
        assert Cluster.get_process_id() == 3
    finally:
        k8s_cluster.K8sCluster._cluster_types.remove(Cluster)
    # The name of process 0 resolves, since the service is headless and selects the job's pods.
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == job["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": server.kinds["Job"]["metadata"]["name"]}
    assert job["completionMode"] == "Indexed"
    # The run directory is on the claim, which all pods can write to.
    (container,), (volume,) = job["template"]["spec"]["containers"], job["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == server.kinds["PersistentVolumeClaim"]["metadata"]["name"]
    assert server.kinds["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert f"run={mount['mountPath']}/" in container["args"][0]


def test_each_process_of_the_slurm_script_finds_its_gpu(monkeypatch):
    """JAX gives a process the device of its number on the node, which must be visible to it."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    script = blocks(ROOT / "docs/scaling.md", "bash")
    nodes, tasks, gpus = (
        int(re.search(rf"#SBATCH --{x} (\d+)", script)[1]) for x in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus
    assert "--gpu-bind=none" in script
    assert "--gpus-per-task" not in script
    for number in range(nodes * tasks):
        told = {"JOB_ID": "77", "STEP_NODELIST": "node[3-4]", "NTASKS": nodes * tasks, "PROCID": number}
        for name, value in (told | {"LOCALID": number % tasks}).items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        assert SlurmCluster.is_env_present()
        assert SlurmCluster.get_local_process_id() < gpus
        assert SlurmCluster.get_process_id() < SlurmCluster.get_process_count() == nodes * tasks
        assert SlurmCluster.get_coordinator_address(None, None).startswith("node3:")


@pytest.mark.parametrize("name", ["quickstart", "lopt-base", "lopt-tiny", "nn_adam"])
def test_shipped_weights_are_of_their_recipe(name):
    """Weights and named config belong together: what the card says to run is what was run.

    Settings of the rule that are younger than the weights stand in the card, as what was set afterwards.
    """
    import json

    from meta_train.config import Run, load

    config = json.loads((ROOT / "checkpoints" / name / "config.json").read_text())
    card = (ROOT / "checkpoints" / name / "README.md").read_text()
    was, run = Run.from_json(config["provenance"]["run"]), load(name)
    assert config["provenance"]["meta_steps"] == run.meta_steps
    assert dataclasses.replace(was, rule_settings=run.rule_settings) == run
    assert was.rule_settings.items() <= run.rule_settings.items() <= config["settings"].items()
    for later in run.rule_settings.keys() - was.rule_settings.keys():
        assert f"`{later}`" in card, later


def test_every_table_of_the_benchmark_has_its_place():
    """And what was measured is written there, and nowhere else."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    row = {"pairs": 8, "truncation": 50, "params": 2410, "rule": "velo", "devices": 1, "meta_parameters": 2_320_385}
    row |= {"inner_steps_per_second": 27_000.0, "inner_steps_per_cpu_second": 13_500.0}
    row |= {"inner_steps_per_second_10th_90th": [26_000.0, 28_000.0]}
    parts = {"batch": 1.0, "forward and backward": 10.0, "rule": 20.0, "whole": 37.0}
    floor = {"pairs": 8, "peak_gflops": 50.0, "us": parts}
    floor |= {"flops": {"forward and backward": 647_168, "rule": 701_310}}
    floor |= {"floor_us": {"forward and backward": 12.9, "rule": 14.0}}
    report = {"machine": "a machine", "reference": 2700.0, "speed": [row], "devices": [row, row], "velo": [row]}
    report |= {
        "scaling": {"pairs": [row], "params": [row]},
        "startup": {"cold": 12.0, "warm": 5.0},
        "floor": floor,
        "l2o": row,
    }
    assert set(tables.TABLES) <= set(report)
    pages = [(ROOT / page).read_text() for page in tables.PAGES]
    filled = [tables.fill(page, report) for page in pages]
    for name in tables.TABLES:
        assert sum(page.count(f"<!-- {name} -->") for page in pages) == 1, name
        (page,) = (page for page in filled if f"<!-- {name} -->" in page)
        assert page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].count("\n|") >= 3, name
    assert "| 8 | 27,000 (26,000 to 28,000) | 10.0 | yes | 13,500 | 5.0 |" in filled[0]
    # 2 x 512 x 50 x 200,000 = 1.02e10 inner steps at 27,000 a second are 105 hours.
    assert "| `pes`, K = 50 | 200,000 | 512 | 1.0e+10 | 105 | 0.017 | 1.9 |" in filled[1]
    assert [tables.fill(page, {"machine": ""}) for page in pages] == pages


def test_the_table_of_data_is_what_its_command_prints():
    from tasks.data.__main__ import table

    assert table() in (ROOT / "docs/data.md").read_text()


def test_the_table_of_draws_is_what_its_command_prints():
    from tasks.__main__ import table

    assert table() in (ROOT / "docs/tasks.md").read_text()


def test_the_own_task_of_the_documentation_works(tmp_path, monkeypatch):
    import sys

    import tasks

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/own-task.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 20
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    task = tasks.make("my_tasks:my_family", width=4)  # which checks it
    assert task.family == "my_tasks:my_family"
