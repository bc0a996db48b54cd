"Hostile input for the production model: pictures that are none, and folders that are damaged, foreign or forged."
import io
import json
import pickle
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dinocls.kit import config
from dinocls.kit.files import UserError, file_digest
from dinocls.kit.pictures import FORMATS
from dinocls.errors import calibrate
from dinocls.inference import CARD, EXAMPLES, FILES, ProductionModel, benchmark, save_production
from dinocls.kit import engines, files
from dinocls.kit.engines import BACKENDS, agreement, scaled
from dinocls.kit.pictures import as_png

CFG = config.preset('smoke')
CLASSES, LAYERS = [str(i) for i in range(10)], len(CFG.head_widths)
RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image, kind='PNG', **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def refused(call, *needed):
    "Check that `call` raises `UserError` with one sentence that holds `needed`."
    with pytest.raises(UserError) as e: call()
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and 'object at 0x' not in text and len(text) < 600, text
    for part in needed: assert part in text, text


@pytest.fixture(scope='session')
def model(saved): return ProductionModel(saved, 'cpu')


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path/'production')


def seal(folder):
    "Make the checksums right again, as a forger would."
    (folder/'checksums.json').write_text(json.dumps({name: file_digest(folder/name) for name in FILES[:2]}))


def change(folder, **fields):
    "Change fields of the description and seal the folder; None removes a field."
    about = json.loads((folder/'config.json').read_text()) | fields
    (folder/'config.json').write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    seal(folder)


# --- answers


def check(answer):
    assert set(answer) == {'prediction', 'confidence', 'probabilities', 'top5', 'uncertain'}
    assert list(answer['probabilities']) == CLASSES and abs(sum(answer['probabilities'].values()) - 1) < 1e-6
    assert answer['top5'][0] == (answer['prediction'], answer['confidence']) and len(answer['top5']) == 5
    assert [p for _, p in answer['top5']] == sorted(answer['probabilities'].values(), reverse=True)[:5]


def test_answer_is_plain_json(model):
    answer = model.predict(RGB)
    check(answer)
    assert json.loads(json.dumps(answer))['prediction'] == answer['prediction']


def test_same_picture_in_every_guise(model, tmp_path):
    (tmp_path/'a picture ü.png').write_bytes(as_png(RGB))
    path = tmp_path/'a picture ü.png'
    guises = [RGB, torch.from_numpy(RGB).permute(2, 0, 1), Image.fromarray(RGB), as_png(RGB), bytearray(as_png(RGB)),
              memoryview(as_png(RGB)),
              path, str(path), np.asfortranarray(RGB), RGB[::-1][::-1], encoded(Image.fromarray(RGB), 'BMP'),
              encoded(Image.fromarray(RGB), 'TIFF')]
    assert len({model.predict(g)['confidence'] for g in guises}) == 1


def test_native_pixels_are_not_touched(model):
    from dinocls.kit.pictures import to_pixels
    pixels = RGB[:, :24].repeat(2, 0).repeat(2, 1)[:32, :32]
    assert (to_pixels(as_png(pixels), model.native) == pixels).all()


def test_batch_equals_single(model):
    # more than one batch of `infer`
    images = list(np.random.default_rng(1).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8))
    batch = model.predict_batch(images)
    for i in (0, 7, 255, 256, 299):
        np.testing.assert_allclose(list(batch[i]['probabilities'].values()),
                                   list(model.predict(images[i])['probabilities'].values()), atol=1e-4)
    turned = model.predict_batch(images[::-1])[::-1]
    for a, b in zip(batch, turned):
        np.testing.assert_allclose(list(a['probabilities'].values()), list(b['probabilities'].values()), atol=1e-4)


@pytest.mark.parametrize('images', [[], (), np.zeros((0, 32, 32, 3), np.uint8), iter([])])
def test_empty_batch(model, images): assert model.predict_batch(images) == []


def test_batch_kinds(model):
    batch = np.stack([RGB, RGB])
    assert len(model.predict_batch(batch)) == len(model.predict_batch(torch.from_numpy(batch).permute(0, 3, 1,
        2))) == len(model.predict_batch(i for i in batch)) == 2


# --- pictures to accept


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'LA', 'PA', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I;16',
                                  'I'])
@pytest.mark.parametrize('size', [(32, 32), (33, 17)])
def test_modes(model, mode, size): check(model.predict(Image.new(mode, size)))


