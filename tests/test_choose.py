"""What is kept of learning: the gates where the network is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deepfere.model.fit import fit_t1, gate_ions
from deepfere.model.gate import Gate
from deepfere.pipeline.choose import between, deep_gates, network_share
from tests.test_gate import decide_for, section


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_network_opens_no_ion_further_than_the_whole_section_shows(share):
    """A prediction that is right where it is judged, and there alone: lucky, as few blocks can be."""
    features, cube, mask = section(1)
    *_, problem, factors, _ = decide_for(features, cube, mask)
    closed, nulls = fit_t1(problem, 8, 0)
    names = np.unique(problem.blocks)
    rows = np.isin(problem.rows.block, names[: max(2, round(share * len(names)))])
    lucky = replace(closed, predicted=np.where(rows[:, None], problem.factor_rows, closed.predicted))
    whole = np.ones(factors.basis.shape[1])
    factor, ion = deep_gates(problem, factors.basis, (closed, nulls), (lucky, nulls), rows, whole)
    told, shown = gate_ions(problem, factors.basis, closed.predicted, nulls)
    factor_alone, alone = gate_ions(problem, factors.basis, lucky.predicted, nulls, rows)
    assert (alone.gate > shown.gate + 0.05).any()
    np.testing.assert_allclose(ion.gate, np.minimum(alone.gate, shown.gate))
    np.testing.assert_array_equal(factor.gate, factor_alone.gate)
    np.testing.assert_array_equal(ion.r2, alone.r2)
    # Of a network that has a part, its gates have that part.
    half, some = deep_gates(problem, factors.basis, (closed, nulls), (lucky, nulls), rows, 0.5 * whole)
    np.testing.assert_allclose(half.gate, (told.gate + factor.gate) / 2)
    np.testing.assert_allclose(some.gate, (shown.gate + ion.gate) / 2)
    np.testing.assert_allclose(some.r2, (shown.r2 + ion.r2) / 2)
    # An ion has as much of the network as its factors have.
    first = np.zeros(len(whole))
    first[0] = 1.0
    _, mixed = deep_gates(problem, factors.basis, (closed, nulls), (lucky, nulls), rows, first)
    own = factors.basis[:, 0] ** 2 / (factors.basis**2).sum(1)
    np.testing.assert_allclose(mixed.gate, (1 - own) * shown.gate + own * ion.gate)

    # What shuts the closed form's ions shuts all; what does not shut the network's leaves them as far as it shows.
    nothing = replace(closed, predicted=np.zeros_like(closed.predicted))
    assert not deep_gates(problem, factors.basis, (nothing, nulls), (lucky, nulls), rows, whole)[1].gate.any()
    assert not deep_gates(problem, factors.basis, (closed, nulls), (nothing, nulls), rows, whole)[1].gate.any()


def test_what_a_tier_without_a_part_does_not_know_does_not_count():
    one, nan, share = np.ones(3), np.full(3, np.nan), np.array([0.0, 0.5, 1.0])
    known, unknown = Gate(one, one, one, one), Gate(one, nan, nan, nan)
    np.testing.assert_array_equal(between(known, unknown, share).r2, [1, np.nan, np.nan])
    np.testing.assert_array_equal(between(unknown, known, share).r2, [np.nan, np.nan, 1])


def test_an_advantage_within_its_error_is_no_advantage():
    assert [network_share(z) for z in (-3.0, 0.0, 0.5, 1.0)] == [0.0] * 4
    assert network_share(2.0) == pytest.approx(0.75)
    shares = [network_share(z) for z in (1.0, 1.1, 1.5, 3.0, 30.0)]
    assert shares == sorted(shares) and 0.99 < shares[-1] < 1


def test_shrinking_an_advantage_pays_where_there_is_hardly_one_and_costs_little_elsewhere():
    """Squared error of the shrunk advantage over that of the one seen: a sixth at none, half as much again at most."""
    rng = np.random.default_rng(0)
    bounds = {0.0: 0.2, 0.5: 0.45, 1.0: 0.9, 1.5: 1.3, 2.0: 1.5, 2.5: 1.55, 3.0: 1.5, 5.0: 1.2}
    for true, most in bounds.items():
        seen = true + rng.standard_normal(20_000)
        shrunk = np.array([network_share(z) for z in seen]) * seen
        assert ((shrunk - true) ** 2).mean() < most * ((seen - true) ** 2).mean()
