"""The machine that numbers were measured on, kept beside them."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def describe() -> dict[str, Any]:
    """Processor, cores, versions."""
    flags, model = set(), platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        model, flags = facts.get("model name", model), set(facts.get("flags", "").split())
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "instructions": [f for f in _FLAGS if f in flags], "python": platform.python_version(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
