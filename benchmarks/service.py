"""What gathering concurrent requests into batches buys, and what several processes do.

The service of the book stands beside the same service that asks its model one by one, and beside bare calls of
`predict`.

    python benchmarks/service.py                 # writes service.md beside this file
    python benchmarks/service.py --model small --seconds 1 --rounds 1 --no-write
    python benchmarks/service.py replicas        # writes the second part of service.md

The two services and the bare calls are processes of their own; the clients are this one, and speak HTTP over kept-alive
connections. In each round they take turns at each number of clients, so that a ratio compares neighbours in time.
With `replicas` it is the command `dinocls serve` with one process, with one process of one thread, and with two
replicas, each alone on the machine.

Weights are random where the book ships none: what is measured does not depend on them.
"""
import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np

CLIENTS = (1, 4, 8, 16, 32, 64)
WAYS = {'batches': 32, 'one by one': 1}  # the largest batch
KINDS = {'one process': (), 'one thread': (), 'two replicas': ('--replicas', '2')}
SECOND = '\n# The service in several processes\n'
MODELS = {'small': ('book-digits at 32 px', dict(name='quick'), 32),
          'large': ('DINOv2 ViT-S/14 at 224 px',
                    dict(name='reference', backbone='dinov2_vits14', weights='random', precision='auto'), 224)}

WORKER = '''
import json, sys, time
from dinocls.inference import ProductionModel
folder, way, most, pictures = sys.argv[1:]
model = ProductionModel(folder)
if way == 'predict':
    pictures = [bytes.fromhex(p) for p in open(pictures).read().split()]
    print('ready', flush=True)
    for line in sys.stdin:
        times, until = [], time.perf_counter() + float(line)
        while (began := time.perf_counter()) < until:
            model.predict(pictures[len(times) % len(pictures)])
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)
else:
    from dinocls.app.service import serve
    serve(model, port=0, page=False, max_batch=int(most), timeout=120)
'''


def pictures(side: int, n: int = 64) -> list[bytes]:
    "Return picture files such as clients have them: PNG if they are small, else JPEG."
    from PIL import Image
    rng, made = np.random.default_rng(0), []
    for _ in range(n):
        noise = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        image = noise.resize((side, side), Image.Resampling.BICUBIC)
        image.save(file := io.BytesIO(), 'PNG' if side < 100 else 'JPEG', quality=90)
        made.append(file.getvalue())
    return made


def save(folder: Path, side: int, name: str, **changes) -> Path:
    "Write a production folder of an untrained head on the backbone."
    from dinocls.kit import config
    from dinocls.inference import save_production
    from dinocls.model import classifier
    cfg = config.preset(name, **changes)
    return save_production(folder, classifier(cfg, 10).eval(), cfg, [str(i) for i in range(10)], {},
                           native=(side, side))


def threads() -> int:
    "Return how many threads a model gets: the clients need a core too."
    from dinocls.kit.machine import cores
    return max(1, cores() - 1)