@pytest.mark.parametrize('mode,kind', [('1', 'PNG'), ('L', 'PNG'), ('P', 'PNG'), ('LA', 'PNG'), ('RGBA', 'PNG'),
                                       ('P', 'GIF'), ('CMYK', 'JPEG'),
                                       ('L', 'JPEG'), ('RGB', 'JPEG'), ('CMYK', 'TIFF'), ('RGB', 'PPM'),
                                       ('RGB', 'BMP')])
def test_files_of_modes(model, mode, kind): check(model.predict(encoded(Image.fromarray(RGB).convert(mode), kind)))


@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1), (31, 33), (2000, 1500)])
def test_sizes(model, size): check(model.predict(Image.new('RGB', size, (200, 10, 30))))


def test_sixteen_bits_are_scaled_not_cut_off(model):
    grey = np.random.default_rng(2).integers(0, 256, (32, 32), dtype=np.uint8)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    want = model.predict(grey)['probabilities']
    for item in (sixteen, encoded(sixteen), encoded(sixteen, 'TIFF'), Image.fromarray(grey.astype(np.int32) * 257)):
        assert model.predict(item)['probabilities'] == want


def test_exif_rotation(model):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90)
    assert model.predict(encoded(turned, exif=exif))['probabilities'] == model.predict(RGB)['probabilities']
    assert model.predict(encoded(turned))['probabilities'] != model.predict(RGB)['probabilities']


def test_first_frame_of_an_animation(model):
    frames = [Image.new('RGB', (32, 32), c) for c in ('red', 'green')]
    check(model.predict(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])))


def test_image_given_is_not_changed(model):
    image, values = Image.open(io.BytesIO(as_png(RGB))), RGB.copy()
    model.predict(image), model.predict(values)
    assert image.size == (40, 24) and (np.asarray(image) == RGB).all() and (values == RGB).all()


# --- pictures to refuse

PNG, JPEG = as_png(RGB), encoded(Image.fromarray(RGB), 'JPEG')


@pytest.mark.parametrize('data', [b'', b'\0', b'Dear Sir or Madam, this is no picture.', b'\x89PNG\r\n\x1a\n',
                                  PNG[:20], PNG[:60], PNG[:-30], JPEG[:3], JPEG[:100],
                                  JPEG[:-200], b'\xff\xd8\xff' + bytes(500), b'GIF89a', b'II*\0' + bytes(100),
                                  b'BM' + bytes(60), b'P6 9 9 255 ',
                                  b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
                                  b'<svg xmlns="http://www.w3.org/2000/svg"/>', pickle.dumps([1])])
def test_bytes_that_are_no_picture(model, tmp_path, data):
    refused(lambda: model.predict(data), 'Cannot use the image: ')
    (tmp_path/'bad.png').write_bytes(data)
    refused(lambda: model.predict(tmp_path/'bad.png'), 'bad.png')


