"""The published model: its parts as published, its training, and its way through the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepfere.errors import InputError
from deepfere.model import paper
from deepfere.model.paper import Fusion, Mapping, Recipe, Registration, Training, correlation_loss, shrink_matrix

RECIPE = Recipe(warm_up=1, iterations=3, rate=2e-4, patches=6, patch_px=8, stain_guides=False, seed=4)


def problem(channels=1, cells=(11, 12), factor=8, seed=0):
    rng = np.random.default_rng(seed)
    stain = rng.random((3, cells[0] * factor, cells[1] * factor), np.float32)
    return rng.random((channels, *cells), np.float32), stain


@pytest.mark.parametrize(("channels", "side"), [(1, (88, 96)), (3, (90, 87))])
def test_shapes_of_the_networks_odd_sides_too(channels, side):
    stain = torch.rand(1, 3, *side)
    mapped = Mapping(channels)(Registration()(stain))
    fused, revised = Fusion(channels)(torch.rand(1, channels, *side), mapped)
    assert mapped.shape == fused.shape == revised.shape == (1, channels, *side)
    assert 0 < fused.min() and fused.max() < 1


def test_the_u_net_is_the_published_one():
    """Layer by layer: five scales of 128 channels, 5 past each; three convolutions of 16 behind it."""
    fusion = Fusion(3)
    found = [tuple(p.shape) for name, p in fusion.named_parameters() if name.endswith("weight")]
    scale = lambda entering: [(5, entering, 1, 1), (128, entering, 3, 3), (128, 128, 3, 3)]  # noqa: E731
    joins = [(128, 133, 3, 3), (128, 128, 1, 1)]
    wanted = [*scale(6), *scale(128), *scale(128), *scale(128), *scale(128), *joins * 5]
    wanted += [(3, 128, 1, 1), (16, 3, 3, 3), (16, 16, 3, 3), (3, 16, 3, 3)]
    assert sorted(found) == sorted(wanted)
    halvings = [m.stride for m in fusion.modules() if isinstance(m, torch.nn.Conv2d) and m.stride != (1, 1)]
    assert halvings == [(2, 2)] * 5


def test_multiplications_are_counted_right():
    """Against what the layers are seen to do on a section that all scales divide."""
    side, counted = 128, {"first": 0, "second": 0}

    def count(part):
        def hook(layer, _, out):
            counted[part] += out[0, 0].numel() * layer.weight.numel()

        return hook

    parts = {"first": [Registration(), Mapping(3)], "second": [Fusion(3)]}
    for part, networks in parts.items():
        for network in networks:
            for layer in network.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.register_forward_hook(count(part))
    registration, mapping = parts["first"]
    mapped = mapping(registration(torch.rand(1, 3, side, side)))
    parts["second"][0](mapped, mapped)
    # The registration's convolutions lose some edge.
    assert [n / side**2 for n in counted.values()] == pytest.approx(list(paper.macs_per_px(3)), rel=2e-3)


def test_the_registration_starts_as_the_identity_and_depends_on_the_stain_alone():
    torch.manual_seed(1)
    registration, stain = Registration(), torch.rand(1, 3, 88, 96)
    assert registration.affine(stain).flatten().tolist() == [1, 0, 0, 0, 1, 0]
    assert (registration(stain) - stain).abs().max() < 1e-4
    with torch.no_grad():
        registration.decide[2].weight.normal_()
    assert (registration.affine(stain) - registration.affine(torch.rand(1, 3, 88, 96))).abs().max() > 1e-4


def test_beyond_the_slide_it_is_black():
    registration = Registration()
    with torch.no_grad():
        registration.decide[2].bias.copy_(torch.tensor([1.0, 0, 1.0, 0, 1, 0]))  # by half the width
    moved = registration(torch.ones(1, 3, 88, 96))
    assert moved[..., :46].min() > 0.999 and moved[..., 50:].max() == 0


@pytest.mark.parametrize("factor", [2, 3, 8, 16])
def test_the_reduction_is_lanczos_in_the_middle_of_each_pixel(factor):
    matrix = shrink_matrix(7, factor)
    assert matrix.shape == (7, 7 * factor)
    assert matrix.sum(1) == pytest.approx(1, abs=1e-12)
    # Symmetric about the middle of the measured pixel, and the same for all that the edge does not cut.
    line = np.arange(7 * factor) - (7 * factor - 1) / 2
    assert matrix[3] == pytest.approx(matrix[3][::-1], abs=1e-12)
    assert matrix @ line == pytest.approx(np.where(np.abs(np.arange(7) - 3) < 2, factor * (np.arange(7) - 3.0), matrix @ line))
    assert matrix[2][: 6 * factor] == pytest.approx(matrix[3][factor:])
    # The kernel's definition, written out: sin(pi t) sin(pi t / 2) / (pi^2 t^2 / 2), two measured pixels to each side.
    t = line / factor
    with np.errstate(invalid="ignore", divide="ignore"):
        kernel = np.sin(np.pi * t) * np.sin(np.pi * t / 2) / (np.pi**2 * t**2 / 2)
    kernel = np.where(np.abs(t) < 1e-9, 1.0, np.where(np.abs(t) < 2, kernel, 0.0))
    assert matrix[3] == pytest.approx(kernel / kernel.sum(), abs=1e-12)
    # At the edge the outermost pixel stands for those beyond.
    assert matrix[0].argmax() in (0, factor // 2 - 1, factor // 2)
    assert matrix[0, 0] != pytest.approx(matrix[3, 3 * factor], abs=1e-3)


def looped(image, guide, starts, size):
    """The correlation loss by its definition."""
    total = 0.0
    for i, j in starts.tolist():
        a, b = image[:, i : i + size, j : j + size].flatten(1), guide[:, i : i + size, j : j + size].flatten(1)
        for p in range(size**2):
            for q in range(size**2):
                if b[:, p].sum() >= 0.05 and b[:, q].sum() >= 0.05:
                    total = total + (((a[:, p] - a[:, q]) ** 2).sum() - ((b[:, p] - b[:, q]) ** 2).sum()).abs()
    return total / (len(starts) * size**4) * 5


@pytest.mark.parametrize(("channels", "colours"), [(1, 1), (3, 3), (2, 3)])
def test_the_correlation_loss_and_its_gradient_are_the_definition(channels, colours):
    torch.manual_seed(0)
    image = torch.rand(channels, 9, 11, dtype=torch.float64, requires_grad=True)
    guide = torch.rand(colours, 9, 11, dtype=torch.float64)
    guide[:, 2:5, 3:6] = 0.01  # black: does not count
    starts = torch.tensor([[0, 0], [2, 3], [5, 7], [2, 3], *[[n % 6, n % 8] for n in range(17)]])
    value = correlation_loss(image, guide, starts, 4)
    wanted = looped(image, guide, starts, 4)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, image)
    (expected,) = torch.autograd.grad(wanted, image)
    assert gradient.abs().max() > 1e-3
    assert gradient == pytest.approx(expected, abs=1e-12)


def run(training, iterations):
    losses = [training.step() for _ in range(iterations)]
    return losses, training.images()


def test_the_seed_decides_everything():
    cells, stain = problem()
    losses, images = run(Training(cells, stain, RECIPE), 4)
    again, same = run(Training(cells, stain, RECIPE), 4)
    assert losses == again and np.array_equal(images, same)
    other = Recipe(1, 3, 2e-4, 6, 8, False, 5)
    assert not np.array_equal(images, run(Training(cells, stain, other), 4)[1])
    state = torch.get_rng_state()
    Training(cells, stain, RECIPE)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are its own


def test_warm_up_trains_the_first_networks_alone():
    cells, stain = problem(3)
    training = Training(cells, stain, Recipe(2, 1, 1e-3, 6, 8, True, 0))
    first = lambda: [p.detach().clone() for p in training.mapping.parameters()]  # noqa: E731
    second = lambda: [p.detach().clone() for p in training.fusion.parameters()]  # noqa: E731
    mapping, fusion = first(), second()
    run(training, 2)
    assert all(torch.equal(a, b) for a, b in zip(fusion, second(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(mapping, first(), strict=True))
    run(training, 1)
    assert not all(torch.equal(a, b) for a, b in zip(fusion, second(), strict=True))


def test_training_comes_nearer_to_the_measurement():
    cells = np.indices((11, 12)).astype(np.float32)[:1] / 10
    stain = np.repeat(np.repeat(np.broadcast_to(cells, (3, 11, 12)), 8, 1), 8, 2)
    losses, _ = run(Training(cells, stain, Recipe(0, 25, 2e-4, 6, 8, False, 0)), 25)
    # Two steps an iteration, of which one is not this loss's: it rises now and then.
    assert min(losses[-8:]) < 0.4 * losses[0]


@pytest.mark.parametrize("stain_guides", [True, False])
def test_what_the_correlation_loss_is_given(monkeypatch, stain_guides):
    """The fused image, before it is revised, and the registered stain or the mapped one; its gradient is added on."""
    cells, stain = problem(2)
    training = Training(cells, stain, Recipe(0, 2, 1e-3, 6, 8, stain_guides, 0))
    with torch.no_grad():
        registered = training.registration(training._stain)
        mapped = training.mapping(registered)
    seen = []

    def record(image, guide, starts, size):
        seen.append((image.detach(), guide, starts, size))
        return 0.0 * image.sum()

    monkeypatch.setattr(paper, "correlation_loss", record)
    run(training, 2)
    image, guide, starts, size = seen[0]
    assert torch.equal(guide, (registered if stain_guides else mapped)[0]) and not guide.requires_grad
    with torch.no_grad():
        assert image.shape == (2, 88, 96) and 0 < image.min() and image.max() < 1
    assert starts.shape == (6, 2) and size == 8 and not torch.equal(starts, seen[1][2])
    assert starts.min() >= 0 and starts[:, 0].max() + size <= 88 and starts[:, 1].max() + size <= 96
    # The second step goes along the first gradient, too: the correlation loss alone would leave none here.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in training.fusion.revise.parameters())


def test_other_sizes_are_refused():
    paper.check_size((320, 288), 400_000)
    with pytest.raises(InputError, match=r"whole.*640 x 640.*more than 400000.*--factor"):
        paper.check_size((640, 640), 400_000)
    with pytest.raises(InputError, match=r"85 x 300.*needs 86.*larger --factor"):
        paper.check_size((85, 300), 400_000)
    torch.manual_seed(0)
    Registration()(torch.rand(1, 3, paper.LEAST_SIDE_PX, paper.LEAST_SIDE_PX))
    with pytest.raises(RuntimeError):
        Registration()(torch.rand(1, 3, paper.LEAST_SIDE_PX - 1, paper.LEAST_SIDE_PX))
