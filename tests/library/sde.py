"""Stochastic solvers of their own form: ER-SDE, SiT, score-SDE predictor-corrector, maximum-likelihood SDE."""

from quickstep_under_test.solvers.er_sde import ERSDE
from quickstep_under_test.solvers.ml_sde import MLSDE
from quickstep_under_test.solvers.score_sde import ScoreSDE
from quickstep_under_test.solvers.sit import SiTSDE

from . import Variant

EULER = (("marginal", "Euler-Maruyama adds noise of the right size in the limit of small steps only"),)
MEAN = ("clean end", "its last step goes beyond the prediction; tests/test_sde.py has its formula")
REVERSE = (
    (
        "mean",
        "on flow models the drift of the forward process is discretised too, so the mean converges with the steps",
    ),
    ("marginal", "adds noise of the size it has at the start of the step"),
)
BIAS = ("order", "a Langevin step does not shrink with the steps and leaves a bias; tests/test_sde.py measures it")
LANGEVIN = (BIAS, ("marginal", "the same bias, on a point mass"))
SIZED = (*LANGEVIN, ("mean", "the size of its step depends on the sample and the noise, so no run is affine in them"))
SPREAD = (("marginal", "takes the data for spread out; tests/test_sde.py has exactness on such data"),)
MEASURED = (
    ("marginal", "one element tells nothing of the variance; tests/test_sde.py measures large samples"),
    ("order", "as for the marginal"),
    ("mean", "as for the marginal"),
)

VARIANTS = [
    Variant(ERSDE(), order=3),  # its weak order is 2, but what the noise adds is too small to show
    Variant(ERSDE(third_order="reference")),
    Variant(ERSDE(phi="ode")),
    Variant(ERSDE(phi="ode", third_order="reference")),
    Variant(ERSDE(order=2, phi="reverse_sde")),
    Variant(ERSDE(order=1, phi="log")),
    Variant(SiTSDE(), exempt=EULER),
    Variant(SiTSDE(diffusion_form="increasing-decreasing", last_step="mean"), exempt=(*EULER, MEAN)),
    Variant(SiTSDE("heun", "SBDM"), exempt=EULER),
    Variant(SiTSDE("heun", "constant", 0.1), exempt=EULER),
    Variant(SiTSDE("heun", diffusion_norm=0.0)),
    Variant(ScoreSDE(), exempt=SIZED),
    Variant(ScoreSDE("reverse_diffusion", n_steps=0), exempt=REVERSE),
    Variant(ScoreSDE("ancestral", "ald", n_steps=2), exempt=LANGEVIN),
    Variant(ScoreSDE("none", n_steps=2), exempt=SIZED),
    Variant(MLSDE(), exempt=MEASURED),
    Variant(MLSDE(0.5, "gaussian"), exempt=SPREAD),
    Variant(MLSDE(data_std=0.0)),
]
