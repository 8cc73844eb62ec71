"""The gates and the tiers: what is there is found, what is not there stays shut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from deepfere import cores
from deepfere.measured.factors import factorise
from deepfere.measured.operator import cell_means, expand, pad_edge, spline_coefficients
from deepfere.model import gate as gates
from deepfere.model.features import FEATURES
from deepfere.model.fit import (
    POSITIVITY,
    RATIO,
    Evidence,
    SectionFit,
    evidence,
    fit_t1,
    gate_ions,
    select_positivity,
    tier_error,
    tier_evidence,
)
from deepfere.model.network import FusionNetwork
from deepfere.model.reduced import deep_detail, fit_deep, mixed_by_factor, network_rows, ridge_detail
from deepfere.model.ridge import (
    Chemistry,
    detail_rows,
    fit_average,
    fit_own,
    null_guides,
    target_rows,
    usable,
)
from deepfere.model.transfer import SmoothingChoice
from deepfere.model.uncertainty import NoiseModel, local_variance

SHAPE = (37, 34)


def problem_of(features, *rest):
    """`evidence` with the features as they are, the first of the real ones; the others are constant."""
    features = np.concatenate([features, np.zeros((len(FEATURES) - len(features), *features.shape[1:]))])
    return evidence(features[None], (0.25,), *rest, choice=SmoothingChoice(0.25, np.nan, np.nan))


def guide_of(seed, shape=SHAPE, count=4, blur=0.7):
    rng = np.random.default_rng(seed)
    images = gaussian_filter(rng.standard_normal((count, *shape)), (0, blur, blur))
    return images / images.std((1, 2), keepdims=True)


def blocks_of(shape, side=4):
    i, j = np.indices(shape)
    return (i * side // shape[0]) * side + j * side // shape[1]


def test_gains_by_brute_force():
    rng = np.random.default_rng(0)
    block = rng.integers(0, 6, 300)
    predicted, loadings = rng.standard_normal((300, 2)), rng.standard_normal((3, 2))
    combined = predicted @ loadings.T
    targets = combined * np.array([0.6, -0.5, 1.7]) + 0.5 * rng.standard_normal((300, 3))
    found = gates.gains(gates.moments(targets, predicted, block), loadings)
    for c in range(3):
        t, p = targets[:, c], combined[:, c]
        gain = np.clip(t @ p / (p @ p), 0, 1)
        assert found.gain[c] == pytest.approx(gain)
        assert found.r2[c] == pytest.approx(1 - ((t - gain * p) ** 2).sum() / (t @ t))
        better = [(t[block == b] ** 2).sum() - ((t - gain * p)[block == b] ** 2).sum() for b in range(6)]
        if gain > 0:
            expected = np.mean(better) / (np.std(better, ddof=1) / np.sqrt(6))
            assert found.evidence[c] == pytest.approx(expected)
    assert found.gain[1] == 0
    assert found.gain[2] == 1


def test_decide_needs_both_nulls_and_blocks():
    def gain(r2, evidence):
        return gates.Gain(np.full(1, 0.8), np.full(1, r2), np.full(1, evidence))

    nulls = [gain(r, 0.0) for r in np.linspace(0.0, 0.19, 20)]
    assert gates.decide(gain(0.25, 5.0), nulls).gate[0] == 0.8
    assert gates.decide(gain(0.15, 5.0), nulls).gate[0] == 0
    assert gates.decide(gain(0.25, 1.9), nulls).gate[0] == 0
    assert gates.decide(gain(-0.1, 5.0), []).gate[0] == 0
    assert gates.decide(gain(0.25, 5.0), nulls).null_mean[0] == pytest.approx(0.095)
    assert gates.decide(gain(0.25, 5.0), nulls).null_r2[0] == pytest.approx(np.quantile(np.linspace(0, 0.19, 20), 0.95))
    classes = gates.Gate(np.array([0.9, 0.5, 0.0]), np.array([0.3, 0.05, 0.4]), np.zeros(3), np.zeros(3)).informed()
    assert classes == ["stain-informed", "partly", "smooth"]


def test_nothing_to_predict_or_to_predict_with_gives_no_gate():
    m = gates.moments(np.zeros((40, 1)), np.ones((40, 1)), np.arange(40) // 10)
    found = gates.gains(m, np.eye(1))
    assert np.isfinite([found.gain[0], found.r2[0], found.evidence[0]]).all()
    silent = gates.gains(gates.moments(np.ones((40, 1)), np.zeros((40, 1)), np.arange(40) // 10), np.eye(1))
    for g in (found, silent):
        assert gates.decide(g, [g]).gate[0] == 0
    one_block = gates.gains(gates.moments(np.ones((9, 1)), np.ones((9, 1)), np.zeros(9, np.int64)), np.eye(1))
    assert gates.decide(one_block, []).gate[0] == 0


def section(seed, noise=0.3, ions=12):
    """A guide and ions; even ions follow the guide, odd ones something of the same texture."""
    features = guide_of(seed)
    rng = np.random.default_rng([seed, 1])
    other = guide_of(seed + 1000, count=2)
    cube = np.empty((ions, *SHAPE))
    for m in range(ions):
        mix = rng.uniform(0.5, 1.5, 2) * rng.choice([-1, 1], 2)
        cube[m] = np.tensordot(mix, (features if m % 2 == 0 else other)[:2], axes=1)
    cube += noise * rng.standard_normal(cube.shape)
    cube = (cube + 10) * rng.lognormal(0, 1, ions)[:, None, None]
    mask = np.ones(SHAPE, bool)
    mask[:4, :5] = False
    return features, cube, mask


def decide_for(guide, cube, mask, seed=0):
    (factors,) = factorise([cube], [mask], 8)
    problem = problem_of(guide, mask, np.ones_like(mask), cube, factors)
    fit, nulls = fit_t1(problem, 20, seed)
    return gate_ions(problem, factors.basis, fit.predicted, nulls), problem, factors, fit


@pytest.mark.parametrize("seed", range(4))
def test_gates_open_for_what_follows_the_stain_and_only_for_that(seed):
    features, cube, mask = section(seed)
    (_, ion), *_ = decide_for(features, cube, mask)
    assert (ion.gate[0::2] > 0.8).all()
    assert (ion.r2[0::2] > 0.5).all()
    assert (ion.gate[1::2] < 0.02).all(), "an ion that the stain does not inform got detail"
    assert (ion.null_r2 < 0.1).all()
    assert ion.informed()[0] == "stain-informed"


@pytest.mark.parametrize("wrong", ["mirrored", "turned", "shifted", "foreign"])
def test_a_wrong_guide_opens_no_gate(wrong):
    opened = total = 0
    for seed in range(2):
        features, cube, mask = section(seed)
        guide = {
            "mirrored": features[:, ::-1],
            "turned": features[:, ::-1, ::-1],
            "shifted": np.roll(features, (11, 9), (1, 2)),
            "foreign": guide_of(seed + 500),
        }[wrong]
        (factor, ion), *_ = decide_for(guide, cube, mask)
        opened += int((ion.gate > 0).sum())
        total += len(ion.gate)
        # What little slips through must not matter.
        assert (ion.gate * np.maximum(ion.r2, 0) < 0.02).all()
        assert factor.gate.max() < 0.3
    assert opened <= 0.1 * total


def test_the_networks_rows_line_up_with_the_closed_forms():
    features, cube, mask = section(1)
    mask[10:13, 20] = False
    *_, problem, factors, fit = decide_for(features, cube, mask)
    k = fit.weights.shape[1]
    network = FusionNetwork(len(FEATURES), k, width=4, depth=2).eval()
    network.set_feature_scale(problem.features.mean((1, 2)), np.maximum(problem.features.std((1, 2)), 1e-3))
    plain = detail_rows(problem.features, problem.mask, problem.blocks, RATIO)
    linear = fit_average(plain, problem.factor_rows)
    network.set_linear(linear.weights)
    # At the start of training its output is T1: same rows, same order, same numbers.
    np.testing.assert_allclose(network_rows(network, problem, factors)[:, :k], plain.stain @ linear.weights, atol=1e-5)
    mirrored = problem.features[:, ::-1]
    rows = detail_rows(mirrored, problem.mask, problem.blocks, RATIO)
    found = network_rows(network, problem, factors, mirrored)[:, :k]
    np.testing.assert_allclose(found, rows.stain @ linear.weights, atol=1e-5)
    # The deep tier's planes are its weights on the closed form's regressors and on the network's.
    weights = np.random.default_rng(0).standard_normal((len(fit.weights) + network.regressors, k))
    planes = deep_detail(network, problem, factors, weights)
    assert not cell_means(planes, RATIO).round(10).any()
    inside = usable(problem.mask, RATIO, (0, 0))
    first = problem.rows.phase == 0
    both = np.concatenate([problem.rows.stain, network_rows(network, problem, factors)], axis=1)[first]
    np.testing.assert_allclose(planes[:, inside].T, both @ weights, atol=1e-5)


def test_the_deep_tier_has_every_factor_at_its_own_smoothing():
    """Weights lie on the regressors at its own smoothing and on the network's; planes are those of the rows."""
    features, cube, mask = section(1)
    *_, whole, factors, _ = decide_for(features, cube, mask)
    k, each = whole.factor_rows.shape[1], len(whole.features)
    own = np.where(np.arange(k) % 2, 0.4, 0.2)
    both = np.concatenate([whole.features, gaussian_filter(whole.features, (0, 0.6, 0.6))])
    chemistry = replace(whole.chemistry, groups=2)
    rows = detail_rows(both, whole.mask, whole.blocks, RATIO, chemistry)
    choice = SmoothingChoice(0.2, 0.5, 1.0, tuple(own))
    problem = replace(whole, choice=choice, features=both, chemistry=chemistry, rows=rows)
    closed = fit_own(rows, problem.factor_rows, problem.group)
    fit, nulls = fit_t1(problem, 3, 0)
    np.testing.assert_array_equal(fit.weights, closed.weights)
    for found, guide in zip(nulls, null_guides(both, 3, 0), strict=True):
        null = detail_rows(guide, problem.mask, problem.blocks, RATIO, chemistry)
        expected = fit_own(null, problem.factor_rows, problem.group).predicted
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    network = FusionNetwork(len(FEATURES), k, width=4, depth=2).eval()
    network.set_feature_scale(whole.features.mean((1, 2)), np.maximum(whole.features.std((1, 2)), 1e-3))
    deep = fit_deep(network, problem, factors, closed)
    assert rows.each == each + rows.products and len(deep.weights) == 2 * rows.each + network.regressors
    for group in (0, 1):
        assert not deep.weights[rows.columns(1 - group)][:, problem.group == group].any()
        assert deep.weights[rows.columns(group)][:, problem.group == group].any()
    more = network_rows(network, problem, factors)
    planes = deep_detail(network, problem, factors, deep.weights)
    inside, first = usable(problem.mask, RATIO, (0, 0)), rows.phase == 0
    expected = np.concatenate([rows.stain, more], axis=1)[first] @ deep.weights
    np.testing.assert_allclose(planes[:, inside].T, expected, atol=1e-5)


