"""ITO: several views and captions of an item aligned, and fused, during training only."""

__all__ = ["load"]


def load(run, device="cpu"):
    """The exported model of a run folder, with `encode_image` and `encode_text`.

    See `ito.export.Encoder`. Raises FileNotFoundError if the run has exported none yet.
    """
    # Imported here so that `python -m ito.export` does not find itself imported already.
    from ito.export import load

    return load(run, device)
