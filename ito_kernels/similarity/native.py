"""The native module, if it was built, and for this version of the Python code."""

from __future__ import annotations

from importlib.util import find_spec

# What the structures of a call hold: csrc/bindings.cpp has the same number. An older module would
# read them wrongly, as after an update of an editable install that was not built again.
INTERFACE = 3

MISSING = ""  # why there is no native module
try:
    from .. import _native
except ImportError as error:
    _native = None
    MISSING = f"the native module does not load: {error}"
    if find_spec("ito_kernels._native") is None:
        MISSING = "the native module was not built: no C++ compiler was found at installation"
else:
    found = getattr(_native, "interface", 1)
    if found != INTERFACE:
        _native = None
        MISSING = (
            f"the native module was built for other Python code (interface {found}, not"
            f" {INTERFACE}): install the package again"
        )
