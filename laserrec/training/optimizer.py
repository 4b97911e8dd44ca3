"""AdamW for models with large tables, of which a step touches a few rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdamW(torch.optim.AdamW):
    """AdamW. Of a parameter with a sparse gradient (`nn.Embedding` with `sparse`) only the rows in the gradient change,
    so that a step costs the same however large the table is.

    This is the lazy form of Adam, as in `torch.optim.SparseAdam`, with two differences. The moments of a row are
    corrected for its own number of steps, since a row that is rarely met would start with steps that are far too long
    otherwise. And a row that is met again first gets the weight decay of the steps since, so that rare rows decay as
    much as in AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step with the present gradients."""
        tables = [(p, p.grad.coalesce(), group) for group in self.param_groups for p in group["params"]
                  if p.grad is not None and p.grad.is_sparse]
        for table, _, _ in tables:
            table.grad = None  # AdamW refuses it
        out = super().step(closure)
        for table, gradient, group in tables:
            self._step_rows(table, gradient, group)
            table.grad = gradient
        return out

    def _step_rows(self, table: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"], state["met"] = torch.zeros(2, len(table), device=table.device)  # own steps, and its last one
            state["steps"] = torch.zeros((), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] = state["step"].to(table.device)  # torch leaves it on the CPU when a state is loaded
        state["steps"] += 1
        rows, values, (first, second) = gradient.indices()[0], gradient.values(), group["betas"]
        steps = state["step"][rows] + 1
        decay = (1 - group["lr"] * group["weight_decay"]) ** (state["steps"] - state["met"][rows])
        mean = state["exp_avg"][rows].lerp_(values, 1 - first)
        square = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
        state["step"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = steps, mean, square
        state["met"][rows] = state["steps"]
        rate = group["lr"] / (1 - first ** steps[:, None])
        length = (square / (1 - second ** steps[:, None])).sqrt_().add_(group["eps"])
        table[rows] = table[rows] * decay[:, None] - rate * mean / length


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """The norm of all gradients together; if it is above the limit, they are scaled down to it."""
    return torch.nn.utils.clip_grad_norm_([_with_dense_gradient(p) for p in parameters], limit or math.inf)


def _with_dense_gradient(parameter: Tensor) -> Tensor:
    """The parameter, or where its gradient is sparse a stand-in for the rows that have one; the values are shared."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()
    values = parameter.grad.values()
    rows = torch.empty_like(values)
    rows.grad = values
    return rows
