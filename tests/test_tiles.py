"""Where the tiles lie, how they move, and how a picture is put together from them."""

from itertools import pairwise

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.seamless_tiles import FILLS, SeamlessTiles, joined, starts

TIMES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("size", [64, 100, 128, 130, 200])
@pytest.mark.parametrize("shift", [0, 7, 32, 63])
@pytest.mark.parametrize("overlap", [0, 16])
def test_tiles_of_one_size_from_the_shift_to_the_end(size, shift, overlap):
    found = starts(size, 64, overlap, shift, whole=False)
    assert found == sorted(set(found)) and found[-1] == max(size - 64, 0)
    assert found[0] == (min(shift, size - 64) if size > 64 else 0)
    covered = {i for s in found for i in range(s, s + 64)}
    assert covered == set(range(found[0], max(size, 64)))
    gaps = [b - a for a, b in pairwise(found)]
    assert all(gap == 64 - overlap for gap in gaps[:-1]) and all(0 < gap <= 64 - overlap for gap in gaps)
    whole = starts(size, 64, overlap, shift, whole=True)
    assert whole[0] == 0 and whole[-len(found) :] == found and len(whole) - len(found) == (found[0] > 0)


def moves(settings, times=TIMES[:-1], run=None):
    session = settings.start(run or Run(TIMES))
    made = []
    for t in times:
        with session.call(t):
            made.append(session.move(200, 200))
    return made


def test_the_moves_are_seeded_and_one_per_step():
    settings = SeamlessTiles(tile=64, max_shift=40, fill="extra", seed=3)
    once = moves(settings)
    assert once == moves(settings) != moves(SeamlessTiles(tile=64, max_shift=40, fill="extra", seed=4))
    assert len(set(once)) == 5 and all(0 <= d <= 40 for move in once for d in move)
    # The stages of a step, and Heun's corrector with the next predictor.
    assert moves(settings, [8.0, 6.0, 5.0, 4.0, 4.0, 3.0]) == [once[0]] * 3 + [once[1]] * 3
    assert moves(settings, run=Run(TIMES, adaptive=True)) == [(0, 0)] * 5


def test_margins_are_fresh_now_and_then():
    made = moves(SeamlessTiles(tile=64, reset_every=2))
    assert made[0] == made[2] == made[4] == (0, 0) and (0, 0) not in (made[1], made[3])


def test_moves_fit_the_picture_and_the_control():
    session = SeamlessTiles(tile=64, fill="extra").start(Run(TIMES))
    for t in TIMES[:-1]:
        with session.call(t):
            assert session.move(64, 200)[0] == 0 and session.move(200, 50)[1] == 0
            assert session.move(64, 200)[1] == session.move(200, 200)[1]
            assert all(d % 8 == 0 for d in session.move(200, 200, 8))


@pytest.mark.parametrize("fill", FILLS)
def test_boxes_are_full_tiles(fill):
    session = SeamlessTiles(tile=64, fill=fill).start(Run(TIMES))
    with session.call(4.0):
        move = session.move(200, 100)
        boxes = session.boxes(200, 100, move, whole=False)
    assert all((y.stop - y.start, x.stop - x.start) == (64, 64) for y, x in boxes)
    margin = fill == "previous" and move != (0, 0)
    nothing = torch.full((1, 1, 200, 100), -1.0)
    made = joined([(box, torch.ones(1, 1, 64, 64)) for box in boxes], nothing)
    assert bool((made == -1).any()) == margin and bool(((made == 1) | (made == -1)).all())


def test_overlaps_are_means():
    boxes = [(slice(0, 4), slice(0, 4)), (slice(0, 4), slice(2, 6))]
    made = joined(
        [(box, torch.full((1, 2, 4, 4), v)) for box, v in zip(boxes, (1.0, 3.0), strict=True)], torch.zeros(1, 2, 4, 8)
    )
    assert made[0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 0, 0]


def test_outside_the_window_and_after_the_end():
    session = SeamlessTiles().start(Run(TIMES, window=(5.0, 0.7)))
    plans = []
    for t in TIMES[:-1]:
        with session.call(t):
            plans.append(session.plan)
    assert plans == [Plan.PLAIN, *[Plan.FULL] * 3, Plan.PLAIN]
    session.store.put(["a"], torch.ones(1, 1))
    session.close()
    assert session.store.nbytes == 0


def test_too_much_overlap():
    with pytest.raises(ValueError, match="overlap = 40 is more than half a tile of 64"):
        SeamlessTiles(tile=64, overlap=40)
