"""Many latents, in memory or, where they are large, in a safetensors file that is read piece by piece."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch

LIMIT = 2**30
"""Bytes above which they go to a file."""


class States:
    """float32 latents by (level, sample). ``nbytes`` is known before anything is stored.

    folder: where the file goes if it is needed; it is deleted with this object. It is a valid safetensors file with one tensor,
    "states", of shape (levels, samples, *shape). files: how many of this size there are still going to be, this one included.

    Raises ValueError where the disk has no room for them.
    """

    def __init__(
        self, levels: int, samples: int, shape: Sequence[int], folder: str | os.PathLike, limit: int = LIMIT, files: int = 1
    ):  # fmt: skip
        self.shape = (levels, samples, *shape)
        self.file: Path | None = None
        if self.nbytes <= limit:
            self._data = np.zeros(self.shape, np.float32)
            return
        head = json.dumps({"states": {"dtype": "F32", "shape": self.shape, "data_offsets": [0, self.nbytes]}}).encode()
        head += b" " * (-len(head) % 8)
        Path(folder).mkdir(parents=True, exist_ok=True)
        free, wanted = shutil.disk_usage(folder).free, files * self.nbytes
        if wanted > free:
            raise ValueError(
                f"The teacher's states take {wanted / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free: use fewer samples or "
                "smaller latents."
            )
        self.file = Path(folder) / f"quickstep-teacher-{uuid.uuid4().hex}.safetensors"
        with self.file.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + self.nbytes)
        self._data = np.memmap(self.file, np.float32, "r+", 8 + len(head), self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)

    def put(self, level: int, sample: int, latents: torch.Tensor) -> None:
        """Some latents, from that sample on."""
        self._data[level, sample : sample + len(latents)] = latents.detach().float().cpu().numpy()

    def get(self, level: int, sample: int, count: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._data[level, sample : sample + count]))

    def close(self) -> None:
        """Forget them."""
        del self._data
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self.file = None
