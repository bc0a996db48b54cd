"The loader: the same batches from memory and from storage, from any step on."
import threading
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from dinocls.kit.files import UserError
from dinocls.data import Loader, batches

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (203, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(203)  # the label tells which image it is


def stored(folder, images=IMAGES):
    "Write images to a file and open it memory-mapped."
    np.save(folder/'images.npy', images)
    return np.load(folder/'images.npy', mmap_mode='r')


def read(loader, epoch=0, start=0): return [(x.clone(), y.clone()) for x, y in loader.epoch(epoch, start)]


def same(a, b): return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


@pytest.mark.parametrize('index', [None, RNG.permutation(203)[:150]])
def test_tensor_array_and_file_give_the_same_batches(tmp_path, index):
    tensor = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch warns of arrays that it must not write to
        loaders = [Loader(tensor, torch.from_numpy(LABELS), 16, 7, index=index),
                   Loader(IMAGES, LABELS, 16, 7, index=index), Loader(stored(tmp_path), LABELS, 16, 7, index=index),
                   Loader(stored(tmp_path), LABELS, 16, 7, index=index, memory_limit=1000)]
        epochs = [[read(loader, e) for e in (0, 1)] for loader in loaders]
    assert [loader.resident for loader in loaders] == [True, True, True, False]
    for found in epochs[1:]: assert same(found[0], epochs[0][0]) and same(found[1], epochs[0][1])
    for x, y in epochs[0][0]:
        assert x.shape == (16, 3, 8, 6) and x.dtype == torch.uint8 and x.is_contiguous()
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), IMAGES[y.numpy()])
    seen = torch.cat([y for _, y in epochs[0][0]]).tolist()
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(203) if index is None else index.tolist())


def test_embeddings_come_in_the_order_of_their_images():
    images = read(Loader(IMAGES, LABELS, 16, 7))
    embeddings = torch.from_numpy(LABELS).float()[:, None].repeat(1, 5)
    for (_, y), (z, u) in zip(images, read(Loader(embeddings, LABELS, 16, 7)), strict=True):
        assert torch.equal(y, u) and torch.equal(z[:, 0], y.float())


def test_order_follows_from_seed_and_epoch():
    first = read(Loader(IMAGES, LABELS, 16, 7))
    assert same(first, read(Loader(IMAGES, LABELS, 16, 7)))
    assert not same(first, read(Loader(IMAGES, LABELS, 16, 7), 1))
    assert not same(first, read(Loader(IMAGES, LABELS, 16, 8)))
    assert all(torch.equal(y, torch.from_numpy(LABELS)[i]) for (_, y), i in zip(first, batches(203, 16, 7, 0)))


@pytest.mark.parametrize('limit', [None, 0])
def test_an_epoch_goes_on_at_any_step(tmp_path, limit):
    loader = Loader(stored(tmp_path), LABELS, 16, 7, memory_limit=limit)
    whole = read(loader, 3)
    assert len(whole) == len(loader) == 12
    for start in (0, 1, 7, 12): assert same(read(loader, 3, start), whole[start:])
    for start in (-1, 13):
        with pytest.raises(UserError, match='start='): read(loader, 3, start)


@pytest.mark.parametrize(('n', 'size', 'steps'), [(17, 16, 1), (33, 16, 2), (32, 16, 2), (5, 16, 1), (2, 16, 1)])
def test_no_last_batch_of_one(n, size, steps):
    loader = Loader(IMAGES[:n], LABELS[:n], size, 0)
    assert [len(y) for _, y in read(loader)] == [min(n, size)] * steps and len(loader) == steps


def test_the_set_is_not_copied(tmp_path):
    big = np.zeros((4000, 32, 32, 3), np.uint8)  # 12 MB
    assert Loader(big, np.zeros(4000, int), 16, 0).images is big
    tensor = torch.from_numpy(big)
    tensor = tensor.permute(0, 3, 1, 2)
    assert Loader(tensor, np.zeros(4000, int), 16, 0).images.data_ptr() == big.ctypes.data
    file = stored(tmp_path, big)
    tracemalloc.start()  # counts NumPy's memory; the resident tensor is torch's
    try:
        resident = Loader(file, np.zeros(4000, int), 16, 0)
        assert resident.resident and resident.images.nbytes == big.nbytes
        assert tracemalloc.get_traced_memory()[1] < big.nbytes
        tracemalloc.reset_peak()
        streamed = Loader(file, np.zeros(4000, int), 16, 0, memory_limit=0)
        for _ in streamed.epoch(0): pass
        assert tracemalloc.get_traced_memory()[1] < big.nbytes / 4
    finally: tracemalloc.stop()


def test_stopping_in_the_middle_ends_the_thread(tmp_path):
    before = threading.active_count()
    epoch = Loader(stored(tmp_path), LABELS, 16, 7, memory_limit=0).epoch(0)
    next(epoch)
    assert threading.active_count() == before + 1
    epoch.close()
    for _ in range(50):
        if threading.active_count() == before: break
        time.sleep(0.02)
    assert threading.active_count() == before


class Broken(np.memmap):
    "A file on a disk that fails."
    def __getitem__(self, key):
        if isinstance(key, np.ndarray): raise OSError(5, 'Input/output error')
        return super().__getitem__(key)


def test_an_error_while_reading_reaches_the_caller(tmp_path):
    broken = stored(tmp_path).view(Broken)
    with pytest.raises(OSError, match='Input/output error'): read(Loader(broken, LABELS, 16, 7, memory_limit=0))


@pytest.mark.parametrize(('change', 'says'), [
    ({'images': IMAGES.astype(np.float32)}, 'takes uint8 images'), ({'images': IMAGES[0]}, 'takes uint8 images'),
    ({'labels': LABELS[:5]}, 'needs one per image'), ({'batch_size': 1}, 'at least 2'), ({'index': [3]}, 'at least 2')])
def test_what_no_training_could_use_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        Loader(**{'images': IMAGES, 'labels': LABELS, 'batch_size': 16, 'seed': 0} | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(tmp_path):
    wanted = read(Loader(IMAGES, LABELS, 16, 7))
    for limit in (None, 0):
        loader = Loader(stored(tmp_path), LABELS, 16, 7, 'cuda', memory_limit=limit)
        found = read(loader)
        assert loader.resident is (limit is None) and all(x.is_cuda and y.is_cuda for x, y in found)
        assert same([(x.cpu(), y.cpu()) for x, y in found], wanted)
