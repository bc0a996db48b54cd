"""A small HTTP service answers many at once: it gathers their pictures into batches, refuses what is too much before it
costs anything, and gives every mistake one sentence."""
import asyncio
import base64
import contextlib
import functools
import gc
import hmac
import io
import ipaddress
import logging
import math
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, create_model, model_validator

from ..kit.files import UserError, explain, nearest, reason
from ..kit.machine import cores, needing, version
from ..kit.pictures import as_png, to_pixels


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
    readers: PositiveInt = min(4, cores())  # processes that decode
    reader_memory: PositiveInt = 2**30  # bytes that a picture may take while it is decoded
    reader_seconds: PositiveFloat = 5.0  # of a processor, for decoding a picture
    max_connections: PositiveInt = 512  # at once; beyond, whoever has kept the service waiting longest has to go
    idle_seconds: PositiveFloat = 10.0  # in which the head of a request has to arrive, or the next request

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
        super().__init__(status, sentence, headers)  # all of them: it has to come over from a reader
        self.status, self.headers = status, headers or {}

    def __str__(self): return self.args[1]


SERVED = 'AVIF', 'GIF', 'JPEG', 'PNG', 'WEBP'  # what cameras and browsers make; the fewer decoders the better


def read_picture(data: bytes, native: tuple, max_pixels: int) -> np.ndarray:  # uint8 (height, width, 3)
    "Decode a picture to the native size. Raise `Refusal` if it claims too many pixels (413) or is none (422)."
    from PIL import Image, UnidentifiedImageError
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[f for f in SERVED if f in Image.OPEN]) as image:
            claimed = image.width * image.height
            if claimed <= max_pixels: return to_pixels(image, native, 'the picture')
    except UserError as e:
        if isinstance(e.__context__, MemoryError): raise MemoryError from None
        raise Refusal(422, str(e)) from None
    except MemoryError: raise
    except UnidentifiedImageError:
        raise Refusal(422, f'Cannot use the picture: it is not a picture in one of the formats {", ".join(SERVED)}.'
                      ) from None
    except Image.DecompressionBombError: claimed = math.inf
    except Exception as e: raise Refusal(422, f'Cannot use the picture: {reason(e)}.') from None
    many = 'far too many' if claimed == math.inf else f'{claimed:,}'
    raise Refusal(413, f'The picture has {many} pixels, and {max_pixels:,} are accepted: send it smaller.')


@functools.cache
def confine(memory: int):
    "Let this process, a reader, take no more than some bytes beyond what it has, as far as the system can see to it."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends its readers
    warnings.simplefilter('ignore')  # each hostile picture would leave one behind, for ever
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import psutil
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, resource.RLIM_INFINITY))


