"""Tensors whose memory is a file, for what is larger than the machine's memory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from laserrec.util.io import disk_errors


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor of any content on the CPU, which the operating system keeps in a file in `folder` and reads as needed.

    The file has no name: it is gone when the tensor is, and when the process is killed. Its place on the disk is taken
    at once, since a write that finds the disk full would end the process. Raises UserError where there is too little,
    or the folder can't be written.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size, folder)
            data = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(data).view(dtype).view(*shape)


def _reserve(file: int, size: int, folder: Path) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    if shutil.disk_usage(folder).free < size:  # macOS
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.truncate(file, size)