@pytest.mark.slow
def test_every_cut_and_many_flips_answer_or_refuse(model):
    "Whatever a file's damage, the outcome is an answer or a `UserError`."
    rng = np.random.default_rng(3)
    for good in (PNG, JPEG, encoded(Image.fromarray(RGB).convert('P'), 'GIF'), encoded(Image.fromarray(RGB), 'TIFF'),
                 encoded(Image.fromarray(RGB), 'BMP')):
        cases = [good[:n] for n in range(0, len(good), max(1, len(good) // 40))]
        for _ in range(60):
            bad = bytearray(good)
            for at in rng.integers(0, min(len(bad), 400), 4): bad[at] = rng.integers(256)
            cases.append(bytes(bad))
        for case in cases:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                try: check(model.predict(case))
                except UserError as e: assert '\n' not in str(e)


@pytest.mark.parametrize('values,needed', [
    (np.zeros((0, 32, 3), np.uint8), 'empty'), (np.zeros((0, 0), np.uint8), 'empty'),
    (np.zeros((32, 32, 3)), 'float64'), (np.zeros((32, 32), bool), 'bool'),
    (np.zeros((32, 32), np.int64), 'int64'), (np.full((32, 32), None), 'object'),
    (np.zeros((32, 32, 4), np.uint8), '(32, 32, 4)'), (np.zeros((3, 32, 32), np.uint8), '(3, 32, 32)'),
    (np.zeros((1, 32, 32, 3), np.uint8), '(1, 32, 32, 3)'), (np.zeros(32, np.uint8), '(32,)'),
    (np.uint8(3) + np.zeros((), np.uint8), ''),
    (torch.zeros(3, 32, 32), 'float32'), (torch.zeros(3, 32, 32, dtype=torch.bfloat16), 'bfloat16'),
    (torch.zeros(32, 32, 3, dtype=torch.uint8), '(32, 32, 3)'),
    (torch.zeros(3, 0, 32, dtype=torch.uint8), 'empty'),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), '(1, 3, 32, 32)'),
    (torch.zeros(3, 32, 32, dtype=torch.uint8, device='meta'), ''),
    (None, 'NoneType'), (7, 'int'), ({'image': 1}, 'dict'), ([[0, 1], [1, 0]], 'list'),
    (Image.new('F', (8, 8)), 'floats'), (Image.new('RGB', (0, 5)), 'empty'),
    (Image.fromarray(np.full((4, 4), -5, np.int32)), '65,535'), (open, '')])
def test_values_that_are_no_picture(model, values, needed):
    refused(lambda: model.predict(values), 'Cannot use the image: ', needed)
    refused(lambda: model.predict_batch([RGB, values]), 'Cannot use images[1]: ', needed)


@pytest.mark.parametrize('path,needed', [('no/such/file.png', 'no such file'), ('', ''), ('a\0b', ''),
                                         ('x' * 5000, ''), ('/dev/null', 'no such file'),
                                         ('http://127.0.0.1/a.png', 'no such file')])
def test_paths_that_lead_nowhere(model, path, needed):
    refused(lambda: model.predict(path), 'Cannot use the image', needed)


def test_folder_given_as_picture(model, tmp_path):
    refused(lambda: model.predict(tmp_path), str(tmp_path), 'it is a folder')


def claims(width, height) -> bytes:
    "Return a PNG of a few bytes that claims this size."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR',
                                        struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT',
                                            zlib.compress(bytes(1000))) + chunk(b'IEND', b'')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [10_000, 12_000, 60_000])
def test_decompression_bombs(model, side): refused(lambda: model.predict(claims(side, side)), 'pixels')


def test_bomb_that_is_a_lazy_image(model, monkeypatch):
    lazy = Image.open(io.BytesIO(encoded(Image.new('1', (3000, 3000)))))
    monkeypatch.setattr('dinocls.kit.pictures.MAX_PIXELS', 1_000_000)
    refused(lambda: model.predict(lazy), '3000×3000 pixels')


def test_readers_that_start_other_programs_are_not_asked(): assert not {'EPS', 'WMF', 'PSD'} & set(FORMATS)


def test_bad_item_is_named_by_its_index(model, tmp_path):
    refused(lambda: model.predict_batch([RGB, PNG, PNG[:50], JPEG]), 'images[2]')
    refused(lambda: model.predict_batch([tmp_path/'gone.png']), 'images[0]', 'gone.png')


@pytest.mark.parametrize('one', [RGB, RGB[..., 0], torch.zeros(3, 9, 9, dtype=torch.uint8), Image.new('RGB', (9, 9)),
                                 PNG, 'cat.png', {'a': RGB}, None, 3])
def test_single_image_as_a_batch(model, one):
    refused(lambda: model.predict_batch(one), 'use predict for a single image')


def test_bad_items_are_isolated(model, tmp_path):
    good = [RGB, PNG, JPEG]
    items = [PNG[:50], good[0], tmp_path/'gone.png', *good[1:], None, np.zeros((3, 3))]
    for size in (1, 2, 64):
        answers = model.predict_batch(items, on_error='return', size=size)
        assert [set(a) == {'error'} for a in answers] == [True, False, True, False, False, True, True]
        assert all('\n' not in a['error'] and f'images[{i}]' in a['error'] for i, a in enumerate(answers)
                   if 'error' in a)
        for a, b in zip([answers[1], *answers[3:5]], good):
            np.testing.assert_allclose(list(a['probabilities'].values()),
                                       list(model.predict(b)['probabilities'].values()), atol=1e-5)
    refused(lambda: model.predict_batch(items, on_error='skip'), "on_error='skip'")


def test_the_first_bad_item_of_many_batches_is_named(model):
    refused(lambda: model.predict_batch((None if i in (70, 90) else RGB for i in range(200)), size=16), 'images[70]')


# --- confidence and backends


