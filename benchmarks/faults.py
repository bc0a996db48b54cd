"""Does training end in the same weights if it is killed 25 times, and checkpoints rot meanwhile? What memory do large
folders of pictures take?

    .venv/bin/python benchmarks/faults.py [kills] [phase2_epochs]     writes benchmarks/faults.md; about 6 minutes on 2 cores
    .venv/bin/python benchmarks/faults.py folders     writes its last part anew; some GB of disk

`dinocls stage phase2 -p smoke` is killed by SIGKILL at random moments and started again until it ends: five times of six after it has written a
checkpoint, else while it starts. If it ends before all kills are done, another round begins with another seed. After every fifth kill a random bit of the newest
checkpoint is flipped. Each round's weights and history are compared with those of a run of the same seed that nobody disturbed.
"""
import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image

from dinocls.kit import config, files, machine
from dinocls.kit.training import load_checkpoint, save_checkpoint
from dinocls.data import Loader
from dinocls.model import classifier
from dinocls.train import Divided, start, train_epoch

# minutes between checkpoints; seconds within which a kill comes
COMMAND, MINUTES, SPAN = str(Path(sys.executable).with_name('dinocls')), 0.01, 3.0
STEPS = 4  # an epoch of the preset smoke: 200 images in batches of 50


def begin(folder: Path, seed: int, epochs: int, stage: str = 'phase2'):
    "Start the training in a run folder; it tells its progress in a file, and what it says in a log."
    (progress := folder.with_suffix('.progress')).unlink(missing_ok=True)
    fields = [f'seed={seed}', 'device=cpu', f'phase2_epochs={epochs}', f'checkpoint_minutes={MINUTES}']
    env = {k: v for k, v in os.environ.items() if not k.startswith('DINOCLS_')} | {'OMP_NUM_THREADS': '1',
        'PYTHONUNBUFFERED': '1', 'DINOCLS_PROGRESS': str(progress)}
    with open(folder.with_suffix('.log'), 'a') as log:
        return subprocess.Popen([COMMAND, 'stage', stage, '-p', 'smoke', *(a for f in fields for a in ('-s', f)),
                                 '--out', str(folder)], env=env, stdout=log, stderr=log)


def said(folder: Path) -> str: return folder.with_suffix('.log').read_text()


def written(folder: Path) -> list[Path]:
    "Return the checkpoints, the newest first."
    return sorted((folder/'stages').glob('phase*.partial/checkpoint-*.pt'), reverse=True)


def sound(folder: Path) -> list[Path]:
    "Return the checkpoints whose content is that of their names, the newest first."
    return [c for c in written(folder) if files.file_digest(c).startswith(c.stem.rpartition('-')[2])]


def place(checkpoint: Path) -> tuple[str, int, int]:  # stage, epochs done, steps of the next one done
    "Read off a checkpoint's name where it was written."
    stage, epoch, step = re.fullmatch(r'checkpoint-(\w+)-(\d+)-(\d+)-\w+\.pt', checkpoint.name).groups()
    return stage, int(epoch), int(step)


def flip_bit(file: Path, chance: random.Random):
    "Flip a random bit of a file."
    with open(file, 'r+b') as f:
        f.seek(at := chance.randrange(file.stat().st_size))
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << chance.randrange(8)]))


def kill(process, folder: Path, chance: random.Random, start_up: float) -> dict | None:  # None: it ended before
    "Kill the training at a random moment; return where it was."
    progress, clock, before = folder.with_suffix('.progress'), time.perf_counter(), {*written(folder)}
    early, delay = chance.random() < 1 / 6, chance.random()
    if not early:
        while {*written(folder)} <= before and process.poll() is None: time.sleep(0.01)
    try: process.wait(delay * (start_up if early else SPAN))
    except subprocess.TimeoutExpired: process.kill(), process.wait()
    if process.returncode >= 0: return None
    seconds, at, found = time.perf_counter() - clock, files.read_json(progress) if progress.exists() else {}, sound(folder)
    newest = place(found[0]) if found else None
    # no progress is told before the first epoch that is completed after a start
    begun = newest[1] if newest and newest[0] == at.get('stage') else 0
    return {'seconds': seconds, 'stage': at.get('stage', ''), 'done': max(begun, at.get('done', 0)), 'newest': newest}


