"""The published model: its parts as published, its training, and its way through the pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.model import paper
from deepfere.model.guide import Cells
from deepfere.model.paper import Fusion, Mapping, Recipe, Registration, Training, correlation_loss, shrink_matrix
from deepfere.pipeline.paper import recipe
from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[1]
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
    assert fused.min() > 0 and fused.max() < 1


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
    assert (matrix @ line)[2:5] == pytest.approx([-factor, 0, factor], abs=1e-9)
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
    state = torch.get_rng_state()
    losses, images = run(Training(cells, stain, RECIPE), 2)
    again, same = run(Training(cells, stain, RECIPE), 2)
    assert losses == again and np.array_equal(images, same)
    other = Training(cells, stain, replace(RECIPE, seed=5))
    assert not np.array_equal(images, run(other, 2)[1])
    assert not torch.equal(other._starts(), Training(cells, stain, RECIPE)._starts())
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
        assert image.shape == (2, 88, 96) and image.min() > 0 and image.max() < 1
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


# The tier, from files to a result.

SETTINGS = (
    "model.tier=paper",
    "paper.embedding.warm_up=1",
    "paper.embedding.iterations=2",
    "paper.ion.iterations=2",
    "paper.patches=5",
    "tracking.uri=none",
    "reconstruct.shard_px=64",
    "reconstruct.chunk_px=32",
)
FACTOR = 8


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """12 x 11 measured pixels, the first row and a corner not measured, and where they lie on the slide."""
    from deepfere.measured.store import open_measured
    from deepfere.measured.writer import write_measured
    from deepfere.phantom import PhantomSpec, write_phantom
    from deepfere.pipeline import fuse

    folder = tmp_path_factory.mktemp("paper")
    phantom = write_phantom(folder / "phantom", PhantomSpec(shape_px=(12, 11), slide_mpp_um=3.0, factor=4, seed=3))
    plain = fuse(phantom.imzml, None, folder / "plain.zarr", factor=4, guide=False, overrides=["tracking.uri=none"])
    cube = np.stack([plain.measured(float(mz)) for mz in plain.ions["mz"]])
    msi = folder / "measured.zarr"
    write_measured(msi, np.nan_to_num(cube), plain.mask, plain.ions["mz"], plain.grid.pitch_um)
    assert 0.5 < open_measured(msi).mask.mean() < 1
    return msi, phantom.slide, phantom.truth / "alignment.json"


@pytest.fixture(scope="module")
def result(section, ray_session, tmp_path_factory):
    return reconstruct(section, tmp_path_factory.mktemp("result") / "result.zarr")


def reconstruct(section, out, *more, **given):
    from deepfere.pipeline import fuse

    msi, slide, alignment = section
    return fuse(msi, slide, out, factor=FACTOR, alignment=alignment, overrides=[*SETTINGS, *more], **given)


def decoded(result):
    return np.stack([result.ion(float(mz)).compute(scheduler="threads") for mz in result.ions["mz"]])


def test_what_is_decoded_is_what_the_networks_said(section, result, tmp_path, monkeypatch):
    """For ions: P of what three factors leave of them, and the three images times their loadings."""
    from deepfere.measured.operator import fill_missing, upsample
    from deepfere.pipeline import paper as tier

    said, kept = {}, tier.train

    def spy(cells, stain, *more, **given):
        training = kept(cells, stain, *more, **given)
        said.update(cells=cells, stain=stain, images=training.images())
        return training

    monkeypatch.setattr(tier, "train", spy)
    again = reconstruct(section, tmp_path / "again.zarr")
    assert np.array_equal(decoded(again), decoded(result), equal_nan=True)
    assert not result.exact and result.provenance["model"]["tier"] == "paper"
    # Each factor from 0 to 1 over the measured pixels.
    mask, cells = result.mask, said["cells"]
    assert len(cells) == 3
    assert cells[:, mask].min(1) == pytest.approx(0, abs=1e-6) and cells[:, mask].max(1) == pytest.approx(1, abs=1e-6)
    # The stain that it saw is the one that is stored.
    assert np.abs(said["stain"] * 255 - result.stain().compute()).max() <= 0.51
    # cells = (factor - low) / span, so loadings times span are the regression of the ions on the cells.
    y = np.stack([result.measured(float(mz)) for mz in result.ions["mz"]]).astype(np.float64)
    rows = np.concatenate([cells[:, mask], np.ones((1, mask.sum()))]).T.astype(np.float64)
    weights = np.linalg.lstsq(rows, y[:, mask].T, rcond=None)[0][:3].T
    wanted = upsample(fill_missing(np.nan_to_num(y), mask), FACTOR)
    wanted += np.tensordot(weights, said["images"] - upsample(cells.astype(np.float64), FACTOR), 1)
    inside = np.repeat(np.repeat(mask, FACTOR, 0), FACTOR, 1)
    for found, expected in zip(decoded(result), wanted, strict=True):
        assert np.array_equal(np.isfinite(found), inside)
        # Half precision of the detail.
        assert np.abs(found - expected)[inside].max() <= 2e-3 * np.abs(expected[inside]).max()


def test_disagreement_is_reported_and_does_not_fail(result):
    from deepfere.evaluation.metrics import consistency

    mz = float(result.ions["mz"].iloc[0])
    off = consistency(result.ion(mz).compute(scheduler="threads"), result.measured(mz), FACTOR, result.mask)
    assert result.ions["consistency"].iloc[0] == pytest.approx(off, rel=1e-6)
    assert result.ions["consistency"].max() > 1e-3
    assert (result.ions["informed"] == "not judged").all() and result.ions["held_out_r2"].isna().all()
    (warning,) = [w for w in result.provenance["warnings"] if "published model" in w]
    assert "not the measurement" in warning and "uncertainty" in warning
    sd = result.uncertainty(mz).compute(scheduler="threads")
    assert np.isfinite(sd[np.isfinite(result.ion(mz).compute(scheduler="threads"))]).all()


def test_the_page_and_info_say_so(result, cli, tmp_path):
    assert cli("report", result.path, "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert "No ion was judged on held-out tissue" in text and "not exact" in text and "published model" in text
    said = cli("info", result.path)
    assert said.code == 0 and f"{len(result.ions)} not judged" in said.out and "tier paper" in said.out


def test_one_ion_is_the_papers_ion_mode(section, result, tmp_path):
    from deepfere.measured.store import open_measured
    from deepfere.measured.writer import write_measured

    msi, slide, alignment = section
    cube = open_measured(msi)
    mz, single = float(cube.mz[2]), tmp_path / "one.zarr"
    write_measured(single, np.nan_to_num(cube.cube()[2:3]), cube.mask, [mz], cube.grid.pitch_um)
    one = reconstruct((single, slide, alignment), tmp_path / "result.zarr")
    notes = one.provenance["model"]["notes"]
    assert (notes["mode"], notes["warm_up"], notes["iterations"]) == ("ion", 0, 2)
    notes = result.provenance["model"]["notes"]
    assert (notes["mode"], notes["warm_up"], notes["iterations"]) == ("embedding", 1, 2)
    assert one.detail(Cells(0, 2, 0, 2)).shape == (1, 16, 16)


@pytest.mark.long
def test_an_interrupted_training_goes_on_to_the_same_bytes_and_a_finished_one_is_not_done_again(
    section, result, tmp_path, monkeypatch
):
    from deepfere.pipeline import paper as tier
    from deepfere.pipeline import write

    monkeypatch.setattr(tier, "CHECKPOINT_EVERY", 2)
    step, steps = Training.step, []

    def stopped(self):
        if self.done == 2:
            raise KeyboardInterrupt
        steps.append(self.done)
        return step(self)

    monkeypatch.setattr(Training, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(section, tmp_path / "again.zarr")
    monkeypatch.setattr(Training, "step", lambda self: steps.append(self.done) or step(self))
    publish = write.publish
    monkeypatch.setattr(write, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reconstruct(section, tmp_path / "again.zarr")
    assert steps == [0, 1, 2]
    monkeypatch.setattr(write, "publish", publish)
    again = reconstruct(section, tmp_path / "again.zarr")
    assert steps == [0, 1, 2]
    one, other = (contents(Path(r.path), "detail", "stain", "basis", "uncertainty") for r in (result, again))
    assert one == other


def test_a_checkpoint_of_something_else_is_not_taken(tmp_path):
    from deepfere.pipeline.paper import train

    cells, stain = problem()
    first = train(cells, stain, RECIPE, tmp_path / "state.pt", lambda _: None)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:5000])
    done = []
    again = train(cells, stain, RECIPE, tmp_path / "torn.pt", done.append)
    assert done == [0.25, 0.5, 0.75, 1.0] and np.array_equal(first.images(), again.images())
    done.clear()
    train(cells, stain, RECIPE, tmp_path / "state.pt", done.append)
    assert done == []
    train(1 - cells, stain, RECIPE, tmp_path / "state.pt", done.append)
    assert len(done) == 4


def test_sections_that_are_too_large_or_too_small_are_refused_before_they_are_aligned(section, tmp_path):
    with pytest.raises(InputError, match=r"96 x 88 high-resolution pixels are more than 8000"):
        reconstruct(section, tmp_path / "large.zarr", "paper.max_px=8000")
    with pytest.raises(InputError, match=r"48 x 44 high-resolution pixels.*needs 86"):
        from deepfere.pipeline import fuse

        fuse(section[0], section[1], tmp_path / "small.zarr", factor=4, alignment=section[2], overrides=SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_registered_model_and_the_published_one_exclude_each_other():
    from deepfere.pipeline.given import given_model

    with pytest.raises(InputError, match="trained anew"):
        given_model("models:/deepfere@champion", load_config(None, SETTINGS))


def test_label_scores_decode_it_as_it_is(result, tmp_path):
    """`evaluate --labels` on the result itself, and against another."""
    from deepfere.evaluation import label_scores as module

    mz = float(result.ions["mz"].iloc[0])
    row = result.index(mz)
    chosen = module.Chosen([row], np.zeros((1, *result.mask.shape)))
    images = module._methods(result, chosen, [("other", result)])
    whole = Cells(0, result.grid.shape_px[0], 0, result.grid.shape_px[1])
    inside = np.repeat(np.repeat(result.mask, FACTOR, 0), FACTOR, 1)
    for name in ("ours", "other"):
        found = np.asarray(images[name]()(whole))[0]
        assert np.abs(found - result.ion(mz).compute(scheduler="threads"))[inside].max() <= 1e-5 * np.abs(found).max()


def test_the_preset_states_what_was_published():
    config = load_config(ROOT / "configs" / "paper.yaml")
    assert config.model.tier == "paper" and config.paper == load_config().paper
    several, one = recipe(config, 3), recipe(config, 1)
    assert (several.warm_up, several.iterations, several.rate, several.stain_guides) == (1000, 5000, 2e-5, True)
    assert (one.warm_up, one.iterations, one.rate, one.stain_guides) == (0, 500, 2e-4, False)
    assert (one.patches, one.patch_px) == (800, 16)