def test_uncertain_follows_from_the_promise(tmp_path, model):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    found = calibrate(rng.normal(size=(400, 10)) + 9 * np.eye(10)[labels], labels)
    sure = ProductionModel(save_production(tmp_path/'p', model.model, CFG, CLASSES, {}, calibration=found), 'cpu')
    z = model.run(torch.from_numpy(RGB[:, :24]).permute(2, 0, 1)[None].repeat(1, 1, 2, 2)[..., :32, :32].contiguous())
    answer = sure.predict_batch([RGB])[0]
    assert (answer['uncertain'] == (answer['confidence'] < found['promise']['least'])
            and answer['prediction'] == model.predict(RGB)['prediction']
            and model.predict(RGB)['uncertain'] is None)
    np.testing.assert_allclose(scaled(z, 1.0).sum(), 1)
    assert 'wrong, with 95 % confidence' in (tmp_path/'p'/CARD).read_text()


def test_the_card_may_be_edited(folder):
    (folder/CARD).write_text('# Mine')
    ProductionModel(folder, 'cpu')
    (folder/CARD).unlink()
    ProductionModel(folder, 'cpu')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['onnx', 'openvino'])
@pytest.mark.parametrize('native', [(32, 32), (48, 64)])
def test_what_is_served_by_another_engine_is_what_was_evaluated(tmp_path, model, monkeypatch, name, native):
    if why := engines.lacking(name, model.device): pytest.skip(why)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    place = save_production(tmp_path/'p', model.model, CFG, CLASSES, {}, native=native)
    pixels = list(np.random.default_rng(4).integers(0, 256, (20, *native, 3), dtype=np.uint8))
    same = agreement(ProductionModel(place, 'cpu', name).probabilities(pixels),
                     ProductionModel(place, 'cpu').probabilities(pixels))
    assert same['largest'] < 1e-3 and same['same_if_clear']


def test_a_backend_proves_itself_on_the_examples_of_the_folder(tmp_path, model, monkeypatch):
    seen, images = [], torch.full((5, 3, 32, 32), 9, dtype=torch.uint8)
    def spy(subject):
        def run(x): return seen.append(x) or subject.infer(subject.model, x, '')
        return run
    monkeypatch.setitem(BACKENDS, 'spy', (spy, ('cpu',), (), 'fp32'))
    kept = {'images': images, 'labels': np.zeros(5), 'logits': np.zeros((5, 10))}
    cfg = config.preset('smoke', precision='fp32')
    place = save_production(tmp_path/'p', model.model, cfg, CLASSES, {}, examples=kept)
    assert (place/EXAMPLES).is_file() and ProductionModel(place, 'cpu', 'spy').backend == 'spy'
    seen = torch.cat(seen)  # one to start, all to compare, and four of noise
    assert (seen[:6] == 9).all() and len(seen) == 10


