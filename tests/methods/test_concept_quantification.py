"""Concepts against the authors' script, plain loops, the exact Jacobian and the converged optimum."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs import concept_counts, concept_metrics, entropy_map, weight_distance
from kdrefs.methods import _concept_quantification_optimum as optimum
from kdrefs.methods._concept_quantification_layers import Cells, reading
from kdrefs.nets import Output, build

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HALF_LOG = 0.5 * math.log(2 * math.pi * math.e)


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load("concepts_official_metrics_some")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tiny(nn.Module):
    """A convolution, a ReLU in place, a linear layer: 3x8x8 images, six numbers; float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)
            self.fc = nn.Linear(4 * 8 * 8, 6)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.norm(self.conv(images))).flatten(1))


class Linear(nn.Module):
    """One linear layer on 1x4x4 images, for which first order is exact."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.identity = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.identity(images.flatten(1) @ self.weight.mT)


def linear(seed: int = 0, outputs: int = 40) -> Linear:
    """Columns of very different lengths."""
    return Linear(draw(outputs, 16, seed=seed) * torch.linspace(0.2, 3, 16, dtype=torch.float64))


def jacobian_gains(net: nn.Module, image: Tensor, rows: int) -> Tensor:
    """Squared derivatives by the pixels of each of rows x rows square cells, one derivative after the other."""
    matrix = torch.autograd.functional.jacobian(lambda x: net(x[None])[0], image)
    height = image.shape[1] // rows
    gains = torch.zeros(rows, rows, dtype=torch.float64)
    for r in range(rows):
        for c in range(rows):
            cell = matrix[:, :, r * height : (r + 1) * height, c * height : (c + 1) * height]
            gains[r, c] = cell.square().sum()
    return gains


# The closed form


def test_closed_form_equals_the_exact_jacobian():
    net, images = Tiny().eval(), draw(3, 3, 8, 8)
    found = entropy_map(net, images, "fc", 4, probes=6, trade_off=5.0, sigma=0.02)
    for image, entropy in zip(images, found.entropy, strict=True):
        gains = jacobian_gains(net, image, 4)
        sigma = torch.sqrt(5.0 / 2 * 0.02**2 * gains.mean() / gains)
        torch.testing.assert_close(entropy, sigma.log() + HALF_LOG)
    assert (found.standard_error == 0).all()
    assert found.mean_entropies is None


def test_probes_find_the_exact_map_within_their_errors():
    net, images = linear(), draw(4, 1, 4, 4)
    exact = entropy_map(net, images, "identity", 4, probes=40).entropy
    z = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        found = entropy_map(net, images, "identity", 4, probes=39, generator=generator)
        z.append((found.entropy - exact) / found.standard_error)
    scores = torch.stack(z)
    assert 0.85 < scores.std() < 1.2
    assert abs(scores.mean()) < 0.25  # the logarithm of a mean is a little too small


def test_probes_error_falls_with_their_square_root():
    net, images = linear(outputs=300), draw(20, 1, 4, 4)
    few, many = (entropy_map(net, images, "identity", 4, probes=p).standard_error.mean() for p in (16, 256))
    assert few / many == pytest.approx(4, rel=0.15)


def test_closed_form_is_the_minimum_of_the_loss():
    net, image = linear(), draw(1, 1, 4, 4)
    entropy = entropy_map(net, image, "identity", 4, probes=40).entropy[0]
    gains = jacobian_gains(net, image[0], 4)

    def loss(log_sigma: Tensor) -> float:
        change = (gains * (2 * log_sigma).exp()).sum() / (0.01**2 * gains.sum())
        return (change - 7 * (log_sigma + HALF_LOG).mean()).item()

    best = loss(entropy - HALF_LOG)
    assert all(loss(entropy - HALF_LOG + 0.1 * draw(4, 4, seed=s)) > best for s in range(20))
    # At the optimum the change of the layer is half the trade-off, the same part of it from every cell.
    parts = gains * (2 * (entropy - HALF_LOG)).exp() / (0.01**2 * gains.sum())
    torch.testing.assert_close(parts, torch.full_like(parts, 7 / 2 / 16))


def test_differences_depend_neither_on_trade_off_nor_on_sigma():
    net, images = Tiny(), draw(3, 3, 8, 8)
    maps = [
        entropy_map(net, images, "fc", 4, trade_off=t, sigma=s).entropy for t, s in ((7.0, 0.01), (3.0, 0.02))
    ]
    one, two = (m - m.mean((1, 2), keepdim=True) for m in maps)
    torch.testing.assert_close(one, two)
    assert not torch.allclose(*maps)


def test_rotated_images_have_rotated_maps():
    net, images = linear(), draw(2, 1, 4, 4)
    turned = Linear(net.weight.detach().unflatten(1, (4, 4)).rot90(1, (1, 2)).flatten(1))
    a = entropy_map(net, images, "identity", 4).entropy
    b = entropy_map(turned, images.rot90(1, (2, 3)), "identity", 4).entropy
    torch.testing.assert_close(a.rot90(1, (1, 2)), b)


def test_scale_of_the_layer_does_not_matter_and_that_of_the_pixels_adds_its_logarithm():
    net, images = linear(), draw(2, 1, 4, 4)
    a = entropy_map(net, images, "identity", 4).entropy
    torch.testing.assert_close(
        entropy_map(Linear(1e8 * net.weight.detach()), images, "identity", 4).entropy, a
    )
    tiny = entropy_map(Linear(1e-12 * net.weight.detach()), images, "identity", 4).entropy
    torch.testing.assert_close(tiny, a)
    # Pixels and noise three times as large: the same change of the layer, the logarithm of three more.
    b = entropy_map(Linear(net.weight.detach() / 3), 3 * images, "identity", 4, sigma=0.03).entropy
    torch.testing.assert_close(b, a + math.log(3))


def test_unseen_cells_have_the_largest_entropy():
    weight = draw(40, 16)
    weight[:, 5] = 0
    found = entropy_map(Linear(weight), draw(2, 1, 4, 4), "identity", 4, probes=8)
    assert (found.entropy.flatten(1).argmax(1) == 5).all()
    assert found.entropy.flatten(1)[:, 5] == pytest.approx(HALF_LOG)
    assert found.standard_error.isfinite().all()
    blind = entropy_map(
        Linear(torch.zeros(40, 16, dtype=torch.float64)), draw(2, 1, 4, 4), "identity", 4, probes=8
    )
    torch.testing.assert_close(blind.entropy, torch.full((2, 4, 4), HALF_LOG, dtype=torch.float64))


def test_cells_are_those_of_nearest_upsampling():
    for grid, size in (((4, 4), (8, 8)), ((3, 5), (8, 11)), ((7, 16), (20, 224)), ((5, 5), (5, 5))):
        cells = Cells(grid, size, torch.device("cpu"))
        values = torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, *grid)
        spread = cells.spread(values)
        torch.testing.assert_close(spread, F.interpolate(values[None], size=size, mode="nearest")[0])
        torch.testing.assert_close(cells.sums(spread), values * cells.sums(torch.ones(1, *size)))


# The optimisation


def test_noise_is_clamped_and_spread_as_in_the_authors_layer():
    layer = load("concepts_official_noise_layer")
    sigma = layer["sigma_in"].clamp(optimum.LEAST, optimum.MOST)
    torch.testing.assert_close(sigma[None, None], layer["sigma_after_forward"])
    spread = Cells((2, 2), (4, 4), torch.device("cpu")).spread(sigma)
    torch.testing.assert_close(spread.expand(2, 3, 4, 4), layer["output_for_zero_image_unit_noise"])
    assert (sigma.log() + optimum.ENTROPY_OF_ONE).mean().item() == pytest.approx(
        layer["mean_entropy"].item(), rel=1e-6
    )


def test_converged_optimum_is_the_closed_form():
    net, images = linear(), draw(4, 1, 4, 4)
    exact = entropy_map(net, images, "identity", 4, probes=40).entropy
    found = entropy_map(net, images, "identity", 4, method="optimise", draws=64, chunk=256).entropy
    assert (found - exact).abs().mean() < 0.03
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.99


def loop_official(
    net: nn.Module, image: Tensor, seed: int, steps: int, draws: int, trade_off: float
) -> Tensor:
    """The authors' procedure for one image, by autograd of the whole loss; noise as ours draws it."""
    generator = torch.Generator().manual_seed(seed)
    clean = F.relu(net(image[None])).detach()

    def change(sigma: Tensor) -> Tensor:
        noise = torch.randn(draws, *image.shape, generator=generator, dtype=image.dtype)
        noisy = image + F.interpolate(sigma[None, None], size=image.shape[1:], mode="nearest")[0] * noise
        return (F.relu(net(noisy)) - clean).square().mean()

    sigma = torch.full((4, 4), 0.01, dtype=torch.float64)
    scale = change(sigma).item()
    seen, maps = [], []
    for step in range(steps):
        if step == 60:
            if max(seen) > -2.8:
                break
            trade_off *= 1.5
        sigma = sigma.clamp(0.001, 1).requires_grad_()
        entropy = (sigma.log() + HALF_LOG).mean()
        seen.append(entropy.item())
        maps.append((sigma.log() + HALF_LOG).detach())
        (slope,) = torch.autograd.grad(change(sigma) / scale - trade_off * entropy, sigma)
        sigma = (sigma - 1e-4 * slope).detach()
    return maps[min(range(len(seen)), key=lambda k: abs(seen[k] + 2.8))]


