"""Does the service stand what once took it down, and is what was stored and changed since ever used?

    python benchmarks/attacks.py          writes attacks.md beside this file
    python benchmarks/attacks.py a c f    prints these alone

`dinocls serve` answers with the model of the preset smoke and limits as they come, and may open 1024 files. While it is
attacked, one honest client sends a small picture over a new connection ten times a second. Then results of the preset
smoke get flipped bits, and are read as every command reads them.
"""
import asyncio
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from faults import COMMAND, flip_bit, photographs, watched
from PIL import Image
from service import pictures, save

from dinocls.app.driver import Job, Run, chapter_digest, chapters, outputs
from dinocls.inference import ProductionModel
from dinocls.kit import config, datasets, engines, files, machine, stage
from dinocls.kit.figures import read_metrics
from dinocls.phase2 import phase2

GOOD, RECORD = pictures(32, 1)[0], Path(__file__).parents[1]/'outputs'/'record-quick'


# --- what is sent


def bmp() -> bytes:
    "Return a BMP of 50,000,000×1 in RLE8 whose data are one delta escape."
    size = struct.pack('<IiiHHIIiiII', 40, 50_000_000, 1, 1, 8, 1, 6, 0, 0, 256, 0)
    return b'BM' + struct.pack('<IHHI', 1084, 0, 0, 1078) + size + bytes(1024) + b'\0\2\1\0\0\1'


def tiff(*tags, data: bytes) -> bytes:  # (tag, kind, count, value or offset), sorted; what begins at byte 8
    "Return a TIFF of these tags."
    directory = b''.join(struct.pack('<HHII', *tag) for tag in tags)
    return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + struct.pack('<H', len(tags)) + directory + bytes(4)


def one_size(side: int, **more) -> dict:  # tag → (kind, count, value)
    "Return the tags of a grey TIFF."
    return {256: (4, 1, side), 257: (4, 1, side), 258: (3, 1, 8), 259: (3, 1, more.pop('packed', 1)), 262: (3, 1, 1),
            277: (3, 1, 1)}


def shared() -> bytes:
    "Return a TIFF of 200 KB, 8,000 tags of which each claim the same 100,000 bytes."
    return tiff(*((tag, 1, 100_000, 8) for tag in range(40_000, 48_000)), data=bytes(100_000))


def strips() -> bytes:
    "Return a TIFF of 28 MB that lists seven million strips."
    n = 7_000_000
    tags = one_size(1000) | {273: (4, n, 8), 278: (4, 1, 1), 279: (4, n, 8)}
    return tiff(*((t, *v) for t, v in sorted(tags.items())), data=bytes(4 * n))


def tile() -> bytes:
    "Return a TIFF with one tile of 40,000×40,000 pixels."
    packed = zlib.compressobj(9)
    data = b''.join([*(packed.compress(bytes(10**7)) for _ in range(160)), packed.flush()])
    tags = one_size(1000, packed=8) | {322: (4, 1, 40_000), 323: (4, 1, 40_000), 324: (4, 1, 8), 325: (4, 1, len(data))}
    return tiff(*((t, *v) for t, v in sorted(tags.items())), data=data)


def scans(n: int = 20_000) -> bytes:
    "Return a progressive JPEG whose last scan comes n times."
    Image.new('L', (6000, 6000), 99).save(file := io.BytesIO(), 'JPEG', progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b'\xff\xda'):-2]
    return data[:-2] + n * last + data[-2:]


def comments(n: int = 1_600_000) -> bytes:
    "Return a GIF with 8 MB of comments."
    Image.new('L', (9, 9)).save(file := io.BytesIO(), 'GIF')
    data = file.getvalue()
    at = data.index(b',')  # the picture
    return data[:at] + n * b'!\xfe\1x\0' + data[at:]


def segments(n: int = 80_000) -> bytes:
    "Return a JPEG with 8 MB of Exif segments."
    Image.new('L', (9, 9)).save(file := io.BytesIO(), 'JPEG')
    return b'\xff\xd8' + n * (b'\xff\xe1\0\x6cExif\0\0' + bytes(100)) + file.getvalue()[2:]


def head(length: int, path: str = '/predict', kind: str = 'image/png') -> bytes:
    return (f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n'
            'Connection: close\r\n\r\n').encode()


