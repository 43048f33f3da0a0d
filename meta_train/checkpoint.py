"""Checkpoints of a run: Orbax steps, each with a sha256 of its arrays and of what they belong to.

Orbax restores a flipped byte as wrong values without an error, so every step carries a digest of what was saved and
`restore` walks back to the newest step that matches its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save, and what we report ourselves


def digest(tree: Any) -> str:
    """sha256 over paths, dtypes, shapes and bytes of the leaves."""
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        h.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


class Checkpoints:
    """The steps of a run directory: the latest two and the best by meta-loss are kept."""

    def __init__(self, directory: Path, identity: str, layout: str | None = None):
        """Open a folder of steps, which is made if need be.

        Args:
          directory: of the steps.
          identity: what the state belongs to (a digest of the config); another one's steps are refused.
          layout: in words, the devices that it lies on; another one's steps are restored, and the difference is told.
            None where nothing goes on from them.
        """
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(2), policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)]
        )
        # One process writes what all have gathered; Orbax need not wait for the others.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
        )
        directory.mkdir(exist_ok=True)  # which Orbax does only where all processes take part
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            create=False,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._identity, self._layout = identity, layout

    def save(self, step: int, tree: Any, loss: float) -> None:
        """Begin to save; the step counts once `close` or a later `save` returns."""
        tree = _numpy(tree)
        belongs = {"identity": self._identity, "layout": self._layout}
        seal = {"sha256": _sealed(tree, belongs), **belongs}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_by_number(tree)), seal=ocp.args.JsonSave(seal))
        self._manager.save(step, args=items, metrics={"loss": loss}, force=True)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, like: Any) -> tuple[int, Any, list[str]]:
        """The newest step that verifies.

        Args:
          like: a tree of the structure, shapes and dtypes saved; its values are not looked at.

        Returns:
          (step, tree of numpy arrays, lines about what was passed over or differs); step -1 and `like` if none is good.

        Raises:
          ValueError: if the newest good step belongs to another config.
        """
        skipped = []
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        for step in reversed(self.steps()):
            try:
                items = ocp.args.Composite(
                    state=ocp.args.StandardRestore(_by_number(shapes)), seal=ocp.args.JsonRestore()
                )
                found = self._manager.restore(step, args=items)
                kept = found["state"]
                leaves = [kept[_name(i)] if x.size else x for i, x in enumerate(jax.tree.leaves(shapes))]
                tree = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
                seal = found["seal"]
                belongs = {name: seal[name] for name in ("identity", "layout")}
                same = _sealed(tree, belongs) == seal["sha256"]
            except Exception as e:  # a truncated or deleted file raises one of many kinds
                reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'unreadable'}"[:200]
            else:
                if same and belongs["identity"] != self._identity:
                    raise ValueError(
                        f"checkpoint {step} belongs to another config: config.json was changed; valid: the config it "
                        "was saved with, or a new run (with init_from= to start at this one's weights)."
                    )
                if same and self._layout is not None and belongs["layout"] != self._layout:
                    skipped.append(
                        f"checkpoint {step} was made on {belongs['layout']} and goes on on {self._layout}: no longer "
                        "bit for bit the same run"
                    )
                if same:
                    return step, tree, skipped
                reason = "its sha256 differs from what was saved"
            skipped.append(f"checkpoint {step} is damaged ({reason})")
        return -1, like, skipped

    def drop_after(self, step: int) -> None:
        """Delete the steps newer than `step`: what resumes there will write them anew."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _sealed(tree: Any, belongs: dict[str, Any]) -> str:
    """sha256 of a state and of what it belongs to: a byte of either may flip."""
    return hashlib.sha256(f"{digest(tree)} {json.dumps(belongs, sort_keys=True)}".encode()).hexdigest()


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, jax.device_get(tree))


def _by_number(tree: Any) -> dict[str, Any]:
    """Leaves by their number: no container type or name is left for Orbax to interpret. It refuses empty ones."""
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def _name(number: int) -> str:
    return f"{number:04d}"
