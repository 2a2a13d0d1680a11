"""The native module `_native`, or None and the reason in `MISSING`."""

from __future__ import annotations

from importlib.util import find_spec

# The version of the structs that are passed to the module. csrc/bindings.cpp has the same number.
# A module of another version, for example after an update of an editable install without a new
# build, would misread them.
INTERFACE = 8

MISSING = ""
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