async def send(port: int, data: bytes, *where, timeout: float = 60) -> int:  # status; 0: none came
    "Send a body over a connection of its own."
    async def exchange():
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        try:
            with contextlib.suppress(ConnectionError):  # an answer may come before all is sent
                writer.write(head(len(data), *where) + data)
                await writer.drain()
            return int((await reader.read()).split(b' ', 2)[1])
        finally: writer.transport.abort()
    try: return await asyncio.wait_for(exchange(), timeout)
    except (OSError, IndexError, asyncio.TimeoutError): return 0


def counted(statuses: list) -> str:
    "Say how often each status came."
    return ', '.join(f'{statuses.count(s)} × {s or "hung up"}' for s in sorted(set(statuses)))


# --- attacks on a service: port → what came of it


def sending(data: bytes, times: int = 2):
    "Return the attack that sends a picture, as often at once as there are readers."
    async def attack(port): return counted(await asyncio.gather(*(send(port, data) for _ in range(times))))
    return attack


async def idle(port: int) -> str:
    "Hold 1,100 connections that say nothing, for 15 s."
    held = await asyncio.gather(*(asyncio.open_connection('127.0.0.1', port) for _ in range(1100)),
                                return_exceptions=True)
    await asyncio.sleep(15)
    held = [writer for pair in held if isinstance(pair, tuple) for writer in pair[1:]]
    for writer in held: writer.transport.abort()
    return f'{len(held):,} connected'


async def announced(port: int) -> str:
    "Announce 256 bodies and send none, while 129 honest requests are made."
    held = [(await asyncio.open_connection('127.0.0.1', port))[1] for _ in range(256)]
    for writer in held: writer.write(head(100_000))
    await asyncio.sleep(0.5)
    got = [await send(port, GOOD) for _ in range(129)]
    for writer in held: writer.transport.abort()
    return f'of 129 requests {counted(got)}'


EVENTS = ('/queue/join', '/queue/data', '/gradio_api/queue/join', '/gradio_api/queue/data?session_hash=', '/run/predict')


async def events(port: int) -> str:
    "Send events of the page there was, with an empty session hash; then ask for the page."
    body = json.dumps({'data': [], 'fn_index': 0, 'session_hash': ''}).encode()
    got = [await send(port, body, path, 'application/json') for path in EVENTS for _ in range(20)]
    return f'{counted(got)}; the page afterwards: {await send(port, GOOD, "/look")}'


async def uploads(port: int, seconds: float = 40) -> str:
    "Send bodies of 32 MB over 64 connections, to the API, the page, and where uploads went to."
    body, until, sent = os.urandom(2**20) * 32, time.monotonic() + seconds, []
    async def uploader(path):
        while time.monotonic() < until: sent.append(await send(port, body, path, 'image/png'))
    await asyncio.gather(*(uploader(('/predict', '/look', '/gradio_api/upload', '/predict/batch')[i % 4])
                           for i in range(64)))
    return counted(sent)


async def offered(port: int, rate: float, seconds: float = 6) -> float:  # answers/s
    "Ask `rate` times a second, whatever the answers, over a connection each; return how many are answered."
    done, began, tasks = [], time.monotonic(), []
    async def ask():
        if await send(port, GOOD, timeout=20) == 200: done.append(time.monotonic())
    while (late := time.monotonic() - began) < seconds:
        while len(tasks) < rate * late: tasks.append(asyncio.create_task(ask()))
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return sum(began + 1 < t <= began + seconds for t in done) / (seconds - 1)


async def closed(port: int, clients: int = 32, seconds: float = 6) -> float:  # answers/s
    "Let clients ask one after the other, over a connection each."
    began, done = time.monotonic(), []
    async def client():
        while time.monotonic() < began + seconds:
            if await send(port, GOOD) == 200: done.append(time.monotonic())
    await asyncio.gather(*(client() for _ in range(clients)))
    return sum(t > began + 1 for t in done) / (seconds - 1)


async def overload(port: int) -> str:
    "Measure the capacity, and what is answered beyond it, three times in turn."
    rounds = []
    for _ in range(3):
        capacity = await closed(port)
        rounds.append([capacity, *[await offered(port, times * capacity) / capacity for times in (1, 1.2, 3)]])
    capacity, *shares = np.median(rounds, 0)
    return f'capacity {capacity:.0f}/s; answered at 1×, 1.2× and 3× of it: ' + ', '.join(f'{s:.0%}' for s in shares)


