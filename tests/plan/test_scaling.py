"""The fits and the family of shapes."""

import pytest
from plan_support import make_test_plan

from rorchat.model import SIZES, count_scaling_parameters
from rorchat.plan.scaling import FITS, format_size, list_shapes
from rorchat.plan.show import compute_isoflop_curve


def test_the_shapes_grow_and_include_the_named_sizes():
    shapes = list_shapes()
    assert [format_size(shape) for shape in shapes if shape in SIZES.values()] == [
        "51m", "124m", "355m", "774m", "1.5b",
    ]  # fmt: skip
    counts = [count_scaling_parameters(shape, 50_304) for shape in shapes]
    assert counts == sorted(counts) and all(b / a < 1.7 for a, b in zip(counts, counts[1:], strict=False))
    assert {shape.n_embd // shape.n_head for shape in shapes} == {64}


def test_the_published_fit_reproduces_chinchillas_loss():
    """70B parameters on 1.4T tokens: 1.94 nats by the published constants (Hoffmann et al. 2022, table A3: 1.936)."""
    assert FITS["chinchilla"].loss(70e9, 1.4e12) == pytest.approx(1.937, abs=2e-3)


@pytest.mark.parametrize(("fit", "tokens_per_parameter"), [("chinchilla", (50, 110)), ("epoch", (15, 30))])
def test_only_the_corrected_fit_gives_20_tokens_per_parameter(fit, tokens_per_parameter):
    """Besiroglu et al. 2024, figure 5: the published constants contradict the 20 that the authors used."""
    flops = 5.76e23
    best = min(
        (10**exponent for exponent in (9 + k / 100 for k in range(300))), key=lambda n: FITS[fit].loss(n, flops / 6 / n)
    )
    assert tokens_per_parameter[0] < flops / 6 / best / best < tokens_per_parameter[1]


@pytest.mark.parametrize("fit", FITS)
def test_the_chosen_shape_has_the_lowest_loss(fit):
    plan = make_test_plan("A100-80", flops=1e19, fit=fit)
    curve = compute_isoflop_curve(plan, 1e19)
    assert len(curve) == len(list_shapes())
    assert min(curve, key=lambda point: point[1])[0] == plan.parameters
    assert plan.flops == pytest.approx(1e19, rel=1e-3)
    assert plan.loss == pytest.approx(min(loss for _, loss in curve), rel=1e-3)
