"Errors: suspects and pairs against independent computations; the judges' files in every state, and their alignment."
import json

import numpy as np
import pytest
from conftest import answers

from dinocls.kit import files
from dinocls import errors
from dinocls.kit.fetch import data_folder


def confident_learning(p, labels):
    "Return suspects by the definition of Northcutt et al. 2019, in loops."
    bars = [p[labels == c, c].mean() for c in range(p.shape[1])]
    found = []
    for i, row in enumerate(p):
        passing = [c for c in range(p.shape[1]) if row[c] >= bars[c]]
        if passing and max(passing, key=lambda c: row[c]) != labels[i] != row.argmax(): found.append(i)
    return sorted(found, key=lambda i: p[i, labels[i]])


def test_suspects_are_those_of_the_definition():
    p, y = answers(800, sharp=0.15)
    wrong = y.copy()
    wrong[:60] = (y[:60] + 1) % 6
    found = errors.label_suspects(p, wrong)
    expected = confident_learning(p, wrong)
    assert 60 < len(expected) < 400 and found.tolist() == expected
    trial = errors.planted(p, y)
    assert trial['planted'] == 40 and 0 < trial['found'] <= min(40, trial['suspects'])


def test_suspects_where_a_class_has_no_images():
    p = np.array([[.9, .1, 0], [.1, .9, 0], [.95, .05, 0], [.97, .03, 0]])
    assert errors.label_suspects(p, np.array([0, 1, 0, 1])).tolist() == [3]


# --- promises


@pytest.mark.parametrize('n', [60, 300])
@pytest.mark.parametrize('error', [lambda s: 0.3 * (1 - s), lambda s: 0.025 + 0 * s], ids=['falling', 'level'])
def test_a_promise_is_broken_in_one_of_twenty_cases_at_most(n, error):
    rng, many, broken, told = np.random.default_rng(0), np.linspace(0, 1, 10_000), [], []
    for _ in range(300):
        sure = rng.random(n)
        found = errors.promise(sure, rng.random(n) >= error(sure))
        told.append(found['risk'])
        broken.append(found['risk'] is not None and error(many[many >= found['least']]).mean() > found['risk'])
    assert np.mean(broken) <= 0.05 and any(told)
    assert errors.promise(sure[:9], np.ones(9, bool))['risk'] is None  # nine images can promise nothing


# --- the judges -------------------------------------------------------------

ORIGINAL = np.array([3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6])


@pytest.fixture
def judges(tmp_path, monkeypatch):
    "The three files for twenty images, in the format of the originals."
    folder = tmp_path/'data'
    folder.mkdir()
    np.save(folder/'cifar10_test_labels.npy', ORIGINAL.astype(np.uint16))
    votes = 50 * np.eye(10, dtype=np.int64)[ORIGINAL]
    votes[4] = 0
    votes[4, 3] = 51  # people say cat where the label says frog
    np.save(folder/'cifar10h-counts.npy', votes)
    review = [{'id': 4, 'url': 'https://…/4.png', 'given_original_label': 6, 'given_original_label_name': 'frog',
               'our_guessed_label': 3, 'our_guessed_label_name': 'cat',
               'mturk': {'given': 0, 'guessed': 4, 'neither': 0, 'both': 1}},
              {'id': 0, 'url': 'https://…/0.png', 'given_original_label': 3, 'given_original_label_name': 'cat',
               'our_guessed_label': 5, 'our_guessed_label_name': 'dog',
               'mturk': {'given': 5, 'guessed': 0, 'neither': 0, 'both': 0}}]
    (folder/'cifar10_test_label_review.json').write_text(json.dumps(review))
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'cache'))
    return folder


def test_reads_our_names_and_the_authors(judges, tmp_path, monkeypatch):
    found = errors.read_judges(str(judges))
    assert (found['labels'].tolist() == ORIGINAL.tolist() and found['votes'].shape == (20, 10)
            and [r['id'] for r in found['review']] == [4, 0])
    (judges/'cifar10_test_label_review.json').rename(judges/'cifar10_mturk.json')
    (judges/'cifar10_test_labels.npy').rename(judges/'cifar10_test_set_original_labels.npy')
    assert errors.read_judges(str(judges))['review'] == found['review']
    monkeypatch.setenv('DINOCLS_DATA', str(judges))  # the images may lie elsewhere
    assert errors.read_judges(str(tmp_path/'images'))['review'] == found['review']


def test_fetches_what_is_not_there(judges, tmp_path, monkeypatch):
    served = {what: (name, (judges/name).as_uri()) for what, (name, _) in errors.JUDGES.items()}
    monkeypatch.setattr(errors, 'JUDGES', served)
    found = errors.read_judges(str(tmp_path/'images'))
    assert found['labels'].tolist() == ORIGINAL.tolist()
    fetched = sorted(f.name for f in (tmp_path/'cache').iterdir() if f.suffix != '.lock')
    assert fetched == sorted(name for name, _ in served.values())
    assert not (tmp_path/'images').exists()


