"""Empirical model statistics: what DPM-Solver-v3 knows of a network beforehand, and the integrals its steps take of it.

At each lambda, over noisy samples x of the data, with eps = (x - alpha D) / sigma and f = (sigma eps - l x) / alpha:

    l = E[sigma d eps / d x]  (its diagonal),      (s, b) = least squares of   df/dlambda = s f + b   along the ODE

element by element, per channel, or one number for all. l = 1, s = b = 0 is data prediction, l = b = 0, s = -1 noise
prediction: the statistics choose between the two, and beyond, by what the network does.

Source: Zheng et al. (2023), arXiv:2310.13268, section 3.
"""

# ruff: noqa: E741 - l is the paper's letter

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from .artifact import Artifact
from .weights import lagrange

KIND = "model_statistics"
"""Of the artifact whose tensors these are."""


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b on a grid of lambda, each of shape (n, *element); float64 on the CPU.

    lam: (n,), increasing, n >= 2. Between its nodes l, s, b are monotone cubics, beyond them constant.
    element: () for one number, (C, 1, 1) per channel, or the latent's (C, H, W): what broadcasts against a sample. l and s may
        be numbers whatever b is.
    mean: mean of the data the statistics are from, of the shape of an element; None if it is not known.
    source: the file they come from, if they do, which says what they were measured on.
    """

    lam: torch.Tensor
    l: torch.Tensor
    s: torch.Tensor
    b: torch.Tensor
    mean: torch.Tensor | None = None
    source: Artifact | None = None

    def __post_init__(self):
        for name in ("lam", "l", "s", "b", *(("mean",) if self.mean is not None else ())):
            value = torch.as_tensor(getattr(self, name)).to("cpu", torch.float64)
            if not value.isfinite().all():
                raise ValueError(f"Model statistics: {name} has values that are not finite numbers.")
            object.__setattr__(self, name, value)
        if self.lam.ndim != 1 or len(self.lam) < 2 or not (self.lam.diff() > 0.0).all():
            raise ValueError("Model statistics: lam must be a list of at least two increasing numbers.")
        if (
            self.l.shape != self.s.shape
            or self.l.shape not in (self.lam.shape, self.b.shape)
            or len(self.b) != len(self.lam)
        ):
            raise ValueError(
                f"Model statistics: l, s and b must have one entry for each of the {len(self.lam)} values of lam, but have "
                f"the shapes {tuple(self.l.shape)}, {tuple(self.s.shape)} and {tuple(self.b.shape)}."
            )

    def __str__(self) -> str:
        return f"{len(self.lam)} nodes of {'x'.join(map(str, self.b.shape[1:])) or 'scalars'}"

    def check(self, x: torch.Tensor) -> None:
        """Raise ``ValueError`` unless these are statistics of samples like the rows of x."""
        element, sample = tuple(self.b.shape[1:]), tuple(x.shape[1:])
        if len(element) not in (0, len(sample)) or any(e not in (1, n) for e, n in zip(element, sample, strict=False)):
            raise ValueError(
                f"The model statistics are for latents of shape {element}, but this latent has the shape {sample}; measure "
                "them for this model and size, or use statistics per channel."
            )

    def at(self, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """l, s, b at the m values of lam, each of its shape (m, *element)."""
        grid = self.lam.numpy()
        at = np.clip(lam, grid[0], grid[-1])
        # Slopes at a node depend on its neighbours alone, so these few nodes give what all would.
        some = slice(max(0, np.searchsorted(grid, at.min()) - 3), np.searchsorted(grid, at.max()) + 3)
        l, s, b = (PchipInterpolator(grid[some], v.numpy()[some])(at) for v in (self.l, self.s, self.b))
        return l, s, b

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of the kind ``KIND`` holds."""
        held = {"lam": self.lam, "l": self.l, "s": self.s, "b": self.b, "mean": self.mean}
        return {name: value for name, value in held.items() if value is not None}

    @classmethod
    def of(cls, artifact: Artifact) -> ModelStatistics:
        """What an artifact with such tensors holds."""
        tensors = artifact.tensors
        missing = [name for name in ("lam", "l", "s", "b") if name not in tensors]
        if missing:
            raise ValueError(f"This is no file of model statistics: it has no {', '.join(missing)}.")
        return cls(tensors["lam"], tensors["l"], tensors["s"], tensors["b"], tensors.get("mean"), artifact)

    @classmethod
    def constant(cls, l: float, s: float, b: float) -> ModelStatistics:
        """The same at every lambda."""
        return cls(torch.tensor([-1.0, 1.0]), torch.tensor([l, l]), torch.tensor([s, s]), torch.tensor([b, b]))


