"Engines: each proves itself equal to PyTorch, or is refused in a sentence."
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinocls.kit import engines
from dinocls.kit.engines import (
    BACKENDS, CLOSE, Subject, agreement, difference, export_onnx, exported, fastest, lacking, measure, measure_sizes,
    scaled, start_backend)
from dinocls.kit.files import UserError

pytestmark = pytest.mark.slow  # it makes and starts graphs

SIDE = 32
EXPORTING = ('onnx', 'onnx-int8', 'openvino', 'openvino-bf16')


def shrink(images):
    "Resize as chapter 2 does."
    x = images.float() / 255
    return x if x.shape[-1] == SIDE else F.interpolate(x, (SIDE, SIDE), mode='bicubic', antialias=True).clamp(0, 1)


def infer(module, images, precision):
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
        return torch.cat([module(shrink(part)).float() for part in images.split(256)]).numpy()


def make(native=(SIDE, SIDE), **fields) -> Subject:
    "Return a small classifier of ten classes."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(16 * 64, 64), nn.GELU(),
                        nn.Linear(64, 10))
    return Subject(net.eval(), shrink, infer, native, torch.device('cpu'), 'fp32', **fields)


@pytest.fixture(scope='module')
def subject(): return make()


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "A cache of exports that these tests share."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


def refused(call, *needed):
    "Check that `call` raises `UserError` with one sentence that holds `needed`."
    with pytest.raises(UserError) as e: call()
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and len(text) < 400, text
    for part in needed: assert part in text, text


# --- how fast


def test_warm_up_is_left_out():
    waits = iter([0.2] + [0.01] * 1000)
    slept = measure(lambda batch: time.sleep(next(waits)), [0] * 4, 0.1, torch.device('cpu'))
    assert 100 < slept['images_per_second'] <= 400 and 10 <= slept['p50_ms'] <= slept['p95_ms'] <= slept['p99_ms'] < 200


def test_sizes_that_take_too_long_are_left_out():
    rows = measure_sizes(lambda batch: time.sleep(0.002 * len(batch)), [0], (8, 1, 1000), 0.05, torch.device('cpu'))
    assert [r['batch'] for r in rows] == [1, 8]


# --- how equal


def test_agreement_forgives_ties_only():
    even = np.array([[0.5, 0.5]])
    assert agreement(even, even) == {'largest': 0.0, 'same': 1.0, 'same_if_clear': True}
    for p, forgiven in ((0.5, True), (0.6, False), (0.4, True)):
        assert agreement(np.array([[p, 1 - p]]), np.array([[0.499, 0.501]]), 0.01)['same_if_clear'] == forgiven
    np.testing.assert_allclose(scaled(np.array([[0., 2]]), 2), [[1 / (1 + np.e), np.e / (1 + np.e)]])


@pytest.mark.parametrize('precision', CLOSE)
def test_what_rounding_explains_is_let_pass_and_no_more(subject, precision):
    images = subject.pictures(16)
    largest = np.abs(infer(subject.model, images, '')).max()
    def off(by): return lambda x: infer(subject.model, x, '') + np.eye(10, dtype=np.float32)[0] * by * largest
    assert not difference(subject, off(0), precision, 16)
    assert not difference(subject, off(1e-4), precision, 16)
    assert 'off by' in difference(subject, off(2 * CLOSE[precision]), precision, 16)
    assert 'off by' in difference(subject, off(np.nan), precision, 16)


def test_probabilities_are_held_to_a_thousandth():
    sharp = make(temperature=0.005)
    largest = np.abs(infer(sharp.model, sharp.pictures(16), '')).max()
    def off(x): return infer(sharp.model, x, '') + 5e-4 * largest * (np.arange(10, dtype=np.float32) % 2)
    assert 'probabilities are off' in difference(sharp, off, 'fp32', 16)
    assert not difference(sharp, off, 'int8', 16)


