"""A small HTTP service answers many at once: it gathers their pictures into batches, refuses what is too much before it
costs anything, and gives every mistake one sentence."""
import asyncio
import base64
import contextlib
import functools
import gc
import hmac
import io
import json
import logging
import math
import socket
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, create_model, model_validator

from ..kit.files import UserError, nearest, reason
from ..kit.machine import cores, version
from ..kit.pictures import FORMATS, to_pixels


class Limits(BaseModel, frozen=True, extra='forbid'):
    "What the service takes; what is more is refused."
    max_bytes: PositiveInt = 32 * 2**20  # of the body of a request
    max_pixels: PositiveInt = 50_000_000  # of a picture, as its header says
    max_count: PositiveInt = 64  # pictures in a request
    max_queue: PositiveInt = 256  # pictures in the service: on their way in, being decoded, waiting or with the model
    max_memory: PositiveInt = 256 * 2**20  # bytes of all bodies at once
    max_batch: PositiveInt = 32  # pictures that the model sees at once
    wait_ms: PositiveFloat = 2.0  # milliseconds that a batch waits for company while there is some to be expected
    timeout: PositiveFloat = 30.0  # seconds in which a body has to arrive, and then an answer to be found
    readers: PositiveInt = min(4, cores())  # threads that decode

    @model_validator(mode='after')
    def _answerable(self):
        for less, more in (('max_count', 'max_queue'), ('max_bytes', 'max_memory')):
            a, b = getattr(self, less), getattr(self, more)
            if a > b: raise UserError(f'{less}={a} of the service is more than {more}={b}: such a request could never '
                                      'be answered.')
        return self


def limits_from(given: dict) -> Limits:
    "Return limits with single ones changed, by numbers or texts. Raise `UserError` for unknown ones and wrong values."
    try: return Limits(**given)
    except ValidationError as e: wrong = e.errors()[0]
    name, kind, known = wrong['loc'][0], wrong['type'], Limits.model_fields
    if kind == 'extra_forbidden': raise UserError(f'The service has no limit {name!r}: {nearest(name, known)}')
    must = 'it must be above 0' if kind == 'greater_than' else f'it is not a {"whole " * kind.startswith("int")}number'
    raise UserError(f'{name}={wrong["input"]} of the service: {must}.')


