"The service: right answers to many at once, refusals in one sentence, hostile pictures, a graceful end."
import asyncio
import base64
import contextlib
import gc
import io
import select
import signal
import socket
import sys
import threading
import time
import urllib.request
import zlib

import numpy as np
import psutil
import pytest
from conftest import ROOT, refused, wait
from PIL import Image

from dinocls.kit.files import UserError
from dinocls.kit.pictures import as_png

pytest.importorskip('fastapi', reason="the service is an extra: pip install '.[serve]'")
httpx = pytest.importorskip('httpx')
pytest.register_assert_rewrite('clients')
from clients import (  # noqa: E402
    CLASSES, KIND, NOISE, PHOTO, PNG, alike, chunk, claims, connected, encoded, encoded_header_only, good_pictures,
    head,
    reply, sentence, server, serving, slow)

from starlette.testclient import TestClient  # noqa: E402

from dinocls.app.server import Server  # noqa: E402
from dinocls.app.service import (  # noqa: E402
    API, Batcher, Guesses, Limits, Refusal, create_app, is_named, limits_from, listen, read_picture)

pytest_plugins = 'clients'


class Held:
    "A model that answers only when it is let go, and notes the sizes of the batches."
    def __init__(self, model): self.inner, self.sizes, self.go = model, [], threading.Event()
    def __getattr__(self, name): return getattr(self.inner, name)

    def answers(self, pixels):
        self.sizes.append(len(pixels))
        if len(self.sizes) > 1: self.go.wait(20)  # the first batch is the service's own
        return self.inner.answers(pixels)


def requests(app, bodies, **kwargs):
    "Send many pictures at once; return the answers in order."
    async def all_of_them():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url='http://localhost',
                                                                       timeout=60) as client:
            return await asyncio.gather(*(client.post('/predict', content=b, headers=KIND, **kwargs) for b in bodies))
    return asyncio.run(all_of_them())


# --- batches


def squares(items):
    time.sleep(0.01)
    return [i * i for i in items]


def test_forty_callers_get_their_own_answers_in_three_batches():
    async def many():
        sizes = []
        async with Batcher(squares, max_batch=16, watch=lambda n, seconds: sizes.append(n)) as batcher:
            return await asyncio.gather(*map(batcher, range(40))), sizes
    assert asyncio.run(many()) == ([i * i for i in range(40)], [16, 16, 8])


def test_a_batch_that_fails_spoils_no_other(caplog):
    async def failing():
        async with Batcher(lambda items: [1 / i for i in items]) as batcher:
            return await asyncio.gather(batcher(0), return_exceptions=True), await batcher(4)
    (error,), after = asyncio.run(failing())
    assert (error.status, after) == (503, 0.25) and 'failed on a batch of 1' in caplog.text


def test_a_place_that_is_not_there():
    async def crowd():
        async with Batcher(squares, max_queue=2) as batcher:
            with batcher.hold(2), pytest.raises(Refusal) as refusal:
                with batcher.hold(): pass
            return batcher.held, refusal.value
    held, refusal = asyncio.run(crowd())
    assert (held, refusal.status, refusal.headers) == (0, 429, {'Retry-After': '1'}) and 'again in 1 s.' in str(refusal)


@pytest.mark.slow
@pytest.mark.parametrize('times', [1.2, 3])
def test_overload_costs_no_answers(times):
    "Whoever cannot be answered in time is refused at once, so that the others are: what is answered stays the same."
    def work(items):
        time.sleep(0.02 * len(items))
        return items
    async def overload(rate, seconds=6):
        done = []
        async def ask():
            try:
                with batcher.hold(): await asyncio.wait_for(batcher(0), 1)
            except (Refusal, asyncio.TimeoutError): return
            done.append(time.monotonic())
        async with Batcher(work, max_batch=8, max_queue=256, patience=0.5) as batcher:
            began, asked = time.monotonic(), []
            for i in range(int(rate * seconds)):
                asked.append(asyncio.create_task(ask()))
                await asyncio.sleep(max(0, began + i / rate - time.monotonic()))
            await asyncio.gather(*asked)
        return sum(t > began + 2 for t in done) / (seconds - 2)
    assert asyncio.run(overload(50 * times)) > 0.8 * 50 * 0.95


# --- answers