@pytest.mark.parametrize("trade_off", [1.0, 7.0])  # raised after 60 steps, and stopped then
def test_official_optimisation_equals_a_plain_loop(trade_off):
    net, images = linear(), draw(2, 1, 4, 4)
    generator = torch.Generator().manual_seed(5)
    seeds = torch.randint(2**62, (2,), generator=generator.clone_state()).tolist()
    options = {"method": "optimise", "variant": "official", "draws": 4, "steps": 66}
    found = entropy_map(net, images, "identity", 4, trade_off=trade_off, generator=generator, **options)
    for image, entropy, seed in zip(images, found.entropy, seeds, strict=True):
        torch.testing.assert_close(entropy, loop_official(net, image, seed, 66, 4, trade_off))
    stopped = found.mean_entropies[60:].isnan()
    assert stopped.all() if trade_off == 7 else not stopped.any()


def test_official_start_and_stop():
    found = entropy_map(
        linear(), draw(2, 1, 4, 4), "identity", 4, method="optimise", variant="official", draws=2
    )
    assert found.mean_entropies.shape == (80, 2)
    torch.testing.assert_close(found.mean_entropies[0], torch.full((2,), math.log(0.01) + HALF_LOG).double())
    path = found.mean_entropies[:60]
    closest = (path + 2.8).abs().min(0).values
    torch.testing.assert_close((found.entropy.mean((1, 2)) + 2.8).abs(), closest)