@pytest.mark.parametrize('name', ['torch', 'auto', 'wrong', 'late', 'onyx'])
def test_no_backend_that_answers_otherwise_is_served(saved, tmp_path, monkeypatch, name):
    def wrong(s): return lambda images: s.infer(s.model, images, '') + 10 * np.eye(10, dtype=np.float32)[3]
    made_up = {'wrong': (wrong, ('cpu',), (), ''), 'late': (lambda s: lambda images: 1 / 0, ('cpu',), (), '')}
    monkeypatch.setattr(engines, 'BACKENDS', {'torch': BACKENDS['torch'], **made_up})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    if name in ('torch', 'auto'): assert ProductionModel(saved, 'cpu', name).backend == 'torch'
    else:
        refused(lambda: ProductionModel(saved, 'cpu', name),
                f'backend {name!r}' if name == 'onyx' else f'backend {name}')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_answers_alike(saved, model):
    images = list(np.random.default_rng(5).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    np.testing.assert_allclose(ProductionModel(saved, 'cuda').probabilities(images), model.probabilities(images),
                               atol=0.02)


# --- checkpoints of a run


def test_what_a_run_keeps_is_served(tmp_path, model):
    from safetensors.torch import save_file
    cfg = config.preset('smoke', out=str(tmp_path))
    record = {'config': {'dataset': 'digits', 'backbone': cfg.backbone, 'head_widths': list(cfg.head_widths),
                         'head_dropout': list(cfg.head_dropout), 'image_size': 32}}
    state = model.model.state_dict()
    (folder := tmp_path/'phase2-1').mkdir()
    save_file(state, file := folder/'weights.safetensors')
    known = {file.name: {'bytes': file.stat().st_size, 'sha256': files.file_digest(file)}}
    record |= {'fields': {}, 'content': {}, 'code': {}, 'after': {}, 'parts': {'weights': 'tensors'}, 'files': known}
    (folder/'run.json').write_text(json.dumps(record))
    torch.save({'plan': json.dumps(record['config']), 'best': {'weights': state}, 'ema': None, 'model': state},
               tmp_path/'checkpoint.pt')
    torch.save({'plan': json.dumps(record['config']),
                'best': {'weights': {k: v for k, v in state.items() if k.startswith('head')}}}, tmp_path/'head.pt')
    for place in (folder, folder/'weights.safetensors', tmp_path/'checkpoint.pt'):
        np.testing.assert_allclose(ProductionModel(place, 'cpu').probabilities([RGB[:8, :8]]),
                                   model.probabilities([RGB[:8, :8]]), atol=1e-6)
    refused(lambda: ProductionModel(tmp_path/'head.pt', 'cpu'), 'only a head')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(lambda: ProductionModel(folder, 'cpu'), 'weights.safetensors of phase2-1 is damaged')
    (folder/'run.json').write_text('{}')
    torch.save({'a': Trap()}, tmp_path/'trap.pt')
    refused(lambda: ProductionModel(folder, 'cpu'), 'holds no whole result')
    refused(lambda: ProductionModel(tmp_path/'trap.pt', 'cpu'), 'holds no model')
    assert not Trap.sprung


# --- benchmark


@pytest.mark.slow
def test_benchmark(model):
    speed = benchmark(model, batch_sizes=(4, 1), seconds=2)
    assert speed['fps'] > 0 and speed['hardware'] and speed['device'] == 'cpu'
    assert [r['batch'] for r in speed['rows'] if r['input'] == 'pixels'] == [1, 4]
    for row in speed['rows']: assert 0 < row['p50_ms'] <= row['p95_ms'] <= row['p99_ms'] and row['runs'] >= 3
    assert benchmark(model, [PNG, RGB], batch_sizes=(3,), seconds=0.02)['batch'] == 3


@pytest.mark.parametrize('options', [{'batch_sizes': ()}, {'batch_sizes': (0, 1)}, {'seconds': 0}, {'images': []}])
def test_benchmark_refuses(model, options): refused(lambda: benchmark(model, **options), 'benchmark')


def test_device_that_is_not_there(saved): refused(lambda: ProductionModel(saved, 'tpu'), 'tpu')


# --- folders


@pytest.mark.parametrize('name', FILES)
def test_missing_file(folder, name):
    (folder/name).unlink()
    refused(lambda: ProductionModel(folder), name, 'missing')
    (folder/name).mkdir()
    refused(lambda: ProductionModel(folder), name, 'missing')


@pytest.mark.parametrize('name', FILES[:2])
def test_one_changed_byte(folder, name):
    data = bytearray((folder/name).read_bytes())
    data[data.rindex(b'e') if name == 'config.json' else -1] ^= 1
    (folder/name).write_bytes(data)
    refused(lambda: ProductionModel(folder), name)


def test_cut_short(folder):
    (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:-100])
    refused(lambda: ProductionModel(folder), 'SHA-256')


@pytest.mark.parametrize('name', FILES[1:])
@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'3', b'null', b'\xff\xfe\0', b'[' * 100_000, b'{"format": '])
def test_broken_json(folder, name, content):
    (folder/name).write_bytes(content)
    refused(lambda: ProductionModel(folder), name)


@pytest.mark.parametrize('version', [0, 1, 2, 4, '3', [3], {'a': 1}])
def test_unknown_format(folder, version):
    change(folder, format=version)
    refused(lambda: ProductionModel(folder), 'format', 'reads format 3')


def test_places_that_are_no_production_folder(tmp_path):
    (file := tmp_path/'file').touch()
    for place, needed in ((tmp_path/'gone', 'no production folder'), (file, 'no production folder'),
                          (tmp_path, 'missing'), ('', 'missing'), ('a\0b', 'no production folder')):
        refused(lambda: ProductionModel(place), needed)


