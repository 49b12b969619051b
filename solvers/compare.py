"""How far samples are from a reference, and how a reference is known to be good."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median

import torch


def rms_per_sample(x: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Root mean square difference of each batch row, over all other dimensions; raises ValueError on other shapes."""
    if x.shape != reference.shape:
        raise ValueError(f"samples of shape {tuple(x.shape)} cannot be compared with {tuple(reference.shape)}.")
    return (x.double() - reference.double()).flatten(1).square().mean(1).sqrt().tolist()


@dataclass(frozen=True)
class Row:
    """One line of a comparison: what was run, what it cost, how far it ended from the reference."""

    label: str
    calls: int
    work: float | None
    seconds: float
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.errors)

    @property
    def median(self) -> float:
        return median(self.errors)

    @property
    def paid(self) -> float:
        """Calls, each weighted with the share of the network that was computed."""
        return self.calls * (1.0 if self.work is None else self.work)


COLUMNS = ("candidate", "calls", "network work", "seconds", "error (mean)", "error (median)")


def markdown(rows: list[Row]) -> str:
    """The comparison as a table; errors are per-sample RMS distances to the reference, "-" for the reference itself."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in rows:
        work = "unknown" if row.work is None else f"{100 * row.work:.0f} %"
        errors = (f"{row.mean:.4f}", f"{row.median:.4f}") if row.errors else ("-", "-")
        lines.append("| " + " | ".join((row.label, str(row.calls), work, f"{row.seconds:.2f}", *errors)) + " |")
    return "\n".join(lines)