@pytest.mark.parametrize("variant", ["default", "official"])
def test_batched_optimisation_equals_one_by_one_and_any_chunk(variant):
    net, images = Tiny(), draw(5, 3, 8, 8)
    options = {"method": "optimise", "variant": variant, "draws": 4, "steps": 8}
    whole = entropy_map(net, images, "fc", 4, chunk=64, **options)
    for chunk in (1, 3, 8):
        parts = entropy_map(net, images, "fc", 4, chunk=chunk, **options)
        torch.testing.assert_close(parts.entropy, whole.entropy)
        torch.testing.assert_close(parts.mean_entropies, whole.mean_entropies)


@pytest.mark.parametrize("probes", [4, 64])
def test_closed_form_of_any_chunk(probes):
    net, images = Tiny(), draw(5, 3, 8, 8)
    one, other = (entropy_map(net, images, "fc", 4, probes=probes, chunk=c).entropy for c in (2, 64))
    torch.testing.assert_close(one, other)


def test_chunk_bounds_what_goes_through_the_network_at_once():
    sizes = []

    class Watched(Linear):
        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().forward(images)

    net = Watched(draw(4, 16))
    for options in ({}, {"method": "optimise", "steps": 2, "draws": 10}):
        entropy_map(net, draw(7, 1, 4, 4), "identity", 4, chunk=3, **options)
    assert max(sizes) == 3


# What is asked of a network


