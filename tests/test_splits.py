"Chapter 1: splits, and leaks and drift that are planted."
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dinocls import data, model
from dinocls.data import (
    check_splits, compare_splits, halves, load_split, look_alikes, make_splits, mirrored, nearest_pairs,
    sample_unlabelled, small_pixels, splits, unlabelled)
from dinocls.kit import config, datasets, files
from dinocls.kit.datasets import Dataset, load_dataset
from dinocls.model import seen_in_pretraining

RNG = np.random.default_rng(0)
PARTS = ('train', 'val', 'test')


@pytest.fixture(scope='module')
def digits(): return load_dataset('digits')


def published(classes: int, train: int, test: int) -> Dataset:
    "Return a set of noise whose publisher made a test part."
    n = train + test
    return Dataset('published', RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % classes,
                   [f'class{i}' for i in range(classes)], {'train': np.arange(train), 'test': np.arange(train, n)})


@pytest.fixture
def load(monkeypatch):
    "Let the stages load a given set in place of a configured one."
    def put(whole):
        monkeypatch.setitem(datasets.LOADERS, 'imagefolder', lambda *_: whole)
        datasets._loaded.cache_clear()
    yield put
    datasets._loaded.cache_clear()


def test_the_test_set_can_be_reduced_as_in_the_reference():
    whole = published(10, 100, 100)
    parts = make_splits(whole, config.preset('cifar', val_size=20, test_size=50))
    assert len(parts['test']) == 50 and set(parts['test']) <= set(range(100, 200))
    assert np.bincount(whole.labels[parts['test']]).tolist() == [5] * 10


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits', 'ten classes', 'a hundred classes'])
def test_splits_are_stratified_disjoint_seeded_and_stored(tmp_path, monkeypatch, load, digits, name):
    sets = {'digits': digits, 'ten classes': published(10, 2000, 300), 'a hundred classes': published(100, 1000, 500)}
    whole = sets[name]
    load(whole)
    sizes = dict(train_size=0, val_size=200, test_size=200)
    place = dict(dataset='imagefolder', data_root=str(tmp_path), out=str(tmp_path/'run'))
    make = lambda **more: config.preset('smoke', **sizes, **place, **more)
    parts = splits(make())
    used = np.concatenate([parts[s] for s in PARTS])
    assert len(np.unique(used)) == len(used) == (1797 if name == 'digits' else len(whole.splits['train']) + 200)
    if name != 'digits': assert set(parts['test']) <= set(whole.splits['test'].tolist())
    share = np.bincount(whole.labels) / len(whole.labels)
    for s in PARTS:
        counts = np.bincount(whole.labels[parts[s]], minlength=len(share))
        assert np.abs(counts - share * len(parts[s])).max() < 1.5, s
    other = splits(make(split_seed=7))
    assert any(set(other[s]) != set(parts[s]) for s in ('val', 'test'))

    def fails(*args): raise AssertionError('the splits were made anew')
    monkeypatch.setattr(data, 'make_splits', fails)
    again = splits(make())
    for s in PARTS: assert np.array_equal(again[s], parts[s])


def test_a_split_is_loaded_as_tensors(tmp_path, load):
    whole = published(10, 200, 30)
    load(whole)
    cfg = config.preset('cifar', dataset='imagefolder', data_root=str(tmp_path), val_size=20, out=str(tmp_path/'run'))
    assert [len(splits(cfg)[s]) for s in PARTS] == [180, 20, 30]
    images, labels = load_split(cfg, 'test')
    assert images.shape == (30, 3, 32, 32) and images.is_contiguous()
    assert (labels.numpy() == whole.labels[200:]).all()
    assert (images.permute(0, 2, 3, 1).numpy() == whole.images[200:]).all()


@pytest.mark.slow
def test_honest_splits_pass(digits):
    "Ten draws of digits; the smallest of 120 p-values is what chance allows."
    smallest = []
    for seed in range(10):
        rows = check_splits(compare_splits(digits, make_splits(digits, config.preset('smoke', split_seed=seed))))
        smallest += [row[name] for row in rows for name in row if name.startswith('p_')]
    assert len(smallest) == 120 and np.mean(np.array(smallest) < 0.05) < 0.1


def as_jpeg(image, quality=30):
    Image.fromarray(image).save(file := io.BytesIO(), 'JPEG', quality=quality)
    return np.asarray(Image.open(file))