def test_the_deep_tier_is_the_closed_form_with_the_networks_regressors():
    features, cube, mask = section(1)
    *_, problem, factors, closed = decide_for(features, cube, mask)
    k = closed.weights.shape[1]
    torch.manual_seed(0)
    network = FusionNetwork(len(FEATURES), k, width=6, depth=2).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    deep = fit_deep(network, problem, factors, closed)
    assert deep.weights.shape == (len(closed.weights) + network.regressors, k)
    assert deep.predicted.shape == closed.predicted.shape
    # What only the network shows: the detail of its hidden layer.
    hidden = network_rows(network, problem, factors)[:, k:]
    loud = replace(problem, factor_rows=problem.factor_rows + 3 * hidden[:, :1] / hidden[:, :1].std())
    alone = fit_average(loud.rows, loud.factor_rows)
    better = fit_deep(network, loud, factors, alone)
    everywhere, weight = np.ones(len(hidden), bool), np.ones(k)
    assert tier_error(loud, weight, better.predicted, everywhere) < 0.7 * tier_error(
        loud, weight, alone.predicted, everywhere
    )
    some = np.arange(k) % 2 == 0
    mixed = mixed_by_factor(alone, better, some.astype(float))
    np.testing.assert_allclose(
        mixed_by_factor(alone, better, 0.25 * some).predicted[:, some],
        0.75 * alone.predicted[:, some] + 0.25 * better.predicted[:, some],
    )
    np.testing.assert_array_equal(mixed.weights[:, some], better.weights[:, some])
    np.testing.assert_array_equal(mixed.weights[: len(alone.weights), ~some], alone.weights[:, ~some])
    assert not mixed.weights[len(alone.weights) :, ~some].any()
    np.testing.assert_array_equal(mixed.predicted[:, ~some], alone.predicted[:, ~some])