def test_offline_it_says_what_to_do(judges, monkeypatch):
    (judges/'cifar10h-counts.npy').unlink()
    monkeypatch.setattr(errors, 'JUDGES',
                        errors.JUDGES | {'votes': ('cifar10h-counts.npy', 'http://127.0.0.1:9/cifar10h-counts.npy')})
    sentence = 'cifar10h-counts.npy is not in .* could not be downloaded .*put the file'
    with pytest.raises(files.UserError, match=sentence) as told:
        errors.read_judges(str(judges))
    assert 'Connection refused' in str(told.value) and 'Cannot write' not in str(told.value)


@pytest.mark.parametrize('damage', [
    lambda d: (d/'cifar10h-counts.npy').write_bytes(b'\x93NUMPY'),
    lambda d: (d/'cifar10_test_label_review.json').write_text('[{"id": 3}]'),
    lambda d: (d/'cifar10_test_label_review.json').write_text('{'),
    lambda d: np.save(d/'cifar10h-counts.npy', np.ones((20, 9))),
    lambda d: np.save(d/'cifar10h-counts.npy', 50 * np.eye(10)[np.sort(ORIGINAL)]),
    lambda d: np.save(d/'cifar10_test_labels.npy', np.sort(ORIGINAL)),
    lambda d: np.save(d/'cifar10_test_labels.npy', ORIGINAL[:3]),
], ids=['cut short', 'fields', 'no JSON', 'nine classes', 'votes in another order', 'labels in another order',
        'too few'])
def test_files_that_are_something_else_are_refused(judges, damage):
    damage(judges)
    with pytest.raises(files.UserError, match='cannot be read .*delete|do not belong together: delete'):
        errors.read_judges(str(judges))


@pytest.mark.parametrize('stored', [np.arange(20), np.argsort(ORIGINAL, kind='stable')], ids=['archive', 'folders'])
def test_judges_meet_the_right_images_however_they_are_stored(judges, stored):
    "`stored` lists the original positions in the order in which the images are read."
    found = errors.read_judges(str(judges))
    place = errors.original_order(ORIGINAL[stored], found['labels'])
    assert place.tolist() == stored.tolist()
    test = np.flatnonzero(np.isin(place, (0, 4, 7, 12)))  # the run's test split is a part
    labels = ORIGINAL[place[test]]
    guesses = np.array([{0: 5, 4: 3, 7: 6, 12: 3}[i] for i in place[test]])
    twin = {int(np.flatnonzero(place[test] == 12)[0]): 5}
    rows = {r['original']: r for r in errors.judged_errors(found, place[test], labels, guesses, twin)}
    assert {i: r['fault'] for i, r in rows.items()} == {0: 'model', 4: 'label', 12: 'model'}
    assert [rows[4][j] for j in ('reviewed label', 'human votes', 'look-alike')] == ['model', 'model', 'silent']
    assert [rows[12][j] for j in ('reviewed label', 'human votes', 'look-alike')] == ['silent', 'label', 'label']


def test_another_order_is_refused(judges):
    found = errors.read_judges(str(judges))
    with pytest.raises(files.UserError, match='neither in the original order'):
        errors.original_order(ORIGINAL[::-1], found['labels'])
    with pytest.raises(files.UserError, match='neither in the original order'):
        errors.original_order(ORIGINAL[:10], found['labels'])
    with pytest.raises(files.UserError, match='do not apply'):
        errors.judged_errors(found, np.arange(20)[::-1], ORIGINAL, ORIGINAL, {})


def test_the_judges_themselves_meet_cifar10_itself(real):
    folder = data_folder()
    missing = [name for name, url in errors.JUDGES.values()
               if not any((folder/n).is_file() for n in (name, url.rpartition('/')[2]))]
    if missing: pytest.skip(f'{" and ".join(missing)} not in {folder}')
    found, labels = errors.read_judges(), real.labels[real.splits['test']]
    place = errors.original_order(labels, found['labels'])
    assert place.tolist() == list(range(10_000)) and len(found['review']) == 275
    people = found['votes'].argmax(1)  # a model that answers as most people do
    others, rows = errors.other_labels(found, place), errors.judged_errors(found, place, labels, people, {})
    assert len(rows) == (people != labels).sum() == 79 and {r['human votes'] for r in rows} == {'model', 'neither'}
    assert (others['human votes'] == -1).sum() >= sum(r['human votes'] == 'neither' for r in rows)
    differ = others['reviewed label'] != labels
    assert differ.sum() == 54  # not confirmed by the reviewers
    assert ({r['original'] for r in rows if r['reviewed label'] == 'model'} <= set(np.flatnonzero(differ))
            and {r['fault'] for r in rows} == {'label', 'open'})