DATA_PREDICTION = ModelStatistics.constant(1.0, 0.0, 0.0)
NOISE_PREDICTION = ModelStatistics.constant(0.0, -1.0, 0.0)

_WIDEST = 0.5
"""Panels of the quadrature are no wider in lambda; they also end at every node of the statistics, where these bend."""

_MOMENTS = 7
"""As many as a step can ask for: the most points it uses."""

_X, _W = (v / 2.0 for v in np.polynomial.legendre.leggauss(6))
_X = _X + 0.5
_RUNNING = np.array([[c / (k + 1) for k, c in enumerate(lagrange(_X.tolist(), j, range(6)))] for j in range(6)])
_RUNNING = np.stack([_RUNNING @ x ** np.arange(1, 7) for x in _X])
"""int_0^{x_i} of the polynomial that is 1 at x_j: integrals up to each node of a panel."""


@dataclass(frozen=True)
class Integrals:
    """From one lambda to a larger one: e^{-L}, e^{-S} and q at its end, moments of e^{L+S}, and int e^L q."""

    decay: Any
    shrink: Any
    q: Any
    M: tuple[Any, ...]
    known: Any


_KEPT: WeakKeyDictionary[ModelStatistics, dict[tuple[float, float], Integrals]] = WeakKeyDictionary()
"""A step asks for its integrals several times; they are kept for the newest steps, as long as their statistics live."""


def integrals(statistics: ModelStatistics, a: float, b: float) -> Integrals:
    """Over lambda from a to b > a. Numbers where the statistics are numbers, else tensors of an element; q and ``known`` are as b
    is, the others as l and s."""
    kept = _KEPT.setdefault(statistics, {})
    if (a, b) not in kept:
        while len(kept) > 1:
            del kept[next(iter(kept))]
        kept[a, b] = _integrated(statistics, a, b)
    return kept[a, b]


def _integrated(statistics: ModelStatistics, a: float, b: float) -> Integrals:
    grid = statistics.lam.numpy()
    even = np.linspace(a, b, 2 + int((b - a) / _WIDEST))
    cuts = np.unique(np.concatenate([even, grid[(grid > a) & (grid < b)]]))
    width = np.diff(cuts)[:, None]
    nodes = cuts[:-1, None] + width * _X
    u = (nodes - a) / (b - a)
    # From here on all have the shape (panels, nodes, elements), with one element where they are numbers.
    l, s, drift = (v.reshape(*nodes.shape, -1) for v in statistics.at(nodes.ravel()))

    def total(f: np.ndarray, m: int = 0) -> np.ndarray:
        """int f u^m."""
        return (width * _W * u**m).ravel() @ f.reshape(-1, f.shape[-1])

    def running(f: np.ndarray) -> np.ndarray:
        """The integral up to each node."""
        panels = width * (_W @ f)
        return (np.cumsum(panels, axis=0) - panels)[:, None] + width[:, None] * (_RUNNING @ f)

    grown, shrunk = np.exp(running(l)), np.exp(-running(s))

    def shaped(end: np.ndarray, like: torch.Tensor) -> Any:
        return coefficient(end.reshape(like.shape[1:]))

    l_, b_ = statistics.l, statistics.b
    return Integrals(
        decay=shaped(np.exp(-total(l)), l_),
        shrink=shaped(np.exp(-total(s)), l_),
        q=shaped(np.exp(total(s)) * total(shrunk * drift), b_),
        M=tuple(shaped(total(grown / shrunk, m), l_) for m in range(_MOMENTS)),
        known=shaped(total(grown * running(shrunk * drift) / shrunk), b_),
    )


def coefficient(value: np.ndarray) -> Any:
    """As coefficients of a step are: a number, or a tensor that broadcasts against a sample."""
    return float(value) if np.ndim(value) == 0 else torch.from_numpy(value)
