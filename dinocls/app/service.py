"""A small HTTP service answers many at once: it gathers their pictures into batches, refuses what is too much before it
costs anything, and gives every mistake one sentence."""
import asyncio
import atexit
import base64
import contextlib
import functools
import gc
import hmac
import io
import json
import logging
import math
import shutil
import socket
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ..kit.files import UserError, nearest, reason
from ..kit.machine import cores, version
from ..kit.pictures import FORMATS, to_pixels


@dataclass(frozen=True)
class Limits:
    "What the service takes; what is more is refused."
    max_bytes: int = 32 * 2**20  # of the body of a request
    max_pixels: int = 50_000_000  # of a picture, as its header says
    max_count: int = 64  # pictures in a request
    max_queue: int = 256  # pictures in the service at once: on their way in, being decoded, waiting or with the model
    max_memory: int = 256 * 2**20  # bytes of all bodies at once
    max_batch: int = 32  # pictures that the model sees at once
    wait_ms: float = 2.0  # milliseconds that a batch waits for company while there is some to be expected
    timeout: float = 30.0  # seconds in which a body has to arrive, and then an answer to be found
    readers: int = min(4, cores())  # threads that decode

    def __post_init__(self):
        for f in fields(self):
            if not getattr(self, f.name) > 0: raise UserError(f'{f.name}={getattr(self, f.name)} of the service: it must be above 0.')
        for less, more in (('max_count', 'max_queue'), ('max_bytes', 'max_memory')):
            a, b = getattr(self, less), getattr(self, more)
            if a > b: raise UserError(f'{less}={a} of the service is more than {more}={b}: such a request could never be answered.')


class Refusal(Exception):
    "A request that gets no answer: a status of HTTP, a sentence, and headers."
    def __init__(self, status: int, sentence: str, headers: dict | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


def claimed_pixels(data: bytes) -> float:
    "Return how many pixels a picture claims to have, without decoding it; 0 if it is no picture, infinity if Pillow itself refuses."
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image: return image.width * image.height
    except Image.DecompressionBombError: return math.inf
    except Exception: return 0  # `to_pixels` says what is wrong


def read_picture(data: bytes, native: tuple, max_pixels: int) -> np.ndarray:  # uint8 (height, width, 3)
    "Decode a picture to the native size. Raise `Refusal` if it is too large (413) or none (422)."
    claimed = claimed_pixels(data)
    if claimed > max_pixels:
        raise Refusal(413, f'The picture has {"far too many" if claimed == math.inf else f"{claimed:,}"} pixels, and {max_pixels:,} are accepted: send it smaller.')
    try: return to_pixels(data, native, 'the picture')
    except UserError as e: raise Refusal(422, str(e)) from None


class Batcher:
    "Gathers the items of concurrent requests into batches for one thread. Use it as `async with Batcher(work) as batcher: await batcher(item)`."
    def __init__(self, work,  # list of items → list of results, of the same length
                 max_batch: int = 32, max_queue: int = 256,
                 wait: float = 0.002,  # seconds
                 watch=lambda items, seconds: None):  # told of each batch
        self.work, self.max_batch, self.max_queue, self.wait, self.watch = work, max_batch, max_queue, wait, watch
        self.queue, self.worker = asyncio.Queue(), ThreadPoolExecutor(1, 'dinocls-model')
        self.held, self.closing = 0, False  # places taken
        self.size, self.ended, self.pace = 1, 0.0, 0.01  # of the last batch; seconds an item, lately

    async def __call__(self, item):
        "Return what `work` makes of an item, in a batch with others."
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, future))
        return await future

    async def beside(self, fn, *args):
        "Call a function in the thread that works, between two batches."
        return await asyncio.get_running_loop().run_in_executor(self.worker, fn, *args)

    async def __aenter__(self):
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error):
        self.closing = True
        while self.held: await asyncio.sleep(0.01)  # what was taken in is answered
        self.task.cancel()
        self.worker.shutdown()