@pytest.mark.parametrize("method", ["closed-form", "optimise"])
def test_network_is_left_as_it_was(method):
    net = Tiny()
    net.norm.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = {p: torch.ones_like(p) for p in net.parameters()}
    for parameter, grad in grads.items():
        parameter.grad = grad
    with torch.no_grad():
        entropy_map(net, draw(2, 3, 8, 8), "fc", 4, method=method, steps=2)
    assert [m.training for m in (net, net.conv, net.norm)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is grad and (grad == 1).all() for p, grad in grads.items())
    assert not net.fc._forward_hooks
    assert all(p.requires_grad for p in net.parameters())


def test_failures_put_the_network_back_too():
    net = Tiny()
    with pytest.raises(RuntimeError):
        entropy_map(net, draw(2, 5, 8, 8), "fc", 4)
    assert net.training
    assert not net.fc._forward_hooks


def test_maps_are_those_of_eval_mode():
    net, images = Tiny(), draw(4, 3, 8, 8)
    net(images + 3)  # moves the running statistics
    torch.testing.assert_close(entropy_map(net, images, "fc", 4), entropy_map(net.eval(), images, "fc", 4))


def test_layers_by_feature_and_submodule():
    net = build("small_cnn", channels=(4, 8), feature=16).double()
    images = draw(2, 1, 8, 8)
    by_feature = entropy_map(net, images, "block1", 4, probes=8).entropy
    assert by_feature.shape == (2, 4, 4)
    assert not torch.allclose(by_feature, entropy_map(net, images, "blocks.1.conv", 4, probes=8).entropy)
    torch.testing.assert_close(
        entropy_map(net, images, "logits", 4).entropy, entropy_map(net, images, "classifier", 4).entropy
    )
    # `embedding` is a feature behind the ReLU and a submodule before it: the feature comes first.
    before = entropy_map(net, images, "embedding_pre", 4).entropy
    assert not torch.allclose(entropy_map(net, images, "embedding", 4).entropy, before)


def test_an_activation_in_place_leaves_the_layer_before_it_alone():
    net, images = Tiny().eval(), draw(2, 3, 8, 8)
    with reading(net, "norm") as read:
        value = read(images)
    torch.testing.assert_close(value, net.norm(net.conv(images)))
    assert (value < 0).any()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 network"])
def test_bf16(autocast):
    net = build("small_cnn", channels=(4, 8), feature=16)
    images = draw(4, 1, 8, 8).float()
    full = entropy_map(net, images, "embedding", 4).entropy
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            half = entropy_map(net, images, "embedding", 4).entropy
            slow = entropy_map(net, images, "embedding", 4, method="optimise", steps=3, draws=2).entropy
    else:
        half = entropy_map(net.bfloat16(), images.bfloat16(), "embedding", 4).entropy
        slow = entropy_map(
            net, images.bfloat16(), "embedding", 4, method="optimise", steps=3, draws=2
        ).entropy
    assert half.dtype == torch.float64
    assert (half - full).abs().mean() < 0.05
    assert slow.dtype == torch.float32
    assert slow.isfinite().all()


def test_equal_generators_give_equal_maps():
    net, images = linear(), draw(3, 1, 4, 4)
    one, two, other = (
        entropy_map(net, images, "identity", 4, probes=4, generator=torch.Generator().manual_seed(s)).entropy
        for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    # An image's probes do not depend on those after it.
    first = entropy_map(
        net, images[:1], "identity", 4, probes=4, generator=torch.Generator().manual_seed(1)
    ).entropy
    torch.testing.assert_close(first, one[:1])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.constant = nn.Flatten(), nn.Identity()

    def forward(self, images: Tensor) -> Output:
        self.constant(torch.ones(len(images), 3))
        return Output(self.inner(self.inner(images)), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "nowhere"}, "layer: expected a feature or a submodule .*got 'nowhere'"),
        ({"layer": "inner"}, "layer: 'inner' runs 2 times"),
        ({"layer": "constant"}, "layer: its output does not depend on the images"),
        ({"grid": 9}, "grid: expected 1 to"),
        ({"grid": (0, 4)}, "grid: expected 1 to"),
        ({"method": "guess"}, "method: expected one of"),
        ({"variant": "official"}, "variant: 'official' is one of method='optimise'"),
        ({"variant": "paper"}, "variant: expected one of"),
        ({"probes": 0}, "probes: expected an integer of at least 1"),
        ({"chunk": 0}, "chunk: expected an integer of at least 1"),
        ({"steps": 0, "method": "optimise"}, "steps: expected an integer"),
        ({"trade_off": 0.0}, "trade_off: expected a finite number above 0"),
        ({"sigma": 2.0}, "sigma: expected 0.001 to 1"),
        ({"rate": -1.0}, "rate: expected a finite number above 0"),
        ({"images": torch.zeros(2, 8, 8)}, "images: expected a floating tensor"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "images: expected a floating tensor"),
        ({"images": torch.zeros(0, 1, 8, 8)}, "images: expected a floating tensor"),
    ],
)
def test_bad_arguments_of_entropy_map(options, message, unchecked):
    arguments = {"images": torch.zeros(2, 1, 8, 8), "layer": "logits", "grid": 4} | options
    with pytest.raises(ValueError, match=message):
        entropy_map(Twice(), **arguments)


