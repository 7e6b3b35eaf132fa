"""Calibration against scikit-learn, torchmetrics and statsmodels."""

import math

import numpy as np
import pytest
import statsmodels.api
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error
from verdicts import judged_row, preference

from dwrl_fast.evaluation.calibration import BINS, calibration, fit_temperature, sigmoid
from dwrl_fast.evaluation.pairs import pair_report
from dwrl_fast.evaluation.table import PairTable
from dwrl_fast.evaluation.units import Units

rng = np.random.default_rng(0)
GAP = rng.normal(0.4, 1.5, 2000)
EVEN = np.ones(len(GAP))
WEIGHT = rng.choice([1.0, 1 / 3, 1 / 6], len(GAP))


def both(values: np.ndarray) -> np.ndarray:
    """Each pair in both orders, so that there are two classes."""
    return np.concatenate([values, values])


LABEL = np.concatenate([np.ones(len(GAP)), np.zeros(len(GAP))])
P = np.concatenate([sigmoid(GAP), sigmoid(-GAP)])


@pytest.mark.parametrize("weight", [EVEN, WEIGHT])
def test_likelihood_and_brier_are_scikit_learns(weight: np.ndarray) -> None:
    found = calibration(GAP, weight)
    assert found.nll == pytest.approx(log_loss(LABEL, P, sample_weight=both(weight)), abs=1e-9)
    assert found.brier == pytest.approx(brier_score_loss(LABEL, P, sample_weight=both(weight)), abs=1e-9)


def test_likelihood_is_that_of_the_pair_report() -> None:
    scores = torch.tensor(np.stack([GAP, np.zeros_like(GAP)], -1))
    assert calibration(GAP, EVEN).nll == pytest.approx(pair_report(scores, [(1, 2)] * len(GAP)).nll, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_the_calibration_error_is_that_of_torchmetrics(temperature: float) -> None:
    found = calibration(GAP, EVEN, temperature)
    confidence, right = torch.tensor(sigmoid(np.abs(GAP) / temperature)), torch.tensor(GAP > 0).long()
    expected = binary_calibration_error(confidence, right, n_bins=2 * BINS, norm="l1")  # of which half are empty
    assert found.error == pytest.approx(expected.item(), abs=1e-9)
    twice = binary_calibration_error(
        torch.tensor(sigmoid(np.concatenate([GAP, -GAP]) / temperature)), torch.tensor(LABEL).long(), n_bins=2 * BINS
    )
    assert found.error == pytest.approx(twice.item(), abs=1e-9), "which response is called the first means nothing"


def test_the_bins_are_scikit_learns() -> None:
    bins = calibration(GAP, EVEN).bins
    # From one half to 1 in ten bins; scikit-learn's run from 0 to 1.
    accuracy, confidence = calibration_curve(GAP > 0, 2 * sigmoid(np.abs(GAP)) - 1, n_bins=BINS)
    assert [b.accuracy for b in bins] == pytest.approx(accuracy, abs=1e-9)
    assert [2 * b.confidence - 1 for b in bins] == pytest.approx(confidence, abs=1e-9)
    assert sum(b.share for b in bins) == pytest.approx(1)


def test_ties_and_infinities() -> None:
    found = calibration(np.array([0.0, math.inf, -math.inf]), np.ones(3))
    assert [(b.low, b.accuracy) for b in found.bins] == [(0.5, 0.5), (pytest.approx(0.95), 0.5)]
    assert found.brier == pytest.approx((0.25 + 0 + 1) / 3) and found.nll == math.inf
    assert found.error == pytest.approx(2 / 3 * 0.5)


@pytest.mark.parametrize("weight", [EVEN, WEIGHT])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_the_temperature_is_that_of_a_logistic_regression(weight: np.ndarray, scale: float) -> None:
    model = statsmodels.api.GLM(
        LABEL, np.concatenate([GAP, -GAP])[:, None], statsmodels.api.families.Binomial(), freq_weights=both(weight)
    )
    expected = scale / model.fit(tol=1e-14, maxiter=200).params[0]
    found = fit_temperature(GAP * scale, weight)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found is not None
    best = calibration(GAP * scale, weight, found).nll
    assert best < calibration(GAP * scale, weight, found * 1.01).nll
    assert best < calibration(GAP * scale, weight, found / 1.01).nll


def test_a_temperature_that_is_none() -> None:
    two = np.ones(2)
    assert fit_temperature(np.array([1.0, 2.0]), two) is None, "all right: the likelihood has no highest"
    assert fit_temperature(np.array([1.0, -1.0]), two) is None, "right as often as wrong"
    assert fit_temperature(np.array([]), np.array([])) is None
    some = fit_temperature(np.array([2.0, -1.0, 2.0]), np.ones(3))
    assert fit_temperature(np.array([2.0, -1.0, 2.0, -math.inf, math.inf, 0.0]), np.ones(6)) == some


def test_rows_of_several_pairs_count_as_one() -> None:
    rows = [judged_row([2.0, 1.0]), judged_row([0.0, 1.0, 3.0], (1, 2, 2)), judged_row([0.0, 1.0], (1, 1))]
    preferences = [preference(2), preference(3), preference(2)]
    table = PairTable.of(rows, preferences, Units.of(preferences))
    assert table.group.tolist() == [0, 1, 1] and table.gap.tolist() == [1, -1, -3]
    assert table.units.weight.tolist() == [1, 0.5, 0.5] and table.longer.tolist() == [-1, -1, -2]
    by_hand = (sigmoid(np.array(-1.0)) ** 2 + (sigmoid(np.array(1.0)) ** 2 + sigmoid(np.array(3.0)) ** 2) / 2) / 2
    assert calibration(table.gap, table.units.weight).brier == pytest.approx(by_hand)