ATTACKS = [  # the letter in the list of faults; what it does; what it did; how
    ('a', 'BMP in RLE8, 50,000,000×1, 1,084 bytes', '774 MB → over 8 GB', lambda: sending(bmp())),
    ('b', 'TIFF of 200 KB whose tags share bytes', '4.6 GB; 1 MB: killed', lambda: sending(shared())),
    ('c', 'progressive JPEG with 20,000 scans, twice', 'both readers held for 90 s and more', lambda: sending(scans())),
    ('c', 'GIF, 8 MB of comments, twice', '46 s', lambda: sending(comments())),
    ('c', 'JPEG, 8 MB of Exif segments, twice', '88 s', lambda: sending(segments())),
    ('c', 'PBM, 30 MB of comments, twice', '67 s', lambda: sending(b'P1\n' + 15_000_000 * b'#\n' + b'1 1\n1')),
    ('c', 'TIFF, 28 MB of strip offsets, twice', '56 s', lambda: sending(strips())),
    ('c', 'TIFF, one tile of 40,000×40,000, twice', '2.3 GB', lambda: sending(tile())),
    ('d', '1,100 idle connections, 1024 files', 'deaf, 244 MB of log in 30 s', lambda: idle),
    ('e', '256 announced bodies that do not come', '127 of 129 honest requests get 429', lambda: announced),
    ('f', 'more requests than it can answer', '24 % at 1.2×, 10 % at 3×', lambda: overload),
    ('g', 'events with an empty session hash', 'the page is dead until restart', lambda: events),
    ('h', 'uploads for 40 s over 64 connections', '5.5 GB kept', lambda: uploads)]


@contextlib.contextmanager
def serving(folder: Path, log: Path):
    "Yield process and port of `dinocls serve`."
    def limited(): resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    with open(log, 'w') as told:
        process = subprocess.Popen([COMMAND, 'serve', folder, '--port', '0', '--backend', 'torch', '--device', 'cpu'],
                                   stdout=subprocess.PIPE, stderr=told, text=True, preexec_fn=limited,
                                   env=os.environ | {'OMP_NUM_THREADS': '1'})
    try: yield process, int(process.stdout.readline().split()[0].rsplit(':', 1)[1])
    finally:
        process.terminate()
        process.wait()


async def attacked(port: int, attack, busy: bool) -> tuple[str, list, float]:  # what came; honest statuses; seconds
    "Attack, beside an honest client unless the attack is of honest ones; return how long until the next is answered."
    got, over = [], asyncio.Event()
    async def honest():
        while not over.is_set() and not busy:
            got.append(await send(port, GOOD))
            await asyncio.sleep(0.1)
    beside = asyncio.create_task(honest())
    said = await attack(port)
    began = time.monotonic()
    while await send(port, GOOD) != 200: await asyncio.sleep(0.05)
    over.set()
    healthy = time.monotonic() - began
    await beside
    return said, got, healthy


def on_the_service(place: Path) -> list[str]:
    "Return a row for each attack, each on a service of its own."
    rows, folder = [], save(place/'production', 32, 'smoke')
    for letter, what, before, make in (a for a in ATTACKS if a[0] in (sys.argv[1:] or a[0])):
        attack, log = make(), place/'log'
        with serving(folder, log) as (process, port):
            with watched(process.pid) as quiet: asyncio.run(send(port, GOOD)), time.sleep(0.5)
            with watched(process.pid) as peak:
                said, got, healthy = asyncio.run(attacked(port, attack, attack is overload))
            assert process.poll() is None, log.read_text()
        row = (letter, what, before, said, f'{quiet[0] / 2**20:,.0f} → **{peak[0] / 2**20:,.0f}**',
               f'{got.count(200)} of {len(got)} answered' if got else '', f'{healthy:.1f}', f'{log.stat().st_size:,}')
        rows.append(f'| {" | ".join(row)} |')
        print(rows[-1], flush=True)
    return rows


# --- what is stored


def flipped(file: Path, read, times: int) -> str:  # read: → what it means, or `UserError`
    "Flip a random bit of a file again and again; say how often something else was then taken for the result."
    whole, chance, right, silent = file.read_bytes(), random.Random(0), read(), 0
    for _ in range(times):
        flip_bit(file, chance)
        files._known_digest.cache_clear(), stage._record_of.cache_clear()  # as another process would read it
        with contextlib.suppress(files.UserError): silent += read() != right
        file.write_bytes(whole)
    return f'**{silent}** of {times}'


def of_stage(cfg, part):
    "Return what reads a part of the result of phase 2, if it counts."
    def read():
        if not (result := phase2.find(cfg)[0]): raise files.UserError('It is computed anew.')
        return files.digest([v.tolist() for v in result[part].values()] if part == 'weights' else result[part])
    return read


