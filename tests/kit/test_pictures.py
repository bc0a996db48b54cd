"Pictures of all kinds, alone and in folders; folders with accidents; decoded once."
import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from publishers import picture_folder

from dinocls.data import load_split, splits
from dinocls.kit import config, datasets, pictures
from dinocls.kit.datasets import load_dataset
from dinocls.kit.files import UserError
from dinocls.kit.pictures import decode, to_pixels, to_rgb

pytestmark = pytest.mark.usefixtures('place', 'asked_for')


def test_kinds_that_need_care():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(to_rgb(Image.fromarray(grey.astype(np.uint16) * 257)))[..., 0] == grey).all()  # 16 bits
    assert np.asarray(to_rgb(Image.fromarray(grey).convert('CMYK'))).shape == (16, 16, 3)
    for bad, why in ((Image.new('F', (4, 4)), 'floats'), (Image.new('1', (10_000, 10_000)), 'more than')):
        with pytest.raises(ValueError, match=why): to_rgb(bad)
    for bad, why in ((b'text', 'not a picture'), ('none.png', 'no such file'), ('.', 'a folder')):
        with pytest.raises((ValueError, OSError), match=why): decode(bad)


def all_kinds(place):
    "Write a picture of four colours in many modes, formats and sizes, and one that the camera took on its side."
    rgb = Image.fromarray(np.kron(np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], np.uint8),
                                  np.ones((16, 16, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    clear, half = rgb.convert('P'), rgb.convert('RGBA')
    clear.info['transparency'] = bytes(range(4))
    half.putalpha(255)
    for name, image, more in (('a.png', rgb, {}), ('b.png', rgb.convert('P'), {}), ('c.png', half, {}),
                              ('d.jpg', rgb.convert('CMYK'), {}),
                              ('e.png', rgb.convert('LA'), {}), ('f.png', rgb.convert('1'), {}), ('g.gif', rgb, {}),
                              ('h.webp', rgb, {}), ('i.bmp', rgb, {}),
                              ('j.tif', rgb.convert('YCbCr'), {'compression': 'tiff_lzw'}),
                              ('k.jpg', rgb.transpose(Image.Transpose.ROTATE_90), {'exif': exif}),
                              ('l.jpg', rgb.resize((64, 40)), {}), ('m.png', clear, {}),
                              ('n.png', rgb.convert('L'), {}),
                              ('o.jpg', rgb.convert('L').resize((90, 44)).transpose(Image.Transpose.ROTATE_90),
                               {'exif': exif}), ('p.tif', rgb.convert('CMYK').resize((20, 28)), {}),
                              ('q.png', Image.fromarray(np.asarray(rgb.convert('L')).astype(np.uint16) * 257), {}),
                              ('r.webp', half.resize((37, 37)), {})):
        image.save(place/name, **more)


def check_kinds(found):
    "Check the four colours in each image of `all_kinds`."
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 200]])
    for name, image in zip(found.files, found.images):
        if name == 'train/b/000.png': continue
        kind = name.rpartition('/')[2][0]
        if kind == 'f': continue  # black and white dithers
        wanted = np.repeat(colours @ [[0.299], [0.587], [0.114]], 3, 1) if kind in 'enoq' else colours
        s = len(image)
        assert np.abs(image[[s // 8, s // 8, -s // 8, -s // 8],
                            [s // 8, -s // 8, s // 8,
                             -s // 8]] - wanted).max() < 60, name  # a palette of 216 colours dithers


def test_image_folders_take_all_kinds_of_pictures(tmp_path, asked_for):
    (place := picture_folder(tmp_path/'set', 1, 'ab', (32, 32))/'train'/'a').joinpath('000.png').unlink()
    all_kinds(place)
    (tmp_path/'set/test').rename(tmp_path/'gone')
    found = load_dataset('imagefolder', tmp_path/'set')
    assert (found.images.shape == (19, 32, 32, 3) and found.files[0] == 'train/a/a.png' and 'test' not in found.splits
            and not asked_for)
    check_kinds(found)


def test_image_folders_take_all_kinds_of_pictures_while_a_tenth_is_broken(tmp_path):
    for part in ('train', 'test'):
        for c in 'abc':
            (place := tmp_path/'set'/part/c).mkdir(parents=True)
            all_kinds(place)
    files = sorted((tmp_path/'set').glob('*/*/*'))
    whole = files[0].read_bytes()
    for i, f in enumerate(files[3::10]):
        f.write_bytes((b'', whole[:60], b'text', f.read_bytes()[:len(f.read_bytes()) // 3])[i % 4])
    with pytest.raises(UserError, match='11 of 108 files') as e: load_dataset('imagefolder', tmp_path/'set')
    assert str(e.value).count('/') > 10 and '\n' not in str(e.value)
    found = load_dataset('imagefolder', tmp_path/'set', on_broken='skip')
    assert (len(found.images) == 97 and found.images.shape[1] == found.images.shape[2]
            and set(found.skipped) == {f.relative_to(tmp_path/'set').as_posix() for f in files[3::10]})
    check_kinds(found)


def test_broken_files_are_listed_or_skipped(tmp_path):
    place = picture_folder(tmp_path/'set', 100)
    files = sorted((place/'train').glob('*/*.png'))
    for i, f in enumerate(files[::10]):  # 10 % at once: empty, cut short, text, no pixels where they should be
        f.write_bytes((b'', f.read_bytes()[:60], b'text', f.read_bytes()[:-40])[i % 4])
    with pytest.raises(UserError, match='20 of 300 files') as e: load_dataset('imagefolder', place)
    assert (str(e.value).count('.png') == 10 and 'on_broken=skip' in str(e.value) and 'train/a/000.png' in str(e.value)
            and '\n' not in str(e.value))
    found = load_dataset('imagefolder', place, on_broken='skip')
    assert len(found.images) == len(found.labels) == len(found.files) == 280 and len(found.skipped) == 20
    assert ([len(found.splits[p]) for p in ('train', 'test')] == [180, 100]
            and found.splits['test'].tolist() == list(range(180, 280)))
    for i in (0, 100, 279): assert (found.images[i] == np.asarray(Image.open(place/found.files[i]))).all()
    cfg = config.preset('smoke', dataset='imagefolder', data_root=str(place), on_broken='skip', train_size=0,
                        val_size=40, test_size=0, out=str(tmp_path/'run'))
    assert len(splits(cfg)['skipped']) == 20 and len(load_split(cfg, 'train')[0]) == 140
    for f in files: f.write_bytes(b'')
    with pytest.raises(UserError, match='200 of 300'): load_dataset('imagefolder', place, on_broken='skip')
    with pytest.raises(UserError, match="did you mean 'skip'"): config.preset('smoke', on_broken='skp')


def test_broken_files_cost_no_copy_in_memory(tmp_path, monkeypatch):
    place = picture_folder(tmp_path/'set', 10)
    for name in ('train/a/000.png', 'train/b/004.png', 'test/a/000.png'): (place/name).write_bytes(b'text')
    small = load_dataset('imagefolder', place, on_broken='skip')
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    for _ in range(2):  # decoded, and read again
        found = load_dataset('imagefolder', place, on_broken='skip')
        assert isinstance(found.images, np.memmap) and found.files == small.files and len(found.files) == 27
        assert (found.images == small.images).all() and found.fingerprint == small.fingerprint


def test_images_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    place, count = picture_folder(tmp_path/'set'), []
    decode = pictures.decode
    monkeypatch.setattr(pictures, 'decode', lambda f: count.append(f) or decode(f))
    first = load_dataset('imagefolder', place).fingerprint
    decoded, count[:] = len(count), []
    again = load_dataset('imagefolder', place)
    assert decoded >= 60 and not count and isinstance(again.images, np.memmap) and again.fingerprint == first
    del again
    (cache := next((tmp_path/'data'/'decoded').glob('*.rgb'))).write_bytes(cache.read_bytes()[:-1])  # cut short
    assert load_dataset('imagefolder', place).fingerprint == first and count
    Image.new('RGB', (8, 8)).save(place/'train/a/000.png')
    (place/'train/b/001.png').write_bytes(b'text')
    with pytest.raises(UserError, match='001.png is not a readable'): load_dataset('imagefolder', place)
    changed = load_dataset('imagefolder', place, on_broken='skip')
    assert (not changed.images[0].any() and len(changed.images) == 59
            and len(list((tmp_path/'data'/'decoded').glob('*.rgb'))) == 1)


def test_a_cache_that_cannot_be_kept_does_no_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    place = picture_folder(tmp_path/'set')
    (tmp_path/'data').write_text('a file where a folder should be')
    assert len(load_dataset('imagefolder', place).images) == 60 and 'decoded again each time' in capsys.readouterr().out
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'other'))
    monkeypatch.setattr(pictures.shutil, 'disk_usage', lambda p: type('', (), {'free': 10}))
    assert len(load_dataset('imagefolder', place).images) == 60 and 'No space left' in capsys.readouterr().out
    assert not list((tmp_path/'other').glob('decoded/*.rgb'))


def test_sizes_that_differ_are_scaled_to_the_median(tmp_path):
    (place := tmp_path/'train'/'a').mkdir(parents=True)
    (tmp_path/'train'/'b').mkdir()
    Image.new('RGB', (8, 8), (180, 0, 0)).save(tmp_path/'train'/'b'/'0.png')
    for i, size in enumerate([(8, 8), (10, 8), (30, 20)]): Image.new('RGB', size, (60 * i, 0, 0)).save(place/f'{i}.png')
    (place/'3.png').write_text('not a picture'), (place/'.DS_Store').touch(), (place/'Thumbs.db').touch()
    found = load_dataset('imagefolder', tmp_path, on_broken='skip')
    assert found.images.shape == (4, 8, 8, 3) and found.images[:, 4, 4, 0].tolist() == [0, 60, 120, 180]
    assert found.skipped == ('train/a/3.png',)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match='has no folder train, but bin'): load_dataset('imagefolder', tmp_path)
    for place in ('train/cat', 'train/dog', 'test/dgo'): (tmp_path/place).mkdir(parents=True)
    with pytest.raises(UserError, match="has the class 'dgo'.* did you mean 'dog'"):
        load_dataset('imagefolder', tmp_path)
    (tmp_path/'test/dgo').rmdir()
    with pytest.raises(UserError, match='no images to learn from'): load_dataset('imagefolder', tmp_path)


def colours(place, n=20, parts=('train', 'test'), classes='ab', change=None, suffix='png'):
    "Write a folder of noise whose colour tells the class; return it."
    rng = np.random.default_rng(0)
    for part in parts:
        for k, c in enumerate(classes):
            (place/part/c).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                x = rng.integers(0, 128, (8, 8, 3)).astype(np.uint8)
                x[..., k % 3] += 127
                (change or Image.fromarray)(x).save(place/part/c/f'{i:03}.{suffix}')
    return place


def test_what_lies_under_transparency_is_white():
    x = np.random.default_rng(0).integers(0, 256, (4, 4, 4)).astype(np.uint8)
    x[..., 3] = 0
    assert (np.asarray(decode(as_file(Image.fromarray(x)))) == 255).all()
    x[..., 3], over = 128, np.round(x[..., :3] * (128 / 255) + 127)
    assert np.abs(np.asarray(to_rgb(Image.fromarray(x))) - over).max() <= 1
    grey = Image.fromarray(x[..., :2].copy(), 'LA')
    grey.putalpha(0)
    assert (to_pixels(as_file(grey), (4, 4)) == 255).all()


def as_file(image, kind='PNG', **more) -> bytes:
    image.save(file := io.BytesIO(), kind, **more)
    return file.getvalue()


@pytest.mark.parametrize('bits', [8, 10, 12])
def test_unused_upper_bits_are_told(tmp_path, bits):
    deep = lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 257 >> 16 - bits)
    place = colours(tmp_path/'set', change=deep)
    with pytest.raises(UserError, match=f'leave {16 - bits} of them unused.*all values by {2 ** (16 - bits)}'):
        load_dataset('imagefolder', place)
    with pytest.raises(UserError, match=f'it uses {bits}'): to_pixels(place/'train/a/000.png', (8, 8))
    deep = lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 257)
    whole = load_dataset('imagefolder', colours(tmp_path/'whole', change=deep))
    assert whole.images.max() > 200


def test_malformed_exif_is_no_reason_to_refuse(tmp_path):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for kind in ('PNG', 'WEBP', 'JPEG'):
        for exif in (b'Exif\0\0MM\0*\0\0\0\x08\xff\xff', b'Exif\0\0nonsense', b'II*\0\xff\xff\xff\xff'):
            assert decode(as_file(image, kind, exif=exif)).size == (8, 8)


def test_only_what_the_bytes_show_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    place, real = colours(tmp_path/'set'), pictures.decode
    for error in (OSError(5, 'Input/output error'), PermissionError(13, 'Permission denied'), MemoryError()):
        def fails(file, error=error):
            if file.name == '003.png': raise error
            return real(file)
        monkeypatch.setattr(pictures, 'decode', fails)
        with pytest.raises(UserError, match='003.png could not be read'):
            load_dataset('imagefolder', place, on_broken='skip')
    monkeypatch.setattr(pictures, 'decode', real)
    assert not load_dataset('imagefolder', place, on_broken='skip').skipped


def test_class_folders_may_be_nested_and_hold_what_is_no_picture(tmp_path, capsys):
    place = colours(tmp_path/'set', 2)
    colours(place/'train'/'a', 3, ('2023', '2024'), ('x', 'y'))
    for name in ('.DS_Store', 'Thumbs.db', 'desktop.ini', 'Icon\r', '._000.png', '000.png:Zone.Identifier'):
        (place/'train/b'/name).write_bytes(b'left')
    for name in ('train/b/labels.csv', 'train/loose.png'): (place/name).write_bytes(b'a,b')
    for name in ('train/@eaDir', 'train/__MACOSX', 'train/a/@eaDir'):
        (place/name).mkdir()
        (place/name/'000.png').write_bytes(b'left')
    (place/'train/a/loop').symlink_to(place/'train/a')
    found = load_dataset('imagefolder', place)
    assert found.classes == ['a', 'b'] and np.bincount(found.labels).tolist() == [2 + 12 + 2, 4]
    said = capsys.readouterr().out
    assert 'passed over' in said and all(name in said for name in ('@eaDir', '__MACOSX', 'labels.csv', 'loose.png'))


@pytest.mark.parametrize('spelling', ['val', 'valid', 'Validation'])
def test_a_folder_of_validation_is_used(tmp_path, spelling):
    place = colours(tmp_path/'set', 20, ('Train', spelling, 'test'))
    found = load_dataset('imagefolder', place)
    assert {p: len(i) for p, i in found.splits.items()} == dict.fromkeys(('train', 'val', 'test'), 40)
    cfg = config.preset('smoke', dataset='imagefolder', data_root=place, train_size=0, val_size=40, test_size=0,
                        out=tmp_path/'run')
    parts = splits(cfg)
    assert parts['val'].tolist() == found.splits['val'].tolist() and len(parts['train']) == 40
    (place/'eval').mkdir(), (place/'Train').rename(place/'learn')
    with pytest.raises(UserError, match='has no folder train, but .*eval, learn'): load_dataset('imagefolder', place)


def test_one_class_or_an_empty_one_is_refused(tmp_path):
    place = colours(tmp_path/'set', 2)
    (place/'train/c').mkdir()
    with pytest.raises(UserError, match="no picture of the class 'c'"): load_dataset('imagefolder', place)
    one = colours(tmp_path/'one', 2, classes='a')
    with pytest.raises(UserError, match="the one class 'a'"): load_dataset('imagefolder', one)


def test_names_of_any_code(tmp_path, monkeypatch):
    nfc, nfd = 'K\u00e4se', 'Ka\u0308se'
    place = colours(tmp_path/'set', 2, ('train',), (nfd, 'b'))
    colours(place, 2, ('test',), (nfc, 'b'))
    bad = os.fsdecode(bytes(place/'train/b') + b'/\xe4.png')
    Image.new('RGB', (8, 8)).save(open(bad, 'wb'), 'PNG')
    found = load_dataset('imagefolder', place)
    assert found.classes == [nfc, 'b'] and len(found.splits['test']) == 4 and 'train/b/\\xe4.png' in found.files
    '\n'.join((*found.files, *found.classes)).encode()
    Image.new('RGB', (8, 8)).save(tmp_path/'~tmp.png')
    monkeypatch.chdir(tmp_path)
    assert not to_pixels('~tmp.png', (8, 8)).any()


def test_photographs_are_kept_near_the_size_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'set/train'/c).mkdir(parents=True)
        for i in range(2):
            x = Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).resize((800, 600))
            x.save(tmp_path/'set/train'/c/f'{i}.jpg')
    found = load_dataset('imagefolder', tmp_path/'set', side=32)
    assert found.images.shape == (4, 32, 43, 3)
    for file, image in zip(found.files, found.images):
        assert (to_pixels(tmp_path/'set'/file, (32, 43)) == image).all()  # as `predict` sees it
    assert load_dataset('imagefolder', tmp_path/'set').images.shape == (4, 600, 800, 3)


