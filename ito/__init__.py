"""ITO: several views and captions of an item aligned, and fused, during training only."""

import os
import signal
import sys

__all__ = ["load"]


def leave(number, _):
    """Ends the process as Ctrl-C ends a command, without a traceback of the imports."""
    os._exit(128 + number)


# `python -m ito.…`: the imports take seconds; `ito.cli` sets the usual handler after them.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


def load(run, device="cpu"):
    """The exported model of a run folder, with `encode_image` and `encode_text`.

    See `ito.model.exported.Encoder`. Raises FileNotFoundError if the run has exported none yet.
    """
    # not above: processes that draw or decode pictures import `ito` too, and need no model
    from ito.model.exported import load

    return load(run, device)
