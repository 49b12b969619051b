"""What a node shows while it runs: a progress bar, a picture now and then, and time to save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
from PIL import Image

PREVIEW, SAVE = 2.0, 30.0
"""Seconds from one picture, and from one file, to the next."""


@dataclass
class Live:
    """A progress bar of ``total``, with a picture at most every two seconds; ends when the user stops the run."""

    total: int = 1000
    began: float = field(default_factory=time.monotonic)
    seen: float = 0.0
    saved: float = field(init=False)
    bar: Any = field(init=False)

    def __post_init__(self):
        self.saved = self.began
        self.bar = comfy.utils.ProgressBar(self.total)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def tick(
        self,
        done: int,
        picture: Callable[[], Image.Image | None] | None = None,
        save: Callable[[], None] | None = None,
    ) -> None:
        """After each visit of the network: the bar at ``done``, and what is due of the others. Raises when the user stops.

        picture: draws what there is to see so far; it is asked only when a picture is due.
        save: called with a picture, if the last file is half a minute old.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if picture is None or now - self.seen < PREVIEW:
            self.bar.update_absolute(done)
            return
        self.seen = now
        drawn = picture()
        self.bar.update_absolute(done, preview=None if drawn is None else ("JPEG", drawn, 640))
        if save is not None and now - self.saved > SAVE:
            self.saved = now
            save()

    def end(self) -> None:
        """The bar is full."""
        self.bar.update_absolute(self.total)
