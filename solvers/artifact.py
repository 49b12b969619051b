"""Artifacts: what a search or a calibration found, in a file, and what it was found for.

A small table is a JSON file, tensors are a safetensors file; neither can run code when it is read. Both hold the same head:

    {"quickstep": 1, "kind": "...", "found_for": {...}, "table": {...}}

as the whole of a ``.json`` file, or as text under the key "quickstep" of a ``.safetensors`` file's metadata. ``kind`` says how
to read table and tensors, and belongs to the method that uses them. ``found_for`` is the provenance; what is not known, or
does not matter to what was found, is null there.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .method import Method, params, parts
from .process import ForwardProcess

FORMAT = 1
KEY = "quickstep"


@dataclass(frozen=True)
class FoundFor:
    """Provenance: under which conditions something was found, and how much it helped there.

    model: fingerprint of the network, from whoever has it. process: "ve" or "flow". solver, settings: id and parameters of
    the sampler it is used with. steps, cfg: of the runs. shape: of one latent, without the batch. seed: of the search.
    version: Quickstep's. created: ISO 8601. loss_before, loss_after: of the sampler as it was and with what was found, on
    samples kept aside.
    """

    model: str | None = None
    process: str | None = None
    solver: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    cfg: float | None = None
    shape: tuple[int, ...] | None = None
    seed: int | None = None
    version: str | None = None
    created: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None

    def __post_init__(self):
        for kind, names in _TYPES:
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, bool) or (value is not None and not isinstance(value, kind)):
                    raise ValueError(f"{name!r} of the provenance cannot be {value!r}.")
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))


_TYPES = (
    (str, "model process solver version created"),
    (int, "steps seed"),
    ((int, float), "cfg loss_before loss_after"),
    ((tuple, list), "shape"),
    (dict, "settings"),
)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What was found: a ``table`` of JSON values, and ``tensors`` by name."""

    kind: str
    table: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    found_for: FoundFor = field(default_factory=FoundFor)

    def __str__(self) -> str:
        f = self.found_for
        known = (f.solver, f.steps and f"{f.steps} steps", f.cfg is not None and f"CFG {f.cfg:g}")
        return ", ".join([self.kind, *(str(part) for part in known if part)])


def now() -> str:
    """The time to write into ``FoundFor.created``."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def process_name(process: ForwardProcess) -> str:
    """What kind it is: "flow" where noise takes the place of the signal, "ve" where it is added to it."""
    return "flow" if process.alpha(process.t_max) < 1.0 else "ve"


def settings_of(method: Method) -> dict[str, Any]:
    """All declared parameters of a method, and those of the methods it is made of, as JSON values."""
    own = {declared.name: getattr(method, declared.name) for declared in params(type(method))}
    inner = {declared.name: getattr(method, declared.name) for declared in parts(type(method))}
    return own | {n: {"id": m.id, **settings_of(m)} for n, m in inner.items() if isinstance(m, Method)}


def mismatches(
    artifact: Artifact,
    process: ForwardProcess | None = None,
    model: str | None = None,
    solver: Method | None = None,
    steps: int | None = None,
    cfg: float | None = None,
    shape: tuple[int, ...] | None = None,
) -> list[str]:
    """One sentence for each condition that is not the one the artifact was found for; both have to be known."""
    then = artifact.found_for
    kinds = {"ve": "a variance-exploding model (EPS, V, EDM)", "flow": "a flow model"}
    found: list[str] = []

    def compare(what: str, was: Any, here: Any) -> None:
        both = isinstance(was, float) and isinstance(here, float)
        same = math.isclose(was, here, rel_tol=1e-6) if both else was == here
        if was is not None and here is not None and not same:
            found.append(f"It was found for {what.format(was)}, and this is {what.format(here)}.")

    if process is not None and then.process is not None:
        compare("{}", kinds.get(then.process, then.process), kinds[process_name(process)])
    compare("the model {}", then.model, model)
    if solver is not None and then.solver is not None:
        compare("the sampler {}", then.solver, solver.id)
        if then.solver == solver.id:
            current = settings_of(solver)
            for name, value in then.settings.items():
                compare(f"{name} = {{}}", value, current.get(name))
    compare("{} steps", then.steps, steps)
    compare("CFG {:g}", *(None if value is None else float(value) for value in (then.cfg, cfg)))
    compare("latents of shape {}", then.shape, None if shape is None else tuple(shape))
    return found


def save(path: str | os.PathLike, artifact: Artifact, overwrite: bool = False) -> None:
    """Write the file whole or not at all: ``.json`` without tensors, ``.safetensors`` with.

    Raises ValueError for another name or a value that no file can hold, FileExistsError rather than overwrite.
    """
    path = Path(path)
    suffix = ".safetensors" if artifact.tensors else ".json"
    if path.suffix != suffix:
        held = "tensors" if artifact.tensors else "a table"
        raise ValueError(f"{path.name}: an artifact with {held} needs a name that ends in {suffix}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name.")
    head = {KEY: FORMAT, "kind": artifact.kind, "found_for": asdict(artifact.found_for), "table": artifact.table}
    try:
        text = json.dumps(head, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: the table or its provenance cannot be written as JSON ({error}).") from None
    _check(path, head, artifact.tensors)

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(_packed(text, artifact.tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike, kind: str | None = None) -> Artifact:
    """Read a file that ``save`` wrote, of that ``kind`` if one is given; tensors on the CPU.

    Raises ValueError with one sentence that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{path}: an artifact's name ends in .json or .safetensors.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    text, tensors = (raw, {}) if path.suffix == ".json" else _unpacked(path, raw)
    try:
        head = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds no valid JSON ({error}).") from None
    _check(path, head, tensors)
    if kind is not None and head["kind"] != kind:
        raise ValueError(f"{path} holds {head['kind']}, but {kind} is needed here.")
    known = {f.name for f in fields(FoundFor)}  # others may be added without a new format
    try:
        found_for = FoundFor(**{name: value for name, value in head["found_for"].items() if name in known})
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return Artifact(head["kind"], head["table"], tensors, found_for)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def _packed(text: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    if not tensors:
        return text.encode()
    from safetensors.torch import save as pack

    return pack({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, {KEY: text})


def _unpacked(path: Path, raw: bytes) -> tuple[str, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as unpack

    try:
        tensors = unpack(raw)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: it is no valid safetensors file ({error}).") from None
    # A valid file begins with the length of its header, then the header itself.
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    if KEY not in header.get("__metadata__", {}):
        raise ValueError(f"{path} is no Quickstep artifact: it has no {KEY!r} entry.")
    return header["__metadata__"][KEY], tensors


def _check(path: Path, head: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` unless the head has the parts it must have, with values of the right type."""
    if not isinstance(head, dict) or not isinstance(head.get(KEY), int):
        raise ValueError(f"{path} is no Quickstep artifact: it has no {KEY!r} entry.")
    if head[KEY] > FORMAT:
        raise ValueError(f"{path} was written by a newer Quickstep (format {head[KEY]}, this one reads {FORMAT}).")
    for name, kind in (("kind", str), ("found_for", dict), ("table", dict)):
        if not isinstance(head.get(name), kind) or (kind is str and not head[name]):
            raise ValueError(f"{path} is damaged: {name!r} is missing or of the wrong type.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.double().isfinite().all()):
            raise ValueError(f"{path}: the tensor {name!r} holds values that are no finite numbers.")