def test_every_kind_gets_the_models_answer(model):
    with serving(model) as client:
        for name, data in good_pictures().items():
            expected = model.predict(Image.open(io.BytesIO(data)))
            for response in (client.post('/predict', content=data,
                                         headers={'content-type': 'application/octet-stream'}),
                                         client.post('/predict', files={'file': (f'a.{name}', data)})):
                assert response.status_code == 200, (name, response.text)
                assert (set(response.json()) >= {'prediction', 'confidence', 'probabilities', 'top5'}
                        and response.json()['prediction'] == expected['prediction'])
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
        assert 'secret' not in sentence(client.post('/predict', content=as_png(np.full((32, 32, 3), 7, np.uint8)),
                                                    headers=KIND), 503)
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
    with TestClient(app, base_url='http://localhost') as client:
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


def test_bodies_that_do_not_come_to_an_end_deny_nothing(model):
    "Where memory is short, whoever has been sending longest has to go."
    service = create_app(model, page=False, max_memory=50_000, max_bytes=30_000).state.service
    async def take(*parts):
        left = iter(parts)
        async def receive():
            if not (part := next(left, None)): await asyncio.sleep(60)
            return {'type': 'http.request', 'body': part, 'more_body': part != b'end'}
        try:
            async with service.body({}, receive) as body: return body
        except Refusal as e: return e.status
    async def crowd():
        held = []
        for _ in range(4):
            held.append(asyncio.create_task(take(bytes(20_000))))
            await asyncio.sleep(0.01)
        small = [await take(bytes(12_000), b'end') for _ in range(9)]
        gone = [task.done() and task.result() for task in held]
        for task in held: task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return small, gone
    small, gone = asyncio.run(crowd())
    assert {len(body) for body in small} == {12_003} and gone == [429, 429, 429, False]
    assert service.memory == 0 and not service.arriving


def test_nothing_that_was_sent_is_written_to_disk(model, monkeypatch):
    "Else a kill would leave it behind."
    monkeypatch.setattr('tempfile.SpooledTemporaryFile.rollover', lambda *_: pytest.fail('written'))
    with serving(model, page=True) as client:
        for path in ('/predict', '/look', '/predict/batch'):
            assert client.post(path, files={'file': PNG + bytes(2**22)}).status_code == 200


def test_pixels_and_counts(model):
    with serving(model, max_pixels=1024, max_count=3) as client:
        assert client.post('/predict', content=PNG, headers=KIND).status_code == 200
        assert '1,056 pixels' in sentence(client.post('/predict', content=as_png(np.zeros((32, 33, 3), np.uint8)),
                                                      headers=KIND), 413)
        assert '3' in sentence(client.post('/predict/batch', files=[('files', PNG)] * 4), 413)
        sentence(client.post('/predict', files=[('file', PNG)] * 2), 413)


def test_bombs_are_not_decoded(monkeypatch):
    huge = encoded_header_only()
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda *_: pytest.fail('decoded'))
    for data in (claims(10_000, 10_000), claims(60_000, 60_000), *huge):
        with pytest.raises(Refusal, match='pixels') as refusal: read_picture(data, (32, 32), 50_000_000)
        assert refusal.value.status == 413


@pytest.mark.parametrize('kind', ['BMP', 'TIFF', 'PPM', 'JPEG2000', 'ICO', 'TGA'])
def test_formats_that_no_client_needs_are_not_opened(kind):
    with pytest.raises(Refusal, match='one of the formats AVIF, GIF, JPEG, PNG, WEBP') as refusal:
        read_picture(encoded(PHOTO, kind), (32, 32), 10**6)
    assert refusal.value.status == 422


@pytest.mark.slow
def test_a_picture_that_takes_too_much_ends_its_reader_alone(model):
    "Either by time, which the system counts, or by memory; in a batch, too, the others are answered."
    with serving(model, readers=2, reader_seconds=1, reader_memory=2**26) as client:
        for data in (slow(), claims(6_000, 6_000)):
            assert '1 s or 64 MiB' in sentence(client.post('/predict', content=data, headers=KIND), 413)
            got = client.post('/predict/batch', files=[('files', data), ('files', PNG)]).json()
            assert list(got[0]) == ['error'] and got[1]['prediction'] == model.predict(PNG)['prediction']
        assert client.app.state.service.batcher.held == 0


@pytest.mark.slow
def test_a_reader_ends_with_the_time_of_its_request(model):
    "Nobody goes on decoding for a client that was told to come back."
    with serving(model, readers=1, reader_seconds=60, timeout=2) as client:
        sentence(client.post('/predict', content=slow(), headers=KIND), 504)
        # another starts, for which a busy machine may take longer than a request's time
        wait(lambda: client.post('/predict', content=PNG, headers=KIND).status_code == 200, 30)
        assert not [p for p in psutil.Process().children() if 'anyio' in ' '.join(p.cmdline())
                    and p.cpu_percent(0.2) > 50]


