"""What a shell or container hands to a command, made such that it decides nothing.

It changes this process's environment variables, which processes that it starts inherit, and touches nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OF_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_RANKS_BEGIN = ("LOCAL_", "GROUP_", "ROLE_")  # RANK, WORLD_SIZE, NAME


def in_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode where the locale has another encoding.

    Names of files and classes would be other texts, and so have other digests. What is printed stays in the encoding
    of the terminal, with escapes for what that has not.
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:  # -I ignores variables, so -X says it
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8=1", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Opens the null device in place of standard streams that the caller closed (`>&-`).

    Python has no object for those, and the next file that is opened would get their number: a library that writes to
    the standard output would write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 (for good)


def prepare() -> None:
    """Makes the environment of a command, and of all that it starts, independent of where it was started.

    No file of the working folder stands in for a module of the standard library. What is left of another program's
    ranks makes no rank. A user ID without a name (`docker --user`) gets one, and a home folder to keep caches in.
    """
    import getpass

    from pipestill import launch
    from pipestill.work import runs_root

    os.environ["PYTHONSAFEPATH"] = "1"
    if not launch.is_rank():
        left = [f"{begin}{name}" for begin in OF_RANKS_BEGIN for name in ("RANK", "WORLD_SIZE", "NAME")]
        for name in (*OF_RANKS, *left):
            os.environ.pop(name, None)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
        if not os.access(os.environ.get("HOME", ""), os.W_OK):  # Docker says / for it
            os.environ["HOME"] = str(Path(runs_root(), "home").absolute())