def result(folder: Path) -> dict:
    "Return the digests of the weights of both phases, and their histories but for the seconds."
    stages = {name: next((folder/'stages').glob(f'{name}-*/run.json')).parent for name in ('phase1', 'phase2')}
    history = lambda stage: [{k: v for k, v in row.items() if k != 'seconds'}
                             for row in files.read_json(stage/'result.json')['history']]
    return {name: (files.file_digest(stage/'weights.safetensors'), history(stage)) for name, stage in stages.items()}


def undisturbed(folder: Path, seed: int, epochs: int) -> tuple[float, float]:
    "Train without interruption; return the seconds until the first stage computed, and those of all."
    clock, process, progress = time.perf_counter(), begin(folder, seed, epochs), folder.with_suffix('.progress')
    while not progress.exists() and process.poll() is None: time.sleep(0.01)
    start_up = time.perf_counter() - clock
    if process.wait(): raise SystemExit(f'The undisturbed run failed:\n{said(folder)}')
    return start_up, time.perf_counter() - clock


def disturbed(folder: Path, seed: int, epochs: int, kills: int, before: int, start_up: float) -> list[dict]:
    "Train in spite of at most `kills` kills, `before` of which were done in earlier rounds; return what happened at each."
    events, chance = [], random.Random(seed)
    # it takes seconds and has no checkpoint: the kills are meant for the training
    begin(folder, seed, epochs, 'splits').wait()
    while len(events) < kills:
        event = kill(begin(folder, seed, epochs), folder, chance, start_up)
        if not event: break
        found = sound(folder)
        event['flipped'] = (before + len(events) + 1) % 5 == 0 and bool(found)
        if event['flipped']: flip_bit(found[0], chance)
        event['intact'] = place(rest[0]) if (rest := sound(folder)) else None
        events.append(event)
        print(f'seed {seed}, kill {before + len(events)}: {event}', flush=True)
    if begin(folder, seed, epochs).wait() == 0: return events
    raise SystemExit(f'The run with seed {seed} cannot be brought to its end:\n{said(folder)[-2000:]}')


def cost(name: str, folder: Path, **fields) -> dict:
    "Return the MB of a checkpoint of phase 2, and the seconds that writing and reading one take."
    cfg = config.preset('smoke', backbone=name, batch_size=2, device='cpu', precision='fp32', **fields)
    loop = start(classifier(cfg, 10), cfg, 1, 4, 1e-5, 1e-4)
    source = Loader(np.zeros((2, 32, 32, 3), np.uint8), np.arange(2), 2, 0)
    train_epoch(loop, Divided(loop.model, loop.accelerator), source)
    loop.best = {'chosen': 0.0, 'accuracy': 0.0, 'epoch': 0, 'weights': loop.model.state_dict()}
    times = {'write': [], 'read': []}
    for _ in range(5):
        loop.step += 1  # of two checkpoints of one step, the one just written might be taken for the older
        for what, f in (('write', save_checkpoint), ('read', load_checkpoint)):
            clock = time.perf_counter()
            made = f(loop, folder, name)
            times[what].append(time.perf_counter() - clock)
            if what == 'write': file = made
    return {'mb': file.stat().st_size / 1e6, **{what: median(t) for what, t in times.items()}}


def row(number: int, event: dict) -> str:
    "Return the row of a kill."
    where = lambda p: f'{p[0]}, epoch {p[1] + 1}, after step {p[2]}' if p else 'the beginning'
    stage, done, trains = event['stage'], event['done'], event['stage'].startswith('phase')
    same = event['intact'] and event['intact'][0] == stage
    again = max(0, STEPS * done - (STEPS * event['intact'][1] + event['intact'][2] if same else 0)) if trains else 0
    return (f'| {number} | {event["seed"]} | {event["seconds"]:.1f} | {f"{stage}, epoch {done + 1}" if trains else stage or "starting"} | {where(event["newest"])} | {"yes" if event["flipped"] else ""} '
            f'| {where(event["intact"])} | {f"{again} to {again + STEPS - 1}" if trains else 0} |')


# --- large folders

