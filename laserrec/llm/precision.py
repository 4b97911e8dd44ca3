"""bf16 or fp32: the faster of the two on the device that computes."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch

from laserrec.config import Precision
from laserrec.util.device import CPU

log = logging.getLogger(__name__)


def resolve_precision(precision: Precision, device: torch.device = CPU) -> Precision:
    """auto -> the faster of bf16 and fp32 on `device`, measured once per process."""
    return _measured(device) if precision == Precision.AUTO else precision


@cache
def _measured(device: torch.device) -> Precision:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision.FP32
    seconds = {p: _product_seconds(d, device) for p, d in
               ((Precision.BF16, torch.bfloat16), (Precision.FP32, torch.float32))}
    # 1.2: bf16 must pay for its rounding clearly, and a noisy tie should not flip between runs.
    chosen = Precision.BF16 if seconds[Precision.BF16] * 1.2 < seconds[Precision.FP32] else Precision.FP32
    log.info("precision probe on %s: bf16 %.2f ms, fp32 %.2f ms -> %s", device,
             1e3 * seconds[Precision.BF16], 1e3 * seconds[Precision.FP32], chosen)
    return chosen


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Fastest of several products of the default backbone's MLP size; on a GPU of eight times as many tokens, since a
    smaller product would measure little but its launch."""
    tokens = 1024 if device.type == "cpu" else 8192
    a, b = torch.ones(tokens, 576, dtype=dtype, device=device), torch.ones(1536, 576, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        _wait(device)
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
