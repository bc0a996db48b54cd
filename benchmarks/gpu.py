"""A quarter of an hour of a GPU, without a network and with few bytes to carry, in three commands: ViT-B/14's speeds, `book-cifar`, the book on CIFAR-10.

    python benchmarks/gpu.py prepare [--studies FOLDER] [--resume FOLDER]    where there is a network: fills .gpu/ and says what to carry with which command
    python3 benchmarks/gpu.py speed     checks everything at tiny size; ViT-B/14 at 224: share of the measured peak, beside a tutorial's loop and timm's step
    python3 benchmarks/gpu.py pretrain  CIFAR-10 from its parts; `book-cifar` pre-trained on the training images for as long as there is time; probed
    python3 benchmarks/gpu.py book      the book under `cifar`, the chapters that matter most first

The folders of .gpu/ are carried one with a command, so that checkout and folder stay within 64 MiB; each command puts what has come outside of the checkout
(--work), where it stays. Whatever happened, what is worth keeping is in --out when the minutes are over, and `--resume` goes on from it on another day: what is
there is not done again. Afterwards `cat home-*.tgz | tar xzf - -C outputs` unpacks it. --tiny tries all of it on any machine in minutes.
"""
import argparse
import contextlib
import gc
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT, MIB = Path(__file__).resolve().parents[1], 2**20
OUT, LOG, STOCK = ROOT/'outputs', ROOT/'outputs'/'log.txt', '.gpu'
CARRIED, PIECE, HOME, LARGEST, RECORD = 64 * MIB, 15 * MIB, 45 * MIB, 500_000, 20_000_000  # bytes: of a command, of a file that comes home, of all that does, of a file and all files of a run's record
START, TRANSFER, LAST, STOPPING = 120, 30, 15, 30  # seconds: until a machine is there; around a command; kept for packing; that a process has to stop
MINUTES = {'speed': 2.5, 'pretrain': 4, 'book': 5}
CHUNK, ROW, IMAGES, TRAINED = 2000, 50, 60_000, 45_000  # images of a file, in a row of its mosaic, of CIFAR-10, of the training split
LEFT_OUT = ('stages', 'html', 'production', 'index.html')  # of a run folder: caches, copies and weights
FIRST, THEN = '5-8,10,12,14', '0-4,9,11,13,15,A1,A2'  # chapters
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_27_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64', 'manylinux1_x86_64')
LARGE = {'model': 'dinov2_vitb14', 'side': 224, 'squares': (4096, 8192, 16384), 'sizes': (64, 256, 1024), 'presets': {'reference': 64, 'best': 256}, 'compile': True, 'lead': 2, 'steps': 6, 'rounds': 2,
         'seconds': 0.5, 'cifar': {}, 'most': {'pretrain_epochs': 1000, 'phase2_epochs': 60}}
TINY = {'model': 'book-digits', 'side': 32, 'squares': (64, 128), 'sizes': (2, 4), 'presets': {'reference': 2, 'best': 4}, 'compile': False, 'lead': 1, 'steps': 1, 'rounds': 1, 'seconds': 0.01,
        'cifar': dict(train_size=400, val_size=100, test_size=200, batch_size=50, phase1_epochs=1, members=2, study_seeds=2, study_size=100, attention_images=20, corruption_images=12, benchmark_seconds=0.1,
                      pretrain_batch=50, backbone='book-digits', lr_grid='((1e-4, 1e-2), (1e-2,))'), 'most': {'pretrain_epochs': 3, 'phase2_epochs': 2}}