@pytest.mark.parametrize("case", ["checkerboard", "thin", "one row", "not covered", "few pixels", "tiny"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_too_little_to_judge_by_gives_plain_interpolation(case):
    shape = {"thin": (3, 40), "one row": (1, 60), "tiny": (4, 4)}.get(case, (20, 20))
    mask, covered = np.ones(shape, bool), np.ones(shape, bool)
    if case == "checkerboard":
        mask = np.indices(shape).sum(0) % 2 == 0
    elif case == "not covered":
        covered[:] = False
    elif case == "few pixels":
        mask[:] = False
        mask[8:11, 8:11] = True
    rng = np.random.default_rng(0)
    cube = rng.random((6, *shape))
    (factors,) = factorise([cube], [mask], 8)
    problem = problem_of(rng.standard_normal((4, *shape)), mask, covered, cube, factors)
    fit, nulls = fit_t1(problem, 8, 0)
    factor, ion = gate_ions(problem, factors.basis, fit.predicted, nulls)
    assert not factor.gate.any()
    assert not ion.gate.any()
    assert ion.gate.shape == (6,)
    network = FusionNetwork(len(FEATURES), fit.weights.shape[1], 4, 2).eval()
    assert network_rows(network, problem, factors).shape == (len(fit.predicted), network.regressors)
    deep = fit_deep(network, problem, factors, fit)
    assert deep.predicted.shape == fit.predicted.shape
    # Nor do rows that may not judge.
    _, shut = gate_ions(problem, factors.basis, fit.predicted, nulls, np.zeros(len(fit.predicted), bool))
    assert not shut.gate.any()
    # No rows explain nothing: a tier or a placement must not win by losing them.
    none = np.zeros(len(fit.predicted), bool)
    assert tier_error(problem, np.ones(fit.weights.shape[1]), fit.predicted, none) == 1.0
    steps, variance = select_positivity(cube, mask, None, np.zeros_like(factors.basis))
    assert steps.shape == (6,)
    assert np.isfinite(variance).all()


def test_tier_error_ranks_predictions():
    features, cube, mask = section(2)
    _, problem, _, fit = decide_for(features, cube, mask)
    weight, everywhere = np.ones(fit.predicted.shape[1]), np.ones(len(fit.predicted), bool)
    assert tier_error(problem, weight, problem.factor_rows, everywhere) == pytest.approx(0.0, abs=1e-12)
    nothing = tier_error(problem, weight, np.zeros_like(fit.predicted), everywhere)
    assert nothing == pytest.approx(1.0)
    assert tier_error(problem, weight, -problem.factor_rows, everywhere) == pytest.approx(1.0)
    assert tier_error(problem, weight, fit.predicted, everywhere) < 0.95


def test_positivity_and_uncertainty_are_the_same_however_many_threads_judge_them(monkeypatch):
    rng, mask = np.random.default_rng(1), np.ones(SHAPE, bool)
    mask[3:6, 4:9] = False
    cube, detail, loadings = rng.random((9, *SHAPE)), rng.normal(size=(2, 36, 34)), rng.normal(size=(9, 2)) / 4
    with cores.limited(1):
        one = select_positivity(cube, mask, lambda ratio: detail, loadings)
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    many = select_positivity(cube, mask, lambda ratio: detail, loadings)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_null_guides_are_the_same_however_many_threads_fit_them(monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    rng, mask = np.random.default_rng(1), np.ones(SHAPE, bool)
    cube = rng.random((6, *SHAPE))
    (factors,) = factorise([cube], [mask], 4)
    problem = problem_of(guide_of(2), mask, mask, cube, factors)
    assert problem.at_once > 3
    network = FusionNetwork(len(FEATURES), factors.basis.shape[1], 4, 2).eval()

    def fitted(threads):
        monkeypatch.setattr(cores, "_most", threads)
        fit, nulls = fit_t1(problem, 6, 0)
        guides = null_guides(problem.features, 6, 0)
        deep = cores.side_by_side(lambda guide: fit_deep(network, problem, factors, fit, guide).predicted, guides)
        return np.stack([fit.predicted, *nulls]), np.stack(deep)

    for one, other in zip(fitted(1), fitted(None), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.ptp(one, axis=0).max() > 1e-3  # no guide is like another one


def test_uncovered_pixels_give_no_evidence():
    features, cube, mask = section(3)
    covered = np.ones(SHAPE, bool)
    covered[:, 20:] = False
    (factors,) = factorise([cube], [mask], 8)
    spoilt = np.where(covered, features, 1e6)
    problem = problem_of(spoilt, mask, covered, cube, factors)
    assert np.abs(problem.features).max() < 1e3
    assert (np.unravel_index(problem.rows.index, SHAPE)[1] < 20).all()
    clean = problem_of(features, mask, covered, cube, factors)
    np.testing.assert_array_equal(problem.rows.stain, clean.rows.stain)
    assert len(problem.factor_rows) == len(problem.rows.stain) == len(problem.ion_rows)


def test_positivity_and_uncertainty_from_the_reduced_scale():
    rng = np.random.default_rng(0)
    shape = (41, 38)
    spots = gaussian_filter((rng.random(shape) < 0.03).astype(float), 0.6) * 100
    smooth_noise = 50 + gaussian_filter(rng.standard_normal(shape), 4) * 20 + rng.standard_normal(shape)
    cube = np.stack([spots, smooth_noise, np.zeros(shape)])
    mask = np.ones(shape, bool)
    mask[30:, :6] = False
    steps, variance = select_positivity(cube, mask, None, np.zeros((3, 1)))
    assert steps[0] > min(POSITIVITY), "sparse positive spots gain from steps of the ratio"
    assert steps[1] == min(POSITIVITY), "an image far from zero has nothing to gain"
    assert (variance >= 0).all()
    assert not variance[2].any()
    # The variance model, averaged over the image, is the mean squared error it was made for.
    fine = cube[1][:40, :38]
    coarse = cell_means(fine, 2)
    image = expand(pad_edge(spline_coefficients(coarse)), 2)
    spread = np.repeat(np.repeat(local_variance(coarse), 2, 0), 2, 1)
    c0, c1, c2 = NoiseModel.of_row(variance[1]).structure
    predicted = c0 + (c1 + NoiseModel.of_row(variance[1]).quantum) * image + c2 * spread
    error = (image - fine) ** 2
    assert predicted.mean() == pytest.approx(error.mean(), rel=0.35)
    tiny = select_positivity(cube[:, :3, :3], np.ones((3, 3), bool), None, np.zeros((3, 1)))
    # Nothing to judge by: the fewest steps, and the uncertainty is the noise of the measurement itself, not nothing.
    assert (tiny[0] == min(POSITIVITY)).all()
    assert (tiny[1][:2, 0] > 0).all()


def test_planted_detail_reaches_the_uncertainty():
    features, cube, mask = section(0, noise=0.05)
    (_, ion), problem, factors, fit = decide_for(features, cube, mask)
    loadings = ion.gate[:, None] * factors.basis
    calls = []

    def detail_at(ratio):
        calls.append(ratio)
        return ridge_detail(problem, fit.weights)

    _, with_stain = select_positivity(cube, mask, detail_at, loadings)
    _, without = select_positivity(cube, mask, None, np.zeros_like(loadings))
    assert calls == [RATIO]

    def structure(rows):
        level = np.stack([np.ones(12), cube.mean((1, 2)), cube.var((1, 2))])
        return (rows.T[:3] * level).sum(0)

    gain = structure(with_stain) / structure(without)
    assert (gain[0::2] < 0.6).all()
    assert (gain[1::2] > 0.9).all()


def test_a_fit_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "weights": rng.random((4, 2)), "basis": rng.random((5, 2)), "factor_gate": rng.random(2),
        "factor_r2": rng.random(2), "ion_gate": np.array([0.5, 0, 1, 0.2, 0]), "ion_r2": np.full(5, 0.05),
        "ion_null_r2": rng.random(5), "positivity": np.array([0, 1, 3, 5, 0]), "uncertainty": rng.random((5, 5)),
        "ion_null_mean": rng.random(5), "feature_mean": rng.random(4), "feature_sd": rng.random(4),
    }  # fmt: skip
    fit = SectionFit(**arrays)
    fit.save(tmp_path / "fit.npz")
    again = SectionFit.load(tmp_path / "fit.npz")
    for name, values in arrays.items():
        np.testing.assert_array_equal(getattr(again, name), values)
    np.testing.assert_array_equal(again.loadings, arrays["ion_gate"][:, None] * arrays["basis"])
    assert again.informed() == ["partly", "smooth", "partly", "partly", "smooth"]


def test_a_tier_needs_evidence_over_blocks():
    rng = np.random.default_rng(3)
    images = guide_of(3, count=2)
    mask, blocks = np.ones(SHAPE, bool), blocks_of(SHAPE)
    rows, targets = detail_rows(images, mask, blocks, RATIO), target_rows(images, mask, RATIO)
    choice = SmoothingChoice(0.25, np.nan, np.nan)
    nothing = Chemistry(np.zeros((0, *SHAPE)), np.zeros(3))
    problem = Evidence(choice, images, mask, blocks, nothing, rows, targets, targets)
    weight, every = np.ones(2), np.ones(len(targets), bool)
    unit = targets.std(0)
    good, again, poor = (targets + s * unit * rng.normal(size=targets.shape) for s in (0.5, 0.5, 1.5))
    together, apart = tier_evidence(problem, weight, poor, good, every)
    assert together > 2 and (apart > 1).all()
    together, apart = tier_evidence(problem, weight, good, poor, every)
    assert together < -2 and (apart < -1).all()
    assert abs(tier_evidence(problem, weight, good, again, every)[0]) < 3
    one = np.column_stack([good[:, 0], poor[:, 1]])
    assert (
        np.sign(tier_evidence(problem, weight, np.column_stack([poor[:, 0], good[:, 1]]), one, every)[1]) == [1, -1]
    ).all()
    together, apart = tier_evidence(problem, weight, poor, good, ~every)
    assert together == 0.0 and apart.tolist() == [0.0, 0.0]
