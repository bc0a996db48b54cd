"The service: right answers to many at once, refusals in one sentence, hostile pictures, a graceful end, and the page in a browser."
import asyncio
import base64
import contextlib
import gc
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, environment, refused
from PIL import Image

from dinocls.kit import config
from dinocls.kit.files import UserError
from dinocls.inference import ProductionModel, save_production
from dinocls.kit.pictures import as_png
from dinocls.model import classifier

pytest.importorskip('fastapi', reason="the service is an extra: pip install 'dinocls[serve]'")
httpx = pytest.importorskip('httpx')
from starlette.testclient import TestClient  # noqa: E402

from dinocls.app.service import Limits, Refusal, create_app  # noqa: E402

CFG, CLASSES = config.preset('smoke'), [str(i) for i in range(10)]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
PNG, KIND = as_png(NOISE[0]), {'content-type': 'image/png'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A production folder of an untrained model."
    torch.manual_seed(0)
    return save_production(tmp_path_factory.mktemp('run')/'production', classifier(CFG, 10).eval(), CFG, CLASSES, {'test': {'accuracy': 0.1, 'n': 100}})


@pytest.fixture(scope='module')
def model(folder): return ProductionModel(folder, 'cpu')


class Held:
    "A model that answers only when it is let go, and notes the sizes of the batches."
    def __init__(self, model): self.inner, self.sizes, self.go = model, [], threading.Event()
    def __getattr__(self, name): return getattr(self.inner, name)

    def answers(self, pixels):
        self.sizes.append(len(pixels))
        if len(self.sizes) > 1: self.go.wait(20)  # the first batch is the service's own
        return self.inner.answers(pixels)


@contextlib.contextmanager
def serving(model, **options):
    "The service in this process, without a network."
    with TestClient(create_app(model, **{'page': False} | options)) as client: yield client


def requests(app, bodies, **kwargs):
    "Send many pictures at once; return the answers in order."
    async def all_of_them():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url='http://service', timeout=60) as client:
            return await asyncio.gather(*(client.post('/predict', content=b, headers=KIND, **kwargs) for b in bodies))
    return asyncio.run(all_of_them())


def sentence(response, status=None):
    "Check that an answer is a refusal in one sentence."
    assert 400 <= response.status_code < 500 or response.status_code in (503, 504), response.text
    assert status is None or response.status_code == status, response.text
    assert list(response.json()) == ['detail']
    text = response.json()['detail']
    assert isinstance(text, str) and text.endswith('.') and '\n' not in text and 'Traceback' not in text and 'object at 0x' not in text and len(text) < 400, text
    return text


def alike(a, b): np.testing.assert_allclose(list(a['probabilities'].values()), list(b['probabilities'].values()), atol=1e-4)


