"The numbers drawn from what models answer to corrupted images."
from functools import partial

import numpy as np
import pytest

from dinocls import report, robustness, stats
from dinocls.kit import config
from dinocls.kit.corruptions import CORRUPTIONS
from dinocls.robustness import drop, robustness_metrics
from dinocls.stats import mean_interval


def made_up(wrong=(1, 1, 1, 2, 2, 2), n=10) -> dict:
    "Return a result in which each model errs on its number of images under corruption, and on none clean."
    lost = np.array(wrong)[:, None] > np.arange(n)
    result = {'names': list(CORRUPTIONS), 'classes': 10, 'labels': np.zeros(n, int),
              'clean_guess': np.zeros((6, n), int), 'clean_confidence': np.full((6, n), .9)}
    for name in CORRUPTIONS:
        result |= {f'{name}_guess': np.tile(lost, 5).astype(int), f'{name}_confidence': np.full((6, 5 * n), .9)}
    return result


def test_the_report_finds_its_numbers():
    rows = [{'chapter': '12_robustness', **r} for r in robustness_metrics(made_up(), 42)]
    asked = [spec for spec in report.reference() if spec['chapter'] == '12_robustness']
    assert len(asked) == 10
    for spec in asked:
        found = report.find(rows, spec)
        assert found['value'] == pytest.approx(1.0 if spec['metric'] == 'clean' else 0.2 if 'drop' in spec['metric']
                                               else 0.8)
    assert len({(r['metric'], r.get('severity')) for r in rows}) == len(rows)


def test_an_interval_covers_the_mean_it_estimates():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        hard = rng.random(80) ** 3  # images differ: severities of one image are no new images
        before, after = rng.random((5, 80)) < 1 - hard / 2, rng.random((5, 80)) < 1 - hard
        inside += (d := drop(before, after))['drop_low'] <= 100 / 8 <= d['drop_high']
    assert 0.92 < inside / 500 <= 0.995
    assert mean_interval(np.zeros(50))[0] == 0 and mean_interval(np.zeros(50))[1] < 0 < mean_interval(np.zeros(50))[2]


def test_a_killed_run_goes_on_with_the_next_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(robustness, 'contenders', lambda cfg: {})
    monkeypatch.setattr(robustness, 'with_probes',
                        lambda cfg, parts: {name: int(p['seen'][0]) for name, p in parts.items()})
    def answers(nets, images, cfg):
        asked.append(images)
        if images == 2 and len(asked) < 3: raise KeyboardInterrupt
        return {'seen': np.array([images])}
    monkeypatch.setattr(robustness, 'answers', answers)
    sets = {f'set{i}': lambda i=i: i for i in (1, 2, 3)}
    with pytest.raises(KeyboardInterrupt): robustness.judge(None, sets, tmp_path)
    assert robustness.judge(None, sets, tmp_path) == {'set1': 1, 'set2': 2, 'set3': 3}
    assert asked == [1, 2, 2, 3]


def test_published_sets_belong_to_cifar10(capsys):
    assert robustness.published_rows(config.preset('smoke')) == []
    assert capsys.readouterr().out.count('this run is of digits') == 2


@pytest.mark.slow
@pytest.mark.parametrize('share', [0.04, 0.1])
def test_a_ratio_of_errors_is_covered_though_few_images_err(share, monkeypatch):
    monkeypatch.setattr(robustness, 'bootstrap', partial(stats.bootstrap, draws=200))
    rng, inside = np.random.default_rng(0), 0
    def wrong(n):
        hard = np.where(rng.random(n) < share, rng.beta(2, 2, n), 0.001)
        own = np.where(rng.random(n) < 0.02, rng.random(n), 0)
        other = np.clip(hard * rng.uniform(0.2, 1.8, n) + own, 0, 1)
        return rng.binomial(75, other) / 75, rng.binomial(75, hard) / 75
    true = 100 * np.divide(*(x.mean() for x in wrong(500_000)))
    for _ in range(200):
        found = robustness.error_ratio('r', *wrong(80))
        inside += found['r_low'] <= true <= (np.inf if np.isnan(found['r_high']) else found['r_high'])
    assert inside / 200 > 0.93  # a plain bootstrap: 0.84 to 0.93
