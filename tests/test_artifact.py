"""Artifacts: what is written is what is read, whole or not at all, and whatever is wrong is said in one sentence."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from quickstep_under_test.solvers.artifact import (
    Artifact,
    FoundFor,
    load,
    mismatches,
    now,
    process_name,
    save,
    settings_of,
)
from quickstep_under_test.solvers.dc_solver import DCSolver
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE

FOUND_FOR = FoundFor(
    model="b3:0123",
    process="ve",
    solver="UniPC",
    settings=settings_of(UniPC(order=3)),
    steps=8,
    cfg=7.5,
    shape=(4, 64, 64),
    seed=2**40,
    version="0.1.0",
    created=now(),
    loss_before=0.1,
    loss_after=0.05,
)
TABLE = Artifact("dc_ratios", {"ratios": [1.0, 1.0, 0.1 + 0.2], "note": "é"}, found_for=FOUND_FOR)
TENSORS = Artifact(
    "ems",
    {"levels": 3},
    {"l": torch.linspace(0, 1, 7, dtype=torch.float64)[::2], "steps": torch.arange(3), "half": torch.ones(2).half()},
    FOUND_FOR,
)


@pytest.mark.parametrize(("name", "made"), [("a.json", TABLE), ("a.safetensors", TENSORS)])
def test_round_trip(tmp_path, name, made):
    path = tmp_path / "new" / name
    save(path, made)
    read = load(path, made.kind)
    assert (read.kind, read.table, read.found_for) == (made.kind, made.table, made.found_for)
    assert read.tensors.keys() == made.tensors.keys()
    for key, tensor in made.tensors.items():
        assert read.tensors[key].dtype == tensor.dtype and torch.equal(read.tensors[key], tensor)
    assert os.listdir(path.parent) == [name]
    assert str(read) == f"{made.kind}, UniPC, 8 steps, CFG 7.5"
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a.json"
    save(path, TABLE)
    other = Artifact("schedule", {"sigmas": [1.0]})
    with pytest.raises(FileExistsError, match=r"a\.json exists already; choose another name"):
        save(path, other)
    assert load(path).kind == "dc_ratios"
    save(path, other, overwrite=True)
    assert load(path).kind == "schedule" and load(path).found_for == FoundFor()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    save(path, TABLE)

    def full(*unused):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="no space"):
        save(path, Artifact("schedule"), overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.json"] and load(path).kind == "dc_ratios"


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("a.safetensors", TABLE, "a table needs a name that ends in .json"),
        ("a.json", TENSORS, "tensors needs a name that ends in .safetensors"),
        ("a.json", Artifact("x", {"a": float("nan")}), "cannot be written as JSON"),
        ("a.json", Artifact("x", {"a": torch.ones(1)}), "cannot be written as JSON"),
        ("a.json", Artifact("", {}), "'kind' is missing"),
        ("a.safetensors", Artifact("x", {}, {"l": torch.tensor([1.0, float("inf")])}), "'l' holds values"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, name, made, words):
    with pytest.raises(ValueError, match=words):
        save(tmp_path / name, made)
    assert os.listdir(tmp_path) == []


GOOD = {"quickstep": 1, "kind": "x", "found_for": {}, "table": {}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "damaged: it holds no valid JSON"),
        (b"\xff\xfe", "damaged: it holds no valid JSON"),
        ("[" * 100_000, "damaged: it holds no valid JSON"),
        ('{"quickstep": 1, "table": NaN}', "NaN is no finite number"),
        ('{"quickstep": 1, "table": 1e999}', "1e999 is no finite number"),
        ("[]", "no Quickstep artifact"),
        ("{}", "no Quickstep artifact"),
        (GOOD | {"quickstep": 2}, r"newer Quickstep \(format 2, this one reads 1\)"),
        (GOOD | {"kind": ""}, "damaged: 'kind' is missing"),
        (GOOD | {"table": []}, "damaged: 'table' is missing or of the wrong type"),
        ({k: v for k, v in GOOD.items() if k != "found_for"}, "damaged: 'found_for' is missing"),
        (GOOD | {"found_for": {"steps": "8"}}, "damaged: 'steps' of the provenance cannot be '8'"),
        (GOOD | {"found_for": {"cfg": True}}, "damaged: 'cfg' of the provenance cannot be True"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, words):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else str.encode(content) if isinstance(content, str)
                     else json.dumps(content).encode())  # fmt: skip
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_wrong_with_tensors_is_said(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "mine.safetensors"
    for write, words in (
        (lambda: path.write_bytes(b"\x05"), "no valid safetensors file"),
        (lambda: path.write_bytes(b"\xff" * 64), "no valid safetensors file"),
        (lambda: save_file({"a": torch.ones(1)}, path), "no 'quickstep' entry"),
        (lambda: save_file({"a": torch.ones(1)}, path, {"quickstep": "no"}), "no valid JSON"),
        (lambda: save_file({"a": torch.ones(1) / 0}, path, {"quickstep": json.dumps(GOOD)}), "'a' holds values"),
    ):
        write()
        with pytest.raises(ValueError, match=words) as caught:
            load(path)
        assert "mine.safetensors" in str(caught.value)


def test_a_file_of_another_kind(tmp_path):
    save(tmp_path / "a.json", TABLE)
    with pytest.raises(ValueError, match=r"a\.json holds dc_ratios, but schedule is needed here"):
        load(tmp_path / "a.json", "schedule")


def test_files_that_are_not_there_or_not_ours(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        (tmp_path / "folder.json").mkdir()
        load(tmp_path / "folder.json")
    with pytest.raises(ValueError, match=r"ends in \.json or \.safetensors"):
        load(tmp_path / "pickle.pth")


def test_provenance_may_grow(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | {"found_for": {"steps": 4, "weather": "fine"}, "more": 1}))
    assert load(tmp_path / "a.json").found_for == FoundFor(steps=4)


def test_mismatches_are_sentences_about_what_differs():
    assert mismatches(TABLE) == []
    same = mismatches(TABLE, VE, "b3:0123", UniPC(order=3), 8, 7.5 + 1e-9, (4, 64, 64))
    assert same == []
    assert mismatches(Artifact("x"), FLOW, "other", UniPC(), 8, 7.5, (4, 64, 64)) == []  # nothing known
    found = mismatches(TABLE, FLOW, "other", UniPC(order=2), 10, 4, (16, 8, 8))
    assert found == [
        "It was found for a variance-exploding model (EPS, V, EDM), and this is a flow model.",
        "It was found for the model b3:0123, and this is the model other.",
        "It was found for order = 3, and this is order = 2.",
        "It was found for 8 steps, and this is 10 steps.",
        "It was found for CFG 7.5, and this is CFG 4.",
        "It was found for latents of shape (4, 64, 64), and this is latents of shape (16, 8, 8).",
    ]
    other = mismatches(TABLE, solver=DCSolver(UniPC()))
    assert other == ["It was found for the sampler UniPC, and this is the sampler DCSolver."]


def test_settings_go_into_the_methods_a_method_is_made_of():
    settings = settings_of(DCSolver(UniPC(order=3)))
    assert settings["dc_order"] == 2 and settings["solver"]["id"] == "UniPC" and settings["solver"]["order"] == 3
    json.dumps(settings)


def test_process_names():
    assert (process_name(VE), process_name(FLOW)) == ("ve", "flow")


def test_an_artifact_is_no_code(tmp_path):
    """Reading never runs what is in the file: a pickle under our name is a damaged file."""
    import pickle

    (tmp_path / "a.json").write_bytes(pickle.dumps(os.getcwd))
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(os.getcwd))
    for name in ("a.json", "a.safetensors"):
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path / name)
