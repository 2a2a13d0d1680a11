"""A list of pairs, looked up one panel (block of rows) of the score matrix at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class ListedPairs:
    """P pairs (row, column) of an N × M matrix. A pair may be listed several times.

    Memory: that of the list, which is copied if it is not sorted by row.

    Raises TypeError or ValueError that names the list if `rows` and `columns` are not 1-D integers
    of the same length or out of range.
    """

    def __init__(self, name: str, rows: Tensor, columns: Tensor, shape: tuple[int, int]):
        rows, columns = (
            _check_numbers(f"{name}[{i}]", x, size)
            for i, (x, size) in enumerate(zip((rows, columns), shape, strict=True))
        )
        if len(rows) != len(columns):
            raise ValueError(
                f"{name} must hold as many anchors as others, got {len(rows)} and {len(columns)}"
            )
        if (rows[1:] < rows[:-1]).any():
            rows, order = rows.sort(stable=True)
            columns = columns[order]
        self.rows, self.columns = rows, columns
        # the pairs of row i are starts[i]:starts[i + 1]
        boundaries = torch.arange(shape[0] + 1, device=rows.device)
        self.starts = torch.searchsorted(rows, boundaries).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self, rows: Tensor, panel: Tensor) -> Tensor:
        """The indices of the listed pairs in a flattened panel. rows: its row numbers."""
        first = int(rows[0])
        pairs = slice(self.starts[first], self.starts[first + len(rows)])
        return (self.rows[pairs] - first) * panel.shape[1] + self.columns[pairs]

    def counts(self, rows: Tensor, panel: Tensor) -> Tensor:
        """How often each pair of a panel is listed, in the shape and dtype of `panel`."""
        positions = self.positions(rows, panel)
        counts = torch.zeros(panel.numel(), dtype=panel.dtype, device=panel.device)
        return counts.scatter_add_(0, positions, counts.new_ones(len(positions))).view(panel.shape)


def _check_numbers(name: str, x: object, size: int) -> Tensor:
    """Row or column numbers as int64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(x).__name__}")
    if x.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {tuple(x.shape)}")
    if not len(x):
        return x.long()  # empty lists may have any dtype
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got {x.dtype}")
    low, high = x.aminmax()
    if low < 0 or high >= size:
        raise ValueError(f"{name} must hold numbers from 0 to {size - 1}, got {low} to {high}")
    return x.long()