@pytest.mark.parametrize('options, parts',
                         [({'max_byte': 1}, ["did you mean 'max_bytes'"]), ({'timeout': 0}, ['timeout', 'above 0']),
                          ({'max_queue': 5}, ['max_count']), ({'readers': 'x'}, ['not a whole number']),
                          ({'timeout': 'x'}, ['not a number']), ({'max_bytes': 2**30}, ['more than max_memory'])])
def test_limits_that_make_no_sense(model, options, parts):
    with pytest.raises(UserError) as e: create_app(model, page=False, **options)
    for part in parts: assert part in str(e.value)


def test_limits_as_text():
    assert limits_from({'max_queue': '100', 'timeout': '2.5'}) == Limits(max_queue=100, timeout=2.5)


# --- bodies


@pytest.mark.parametrize('send, status', [
    (dict(content=b'', headers={}), 415), (dict(content=PNG, headers={'content-type': 'text/plain'}), 415),
    (dict(json={'url': 'http://127.0.0.1/a.png'}), 415),
    (dict(content=b'', headers=KIND), 422), (dict(data={'file': '/etc/passwd'}), 415),
    (dict(files={'file': (None, '/etc/passwd')}), 422), (dict(files={'file': b''}), 422),
    (dict(content=b'nonsense', headers={'content-type': 'multipart/form-data; boundary=x'}), 400),
    (dict(content=b'--x\r\n', headers={'content-type': 'multipart/form-data'}), 400),
    (dict(content=b'--x\r\n\r\nabc\r\n--x--', headers={'content-type': 'multipart/form-data; boundary=x'}), 400),
    (dict(content=PNG, headers={'content-type': 'multipart/form-data; boundary=' + 'x' * 500}), 400),
    *((dict(content=text, headers=KIND), 422)
      for text in (b'/etc/passwd', b'file:///etc/passwd', b'http://127.0.0.1:1/a.png', str(ROOT/'README.md').encode(),
                   b'../../x.png', b'<svg><image href="/etc/passwd"/></svg>'))])
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
        for path in ('/', '/docs', '/predict/', '/gradio_api/file=/etc/passwd', '/../etc/passwd', '/%2e%2e/etc/passwd'):
            sentence(client.get(path), 404)
        assert (sentence(client.get('/predict'), 405)
                and client.delete('/healthz').headers['allow'] == 'GET, HEAD, OPTIONS')


@pytest.mark.parametrize('path', ['/', '/page.js', '/page.json', '/healthz', '/readyz', '/info', '/metrics',
                                  '/openapi.json'])
def test_head_is_get_without_the_body(model, path):
    with serving(model, page=True) as client:
        got, asked = client.get(path), client.head(path)
        assert got.status_code == asked.status_code == 200 and got.content and not asked.content
        assert asked.headers['content-type'] == got.headers['content-type'] and asked.headers['content-length']
        for method in ('PUT', 'DELETE', 'TRACE', 'PROPFIND', 'POST'):
            assert client.request(method, path).headers['allow'] == 'GET, HEAD, OPTIONS'
        sentence(client.request('PROPFIND', path), 405)


def test_options_and_other_sites(model):
    "A browser that asks whether another site may send a picture, or read an answer, hears of no permission."
    origin = {'origin': 'https://evil.example', 'access-control-request-method': 'POST',
              'access-control-request-headers': 'x-api-key'}
    with serving(model, page=True, api_key='secret') as client:
        for path, allow in (('/predict', 'POST, OPTIONS'), ('/', 'GET, HEAD, OPTIONS')):
            for headers in ({}, origin):
                got = client.options(path, headers=headers)
                assert got.status_code == 204 and got.headers['allow'] == allow and not got.content
        sentence(client.options('/nowhere'), 404)
        for got in (client.options('/predict', headers=origin), client.get('/info', headers=origin | {
                'x-api-key': 'secret'}), client.post('/look', headers=origin)):
            assert not [name for name in got.headers if name.startswith('access-control')]
            assert "frame-ancestors 'none'" in got.headers['content-security-policy']
            assert got.headers['cross-origin-resource-policy'] == 'same-origin'