def noisy(image, deviation): return np.clip(image + RNG.normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


def changed(whole, index, change=None, labels=None) -> Dataset:
    "Return a dataset in which some images or labels are changed."
    images, new = np.array(whole.images), whole.labels.copy()
    if change: images[index] = [change(x) for x in images[index]]
    if labels is not None: new[index] = labels
    return replace(whole, images=images, labels=new)


SIZES = {'train_size': 400, 'val_size': 360, 'test_size': 360}
PLANTED = {
    'darker': (lambda x: (x * 0.9).astype(np.uint8), None, 'look|brightness'),
    'less contrast': (lambda x: (x * 0.8 + 20).astype(np.uint8), None, 'look|brightness'),
    'jpeg': (as_jpeg, None, 'look'),
    'blurred': (lambda x: ((x.astype(int) + np.roll(x, 1, 0)) // 2).astype(np.uint8), None, 'look'),
    'noise': (lambda x: noisy(x, 8), None, 'look|brightness'),
    'reddish': (lambda x: np.minimum(x * [1.1, 1, .9], 255).astype(np.uint8), None, 'look'),
    'classes moved': (None, lambda y: (y + 1) % 10, 'labels'),
    'classes shuffled': (None, lambda y: np.random.default_rng(0).permutation(y), 'labels'),
}


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('name', PLANTED)
def test_planted_drift_is_found(digits, name, split):
    parts = make_splits(digits, config.preset('quick', **SIZES))
    change, labels, what = PLANTED[name]
    index = parts[split]
    drifted = changed(digits, index, change, None if labels is None else labels(digits.labels[index]))
    with pytest.raises(files.UserError, match=f'differ in ({what})'): check_splits(compare_splits(drifted, parts))


def test_planted_copies_are_found(digits):
    parts = make_splits(digits, config.preset('quick', **SIZES))
    few = np.array(digits.images)
    few[parts['test'][:2]] = few[parts['train'][:2]]  # less than 1 %: reported
    rows = check_splits(compare_splits(replace(digits, images=few), parts))
    assert [r['identical_images'] for r in rows] == [0, 2, 0] and 'image' in rows[1]['example']
    few[parts['test'][:20]] = few[parts['train'][:20]]
    with pytest.raises(files.UserError, match='train – test share 20 pictures pixel for pixel'):
        check_splits(compare_splits(replace(digits, images=few), parts))


def test_a_drift_that_is_meant_is_reported(digits):
    parts = make_splits(digits, config.preset('quick', **SIZES))
    moved = changed(digits, parts['test'], labels=(digits.labels[parts['test']] + 1) % 10)
    rows = compare_splits(moved, parts)
    with pytest.raises(files.UserError, match='on_drift=report'): check_splits(rows)
    assert check_splits(rows, 'report') == rows


@pytest.mark.parametrize('change', [as_jpeg, lambda x: x // 2 + 40, lambda x: noisy(x, 10), lambda x: x[:, ::-1]],
                         ids=['jpeg', 'contrast', 'noise', 'mirrored'])
def test_look_alikes_are_found_by_the_stage(tmp_path, change, request):
    place, rng = tmp_path/'set', np.random.default_rng(0)
    noise = lambda: Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    for c in 'ab':
        for part, n in (('train', 150), ('test', 30)):
            (place/part/c).mkdir(parents=True)
            for i in range(n): noise().resize((32, 32), Image.Resampling.BICUBIC).save(place/part/c/f'{i:03}.png')
    leaked = sorted((place/'train').glob('a/*.png'))[:10]
    for f in leaked: Image.fromarray(change(np.asarray(Image.open(f)))).save(place/'test/a'/f.name)
    cfg = config.preset('smoke', dataset='imagefolder', data_root=str(place), train_size=0, val_size=30, test_size=0,
                        out=str(tmp_path/'run'), on_drift='report')  # ten noisy pictures in sixty may be a drift too
    names = load_dataset('imagefolder', place).files
    found = [f for f in look_alikes(cfg)['found'] if f['reported']]
    pairs = {(names[f['image']], names[f['like']]) for f in found}
    assert pairs == {(f'test/a/{f.name}', f'train/a/{f.name}') for f in leaked}
    assert {f['mirrored'] for f in found} == {'mirrored' in request.node.name}


@pytest.mark.slow
def test_the_mirror_raises_no_alarm_over_honest_digits(digits):
    "A 0, a 1 and an 8 are nearly symmetric; yet of 3,600 honest images hardly one is reported for its mirror image."
    reported = np.zeros(2, int)
    for seed in range(10):
        parts = make_splits(digits, config.preset('quick', **SIZES | {'split_seed': seed, 'train_size': 0}))
        bank, queries = (small_pixels(digits.images[parts[s]]) for s in ('train', 'test'))
        found = nearest_pairs(bank, queries, turned=mirrored(queries))
        reported += [(found['flagged'] & turned).sum() for turned in (~found['mirrored'], found['mirrored'])]
    assert reported[0] <= 10 and reported[1] <= 1, reported


def test_the_only_picture_of_a_class_stays_in_training(digits):
    one = digits.labels.copy()
    one[digits.splits['train'][0]] = 10  # a class of its own
    eleven = replace(digits, labels=one, classes=(*digits.classes, 'ten'))
    parts = make_splits(eleven, config.preset('quick', train_size=0))
    assert [10 in one[parts[s]] for s in ('train', 'val', 'test')] == [True, False, False]


def test_pretraining_sees_nothing_of_val_or_test():
    whole = published(10, 500, 100)
    cfg = config.preset('cifar', train_size=100, val_size=50, pretrain_size=300)
    parts = make_splits(whole, cfg)
    seen = sample_unlabelled(whole, parts, cfg)
    assert len(np.unique(seen)) == 300 and seen.max() < 500
    assert np.isin(parts['train'], seen).all() and not np.isin(seen, parts['val']).any()


def test_fields_of_an_older_record_are_enough(tmp_path):
    "Weights were made before there was `on_broken`; their record still tells what they have seen."
    assert seen_in_pretraining(config.preset('quick', out=str(tmp_path)))['train'] > 0


def test_what_the_weights_saw_without_labels_counts(tmp_path, monkeypatch):
    record = model.shipped_record('book-digits')
    changes = {'train_size': 100, 'pretrain_size': 400}
    monkeypatch.setattr(model, 'shipped_record', lambda name: record | {'config': record['config'] | changes})
    cfg = config.preset('quick', train_size=0, pretrain_size=0, out=str(tmp_path))  # splits that hold all images
    assert sum(seen_in_pretraining(cfg).values()) == 400
    changes['pretrain_size'] = 0
    assert sum(seen_in_pretraining(cfg).values()) == 100


# --- CIFAR-10 itself ----------------------------------------------------------

@pytest.mark.slow
def test_cifar10_has_the_look_alikes_that_others_found(real):
    "An exact search, of about 8 s on one core. ciFAIR counts 2.86 %."
    train, test = (small_pixels(real.images[real.splits[s]]) for s in ('train', 'test'))
    found = nearest_pairs(train, test, turned=mirrored(test))
    assert 0.025 < found['flagged'].mean() < 0.035
    same_label = real.labels[:50_000][found['index']] == real.labels[50_000:]
    assert same_label[found['flagged']].mean() > 0.9  # they show the same; the nearest of the others seldom do
    assert same_label[~found['flagged']].mean() < 0.5


@pytest.mark.slow
def test_the_splits_of_the_preset_are_stratified_and_disjoint(cifar10, real, tmp_path):
    cfg = config.preset('cifar', data_root=str(cifar10), out=str(tmp_path/'run'))
    parts = splits(cfg)
    assert [np.bincount(real.labels[parts[s]]).tolist() for s in PARTS] == [[4500] * 10, [500] * 10, [1000] * 10]
    assert len(np.unique(np.concatenate([parts[s] for s in PARTS]))) == 60_000
    assert parts['test'].tolist() == list(range(50_000, 60_000))
    few = config.preset('cifar', data_root=str(cifar10), train_size=2500, val_size=2500, pretrain_size=40_000,
                        out=str(tmp_path/'few'))
    seen, parts = unlabelled(few), splits(few)
    assert len(np.unique(seen)) == 40_000 and seen.max() < 50_000
    assert np.isin(parts['train'], seen).all() and not np.isin(seen, parts['val']).any()


def test_halves_hold_a_rare_class_alike():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [900, 40, 1]))
    for seed in range(5):
        a, b = halves(labels, seed)
        assert sorted([*a, *b]) == list(range(len(labels))) and len(a) - len(b) in (0, 1)
        assert np.bincount(labels[a], minlength=3)[1] == np.bincount(labels[b], minlength=3)[1] == 20