@pytest.mark.parametrize('fields', [
    {'backbone': 'book-digit'}, {'backbone': 7}, {'backbone': None}, {'image_size': 33}, {'image_size': -32},
    {'image_size': '32'}, {'image_size': 64},
    {'head_widths': []}, {'head_widths': [1] * LAYERS}, {'head_widths': ['a'] * LAYERS},
    {'head_widths': [-1] * LAYERS}, {'head_widths': [10**30] * LAYERS},
    {'head_widths': [10**9] * LAYERS}, {'head_dropout': [2] * LAYERS}, {'head_dropout': ['a'] * LAYERS},
    {'temperature': 0}, {'temperature': 'hot'}, {'temperature': None}, {'promise': 3}, {'promise': {}},
    {'promise': {'risk': 0.02, 'least': 2.0, 'sure': 0.95, 'images': 9, 'answered': 9}},
    {'precision': 'int4'}, {'pooling': 'max'}, {'pooling': 'cls+mean'}, {'pooling': 'attention'}, {'classes': []},
    {'classes': ['a'] * 10}, {'classes': CLASSES[:9]}, {'classes': list(range(10))}, {'classes': 'abcdefghij'},
    {'preprocessing': None}, {'preprocessing': {}}, {'preprocessing': {'native_size': [0, 32]}},
    {'preprocessing': {'native_size': [32, 32], 'mean': [0, 0, 0]}}])
def test_descriptions_that_fit_nothing(folder, fields):
    change(folder, **fields)
    refused(lambda: ProductionModel(folder), str(folder))


@pytest.mark.parametrize('content', [b'', b'x', bytes(8), b'\xff' * 100, pickle.dumps({'a': 1})])
def test_weights_that_are_not_safetensors(folder, content):
    (folder/'model.safetensors').write_bytes(content)
    seal(folder)
    refused(lambda: ProductionModel(folder), 'not a safetensors file')


class Trap:
    "Sets a flag when it is unpickled."
    sprung = False
    def __reduce__(self): return (setattr, (Trap, 'sprung', True))


def test_pickles_are_not_opened(folder):
    for write in (lambda f: f.write_bytes(pickle.dumps(Trap())), lambda f: torch.save({'a': Trap()}, f)):
        write(folder/'model.safetensors')
        seal(folder)
        refused(lambda: ProductionModel(folder), 'not a safetensors file')
    assert not Trap.sprung


def test_weights_of_another_model(folder):
    from safetensors.torch import load_file, save_file
    good = load_file(folder/'model.safetensors')
    bias = [k for k in good if k.startswith('head.') and good[k].shape == (10,)][-1]
    for bad, needed in (({**good, 'more': torch.zeros(1)}, "'more'"),
                        ({k: v for k, v in good.items() if k != bias}, bias),
                        (good | {bias: good[bias].double()}, bias),
                        (good | {bias: torch.zeros(11)}, bias),
                        (good | {bias: torch.full((10,), torch.nan)}, 'not finite')):
        save_file(bad, folder/'model.safetensors')
        seal(folder)
        refused(lambda: ProductionModel(folder), needed)


# --- saving


def test_saving_refuses_to_destroy(tmp_path, model):
    (tmp_path/'home').mkdir()
    (tmp_path/'home'/'thesis.txt').write_text('years of work')
    for place in (tmp_path/'home', tmp_path/'home'/'thesis.txt'):
        refused(lambda: save_production(place, model.model, CFG, CLASSES, {}), 'not a production folder')
    refused(lambda: save_production(tmp_path/'home'/'thesis.txt'/'p', model.model, CFG, CLASSES, {}), 'Cannot write')
    assert (tmp_path/'home'/'thesis.txt').read_text() == 'years of work' and len(list(tmp_path.rglob('*'))) == 2


def test_failed_save_leaves_the_old_model(tmp_path, model, monkeypatch):
    folder = save_production(tmp_path/'p', model.model, CFG, CLASSES, {})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('dinocls.inference.file_digest', full)
    refused(lambda: save_production(folder, model.model, CFG, CLASSES, {'new': 1}), 'No space left')
    assert ({p.name: p.read_bytes() for p in folder.iterdir()} == before
            and [p.name for p in tmp_path.iterdir()] == ['p'])


def test_saving_what_could_not_be_loaded(tmp_path, model):
    for cfg, classes in ((CFG, CLASSES[:9]), (CFG, ['a'] * 10), (CFG, []),
                         (config.preset('smoke', head_widths=(7,) * len(CFG.head_widths)), CLASSES)):
        refused(lambda: save_production(tmp_path/'p', model.model, cfg, classes, {}))
    assert not list(tmp_path.iterdir())


def test_round_trip_is_exact_and_repeatable(tmp_path, saved, model):
    again = save_production(tmp_path/'p', model.model, CFG, CLASSES, {'test': {'accuracy': 0.1, 'n': 100}})
    for name in FILES: assert (again/name).read_bytes() == (saved/name).read_bytes()
    assert model.predict(RGB) == ProductionModel(again, 'cpu').predict(RGB)
    assert model.config['metrics'] == {'test': {'accuracy': 0.1, 'n': 100}}