def test_what_browsers_and_monitors_send(model):
    with serving(model, page=True) as client:
        sentence(client.get('/favicon.ico'), 404)
        for path in ('/%68ealthz', '/healthz?x=%ff', '/healthz?' + 'x' * 5000):
            assert client.get(path, headers={'accept': 'text/html'}).json() == {'status': 'alive'}
        for path in ('/info/', '/%00', '/%ff', '/page.js%2f..', '/static/index.html', '/index.html'):
            sentence(client.get(path), 404)
        page = client.get('/')
        assert page.headers['cache-control'] == 'no-cache'
        for asked in ({'if-none-match': page.headers['etag']}, {'if-modified-since': page.headers['last-modified']}):
            assert client.get('/', headers=asked).status_code == 304
        assert client.get('/healthz', headers={'content-length': '10'}).status_code == 200  # no body is waited for


def test_names_of_the_service(model):
    for host in ('', 'localhost', 'LOCALHOST:8000', '127.0.0.1:8000', '[::1]:8000', '10.0.0.7', 'Book.example:1',
                 'localhost.'):
        assert is_named(host, {'', 'localhost', 'book.example'}), host
    for host in ('evil.example', 'localhost.evil.example', '127.0.0.1.evil.example', '[', 'localhost@evil.example',
                 'a' * 5000, '127.0.0.1,evil.example'):
        assert not is_named(host, {'', 'localhost', 'book.example'}), host
    with serving(model, names=['book.example']) as client:
        for path in ('/info', '/openapi.json', '/metrics'):
            assert '--name' in sentence(client.get(path, headers={'host': 'evil.example'}), 421)
            assert client.get(path, headers={'host': 'book.example:8000'}).status_code == 200
        sentence(client.post('/predict', content=PNG, headers=KIND | {'host': 'evil.example'}), 421)
        assert client.get('/healthz', headers={'host': 'probe.example'}).status_code == 200


# --- the key

def test_wrong_keys_slow_down_whoever_sends_them(monkeypatch):
    now = [100.0]
    monkeypatch.setattr('dinocls.app.service.time.monotonic', lambda: now[0])
    guesses = Guesses()
    def status(key, address='a'):
        try: return guesses.check(key, 'right', address)
        except Refusal as e: return e.status
    assert [status('') for _ in range(50)] == [401] * 50  # a browser that does not know it yet
    assert [status('wrong') for _ in range(50)] == [401] * 11 + [429] * 39
    assert status('right') == 429 and status('right', 'b') is None
    now[0] += 30
    assert status('right') is None
    for i in range(30_000): status('wrong', f'{i}')
    assert len(guesses.until) <= 10_000


def test_key(model):
    basic = lambda text: 'Basic ' + base64.b64encode(text.encode()).decode()
    with serving(model, api_key='gehe1m-ü') as client:
        for headers in ({}, {'x-api-key': 'wrong'}, {'authorization': 'Bearer '}, {'authorization': 'Basic !'},
                        {'authorization': basic('gehe1m-ü')}, {'x-api-key': b'\xff\xfe'}):
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
    cases = [b'', b'\0', b'Dear Sir or Madam', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'\xff\xd8\xff',
             b'RIFF\xff\xff\xff\xffWEBPVP8 ', b'II*\0' + bytes(99), b'BM' + bytes(60), b'P6 9 9 255 ',
             b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', b'<svg xmlns="http://www.w3.org/2000/svg"/>',
             claims(0, 5), claims(5, 0), claims(2**31 - 1, 2**31 - 1), claims(50_000, 50_000),
             claims(32, 32, 16), claims(32, 32, 16, 0), claims(32, 32, 3), claims(32, 32, 8, 9),
             *encoded_header_only(), PNG + PNG, b'PK\x03\x04' + PNG, good[1][:300] + good[0],
             PNG[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10**7))) + PNG[33:],
             PNG[:33] + chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(10**7))) + PNG[33:]]
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


