"""What a user's code raised, in one line that says where."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

OURS = Path(__file__).parent


def said(error: Exception) -> str:
    """Kind, words and place of an error, in one line."""
    words = " ".join(str(error).split())
    cut = f"{words[:240]} …" if len(words) > 240 else words
    return f"{type(error).__name__}: {cut}{place(error)}"


def place(error: BaseException) -> str:
    """Where an error was raised, of the frames of files that are neither installed nor ours the last: " (file:line)".

    Empty if there is none.
    """
    others = {OURS, Path(sysconfig.get_path("stdlib"))}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if path.is_file() and not installed and not others & set(path.parents):
            return f" ({path.name}:{frame.lineno})"
    return ""


def is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package, which says what is wrong by itself."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and OURS in Path(frames[-1].filename).parents
