"The page: what the model says, nothing loaded from elsewhere, and all of it in a browser."
import json
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('fastapi', reason="the service is an extra: pip install '.[serve]'")
httpx = pytest.importorskip('httpx')
pytest.register_assert_rewrite('clients')
from clients import KIND, PHOTO, PNG, claims, encoded, sentence, serving  # noqa: E402

from dinocls.app.page import attention_picture  # noqa: E402
from dinocls.kit.corruptions import CORRUPTIONS, corrupt  # noqa: E402
from dinocls.kit.pictures import to_pixels  # noqa: E402

pytest_plugins = 'clients'


@pytest.fixture
def client(model):
    with serving(model, page=True) as client: yield client


def test_page_and_api_ask_for_the_same_key(model):
    with serving(model, page=True, api_key='secret') as client:
        for path in ('/', '/page.js', '/page.json', '/icon.svg'):
            stranger, friend = client.get(path), client.get(path, headers={'X-API-Key': 'secret'})
            assert stranger.status_code == 401 and stranger.headers['www-authenticate'].startswith('Basic')
            assert friend.status_code == 200
        sentence(client.post('/look', content=PNG, headers=KIND), 401)
        assert 'What is in this picture?' in client.get('/', auth=('', 'secret')).text


def test_it_keeps_no_sessions_and_no_files(client):
    "No event of anybody can break it for others, and no file is kept for them: there is nothing to send them to."
    for path in ('/queue/join', '/gradio_api/queue/join', '/run/predict', '/upload', '/gradio_api/upload'):
        for sent in ({'json': {'data': [], 'fn_index': 0, 'session_hash': ''}}, {'files': {'files': PNG}}):
            sentence(client.post(path, **sent), 404)
    assert client.post('/look', content=PNG, headers=KIND).status_code == 200


def test_where_it_looks(model):
    square = np.zeros((*model.native, 3), np.uint8)
    seen = attention_picture(model, square)
    assert seen.dtype == np.uint8 and seen.ndim == 3 and seen.shape[2] == 3
    assert attention_picture(object(), square) is None


def test_page_answers_as_the_model(model, client):
    data = encoded(PHOTO, 'JPEG')
    found = client.post('/look', content=data, headers=KIND).json()
    assert found['prediction'] == model.predict(data)['prediction']
    pixels = to_pixels(data, model.native)
    shown = lambda url: np.asarray(Image.open(urllib.request.urlopen(url)))
    assert (shown(found['picture']) == pixels).all() and shown(found['attention']).ndim == 3
    for name in CORRUPTIONS:
        worse = client.post(f'/look?worse={name}&severity=5', content=data, headers=KIND).json()
        assert (shown(worse['picture']) == corrupt(pixels[None], name, 5)[0]).all(), name


@pytest.mark.parametrize('data, part', [(b'Dear Sir or Madam', 'not a picture'),
                                        (claims(60_000, 60_000), 'too many pixels'), (PNG[:60], 'Cannot use'),
                                        (b'', 'Cannot use')])
def test_page_says_what_is_wrong(client, data, part):
    assert part in sentence(client.post('/look', content=data, headers=KIND))


@pytest.mark.parametrize('query', ['worse=fig&severity=1', 'severity=1', 'worse=fog&severity=6',
                                   'worse=fog&severity=-1',
                                   'worse=fog&severity=1e9', 'worse=fog&severity=' + '9' * 5000, 'worse=fog&severity='])
def test_page_makes_worse_only_what_it_offers(client, query):
    assert 'from 0 to 5' in sentence(client.post(f'/look?{query}', content=PNG, headers=KIND), 422)


def test_examples_are_offered(model):
    class Shown:
        def __getattr__(self, name): return getattr(model, name)
        def examples(self): return {'images': np.zeros((40, 3, 32, 32), np.uint8), 'labels': np.arange(40) % 20}
    with serving(Shown(), page=True) as client:
        assert len(client.get('/page.json').json()['examples']) == 12


def test_page_loads_nothing_from_elsewhere(client):
    for path in ('/', '/page.js', '/page.css'):
        response = client.get(path)
        assert "default-src 'self'" in response.headers['content-security-policy'] and 'http' not in response.text


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
        browser.until("document.querySelectorAll('#worse option').length")
        browser.give(tmp_path/'photo.jpg')
        browser.until("document.querySelectorAll('#best li').length == 5")
        right = model.predict(encoded(PHOTO, 'JPEG'))['prediction']
        assert browser.js("document.querySelector('#prediction').innerText") == right
        browser.until("['seen', 'under', 'over'].every(id => document.getElementById(id).naturalWidth > 0)")
        assert browser.js('document.documentElement.scrollWidth') <= width
        before = browser.js("document.querySelector('#seen').src")
        browser.js("""document.querySelector('#severity').value = 5
                      document.querySelector('#severity').dispatchEvent(new Event('change'))""")
        browser.until(f"document.querySelector('#seen').src != '{before}'")
        shown, alert = "document.querySelector('#shown').hidden", "document.querySelector('#problem').innerText"
        for name in ('letter.png', 'letter.txt'):
            browser.give(tmp_path/name)
            assert 'not a picture' in browser.until(alert) and browser.js(shown)
            browser.give(tmp_path/'photo.jpg')
            browser.until(f"!{shown}")
            assert not browser.js(alert)
        assert not [url for url in browser.asked if not url.startswith((site, 'data:', 'blob:', 'about:'))]
    finally: browser.close()
