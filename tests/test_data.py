"Datasets in the format in which their publishers hand them out, small."
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from dinocls import core
from dinocls.data import load_dataset, load_split, splits

RNG = np.random.default_rng(0)


def archive(monkeypatch, folder, kind, files, meta_key, classes):
    "Write an archive as the publisher's, of a few images, and make torchvision expect its checksums."
    members, listed = {}, {}
    for name, n in files.items():
        key = 'fine_labels' if kind is CIFAR100 else 'labels'
        members[name] = pickle.dumps({'data': RNG.integers(0, 256, (n, 3072), dtype=np.uint8), key: [i % len(classes) for i in range(n)]})
    members[kind.meta['filename']] = pickle.dumps({meta_key: classes})
    with tarfile.open(folder/kind.filename, 'w:gz') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f'{kind.base_folder}/{name}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            listed[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(kind, 'train_list', [[n, listed[n]] for n in files if 'test' not in n])
    monkeypatch.setattr(kind, 'test_list', [[n, listed[n]] for n in files if 'test' in n])
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': listed[kind.meta['filename']]})
    monkeypatch.setattr(kind, 'tgz_md5', hashlib.md5((folder/kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, 'url', 'http://127.0.0.1:9/refused')
    return {n: pickle.loads(members[n]) for n in files}


def test_cifar10_is_read_from_a_local_archive(tmp_path, monkeypatch):
    files = {**{f'data_batch_{i}': 40 for i in range(1, 6)}, 'test_batch': 30}
    raw = archive(monkeypatch, tmp_path, CIFAR10, files, 'label_names', [f'class{i}' for i in range(10)])
    data = load_dataset('cifar10', tmp_path)
    assert data.images.shape == (230, 32, 32, 3) and data.images.dtype == np.uint8 and data.classes[3] == 'class3'
    assert (data.images[200] == raw['test_batch']['data'][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert data.splits['test'].tolist() == list(range(200, 230)) and data.labels[:12].tolist() == [*range(10), 0, 1]
    cfg = core.preset('cifar', data_root=str(tmp_path), val_size=20, out=str(tmp_path/'run'))
    parts = splits(cfg)
    assert [len(parts[s]) for s in ('train', 'val', 'test')] == [180, 20, 30]
    images, labels = load_split(cfg, 'test')
    assert images.shape == (30, 3, 32, 32) and (labels.numpy() == data.labels[200:]).all()


def test_cifar100_is_read_from_a_local_archive(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR100, {'train': 200, 'test': 100}, 'fine_label_names', [f'class{i}' for i in range(100)])
    data = load_dataset('cifar100', tmp_path)
    assert len(data.images) == 300 and len(data.classes) == 100 and data.labels.max() == 99


def test_an_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR10, {'data_batch_1': 10, 'test_batch': 10}, 'label_names', list('abcdefghij'))
    content = bytearray((tmp_path/CIFAR10.filename).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path/CIFAR10.filename).write_bytes(content)
    with pytest.raises(core.UserError, match='damaged'): load_dataset('cifar10', tmp_path)
    assert (tmp_path/CIFAR10.filename).read_bytes() == content


def test_the_test_set_can_be_reduced_as_in_the_reference(tmp_path, monkeypatch):
    files = {'data_batch_1': 100, 'test_batch': 100}
    archive(monkeypatch, tmp_path, CIFAR10, files, 'label_names', list('abcdefghij'))
    parts = splits(core.preset('cifar', data_root=str(tmp_path), val_size=20, test_size=50, out=str(tmp_path/'run')))
    assert len(parts['test']) == 50 and set(parts['test']) <= set(range(100, 200))
    assert np.bincount(parts['labels'][parts['test']]).tolist() == [5] * 10