def test_another_class_is_no_rounding():
    def answers(*logits): return lambda images: np.tile(np.array(logits, np.float32), (len(images), 1))
    sharp = make(temperature=0.1)
    sharp.infer = lambda module, images, precision: answers(2, 1.9, 0)(images)
    assert difference(sharp, answers(1.9, 2, 0), 'int8', 16) == 'it gives pictures another class'
    assert not difference(sharp, answers(2.1, 1.9, 0), 'int8', 16)


def test_an_engine_that_answers_otherwise_in_company_is_found(subject):
    def forgetful(x): return np.repeat(infer(subject.model, x[:1], ''), len(x), 0)
    assert 'off by' in difference(subject, forgetful, 'fp32', 16)


def test_examples_are_what_is_compared():
    some = torch.full((3, 3, SIDE, SIDE), 7, dtype=torch.uint8)
    assert make(examples=some).pictures(2).equal(some[:2]) and len(make(examples=some).pictures(16)) == 3
    assert len(make().pictures(256)) == 16 and make().pictures(4).equal(make().pictures(4))


def test_digest_is_of_weights_and_settings(subject):
    assert make().digest == subject.digest
    assert len({s.digest for s in (subject, make(settings='x'), make(native=(8, 8)))}) == 3
    other = make()
    with torch.no_grad(): other.model[0].bias += 1
    assert other.digest != subject.digest


# --- engines


@pytest.mark.slow
@pytest.mark.parametrize('name', BACKENDS)
def test_backends_answer_alike(subject, name):
    if why := lacking(name, subject.device): pytest.skip(why)
    if name == 'compile': pytest.skip('compiling takes a minute, and needs a compiler')
    try: run = start_backend(subject, name)
    except UserError as e:
        if 'units for bf16' not in str(e): raise
        pytest.skip(str(e))
    images = torch.randint(0, 256, (300, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    want, close = infer(subject.model, images, ''), CLOSE[BACKENDS[name][3] or 'fp32']
    for n in (1, 2, 300):  # any number, also more than fit into one batch
        assert np.abs(run(images[:n]) - want[:n]).max() < close * np.abs(want).max()


@pytest.mark.slow
def test_an_engine_that_resizes_otherwise_is_refused_by_name():
    wide = make((48, 64))
    if why := lacking('openvino', wide.device): pytest.skip(why)
    refused(lambda: start_backend(wide, 'openvino'), 'openvino answers otherwise than PyTorch')
    start_backend(wide, 'onnx')


@pytest.mark.slow
def test_export_is_kept_and_proved(subject, tmp_path, monkeypatch):
    if why := lacking('onnx', subject.device): pytest.skip(why)
    file = exported(subject)
    made = file.stat().st_mtime_ns
    assert exported(make()) == file and file.stat().st_mtime_ns == made
    monkeypatch.setattr(engines, 'session', lambda file: lambda images: np.ones((len(images), 10), np.float32))
    refused(lambda: export_onnx(subject, tmp_path/'model.onnx'), 'answers otherwise')
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told(tmp_path):
    if why := lacking('onnx', torch.device('cpu')): pytest.skip(why)
    class Odd(nn.Module):
        def forward(self, x): return torch.ones(len(x), 10) * float(np.random.rand() > x.sum().item())
    odd = make()
    odd.model = Odd()
    refused(lambda: export_onnx(odd, tmp_path/'model.onnx'), 'cannot be exported to ONNX')
    assert not list(tmp_path.iterdir())


def wrong(subject):
    return lambda images: subject.infer(subject.model, images, '') + 10 * np.eye(10, dtype=np.float32)[3]


@pytest.fixture
def strange(monkeypatch, tmp_path):
    "Engines that are wrong, or fail at once, or fail late; and a memory of their own."
    made_up = {'wrong': (wrong, ('cpu',), (), 'int8'), 'broken': (lambda s: 1 / 0, ('cpu',), (), ''),
               'late': (lambda s: lambda images: 1 / 0, ('cpu',), (), '')}
    monkeypatch.setattr(engines, 'BACKENDS', {'torch': BACKENDS['torch'], **made_up})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path/'dinocls'/'backends.json'


def test_no_engine_that_answers_otherwise_is_started(subject, strange):
    refused(lambda: start_backend(subject, 'wrong'), 'wrong answers otherwise than PyTorch')
    for name in ('broken', 'late'): refused(lambda: start_backend(subject, name), 'cannot be started here')
    with pytest.raises(UserError, match="did you mean 'wrong'"): start_backend(subject, 'wron')
    # only to be seen
    assert start_backend(subject, 'wrong', pictures=0)(subject.pictures(2)).argmax(1).tolist() == [3, 3]


def test_auto_takes_one_that_agrees_and_remembers_it(subject, strange, monkeypatch):
    assert fastest(subject)[0] == 'torch'
    with monkeypatch.context() as patch:
        patch.setattr(engines, 'measure', None)
        assert fastest(subject)[0] == 'torch'  # not measured again
    for spoilt in ('{', strange.read_text().replace('"torch"', '"wrong"')):  # damaged, or by now no longer right
        strange.write_text(spoilt)
        assert fastest(subject)[0] == 'torch'


def test_what_is_not_there_is_named(subject, monkeypatch):
    assert lacking('onnx', torch.device('mps')) == 'does not run on mps'
    refused(lambda: start_backend(subject, 'tensorrt'), 'does not run on cpu')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    for name in EXPORTING: refused(lambda: start_backend(subject, name), 'onnxruntime', '.[export]')
    refused(lambda: export_onnx(subject, 'model.onnx'), '.[export]')


def test_a_provider_that_is_not_there_is_told(tmp_path):
    pytest.importorskip('onnxruntime')
    refused(lambda: engines.session(tmp_path/'model.onnx', ('NoSuchProvider',)), 'no NoSuchProvider')


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b[:-900] + bytes([b[-900] ^ 64]) + b[-899:],
                                    lambda b: b''])