# Here, where there is a network
def to_mosaic(images): return images.reshape(-1, ROW, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32 * ROW, 3)
def of_mosaic(mosaic): return mosaic.reshape(-1, 32, ROW, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def share_out(files: list, room: int) -> list[list]:  # (path, bytes)
    "Divide files among as few folders as hold them in their order."
    folders, used = [[]], 0
    for f, size in files:
        if size > room: sys.exit(f'{f.name} takes {size / MIB:.1f} MiB and there is room for {room / MIB:.1f} beside the checkout: leave more out of it.')
        if used + size > room: folders.append([]); used = 0
        folders[-1].append(f)
        used += size
    return folders


def commands(folders: int, given: str = '') -> list[tuple]:  # command, its folder, seconds
    "Return what to run, so that the last folder is there for `pretrain` and that all of it, a machine's start and transfers included, takes 15 minutes."
    more = max(0, folders - 2)  # folders that neither of the first two commands can carry
    pretrain = 900 - START - (3 + more) * TRANSFER - 60 * (MINUTES['speed'] + MINUTES['book'])
    first = [60 * MINUTES['speed'] * (1 - 0.2 * more), *[60 * MINUTES['speed'] * 0.2] * more]
    return [*(('speed', i + 1, s) for i, s in enumerate(first)), ('pretrain', len(first) + 1 if folders > 1 else 0, pretrain), ('book', 0, 60 * MINUTES['book'])]


def prepare(args):
    "Fill the folders that travel, and say what to do with them."
    import numpy as np
    from PIL import Image
    from dinocls.data import load_dataset
    from dinocls.errors import JUDGES
    stock = ROOT/STOCK
    shutil.rmtree(stock, ignore_errors=True)
    (fresh := stock/'all').mkdir(parents=True)
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', args.python, '--implementation', 'cp',
                    *(word for p in PLATFORMS for word in ('--platform', p)), '-d', fresh, '-r', ROOT/'benchmarks'/'wheels.txt'], check=True)
    data = load_dataset('cifar10')
    np.save(fresh/'labels.npy', data.labels.astype(np.uint8))
    for name, _ in JUDGES.values():
        if args.studies and (args.studies/name).is_file(): shutil.copyfile(args.studies/name, fresh/name)
    for i in range(0, IMAGES, CHUNK): Image.fromarray(to_mosaic(data.images[i:i + CHUNK])).save(fresh/f'images-{i // CHUNK:02d}.webp', lossless=True, quality=100, method=4)
    if args.resume: shutil.copytree(args.resume, fresh, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if not n.startswith('home-')])
    checkout = sum(os.lstat(ROOT/f).st_size for f in subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0') if f and (ROOT/f).exists())
    files = sorted(fresh.iterdir(), key=lambda f: (f.suffix in ('.webp', '.tgz'), f.suffix == '.tgz', f.name))  # wheels and labels go first, what came home last
    for i, folder in enumerate(folders := share_out([(f, f.stat().st_size) for f in files], CARRIED - MIB - checkout), 1):
        (stock/f'{i}').mkdir()
        for f in folder: f.rename(stock/f'{i}'/f.name)
    fresh.rmdir()
    print(f'The checkout takes {checkout / MIB:.1f} MiB. In this order, where OUT is the folder that comes home ({sum(c[2] for c in commands(len(folders))) / 60:.1f} minutes of 15, the rest is for the start and the transfers):')
    for command, folder, seconds in commands(len(folders)):
        size = checkout + sum(f.stat().st_size for f in (stock/f'{folder}').glob('*')) if folder else checkout
        carried = f'carry {STOCK}/{folder}' if folder else 'carry nothing'
        left = '' if command == 'speed' else '   (or --left SECONDS of the quarter of an hour instead of --minutes)'
        print(f'  {carried} ({size / MIB:.1f} MiB):   python3 benchmarks/gpu.py {command} --minutes {seconds / 60:.3g} --out "$OUT"{left}')


# There: each command goes on in a copy of the checkout, with what was carried until then
def settle(args, until: float):
    "Put what was carried aside, and start this command again in a copy of the checkout, where wheels, data and results stay from one command to the next."
    parts, book, site = (args.work/name for name in ('parts', 'book', 'site'))
    for folder in [*(f for f in (ROOT/STOCK).glob('*') if f.is_dir()), *filter(None, [args.resume])]: shutil.copytree(folder, parts, dirs_exist_ok=True)
    shutil.copytree(ROOT, book, ignore=lambda _, names: [n for n in names if n.startswith('.') or n in ('outputs', '__pycache__')], dirs_exist_ok=True)
    (book/'outputs').mkdir(exist_ok=True)
    if (wheels := sorted(parts.glob('*.whl'))) and not site.exists():
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--no-cache-dir', '--target', f'{site}.partial', *wheels], check=True)
        Path(f'{site}.partial').rename(site)
    pieces = sorted(parts.glob('home-*.tgz'))
    if pieces and len(pieces) == int(pieces[0].stem.rpartition('-')[2]) and not (args.work/'resumed').exists(): unpack(pieces, book/'outputs'); (args.work/'resumed').touch()
    before = lambda name: list(filter(None, [os.environ.get(name)]))
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(book), *[str(site)] * site.exists(), *before('PYTHONPATH')]), 'JUPYTER_PATH': os.pathsep.join([str(site/'share'/'jupyter'), *before('JUPYTER_PATH')]),
                                'DINOCLS_DATA': str(args.work/'data'), 'DINOCLS_HOME': str(book), 'TORCHINDUCTOR_CACHE_DIR': str(args.work/'compiled'), 'PYTHONUNBUFFERED': '1', 'PYTHONWARNINGS': 'ignore'}
    os.chdir(book)
    os.execve(sys.executable, [sys.executable, str(book/'benchmarks'/'gpu.py'), *sys.argv[1:], '--until', str(until)], environment)