def encoded(image, kind='PNG', **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def claims(width, height, depth=8, colour=2) -> bytes:
    "Return a PNG of a few bytes that claims this size."
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')


PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((240, 160))


def good_pictures() -> dict:
    "Pictures of all kinds that can be read."
    turned = Image.Exif()
    turned[274] = 6
    deep = Image.fromarray((np.arange(60 * 40).reshape(40, 60) * 27).astype(np.uint16))
    return {'png': encoded(PHOTO), 'jpeg': encoded(PHOTO, 'JPEG'), 'webp': encoded(PHOTO, 'WEBP'), 'gif': encoded(PHOTO, 'GIF'), 'tiff': encoded(PHOTO, 'TIFF'),
            'bmp': encoded(PHOTO, 'BMP'), 'ppm': encoded(PHOTO, 'PPM'), 'cmyk': encoded(PHOTO.convert('CMYK'), 'JPEG'), 'turned': encoded(PHOTO, 'JPEG', exif=turned),
            'deep': encoded(deep), 'palette': encoded(PHOTO.convert('P')), 'alpha': encoded(PHOTO.convert('RGBA')), 'grey': encoded(PHOTO.convert('L')), 'bits': encoded(PHOTO.convert('1')),
            'moving': encoded(PHOTO, 'GIF', save_all=True, append_images=[PHOTO.rotate(90)]), 'progressive': encoded(PHOTO, 'JPEG', progressive=True),
            'polyglot': encoded(PHOTO, 'JPEG') + b'<script>alert(1)</script>PK\x03\x04%PDF-1.4'}


# --- answers


def test_every_kind_gets_the_models_answer(model):
    with serving(model) as client:
        for name, data in good_pictures().items():
            expected = model.predict(data)
            for response in (client.post('/predict', content=data, headers={'content-type': 'application/octet-stream'}), client.post('/predict', files={'file': (f'a.{name}', data)})):
                assert response.status_code == 200, (name, response.text)
                assert set(response.json()) >= {'prediction', 'confidence', 'probabilities', 'top5'} and response.json()['prediction'] == expected['prediction']
                alike(response.json(), expected)


def test_many_at_once_get_their_own_answers_in_few_batches(model):
    held = Held(model)
    held.go.set()
    got = requests(create_app(held, page=False, max_batch=16, wait_ms=20), [as_png(p) for p in NOISE])
    for response, pixels in zip(got, NOISE): alike(response.json(), model.predict(pixels))
    assert sum(held.sizes) == 65 and max(held.sizes) <= 16 and len(held.sizes) < 33, held.sizes


def test_batch_keeps_order_and_isolates(model):
    with serving(model) as client:
        sent = [as_png(NOISE[0]), b'no picture', as_png(NOISE[1]), claims(60_000, 60_000), b'', as_png(NOISE[2])]
        response = client.post('/predict/batch', files=[('files', (f'{i}.png', data)) for i, data in enumerate(sent)])
        assert response.status_code == 200
        got = response.json()
        assert [list(a) == ['error'] for a in got] == [False, True, False, True, True, False]
        for i, k in ((0, 0), (2, 1), (5, 2)): alike(got[i], model.predict(NOISE[k]))
        assert 'far too many pixels' in got[3]['error'] and all(a['error'].endswith('.') for a in got if 'error' in a)


def test_failing_model_is_told_and_the_next_is_answered(model):
    class Failing(Held):
        def answers(self, pixels):
            if any((p == 7).all() for p in pixels): raise RuntimeError('secret details\nof a failure')
            return super().answers(pixels)
    failing = Failing(model)
    failing.go.set()
    with serving(failing) as client:
        assert 'secret' not in sentence(client.post('/predict', content=as_png(np.full((32, 32, 3), 7, np.uint8)), headers=KIND), 503)
        assert client.post('/predict', content=PNG, headers=KIND).status_code == 200


# --- limits


def test_full_service_says_when_to_come_back(model):
    held = Held(model)
    app = create_app(held, page=False, max_queue=4, max_count=4)
    threading.Timer(0.5, held.go.set).start()
    got = requests(app, [PNG] * 10)
    assert sorted(r.status_code for r in got) == [200] * 4 + [429] * 6
    for r in got:
        if r.status_code == 429: assert int(r.headers['retry-after']) >= 1 and 'full' in sentence(r)
    assert app.state.service.batcher.held == 0


def test_time_out_and_its_place_is_free_again(model):
    held = Held(model)
    app = create_app(held, page=False, timeout=0.3)
    with TestClient(app) as client:
        assert '0.3 s' in sentence(client.post('/predict', content=PNG, headers=KIND), 504)
        assert app.state.service.batcher.held == 0
        held.go.set()
        assert client.post('/predict', content=PNG, headers=KIND).status_code == 200


def test_body_limits_whatever_the_header_says(model):
    def parts(n): yield from [b'x' * 1000] * n
    with serving(model, max_bytes=20_000) as client:
        assert '20,000 bytes' in sentence(client.post('/predict', content=bytes(20_001), headers=KIND), 413)
        sentence(client.post('/predict', content=parts(1000), headers=KIND), 413)  # chunked
        sentence(client.post('/predict', content=parts(1000), headers=KIND | {'content-length': '10'}), 413)
        sentence(client.post('/predict', content=b'', headers=KIND | {'content-length': '9' * 30}), 413)
        for path in ('/predict', '/predict/batch'): sentence(client.post(path, files={'file': bytes(30_000)}), 413)
        assert client.post('/predict', content=PNG, headers=KIND).status_code == 200
        assert client.app.state.service.memory == 0


def test_bodies_of_all_requests_together_are_bounded(model):
    app = create_app(model, page=False, max_memory=50_000, max_bytes=30_000)
    got = requests(app, [PNG + bytes(20_000)] * 8)
    assert {r.status_code for r in got} == {200, 429} and app.state.service.memory == 0


def test_pixels_and_counts(model):
    with serving(model, max_pixels=1024, max_count=3) as client:
        assert client.post('/predict', content=PNG, headers=KIND).status_code == 200
        assert '1,056 pixels' in sentence(client.post('/predict', content=as_png(np.zeros((32, 33, 3), np.uint8)), headers=KIND), 413)
        assert '3' in sentence(client.post('/predict/batch', files=[('files', PNG)] * 4), 413)
        sentence(client.post('/predict', files=[('file', PNG)] * 2), 413)


def test_bombs_are_not_decoded(model, monkeypatch):
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda *_: pytest.fail('decoded'))
    huge = encoded_header_only()
    with serving(model) as client:
        for data in (claims(10_000, 10_000), claims(60_000, 60_000), *huge): assert 'pixels' in sentence(client.post('/predict', content=data, headers=KIND), 413)


