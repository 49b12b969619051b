"""The seconds that a network itself takes, pass by pass, whatever is wrapped around it."""

from __future__ import annotations

import time

import torch


class Clock:
    """Times every pass of ``network`` from now on. On CUDA by its own events; on one CPU thread by that thread's CPU seconds,
    which other programs on the machine hardly disturb; else by the wall clock.

    What answers instead of calling the network at all costs nothing here, what answers inside of it costs what it takes.
    """

    def __init__(self, network: torch.nn.Module, forward_key: str):
        self.key = forward_key
        self.passes: list[tuple] = []
        self.rows = self.rows_read = 0
        """Rows that reached the first layer of a UNet: less than were asked for where a cache answers inside of it."""
        self._now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end, with_kwargs=True)
        if hasattr(network, "time_embed"):
            network.time_embed.register_forward_pre_hook(self._row)

    def _mark(self):
        if not torch.cuda.is_available():
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _row(self, module, inputs) -> None:
        self.rows += len(inputs[0])

    def _begin(self, module, inputs) -> None:
        self._began = self._mark()

    def _end(self, module, inputs, options, output) -> None:
        record = options.get("transformer_options", {}).get(self.key)
        self.passes.append((self._began, self._mark(), record))

    def read(self) -> list[tuple[float, float | None]]:
        """Seconds and computed share of every pass since the last reading."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found = []
        for began, ended, record in self.passes:
            seconds = began.elapsed_time(ended) / 1e3 if torch.cuda.is_available() else ended - began
            found.append((seconds, record.share if record is not None else None))
        self.passes, self.rows_read, self.rows = [], self.rows, 0
        return found
