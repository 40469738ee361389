"""The basis, the alignments and the transformations, against closed forms and slow twins."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import features
from fkdpipe.networks.features import Basis

FACTS = {"teacher": {"name": "t"}, "tap": "pre"}


def vectors(count: int = 200, width: int = 12) -> np.ndarray:
    """Correlated, off-centre, with decreasing standard deviations."""
    random = np.random.default_rng(3)
    mixing = random.normal(size=(width, width)) * np.geomspace(5, 0.05, width)
    return random.normal(size=(count, width)) @ mixing + random.normal(size=width) * 4


def fitted(x_ND: np.ndarray) -> Basis:
    return features.fit(len(x_ND), x_ND.sum(0), x_ND.T @ x_ND, FACTS)


def test_the_basis_is_the_svd_of_the_centred_matrix_up_to_sign():
    x = vectors()
    basis = fitted(x)
    centred = torch.from_numpy(x - x.mean(0))
    _, singular, right_KD = torch.linalg.svd(centred, full_matrices=False)
    assert np.allclose(basis.mean_D, x.mean(0))
    assert np.allclose(basis.std_K, singular.numpy() / math.sqrt(len(x) - 1))
    cosine = (basis.components_DK * right_KD.T.numpy()).sum(0)
    assert np.allclose(np.abs(cosine), 1)
    largest = np.abs(basis.components_DK).argmax(0)
    assert (basis.components_DK[largest, np.arange(12)] > 0).all()


def test_projections_of_the_fitted_set_are_centred_uncorrelated_and_keep_the_norm():
    x = vectors()
    basis = fitted(x)
    z = basis.project(torch.from_numpy(x), 12).double().numpy()
    assert np.allclose(basis.components_DK.T @ basis.components_DK, np.eye(12))
    assert np.abs(z.mean(0)).max() < 1e-5
    covariance = np.cov(z.T)
    assert np.allclose(covariance, np.diag(basis.std_K**2), atol=1e-4)
    assert np.allclose((z**2).sum(1), ((x - x.mean(0)) ** 2).sum(1), rtol=1e-5)  # Parseval
    assert basis.explained_K[-1] == pytest.approx(1)
    kept = z[:, :3].var(axis=0, ddof=1).sum() / x.var(axis=0, ddof=1).sum()
    assert basis.explained_K[2] == pytest.approx(kept, rel=1e-5)


def test_the_leading_components_are_a_prefix_of_all():
    x = vectors()
    basis = fitted(x)
    z = torch.from_numpy(x)
    assert torch.allclose(basis.project(z, 5), basis.project(z, 12)[:, :5], atol=1e-5)


def test_projecting_ignores_autocast():
    x = vectors()
    basis = fitted(x)
    z = torch.from_numpy(x).float()
    expected = basis.project(z, 8)
    scaled = features.pts(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(basis.project(z, 8), expected)
        assert torch.equal(features.pts(expected), scaled)
        assert features.pts(expected.bfloat16()).dtype == torch.float32


def test_components_that_are_arbitrary_are_refused():
    few = fitted(vectors(count=6))  # six centred vectors span five directions
    assert few.rank == 5
    few.check_components(5)
    with pytest.raises(UsageError, match=r"5 components, fitted on 6 vectors.* more images"):
        few.project(torch.zeros(1, 12), 6)
    with pytest.raises(UsageError, match=r"12 components.*do not help.* method.alignment=variance"):
        fitted(vectors()).check_components(13)


def test_a_basis_survives_its_file_and_other_files_are_refused(tmp_path):
    basis = fitted(vectors())
    features.save_basis(tmp_path / "basis", basis)
    read = features.load_basis(tmp_path / "basis")
    assert read.digest == basis.digest
    assert (read.count, read.facts) == (basis.count, basis.facts)
    assert np.array_equal(read.std_K, basis.std_K)
    (tmp_path / "other").write_bytes(b"not a basis")
    for name in ("other", "missing"):
        with pytest.raises(ModelError, match="not a basis"):
            features.load_basis(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (0.1, 1), (-0.8, -2), (1e-4, 0.1), (100, 10)]
)
def test_pts_has_the_values_of_the_formula(value, expected):
    made = features.pts(torch.tensor([float(value)]))
    assert made.item() == pytest.approx(expected, rel=1e-5)
    assert oracles.pts_inverse(made).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("temperature", "power"), [(0.1, 3.0), (0.01, 2.0), (0.9, 6.0)])
def test_pts_is_odd_rising_homogeneous_and_invertible(temperature, power):
    f = torch.linspace(-30, 30, 601)

    def scale(x):
        return features.pts(x, temperature, power)

    assert torch.equal(scale(-f), -scale(f))
    assert (scale(f).diff() > 0).all()
    assert torch.allclose(scale(2.5 * f), 2.5 ** (1 / power) * scale(f), rtol=1e-5)
    back = oracles.pts_inverse(scale(f), temperature, power)
    assert torch.allclose(back, f, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("s", [0.02, 1.0, 7.0])
def test_pts_of_normal_values_has_the_expected_standard_deviation(s):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * s
    y = features.pts(x).double()
    constant = math.sqrt(2 ** (1 / 3) * math.gamma(5 / 6) / math.sqrt(math.pi))
    assert constant == pytest.approx(0.89576, abs=1e-5)
    assert y.std().item() == pytest.approx(constant * (s / 0.1) ** (1 / 3), rel=3e-3)
    assert (y**2).mean().item() == pytest.approx(0.80238 * (s / 0.1) ** (2 / 3), rel=6e-3)


def test_the_papers_example_of_scale_normalisation_and_std_matching():
    f = torch.tensor([[10.0, 2.0, 2.0]])
    std, target = torch.tensor([50.0, 5.0, 1.0]), torch.tensor([4.0, 3.0, 2.0])
    assert torch.allclose(features.scale_normalise(f, std), torch.tensor([[0.2, 0.4, 2.0]]))
    assert torch.allclose(features.std_match(f, std, target), torch.tensor([[0.8, 1.2, 4.0]]))


def test_std_matching_gives_components_the_standard_deviations_of_the_widest_channels():
    x = vectors()
    basis = fitted(x)
    wanted = features.target_std(basis, 4)
    assert np.allclose(wanted, np.sort(x.std(axis=0, ddof=1))[::-1][:4])
    z = basis.project(torch.from_numpy(x), 4)
    matched = features.std_match(
        z, torch.from_numpy(basis.std_K[:4]).float(), torch.from_numpy(wanted).float()
    )
    assert np.allclose(matched.std(0).numpy(), wanted, rtol=1e-4)


def test_channels_are_chosen_by_variance_or_at_random():
    std = np.array([3.0, 1.0, 5.0, 3.0])
    assert features.leading_channels(std, 3).tolist() == [2, 0, 3]
    chosen = features.random_channels(50, 20, seed=1)
    assert len(set(chosen.tolist())) == 20
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.tolist() == features.random_channels(50, 20, seed=1).tolist()
    assert chosen.tolist() != features.random_channels(50, 20, seed=2).tolist()
    with pytest.raises(UsageError, match="5 channels cannot be chosen from 4"):
        features.leading_channels(std, 5)


def test_nearest_interpolation_takes_every_second_of_eight():
    made = features.interpolate(torch.arange(8.0)[None], 4)
    assert made.tolist() == [[0, 2, 4, 6]]


def test_the_std_ratio_leaves_dead_channels_out():
    assert features.std_ratio(np.array([4.0, 0.0, 2.0])) == 2.0


def test_std_ratios_of_a_basis_agree_with_measured_features():
    """Normal features, so that the formula of PTS holds for their components."""
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    x = (random.normal(size=(60_000, 6)) * np.geomspace(8, 0.1, 6)) @ rotation.T + 3
    basis = fitted(x)
    told = features.std_ratios(basis, 6)
    z = basis.project(torch.from_numpy(x), 6)
    assert told["raw"] == pytest.approx(features.std_ratio(x.std(0)), rel=1e-4)
    assert told["svd"] == pytest.approx(features.std_ratio(z.numpy().std(0)), rel=1e-3)
    assert told["pts"] == pytest.approx(
        features.std_ratio(features.pts(z).numpy().std(0)), rel=2e-2
    )
    assert told["pts"] == pytest.approx(told["svd"] ** (1 / 3))
    assert told["sm"] == told["raw"]  # all six channels are kept
    assert told["svd"] > told["pts"] > told["sn"] == 1