@pytest.mark.parametrize('kind', ['rgb', 'json'])
def test_damaged_caches_are_made_anew(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    place = colours(tmp_path/'set', 4)
    first = load_dataset('imagefolder', place)
    pixels, rng = np.array(first.images), np.random.default_rng(0)
    for _ in range(20):
        (file,) = (tmp_path/'data'/'decoded').glob(f'*.{kind}')
        content, about = bytearray(file.read_bytes()), file.stat()
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
        again = load_dataset('imagefolder', place)
        assert (again.images == pixels).all() and again.fingerprint == first.fingerprint
    monkeypatch.setattr(pictures, 'CACHE_FROM', 2**30)
    assert load_dataset('imagefolder', place).fingerprint == first.fingerprint


def test_what_changes_in_a_folder_changes_its_key(tmp_path):
    place, keys = colours(tmp_path/'set', 4), []
    def key(root=None):
        datasets._loaded.cache_clear()
        cfg = config.preset('smoke', dataset='imagefolder', data_root=root or place)
        return datasets.fingerprint_at_hand(cfg)
    def new(): return keys.append(key()) or len(set(keys)) == len(keys)
    assert new()
    shutil.copytree(place, tmp_path/'copy')
    assert key(tmp_path/'copy') == keys[0]
    shutil.copy(place/'train/a/000.png', place/'train/a/004.png')
    assert new()
    (place/'train/a/001.png').unlink()
    assert new()
    for part in ('train', 'test'): (place/part/'b').rename(place/part/'c')
    assert new()
    (place/'train/c/003.png').rename(place/'test/a/~.png')
    assert new()
    colours(place, 4, ('train',), 'd')
    assert new()


def test_a_photograph_to_look_at_is_square_and_real():
    picture = pictures.photograph('china', 64)
    assert picture.size == (64, 64) and len(picture.getcolors(4096)) > 1000