@pytest.mark.slow
def test_hostile_pictures(model):
    "A thousand of them: an answer or one sentence each, no file left open, no memory kept."
    cases, process = hostile(1000), psutil.Process()
    app = create_app(model, page=False, max_pixels=1_000_000)
    def state():
        gc.collect()
        return process.num_fds(), process.memory_info().rss
    async def send_all():
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app=app),
                                                                       base_url='http://localhost',
                                                                       timeout=60) as client:
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
        client.post('/predict', content=PNG, headers=KIND), client.post('/predict', content=b'x',
                                                                        headers=KIND), client.get('/no/such/place')
        families = {f.name: f for f in text_string_to_metric_families(client.get('/metrics').text)}
        counted = {tuple(s.labels.values()): s.value for s in families['dinocls_requests'].samples
                   if s.name.endswith('_total')}
        assert counted['/predict', '200'] == 1 and counted['/predict', '422'] == 1 and counted['other', '404'] == 1
        assert {'dinocls_request_seconds', 'dinocls_batch_pictures', 'dinocls_batch_seconds',
                'dinocls_held_pictures'} <= set(families)
        info = client.get('/info').json()
        assert (info['classes'] == CLASSES and info['limits']['max_queue'] == Limits().max_queue
                and info['metrics']['test']['accuracy'] == 0.1)
        assert client.get('/readyz').json() == {'status': 'ready'}
        client.app.state.service.batcher.closing = True
        assert (sentence(client.get('/readyz'), 503)
                and sentence(client.post('/predict', content=PNG, headers=KIND), 503)
                and client.get('/healthz').status_code == 200)


def test_openapi_has_examples(model):
    with serving(model) as client: api = client.get('/openapi.json').json()
    one, many = (api['paths'][p]['post'] for p in ('/predict', '/predict/batch'))
    assert (set(one['requestBody']['content']) == {'multipart/form-data', 'image/*', 'application/octet-stream'}
            and set(many['requestBody']['content']) == {'multipart/form-data'})
    assert one['responses']['200']['content']['application/json']['example']['prediction'] in CLASSES
    assert many['responses']['200']['content']['application/json']['example'][1]['error']
    for status in ('400', '401', '408', '413', '415', '422', '429', '503', '504'):
        refused = one['responses'][status]
        assert refused['content']['application/json']['schema'] == {'$ref': '#/components/schemas/Problem'}
        assert refused['description'].endswith('.')
    schemas = api['components']['schemas']
    assert set(schemas['Answer']['properties']) >= {'prediction', 'confidence', 'probabilities', 'top5', 'uncertain'}
    assert schemas['Problem']['properties']['detail']['examples'][0].endswith('.')
    form = lambda endpoint: endpoint['requestBody']['content']['multipart/form-data']['schema']['properties']
    assert form(one)['file']['format'] == 'binary' and form(many)['files']['maxItems'] == Limits().max_count
    assert {path: method.upper() for path, methods in api['paths'].items() for method in methods}.items() <= API.items()


# --- a real server


@pytest.mark.slow
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
        endless.sendall(head(0).replace(b'Content-Length: 0', b'Transfer-Encoding: chunked'))
        with contextlib.suppress(OSError):
            for _ in range(600): endless.sendall(b'10000\r\n' + bytes(65536) + b'\r\n')  # 39 MB
        assert b'413' in reply(endless)
    time.sleep(0.2)
    metrics = urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics').read().decode()
    assert 'dinocls_held_pictures 0.0' in metrics and 'status="500"' not in metrics


@pytest.fixture(scope='module')
def crowded(saved):
    "A server with little room: the process and the port."
    with server(saved, 'page', 6, max_connections=40, idle_seconds=2, max_queue=64, readers=1, reader_seconds=1
                ) as (process, port): yield process, port


def ask(port, data=PNG, *more) -> bytes:
    with connected(port) as client:
        client.sendall(head(len(data), *more) + data)
        return reply(client)


@pytest.mark.slow
@pytest.mark.parametrize('begin', [b'', b'GET /in', head(1000), head(1000) + PNG[:9],
                                   b'GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n'])
def test_connections_that_keep_it_waiting_deny_nothing(crowded, begin):
    "More of them than there is room for, in every state of a request: the oldest have to go, the others after a time."
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(crowded[1])) for _ in range(100)]
        for connection in held:
            with contextlib.suppress(OSError): connection.sendall(begin)
        began = time.monotonic()
        for _ in range(5): assert b'200 OK' in ask(crowded[1])
        assert time.monotonic() - began < 3
        for connection in held:
            with contextlib.suppress(OSError):
                while connection.recv(65536): pass
        assert time.monotonic() - began < 10


def test_half_of_the_files_that_may_be_open_are_for_others(model, monkeypatch):
    monkeypatch.setattr('resource.getrlimit', lambda _: (100, 100))
    app = create_app(model, page=False)
    assert Server(app, None).most == 50 and Limits().max_connections == 512