def read_confined(data: bytes, native: tuple, limits: Limits) -> np.ndarray:
    "Call `read_picture` in a process that the system ends after some seconds of work."
    confine(limits.reader_memory)
    timed = hasattr(signal, 'setitimer')  # not on Windows, where the time-out of the request ends it
    if timed: signal.setitimer(signal.ITIMER_PROF, limits.reader_seconds)
    try: return read_picture(data, native, limits.max_pixels)
    finally:
        if timed: signal.setitimer(signal.ITIMER_PROF, 0)


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
                 patience: float = math.inf,  # seconds that an answer may take
                 watch=lambda items, seconds: None):  # told of each batch
        self.work, self.max_batch, self.max_queue, self.wait, self.watch = work, max_batch, max_queue, wait, watch
        self.queue, self.worker = asyncio.Queue(), ThreadPoolExecutor(1, 'dinocls-model')
        self.held, self.closing = 0, False  # places taken
        self.size, self.ended = 1, 0.0  # of the last batch
        self.patience, self.pace = patience, 0.0  # seconds that a request took, by the places taken, lately

    async def __call__(self, item):
        "Return what `work` makes of an item, in a batch with others."
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, future))
        return await future

    def full(self, places: int = 1) -> bool:
        "Tell whether some more places are not to be had, or what is taken in would be answered too late."
        late = self.held >= self.max_batch and self.held * self.pace > self.patience
        return late or self.held + places > self.max_queue

    def check(self, places: int = 1):
        "Raise `Refusal` (429) if there are no places."
        if not self.full(places): return
        wait = min(60, max(1, math.ceil(self.held * self.pace)))
        raise Refusal(429, f'The service is full: ask again in {wait} s.', {'Retry-After': str(wait)})

    @contextlib.contextmanager
    def hold(self, places: int = 1):
        "Take places in the service for the length of a block. Raise `Refusal` (429) if there are none."
        self.check(places)
        self.held += places
        began, ahead = time.monotonic(), self.held
        try: yield
        finally:
            self.held -= places
            self.pace += 0.1 * ((time.monotonic() - began) / ahead - self.pace)

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
            self.ended = time.monotonic()
            self.watch(self.size, time.perf_counter() - began)


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
        self.model, self.limits = model, limits
        self.memory, self.arriving = 0, {}  # bytes of all bodies; task → what came so far, the oldest first
        self.registry, sizes = CollectorRegistry(), [2**i for i in range(9)]  # two services do not meet
        here = {'registry': self.registry}
        self.requests = Counter('dinocls_requests', 'Requests answered', ['path', 'status'], **here)
        self.seconds = Histogram('dinocls_request_seconds', 'Seconds from a request to its answer', ['path'], **here)
        self.batches = Histogram('dinocls_batch_pictures', 'Pictures in a batch', buckets=sizes, **here)
        self.work = Histogram('dinocls_batch_seconds', 'Seconds that the model took for a batch', **here)
        from anyio import CapacityLimiter
        self.readers = CapacityLimiter(limits.readers)
        def count(pictures, seconds): self.batches.observe(pictures), self.work.observe(seconds)
        self.batcher = Batcher(model.answers, limits.max_batch, limits.max_queue, limits.wait_ms / 1000,
                               limits.timeout / 2, count)
        Gauge('dinocls_held_pictures', 'Pictures in the service', **here).set_function(lambda: self.batcher.held)
        self.grey = np.full((*model.native, 3), 128, np.uint8)
        self.example = model.answers([self.grey])[0]  # the first call, a slow one

    async def metrics(self) -> bytes:
        "Return the counters as Prometheus reads them."
        from prometheus_client import generate_latest
        return generate_latest(self.registry)

    async def probe(self):
        "Have the model answer. Raise `Refusal` if it can't."
        await self.batcher(self.grey)

    async def read(self, data: bytes) -> np.ndarray:
        """Decode a picture in a process of its own. Raise `Refusal`, also where that process had to be ended; another
        takes its place."""
        from anyio import BrokenWorkerProcess, to_process
        limits = self.limits
        try: return await to_process.run_sync(read_confined, data, self.model.native, limits,
                                              cancellable=True, limiter=self.readers)
        except (BrokenWorkerProcess, MemoryError):
            raise Refusal(413, f'Decoding the picture takes more than {limits.reader_seconds:g} s or '
                               f'{limits.reader_memory / 2**20:,.0f} MiB: send it smaller, or saved anew.') from None

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
        """Read a request's body, counted and not believed, and keep it for the length of a block. Raise `Refusal`;
        where memory is short, for whoever has been sending longest."""
        limits, until, data, more = self.limits, time.monotonic() + self.limits.timeout, bytearray(), True
        full = Refusal(429, 'The service is full: ask again in 1 s.', {'Retry-After': '1'})
        stated = headers.get('content-length', '')
        stated = int(stated[:19]) if stated.isdecimal() else 0
        self.arriving[me := asyncio.current_task()] = data
        try:
            while True:
                if max(stated, len(data)) > limits.max_bytes:
                    many = f'{limits.max_bytes:,} bytes'
                    raise Refusal(413, f'The body has more than {many}, which is what is accepted: send less.')
                while self.memory > limits.max_memory:
                    oldest, held = next(iter(self.arriving.items()))
                    if oldest is me: raise full
                    del self.arriving[oldest]
                    self.memory -= len(held)
                    held.clear()
                    oldest.cancel()
                if not more: break
                try: message = await asyncio.wait_for(receive(), max(0, until - time.monotonic()))
                except asyncio.TimeoutError:
                    late = f'The body did not arrive within {limits.timeout:g} s: send a smaller picture.'
                    raise Refusal(408, late) from None
                except asyncio.CancelledError:
                    if me in self.arriving: raise
                if me not in self.arriving: raise full
                if message['type'] == 'http.disconnect':
                    raise Refusal(400, 'The connection ended before the body was there.')
                data += (part := message.get('body', b''))
                self.memory += len(part)
                more = message.get('more_body')
            del self.arriving[me]
            yield bytes(data)
        finally:
            self.arriving.pop(me, None)
            self.memory -= len(data)


API = {'/predict': 'POST', '/predict/batch': 'POST', '/info': 'GET', '/metrics': 'GET', '/openapi.json': 'GET',
       '/healthz': 'GET', '/readyz': 'GET'}
