"""All figures against pytorch-fid, torch-fidelity and torchmetrics, given the same features."""

import warnings

import numpy as np
import pytest
import torch
from reference_metrics import import_references

import eval_fid
from evaluation.kid import kernel_distance
from evaluation.manifold import manifold

import_references()

from pytorch_fid.fid_score import calculate_frechet_distance  # noqa: E402
from torch_fidelity.metric_fid import (  # noqa: E402
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402
from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: E402
from torchmetrics.image.inception import InceptionScore  # noqa: E402
from torchmetrics.image.kid import KernelInceptionDistance  # noqa: E402


class Features(torch.nn.Identity):
    """Takes features for images."""

    num_features = 96


@pytest.fixture(scope="module")
def feats():
    """(fake, real) float32 (N, 96) that are correlated, not negative and far from 0, as of ReLU."""
    rng = np.random.default_rng(0)
    mixing, scale = rng.normal(size=(96, 96)) / 10, np.arange(1, 97) ** -0.5
    fake = np.maximum(rng.normal(0.1, 1.05, (700, 96)) * scale @ mixing + 0.4, 0)
    real = np.maximum(rng.normal(0.0, 1.00, (600, 96)) * scale @ mixing + 0.4, 0)
    return fake.astype(np.float32), real.astype(np.float32)


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(1).normal(0, 2, (700, 50)).astype(np.float32)


def frechet(fake, real, method="eigen"):
    sides = eval_fid.statistics(fake), eval_fid.statistics(real)
    return eval_fid.frechet_distance(*sides[0], *sides[1], method=method)


@pytest.mark.parametrize("method", ["eigen", "sqrtm"])
@pytest.mark.parametrize("n", [700, 60], ids=["more than dims", "fewer than dims"])
def test_frechet_distance(feats, method, n):
    fake, real = feats[0][:n], feats[1]
    got = frechet(fake, real, method)
    sides = [(v.astype(np.float64).mean(0), np.cov(v, rowvar=False)) for v in (fake, real)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy: an argument is on its way out
        assert got == pytest.approx(calculate_frechet_distance(*sides[0], *sides[1]), rel=1e-6)
    doubles = [torch.from_numpy(v).double() for v in (fake, real)]
    theirs = [fid_features_to_statistics(v) for v in doubles]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert got == pytest.approx(expected, rel=1e-6)
    judge = FrechetInceptionDistance(Features()).set_dtype(torch.float64)
    judge.update(doubles[1], real=True)
    judge.update(doubles[0], real=False)
    assert got == pytest.approx(judge.compute().item(), rel=1e-6)


def test_inception_score_of_torch_fidelity(logits):
    theirs = isc_features_to_metric(torch.from_numpy(logits[:695]), splits=10, shuffle=False)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert eval_fid.inception_score(logits[:695]) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_torchmetrics(logits, monkeypatch):
    judge = InceptionScore(Features(), splits=10)
    judge.update(torch.from_numpy(logits).double())
    monkeypatch.setattr(torch, "randperm", torch.arange)  # it would shuffle
    mean, std = (v.item() for v in judge.compute())
    expected = mean, std * 0.9**0.5  # divided by 9 there
    assert eval_fid.inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance(feats):
    fake, real = feats[0][:600], feats[1]  # a subset of all is the same for everyone
    got, _ = kernel_distance(fake, real, subsets=1, subset_size=600)
    doubles = [torch.from_numpy(v).double() for v in (fake, real)]
    theirs = kid_features_to_metric(*doubles, kid_subsets=1, kid_subset_size=600, verbose=False)
    assert got == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    judge = KernelInceptionDistance(Features(), subsets=1, subset_size=600)
    judge.update(doubles[1], real=True)
    judge.update(doubles[0], real=False)
    assert got == pytest.approx(judge.compute()[0].item(), rel=1e-9)


def test_kernel_distance_of_subsets(feats):
    """Other draws, so within what chance allows: their spread over the subsets, by their number."""
    got, error = kernel_distance(*feats, subsets=50, subset_size=200)
    doubles = [torch.from_numpy(v).double() for v in feats]
    theirs = kid_features_to_metric(*doubles, kid_subsets=50, kid_subset_size=200, verbose=False)
    spread = theirs["kernel_inception_distance_std"] / 50**0.5
    assert abs(got - theirs["kernel_inception_distance_mean"]) < 3 * 2**0.5 * spread
    assert error > spread  # other images would differ too, not other subsets only


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall(feats, k):
    fake, real = feats
    got = manifold(real, fake, k=k)
    doubles = [torch.from_numpy(v).double() for v in (fake, real)]
    theirs = prc_features_to_metric(*doubles, prc_neighborhood=k, verbose=False)
    assert got["precision"] == pytest.approx(theirs["precision"], rel=1e-6)  # a mean in float32
    assert got["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.1 < got["precision"] < 0.95 and 0.1 < got["recall"] < 0.95
