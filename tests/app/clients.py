"What the tests of the service and its page share: pictures good and bad, a service in this process, and a server."
import contextlib
import io
import json
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from dinocls.inference import ProductionModel
from dinocls.kit import config
from dinocls.kit.pictures import as_png

CFG, CLASSES = config.preset('smoke'), [str(i) for i in range(10)]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
PNG, KIND = as_png(NOISE[0]), {'content-type': 'image/png'}


@pytest.fixture(scope='session')
def model(saved): return ProductionModel(saved, 'cpu')


@contextlib.contextmanager
def serving(model, **options):
    "The service in this process, without a network."
    from starlette.testclient import TestClient

    from dinocls.app.service import create_app
    app = create_app(model, **{'page': False} | options)
    with TestClient(app, base_url='http://localhost') as client: yield client


def sentence(response, status=None):
    "Check that an answer is a refusal in one sentence."
    assert 400 <= response.status_code < 500 or response.status_code in (503, 504), response.text
    assert status is None or response.status_code == status, response.text
    assert list(response.json()) == ['detail']
    text = response.json()['detail']
    assert isinstance(text, str) and text.endswith('.') and len(text) < 400, text
    for part in ('\n', 'Traceback', 'object at 0x'): assert part not in text
    return text


def alike(a, b):
    np.testing.assert_allclose(list(a['probabilities'].values()), list(b['probabilities'].values()), atol=1e-4)


def encoded(image, kind='PNG', **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def claims(width, height, depth=8, colour=2) -> bytes:
    "Return a PNG of a few bytes that claims this size."
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    body = chunk(b'IDAT', zlib.compress(bytes(1000)))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + body + chunk(b'IEND', b'')


PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((240, 160))


def good_pictures() -> dict:
    "Pictures of all kinds that can be read."
    turned = Image.Exif()
    turned[274] = 6
    deep = Image.fromarray((np.arange(60 * 40).reshape(40, 60) * 27).astype(np.uint16))
    return {'png': encoded(PHOTO), 'jpeg': encoded(PHOTO, 'JPEG'), 'webp': encoded(PHOTO, 'WEBP'),
            'gif': encoded(PHOTO, 'GIF'), 'avif': encoded(PHOTO, 'AVIF'),
            'cmyk': encoded(PHOTO.convert('CMYK'), 'JPEG'),
            'phone': encoded(PHOTO, 'MPO', save_all=True, append_images=[PHOTO]),
            'turned': encoded(PHOTO, 'JPEG', exif=turned),
            'deep': encoded(deep), 'palette': encoded(PHOTO.convert('P')), 'alpha': encoded(PHOTO.convert('RGBA')),
            'grey': encoded(PHOTO.convert('L')), 'bits': encoded(PHOTO.convert('1')),
            'moving': encoded(PHOTO, 'GIF', save_all=True, append_images=[PHOTO.rotate(90)]),
            'progressive': encoded(PHOTO, 'JPEG', progressive=True),
            'polyglot': encoded(PHOTO, 'JPEG') + b'<script>alert(1)</script>PK\x03\x04%PDF-1.4'}


def encoded_header_only() -> list[bytes]:
    "Return headers of other formats that claim 30,000 × 30,000 or so."
    gif = bytearray(encoded(PHOTO, 'GIF'))
    gif[6:10] = struct.pack('<HH', 30_000, 30_000)
    jpeg = bytearray(encoded(PHOTO, 'JPEG'))
    at = jpeg.index(b'\xff\xc0') + 5
    jpeg[at:at + 4] = struct.pack('>HH', 30_000, 30_000)
    return [bytes(gif), bytes(jpeg)]


def slow(n=80_000) -> bytes:
    "Return a JPEG whose headers take time that grows with their number's square."
    return b'\xff\xd8' + (b'\xff\xe1\x00\x6cExif\0\0' + bytes(100)) * n + encoded(PHOTO, 'JPEG')[2:]


SERVER = '''
import json, sys, time
from dinocls.inference import ProductionModel
from dinocls.app.service import serve
model = ProductionModel(sys.argv[1], 'cpu')
class Slow:  # over white pictures
    def __getattr__(self, name): return getattr(model, name)
    def answers(self, pixels):
        if any((p == 255).all() for p in pixels): time.sleep(1)
        return model.answers(pixels)
serve(Slow(), port=0, page=sys.argv[2] == 'page', timeout=float(sys.argv[3]), **json.loads(sys.argv[4]))
'''


@contextlib.contextmanager
def server(folder, page='', timeout=20, **limits):
    "A server in a process of its own; yield the process and its port."
    process = subprocess.Popen([sys.executable, '-c', SERVER, str(folder), page, str(timeout),
                                json.dumps(limits)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env=environment(OMP_NUM_THREADS=1, PYTHONPATH=ROOT))
    try:
        line = process.stdout.readline()
        assert 'answers' in line, line + process.stderr.read()
        yield process, int(line.split()[0].rsplit(':', 1)[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


def head(length, *more):
    more = ''.join(f'{line}\r\n' for line in more)
    return (f'POST /predict HTTP/1.1\r\nHost: localhost\r\n{more}Content-Type: image/png\r\n'
            f'Content-Length: {length}\r\n\r\n'.encode())


def reply(connection) -> bytes:
    "Read an answer as far as its stated length."
    data = b''
    while b'\r\n\r\n' not in data and (part := connection.recv(65536)): data += part
    top, _, rest = data.partition(b'\r\n\r\n')
    length = next((int(line.split(b':')[1]) for line in top.splitlines()
                   if line.lower().startswith(b'content-length')), 0)
    while len(rest) < length and (part := connection.recv(65536)): rest += part
    return top.partition(b'\r\n')[0] + b'\n' + rest


def connected(port):
    connection = socket.create_connection(('127.0.0.1', port))
    connection.settimeout(20)
    return connection


@pytest.fixture(scope='module')
def running(saved):
    "A server with the page: the process and the port."
    with server(saved, 'page', timeout=3) as (process, port): yield process, port


@pytest.fixture
def site(running): return f'http://127.0.0.1:{running[1]}'