# Counts and metrics


def test_metrics_equal_the_authors_script(golden):
    entropy = golden["distil_net_sigma"][:, :, 0].log() + HALF_LOG
    distance = golden["distil_net_weight_diff"][0].double().cumsum(0)[golden["checkpoints"]]
    found = concept_metrics(
        entropy, golden["foreground_mask"], distance, golden["threshold_b"].item(), variant="official"
    )

    def expect(name: str) -> np.ndarray:
        return golden[f"distil_net_official_{name}"].numpy()

    np.testing.assert_allclose(found.foreground, expect("Nfg"), atol=1e-8)
    np.testing.assert_allclose(found.background, expect("Nbg"), atol=1e-8)
    np.testing.assert_allclose(found.ratio, expect("lam"), atol=1e-8)
    assert found.d_mean == pytest.approx(expect("Dmean"), rel=1e-6)  # the script accumulates in float32
    assert found.d_variance == pytest.approx(expect("Dvar"), rel=1e-6)
    assert found.d_std == pytest.approx(math.sqrt(expect("Dvar")), rel=1e-6)
    for name, value in {"fg": found.rho, "bg": found.rho_background, "total": found.rho_total}.items():
        assert value == pytest.approx(expect(f"rho_{name}"), abs=1e-12)
    assert found.chance == pytest.approx(144 / 256)
    for k in range(entropy.shape[1]):
        counts = concept_counts(entropy[:, k], golden["foreground_mask"], 0.2, baseline="set")
        assert torch.equal(counts.foreground, golden["distil_net_Nfg_per_image_recomputed"][:, k])
        assert torch.equal(counts.background, golden["distil_net_Nbg_per_image_recomputed"][:, k])


def loop_metrics(entropy: Tensor, inside: Tensor, distance: Tensor, threshold: float) -> dict[str, float]:
    """The default definitions, cell by cell."""
    images, checkpoints, rows, columns = entropy.shape
    sets = {}
    for i in range(images):
        for k in range(checkpoints):
            back = [
                entropy[i, k, r, c].item() for r in range(rows) for c in range(columns) if not inside[i, r, c]
            ]
            level = sum(back) / len(back)
            sets[i, k] = {
                (r, c) for r in range(rows) for c in range(columns) if level - entropy[i, k, r, c] > threshold
            }
    on = {(i, k): {cell for cell in cells if inside[i][cell]} for (i, k), cells in sets.items()}
    reached, rho, ratio = [], [], []
    for i in range(images):
        best = max(range(checkpoints), key=lambda k: (len(on[i, k]), -k))
        reached.append(distance[best].item())
        union = set().union(*(on[i, k] for k in range(checkpoints)))
        rho += [len(on[i, checkpoints - 1]) / len(union)] if union else []
        last = sets[i, checkpoints - 1]
        ratio += [len(on[i, checkpoints - 1]) / len(last)] if last else []
    return {
        "d_mean": np.mean(reached), "d_std": np.std(reached), "d_variance": np.var(reached),
        "rho": np.mean(rho) if rho else math.nan, "ratio": np.mean(ratio) if ratio else math.nan,
    }  # fmt: skip


