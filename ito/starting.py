"""Ctrl-C while `python -m ito.…` imports its packages, which takes seconds."""

import os
import signal
import sys


def leave(number, _) -> None:
    """End the process with the status of Ctrl-C, without a traceback of the imports."""
    os._exit(128 + number)


def leave_on_interrupt() -> None:
    """For a command only: whoever imports `ito` as a library keeps its handler."""
    # Python looks for the module of `-m` after it has imported the package.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if sys.argv[:1] == ["-m"] and usual:
        signal.signal(signal.SIGINT, leave)


def interrupt_as_usual() -> None:
    """Ctrl-C raises KeyboardInterrupt again, now that the command can report it."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