def encoded_header_only() -> list[bytes]:
    "Return headers of other formats that claim 30,000 × 30,000 or so."
    gif, bmp = bytearray(encoded(PHOTO, 'GIF')), bytearray(encoded(PHOTO, 'BMP'))
    gif[6:10] = struct.pack('<HH', 30_000, 30_000)
    bmp[18:26] = struct.pack('<ii', 30_000, 30_000)
    jpeg = bytearray(encoded(PHOTO, 'JPEG'))
    at = jpeg.index(b'\xff\xc0') + 5
    jpeg[at:at + 4] = struct.pack('>HH', 30_000, 30_000)
    return [bytes(gif), bytes(bmp), bytes(jpeg), b'P6 30000 30000 255\n' + bytes(99)]


@pytest.mark.parametrize('options, parts', [({'max_byte': 1}, ["did you mean 'max_bytes'"]), ({'timeout': 0}, ['timeout', 'above 0']), ({'max_queue': 5}, ['max_count']), ({'readers': 'x'}, ['not a whole number'])])
def test_limits_that_make_no_sense(model, options, parts):
    with pytest.raises(UserError) as e: create_app(model, page=False, **options)
    for part in parts: assert part in str(e.value)


# --- bodies


@pytest.mark.parametrize('send, status', [
    (dict(content=b'', headers={}), 415), (dict(content=PNG, headers={'content-type': 'text/plain'}), 415), (dict(json={'url': 'http://127.0.0.1/a.png'}), 415),
    (dict(content=b'', headers=KIND), 422), (dict(data={'file': '/etc/passwd'}), 415), (dict(files={'file': (None, '/etc/passwd')}), 422), (dict(files={'file': b''}), 422),
    (dict(content=b'nonsense', headers={'content-type': 'multipart/form-data; boundary=x'}), 400), (dict(content=b'--x\r\n', headers={'content-type': 'multipart/form-data'}), 400),
    (dict(content=b'--x\r\n\r\nabc\r\n--x--', headers={'content-type': 'multipart/form-data; boundary=x'}), 400), (dict(content=PNG, headers={'content-type': 'multipart/form-data; boundary=' + 'x' * 500}), 400),
    *((dict(content=text, headers=KIND), 422) for text in (b'/etc/passwd', b'file:///etc/passwd', b'http://127.0.0.1:1/a.png', str(ROOT/'README.md').encode(), b'../../x.png', b'<svg><image href="/etc/passwd"/></svg>'))])
def test_bodies_that_are_no_picture(model, send, status):
    with serving(model) as client:
        text = sentence(client.post('/predict', **send))
        response = client.post('/predict', **send)
        assert response.status_code == status, text