class Refusal(Exception):
    "A request that gets no answer: a status of HTTP, a sentence, and headers."
    def __init__(self, status: int, sentence: str, headers: dict | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


def read_picture(data: bytes, native: tuple, max_pixels: int) -> np.ndarray:  # uint8 (height, width, 3)
    "Decode a picture to the native size. Raise `Refusal` if it claims too many pixels (413) or is none (422)."
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image: claimed = image.width * image.height
    except Image.DecompressionBombError: claimed = math.inf
    except Exception: claimed = 0  # `to_pixels` says what is wrong
    if claimed > max_pixels:
        many = 'far too many' if claimed == math.inf else f'{claimed:,}'
        raise Refusal(413, f'The picture has {many} pixels, and {max_pixels:,} are accepted: send it smaller.')
    try: return to_pixels(data, native, 'the picture')
    except UserError as e: raise Refusal(422, str(e)) from None


async def within(pool: ThreadPoolExecutor, fn, *args):
    "Call a function in a thread of a pool, so that the loop that talks to the clients goes on."
    return await asyncio.get_running_loop().run_in_executor(pool, fn, *args)


LATER = {'Retry-After': '10'}  # seconds


class Batcher:
    """Gathers the items of concurrent requests into batches for one thread.
    Use it as `async with Batcher(work) as batcher: await batcher(item)`."""
    def __init__(self, work,  # list of items → list of results, of the same length
                 max_batch: int = 32, max_queue: int = 256,
                 wait: float = 0.002,  # seconds
                 watch=lambda items, seconds: None):  # told of each batch
        self.work, self.max_batch, self.max_queue, self.wait, self.watch = work, max_batch, max_queue, wait, watch
        self.queue, self.worker = asyncio.Queue(), ThreadPoolExecutor(1, 'dinocls-model')
        self.held, self.closing = 0, False  # places taken
        self.size, self.ended, self.pace = 1, 0.0, 0.01  # of the last batch; seconds per item, lately

    async def __call__(self, item):
        "Return what `work` makes of an item, in a batch with others."
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, future))
        return await future

    @contextlib.contextmanager
    def hold(self, places: int = 1):
        "Take places in the service for the length of a block. Raise `Refusal` if it is closing (503) or full (429)."
        if self.closing:
            raise Refusal(503, 'The service is shutting down: ask another one, or this one later.', LATER)
        if self.held + places > self.max_queue:
            wait = min(60, math.ceil(self.held * self.pace))
            raise Refusal(429, f'The service is full: ask again in {wait} s.', {'Retry-After': str(wait)})
        self.held += places
        try: yield
        finally: self.held -= places

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
        while self.queue.qsize() + 1 < expected and time.monotonic() - began < self.wait:
            await asyncio.sleep(self.wait / 8)
        batch = [first] + [self.queue.get_nowait() for _ in range(min(self.queue.qsize(), self.max_batch - 1))]
        return [(item, future) for item, future in batch if not future.done()]  # without those that gave up

    async def _run(self):
        "Answer batch after batch."
        while True:
            if not (batch := await self._gather()): continue
            began, self.size = time.perf_counter(), len(batch)
            try: results = await within(self.worker, self.work, [item for item, _ in batch])
            except Exception:
                logging.getLogger('dinocls').exception('The model failed on a batch of %d.', self.size)
                why = Refusal(503, 'The model could not answer; the log of the service says why.', LATER)
                results = [why] * self.size
            for (_, future), result in zip(batch, results):
                if future.done(): continue
                (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
            seconds, self.ended = time.perf_counter() - began, time.monotonic()
            self.pace = 0.8 * self.pace + 0.2 * seconds / self.size
            self.watch(self.size, seconds)


async def files(request, most: int, limits: Limits) -> list[bytes]:
    "Return the files of a form, or a body that is a picture. Raise `Refusal` for other bodies, none or too many."
    from starlette.formparsers import MultiPartException, MultiPartParser
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind == 'multipart/form-data':
        form = MultiPartParser(request.headers, request.stream(), max_files=most, max_fields=most,
                               max_part_size=limits.max_bytes)
        form.spool_max_size = limits.max_bytes + 1  # nothing is written to disk
        try: parts = await form.parse()
        except MultiPartException as e:
            if 'Too many files' in e.message:
                raise Refusal(413, f'The form has more files than are accepted here ({most}): send fewer.') from None
            raise Refusal(400, f'The form cannot be read: {reason(e.message)}.') from None
        found = [await part.read() for _, part in parts.multi_items() if not isinstance(part, str)]
    elif kind.startswith('image/') or kind == 'application/octet-stream': found = [await request.body()]
    else: raise Refusal(415, f'The body is {kind[:80] or "of no type"}: send a form (multipart/form-data) with a file, '
                             'or the picture itself as image/… .')
    if not found: raise Refusal(422, 'The form holds no file: send the picture as a file in a field named "file".')
    return found


class Service:
    "A model behind limits, and what is counted of it."
    def __init__(self, model, limits: Limits):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        self.model, self.limits, self.memory = model, limits, 0  # bytes of all bodies
        self.registry, sizes = CollectorRegistry(), [2**i for i in range(9)]  # two services do not meet
        here = {'registry': self.registry}
        self.requests = Counter('dinocls_requests', 'Requests answered', ['path', 'status'], **here)
        self.seconds = Histogram('dinocls_request_seconds', 'Seconds from a request to its answer', ['path'], **here)
        self.batches = Histogram('dinocls_batch_pictures', 'Pictures in a batch', buckets=sizes, **here)
        self.work = Histogram('dinocls_batch_seconds', 'Seconds that the model took for a batch', **here)
        self.readers = ThreadPoolExecutor(limits.readers, 'dinocls-reader')
        self.batcher = Batcher(model.answers, limits.max_batch, limits.max_queue, limits.wait_ms / 1000, self.count)
        Gauge('dinocls_held_pictures', 'Pictures in the service', **here).set_function(lambda: self.batcher.held)
        self.example = model.answers([np.full((*model.native, 3), 128, np.uint8)])[0]  # the first call, a slow one

    def count(self, pictures: int, seconds: float):
        "Count a batch."
        self.batches.observe(pictures)
        self.work.observe(seconds)

    async def read(self, data: bytes) -> np.ndarray:
        "Decode a picture."
        return await within(self.readers, read_picture, data, self.model.native, self.limits.max_pixels)

    async def classify(self, data: bytes) -> dict:
        "Return the answer for the bytes of a picture."
        return await self.batcher(await self.read(data))

    async def attempt(self, data: bytes) -> dict:
        "Return the answer for the bytes of a picture, or what is wrong with it."
        try: return await self.classify(data)
        except Refusal as e:
            if e.status >= 500: raise
            return {'error': str(e)}

    async def in_time(self, coroutine):
        "Wait for an answer as long as the limits allow. Raise `Refusal` (504) then."
        try: return await asyncio.wait_for(coroutine, self.limits.timeout)
        except asyncio.TimeoutError:
            raise Refusal(504, f'There was no answer within {self.limits.timeout:g} s: ask again later.') from None

    @contextlib.asynccontextmanager
    async def body(self, headers, receive):
        "Read a request's body, counted and not believed, and keep it for the length of a block. Raise `Refusal`."
        limits, until, data, more = self.limits, time.monotonic() + self.limits.timeout, bytearray(), True
        stated = headers.get('content-length', '')
        stated = int(stated[:19]) if stated.isdecimal() else 0
        try:
            while True:
                if max(stated, len(data)) > limits.max_bytes:
                    many = f'{limits.max_bytes:,} bytes'
                    raise Refusal(413, f'The body has more than {many}, which is what is accepted: send less.')
                if self.memory > limits.max_memory:
                    raise Refusal(429, 'The service is full: ask again in 1 s.', {'Retry-After': '1'})
                if not more: break
                try: message = await asyncio.wait_for(receive(), max(0, until - time.monotonic()))
                except asyncio.TimeoutError:
                    late = f'The body did not arrive within {limits.timeout:g} s: send a smaller picture.'
                    raise Refusal(408, late) from None
                if message['type'] == 'http.disconnect':
                    raise Refusal(400, 'The connection ended before the body was there.')
                data += (part := message.get('body', b''))
                self.memory += len(part)
                more = message.get('more_body')
            yield bytes(data)
        finally: self.memory -= len(data)


API = {'/predict': 'POST', '/predict/batch': 'POST', '/info': 'GET', '/metrics': 'GET', '/openapi.json': 'GET',
       '/healthz': 'GET', '/readyz': 'GET'}
WITHOUT_KEY, EVENT = ('/healthz', '/readyz'), '/gradio_api/queue/join'
PAGE = ('/', '/config', '/theme.css', '/favicon.ico', '/manifest.json', '/assets/', '/static/', EVENT,
        *(f'/gradio_api/{name}' for name in ('info', 'startup-events', 'heartbeat/', 'upload', 'upload_progress',
                                             'queue/data', 'file=')))
OFFLINE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # the page loads nothing from elsewhere


def is_page(path: str) -> bool:
    """Tell whether an address belongs to the page. Gradio opens more, among them one that fetches from other servers
    for a client; they stay shut."""
    if path.startswith('/gradio_api/file=http'): return False
    return any(path == p or p != '/' and p[-1] in '/=' and path.startswith(p) for p in PAGE)


def given_key(headers) -> str:
    "Return the key that a request brings: as X-API-Key, as bearer token, or as password."
    kind, _, value = headers.get('authorization', '').partition(' ')
    if kind.lower() == 'bearer': return value.strip()
    if kind.lower() == 'basic':
        with contextlib.suppress(ValueError): return base64.b64decode(value, validate=True).decode().partition(':')[2]
    return headers.get('x-api-key', '')


@functools.cache
def upload_folder() -> tempfile.TemporaryDirectory:
    "Make a folder for the uploads of this process, which other users cannot read, and which goes when it ends."
    return tempfile.TemporaryDirectory(prefix='dinocls-', ignore_cleanup_errors=True)


def is_upload(path) -> bool:
    "Tell whether a path is that of a file which was uploaded to the page, or which the page made."
    try: return Path(path).resolve().is_relative_to(Path(upload_folder().name).resolve())
    except (OSError, ValueError, TypeError): return False


def only_uploads(value):
    "Return an event of the page without addresses. Raise `Refusal` if it names a path that is no upload."
    if isinstance(value, list): return [only_uploads(v) for v in value]
    if not isinstance(value, dict): return value
    if value.get('path') is not None and not is_upload(value['path']):
        raise Refusal(422, 'The page takes uploads, and neither paths nor addresses.')
    return {k: only_uploads(v) for k, v in value.items() if k != 'url'}


def checked(event: bytes) -> bytes:
    "Return an event of the page as far as it is harmless: Gradio would read any file that it names. Raise `Refusal`."
    if len(event) > 2**20: raise Refusal(413, 'The event is too large: the page sends smaller ones.')
    try: return json.dumps(only_uploads(json.loads(event))).encode()
    except (ValueError, RecursionError): raise Refusal(400, 'The event is not JSON.') from None


class Gate:
    "Middleware that lets requests in: known addresses, the right key, bodies that are small enough."
    def __init__(self, app, service: Service, key: str = '', page: bool = False):
        self.app, self.service, self.key, self.page = app, service, key, page

    def check(self, path: str, method: str, headers):
        "Raise `Refusal` for an address that there is not, another method, or a wrong key."
        if path not in API and not (self.page and is_page(path)):
            raise Refusal(404, 'There is nothing at this address: /openapi.json lists what there is.')
        if API.get(path, method) != method:
            raise Refusal(405, f'{path} answers {API[path]} only.', {'Allow': API[path]})
        wrong = self.key and not hmac.compare_digest(given_key(headers).encode(), self.key.encode())
        if wrong and path not in WITHOUT_KEY:
            raise Refusal(401, 'The key is missing or wrong: send it as X-API-Key, as bearer token, or as the password '
                               'of HTTP Basic.', {'WWW-Authenticate': 'Basic realm="dinocls", charset="UTF-8"'})

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http': return await self.app(scope, receive, send)
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import JSONResponse
        service, path, headers, began, status = self.service, scope['path'], Headers(scope=scope), time.monotonic(), 0
        kind = path if path in API else 'page' if is_page(path) else 'other'

        async def marked(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                if path not in API and message['status'] >= 500:  # its events bring their failures in other ways
                    raise Refusal(400, 'The page cannot do that.')
                status, out = message['status'], MutableHeaders(scope=message)
                out['X-Content-Type-Options'] = 'nosniff'
                out.update({'Cache-Control': 'no-store'} if path in API else {'Content-Security-Policy': OFFLINE})
            await send(message)

        try:
            self.check(path, scope['method'], headers)
            place = service.batcher.hold() if API.get(path) == 'POST' else contextlib.nullcontext()
            with place:
                async with service.body(headers, receive) as body:
                    if path == EVENT: body = checked(body)
                    left = iter([{'type': 'http.request', 'body': body, 'more_body': False}])
                    async def again(): return next(left, None) or await receive()
                    await self.app(scope, again, marked)
        except Refusal as e:
            if not status: await JSONResponse({'detail': str(e)}, e.status, e.headers)(scope, receive, marked)
        finally:
            service.requests.labels(kind, status or 500).inc()
            service.seconds.labels(kind).observe(time.monotonic() - began)


class Answer(BaseModel):
    "What the model says of a picture. A picture of nothing that it knows gets one of its classes all the same."
    prediction: str = Field(description='the most probable class')
    confidence: float = Field(description='its probability')
    probabilities: dict[str, float] = Field(description='class → probability')
    top5: list[tuple[str, float]] = Field(description='the most probable classes')
    uncertain: bool | None = Field(None, description='whether the card promises nothing of it; null: of none')


class Failure(BaseModel):
    "What is wrong with a picture of several."
    error: str = Field(examples=['Cannot use the picture: …'])


class Problem(BaseModel):
    "Why there is no answer, in one sentence."
    detail: str = Field(examples=['The service is full: ask again in 1 s.'])


REFUSED = {status: {'model': Problem, 'description': f'{why}.'} for status, why in {
    400: 'The body cannot be read', 401: 'The key is missing or wrong', 408: 'The body arrived too slowly',
    413: 'Too many bytes, pixels or files', 415: 'Neither a form nor a picture', 422: 'No picture, or a damaged one',
    429: 'Full: Retry-After says for how long', 503: 'Shutting down, or the model failed',
    504: 'No answer in time'}.items()}


def brought(kind: type[BaseModel], *media: str) -> dict:
    "Declare a body that the endpoint reads itself, in memory and within the limits; FastAPI would write it to disk."
    content = {'multipart/form-data': {'schema': kind.model_json_schema()}}
    content |= {m: {'schema': {'type': 'string', 'format': 'binary'}} for m in media}
    return {'requestBody': {'required': True, 'content': content}}


def add_endpoints(app, service: Service):
    "Add what the API answers."
    from fastapi import Request, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    model, limits = service.model, service.limits
    one = create_model('Picture', file=bytes)
    many = create_model('Pictures', files=(list[bytes], Field(max_length=limits.max_count)))
    shown = lambda example: REFUSED | {200: {'content': {'application/json': {'example': example}}}}

    @app.post('/predict', summary='Classify a picture', responses=shown(service.example),
              openapi_extra=brought(one, 'image/*', 'application/octet-stream'))
    async def predict(request: Request) -> Answer:
        "Send the picture as a file in a form, or as the body itself."
        data, = await files(request, 1, limits)
        return await service.in_time(service.classify(data))

    @app.post('/predict/batch', summary='Classify several pictures', openapi_extra=brought(many),
              responses=shown([service.example, {'error': 'Cannot use the picture: …'}]))
    async def predict_batch(request: Request) -> list[Answer | Failure]:
        """Send the pictures as files in a form. The answers come in the same order; a picture that cannot be used gets
        an error of its own."""
        found = await files(request, limits.max_count, limits)
        with service.batcher.hold(len(found) - 1):
            return await service.in_time(asyncio.gather(*map(service.attempt, found)))

    @app.get('/healthz', summary='Is the process alive?')
    async def healthz() -> dict[str, str]: return {'status': 'alive'}

    @app.get('/readyz', summary='Would a picture be taken?', responses={503: REFUSED[503]})
    async def readyz() -> dict[str, str]:
        if service.batcher.closing: raise Refusal(503, 'The service is shutting down.')
        return {'status': 'ready'}

    @app.get('/info', summary='Which model is this, and what does it take?')
    async def info() -> dict:
        return {'version': version(), 'classes': model.classes, 'native_size': list(model.native),
                'device': str(model.device), 'precision': model.precision, 'backend': model.backend,
                **{k: model.config.get(k) for k in ('backbone', 'image_size', 'metrics')},
                'limits': service.limits.model_dump()}

    @app.get('/metrics', summary='Counters for Prometheus', response_class=Response)
    async def metrics(): return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


@contextlib.contextmanager
def extra():
    "Say what to install where a library is missing."
    try: yield
    except ModuleNotFoundError as e:
        if (e.name or '').startswith('dinocls'): raise
        raise UserError(f"The service needs {e.name}: pip install 'dinocls[serve]'.") from None


@extra()
def create_app(model,  # a `ProductionModel`
               api_key: str = '',  # empty: everyone may ask
               page: bool = True,  # a page at /, where Gradio is installed
               **limits):  # see `Limits`
    "Return the service of a model as a FastAPI app. Raise `UserError` for a missing library or a wrong limit."
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from .page import add_page
    service = Service(model, limits_from(limits))
    warnings.filterwarnings('ignore', module=r'PIL\.')  # each hostile picture would leave one behind, for ever

    @contextlib.asynccontextmanager
    async def life(app):
        with service.readers:
            async with service.batcher: yield
        if app.state.page: upload_folder().cleanup()  # a signal ends the process without further ado

    what = f'Classifies pictures: {model.config["backbone"]}, {len(model.classes)} classes.'
    app = FastAPI(title='dinocls', version=version(), description=what, lifespan=life,
                  docs_url=None, redoc_url=None)  # those pages load their scripts from another server
    app.state.service, app.state.page = service, None
    add_endpoints(app, service)
    if page := page and find_spec('gradio') is not None: add_page(app, service)
    app.add_middleware(Gate, service=service, key=api_key, page=page)

    @app.exception_handler(Exception)
    async def failed(request, error):  # the server logs it
        return JSONResponse({'detail': 'The service made a mistake; its log says which.'}, 500)
    return app


def listen(host: str, port: int) -> socket.socket:
    "Return a socket that listens. Raise `UserError` if there is none to be had."
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try: made = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as e:
        why = f'Cannot listen on {host}, port {port} ({reason(e)})'
        raise UserError(f'{why}: choose another --port, or --host.') from None
    # asyncio sends small packets at once only where the protocol is named; else each answer waits 40 ms to be confirmed
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, made.detach())


@extra()
def serve(model, host: str = '127.0.0.1', port: int = 8000,  # 0: any that is free
          api_key: str = '', page: bool = True, **limits):
    "Serve a model until SIGINT or SIGTERM. Raise `UserError` for a missing library, a port taken or a wrong limit."
    import uvicorn
    with listen(host, port) as listener:
        app = create_app(model, api_key, page, **limits)
        gc.collect()
        gc.freeze()  # else each full collection looks at all that the libraries made, and nobody is answered meanwhile
        longest = math.ceil(2 * app.state.service.limits.timeout) + 5
        config = uvicorn.Config(app, log_level='warning', access_log=False, server_header=False, ws='none',
                                lifespan='on', timeout_graceful_shutdown=longest)

        class Server(uvicorn.Server):
            def handle_exit(self, *args):
                "Let nobody in any more, and end the page's open connections."
                app.state.service.batcher.closing = True
                if app.state.page: app.state.page.stop_event.set()
                super().handle_exit(*args)

        address, port = listener.getsockname()[:2]
        url = f'http://{f"[{address}]" if ":" in address else address}:{port}'
        print(url, 'answers and shows a page;' if app.state.page else 'answers;', 'Ctrl-C stops it.', flush=True)
        if not api_key and host not in ('127.0.0.1', '::1', 'localhost'):
            print('Whoever reaches this address may ask: --api-key sets a key.', flush=True)
        Server(config).run(sockets=[listener])