def say(text: str):
    "Print a line, and note it in the log."
    print(text, flush=True)
    with open(LOG, 'a') as log: print(text, file=log)


def child(words: list, until: float) -> int | None:
    "Run a Python command, its output into the log; ask it to stop when the time is over. Return the status, None if it was stopped."
    with open(LOG, 'a') as log: process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try: return process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired: return None
    finally: end(process)


def end(process):
    "Ask a process to stop, and whatever is left of its group after a while."
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Speeds: all parts in one process that writes each as it ends
def case(size: dict, batch: int, **more) -> dict:
    "Return a case of `train.py`."
    from dinocls import core
    return {**{k: size[k] for k in ('model', 'side', 'lead', 'steps', 'rounds')}, 'batch': batch, 'options': False, 'threads': core.cores(), **more}


def seconds(f, at_least: float) -> float:
    "Return the median seconds of a call, once the GPU is done."
    from torch.utils.benchmark import Timer
    return Timer('f()', globals={'f': f}).blocked_autorange(min_run_time=at_least).median


def gflop(model: str, side: int) -> float:
    "Return the GFLOP of an image forward through a transformer: its products of matrices, a multiplication and an addition each."
    from dinocls.model import BACKBONES
    spec = BACKBONES[model]
    tokens, dim = (side // spec.patch) ** 2 + 1 + spec.registers, spec.dim
    return (spec.depth * (24 * tokens * dim ** 2 + 4 * tokens ** 2 * dim) + 6 * side ** 2 * dim) / 1e9


def emptied():
    "Give back what is left of the step before, and count the peak of memory anew."
    import torch
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()


def check(size) -> dict:
    "Try what the commands to come need: a chapter by papermill, and both trainings of the small backbone, timed."
    chapter = subprocess.Popen([sys.executable, '-m', 'dinocls', 'run', '--preset', 'smoke', '--chapters', '5', '--out', OUT/'check'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    import cleanlab, lightly  # noqa: F401
    found = epochs(size)
    said, _ = chapter.communicate()
    return found | {'chapter': 'passes' if chapter.returncode == 0 else said.strip().splitlines()[-2:]}


def epochs(size, steps: int = 16) -> dict:
    "Time epochs of pre-training and of phase 2 on some random images; return the seconds of one on the training split, and those before it."
    import numpy as np
    import torch
    from dinocls import core
    from dinocls.data import on_device
    from dinocls.model import classifier, device
    from dinocls.pretrain import self_supervise
    from dinocls.train import fit
    cfg = core.preset('cifar', **size['cifar'] | {'weights': 'random', 'pretrain_epochs': 4})
    where, trained, found = device(cfg), cfg.train_size or TRAINED, {}
    def timed(name, batch, training):
        x, ends = np.random.default_rng(0).integers(0, 256, (steps * batch, 32, 32, 3), dtype=np.uint8), [time.perf_counter()]
        with tempfile.TemporaryDirectory() as tmp: training(x, Path(tmp), lambda *_: ends.append(time.perf_counter()))
        best = min(b - a for a, b in zip(ends[1:], ends[2:]))
        found[name] = {'epoch': best * trained / len(x), 'first': ends[1] - ends[0], 'rate': len(x) / best}
    def phase2(x, tmp, on_epoch):
        y, n = torch.arange(len(x)) % 10, max(1, len(x) * cfg.val_size // trained)
        fit(classifier(cfg, 10), (on_device(x, np.arange(len(x)), where), y.to(where)), (on_device(x, np.arange(n), where), y[:n].to(where)), cfg, epochs=3,
            lr_backbone=cfg.lr_backbone, lr_head=cfg.lr_head, folder=tmp, on_epoch=on_epoch)
    timed('pretrain_epochs', cfg.pretrain_batch, lambda x, tmp, on_epoch: self_supervise(on_device(x, np.arange(len(x)), where), cfg, tmp, on_epoch=on_epoch))
    timed('phase2_epochs', cfg.batch_size, phase2)
    return found


def peak(size) -> dict:
    "Multiply square matrices in bf16, random ones since zeros are faster."
    import torch
    from train import DEVICE
    found = {}
    for n in size['squares']:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in 'ab')
        found[n] = 2 * n ** 3 / seconds(lambda: a @ b, size['seconds']) / 1e12
    return {'tflops': found, 'peak': max(found.values())}


def inference(size, how: str = 'plain') -> dict:
    "Measure `infer`, from uint8 images of 32×32 to logits, by batch size."
    import torch
    from dinocls.model import classifier, infer, precision
    from train import CLASSES, DEVICE, config
    cfg, rows = config(case(size, 1)), []
    model = classifier(cfg, CLASSES).to(DEVICE).eval()
    if how == 'compiled': model = torch.compile(model)
    for batch in size['sizes'] if how == 'plain' else size['sizes'][1:2]:
        images = torch.randint(0, 256, (4 * batch, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
        infer(model, images, cfg, batch)
        rows.append({'how': how, 'batch': batch, 'rate': len(images) / seconds(lambda: infer(model, images, cfg, batch), size['seconds'])})
    return {'precision': precision(cfg, DEVICE), 'rows': rows}


def step(size, name: str, which: int, **more) -> dict:
    "Take steps of a recipe's phase: images a second and peak memory."
    import train
    from dinocls import core
    c = case(size, size['presets'][name], precision=core.preset(name).precision, variant='dinocls', phase=which) | more
    emptied()
    with contextlib.redirect_stdout(io.StringIO()) as told: rate = train.turn(train.ours(c), c)['rate']
    return {'preset': name, 'phase': which, 'how': c['variant'], 'precision': c['precision'], 'batch': c['batch'], 'rate': rate, 'peak_mb': core.peak_memory()['gpu' if train.GPU else 'resident'], 'fits': 'memory ran out' not in told.getvalue()}


def training(size) -> dict: return {'rows': [step(size, name, which) for name in size['presets'] for which in (2, 1)]}


def augmentation(size) -> dict:
    "Time what happens to a batch before the model sees it."
    import numpy as np
    import torch
    from dinocls.augment import augment, mix, prepare
    from dinocls.data import Loader
    from train import DEVICE, config
    rows = []
    for name, batch in size['presets'].items():
        cfg, generator = config(case(size, batch)), torch.Generator().manual_seed(0)
        x, y = next(Loader(np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8), np.zeros(batch, np.int64), batch, 0, DEVICE).epoch(0))
        last = prepare(x.float() / 255, cfg)
        rows.append({'preset': name, 'batch': batch, 'ms': 1e3 * seconds(lambda: prepare(mix(augment(x, cfg, generator), y, cfg, generator)[0], cfg, out=last), size['seconds'])})
    return {'rows': rows}


def compiled(size) -> dict:
    "Measure training and inference once more, compiled."
    if not size['compile']: return {'rows': [], 'training': []}
    return {'training': [step(size, 'best', 2, variant='compiled')], **inference(size, 'compiled')}


def beside(size, which: int) -> dict:
    "Let a tutorial's loop and timm's training step take turns with the library, at the largest batch."
    import train
    emptied()
    c = case(size, max(size['presets'].values()))
    return {'phase': which, 'case': c, 'variants': train.compare(c, which)}


def others(size) -> dict: return beside(size, 2)
def others_phase1(size) -> dict: return beside(size, 1)


PARTS = (check, peak, inference, training, augmentation, others, compiled, others_phase1)  # the most important first


def measure(args):
    "In a process of its own: measure parts, and write each as soon as it is there."
    import torch
    from dinocls import core
    size = TINY if args.tiny else LARGE
    for part in PARTS:
        if part.__name__ not in args.parts: continue
        torch.manual_seed(0)
        clock = time.perf_counter()
        try: found = part(size)
        except Exception as e: found = {'fails': f'{type(e).__name__}: {core.reason(e)}'}
        core.write_json(OUT/'speed'/f'{part.__name__}.json', {**found, 'seconds': time.perf_counter() - clock, 'hardware': core.hardware(), 'versions': core.versions()})
        emptied()


def speed(args, until: float):
    "Measure what is missing; a part that ends its process costs itself alone."
    (folder := OUT/'speed').mkdir(exist_ok=True)
    missing = lambda: [p.__name__ for p in PARTS if not (folder/f'{p.__name__}.json').exists()]
    while (todo := missing()) and time.monotonic() < until:
        status = child([__file__, 'measure', *todo, *['--tiny'] * args.tiny], until)
        if status and (left := missing()): (folder/f'{left[0]}.json').write_text(f'{{"fails": "its process ended with status {status}"}}')
    say('speed: ' + (f'left for another call: {", ".join(missing())}' if missing() else 'all is measured'))