def test_names_of_files_do_not_matter(model):
    with serving(model) as client:
        for name in ('/etc/passwd', '../../../x.png', 'a\0b.png', 'http://127.0.0.1/x.png', 'x' * 2000, 'ü😀.png'):
            assert client.post('/predict', files={'file': (name, PNG)}).status_code == 200


def test_addresses_and_methods(model):
    with serving(model) as client:
        for path in ('/', '/docs', '/predict/', '/gradio_api/file=/etc/passwd', '/../etc/passwd', '/%2e%2e/etc/passwd'): sentence(client.get(path), 404)
        assert sentence(client.get('/predict'), 405) and client.delete('/healthz').headers['allow'] == 'GET'


# --- the key


def test_key(model):
    basic = lambda text: 'Basic ' + base64.b64encode(text.encode()).decode()
    with serving(model, api_key='gehe1m-ü') as client:
        for headers in ({}, {'x-api-key': 'wrong'}, {'authorization': 'Bearer '}, {'authorization': 'Basic !'}, {'authorization': basic('gehe1m-ü')}, {'x-api-key': b'\xff\xfe'}):
            for path in ('/info', '/metrics', '/openapi.json'):
                assert 'key' in sentence(client.get(path, headers=headers), 401)
            r = client.post('/predict', content=iter([b'never read']), headers=KIND | headers)
            assert sentence(r, 401) and r.headers['www-authenticate'].startswith('Basic')
        assert client.get('/info', headers={'authorization': basic('me:gehe1m-ü')}).status_code == 200
        for path in ('/healthz', '/readyz'): assert client.get(path).status_code == 200
    with serving(model, api_key='plain') as client:
        for headers in ({'x-api-key': 'plain'}, {'authorization': 'Bearer plain'}, {'authorization': basic(':plain')}):
            assert client.post('/predict', content=PNG, headers=KIND | headers).status_code == 200


# --- hostile pictures


def hostile(n: int) -> list[bytes]:
    "Return pictures that were cut, flipped, glued, forged or never were any."
    rng, good = np.random.default_rng(5), list(good_pictures().values())
    cases = [b'', b'\0', b'Dear Sir or Madam', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'\xff\xd8\xff', b'RIFF\xff\xff\xff\xffWEBPVP8 ', b'II*\0' + bytes(99), b'BM' + bytes(60), b'P6 9 9 255 ',
             b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', b'<svg xmlns="http://www.w3.org/2000/svg"/>', claims(0, 5), claims(5, 0), claims(2**31 - 1, 2**31 - 1), claims(50_000, 50_000),
             claims(32, 32, 16), claims(32, 32, 16, 0), claims(32, 32, 3), claims(32, 32, 8, 9), *encoded_header_only(), PNG + PNG, b'PK\x03\x04' + PNG, good[1][:300] + good[0],
             PNG[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10**7))) + PNG[33:], PNG[:33] + chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(10**7))) + PNG[33:]]
    while len(cases) < n:
        data = bytearray(good[rng.integers(len(good))])
        match rng.integers(4):
            case 0: data = data[:rng.integers(len(data))]
            case 1:
                for at in rng.integers(0, min(len(data), 600), 1 + rng.integers(8)): data[at] ^= 1 << rng.integers(8)
            case 2:
                for at in rng.integers(0, len(data), 20): data[at] = rng.integers(256)
            case 3:
                start, other = rng.integers(len(data)), good[rng.integers(len(good))]
                data[start:start + rng.integers(200)] = other[:rng.integers(len(other))]
        cases.append(bytes(data))
    return cases


def test_hostile_pictures(model):
    "A thousand of them: an answer or one sentence each, no file left open, no memory kept."
    cases, process = hostile(1000), psutil.Process()
    app = create_app(model, page=False, max_pixels=1_000_000)
    def state():
        gc.collect()
        return process.num_fds(), process.memory_info().rss
    async def send_all():
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url='http://service', timeout=60) as client:
            async def some(group): return [await client.post('/predict', content=data, headers=KIND) for data in group]
            async def many(data): return sum(await asyncio.gather(*(some(data[i::8]) for i in range(8))), [])
            first = await many(cases[:250])
            before = state()
            return first + await many(cases[250:]), before, state()
    got, before, after = asyncio.run(send_all())
    assert len(got) == 1000 and {r.status_code for r in got} <= {200, 413, 422}
    for r in got: sentence(r) if r.status_code != 200 else None
    assert 100 < sum(r.status_code == 200 for r in got) < 900
    assert after[0] <= before[0] and after[1] - before[1] < 60 * 2**20, (before, after)
    assert app.state.service.batcher.held == app.state.service.memory == 0