async def _gather(self) -> list:  # (item, future)
    "Wait for an item, shortly for as many more as the batch before had, and take what is there."
    first = await self.queue.get()
    began = time.monotonic()
    expected = min(self.size, self.max_batch) if began - self.ended < 10 * self.wait else 1
    while self.queue.qsize() + 1 < expected and time.monotonic() - began < self.wait: await asyncio.sleep(self.wait / 8)
    batch = [first] + [self.queue.get_nowait() for _ in range(min(self.queue.qsize(), self.max_batch - 1))]
    return [(item, future) for item, future in batch if not future.done()]  # without those that gave up


async def _run(self):
    "Answer batch after batch."
    while True:
        if not (batch := await self._gather()): continue
        began, self.size = time.perf_counter(), len(batch)
        try: results = await self.beside(self.work, [item for item, _ in batch])
        except Exception:
            logging.getLogger('dinocls').exception('The model failed on a batch of %d.', self.size)
            results = [Refusal(503, 'The model could not answer; the log of the service says why.', {'Retry-After': '10'})] * self.size
        for (_, future), result in zip(batch, results):
            if not future.done(): (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
        seconds, self.ended = time.perf_counter() - began, time.monotonic()
        self.pace = 0.8 * self.pace + 0.2 * seconds / self.size
        self.watch(self.size, seconds)

Batcher._gather, Batcher._run = _gather, _run


@contextlib.contextmanager
def _hold(self, places: int = 1):
    "Take places in the service for the length of a block. Raise `Refusal` if it is closing (503) or full (429)."
    if self.closing: raise Refusal(503, 'The service is shutting down: ask another one, or this one later.', {'Retry-After': '10'})
    if self.held + places > self.max_queue:
        wait = min(60, math.ceil(self.held * self.pace))
        raise Refusal(429, f'The service is full: ask again in {wait} s.', {'Retry-After': str(wait)})
    self.held += places
    try: yield
    finally: self.held -= places

Batcher.hold = _hold


async def files(request, most: int, limits: Limits) -> list[bytes]:
    "Return the files of a form, or a body that is a picture itself. Raise `Refusal` for other bodies, none or too many."
    from starlette.formparsers import MultiPartException, MultiPartParser
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind == 'multipart/form-data':
        form = MultiPartParser(request.headers, request.stream(), max_files=most, max_fields=most, max_part_size=limits.max_bytes)
        form.spool_max_size = limits.max_bytes + 1
        try: parts = await form.parse()
        except MultiPartException as e:
            if 'Too many files' in e.message: raise Refusal(413, f'The form has more files than are accepted here ({most}): send fewer.') from None
            raise Refusal(400, f'The form cannot be read: {reason(e.message)}.') from None
        found = [await part.read() for _, part in parts.multi_items() if not isinstance(part, str)]
        await parts.close()
    elif kind.startswith('image/') or kind == 'application/octet-stream': found = [await request.body()]
    else: raise Refusal(415, f'The body is {kind[:80] or "of no type"}: send a form (multipart/form-data) with a file, or the picture itself as image/… .')
    if not found: raise Refusal(422, 'The form holds no file: send the picture as a file in a field named "file".')
    return found


class Meters:
    "What is counted of a service."
    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        self.registry = CollectorRegistry()
        self.requests = Counter('dinocls_requests', 'Requests answered', ['path', 'status'], registry=self.registry)
        self.seconds = Histogram('dinocls_request_seconds', 'Seconds from a request to its answer', ['path'], registry=self.registry)
        self.batches = Histogram('dinocls_batch_pictures', 'Pictures in a batch', buckets=[2 ** i for i in range(9)], registry=self.registry)
        self.work = Histogram('dinocls_batch_seconds', 'Seconds that the model took for a batch', registry=self.registry)
        self.held = Gauge('dinocls_held_pictures', 'Pictures in the service', registry=self.registry)

    def request(self, path: str, status: int, seconds: float):
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def batch(self, pictures: int, seconds: float):
        self.batches.observe(pictures)
        self.work.observe(seconds)


class Service:
    "A model behind limits."
    def __init__(self, model, limits: Limits):
        self.model, self.limits, self.meters, self.memory = model, limits, Meters(), 0  # bytes of all bodies
        self.readers = ThreadPoolExecutor(limits.readers, 'dinocls-reader')
        self.batcher = Batcher(model.answers, limits.max_batch, limits.max_queue, limits.wait_ms / 1000, self.meters.batch)
        self.meters.held.set_function(lambda: self.batcher.held)
        self.example = model.answers([np.full((*model.native, 3), 128, np.uint8)])[0]  # the first call is a slow one: make it now

    async def read(self, fn, *args):
        "Call a function in a thread that decodes."
        return await asyncio.get_running_loop().run_in_executor(self.readers, fn, *args)

    async def classify(self, data: bytes) -> dict:
        "Return the answer for the bytes of a picture."
        return await self.batcher(await self.read(read_picture, data, self.model.native, self.limits.max_pixels))

    async def attempt(self, data: bytes) -> dict:
        "Return the answer for the bytes of a picture, or what is wrong with it."
        try: return await self.classify(data)
        except Refusal as e:
            if e.status >= 500: raise
            return {'error': str(e)}

    async def in_time(self, coroutine):
        "Wait for an answer as long as the limits allow. Raise `Refusal` (504) then."
        try: return await asyncio.wait_for(coroutine, self.limits.timeout)
        except asyncio.TimeoutError: raise Refusal(504, f'There was no answer within {self.limits.timeout:g} s: ask again later.') from None


API = {'/predict': 'POST', '/predict/batch': 'POST', '/info': 'GET', '/metrics': 'GET', '/openapi.json': 'GET', '/healthz': 'GET', '/readyz': 'GET'}
WITHOUT_KEY, EVENT = ('/healthz', '/readyz'), '/gradio_api/queue/join'
PAGE = ('/', '/config', '/theme.css', '/favicon.ico', '/manifest.json', '/assets/', '/static/', '/gradio_api/info', '/gradio_api/startup-events', '/gradio_api/heartbeat/',
        '/gradio_api/upload', '/gradio_api/upload_progress', EVENT, '/gradio_api/queue/data', '/gradio_api/file=')


def is_page(path: str) -> bool:
    "Tell whether an address belongs to the page. Gradio opens more, among them one that fetches from other servers for a client; they stay shut."
    if path.startswith('/gradio_api/file=http'): return False
    return any(path == p or p != '/' and p[-1] in '/=' and path.startswith(p) for p in PAGE)


def given_key(headers) -> str:
    "Return the key that a request brings: as X-API-Key, as bearer token, or as password."
    kind, _, value = headers.get('authorization', '').partition(' ')
    if kind.lower() == 'bearer': return value.strip()
    if kind.lower() == 'basic':
        with contextlib.suppress(ValueError): return base64.b64decode(value, validate=True).decode().partition(':')[2]
    return headers.get('x-api-key', '')


class Visit:
    "A request on its way through the gate."
    def __init__(self, service: Service, scope, receive, send):
        self.service, self.scope, self._receive, self._send, self.path = service, scope, receive, send, scope['path']
        self.began, self.size, self.whole, self.status, self.refused = time.perf_counter(), 0, False, 0, None

    async def receive(self):
        "Pass on a part of the body. Raise `Refusal` if it is too much or too slow."
        if self.whole: return await self._receive()
        limits, left = self.service.limits, self.began + self.service.limits.timeout - time.perf_counter()
        try: message = await asyncio.wait_for(self._receive(), max(0, left))
        except asyncio.TimeoutError: self.refuse(408, f'The body did not arrive within {limits.timeout:g} s: send a smaller picture.')
        if message['type'] == 'http.disconnect': self.refuse(400, 'The connection ended before the body was there.')
        self.size += (n := len(message.get('body', b'')))
        self.service.memory += n
        if self.size > limits.max_bytes: self.refuse(413, too_large(limits))
        if self.service.memory > limits.max_memory: self.refuse(429, 'The service is full: ask again in 1 s.', {'Retry-After': '1'})
        self.whole = not message.get('more_body')
        return message

    def refuse(self, *reasons):
        "Refuse the request, whatever the app behind the gate makes of that."
        self.refused = Refusal(*reasons)
        raise self.refused


def too_large(limits: Limits) -> str:
    "Say how large a body may be."
    return f'The body has more than {limits.max_bytes:,} bytes, which is what is accepted: send less.'


OFFLINE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # the page loads nothing from elsewhere


async def _pass_on(self, message):
    "Send a part of the answer, unless the request was refused meanwhile."
    if self.refused: return
    if message['type'] == 'http.response.start':
        self.status, page = message['status'], self.path not in API
        if page and self.status >= 500: self.status, self.refused = 0, Refusal(400, 'The page cannot do that.')  # its own events bring their failures in other ways
        if self.refused: return
        more = {'X-Content-Type-Options': 'nosniff', **({'Content-Security-Policy': OFFLINE} if page else {'Cache-Control': 'no-store'})}
        message = message | {'headers': [*message['headers'], *((k.lower().encode(), v.encode()) for k, v in more.items())]}
    await self._send(message)


async def _end(self):
    "Send the refusal, if there is one and nothing was sent yet, and count the request."
    from starlette.responses import JSONResponse
    if self.refused and not self.status:
        refused, self.refused = self.refused, None
        await JSONResponse({'detail': str(refused)}, refused.status, refused.headers)(self.scope, self._receive, self.send)
    self.service.memory -= self.size
    path = self.path if self.path in API else 'page' if is_page(self.path) else 'other'
    self.service.meters.request(path, self.status or 500, time.perf_counter() - self.began)

Visit.send, Visit.end = _pass_on, _end


@functools.cache
def upload_folder() -> Path:
    "Make a folder for the uploads of this process, which other users cannot read, and which goes when it ends."
    folder = tempfile.mkdtemp(prefix='dinocls-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def is_upload(path) -> bool:
    "Tell whether a path is that of a file which was uploaded to the page, or which the page made."
    try: return Path(path).resolve().is_relative_to(upload_folder().resolve())
    except (OSError, ValueError, TypeError): return False


def only_uploads(value):
    "Return an event of the page without addresses. Raise `Refusal` if it names a path that is no upload."
    if isinstance(value, list): return [only_uploads(v) for v in value]
    if not isinstance(value, dict): return value
    if value.get('path') is not None and not is_upload(value['path']): raise Refusal(422, 'The page takes uploads, and neither paths nor addresses.')
    return {k: only_uploads(v) for k, v in value.items() if k != 'url'}


async def checked(receive):
    "Read an event of the page and return a `receive` that passes on what was found to be harmless. Raise `Refusal` for other events."
    data, more = b'', True
    while more:
        message = await receive()
        data, more = data + message.get('body', b''), message.get('more_body', False)
        if len(data) > 2**20: raise Refusal(413, 'The event is too large: the page sends smaller ones.')
    try: event = only_uploads(json.loads(data))
    except (ValueError, RecursionError): raise Refusal(400, 'The event is not JSON.') from None
    passed = iter([{'type': 'http.request', 'body': json.dumps(event).encode(), 'more_body': False}])
    async def again(): return next(passed, None) or await receive()
    return again


class Gate:
    "Middleware that lets requests in: known addresses, the right key, bodies that are small enough."
    def __init__(self, app, service: Service, key: str = '', page: bool = False):
        self.app, self.service, self.key, self.page = app, service, key, page

    def check(self, scope):
        "Raise `Refusal` for what can be refused before the body is read."
        from starlette.datastructures import Headers
        path, headers = scope['path'], Headers(scope=scope)
        if path not in API and not (self.page and is_page(path)): raise Refusal(404, 'There is nothing at this address: /openapi.json lists what there is.')
        if API.get(path, scope['method']) != scope['method']: raise Refusal(405, f'{path} answers {API[path]} only.', {'Allow': API[path]})
        if self.key and path not in WITHOUT_KEY and not hmac.compare_digest(given_key(headers).encode(), self.key.encode()):
            raise Refusal(401, 'The key is missing or wrong: send it as X-API-Key, as bearer token, or as the password of HTTP Basic.',
                          {'WWW-Authenticate': 'Basic realm="dinocls", charset="UTF-8"'})
        length = headers.get('content-length', '')
        if length.isdecimal() and (len(length) > 18 or int(length) > self.service.limits.max_bytes): raise Refusal(413, too_large(self.service.limits))

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http': return await self.app(scope, receive, send)
        visit = Visit(self.service, scope, receive, send)
        try:
            self.check(scope)
            receive = await checked(visit.receive) if scope['path'] == EVENT else visit.receive
            await self.app(scope, receive, visit.send)
        except Refusal as e: visit.refused = e
        except Exception:
            if not visit.refused: raise
        finally: await visit.end()


@dataclass(frozen=True)
class Answer:
    "What the model says of a picture. A picture of nothing that it knows gets one of its classes all the same."
    prediction: str  # the most probable class
    confidence: float  # its probability
    probabilities: dict[str, float]  # class → probability
    top5: list[tuple[str, float]]  # the most probable classes
    uncertain: bool | None = None  # true: not exactly one class is plausible; null: the model cannot tell


@dataclass(frozen=True)
class Failure:
    "What is wrong with a picture of several."
    error: str


@dataclass(frozen=True)
class Problem:
    "Why there is no answer, in one sentence."
    detail: str


PROBLEMS = {400: 'the body cannot be read', 401: 'the key is missing or wrong', 408: 'the body arrived too slowly', 413: 'too many bytes, pixels or files',
            415: 'neither a form nor a picture', 422: 'no picture, or a damaged one', 429: 'full: Retry-After says for how long', 503: 'shutting down, or the model failed',
            504: 'no answer in time'}


def described(example, *bodies: str, field: str = 'file', schema: dict | None = None) -> dict:
    "Return what OpenAPI needs to know of an endpoint that takes pictures."
    binary = {'type': 'string', 'format': 'binary'}
    form = {'type': 'object', 'required': [field], 'properties': {field: schema or binary}}
    content = {'multipart/form-data': {'schema': form}} | {kind: {'schema': binary} for kind in bodies}
    return {'responses': {200: {'content': {'application/json': {'example': example}}}} | {
                status: {'model': Problem, 'description': what.capitalize(), 'content': {'application/json': {'example': {'detail': f'{what.capitalize()}.'}}}}
                for status, what in PROBLEMS.items()},
            'openapi_extra': {'requestBody': {'required': True, 'content': content}}}


def add_predictions(app, service: Service):
    "Add the endpoints that classify."
    from fastapi import Request
    from fastapi.responses import JSONResponse
    batcher, limits = service.batcher, service.limits

    @app.post('/predict', response_model=Answer, summary='Classify a picture', **described(service.example, 'image/*', 'application/octet-stream'))
    async def predict(request: Request):
        "Send the picture as a file in a form, or as the body itself."
        with batcher.hold():
            data, = await files(request, 1, limits)
            return JSONResponse(await service.in_time(service.classify(data)))

    many = {'type': 'array', 'items': {'type': 'string', 'format': 'binary'}, 'maxItems': limits.max_count}
    @app.post('/predict/batch', response_model=list[Answer | Failure], summary='Classify several pictures',
              **described([service.example, {'error': 'Cannot use the picture: …'}], field='files', schema=many))
    async def predict_batch(request: Request):
        "Send the pictures as files in a form. The answers come in the same order; a picture that cannot be used gets an error of its own."
        with batcher.hold():
            found = await files(request, limits.max_count, limits)
            with batcher.hold(len(found) - 1):
                return JSONResponse(await service.in_time(asyncio.gather(*map(service.attempt, found))))


def add_status(app, service: Service):
    "Add the endpoints that tell of the service."
    from fastapi import Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    model = service.model

    @app.get('/healthz', summary='Is the process alive?', response_model=dict[str, str])
    async def healthz(): return {'status': 'alive'}

    @app.get('/readyz', summary='Would a picture be taken?', response_model=dict[str, str], responses={503: {'model': Problem}})
    async def readyz():
        if service.batcher.closing: raise Refusal(503, 'The service is shutting down.')
        return {'status': 'ready'}

    @app.get('/info', summary='Which model is this, and what does it take?')
    async def info() -> dict:
        return {'version': version(), 'classes': model.classes, 'native_size': list(model.native), 'device': str(model.device), 'precision': model.precision, 'backend': model.backend,
                **{k: model.config.get(k) for k in ('backbone', 'image_size', 'metrics')}, 'limits': asdict(service.limits)}

    @app.get('/metrics', summary='Counters for Prometheus', response_class=Response)
    async def metrics(): return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)


@contextlib.contextmanager
def _extra():
    "Say what to install where a library is missing."
    try: yield
    except ModuleNotFoundError as e:
        if (e.name or '').startswith('dinocls'): raise
        raise UserError(f"The service needs {e.name}: pip install 'dinocls[serve]'.") from None


def limits_from(given: dict) -> Limits:
    "Return limits with single ones changed, by numbers or texts. Raise `UserError` for an unknown one or no number."
    kinds = {f.name: f.type for f in fields(Limits)}
    for name in given:
        if name not in kinds: raise UserError(f'The service has no limit {name!r}: {nearest(name, kinds)}')
    try: return Limits(**{name: kinds[name](value) for name, value in given.items()})
    except ValueError as e: raise UserError(f'A limit of the service is not a number ({reason(e)}).') from None


def create_app(model,  # a `ProductionModel`
               api_key: str = '',  # empty: everyone may ask
               page: bool = True,  # a page at /, where Gradio is installed
               **limits):  # see `Limits`
    "Return the service of a model as a FastAPI app. Raise `UserError` if a library is missing or a limit makes no sense."
    with _extra():
        from fastapi import FastAPI
        from .page import add_page, has_gradio
        service = Service(model, limits_from(limits))
        warnings.filterwarnings('ignore', module=r'PIL\.')  # each hostile picture would leave one behind, for ever
        @contextlib.asynccontextmanager
        async def life(app):
            with service.readers:
                async with service.batcher: yield
            if app.state.page: shutil.rmtree(upload_folder(), ignore_errors=True)  # a signal ends the process without further ado
        app = FastAPI(title='dinocls', version=version(), description=f'Classifies pictures: {service.model.config["backbone"]}, {len(model.classes)} classes.',
                      lifespan=life, docs_url=None, redoc_url=None)  # those pages load their scripts from another server
        app.state.service, app.state.page = service, None
        add_predictions(app, service)
        add_status(app, service)
        if page := page and has_gradio(): add_page(app, service)
        app.add_middleware(Gate, service=service, key=api_key, page=page)
        app.add_exception_handler(Exception, _failed)
    return app


async def _failed(request, error):
    "Answer for a mistake of the service's own; the server logs it."
    from starlette.responses import JSONResponse
    return JSONResponse({'detail': 'The service made a mistake; its log says which.'}, 500)


def listen(host: str, port: int) -> socket.socket:
    "Return a socket that listens. Raise `UserError` if there is none to be had."
    try: made = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as e:
        raise UserError(f'Cannot listen on {host}, port {port} ({reason(e)}): choose another --port, or --host.') from None
    # asyncio sends small packets at once only where the protocol is named; else each answer would wait 40 ms for the client's acknowledgement
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, made.detach())