def of_chapter(cfg):
    "Lay the record of a chapter into the run; return what reads its metrics, if all that it wrote counts."
    (chapter,) = (c for c in chapters() if c.name == '06_phase2')
    shutil.copytree(RECORD/chapter.name, cfg.folder/chapter.name)
    shutil.copy(RECORD/f'{chapter.name}.ipynb', cfg.folder)
    run, stored = Run(cfg, [chapter]), Job(chapter, cfg).file('chapters')
    made = {'digest': chapter_digest(chapter, run.book, cfg), 'files': outputs(chapter, cfg)}
    files.write_json(stored, made, sealed=True)
    def read():
        if not run.is_current(chapter, stored): raise files.UserError('It is executed anew.')
        return read_metrics(cfg)
    return read


def on_what_is_stored(place: Path) -> list[str]:
    "Return a row for each kind of file."
    cfg, rows = config.preset('smoke', out=str(place/'run'), device='cpu'), []
    def note(*row): rows.append('| ' + ' | '.join(row) + ' |'), print(rows[-1], flush=True)
    folder, subject = phase2(cfg).folder, ProductionModel(save(place/'model', 32, 'smoke'), 'cpu').subject
    onnx, metrics = engines.exported(subject), of_chapter(cfg)
    files.write_json(cfg.folder/'book.json', known := files.read_json(RECORD/'book.json'), sealed=True)
    photographs(place/'photos', 80, (500, 375))
    def served(): return ProductionModel(folder, 'cpu').predict(GOOD)
    def graph(): return files.file_digest(engines.exported(subject))
    def times():  # what nobody asks for may be there: the seal, if it is its name that has a bit flipped
        return {k: v for k, v in files.read_json(cfg.folder/'book.json').items() if k in known}
    def images():
        with contextlib.redirect_stdout(io.StringIO()):
            found = datasets.load_dataset('imagefolder', place/'photos', 'skip', 32)
        return hashlib.sha256(found.images).digest()
    images()
    (rgb,) = (place/'data'/'decoded').glob('*.rgb')
    note('k', 'weights of phase 2, in a chapter', '159 of 160',
         flipped(folder/'weights.safetensors', of_stage(cfg, 'weights'), 160))
    note('k', 'the same, by `dinocls serve`', 'likewise', flipped(folder/'weights.safetensors', served, 160))
    note('l', 'cached ONNX', 'one bit changed 20 to 59 of 64 answers', flipped(onnx, graph, 10))
    note('m', '`result.json`', '47 of 200', flipped(folder/'result.json', of_stage(cfg, 'history'), 200))
    note('m', '`metrics.json`', '56 of 200', flipped(cfg.folder/'06_phase2'/'metrics.json', metrics, 200))
    note('m', '`book.json`', '49 of 200', flipped(cfg.folder/'book.json', times, 200))
    note('m', 'decoded pictures', '120 of 200', flipped(rgb, images, 100))
    return rows


def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (2**13, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        os.environ.update(XDG_CACHE_HOME=f'{tmp}/cache', DINOCLS_DATA=f'{tmp}/data')
        stored = on_what_is_stored(Path(tmp)) if {*'klm'} & {*(sys.argv[1:] or 'k')} else []
        served = on_the_service(Path(tmp))
    if sys.argv[1:]: return
    h, v = machine.hardware(), machine.versions()
    lines = ['# Under attack', '', f'`python benchmarks/attacks.py`: {h["cpu"]}, {h["cores"]} cores, torch {v["torch"]}. '
             'The letters are those of the list of faults; "before" is what the commit be3faf3 did.', '',
             '## On the service', '',
             '`dinocls serve` with the model of the preset smoke, one thread, limits as they come, and at most 1024 open '
             'files; a service of its own for each attack. Memory is that of all its processes, in MB. The honest client '
             'sends a small picture over a new connection ten times a second; what it got is told where the attack is '
             'not one of honest requests. The last columns are the seconds until a request after the attack is answered, '
             'and what the service had to say about it.', '',
             '| | attack | before | answers now | memory, idle → peak | honest client | healthy after (s) | log (bytes) |',
             '|---|---|---|---|---|---|---|---|', *served, '', '## On what is stored', '',
             'A random bit of a file is flipped again and again, and the file read as a new process reads it. What is '
             'damaged must be refused or made anew; counted is how often something else was taken for the result.', '',
             '| | file | taken before | taken now |', '|---|---|---|---|', *stored]
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
