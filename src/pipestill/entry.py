"""Where the command begins: it hears stop signals before anything else is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process as a stage does that was asked to stop, while there is nothing yet to stop."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a rank's launcher says why it ends its ranks
        os.write(2, f"pipestill: stopped by {signal.Signals(number).name}: start it again\n".encode())
    if "PIPESTILL_STOPPED" in os.environ:
        os.close(os.open(os.environ["PIPESTILL_STOPPED"], os.O_CREAT | os.O_WRONLY, 0o666))
    os._exit(75)


def main() -> int:
    """`pipestill`, from its first moment."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    from pipestill import cli

    return cli.main()
