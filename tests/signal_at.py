"""Runs `pipestill` and sends it a signal at one call of a function: `signal_at.py FUNCTION CALL SIGNAL COMMAND...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

SENT = "the signal is sent at "  # what it prints before, with the monotonic clock's seconds
AGAIN = "called after the signal"  # what it prints at each later call


def signal_at(name: str, call: int, number: int) -> None:
    """Lets the `call`-th call of `name`, a function in a module or a method of a class there, begin with a signal.

    In a process that is forked later, the signal goes to this one, and the call never ends.
    """
    main = os.getpid()
    parts = name.split(".")
    while True:
        try:
            holder: Any = importlib.import_module(".".join(parts[:-1]))
            break
        except ModuleNotFoundError:
            *before, owner, last = parts
            holder = getattr(importlib.import_module(".".join(before)), owner)
            parts = [*before, last]
            break
    function: Callable[..., Any] = getattr(holder, parts[-1])
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call and os.getpid() == main:
            print(f"{AGAIN}: {name}", file=sys.stderr, flush=True)
        if calls == call:
            print(f"{SENT}{time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(main, number)
            if os.getpid() != main:
                signal.pause()
        return function(*arguments, **named)

    setattr(holder, parts[-1], counted)


if __name__ == "__main__":
    from pipestill import cli

    signal_at(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.argv[1:] = sys.argv[4:]
    sys.exit(cli.main())
