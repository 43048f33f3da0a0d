"""Several processes, one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices; JAX's runtime carries the all-reduce of the meta-gradient.
Process 0 alone writes the run directory; `resume` reads its config.json in all of them. A process that dies takes the
run with it: the others end within seconds, and `lopt-train resume` starts all of them again at the newest checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEARTBEAT = 10  # seconds after which a silent process counts as dead
LOST = 75  # exit code where another process was lost: EX_TEMPFAIL, start all again
# What JAX, its coordination service, Gloo and NCCL say then. Out of memory or a bad argument is an error of our own.
OTHERS = re.compile(
    r"gloo|nccl|coordination|heartbeat|unhealthy|another task died|unavailable|deadline.exceeded|timed out|broken pipe"
    r"|connection (closed|reset|refused)|socket closed",
    re.IGNORECASE,
)


def check(coordinator: str, processes: int, process_id: int) -> None:
    """Refuse what `initialize` could not mean. Raises ValueError if one of the three is given and another is not."""
    given = (bool(coordinator), processes > 0, process_id >= 0)
    if any(given) and not all(given):
        raise ValueError(
            f"lopt-train --distributed: got --coordinator {coordinator!r}, --processes {processes}, "
            f"--process-id {process_id}; valid: all three, or none where SLURM, Kubernetes or a TPU pod tells them."
        )
    if all(given) and process_id >= processes:
        raise ValueError(f"lopt-train --distributed: --process-id, got {process_id}; valid: 0 to {processes - 1}.")


def initialize(coordinator: str, processes: int, process_id: int) -> None:
    """Join the other processes. Before any other use of JAX.

    Args:
      coordinator: host:port of process 0, or "" to be told by SLURM, Kubernetes or the TPU runtime.
      processes: how many there are; 0 where `coordinator` is "".
      process_id: 0 to processes - 1; -1 where `coordinator` is "".

    Raises:
      ValueError: if the others cannot be reached, or nothing tells who they are.
    """
    import jax

    told: dict[str, Any] = {}
    if coordinator:
        told = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=5)
    except Exception as e:  # a name that is not known, a port that is taken, nobody there: one of many kinds
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(
            f"lopt-train --distributed: {reason}; valid: --coordinator HOST:PORT, --processes N, --process-id I, "
            "or a cluster that says them (SLURM, Kubernetes, a TPU pod)."
        ) from e


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    import jax

    return jax.process_index() == 0


def several() -> bool:
    import jax

    return jax.process_count() > 1


def gather(tree: Any) -> Any:
    """Whole arrays as numpy in the first process, of arrays that are spread over all devices; all processes must ask.

    The others have None in their place, and hold no more than one array at a time.
    """
    import jax
    import numpy as np

    if not several():
        return jax.tree.map(np.asarray, jax.device_get(tree))
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        whole = multihost_utils.process_allgather(x, tiled=True)
        return whole if first() else None

    return jax.tree.map(one, tree)


def each(tree: Any) -> Any:
    """Every process's values [processes, ...] in every process, as numpy; shapes must not differ."""
    import jax
    import numpy as np

    if several():
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=False)
    return jax.tree.map(lambda x: np.asarray(x)[None], tree)


def agree(tree: Any) -> Any:
    """Process 0's values, in every process."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def most(number: int) -> int:
    """The largest of a number over all processes; all of them must ask."""
    if not several():
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def refuse_together(error: Exception | None) -> None:
    """Raise in every process if process 0 met an error; all of them must ask."""
    if most(0 if error is None else 1):
        raise error or ValueError("lopt-train: process 0 ended with an error; its words are in its log.")


def refuse_others(sha256: str) -> None:
    """Raise ValueError in every process unless all of them were given the same; all of them must ask."""
    import numpy as np

    mine = np.frombuffer(bytes.fromhex(sha256), np.uint8).astype(np.int32)
    told = each(mine)
    others = [i for i, one in enumerate(told) if not np.array_equal(one, told[0])]
    if others:
        raise ValueError(
            f"lopt-train --distributed: the config of process {others[0]} is not that of process 0; valid: the same "
            "command line, and the same files, in all processes."
        )


def part() -> None:
    """Leave the others, once nothing is computed together any more: the first has still to write."""
    import jax

    if several():
        jax.distributed.shutdown()


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Exit at once where a computation fails because another process was lost: JAX's shutdown would wait for it."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not several() or not OTHERS.search(str(e)):
            raise
        print(str(e).splitlines()[0][:300], file=sys.stderr, flush=True)
        os._exit(LOST)


def supervised() -> None:
    """Go on in a child, and wait for it here to say how it ended. Before JAX is imported.

    JAX's runtime aborts the process when another one has been silent for HEARTBEAT seconds while this one waits in an
    all-reduce; nothing in the same process could then say what to do. The child's errors pass through here, since only
    its last words tell that abort from one of its own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    errors, told = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(told, 2)
        os.close(told)
        os.close(errors)
        if sys.platform == "linux":  # whoever kills the parent means the run
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    os.close(told)
    code, words = _passed_on(errors, child)
    if code == LOST or (code == -signal.SIGABRT and OTHERS.search(words)):
        print(
            "error: another process was lost, and this one ends with it; what was saved is safe: start all processes "
            "again with lopt-train resume DIR --distributed ...",
            file=sys.stderr,
        )
        code = LOST
    elif code < 0:
        print(f"error: this process was ended by {signal.Signals(-code).name}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


def _passed_on(errors: int, child: int) -> tuple[int, str]:
    """The child's exit code and the end of what it wrote to the pipe `errors`, all of which goes to our own errors."""
    words, ended = b"", None
    while True:
        ready, _, _ = select.select([errors], [], [], 0.0 if ended else 0.1)
        got = os.read(errors, 1 << 16) if ready else b""
        if got:
            sys.stderr.buffer.write(got)
            sys.stderr.buffer.flush()
            words = (words + got)[-(1 << 16) :]
        elif ended:  # and all that it wrote is read; what it started may still hold the pipe
            return os.waitstatus_to_exitcode(ended[1]), words.decode(errors="replace")
        elif (done := os.waitpid(child, 0 if ready else os.WNOHANG))[0]:
            ended = done
