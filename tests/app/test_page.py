"The page: what the model says, nothing opened for a client, nothing loaded from elsewhere, and all of it in a browser."
import base64
import importlib.util
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip('fastapi', reason="the service is an extra: pip install 'dinocls[serve]'")
httpx = pytest.importorskip('httpx')
pytest.register_assert_rewrite('clients')
from clients import PHOTO, PNG, claims, encoded, sentence, serving  # noqa: E402

from dinocls.app.page import attention_overlay, enlarged  # noqa: E402
from dinocls.app.service import Refusal, checked, is_page, is_upload, only_uploads, upload_folder  # noqa: E402

pytest_plugins = 'clients'
NO_GRADIO = pytest.mark.skipif(not importlib.util.find_spec('gradio'), reason='Gradio is not installed')


def test_which_addresses_are_the_pages():
    for path in ('/', '/assets/a.js', '/gradio_api/file=/uploads/x.png'): assert is_page(path)
    for path in ('/gradio_api/file=http://a/b', '/gradio_api/proxy=http://a/b', '/etc'): assert not is_page(path)


def test_an_event_brings_uploads_only():
    here = upload_folder().name
    found = [is_upload(p) for p in (f'{here}/a.png', f'{here}/../a.png', '/etc/passwd', 'http://127.0.0.1/a', 'a\0b',
                                    5)]
    assert found == [True] + 5 * [False]
    event = {'data': [{'path': f'{here}/a', 'url': 'http://a/b'}, 'fog', 2]}
    assert only_uploads(event) == {'data': [{'path': f'{here}/a'}, 'fog', 2]}
    assert json.loads(checked(json.dumps(event).encode())) == only_uploads(event)
    for bad in (b'{', b'[' * 100_000, b'[]' * 10**6, b'[{"path": "/etc/passwd"}]', b'\xff'):
        with pytest.raises(Refusal): checked(bad)


@NO_GRADIO
@pytest.mark.slow
def test_page_and_api_in_one_app(model):
    with serving(model, page=True, api_key='secret') as client:
        stranger, friend = client.get('/'), client.get('/', headers={'X-API-Key': 'secret'})
        assert stranger.status_code == 401 and stranger.headers['www-authenticate'].startswith('Basic')
        assert 'What is in this picture?' in friend.text
        assert client.post('/predict', files={'file': PNG}, headers={'X-API-Key': 'secret'}).status_code == 200


def test_where_it_looks_lies_over_the_picture(model):
    pixels = np.zeros((32, 16, 3), np.uint8)
    assert enlarged(pixels).shape == (320, 160, 3)
    square = np.zeros((*model.native, 3), np.uint8)
    assert attention_overlay(model, square).shape == enlarged(square).shape
    assert attention_overlay(object(), square) is None


def ask_page(site, file: bytes, name='a.png', corruption='fog', severity=0, inputs=3, **fields):
    "Do what the browser does: upload, ask, read the events; return what the last one brings, or the refusal."
    with httpx.Client(base_url=site, timeout=20) as client:
        path = fields.get('path') or client.post('/gradio_api/upload', files={'files': (name, file)}).json()[0]
        call = next(d for d in client.get('/config').json()['dependencies'] if len(d['inputs']) == 3)
        data = [{'path': path, 'orig_name': name, 'meta': {'_type': 'gradio.FileData'}} | fields, corruption,
                severity][:inputs]
        joined = client.post('/gradio_api/queue/join',
                             json={'data': data, 'fn_index': call['id'], 'session_hash': 'test',
                                   'trigger_id': call['targets'][0][0]})
        if joined.status_code != 200: return {'error': sentence(joined, 422)}
        with client.stream('GET', '/gradio_api/queue/data', params={'session_hash': 'test'}) as events:
            for line in events.iter_lines():
                if line.startswith('data:') and (event := json.loads(line[5:]))['msg'] == 'process_completed':
                    return event['output']


@NO_GRADIO
@pytest.mark.slow
def test_page_answers_as_the_model(site, model):
    data = encoded(PHOTO, 'JPEG')
    message, label, seen, overlay = ask_page(site, data, 'photo.jpg')['data']
    assert (label['label'] == model.predict(data)['prediction'] and seen['path'] and overlay['path']
            and not message['visible'])
    with httpx.Client(base_url=site) as client: assert client.get(seen['url'].replace(site, '')).status_code == 200
    worse = ask_page(site, data, 'photo.jpg', 'gaussian_noise', 5)['data'][1]
    assert {c['label']: c['confidence'] for c in worse['confidences']} != {c['label']: c['confidence']
        for c in label['confidences']}


