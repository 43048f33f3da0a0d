"""Checkpoints of a run: Orbax steps, each with a sha256 of its arrays and of what they belong to.

Orbax restores a flipped byte as wrong values without an error, so every step carries a digest of what was saved and
`restore` walks back to the newest step that matches its own. What cannot be read may be readable tomorrow (a file
system that is away, a disk that stutters): nothing is deleted for it before a newer step is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from lopt.pretrained import named_leaves
from meta_train.config import sha256

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save, and what we report ourselves


ASIDE = "damaged-"  # and the number of a step that could not be read


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

    def __init__(
        self,
        directory: Path,
        identity: str,
        *,
        layout: str | None = None,
        data: str | None = None,
        beside: Any = None,
    ):
        """Open a folder of steps, which is made if need be.

        Args:
          directory: of the steps.
          identity: what the state belongs to (a digest of the config); another one's steps are refused.
          layout: in words, the devices that it lies on; another one's steps are restored, and the difference is told.
            None where nothing goes on from them.
          data: in words, the data that are there; as for `layout`.
          beside: shapes, by name, of what else makes the run and is not in its config, such as the batches of a task
            that is the user's own; steps of other ones are refused. None: it does not matter.
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
        self._directory, self._newest = directory, -1
        self._identity, self._beside = identity, beside
        self._told = {"layout": layout, "data": data}

    def save(self, step: int, tree: Any, loss: float) -> None:
        """Begin to save; the step counts once `close` or a later `save` returns."""
        tree = _numpy(tree)
        shapes = {"leaves": leaves(tree), "beside": leaves(self._beside)}
        belongs = {"step": step, "identity": self._identity, **self._told, **shapes}
        seal = {"arrays": digest(tree), "belongs": belongs}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_by_number(tree)), seal=ocp.args.JsonSave({**seal, "sha256": sha256(seal)})
        )
        with self._written():
            self._manager.save(step, args=items, metrics={"loss": loss}, force=True)  # waits for the one before
        self._forget_aside()
        self._newest = step

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, like: Any) -> tuple[int, Any, list[str]]:
        """The newest step that verifies.

        Args:
          like: a tree of the structure, shapes and dtypes saved; its values are not looked at.

        Returns:
          (step, tree of numpy arrays, lines on what was passed over or differs); step -1 and `like` if there is none.

        Raises:
          ValueError: if the newest step that can be read is of another config, or of a task or rule that has been
            changed since, or if there are steps and none can be read. Nothing is changed then.
        """
        skipped = []
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        for step in reversed(self.steps()):
            try:
                seal = self._seal(step)
                belongs = seal["belongs"]
                other = self._other(belongs, shapes)
                tree = None if other else self._arrays(step, shapes, seal["arrays"])
            except Exception as e:  # a truncated or deleted file raises one of many kinds
                reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'unreadable'}"[:200]
                skipped.append(f"checkpoint {step} is damaged or cannot be read ({reason})")
                continue
            if other:
                raise ValueError(
                    f"checkpoint {step} {other}; valid: what it was saved with, or a new run (with init_from= to start "
                    "at this one's weights)."
                )
            differs = [(belongs[name], now) for name, now in self._told.items() if now not in (None, belongs[name])]
            skipped += [
                f"checkpoint {step} was made on {was} and goes on on {now}: no longer bit for bit the same run"
                for was, now in differs
            ]
            return step, tree, skipped
        if skipped:
            raise ValueError(
                f"{'; '.join(skipped)}. There is no other in {self._directory}, and nothing was changed; valid: the "
                "same again when the files can be read, or, to start at meta-step 0, without that folder."
            )
        return -1, like, skipped

    def set_aside_after(self, step: int) -> None:
        """Rename the steps newer than `step`, which could not be read: what resumes there writes them anew.

        They are deleted when a step is safe that is as new as they.
        """
        for newer in self.steps():
            if newer > step:
                aside = self._directory / f"{ASIDE}{newer}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(newer)).rename(aside)
        self._manager.reload()

    def close(self) -> None:
        with self._written():
            self._manager.wait_until_finished()
        self._forget_aside()
        self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Where what is saved finds no room or may not be written, the system's error and not TensorStore's words."""
        try:
            yield
        except ValueError as e:
            code = re.search(r"os_error_code='(\d+)'", str(e))
            if not code:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(self._directory)) from e

    def _forget_aside(self) -> None:
        for path in self._directory.glob(f"{ASIDE}*"):
            if int(path.name.removeprefix(ASIDE)) <= self._newest:
                shutil.rmtree(path, ignore_errors=True)

    def _seal(self, step: int) -> dict[str, Any]:
        """What a step says of itself. Raises whatever a damaged file raises."""
        seal = self._manager.restore(step, args=ocp.args.Composite(seal=ocp.args.JsonRestore()))["seal"]
        if sha256({name: seal[name] for name in ("arrays", "belongs")}) != seal["sha256"]:
            raise OSError("its seal is not what was saved")
        if seal["belongs"]["step"] != step:
            raise OSError(f"it was saved as {seal['belongs']['step']}")
        return seal

    def _arrays(self, step: int, shapes: Any, saved: str) -> Any:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_by_number(shapes)))
        kept = self._manager.restore(step, args=items)["state"]
        found = [kept[_name(i)] if x.size else x for i, x in enumerate(jax.tree.leaves(shapes))]
        tree = jax.tree.unflatten(jax.tree.structure(shapes), found)
        if digest(tree) != saved:
            raise OSError("its sha256 differs from what was saved")
        return tree

    def _other(self, belongs: dict[str, Any], shapes: Any) -> str:
        """In what a step is of another run than this one; empty if it is of this one."""
        if belongs["identity"] != self._identity:
            return "belongs to another config: config.json was changed"
        for saved, now in ((belongs["leaves"], leaves(shapes)), (belongs["beside"], leaves(self._beside))):
            if saved != now and now is not None:
                gone, new = ([x for x in xs if x not in ys] for xs, ys in ((saved, now), (now, saved)))
                return (
                    f"has {gone[0] if gone else 'no ' + new[0]}, where the run now has {new[0] if new else 'no such'}: "
                    "a task, the rule or a library has been changed since"
                )
        return ""


def leaves(tree: Any) -> list[str] | None:
    """Path, dtype and shape of each leaf; None of None."""
    return None if tree is None else [f"{name} {x.dtype}{list(x.shape)}" for name, x in named_leaves(tree).items()]


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, jax.device_get(tree))


def _by_number(tree: Any) -> dict[str, Any]:
    """Leaves by their number: no container type or name is left for Orbax to interpret. It refuses empty ones."""
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def _name(number: int) -> str:
    return f"{number:04d}"