# --- what it tells of itself


def test_metrics_and_status(model):
    from prometheus_client.parser import text_string_to_metric_families
    with serving(model) as client:
        client.post('/predict', content=PNG, headers=KIND), client.post('/predict', content=b'x', headers=KIND), client.get('/no/such/place')
        families = {f.name: f for f in text_string_to_metric_families(client.get('/metrics').text)}
        counted = {tuple(s.labels.values()): s.value for s in families['dinocls_requests'].samples if s.name.endswith('_total')}
        assert counted['/predict', '200'] == 1 and counted['/predict', '422'] == 1 and counted['other', '404'] == 1
        assert {'dinocls_request_seconds', 'dinocls_batch_pictures', 'dinocls_batch_seconds', 'dinocls_held_pictures'} <= set(families)
        info = client.get('/info').json()
        assert info['classes'] == CLASSES and info['limits']['max_queue'] == Limits().max_queue and info['metrics']['test']['accuracy'] == 0.1
        assert client.get('/readyz').json() == {'status': 'ready'}
        client.app.state.service.batcher.closing = True
        assert sentence(client.get('/readyz'), 503) and sentence(client.post('/predict', content=PNG, headers=KIND), 503) and client.get('/healthz').status_code == 200


def test_openapi_has_examples(model):
    with serving(model) as client: api = client.get('/openapi.json').json()
    one, many = (api['paths'][p]['post'] for p in ('/predict', '/predict/batch'))
    assert set(one['requestBody']['content']) == {'multipart/form-data', 'image/*', 'application/octet-stream'} and set(many['requestBody']['content']) == {'multipart/form-data'}
    assert one['responses']['200']['content']['application/json']['example']['prediction'] in CLASSES
    assert many['responses']['200']['content']['application/json']['example'][1]['error']
    for status in ('400', '401', '408', '413', '415', '422', '429', '503', '504'): assert one['responses'][status]['content']['application/json']['example']['detail'].endswith('.')
    assert set(api['components']['schemas']['Answer']['properties']) >= {'prediction', 'confidence', 'probabilities', 'top5'}


# --- a real server


SERVER = '''
import sys, time
from dinocls.inference import ProductionModel
from dinocls.app.service import serve
model = ProductionModel(sys.argv[1], 'cpu')
class Slow:  # over white pictures
    def __getattr__(self, name): return getattr(model, name)
    def answers(self, pixels):
        if any((p == 255).all() for p in pixels): time.sleep(1)
        return model.answers(pixels)
serve(Slow(), port=0, page=sys.argv[2] == 'page', timeout=float(sys.argv[3]))
'''