def start(folder: Path, way: str, file: Path) -> tuple:  # process, port or 0
    "Start a service, or a process that calls `predict`, and wait until it is ready."
    process = subprocess.Popen([sys.executable, '-c', WORKER, str(folder), way, str(WAYS.get(way, 0)), str(file)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {'OMP_NUM_THREADS': str(threads())})
    line = process.stdout.readline()
    return process, int(line.split()[0].rsplit(':', 1)[1]) if way in WAYS else 0


async def client(port: int, files, until: float, times: list):
    "Ask for one picture after the other over one connection."
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    for data in files:
        if (began := time.perf_counter()) > until: break
        writer.write(b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n'
                     b'Content-Length: %d\r\n\r\n' % len(data) + data)
        top = (await reader.readuntil(b'\r\n\r\n')).lower()
        await reader.readexactly(int(top.partition(b'content-length:')[2].split()[0]))
        assert top.startswith(b'http/1.1 200'), top
        times.append(time.perf_counter() - began)
    writer.close()


async def load(port: int, files: list, clients: int, seconds: float) -> tuple[float, float]:  # answers/s, p99 in ms
    "Let clients ask for some seconds."
    times, began = [], time.perf_counter()
    await asyncio.gather(*(client(port, itertools.islice(itertools.cycle(files), i, None), began + seconds, times)
                           for i in range(clients)))
    return len(times) / (time.perf_counter() - began), 1000 * float(np.percentile(times, 99))


def measure(kind: str, seconds: float, rounds: int) -> dict:
    "Return rates and latencies: (way, clients) → one (answers/s, p99) a round; `predict` for the bare calls."
    title, changes, side = MODELS[kind]
    found, files = {}, pictures(side)
    with tempfile.TemporaryDirectory() as place:
        folder, listed = save(Path(place)/'production', side, **changes), Path(place)/'pictures.txt'
        listed.write_text('\n'.join(f.hex() for f in files))
        workers = {way: start(folder, way, listed) for way in (*WAYS, 'predict')}
        try:
            def bare():
                workers['predict'][0].stdin.write(f'{seconds}\n')
                workers['predict'][0].stdin.flush()
                times = json.loads(workers['predict'][0].stdout.readline())
                return len(times) / sum(times), 1000 * float(np.percentile(times, 99))
            for way in WAYS: asyncio.run(load(workers[way][1], files, 4, seconds / 2))  # warm
            bare()
            for _ in range(rounds):
                found.setdefault('predict', []).append(bare())
                for n in CLIENTS:
                    for way in WAYS:
                        found.setdefault((way, n), []).append(asyncio.run(load(workers[way][1], files, n, seconds)))
        finally:
            for process, _ in workers.values(): process.kill(), process.wait()
    return found


@contextlib.contextmanager
def command(folder: Path, kind: str):
    "Run the service as a user does; yield its port."
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'RAY_ADDRESS')}
    process = subprocess.Popen([Path(sys.executable).with_name('dinocls'), 'serve', folder, '--port', '0', '--no-page',
                                '--backend', 'torch', '--limit', 'timeout=120', *KINDS[kind]], text=True,
                               stdout=subprocess.PIPE, env=env | {'OMP_NUM_THREADS': '1'} if kind == 'one thread' else env)
    try:
        yield next(int(line.split()[0].rsplit(':', 1)[1]) for line in process.stdout if ' answers;' in line)
    finally:
        process.terminate()
        process.communicate()


def measure_replicas(kind: str, seconds: float, rounds: int) -> dict:
    "Return rates and latencies: (what serves, clients) → one (answers/s, p99) a round."
    _, changes, side = MODELS[kind]
    found, files = {}, pictures(side)
    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place)/'production', side, **changes)
        for _, what in itertools.product(range(rounds), KINDS):
            with command(folder, what) as port:
                asyncio.run(load(port, files, 8, seconds / 2))  # warm
                for n in CLIENTS[::2] + CLIENTS[-1:]:
                    found.setdefault((what, n), []).append(asyncio.run(load(port, files, n, seconds)))
    return found


def table_replicas(kind: str, found: dict) -> str:
    "Return the report on a model that several processes hold."
    lines = [f'## {MODELS[kind][0]}', '', 'Each in turn, begun anew in each round.', '',
             f'| clients | {", answers/s | ".join(KINDS)}, answers/s | two replicas to one process | to one thread '
             f'| {", p99 (ms) | ".join(KINDS)}, p99 (ms) |', f'|{"---|" * 9}']
    for n in sorted({n for _, n in found}):
        rates = {what: [rate for rate, _ in found[what, n]] for what in KINDS}
        over = {what: [a / b for a, b in zip(rates['two replicas'], rates[what])] for what in KINDS}
        ratio = lambda what: f'**{median(over[what]):.2f}** ({min(over[what]):.2f} – {max(over[what]):.2f})'
        lines.append(f'| {n} | {" | ".join(number(median(rates[what])) for what in KINDS)} | {ratio("one process")} '
                     f'| {ratio("one thread")} '
                     f'| {" | ".join(f"{median(late for _, late in found[what, n]):,.0f}" for what in KINDS)} |')
    return '\n'.join(lines)