def test_a_damaged_export_is_made_anew(subject, damage):
    if why := lacking('onnx', subject.device): pytest.skip(why)
    for int8 in (False, True):
        whole = (file := exported(subject, int8)).stat().st_size
        file.write_bytes(damage(file.read_bytes()))
        assert exported(subject, int8) == file and file.stat().st_size == whole
    start_backend(subject, 'onnx-int8')


def test_exports_do_without_a_cache(tmp_path, monkeypatch):
    if why := lacking('onnx', torch.device('cpu')): pytest.skip(why)
    (tmp_path/'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    mine = make()
    assert exported(mine).is_file() and not exported(mine).is_relative_to(tmp_path)
    for int8 in (False, True): assert engines.export_to(mine, tmp_path/'to'/'m.onnx', int8).stat().st_size > 1e4
    assert [p.name for p in (tmp_path/'to').iterdir()] == ['m.onnx']


def test_grain_finds_what_grey_examples_hide():
    grey = make((48, 64), examples=torch.full((16, 3, 48, 64), 90, dtype=torch.uint8))
    def nearest_pixel(images): return infer(grey.model, F.interpolate(images.float(), (SIDE, SIDE)).byte(), '')
    assert 'off by' in difference(grey, nearest_pixel, 'fp32', 16)


@pytest.mark.parametrize('native', [(1, 1), (7, 5), (33, 31), (1, 300), (512, 375)])
def test_engines_are_equal_for_pictures_of_any_size(native):
    from types import SimpleNamespace

    from dinocls.augment import preprocess
    if why := lacking('openvino', torch.device('cpu')): pytest.skip(why)
    def prepare(images): return preprocess(images, SimpleNamespace(image_size=SIDE))
    mine = make(native)
    mine.preprocess = prepare
    mine.infer = lambda module, images, precision: module(prepare(images)).detach().numpy()
    noise = torch.randint(-127, 128, (12, 3, *native), generator=torch.Generator().manual_seed(3))
    images = (128 + torch.linspace(0, 1, 12).view(-1, 1, 1, 1) * noise).byte()
    want = scaled(mine.infer(mine.model, images, ''), 0.1)
    for name in ('onnx', 'openvino'):
        assert np.abs(scaled(start_backend(mine, name)(images), 0.1) - want).max() < 1e-3
    start_backend(mine, 'onnx-int8')