class Wordy:
    "A model whose answer is longer than what a system holds for a client that does not read."
    def __init__(self, model): self.inner = model
    def __getattr__(self, name): return getattr(self.inner, name)
    def answers(self, pixels):
        return [a | {'probabilities': {'x' * 2**25: 1.0}} for a in self.inner.answers(pixels)]


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answers_keeps_its_place_for_a_time_only(model):
    app = create_app(Wordy(model), page=False, idle_seconds=1)
    with listen('127.0.0.1', 0) as listener:
        port, served = listener.getsockname()[1], Server(app, listener)
        (thread := threading.Thread(target=served.run, daemon=True)).start()
        wait(lambda: served.started, 20)
        held = app.state.service.batcher
        with connected(port) as client:
            client.sendall(2 * (head(len(PNG)) + PNG))  # the second answer waits for the first to be read
            wait(lambda: held.held == 1, 10)
            wait(lambda: held.held == 0 and not served.server_state.connections, 10)
            got = 0
            with contextlib.suppress(ConnectionError):
                while part := client.recv(2**20): got += len(part)
            assert got < 2**25
        served.should_exit = True
        thread.join(20)


@pytest.mark.slow
def test_pictures_that_take_long_leave_the_rest_alone(crowded):
    _, port = crowded
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(connected(port)) for _ in range(2)]
        for sender in senders: sender.sendall(head(len(slow())) + slow())
        for path in ('readyz', 'info'): urllib.request.urlopen(f'http://127.0.0.1:{port}/{path}').read()
        assert not select.select(senders, [], [], 0)[0]  # neither is answered yet
        assert b'200 OK' in ask(port)


@pytest.mark.slow
def test_a_body_that_waits_to_be_asked_for(running):
    "Expect: 100-continue: it is asked for, unless the request is refused."
    with connected(running[1]) as client:
        client.sendall(head(len(PNG), 'Expect: 100-continue'))
        assert client.recv(25) == b'HTTP/1.1 100 Continue\r\n\r\n'
        client.sendall(PNG)
        assert b'200 OK' in reply(client)
    with connected(running[1]) as client:
        client.sendall(head(10**9, 'Expect: 100-continue'))
        assert b'413' in reply(client)
    with connected(running[1]) as client:
        client.sendall(b'HEAD /info HTTP/1.1\r\nHost: localhost\r\n\r\n'
                       b'OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n')
        time.sleep(0.5)
        got = client.recv(65536)
        assert got.count(b'HTTP/1.1 ') == 2 and b'{' not in got and b'204' in got
    with connected(running[1]) as client:
        client.sendall(b'GET /healthz HTTP/1.0\r\n\r\n')
        assert b'200 OK' in reply(client)
    for bad in (b'\x16\x03\x01\r\n\r\n', b'GET /info HTTP/1.1\r\n\r\n',
                head(5, 'Content-Length: 6'), head(5, 'Transfer-Encoding: gzip')):
        with connected(running[1]) as client:
            client.sendall(bad)
            assert b'HTTP/1.1 4' in client.recv(100) or b'501' in client.recv(100)


def test_mistakes_of_the_command_get_one_sentence(saved, tmp_path, in_process):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        refused(in_process('serve', saved, '--backend', 'torch', '--no-page', '--port', taken.getsockname()[1]),
                'Cannot listen', 'in use', '--port')
    refused(in_process('serve', tmp_path/'gone'), 'no production folder', 'gone')
    refused(in_process('serve', saved, '--backend', 'torch', '--port', 99999), 'Cannot listen', '--port')
    refused(in_process('serve', saved, '--backend', 'torch', '--host', 'no.such.host.invalid'), 'Cannot listen',
            '--host')
    refused(in_process('serve', saved, '--backend', 'torch', '--limit', 'max_bites=3', '--port', 0), 'max_bites',
            "did you mean 'max_bytes'")
    refused(in_process('serve', saved, '--device', 'tpu'), 'tpu')
    refused(in_process('serve', saved, '--backend', 'onxn'), 'onxn', "did you mean 'onnx'")


@pytest.mark.parametrize('missing', ['fastapi', 'uvicorn', 'prometheus_client'])
def test_missing_extra(missing, saved, monkeypatch, in_process):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, 'dinocls.app.server', raising=False)
    refused(in_process('serve', saved, '--backend', 'torch', '--no-page', '--port', 0), missing,
            "pip install '.[serve]'")


# --- the end


@pytest.mark.slow
def test_stopped_in_the_middle_it_answers_what_it_took_in(running):
    "The last test: nobody new gets in, an open page does not hold it up, and nothing went wrong in all before."
    (process, port), white = running, as_png(np.full((32, 32, 3), 255, np.uint8))
    with connected(port) as waiting, connected(port) as sending, connected(port) as idle, connected(port) as page:
        page.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n')
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