PAGE = {'/look': 'POST', '/page.json': 'GET'}
FILES = {'/': 'GET', '/page.js': 'GET', '/page.css': 'GET', '/icon.svg': 'GET'}
ALWAYS = ('/healthz', '/readyz')  # without a key, and under any name
SAFE = {'X-Content-Type-Options': 'nosniff', 'Cross-Origin-Resource-Policy': 'same-origin',
        'Content-Security-Policy': "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
                                   "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def given_key(headers) -> str:
    "Return the key that a request brings: as X-API-Key, as bearer token, or as password."
    kind, _, value = headers.get('authorization', '').partition(' ')
    if kind.lower() == 'bearer': return value.strip()
    if kind.lower() == 'basic':
        with contextlib.suppress(ValueError): return base64.b64decode(value, validate=True).decode().partition(':')[2]
    return headers.get('x-api-key', '')


def is_named(host: str, names) -> bool:
    """Tell whether a Host is one of the names, an address in numbers, or none. Any other may be a foreign site's that
    lets its name point here, so that the browser of whoever visits it takes the service for a part of it."""
    with contextlib.suppress(ValueError):
        name = (urlsplit(f'//{host}').hostname or '').rstrip('.')
        return name in names or bool(ipaddress.ip_address(name))
    return False


class Guesses:
    "Counts wrong keys by address: ten at once, then one in a second."
    def __init__(self): self.until = {}  # address → when it will have a clean slate

    def check(self, given: str, key: str, address: str):
        "Raise `Refusal` for a missing or wrong key (401), and unseen for one after too many wrong ones (429)."
        now = time.monotonic()
        until = max(now, self.until.get(address, 0))
        if until > now + 10:
            raise Refusal(429, 'Too many wrong keys came from this address: wait 10 s.', {'Retry-After': '10'})
        if hmac.compare_digest(given.encode(), key.encode()): return
        if given: self.until[address] = until + 1
        if len(self.until) > 10_000: self.until = dict(list(self.until.items())[5000:])
        raise Refusal(401, 'The key is missing or wrong: send it as X-API-Key, as bearer token, or as the password '
                           'of HTTP Basic.', {'WWW-Authenticate': 'Basic realm="dinocls", charset="UTF-8"'})


class Gate:
    "Middleware that lets requests in: known names and addresses, the right key, bodies that are small enough."
    def __init__(self, app, service: Service, key: str = '', page: bool = False, names=()):
        self.app, self.service, self.key, self.guesses = app, service, key, Guesses()
        self.methods = API | (PAGE | FILES if page else {})  # path → method
        self.names = {'', 'localhost', socket.gethostname().lower(), *(n.lower() for n in names)}

    def allowed(self, path: str) -> list:
        "Return the methods of an address."
        return {'GET': ['GET', 'HEAD'], 'POST': ['POST']}.get(self.methods.get(path), []) + ['OPTIONS']

    def check(self, scope, headers):
        "Raise `Refusal` for another name, an address that there is not, another method, or a wrong key."
        path, method, closing = scope['path'], scope['method'], self.service.batcher.closing
        if path not in ALWAYS and not is_named(headers.get('host', ''), self.names):
            raise Refusal(421, 'The service does not go by this name: --name tells it another one.')
        if path not in self.methods and (path, method) != ('*', 'OPTIONS'):
            raise Refusal(404, 'There is nothing at this address: /openapi.json lists what there is.')
        if method not in (allowed := self.allowed(path)):
            raise Refusal(405, f'{path} answers {", ".join(allowed)} only.', {'Allow': ', '.join(allowed)})
        if self.key and path not in ALWAYS and method != 'OPTIONS':
            self.guesses.check(given_key(headers), self.key, (scope.get('client') or [''])[0])
        if method == 'POST' and closing:
            raise Refusal(503, 'The service is shutting down: ask another one, or this one later.', LATER)

    async def enter(self, scope, headers, receive, send):
        "Answer a request that was let in; one with a body takes its place when the body is there."
        from starlette.responses import Response
        if scope['method'] == 'OPTIONS':  # no other site may ask: no header of CORS allows it
            allow = {'Allow': ', '.join(self.allowed(scope['path']))}
            return await Response(status_code=204, headers=allow)(scope, receive, send)
        async def pass_on(body, **changes):
            left = iter([{'type': 'http.request', 'body': body, 'more_body': False}])
            async def again(): return next(left, None) or await receive()
            await self.app(scope | changes, again, send)
        if scope['method'] != 'POST': return await pass_on(b'', method='GET')
        self.service.batcher.check()
        async with self.service.body(headers, receive) as body:
            with self.service.batcher.hold(): await pass_on(body)

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http': return await self.app(scope, receive, send)
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import JSONResponse
        path, headers, began, status = scope['path'], Headers(scope=scope), time.monotonic(), 0
        kind = path if path in self.methods else 'other'

        async def marked(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status, out = message['status'], MutableHeaders(scope=message)
                out.update(SAFE | {'Cache-Control': 'no-cache' if path in FILES else 'no-store'})
            elif scope['method'] == 'HEAD': message = message | {'body': b''}
            await send(message)

        try:
            self.check(scope, headers)
            await self.enter(scope, headers, receive, marked)
        except Refusal as e:
            if not status: await JSONResponse({'detail': str(e)}, e.status, e.headers)(scope, receive, marked)
        finally:
            self.service.requests.labels(kind, status or 500).inc()
            self.service.seconds.labels(kind).observe(time.monotonic() - began)


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
    413: 'Too many bytes, pixels or files, or too much to decode', 415: 'Neither a form nor a picture',
    422: 'No picture, or a damaged one', 429: 'Full: Retry-After says for how long',
    503: 'Shutting down, or the model failed', 504: 'No answer in time'}.items()}


