"""The linear multistep predictor-corrector: one engine for DDIM, DPM-Solver++, DEIS, PLMS, UniPC, SA-Solver and their like.

A step from s to t, with the newest predictions m_j at places u_j (u = 0 at s, 1 at t):

    predict   x_t = A x_s + B sum_j w_j m_j + sigma_t sqrt(1 - kappa^2) z,     sum_j w_j u_j^k = M_k
    correct   the same x_s and z, once the network has been asked at the predicted x_t: that answer is one more node, u = 1

A ``Rule`` says what a step does: kernel, number of points of predictor and corrector, kappa, what is done to the moments.
A method is a function from a place in the run to a rule. The corrector costs nothing: its evaluation is the one the next
step needs anyway (the value at the predicted point is kept, "PEC"), or is repeated at the corrected point ("PECE").
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .kernel import Data, Kernel, axpy, begin, fit, framed
from .process import ForwardProcess
from .solver import Problem, Solver, Step
from .weights import weights

Bend = Callable[[list[Any], float], list[Any]]
"""``(M, h) -> M``: the moments a published method really uses; h is the step in lambda plus -log kappa."""


@dataclass(frozen=True)
class Place:
    """Where in the run a step is: from s to t, step ``i`` of ``total``.

    times: when the known predictions were made, newest last; the one at s included.
    mask: ``problem.mask``, for statistics of one sample (``region.py``).
    """

    process: ForwardProcess
    s: float
    t: float
    i: int
    total: int
    times: tuple[float, ...]
    mask: torch.Tensor | None = None

    @property
    def known(self) -> int:
        """How many predictions are known."""
        return len(self.times)

    @property
    def left(self) -> int:
        """Steps still to take, this one included."""
        return self.total - self.i

    @property
    def h(self) -> float:
        """Length in lambda."""
        return self.process.lam(self.t) - self.process.lam(self.s)

    def points(self, wanted: int, lower_order_final: str = "never") -> int:
        """``wanted``, or fewer at the end: ``always``, ``never`` or ``auto`` (runs below 15 steps)."""
        low = lower_order_final == "always" or (lower_order_final == "auto" and self.total < 15)
        return min(wanted, self.left) if low else wanted


@dataclass(frozen=True)
class Rule:
    """One step.

    points: predictions the predictor uses, fewer while fewer are known.
    corrector: predictions the corrector uses, the one at the predicted point included; 0 for none.
    again: whether the corrected point is evaluated once more (one more network call).
    bend: what is done to the exact moments; None for nothing.
    shares: fixed weights relative to M_0, newest last, instead of the exact ones (Adams-Bashforth on equal steps).
    gain: factor on the injected noise; 1 keeps the marginal exact.
    reach: for each power of u, from which predictions its coefficient is taken (1 is the newest one); None: all from all.
    start: the step starts at the start-th latest point instead of the current one, 1.
    correct: the corrector's own points, bend, shares and reach; None: as the predictor, without its shares.
    """

    kernel: Kernel
    points: int = 1
    corrector: int = 0
    again: bool = False
    kappa: float = 1.0
    bend: Bend | None = None
    shares: tuple[float, ...] | None = None
    gain: float = 1.0
    reach: tuple[tuple[int, ...], ...] | None = None
    start: int = 1
    correct: Rule | None = None

    @property
    def correcting(self) -> Rule:
        return self.correct or replace(self, points=self.corrector, shares=None)


@dataclass(frozen=True)
class Node:
    """One past prediction: its time, its value under each kernel key the solver keeps, and, only for solvers that step from
    older points, x, corrected if it was."""

    t: float
    values: dict[str, torch.Tensor]
    x: torch.Tensor | None = None


@dataclass(frozen=True)
class Pending:
    """A predicted step waiting for its correction: ``base`` is A x_s with the noise already in it."""

    rule: Rule
    place: Place
    base: torch.Tensor
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class History:
    """What a multistep method remembers; nodes newest last. ``memory`` belongs to ``Hooks``."""

    total: int
    i: int = 0
    nodes: tuple[Node, ...] = ()
    pending: Pending | None = None
    memory: Any = None


@dataclass(frozen=True)
class Hooks:
    """Where a method may reach into a step. Both get and return the run's ``memory``.

    revise: ``(place, nodes, memory) -> (nodes, memory)``, before the predictor; may replace stored predictions.
    turn: ``(place, p, nodes, memory) -> (p, memory)``; p = sum_j w_j m_j / M_0 is the mean prediction over the step.
    """

    revise: Callable[[Place, tuple[Node, ...], Any], tuple[tuple[Node, ...], Any]] | None = None
    turn: Callable[[Place, torch.Tensor, tuple[Node, ...], Any], tuple[torch.Tensor, Any]] | None = None


class Multistep(Solver):
    """Abstract: a method given by its rules. Members also say in which ``frame`` ("snr" or "vef") they work."""

    calls: ClassVar[int] = 1
    kernels: ClassVar[tuple[Kernel, ...]] = (Data(),)
    """Under which kernels predictions are kept."""
    keeps_points: ClassVar[bool] = False
    """Whether steps may start at older points (``Rule.start``), which then have to be kept."""

    @property
    @abstractmethod
    def span(self) -> int:
        """How many predictions are kept."""

    @property
    @abstractmethod
    def in_frame(self) -> str: ...

    @abstractmethod
    def rule(self, place: Place) -> Rule:
        """How the step at ``place`` is taken."""

    @property
    def hooks(self) -> Hooks:
        return NO_HOOKS

    @property
    def starts_first_order(self) -> bool:
        """Whether the step from a flow model's pure noise is one of first order in x0, and forgotten: next to alpha = 0 noise
        predictions divided by alpha are so large that they cancel badly."""
        return any(kernel.key != Data.key for kernel in self.kernels)

    def start(self, times: Sequence[float]) -> History:
        return History(len(times) - 1)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History) -> Step:
        return self.advance(problem, x, s, t, state, self.hooks)

    def advance(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History, hooks: Hooks) -> Step:
        """``step`` with hooks of a wrapper's own."""
        process = framed(problem.process, self.in_frame)
        x0 = problem.denoise(x, s)
        if t > 0.0 and process.alpha(s) == 0.0 and self.starts_first_order:
            A, B = Data().line(process, s, t, 1.0)
            return Step(axpy(x * A, x0, B), x0, replace(state, i=state.i + 1))
        x, s = begin(process, x, s, t, x0)
        nodes = (*state.nodes, self._node(process, x, x0, s))
        if state.pending is not None and (t > 0.0 or state.pending.rule.again):
            x = correct(process, state.pending, nodes[-1])
            if self.keeps_points:
                nodes = (*nodes[:-1], replace(nodes[-1], x=x))
            if state.pending.rule.again:
                x0 = problem.denoise(x, s)
                nodes = (*nodes[:-1], self._node(process, x, x0, s))
        if t == 0.0:  # lambda = +inf: the integral is the prediction itself, no noise is left
            return Step(x0, x0, replace(state, i=state.i + 1, pending=None))

        place = Place(process, s, t, state.i, state.total, tuple(node.t for node in nodes), problem.mask)
        memory = state.memory
        if hooks.revise is not None:
            nodes, memory = hooks.revise(place, nodes, memory)
        rule = self.rule(place)
        if rule.start > 1:
            place, x = replace(place, s=nodes[-rule.start].t), nodes[-rule.start].x
            assert x is not None  # keeps_points
        base, B = _base(problem, rule, place, x)
        w, known = weigh(rule, place, [node.t for node in nodes])
        used, pending = nodes[-len(w) :], None
        if rule.corrector:
            pending = Pending(rule, place, base, nodes[-self.span :])
            base = base.clone()
        base = _shift(base, B, known)
        if hooks.turn is None:
            x = _add(base, B, w, used, rule.kernel.key)
        else:
            M0 = sum(w)
            newest = used[-1].values[rule.kernel.key]
            p = _add(newest * fit(w[-1] / M0, newest), 1.0 / M0, w[:-1], used[:-1], rule.kernel.key)
            p, memory = hooks.turn(place, p, nodes, memory)
            x = axpy(base, p, B * M0)
        return Step(x, x0, History(state.total, state.i + 1, nodes[-self.span :], pending, memory))

    def _node(self, process: ForwardProcess, x: torch.Tensor, x0: torch.Tensor, t: float) -> Node:
        values = {kernel.key: kernel.read(process, x, x0, t) for kernel in self.kernels}
        return Node(t, values, x if self.keeps_points else None)


