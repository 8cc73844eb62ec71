"""The deep model and its losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepfere.measured.operator import cell_means, null_space
from deepfere.model.features import FEATURES
from deepfere.model.losses import correlation_loss, huber, local_correlation, mapping_loss, project
from deepfere.model.network import FusionNetwork, network_from_config

F, K = len(FEATURES), 3


def network_of(depth=3, width=8, seed=0, random=True):
    torch.manual_seed(seed)
    network = FusionNetwork(F, K, width, depth)
    if random:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return network.eval()


@torch.no_grad()
def outputs(network, stain, up):
    return network(stain, up)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_receptive_field_is_known(depth):
    network = network_of(depth)
    r = network.radius_px
    assert r == 2**depth - 1
    side = 2 * r + 5
    stain, up = torch.randn(1, F, side + 2 * r, side + 2 * r), torch.randn(1, K, side + 2 * r, side + 2 * r)
    base = outputs(network, stain, up)
    assert base.shape == (1, K, side, side)
    centre = side // 2  # output pixel; its input pixel is centre + r
    for which in ("stain", "up"):
        changed = []
        for distance in (r, r + 1):
            for dy, dx in ((distance, 0), (0, -distance), (-distance, distance)):
                a, b = stain.clone(), up.clone()
                (a if which == "stain" else b)[0, :, centre + r + dy, centre + r + dx] += 5.0
                delta = (outputs(network, a, b) - base)[0, :, centre, centre].abs().max()
                changed.append((distance, float(delta)))
        assert all(delta == 0 for distance, delta in changed if distance > r), which
        assert all(delta > 1e-7 for distance, delta in changed if distance <= r), which


def test_a_window_of_the_network_equals_the_whole():
    network = network_of()
    r = network.radius_px
    stain, up = torch.randn(1, F, 40, 44), torch.randn(1, K, 40, 44)
    whole = outputs(network, stain, up)
    part = outputs(network, stain[..., 5 : 19 + 2 * r, 3 : 20 + 2 * r], up[..., 5 : 19 + 2 * r, 3 : 20 + 2 * r])
    np.testing.assert_allclose(part, whole[..., 5:19, 3:20], atol=1e-5)


def test_training_starts_from_the_closed_form():
    network = network_of(random=False)
    weights = np.random.default_rng(0).standard_normal((F, K))
    mean, sd = np.linspace(-1, 1, F), np.linspace(0.2, 3, F)
    network.set_feature_scale(mean, sd)
    network.set_linear(weights)
    stain, r = torch.randn(1, F, 30, 30), network.radius_px
    out = outputs(network, stain, torch.randn(1, K, 30, 30))
    centred = stain - torch.tensor(mean).float().view(1, -1, 1, 1)
    t1 = torch.einsum("nfyx,fk->nkyx", centred, torch.tensor(weights).float())
    # T1 up to a constant per factor, which the projection removes.
    np.testing.assert_allclose(out, t1[..., r:-r, r:-r], atol=2e-5)


def test_settings_rebuild_the_network_and_cost_is_counted():
    network = network_of(2, 16)
    again = network_from_config({**network.settings, "other": 1})
    again.load_state_dict(network.state_dict())
    stain, up = torch.randn(1, F, 12, 12), torch.randn(1, K, 12, 12)
    torch.testing.assert_close(again.eval()(stain, up), network(stain, up))
    weights = sum(p.numel() for name, p in network.named_parameters() if name.endswith("weight"))
    assert network.macs_per_px == weights
    assert FusionNetwork(F, 16).macs_per_px < 40_000


def test_no_pixel_is_normalised_by_its_neighbours():
    # A constant far away must not change what is here (no normalisation over space).
    network = network_of()
    stain, up = torch.randn(1, F, 50, 50), torch.randn(1, K, 50, 50)
    base = outputs(network, stain, up)
    stain[..., 40:, 40:] += 100
    torch.testing.assert_close(outputs(network, stain, up)[..., :10, :10], base[..., :10, :10], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_projection_has_no_cell_means(factor):
    torch.manual_seed(0)
    detail = torch.randn(2, K, 7 * factor, 6 * factor, dtype=torch.float64)
    out = project(detail, factor)
    assert out.shape == (2, K, 5 * factor, 4 * factor)
    assert cell_means(out, factor).abs().max() < 1e-12
    expected = null_space(detail.numpy(), factor)[..., factor:-factor, factor:-factor]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)


def test_mapping_loss_is_zero_for_the_truth_up_to_an_offset():
    torch.manual_seed(1)
    mapped = torch.randn(2, K, 20, 20)
    target = cell_means(mapped, 4)
    weight = (torch.rand(2, 1, 5, 5) < 0.7).float()
    offset = torch.randn(2, K, 1, 1)
    assert float(mapping_loss(mapped, target, weight, 4)) < 1e-10
    assert float(mapping_loss(mapped, target + offset, weight, 4)) < 1e-9
    assert float(mapping_loss(mapped, target + torch.randn_like(target), weight, 4)) > 0.05


def test_mapping_loss_ignores_what_has_no_weight():
    torch.manual_seed(2)
    mapped, target = torch.randn(1, K, 12, 12), torch.randn(1, K, 4, 4)
    weight = torch.ones(1, 1, 4, 4)
    weight[..., 1, 2] = 0
    other = target.clone()
    other[..., 1, 2] = 1e4
    torch.testing.assert_close(mapping_loss(mapped, other, weight, 3), mapping_loss(mapped, target, weight, 3))
    assert float(mapping_loss(mapped, target, torch.zeros(1, 1, 4, 4), 3)) == 0.0


def test_huber_by_hand():
    error = torch.tensor([[0.5, 3.0], [-3.0, 7.0]])
    weight = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert float(huber(error, weight)) == pytest.approx((0.125 + 2.5 + 2 * 2.5) / 4, rel=1e-5)
    # Patches can be spread over workers: the loss of all is the mean of the loss of each.
    shared = torch.randn(4, 1, 3, 3), torch.rand(4, 1, 3, 3)
    apart = [float(huber(e[None], w[None])) for e, w in zip(*shared, strict=True)]
    assert float(huber(*shared)) == pytest.approx(np.mean(apart), rel=1e-5)
    # A weight that broadcasts counts for every channel.
    assert float(huber(torch.ones(1, 5, 2, 2), torch.ones(1, 1, 2, 2))) == pytest.approx(0.5, rel=1e-5)


def test_local_correlation_equals_pearson():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((1, 1, 12, 13)), rng.standard_normal((1, 1, 12, 13))
    found = local_correlation(torch.from_numpy(a), torch.from_numpy(b), radius=2).numpy()[0, 0]
    # Windows of 5 x 5 pixels, every third pixel.
    assert found.shape == (3, 3)
    for i, j in ((0, 0), (1, 2), (2, 1)):
        pair = [x[0, 0, 3 * i : 3 * i + 5, 3 * j : 3 * j + 5].ravel() for x in (a, b)]
        assert found[i, j] == pytest.approx(np.corrcoef(pair[0], pair[1])[0, 1], abs=1e-6)


def test_correlation_loss_range_and_scale():
    torch.manual_seed(4)
    detail = torch.randn(2, K, 24, 24)
    gate = torch.ones(K)
    assert float(correlation_loss(detail, detail, gate)) == pytest.approx(0.0, abs=1e-4)
    assert float(correlation_loss(-detail, detail, gate)) == pytest.approx(2.0, abs=1e-4)
    assert float(correlation_loss(0.2 * detail + 3, detail, gate)) == pytest.approx(0.0, abs=1e-3)
    other = float(correlation_loss(torch.randn(2, K, 24, 24), detail, gate))
    assert 0.8 < other < 1.2
    assert float(correlation_loss(torch.randn(2, K, 24, 24), detail, torch.zeros(K))) == 0.0
    # A factor whose gate is closed does not count; a flat image says nothing (loss 1, not NaN).
    assert float(correlation_loss(-detail, detail, torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(2 / 3, abs=1e-4)
    assert float(correlation_loss(torch.zeros_like(detail), detail, gate)) == pytest.approx(1.0)


def test_correlation_loss_trains_the_detail_only():
    detail = torch.randn(1, K, 16, 16, requires_grad=True)
    proven = torch.randn(1, K, 16, 16, requires_grad=True)
    correlation_loss(detail, proven, torch.ones(K)).backward()
    assert detail.grad is not None
    assert torch.isfinite(detail.grad).all()
    assert detail.grad.abs().max() > 0
    assert proven.grad is None
    flat = torch.zeros(1, K, 16, 16, requires_grad=True)
    correlation_loss(flat, proven, torch.ones(K)).backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()