def brought(kind: type[BaseModel], *media: str) -> dict:
    "Declare a body that the endpoint reads itself, in memory and within the limits; FastAPI would write it to disk."
    content = {'multipart/form-data': {'schema': kind.model_json_schema()}}
    content |= {m: {'schema': {'type': 'string', 'format': 'binary'}} for m in media}
    return {'requestBody': {'required': True, 'content': content}}


def add_endpoints(app, service: Service):
    "Add what the API answers."
    from fastapi import Request, Response
    from prometheus_client import CONTENT_TYPE_LATEST
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
    async def metrics(): return Response(await app.state.metrics(), media_type=CONTENT_TYPE_LATEST)


@needing('serve', 'The service')
def create_app(model,  # a `ProductionModel`
               api_key: str = '',  # empty: everyone may ask
               page: bool = True,  # a page at /
               names=(),  # that clients may call the service by, beside this machine's
               **limits):  # see `Limits`
    "Return the service of a model as a FastAPI app. Raise `UserError` for a missing library or a wrong limit."
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from .page import add_page
    service = Service(model, limits_from(limits))

    @contextlib.asynccontextmanager
    async def life(app):
        async with service.batcher:
            await service.read(as_png(np.zeros((1, 1, 3), np.uint8)))  # starts a reader
            yield

    what = f'Classifies pictures: {model.config["backbone"]}, {len(model.classes)} classes.'
    app = FastAPI(title='dinocls', version=version(), description=what, lifespan=life,
                  docs_url=None, redoc_url=None)  # those pages load their scripts from another server
    app.state.service, app.state.metrics = service, service.metrics
    add_endpoints(app, service)
    if page: add_page(app, service)
    app.add_middleware(Gate, service=service, key=api_key, page=page, names=names)

    @app.exception_handler(Exception)
    async def failed(request, error):  # the server logs it
        return JSONResponse({'detail': 'The service made a mistake; its log says which.'}, 500)
    return app


def listen(host: str, port: int) -> socket.socket:
    "Return a socket that listens. Raise `UserError` if there is none to be had."
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with explain((OSError, OverflowError, UnicodeError), f'Cannot listen on {host}, port {port}',
                 'choose another --port, or --host.'):
        made = socket.create_server((host, port), family=family, backlog=256)
    # asyncio sends small packets at once only where the protocol is named; else each answer waits 40 ms to be confirmed
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, made.detach())


def announce(address: str, port: int, page: bool, api_key: str):
    "Say where the service answers."
    url = f'http://{f"[{address}]" if ":" in address else address}:{port}'
    print(url, 'answers and shows a page;' if page else 'answers;', 'Ctrl-C stops it.', flush=True)
    if not api_key and address not in ('127.0.0.1', '::1', 'localhost'):
        print('Whoever reaches this address may ask: --api-key sets a key.', flush=True)


@needing('serve', 'The service')
def serve(model, host: str = '127.0.0.1', port: int = 8000,  # 0: any that is free
          api_key: str = '', page: bool = True, names=(), **limits):
    "Serve a model until SIGINT or SIGTERM. Raise `UserError` for a missing library, a port taken or a wrong limit."
    from .server import Server
    with listen(host, port) as listener:
        app = create_app(model, api_key, page, (host, *names), **limits)
        gc.collect()
        gc.freeze()  # else each full collection looks at all that the libraries made, and nobody is answered meanwhile
        announce(*listener.getsockname()[:2], page, api_key)
        Server(app, listener).run()
