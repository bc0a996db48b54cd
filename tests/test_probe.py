"Neighbours, votes and linear probes beside independent computations, and on what they should refuse."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinocls.kit.files import UserError
from dinocls.probe import (
    RATES, STRENGTHS, between_share, few_shot, knn, knn_curve, layouts, linear_probe, logistic, neighbours, sgd_probe,
    spaced,
    vote)


def unit(n: int, dim: int, seed: int = 0, offset: float = 0.):
    return F.normalize(offset + torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- neighbours


@pytest.mark.parametrize('n, k', [(n, k) for n in (1, 2, 17, 257, 1000, 8192, 8193, 20_000) for k in (1, 3, 50, 200)
                                  if k <= n])
def test_neighbours_are_those_of_sorting(n, k):
    bank, queries = unit(n, 24), unit(1030 if n == 257 else 100, 24, 1)
    want = (queries.double() @ bank.double().T).topk(k).values
    similar, index = neighbours(bank, queries, k)
    torch.testing.assert_close(similar.double(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.einsum('md,mkd->mk', queries, bank[index]), similar, atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in index.tolist())  # nobody twice


def test_neighbours_agree_with_scikit_learn():
    from sklearn.neighbors import NearestNeighbors
    bank, queries = unit(3000, 64, offset=0.3).numpy(), unit(200, 64, 1, offset=0.3).numpy()
    distance, index = NearestNeighbors(n_neighbors=20, metric='cosine', algorithm='brute').fit(bank).kneighbors(queries)
    similar, found = neighbours(bank, queries, 20)
    assert (found.numpy() == index).mean() > 0.999
    np.testing.assert_allclose(similar, 1 - distance, atol=1e-5)


def test_lengths_do_not_count():
    bank, queries = unit(500, 16), unit(50, 16, 1)
    longer = bank * torch.linspace(0.01, 100, 500)[:, None]
    assert (neighbours(longer, 7 * queries, 5)[1] == neighbours(bank, queries, 5)[1]).all()


@pytest.mark.parametrize('bank, queries, k, needed', [
    (np.zeros(3), np.zeros((2, 3)), 1, 'must be a matrix'),
    (np.zeros((4, 3)), np.zeros((2, 2)), 1, 'embed both with one model'),
    (np.full((4, 3), np.nan), np.zeros((2, 3)), 1, 'not finite'),
    (np.ones((4, 3)), np.full((2, 3), np.inf), 1, 'not finite'), (np.ones((4, 3)), np.ones((2, 3)), 0, 'use 1 to 4'),
    (np.ones((4, 3)), np.ones((2, 3)), 5, 'use 1 to 4')])
def test_what_is_no_bank_is_refused(bank, queries, k, needed):
    with pytest.raises(UserError, match=needed): neighbours(bank, queries, k)


# --- votes


def by_hand(similarities, labels, temperature=None):
    "Vote one query at a time, as one would say it."
    out = []
    for row, names in zip(similarities.tolist(), labels.tolist()):
        weight = {}
        for s, name in zip(row, names):
            weight[name] = weight.get(name, 0) + (1 if temperature is None else np.exp((s - row[0]) / temperature))
        most = max(weight.values())
        out.append(next(name for name in names if weight[name] >= most * (1 - 1e-6)))
    return out


@pytest.mark.parametrize('temperature', [None, 0.07, 1.0])
@pytest.mark.parametrize('k', [1, 2, 3, 10, 100])
def test_votes_are_those_by_hand(k, temperature):
    rng = torch.Generator().manual_seed(k)
    similarities, labels = torch.rand(200, k, generator=rng).sort(1, descending=True).values, torch.randint(0, 4,
        (200, k), generator=rng) * 3 - 2
    assert vote(similarities, labels, temperature).tolist() == by_hand(similarities, labels, temperature)


def test_a_label_without_neighbours_and_no_queries():
    bank = unit(10, 4)
    assert knn(bank, np.arange(10), np.empty((0, 4)), 3).shape == (0,)
    with pytest.raises(UserError, match='one label each'): knn(bank, np.arange(9), bank, 3)
    with pytest.raises(UserError, match='above 0'): knn(bank, np.arange(10), bank, 3, temperature=-1)


def test_all_k_come_from_one_search():
    bank, labels, queries = unit(300, 8), np.arange(300) % 5, unit(100, 8, 1)
    truth = np.arange(100) % 5
    equal, weighted = knn_curve(bank, labels, queries, truth, temperatures=(None, 0.07))
    assert [p['k'] for p in equal] == [1, 3, 5, 10, 20, 50, 100, 200]
    for rows, t in ((equal, None), (weighted, 0.07)):
        assert [p['accuracy'] for p in rows] == [(knn(bank, labels, queries, p['k'], t) == truth).mean() for p in rows]


# --- linear probes


def problem(n: int, dim: int, classes: int, seed: int = 0):
    "Return correlated standardised features of classes that overlap, and labels."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = (rng.normal(size=(classes, dim))[labels] + 2
         * rng.normal(size=(n, dim))) @ (rng.normal(size=(dim, dim)) / np.arange(1, dim + 1))
    return (x - x.mean(0)) / x.std(0), labels


def objective(x, labels, weights, C):
    logits = torch.from_numpy(x) @ weights[:, :-1].T + weights[:, -1]
    return float(C * F.cross_entropy(logits, torch.from_numpy(labels), reduction='sum') + weights[:,
        :-1].square().sum() / 2)


@pytest.mark.parametrize('n, dim, classes', [(400, 30, 5), (400, 30, 2), (60, 200, 3)],
                         ids=['many images', 'two classes', 'more features than images'])
def test_the_fit_is_scikit_learns(n, dim, classes):
    from sklearn.linear_model import LogisticRegression
    x, labels = problem(n, dim, classes)
    for C, weights, converged in logistic(torch.from_numpy(x), torch.from_numpy(labels), (1e-3, 0.1, 10.)):
        theirs = LogisticRegression(C=C, tol=1e-9, max_iter=20_000).fit(x, labels)
        assert converged
        mine = F.softmax(torch.from_numpy(x) @ weights[:, :-1].T + weights[:, -1], 1).numpy()
        np.testing.assert_allclose(mine, theirs.predict_proba(x), atol=2e-4)
        if classes > 2:
            others = torch.from_numpy(np.c_[theirs.coef_, theirs.intercept_])
            assert objective(x, labels, weights, C) <= objective(x, labels, others, C) * (1 + 1e-5)


def test_single_precision_ends_at_the_minimum():
    x, labels = problem(12_000, 40, 4)
    for C, weights, _ in logistic(torch.from_numpy(x), torch.from_numpy(labels), STRENGTHS):
        tilted = weights.clone().requires_grad_()
        loss = C * F.cross_entropy(torch.from_numpy(x) @ tilted[:, :-1].T + tilted[:, -1], torch.from_numpy(labels),
                                   reduction='sum') + tilted[:, :-1].square().sum() / 2
        loss.backward()
        assert tilted.grad.abs().max() / (C * len(x)) < 1e-4


def test_strength_is_chosen_on_validation_alone():
    x, labels = problem(300, 20, 3)
    rng = np.random.default_rng(1)
    a, b = (linear_probe(x[:100], labels[:100], x[100:200], labels[100:200], test)
            for test in (x[200:], rng.normal(size=(100, 20))))
    assert a['C'] == b['C'] and a['grid'] == b['grid']
    assert (a['val_accuracy'] == max(g['val_accuracy'] for g in a['grid'])
            and a['C'] == next(g['C'] for g in a['grid'] if g['val_accuracy'] == a['val_accuracy']))


def test_probes_take_labels_of_any_kind_and_refuse_one_class():
    x, labels = problem(200, 10, 3)
    names = np.array(['cat', 'dog', 'frog'])[labels]
    for probe in (linear_probe, lambda *a: sgd_probe(*a, steps=200)):
        assert set(probe(x[:100], names[:100], x[100:], names[100:])['val_predictions']) <= set(names)
    with pytest.raises(UserError, match='at least two classes'): linear_probe(x, np.zeros(200), x, np.zeros(200))


def test_rates_side_by_side_are_rates_alone():
    x, labels = problem(300, 12, 4)
    parts = x[:200], labels[:200], x[200:], labels[200:]
    together = sgd_probe(*parts, steps=150)['grid']
    assert [g['rate'] for g in together] == list(RATES)
    assert together == [sgd_probe(*parts, rates=(r,), steps=150)['grid'][0] for r in RATES]


def test_a_rate_alone_is_torchs_own_sgd():
    x, labels = problem(200, 6, 3)
    x = (x - x.mean(0)) / x.std(0)
    layer, generator = torch.nn.Linear(6, 3).double(), torch.Generator().manual_seed(0)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    for step in range(50):
        pick = torch.randint(200, (128,), generator=generator)
        optimiser.zero_grad()
        # the rate multiplies the gradient
        (0.1 * 128 / 256 * F.cross_entropy(layer(torch.from_numpy(x)[pick]),
                                           torch.from_numpy(labels)[pick])).backward()
        optimiser.param_groups[0]['lr'] = 0.5 * (1 + np.cos(np.pi * step / 50))
        optimiser.step()
    want = layer(torch.from_numpy(x)).argmax(1).numpy()
    assert (sgd_probe(x, labels, x, labels, rates=(0.1,), steps=50)['val_predictions'] == want).mean() > 0.99


# --- few labels, maps, comparisons


def test_draws_are_the_same_for_every_representation():
    x, labels = problem(300, 10, 3)
    seen = []
    for scale in (1., 3.):
        rows = few_shot({'train': (scale * x[:200]).astype(np.float32), 'test': (scale * x[200:]).astype(np.float32)},
                        {'train': labels[:200], 'test': labels[200:]}, shots=(1, 5), draws=3)
        seen.append([r['accuracy'] for r in rows])
    np.testing.assert_allclose(*seen, atol=0.021)
    assert len(seen[0]) == 2 * 3 * 2


def test_between_share_is_the_ratio_of_sums_of_squares():
    x, labels = problem(300, 5, 4)
    total = ((x - x.mean(0)) ** 2).sum()
    between = sum((labels == c).sum() * ((x[labels == c].mean(0) - x.mean(0)) ** 2).sum() for c in range(4))
    assert between_share(x, labels) == pytest.approx(between / total)


def test_layouts_repeat_and_pictures_do_not_cover_each_other():
    x = problem(120, 8, 3)[0].astype(np.float32)
    a, b = layouts(x, 80), layouts(x, 80)
    for part in a: np.testing.assert_array_equal(a[part], b[part])
    shown = spaced(a['tsne'], np.zeros(80, bool))
    place = (a['tsne'][shown] - a['tsne'].min(0)) / np.ptp(a['tsne'], axis=0)
    gaps = np.abs(place[:, None] - place[None]).max(-1)
    assert 1 < len(shown) < 80 and gaps[np.triu_indices(len(shown), 1)].min() >= 0.036
