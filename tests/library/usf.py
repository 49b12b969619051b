"""USF: tables that go on for any number of steps."""

import json

from quickstep_under_test.solvers.ems import DATA_PREDICTION
from quickstep_under_test.solvers.usf import USF

from . import Variant


def table(*steps: dict, **head) -> str:
    return json.dumps({"usf": 1, "repeat": 1, **head, "steps": steps})


SECOND, THIRD = {"order": 2}, {"order": 3, "prediction": "noise"}
VARIANTS = [
    Variant(USF(table({}, {"order": 2, "prediction": "noise", "variable": "rho", "relax": "0.5exp"})), name="noise"),
    Variant(USF(table({}, SECOND, {**THIRD, "corrector": "pseudo"}, frame="vef")), name="corrected"),
    Variant(USF(table({}, SECOND, {"order": 3, "points": [1, 2]})), name="fewer points"),
    Variant(USF(table({}, {**SECOND, "start": 2}, repeat=2)), name="older start"),
    Variant(
        USF(
            table({}, SECOND, THIRD, {**SECOND, "corrector": "implicit"}, {"order": 3, "prediction": "v3"}, repeat=3),
            DATA_PREDICTION,
        ),
        name="v3",
    ),
]
