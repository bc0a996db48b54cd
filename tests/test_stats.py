"Statistics against independent computations: scores and risks by their definitions, coverage by theory, tests by hand."
import numpy as np
import pytest
from conftest import answers
from scipy.stats import betabinom, binom

from dinocls import stats


def test_scores_by_the_definitions():
    p, y = answers(300)
    found = stats.probability_scores(p, y)
    assert found['brier'] == pytest.approx(np.mean([((row - np.eye(6)[c]) ** 2).sum() for row, c in zip(p, y)]))
    assert found['nll'] == pytest.approx(np.mean([-np.log(row[c]) for row, c in zip(p, y)]))
    order = sorted(range(300), key=lambda i: p[i].max())
    gaps = [abs(np.mean([p[i].argmax() == y[i] for i in part]) - np.mean([p[i].max() for i in part]))
            for part in np.array_split(order, 15)]
    assert found['ece_mass'] == pytest.approx(np.mean(gaps))
    sharpened = p ** 3 / (p ** 3).sum(1, keepdims=True)
    assert all(stats.probability_scores(sharpened, y)[k] > found[k]
               for k in found), 'each score sees that these are too sure'


def test_risk_by_counting():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(50), rng.random(50) < 0.7
    curve = stats.risk_coverage(confidence, right)
    for k in (1, 7, 50): assert curve['risk'][k - 1] == pytest.approx(np.mean(~right[np.argsort(-confidence)[:k]]))
    assert curve['least'] <= curve['aurc'] == pytest.approx(curve['risk'].mean())
    assert stats.risk_coverage(right.astype(float), right)['aurc'] == pytest.approx(curve['least'])


@pytest.mark.parametrize('miss', [0.2, 0.05])
def test_sets_cover_as_the_theory_says(miss):
    "Over draws of the held-out images, the number covered follows a beta-binomial distribution."
    p, y = answers(60_000)
    m = n = 100
    covered = np.array([stats.conformal_sets(p[i + m:i + m + n], p[i:i + m], y[i:i + m], miss)[np.arange(n),
        y[i + m:i + m + n]].sum() for i in range(0, 60_000, m + n)])
    missed = int(np.floor((m + 1) * miss + 1e-9))
    expected = betabinom(n, m + 1 - missed, missed)
    assert abs(covered.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(len(covered))
    assert 0.8 < covered.std() / expected.std() < 1.2
    assert covered.std() > 1.15 * binom(n, 1 - miss).std(), 'the threshold is drawn as well'


def test_sets_grow_with_the_promise_and_say_everything_when_they_must():
    p, y = answers(500)
    small, large = (stats.conformal_sets(p, p, y, miss) for miss in (0.3, 0.01))
    assert (small <= large).all() and small.sum() < large.sum()
    assert stats.conformal_sets(p, p[:5], y[:5], 0.01).all()


@pytest.mark.parametrize('right, n, holds', [(0.5, 500, True), (0.05, 500, False), (0.11, 500, None), (0.2, 10, None)])
def test_a_share_of_few_images_tells_nothing(right, n, holds):
    assert stats.beyond(*stats.wilson(right, n), 0.1) is holds


@pytest.mark.parametrize('only_a, only_b, harmless, helps',
                         [(0, 0, True, None), (1, 30, True, True), (40, 5, False, False), (12, 9, None, None)])
def test_harm_and_help_need_an_interval(only_a, only_b, harmless, helps):
    a, b = np.zeros((2, 1000), bool)
    a[:only_a] = b[only_a:only_a + only_b] = True
    gain, *ends = stats.gained(a, b)
    assert gain == pytest.approx((only_b - only_a) / 1000) and ends[0] < gain < ends[1]
    assert (stats.beyond(*ends, -0.01), stats.beyond(*ends)) == (harmless, helps)


def test_signs_are_tossed_for_all_rows_alike():
    d = np.random.default_rng(0).normal(0.4, 1, (9, 3))
    score = d / np.sqrt((d ** 2).sum(0))
    signs = 2 * (np.arange(2 ** 9)[:, None] >> np.arange(9) & 1) - 1  # (512, 9): every way
    top = np.abs(signs @ score).max(1)
    assert stats.max_t(d) == pytest.approx([(top >= abs(s) - 1e-12).mean() for s in score.sum(0)])
    assert (stats.max_t(np.c_[d, d]) == pytest.approx(np.tile(stats.max_t(d), 2)))  # twins are not corrected for twice


def test_bootstrap_covers_and_is_repeatable():
    rng = np.random.default_rng(0)
    inside = [low <= 0.9 <= high for _, low, high in (stats.bootstrap(np.mean, rng.random(200) < 0.9, draws=200)
                                                      for _ in range(100))]
    assert 0.86 <= np.mean(inside) <= 1
    assert stats.bootstrap(np.mean, np.arange(9)) == stats.bootstrap(np.mean, np.arange(9))


@pytest.mark.parametrize('true, allowed', [(0, 'differs'), (0.005, 'agrees'), (-0.005, 'agrees')])
@pytest.mark.parametrize('ours', [2000, 10_000])
def test_at_most_one_verdict_in_twenty_is_wrong(true, allowed, ours):
    "Shares of 5,000 and of other numbers of images, equal, or a margin of half a point apart."
    rng, theirs, said = np.random.default_rng(0), 0.98, []
    for _ in range(400):
        a, b = rng.binomial(5000, theirs) / 5000, rng.binomial(ours, theirs + true) / ours
        error = np.hypot(*(stats.standard_error(*stats.wilson(x, n)) for x, n in ((a, 5000), (b, ours))))
        said.append(stats.verdict(b - a, error, 0.005)['verdict'])
    assert np.mean([s == allowed for s in said]) <= 0.07  # 5 %, and three standard errors of 400 draws are 3.3


@pytest.mark.parametrize('seeds, images', [(3, 80), (8, 80), (8, 360)])
def test_an_interval_for_other_seeds_and_other_images(seeds, images):
    "Answers of two methods: images of unlike difficulty, seeds of unlike luck."
    rng = np.random.default_rng(1)

    def differences(seeds, images):
        hard, own = rng.normal(0, 2.5, (1, images)), rng.normal(0, 0.3, (2, seeds, 1))
        right = rng.logistic(size=(2, seeds, images)) < 3 + hard + own + np.array([0, 1])[:, None, None]
        return right[1].astype(float) - right[0]
    true = differences(2000, 2000).mean()
    held = [(r['low'] or 0) <= true <= (r['high'] or 0) for r in (stats.two_way(differences(seeds, images))
                                                                  for _ in range(300))]
    assert np.mean(held) > 0.91


def test_a_calibrated_model_is_not_called_wrong():
    p, y = answers(6000)
    some = [(p[i:i + 200], y[i:i + 200]) for i in range(0, 6000, 200)]
    assert np.mean([stats.debiased_calibration_error(*s, draws=50)[1] == 0 for s in some]) > 0.9
    sharp = p ** 3 / (p ** 3).sum(1, keepdims=True)
    value, low, high = stats.debiased_calibration_error(sharp, y, draws=200)
    assert 0 < low < value < high and value >= stats.equal_mass_error(sharp, y) - 0.01