def number(v: float) -> str: return f'{v:,.0f}' if v >= 20 else f'{v:.1f}'


def table(kind: str, found: dict) -> str:
    "Return the report on a model."
    rates = lambda key: [rate for rate, _ in found[key]]
    p99 = lambda key: median(late for _, late in found[key])
    bare = f'{number(median(rates("predict")))} answers/s, p99 {p99("predict"):,.0f} ms'
    lines = [f'## {MODELS[kind][0]}', '',
             f'Bare calls of `predict`, one after the other, without a service: {bare}.', '',
             '| clients | batches, answers/s | one by one, answers/s | times as many | times as many as bare calls '
             '| batches, p99 (ms) | one by one, p99 (ms) |', '|---|---|---|---|---|---|---|']
    for n in CLIENTS:
        a, b = ('batches', n), ('one by one', n)
        over, bare = ([x / y for x, y in zip(rates(a), other)] for other in (rates(b), rates('predict')))
        lines.append(f'| {n} | {number(median(rates(a)))} | {number(median(rates(b)))} '
                     f'| **{median(over):.2f}** ({min(over):.2f} – {max(over):.2f}) | {median(bare):.2f} '
                     f'| {p99(a):,.0f} | {p99(b):,.0f} |')
    return '\n'.join(lines)


def main():
    "Measure, print, and write the report."
    from dinocls.kit import config, machine
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('what', nargs='?', choices=['batches', 'replicas'], default='batches')
    parser.add_argument('--model', choices=MODELS, action='append')
    parser.add_argument('--seconds', type=float, default=4.0)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--no-write', action='store_true')
    given = parser.parse_args()
    from dinocls.model import device, precision
    parts = []
    for kind in given.model or MODELS:
        tell, ask = (table, measure) if given.what == 'batches' else (table_replicas, measure_replicas)
        parts.append(tell(kind, ask(kind, given.seconds, given.rounds)))
        cfg = config.preset(**MODELS[kind][1])
        parts[-1] = parts[-1].replace('\n\n', f'\n\n{precision(cfg, device(cfg))} on {device(cfg)}. ', 1)
        print(parts[-1], flush=True)
    found, versions = machine.hardware(), machine.versions()
    where = f'{found["cpu"]}, {found["cores"]} cores{", " + found["gpu"] if "gpu" in found else ""}'
    rounds = f'{given.rounds} rounds of {given.seconds:g} s each. Medians over the rounds; ratios are taken within a round, their range in brackets.'
    first, _, second = (file := Path(__file__).with_suffix('.md')).read_text(encoding='utf-8').partition(SECOND)
    text = '\n\n'.join(parts) + '\n'
    if given.what == 'replicas':
        second = ('\n`python benchmarks/service.py replicas`: '
                  f'{where}, torch {versions["torch"]}, Ray {metadata.version("ray")}; {rounds} `dinocls serve` by itself has a thread for each core, each of two replicas '
                  f'its share of them. Each has the machine to itself, but for the clients, which are a process on it, too; each waits for its answer before it asks again.\n\n') + text
    head = ['# The service under load', '',
            f'`python benchmarks/service.py`: {where}, torch {versions["torch"]}, '
            f'{threads()} thread{"s" * (threads() > 1)} for the model; '
            f'{rounds} Both services are the same code, but for the largest batch: 32 and 1. The '
            'clients are a process on the same machine, and each waits for its answer before it asks again. Batches '
            'save what a call costs beside the arithmetic: much where the model is small, nothing where one picture '
            'already keeps the processor busy.', '']
    if given.what == 'batches': first = '\n'.join(head) + '\n' + text
    if not given.no_write: file.write_text(first + SECOND * bool(second) + second, encoding='utf-8')


if __name__ == '__main__': main()