@NO_GRADIO
@pytest.mark.slow
@pytest.mark.parametrize('data, part', [(b'Dear Sir or Madam', 'not a picture'),
                                        (claims(60_000, 60_000), 'too many pixels'), (PNG[:60], 'Cannot use'),
                                        (b'', 'Cannot use')])
def test_page_says_what_is_wrong(site, data, part):
    message, label, *_ = ask_page(site, data)['data']
    assert part in message['value'] and message['visible'] and label is None or not label.get('label')


@NO_GRADIO
@pytest.mark.slow
def test_page_opens_nothing_for_a_client(site):
    "A client may name paths and addresses in place of an upload, in every way that Gradio's protocol has."
    with socket.create_server(('127.0.0.1', 0)) as trap, httpx.Client(base_url=site, timeout=20) as client:
        trap.settimeout(0.3)
        no = 'The page takes uploads, and neither paths nor addresses.'
        here = f'http://127.0.0.1:{trap.getsockname()[1]}/a.png'
        for fields in (*({'path': p} for p in (here, 'https://example.org/a.png', '/etc/passwd', str(ROOT/'README.md'),
                                               'README.md', f'{tempfile.gettempdir()}/gradio/../../etc/passwd',
                                               'a\0b')),
                       {'path': '/etc/passwd', 'meta': None}, {'path': '/etc/passwd', 'meta': {}},
                       {'path': '/etc/passwd', 'is_stream': True}, {'path': '/etc/passwd', 'url': here}):
            assert ask_page(site, b'', **fields) == {'error': no}
        for value in ({'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}},
                      {'path': here, 'meta': {'_type': 'gradio.FileData'}}):  # as the value of another control
            assert 'error' in ask_page(site, PNG, corruption=value)
        # in place of a path; the page sees no picture
        for data in ('data:image/png;base64,' + base64.b64encode(claims(60_000, 60_000)).decode(), here):
            assert (ask_page(site, PNG, path=None, url=data)['data'][1:] == [{}, None, None]
                    or 'error' not in ask_page(site, PNG, url=data))
        for body in (b'[', b'[' * 200_000, b'null', b'{}', b'{"data": [0], "fn_index": 99, "session_hash": "x"}',
                     b'x' * 2_000_000):
            assert 400 <= client.post('/gradio_api/queue/join', content=body,
                                      headers={'content-type': 'application/json'}).status_code < 500
        for path in ('/etc/passwd', ROOT/'settings.ini', here):
            assert client.get(f'/gradio_api/file={path}').status_code in (403, 404)
        for path in ('proxy=http://127.0.0.1/', 'run-history/connect', 'vibe-edit', 'run/predict', 'stream/a',
                     'deep_link', 'call/look'):
            sentence(client.get(f'/gradio_api/{path}'), 404)
        assert client.post('/gradio_api/upload', files={'files': bytes(33 * 2**20)}).status_code == 413
        with pytest.raises(TimeoutError): trap.accept()


@NO_GRADIO
@pytest.mark.slow
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
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                 '--remote-debugging-port=0', '--remote-allow-origins=*', f'--user-data-dir={folder}']
        self.process, self.sent, self.asked = subprocess.Popen([BROWSER, *flags, 'about:blank'],
                                                               stderr=subprocess.PIPE, text=True), 0, []
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
        node = self('DOM.querySelector', nodeId=self('DOM.getDocument')['root']['nodeId'],
                    selector='input[type=file]')['nodeId']
        self('DOM.setFileInputFiles', nodeId=node, files=[str(file)])

    def close(self):
        self.pipe.close()
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()


@NO_GRADIO
@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason='no Chromium on this machine')
@pytest.mark.parametrize('width', [1200, 390])
def test_in_a_browser(site, model, tmp_path, width):
    pytest.importorskip('websocket', reason='websocket-client, which comes with Jupyter, is not installed')
    for name, data in (('photo.jpg', encoded(PHOTO, 'JPEG')), ('letter.png', b'Dear Sir or Madam'),
                       ('letter.txt', b'Dear Sir or Madam')):
        (tmp_path/name).write_bytes(data)
    browser = Browser(tmp_path/'profile', width, 900)
    try:
        browser('Page.navigate', url=site)
        browser.give(tmp_path/'photo.jpg')
        browser.until("!!document.querySelector('.output-class')?.innerText")
        assert browser.js("document.querySelector('.output-class').innerText").strip() == model.predict(encoded(PHOTO,
            'JPEG'))['prediction']
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
