"Splits, look-alikes and drift: on the datasets themselves, and where they are planted."
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from publishers import CIFAR, RNG, TEN, cifar
from torchvision.datasets import CIFAR10, CIFAR100

from dinocls import data
from dinocls.data import (
    changed, check_splits, compare_splits, make_splits, mirrored, nearest_pairs, small_pixels, splits, unlabelled)
from dinocls.kit import config
from dinocls.kit.datasets import load_dataset
from dinocls.kit.files import UserError

pytestmark = pytest.mark.usefixtures('place', 'asked_for')


# --- CIFAR-10 itself ---

def test_cifar10_has_the_look_alikes_that_others_found(real):
    "An exact search, of about 8 s on one core. ciFAIR counts 2.86 %."
    train, test = (small_pixels(real.images[real.splits[s]]) for s in ('train', 'test'))
    found = nearest_pairs(train, test, turned=mirrored(test))
    assert 0.025 < found['flagged'].mean() < 0.035
    same_label = real.labels[:50_000][found['index']] == real.labels[50_000:]
    assert same_label[found['flagged']].mean() > 0.9  # they show the same; the nearest of the others seldom do
    assert same_label[~found['flagged']].mean() < 0.5


def test_the_splits_of_the_preset_are_stratified_and_disjoint(cifar10, real, tmp_path):
    cfg = config.preset('cifar', data_root=str(cifar10), out=str(tmp_path/'run'))
    parts = splits(cfg)
    assert {s: np.bincount(real.labels[parts[s]]).tolist() for s in ('train', 'val', 'test')} == {'train': [4500] * 10,
        'val': [500] * 10, 'test': [1000] * 10}
    assert (len(np.unique(np.concatenate([parts[s] for s in ('train', 'val', 'test')]))) == 60_000
            and parts['test'].tolist() == list(range(50_000, 60_000)))
    few = config.preset('cifar', data_root=str(cifar10), train_size=2500, val_size=2500, pretrain_size=40_000,
                        out=str(tmp_path/'few'))
    seen, parts = unlabelled(few), splits(few)
    assert (len(np.unique(seen)) == 40_000 and seen.max() < 50_000 and np.isin(parts['train'], seen).all()
            and not np.isin(seen, parts['val']).any())


# --- small ones ---

def test_the_test_set_can_be_reduced_as_in_the_reference(tmp_path, monkeypatch):
    cifar(monkeypatch, tmp_path, CIFAR10, {'data_batch_1': 100, 'test_batch': 100}, 'label_names', list('abcdefghij'))
    parts = splits(config.preset('cifar', data_root=str(tmp_path), val_size=20, test_size=50, out=str(tmp_path/'run')))
    assert len(parts['test']) == 50 and set(parts['test']) <= set(range(100, 200))
    assert np.bincount(parts['labels'][parts['test']]).tolist() == [5] * 10


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'cifar100'])
def test_splits_are_stratified_disjoint_seeded_and_stored(tmp_path, monkeypatch, name):
    if name == 'cifar10':
        cifar(monkeypatch, tmp_path, CIFAR10, {f: 10 * n for f, n in CIFAR.items()}, 'label_names', TEN)
    if name == 'cifar100':
        cifar(monkeypatch, tmp_path, CIFAR100, {'train': 1000, 'test': 500}, 'fine_label_names',
              [f'class{i}' for i in range(100)])
    make = lambda **more: config.preset('smoke', dataset=name, data_root=str(tmp_path), train_size=0, val_size=200,
                                        test_size=200, out=str(tmp_path/'run'), **more)
    parts, whole = splits(make()), load_dataset(name, tmp_path)
    used = np.concatenate([parts[s] for s in ('train', 'val', 'test')])
    assert len(np.unique(used)) == len(used) == (1797 if name == 'digits' else len(whole.splits['train']) + 200)
    if name != 'digits': assert set(parts['test']) <= set(whole.splits['test'].tolist())
    share = np.bincount(whole.labels) / len(whole.labels)
    for s in ('train', 'val', 'test'):
        assert np.abs(np.bincount(whole.labels[parts[s]], minlength=len(share)) - share * len(parts[s])).max() < 1.5, s
    other = splits(make(split_seed=7))
    assert any(set(other[s]) != set(parts[s]) for s in ('val', 'test'))

    def fails(*args): raise AssertionError('the splits were made anew')
    monkeypatch.setattr(data, 'make_splits', fails)
    again = splits(make())
    for s in ('train', 'val', 'test'): assert np.array_equal(again[s], parts[s])


@pytest.fixture(scope='module')
def digits(): return load_dataset('digits')


def test_honest_splits_pass(digits):
    "Ten draws of digits; the smallest of 120 p-values is what chance allows."
    smallest = []
    for seed in range(10):
        rows = check_splits(compare_splits(digits, make_splits(digits, config.preset('smoke', split_seed=seed))))
        smallest += [row[name] for row in rows for name in row if name.startswith('p_')]
    assert len(smallest) == 120 and np.mean(np.array(smallest) < 0.05) < 0.1