@contextlib.contextmanager
def server(folder, page='', timeout=20):
    "A server in a process of its own; yield the process and its port."
    process = subprocess.Popen([sys.executable, '-c', SERVER, str(folder), page, str(timeout)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env=environment(OMP_NUM_THREADS=1, PYTHONPATH=ROOT))
    try:
        line = process.stdout.readline()
        assert 'answers' in line, line + process.stderr.read()
        yield process, int(line.split()[0].rsplit(':', 1)[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


def head(length): return f'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n'.encode()


def reply(connection) -> bytes:
    "Read an answer as far as its stated length."
    data = b''
    while b'\r\n\r\n' not in data and (part := connection.recv(65536)): data += part
    top, _, rest = data.partition(b'\r\n\r\n')
    length = next((int(line.split(b':')[1]) for line in top.splitlines() if line.lower().startswith(b'content-length')), 0)
    while len(rest) < length and (part := connection.recv(65536)): rest += part
    return top.partition(b'\r\n')[0] + b'\n' + rest


def connected(port):
    connection = socket.create_connection(('127.0.0.1', port))
    connection.settimeout(20)
    return connection


@pytest.fixture(scope='module')
def running(folder):
    "A server, with the page if there is Gradio: the process and the port."
    with server(folder, 'page' * bool(importlib.util.find_spec('gradio')), timeout=3) as (process, port): yield process, port


@pytest.fixture
def site(running): return f'http://127.0.0.1:{running[1]}'


def test_slow_lying_and_broken_clients(running):
    _, port = running
    with connected(port) as slow:
        slow.sendall(head(len(PNG)) + PNG[:50])
        assert b'408' in (got := reply(slow)) and b'"detail"' in got
    with connected(port) as short: short.sendall(head(10_000) + PNG)  # and hangs up
    with connected(port) as long:
        long.sendall(head(len(PNG)) + PNG + b'more than was said')
        assert b'200 OK' in reply(long)
    with connected(port) as bad:
        bad.sendall(head('many'))
        assert b'400' in reply(bad)
    with connected(port) as endless:
        endless.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n')
        with contextlib.suppress(OSError):
            for _ in range(600): endless.sendall(b'10000\r\n' + bytes(65536) + b'\r\n')  # 39 MB
        assert b'413' in reply(endless)
    time.sleep(0.2)
    metrics = urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics').read().decode()
    assert 'dinocls_held_pictures 0.0' in metrics and 'status="500"' not in metrics


def test_mistakes_of_the_command_get_one_sentence(folder, tmp_path, in_process):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        refused(in_process('serve', folder, '--backend', 'torch', '--no-page', '--port', taken.getsockname()[1]), 'Cannot listen', 'in use', '--port')
    refused(in_process('serve', tmp_path/'gone'), 'no production folder', 'gone')
    refused(in_process('serve', folder, '--backend', 'torch', '--port', 99999), 'Cannot listen', '--port')
    refused(in_process('serve', folder, '--backend', 'torch', '--host', 'no.such.host.invalid'), 'Cannot listen', '--host')
    refused(in_process('serve', folder, '--backend', 'torch', '--limit', 'max_bites=3', '--port', 0), 'max_bites', "did you mean 'max_bytes'")
    refused(in_process('serve', folder, '--device', 'tpu'), 'tpu')
    refused(in_process('serve', folder, '--backend', 'onxn'), 'onxn', "did you mean 'onnx'")


@pytest.mark.parametrize('missing', ['fastapi', 'uvicorn', 'prometheus_client'])
def test_missing_extra(missing, folder, monkeypatch, in_process):
    monkeypatch.setitem(sys.modules, missing, None)
    refused(in_process('serve', folder, '--backend', 'torch', '--no-page', '--port', 0), missing, "pip install 'dinocls[serve]'")


# --- the page


NEEDS_GRADIO = pytest.mark.skipif(not importlib.util.find_spec('gradio'), reason='Gradio is not installed')


def ask_page(site, file: bytes, name='a.png', corruption='fog', severity=0, inputs=3, **fields):
    "Do what the browser does: upload, ask, read the events; return what the last one brings, or the refusal."
    with httpx.Client(base_url=site, timeout=20) as client:
        path = fields.get('path') or client.post('/gradio_api/upload', files={'files': (name, file)}).json()[0]
        call = next(d for d in client.get('/config').json()['dependencies'] if len(d['inputs']) == 3)
        data = [{'path': path, 'orig_name': name, 'meta': {'_type': 'gradio.FileData'}} | fields, corruption, severity][:inputs]
        joined = client.post('/gradio_api/queue/join', json={'data': data, 'fn_index': call['id'], 'session_hash': 'test', 'trigger_id': call['targets'][0][0]})
        if joined.status_code != 200: return {'error': sentence(joined, 422)}
        with client.stream('GET', '/gradio_api/queue/data', params={'session_hash': 'test'}) as events:
            for line in events.iter_lines():
                if line.startswith('data:') and (event := json.loads(line[5:]))['msg'] == 'process_completed': return event['output']


@NEEDS_GRADIO
def test_page_answers_as_the_model(site, model):
    data = encoded(PHOTO, 'JPEG')
    message, label, seen, overlay = ask_page(site, data, 'photo.jpg')['data']
    assert label['label'] == model.predict(data)['prediction'] and seen['path'] and overlay['path'] and not message['visible']
    with httpx.Client(base_url=site) as client: assert client.get(seen['url'].replace(site, '')).status_code == 200
    worse = ask_page(site, data, 'photo.jpg', 'gaussian_noise', 5)['data'][1]
    assert {c['label']: c['confidence'] for c in worse['confidences']} != {c['label']: c['confidence'] for c in label['confidences']}


@NEEDS_GRADIO
@pytest.mark.parametrize('data, part', [(b'Dear Sir or Madam', 'not a picture'), (claims(60_000, 60_000), 'too many pixels'), (PNG[:60], 'Cannot use'), (b'', 'Cannot use')])
def test_page_says_what_is_wrong(site, data, part):
    message, label, *_ = ask_page(site, data)['data']
    assert part in message['value'] and message['visible'] and label is None or not label.get('label')


@NEEDS_GRADIO
def test_page_opens_nothing_for_a_client(site):
    "A client may name paths and addresses in place of an upload, in every way that Gradio's protocol has."
    with socket.create_server(('127.0.0.1', 0)) as trap, httpx.Client(base_url=site, timeout=20) as client:
        trap.settimeout(0.3)
        here = f'http://127.0.0.1:{trap.getsockname()[1]}/a.png'
        for fields in (*({'path': p} for p in (here, 'https://example.org/a.png', '/etc/passwd', str(ROOT/'README.md'), 'README.md', f'{tempfile.gettempdir()}/gradio/../../etc/passwd', 'a\0b')),
                       {'path': '/etc/passwd', 'meta': None}, {'path': '/etc/passwd', 'meta': {}}, {'path': '/etc/passwd', 'is_stream': True}, {'path': '/etc/passwd', 'url': here}):
            assert ask_page(site, b'', **fields) == {'error': 'The page takes uploads, and neither paths nor addresses.'}
        for value in ({'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}}, {'path': here, 'meta': {'_type': 'gradio.FileData'}}):  # as the value of another control
            assert 'error' in ask_page(site, PNG, corruption=value)
        for data in ('data:image/png;base64,' + base64.b64encode(claims(60_000, 60_000)).decode(), here):  # in place of a path; the page sees no picture
            assert ask_page(site, PNG, path=None, url=data)['data'][1:] == [{}, None, None] or 'error' not in ask_page(site, PNG, url=data)
        for body in (b'[', b'[' * 200_000, b'null', b'{}', b'{"data": [0], "fn_index": 99, "session_hash": "x"}', b'x' * 2_000_000):
            assert 400 <= client.post('/gradio_api/queue/join', content=body, headers={'content-type': 'application/json'}).status_code < 500
        for path in ('/etc/passwd', ROOT/'settings.ini', here): assert client.get(f'/gradio_api/file={path}').status_code in (403, 404)
        for path in ('proxy=http://127.0.0.1/', 'run-history/connect', 'vibe-edit', 'run/predict', 'stream/a', 'deep_link', 'call/look'): sentence(client.get(f'/gradio_api/{path}'), 404)
        assert client.post('/gradio_api/upload', files={'files': bytes(33 * 2**20)}).status_code == 413
        with pytest.raises(TimeoutError): trap.accept()


@NEEDS_GRADIO
def test_page_loads_nothing_from_elsewhere(site):
    response = httpx.get(site)
    assert "default-src 'self'" in response.headers['content-security-policy']
    assert 'fonts.googleapis' not in response.text and 'fonts.googleapis' not in httpx.get(f'{site}/theme.css').text


# --- the page in a browser


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


class Browser:
    "A headless Chromium, driven over its DevTools."
    def __init__(self, folder, width, height):
        from websocket import create_connection
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-port=0', '--remote-allow-origins=*', f'--user-data-dir={folder}']
        self.process, self.sent, self.asked = subprocess.Popen([BROWSER, *flags, 'about:blank'], stderr=subprocess.PIPE, text=True), 0, []
        port = next(line for line in self.process.stderr if 'listening on ws' in line).rsplit(':', 1)[1].split('/')[0]
        pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json'))
        self.pipe = create_connection(next(p['webSocketDebuggerUrl'] for p in pages if p['type'] == 'page'), timeout=20)
        for domain in ('Page', 'Runtime', 'Network', 'DOM'): self(f'{domain}.enable')
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def __call__(self, method, **params):
        self.sent += 1
        self.pipe.send(json.dumps({'id': self.sent, 'method': method, 'params': params}))
        while (message := json.loads(self.pipe.recv())).get('id') != self.sent:
            if message['method'] == 'Network.requestWillBeSent': self.asked.append(message['params']['request']['url'])
        return message.get('result', {})

    def js(self, code): return self('Runtime.evaluate', expression=code, returnByValue=True)['result'].get('value')

    def until(self, code, seconds=15):
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f'{code}: {self.js("document.body.innerText")}'
            time.sleep(0.1)
        return value

    def give(self, file):
        self.until("!!document.querySelector('input[type=file]')")
        node = self('DOM.querySelector', nodeId=self('DOM.getDocument')['root']['nodeId'], selector='input[type=file]')['nodeId']
        self('DOM.setFileInputFiles', nodeId=node, files=[str(file)])

    def close(self):
        self.pipe.close()
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()


@NEEDS_GRADIO
@pytest.mark.skipif(not BROWSER, reason='no Chromium on this machine')
@pytest.mark.parametrize('width', [1200, 390])
def test_in_a_browser(site, model, tmp_path, width):
    pytest.importorskip('websocket', reason='websocket-client, which comes with Jupyter, is not installed')
    for name, data in (('photo.jpg', encoded(PHOTO, 'JPEG')), ('letter.png', b'Dear Sir or Madam'), ('letter.txt', b'Dear Sir or Madam')): (tmp_path/name).write_bytes(data)
    browser = Browser(tmp_path/'profile', width, 900)
    try:
        browser('Page.navigate', url=site)
        browser.give(tmp_path/'photo.jpg')
        browser.until("!!document.querySelector('.output-class')?.innerText")
        assert browser.js("document.querySelector('.output-class').innerText").strip() == model.predict(encoded(PHOTO, 'JPEG'))['prediction']
        browser.until("document.querySelectorAll('.shown img').length == 2")
        assert browser.js('document.documentElement.scrollWidth') <= width
        browser.js('''document.querySelector('button[aria-label="Clear"]').click()''')
        browser.give(tmp_path/'letter.png')
        assert 'not a picture' in browser.until("document.querySelector('[role=alert]')?.innerText")
        assert 'Traceback' not in browser.js('document.body.innerText')
        browser.js('''document.querySelector('button[aria-label="Clear"]').click()''')
        browser.give(tmp_path/'letter.txt')
        browser.until("document.body.innerText.includes('letter.txt')")  # the page's own refusal
        assert not [url for url in browser.asked if not url.startswith((site, 'data:', 'blob:', 'about:'))]
    finally: browser.close()


# --- the end


def test_stopped_in_the_middle_it_answers_what_it_took_in(running):
    "The last test: nobody new gets in, an open page does not hold it up, and nothing went wrong in all that was before."
    (process, port), white = running, as_png(np.full((32, 32, 3), 255, np.uint8))
    with connected(port) as waiting, connected(port) as sending, connected(port) as idle, connected(port) as page:
        page.sendall(b'GET /gradio_api/heartbeat/test HTTP/1.1\r\nHost: x\r\n\r\n')
        waiting.sendall(head(len(white)) + white)
        sending.sendall(head(len(PNG)) + PNG[:100])
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError): connected(port).close()
        sending.sendall(PNG[100:])
        for connection in (waiting, sending): assert b'200 OK' in reply(connection)
        assert idle.recv(10) == b''
        assert process.wait(10) == -signal.SIGTERM
        log = process.stderr.read()
        assert 'ASGI' not in log and 'dinocls' not in log, log