@given(seed=st.integers(0, 2**16), threshold=st.sampled_from([0.0, 0.5, 1.5, 3.0]))
def test_metrics_equal_a_plain_loop(seed, threshold):
    entropy = draw(3, 4, 3, 2, seed=seed)
    inside = draw(3, 3, 2, seed=seed + 1) > 0.3
    inside[:, 0, 0] = False
    distance = draw(4, seed=seed + 2).abs().cumsum(0)
    found = concept_metrics(entropy, inside, distance, threshold)
    for name, expected in loop_metrics(entropy, inside, distance, threshold).items():
        value = found.ratio[-1].item() if name == "ratio" else getattr(found, name)
        assert value == pytest.approx(expected, nan_ok=True, rel=1e-12)


def test_images_without_concepts():
    entropy = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    inside = torch.tensor([[True, False], [False, False]])
    entropy[0, 0, 0, 0] = -1  # one concept on the object of the first image, none in the second
    ours, theirs = (
        concept_metrics(entropy, inside, torch.zeros(1), variant=variant)
        for variant in ("default", "official")
    )
    assert (ours.ratio.item(), theirs.ratio.item()) == (1.0, 0.5)
    assert (ours.rho, theirs.rho) == (1.0, 0.5)
    assert ours.undefined.item() == 0.5
    assert math.isnan(ours.rho_background)
    assert theirs.rho_background == 0


def test_baselines_of_each_image_and_of_the_set():
    entropy = torch.zeros(2, 2, 2, dtype=torch.float64)
    entropy[1] = -1  # lies lower as a whole: nothing in itself, everything against the set
    inside = torch.tensor([[True, False], [False, False]])
    one, whole = (concept_counts(entropy, inside, 0.2, baseline=b) for b in ("image", "set"))
    assert one.foreground.tolist() == [0, 0]
    assert whole.foreground.tolist() == [0, 1]
    assert whole.background.tolist() == [0, 3]
    assert one.chance.tolist() == [0.25, 0.25]


def test_threshold_is_strict():
    entropy = torch.tensor([[[-0.5, 0.0], [0.0, 0.0]]])
    inside = torch.tensor([[True, False], [False, False]])
    assert concept_counts(entropy, inside, 0.5).foreground.item() == 0
    assert concept_counts(entropy, inside, 0.49).foreground.item() == 1


def test_first_of_equal_checkpoints_counts():
    entropy = torch.zeros(1, 3, 2, 2)
    entropy[0, 1:, 0, 0] = -1
    inside = torch.tensor([[True, False], [False, False]])
    assert concept_metrics(entropy, inside, torch.tensor([1.0, 2.0, 3.0])).d_mean == 2


def test_weight_distance():
    weights = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0]), torch.tensor([0.0, 9.0])]
    torch.testing.assert_close(weight_distance(weights), torch.tensor([0.0, 1.0, 1.6]).double())
    steps = [draw(5, 4, seed=s) for s in range(9)]
    assert weight_distance(steps)[-1] >= weight_distance(steps[::4])[-1]
    torch.testing.assert_close(weight_distance([7 * w for w in steps]), weight_distance(steps))
    assert weight_distance([torch.ones(3)]).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, f: concept_counts(e, f, -0.1), "threshold: expected a finite number of at least 0"),
        (lambda e, f: concept_counts(e, f, baseline="all"), "baseline: expected one of"),
        (lambda e, f: concept_counts(e, torch.ones_like(f)), "foreground: expected a cell of the background"),
        (lambda e, f: concept_counts(e, f.float()), "foreground: expected bool"),
        (lambda e, f: concept_counts(e, f[:1]), "foreground: expected bool"),
        (lambda e, f: concept_counts(e[0], f[0]), r"entropy: expected \(images, rows, columns\)"),
        (lambda e, f: concept_metrics(e[:, None], f, torch.zeros(2)), r"distance: expected \(1,\)"),
        (
            lambda e, f: concept_metrics(e[:, None], f, torch.zeros(1), variant="x"),
            "variant: expected one of",
        ),
        (lambda e, f: weight_distance([]), "weights: expected tensors of one shape"),
        (lambda e, f: weight_distance([e, e[:1]]), "weights: expected tensors of one shape"),
        (lambda e, f: weight_distance([0 * e, e]), "weights: expected a first tensor that is not zero"),
    ],
)
def test_bad_arguments_of_counts_and_metrics(call, message, unchecked):
    inside = torch.zeros(3, 2, 2, dtype=torch.bool)
    inside[:, 0, 0] = True
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 2, 2), inside)