PLANTED = {
    'darker': (lambda x: (x * 0.9).astype(np.uint8), None, 'look|brightness'),
    'less contrast': (lambda x: (x * 0.8 + 20).astype(np.uint8), None, 'look|brightness'),
    'jpeg': (data.as_jpeg, None, 'look'),
    'blurred': (lambda x: ((x.astype(int) + np.roll(x, 1, 0)) // 2).astype(np.uint8), None, 'look'),
    'noise': (lambda x: np.clip(x + RNG.normal(0, 8, x.shape), 0, 255).astype(np.uint8), None, 'look|brightness'),
    'reddish': (lambda x: np.minimum(x * [1.1, 1, .9], 255).astype(np.uint8), None, 'look'),
    'classes moved': (None, lambda y: (y + 1) % 10, 'labels'),
    'classes shuffled': (None, lambda y: np.random.default_rng(0).permutation(y), 'labels'),
}


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('name', PLANTED)
def test_planted_drift_is_found(digits, name, split):
    parts = make_splits(digits, config.preset('quick', train_size=400))
    change, labels, what = PLANTED[name]
    index = parts[split]
    drifted = changed(digits, index, change, None if labels is None else labels(digits.labels[index]))
    with pytest.raises(UserError, match=f'differ in ({what})'): check_splits(compare_splits(drifted, parts))


def test_planted_copies_are_found(digits):
    parts = make_splits(digits, config.preset('quick'))
    few = np.array(digits.images)
    few[parts['test'][:2]] = few[parts['train'][:2]]  # less than 1 %: reported
    rows = check_splits(compare_splits(replace(digits, images=few), parts))
    assert [r['identical_images'] for r in rows] == [0, 2, 0] and 'image' in rows[1]['example']
    few[parts['test'][:20]] = few[parts['train'][:20]]
    with pytest.raises(UserError, match='train – test share 20 pictures pixel for pixel'):
        check_splits(compare_splits(replace(digits, images=few), parts))


@pytest.mark.parametrize('change', [data.as_jpeg, lambda x: x // 2 + 40,
                                    lambda x: np.clip(x + RNG.normal(0, 10, x.shape), 0, 255).astype(np.uint8),
                                    lambda x: x[:, ::-1]],
                         ids=['jpeg', 'contrast', 'noise', 'mirrored'])
def test_look_alikes_are_found_by_the_stage(tmp_path, change, request):
    place, rng = tmp_path/'set', np.random.default_rng(0)
    scene = lambda: np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32),
        Image.Resampling.BICUBIC))
    for c in 'ab':
        for part, n in (('train', 150), ('test', 30)):
            (place/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(scene()).save(place/part/c/f'{i:03}.png')
    leaked = sorted((place/'train').glob('a/*.png'))[:10]
    for f in leaked: Image.fromarray(change(np.asarray(Image.open(f)))).save(place/'test/a'/f.name)
    cfg = config.preset('smoke', dataset='imagefolder', data_root=str(place), train_size=0, val_size=30, test_size=0,
                      out=str(tmp_path/'run'), on_drift='report')  # ten noisy pictures in sixty may be a drift as well
    files = load_dataset('imagefolder', place).files
    found = [f for f in data.look_alikes(cfg)['found'] if f['reported']]
    assert {(files[f['image']], files[f['like']]) for f in found} == {(f'test/a/{f.name}', f'train/a/{f.name}')
                                                                      for f in leaked}
    assert {f['mirrored'] for f in found} == {'mirrored' in request.node.name}


def test_the_mirror_raises_no_alarm_over_honest_digits(digits):
    "A 0, a 1 and an 8 are nearly symmetric; yet of 3,600 honest images hardly one is reported for its mirror image."
    reported = np.zeros(2, int)
    for seed in range(10):
        parts = make_splits(digits, config.preset('quick', split_seed=seed))
        bank, queries = (data.small_pixels(digits.images[parts[s]]) for s in ('train', 'test'))
        found = data.nearest_pairs(bank, queries, turned=data.mirrored(queries))
        reported += [(found['flagged'] & turned).sum() for turned in (~found['mirrored'], found['mirrored'])]
    assert reported[0] <= 10 and reported[1] <= 1, reported


def test_fields_of_an_older_record_are_enough():
    "Weights were made before there was `on_broken`; their record still tells what they have seen."
    from dinocls.model import seen_in_pretraining
    assert seen_in_pretraining(config.preset('quick'))['train'] > 0 and (ROOT/'dinocls').is_dir()


def test_what_the_weights_saw_without_labels_counts(monkeypatch):
    from dinocls import model
    record = model.shipped_record('book-digits')
    changes = {'train_size': 100, 'pretrain_size': 400}
    monkeypatch.setattr(model, 'shipped_record', lambda name: record | {'config': record['config'] | changes})
    cfg = config.preset('quick')  # its splits hold all images
    assert sum(model.seen_in_pretraining(cfg).values()) == 400
    changes['pretrain_size'] = 0
    assert sum(model.seen_in_pretraining(cfg).values()) == 100


def test_a_drift_that_is_meant_is_reported(digits):
    parts = make_splits(digits, config.preset('quick', train_size=400))
    rows = compare_splits(changed(digits, parts['test'], labels=(digits.labels[parts['test']] + 1) % 10), parts)
    with pytest.raises(UserError, match='on_drift=report'): check_splits(rows)
    assert check_splits(rows, 'report') == rows
