"""ITO: several views and captions of an item aligned, and fused, during training only."""

from ito.starting import leave_on_interrupt

__all__ = ["load"]

leave_on_interrupt()


def load(run, device="cpu"):
    """The exported model of a run folder, with `encode_image` and `encode_text`.

    See `ito.model.exported.Encoder`. Raises FileNotFoundError if the run has exported none yet.
    """
    # not above: processes that draw or decode pictures import `ito` too, and need no model
    from ito.model.exported import load

    return load(run, device)
