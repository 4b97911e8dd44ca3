"""Tables that grow by a few rows at a time."""

import torch
from jaxtyping import Float
from torch import Tensor


class Room:
    """Adds rows behind one table without copying it each time: behind the last row there is room for a quarter more.
    A table is a view of the room; rows behind its end may change."""

    def __init__(self) -> None:
        self._whole = torch.zeros(0)

    def add(self, table: Float[Tensor, "n d"], rows: Float[Tensor, "new d"]) -> Float[Tensor, "n_and_new d"]:
        """`table` with rows behind it. It is copied unless it is the start of what an earlier call returned."""
        whole, total = self._whole, len(table) + len(rows)
        same = (whole.data_ptr(), whole.shape[1:], whole.dtype) == (table.data_ptr(), table.shape[1:], table.dtype)
        if not same or total > len(whole):
            whole = table.new_empty(total + total // 4, *table.shape[1:])  # memory that is not written to is not taken
            whole[: len(table)] = table
            self._whole = whole
        whole[len(table) : total] = rows
        return whole[:total]