FOLDERS = '## Large folders of pictures'
# pictures, their size, GiB they may take, stage, what differs from the preset quick
SETS = ((1000, (4000, 3000), 4, 'phase2', 'train_size=600 val_size=200 test_size=199 phase1_epochs=3 phase2_epochs=3'),
        (50_000, (500, 375), 6, 'look_alikes', 'image_size=112 train_size=0 val_size=5000 test_size=5000'),
        (50_000, (500, 375), 6, 'phase1', 'image_size=112 train_size=2000 val_size=500 test_size=500 phase1_epochs=1 '
                                          'backbone=dinov2_vits14 weights=random'))


def photographs(folder: Path, n: int, size: tuple):
    "Write n JPEG files, of ten classes: ten scenes in other light, no two alike; the last is cut short."
    chance = np.random.default_rng(0)
    scenes = [Image.fromarray(chance.integers(0, 256, (30, 40, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
              for _ in range(10)]
    for i in range(n):
        (place := folder/f'class{i % 10}').mkdir(parents=True, exist_ok=True)
        light = [np.clip(np.arange(256) * chance.uniform(0.5, 1.5) + chance.uniform(-20, 20), 0, 255) for _ in range(3)]
        scenes[i % 10].point(np.concatenate(light).astype(int).tolist()).save(place/f'{i}.jpg', quality=85)
    os.truncate(place/f'{n - 1}.jpg', 5000)


def memory(process) -> np.ndarray:  # bytes: of its own, and with the files that are mapped
    "Return what a process and those that it started hold in memory."
    found = np.zeros(2)
    with contextlib.suppress(psutil.Error):
        for p in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error): found += ((m := p.memory_info()).rss - m.shared, m.rss)
    return found


@contextlib.contextmanager
def watched(pid: int):
    "Yield what will be, after the block, the peak of `memory` while it ran."
    process, peak, ended = psutil.Process(pid), np.zeros(2), threading.Event()
    def watch():
        while not ended.wait(0.05):
            with contextlib.suppress(psutil.Error):  # one has just ended
                try: np.maximum(peak, memory(process), out=peak)
                except OSError: peak[:] = np.nan  # no file can be opened: what it takes is not known
    (thread := threading.Thread(target=watch)).start()
    try: yield peak
    finally:
        ended.set()
        thread.join()


def folders(out: Path):
    "Run stages on large folders of pictures, and write what memory they take into the report."
    rows, made, holds = [], {}, True
    with tempfile.TemporaryDirectory() as tmp:
        env = {k: v for k, v in os.environ.items() if not k.startswith('DINOCLS_')} | {'DINOCLS_DATA': f'{tmp}/data'}
        for number, (n, size, most, stage, fields) in enumerate(SETS):
            if size not in made: photographs(made.setdefault(size, Path(tmp)/f'{size[0]}'), n, size)
            fields = f'data_root={made[size]} dataset=imagefolder on_broken=skip {fields}'
            given = [a for f in fields.split() for a in ('-s', f)]
            process = subprocess.Popen([COMMAND, 'stage', stage, '-p', 'quick', *given, '--out', f'{tmp}/run-{number}'],
                                       env=env)
            with watched(process.pid) as peak: status = process.wait()
            if status: raise SystemExit('The stage failed.')
            own, mapped = peak / 2**30
            kept = max(f.stat().st_size for f in Path(tmp, 'data').rglob('*.rgb')) / 2**30
            holds &= own < most
            rows.append(f'| {n:,} of {size[0]}×{size[1]} | `{stage}` | `{fields.partition(" ")[2]}` | {most} | **{own:.2f}** '
                        f'| {mapped:.2f} | {kept:.2f} |')
            print(rows[-1], flush=True)
    h, v = machine.hardware(), machine.versions()
    lines = [FOLDERS, '', f'`python benchmarks/faults.py folders`: {h["cpu"]}, {h["cores"]} cores, torch {v["torch"]}. '
             'JPEG files in folders of ten classes, one of which is cut short, are decoded into a file that is mapped into '
             'memory; what the system keeps of that there it can take back, and the processes\' own memory is what must '
             'fit. GiB, the peak of all processes together.', '',
             '| pictures | stage | what differs from the preset quick | may take | takes | with the mapped file | size of that file |',
             '|---|---|---|---|---|---|---|', *rows]
    before = out.read_text(encoding='utf-8').partition(FOLDERS)[0].rstrip()
    with files.replacing(out) as file: file.write_text('\n'.join([before, '', *lines]) + '\n', encoding='utf-8')
    if not holds: raise SystemExit('More than they may take.')


def main(kills: int, epochs: int, out: Path):
    torch.set_num_threads(1)
    clock, rounds, events = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory() as tmp:
        while len(events) < kills:
            seed = 1 + len(rounds)
            start_up, seconds = undisturbed(whole := Path(tmp)/f'whole-{seed}', seed, epochs)
            found = disturbed(folder := Path(tmp)/f'killed-{seed}', seed, epochs, kills - len(events), len(events),
                              start_up)
            events += [e | {'seed': seed} for e in found]
            rounds.append({'seed': seed, 'kills': len(found), 'flips': sum(e['flipped'] for e in found),
                           'noted': said(folder).count('is damaged'), 'seconds': seconds, 'whole': result(whole),
                           'killed': result(folder)})
            if len(rounds) > kills: raise SystemExit('The training ends before it can be killed: give it more epochs.')
        costs = {name: cost(name, Path(tmp)/name, **fields)
                 for name, fields in {'book-digits': {},
                                      'dinov2_vits14': {'weights': 'random', 'image_size': 224}}.items()}
    lines = report(rounds, events, costs, epochs, time.perf_counter() - clock)
    _, found, kept = out.read_text(encoding='utf-8').partition(FOLDERS) if out.exists() else ('', '', '')
    with files.replacing(out) as file:
        file.write_text('\n'.join([*lines, '', found + kept]).rstrip() + '\n', encoding='utf-8')
    print('\n'.join(lines))
    if not all(r['whole'] == r['killed'] for r in rounds):
        raise SystemExit('Not all weights and histories are identical.')


def report(rounds: list, events: list, costs: dict, epochs: int, seconds: float) -> list[str]:
    "Return the lines of the report."
    h, v = machine.hardware(), machine.versions()
    same = lambda r, name, part: 'identical' if r['whole'][name][part] == r['killed'][name][part] else '**different**'
    flips = [e for e in events if e['flipped']]
    lines = ['# Training that is killed again and again', '',
             f'{h["cpu"]}, {h["memory_gb"]} GB; Python {v["python"]}, torch {v["torch"]}. `dinocls stage phase2 -p smoke` on a CPU, one thread, {epochs} epochs of phase 2 with {STEPS} steps each, a checkpoint every {60 * MINUTES:g} s and every 5 epochs; '
             f'{len(events)} kills, {len(flips)} flipped bits. It took {seconds / 60:.0f} minutes.', '',
             '| seed | kills | bits flipped | "is damaged" noted | undisturbed run (s) | weights of phase 1 | weights of phase 2 | SHA-256 of phase 2, undisturbed | killed | histories |', '|---|---|---|---|---|---|---|---|---|---|']
    for r in rounds:
        digests = [f'`{r[k]["phase2"][0][:16]}`' for k in ('whole', 'killed')]
        both = 'identical' if all(same(r, name, 1) == 'identical' for name in ('phase1', 'phase2')) else '**different**'
        lines.append(f'| {r["seed"]} | {r["kills"]} | {r["flips"]} | {r["noted"]} | {r["seconds"]:.0f} | {same(r, "phase1", 0)} | {same(r, "phase2", 0)} | {" | ".join(digests)} | {both} |')
    lines += ['', 'The checkpoint is the newest one when the process was killed; where a bit of it was flipped, training goes on from the one before. Progress is told once an epoch, so the steps that are done again are known up to an epoch.', '',
              '| kill | seed | after (s) | killed in | newest checkpoint | a bit flipped | goes on from | steps done again |', '|---|---|---|---|---|---|---|---|', *(row(i + 1, e) for i, e in enumerate(events)), '',
              'What a checkpoint of phase 2 costs (weights, averaged weights, best weights, both moments of AdamW; with its checksum):', '', '| backbone | MB | writing (s) | reading (s) | of the time, at one every 10 minutes |', '|---|---|---|---|---|',
              *(f'| {name} | {c["mb"]:.0f} | {c["write"]:.2f} | {c["read"]:.2f} | {100 * c["write"] / 600:.3f} % |'
                for name, c in costs.items())]
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kills', nargs='?', default='25', help='or folders')
    parser.add_argument('epochs', nargs='?', type=int, default=100, help='of phase 2')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    if args.kills == 'folders': folders(args.out)
    else: main(int(args.kills), args.epochs, args.out)
