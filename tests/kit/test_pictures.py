"Pictures of all kinds, alone and in folders; folders with accidents; decoded once."
import numpy as np
import pytest
from PIL import Image
from publishers import picture_folder

from dinocls.data import load_split, splits
from dinocls.kit import config, pictures
from dinocls.kit.datasets import load_dataset
from dinocls.kit.files import UserError
from dinocls.kit.pictures import decode, to_rgb

pytestmark = pytest.mark.usefixtures('place', 'asked_for')


def test_kinds_that_need_care():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(to_rgb(Image.fromarray(grey.astype(np.uint16) * 257)))[..., 0] == grey).all()  # 16 bits
    assert np.asarray(to_rgb(Image.fromarray(grey).convert('CMYK'))).shape == (16, 16, 3)
    for bad, why in ((Image.new('F', (4, 4)), 'floats'), (Image.new('1', (10_000, 10_000)), 'more than')):
        with pytest.raises(ValueError, match=why): to_rgb(bad)
    for bad, why in ((b'text', 'not a picture'), ('none.png', 'no such file'), ('.', 'a folder')):
        with pytest.raises(ValueError, match=why): decode(bad)


def all_kinds(place):
    "Write a picture of four colours in many modes, formats and sizes, and one that the camera took on its side."
    rgb = Image.fromarray(np.kron(np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], np.uint8),
                                  np.ones((16, 16, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    clear, half = rgb.convert('P'), rgb.convert('RGBA')
    clear.info['transparency'] = bytes(range(4))
    half.putalpha(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)))
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
        kind = name.rpartition('/')[2][0]
        if kind == 'f': continue  # black and white dithers
        wanted = np.repeat(colours @ [[0.299], [0.587], [0.114]], 3, 1) if kind in 'enoq' else colours
        s = len(image)
        assert np.abs(image[[s // 8, s // 8, -s // 8, -s // 8],
                            [s // 8, -s // 8, s // 8,
                             -s // 8]] - wanted).max() < 60, name  # a palette of 216 colours dithers


def test_image_folders_take_all_kinds_of_pictures(tmp_path, asked_for):
    (place := picture_folder(tmp_path/'set', 1, 'a')/'train'/'a').joinpath('000.png').unlink()
    all_kinds(place)
    (tmp_path/'set/test/a').rename(tmp_path/'gone')
    found = load_dataset('imagefolder', tmp_path/'set')
    assert (found.images.shape == (18, 32, 32, 3) and found.files[0] == 'train/a/a.png' and 'test' not in found.splits
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
    (cache := next((tmp_path/'data'/'decoded').glob('*.npy'))).write_bytes(cache.read_bytes()[:-1])  # cut short
    assert load_dataset('imagefolder', place).fingerprint == first and count
    Image.new('RGB', (8, 8)).save(place/'train/a/000.png')
    (place/'train/b/001.png').write_bytes(b'text')
    with pytest.raises(UserError, match='001.png is not a readable'): load_dataset('imagefolder', place)
    changed = load_dataset('imagefolder', place, on_broken='skip')
    assert (not changed.images[0].any() and len(changed.images) == 59
            and len(list((tmp_path/'data'/'decoded').glob('*.npy'))) == 1)


def test_a_cache_that_cannot_be_kept_does_no_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, 'CACHE_FROM', 1)
    place = picture_folder(tmp_path/'set')
    (tmp_path/'data').write_text('a file where a folder should be')
    assert len(load_dataset('imagefolder', place).images) == 60 and 'decoded again each time' in capsys.readouterr().out
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'other'))
    monkeypatch.setattr(pictures.shutil, 'disk_usage', lambda p: type('', (), {'free': 10}))
    assert len(load_dataset('imagefolder', place).images) == 60 and 'No space left' in capsys.readouterr().out
    assert not list((tmp_path/'other').glob('decoded/*.npy'))


def test_sizes_that_differ_are_scaled_to_the_median(tmp_path):
    (place := tmp_path/'train'/'a').mkdir(parents=True)
    for i, size in enumerate([(8, 8), (10, 8), (30, 20)]): Image.new('RGB', size, (60 * i, 0, 0)).save(place/f'{i}.png')
    (place/'3.png').write_text('not a picture'), (place/'.DS_Store').touch(), (place/'Thumbs.db').touch()
    found = load_dataset('imagefolder', tmp_path, on_broken='skip')
    assert found.images.shape == (3, 8, 8, 3) and found.images[:, 4, 4, 0].tolist() == [0, 60, 120]
    assert found.skipped == ('train/a/3.png',)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match='has no folders of classes'): load_dataset('imagefolder', tmp_path)
    for place in ('train/cat', 'train/dog', 'test/dgo'): (tmp_path/place).mkdir(parents=True)
    with pytest.raises(UserError, match="has the class 'dgo'.* did you mean 'dog'"):
        load_dataset('imagefolder', tmp_path)
    (tmp_path/'test/dgo').rmdir()
    with pytest.raises(UserError, match='no images to learn from'): load_dataset('imagefolder', tmp_path)