def close(app):
    "Let nobody in any more, and end the page's open connections."
    app.state.service.batcher.closing = True
    if app.state.page: app.state.page.stop_event.set()


def serve(model, host: str = '127.0.0.1', port: int = 8000,  # 0: any that is free
          api_key: str = '', page: bool = True, **limits):
    "Serve a model until SIGINT or SIGTERM. Raise `UserError` if a library is missing, the port is taken or a limit makes no sense."
    with _extra(): import uvicorn
    with listen(host, port) as listener:
        app = create_app(model, api_key, page, **limits)
        gc.collect(), gc.freeze()  # else each full collection looks at all that the libraries made, for half a second in which nobody is answered
        config = uvicorn.Config(app, log_level='warning', access_log=False, server_header=False, ws='none', lifespan='on',
                                timeout_graceful_shutdown=math.ceil(2 * app.state.service.limits.timeout) + 5)
        class Server(uvicorn.Server):
            def handle_exit(self, *args): close(app), super().handle_exit(*args)
        address, port = listener.getsockname()[:2]
        print(f'http://{f"[{address}]" if ":" in address else address}:{port} answers{" and shows a page" if app.state.page else ""}; Ctrl-C stops it.', flush=True)
        if not api_key and host not in ('127.0.0.1', '::1', 'localhost'): print('Whoever reaches this address may ask: --api-key sets a key.', flush=True)
        Server(config).run(sockets=[listener])