NO_HOOKS = Hooks()


def nearest(start: int, points: Sequence[int], new: bool = False) -> tuple[tuple[int, ...], ...]:
    """``Rule.reach`` by a number of predictions for each power of u: that at the start, those after it, those before.

    new: the newest comes right after the start's, for correctors.
    """
    after = (1, *range(start - 1, 1, -1)) if new else tuple(range(start - 1, 0, -1))
    line = (start, *after, *range(start + 1, max(points) + 1))
    return tuple(line[:n] for n in points)


def correct(process: ForwardProcess, pending: Pending, new: Node) -> torch.Tensor:
    """The corrected x at ``new.t``."""
    rule, place = pending.rule.correcting, pending.place
    nodes = (*pending.nodes, new)
    w, known = weigh(rule, place, [node.t for node in nodes])
    B = rule.kernel.line(process, place.s, place.t, rule.kappa)[1]
    return _add(_shift(pending.base.clone(), B, known), B, w, nodes[-len(w) :], rule.kernel.key)


def _shift(x: torch.Tensor, B: Any, known: Any) -> torch.Tensor:
    """``x + B known`` into x."""
    return x if isinstance(known, float) and known == 0.0 else x.add_(fit(B * known, x))


def _add(x: torch.Tensor, B: Any, w: Sequence[Any], nodes: Sequence[Node], key: str) -> torch.Tensor:
    """``x + B sum_j w_j m_j`` into x."""
    for node, weight in zip(nodes, w, strict=True):
        x = axpy(x, node.values[key], B * weight)
    return x


def _base(problem: Problem, rule: Rule, place: Place, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A x_s with the injected noise, and B."""
    process = place.process
    A, B = rule.kernel.line(process, place.s, place.t, rule.kappa)
    base = x * fit(A, x)
    gain = process.sigma(place.t) * math.sqrt(1.0 - rule.kappa**2) * rule.gain * process.noise_scale
    return (base.add_(problem.noise(place.s, place.t), alpha=gain) if gain > 0.0 else base), B


def weigh(rule: Rule, place: Place, times: Sequence[float]) -> tuple[list[Any], Any]:
    """Weights of the predictions made at the newest of ``times``, newest last, and what is added to their sum."""
    process, kernel = place.process, rule.kernel
    start = kernel.place(process, place.s)
    length = kernel.place(process, place.t) - start
    used = list(times[-rule.points :])
    reach = rule.reach and [[len(used) - r for r in row if r <= len(used)] for row in rule.reach]
    M = kernel.moments(process, place.s, place.t, len(reach or used), rule.kappa)
    if rule.shares is not None:
        w = [M[0] * share for share in rule.shares[-len(used) :]]
    else:
        if rule.bend is not None:
            M = rule.bend(M, place.h - math.log(rule.kappa))
        w = weights([(kernel.place(process, t) - start) / length for t in used], M, reach)
    return kernel.anchor(process, place.s, place.t, used, w)
