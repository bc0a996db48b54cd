"""A quarter of an hour of a GPU, without a network and with few bytes to carry, in three commands.

    python benchmarks/gpu.py prepare    where there is a network: fills .gpu/ and says what to carry with which command; then there:
    python3 benchmarks/gpu.py speed     tries everything at tiny size, then ViT-B/14 at 224: share of the measured peak, beside others, memory
    python3 benchmarks/gpu.py pretrain  makes CIFAR-10 of its parts, pre-trains `book-cifar` on the training images while there is time, probes it
    python3 benchmarks/gpu.py book      executes the book under `cifar`, the chapters that matter most first

Each puts what has come outside of the checkout (--work), where it stays for the next. Whatever happens, what is worth keeping is in --out when the
minutes are over; `--resume` goes on from it on another day, and what is there is not done again. --tiny tries all of it on any machine.
"""
import argparse
import contextlib
import gc
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT, MIB = Path(__file__).resolve().parents[1], 2**20


def site() -> Path:
    "Return the folder where carried wheels are installed, at the first command that brings them: the package needs some."
    named = [b for a, b in zip(sys.argv, sys.argv[1:]) if a == '--work']
    folder = Path(named[-1] if named else Path(tempfile.gettempdir())/'dinocls-gpu').expanduser().absolute()/'site'
    wheels = sorted(ROOT.glob('.gpu/[0-9]*/*.whl'))
    if __name__ == '__main__' and wheels and not folder.exists() and sys.argv[1:2] != ['prepare']:
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile',
                        '--no-cache-dir', '--target', f'{folder}.partial', *wheels], check=True)
        Path(f'{folder}.partial').rename(folder)
    return folder


SITE = site()
sys.path[:0] = [str(ROOT), *[str(SITE)] * SITE.exists()]
from dinocls.kit import config, fetch, files, machine, stage
from dinocls.kit.files import UserError

OUT, STOCK = ROOT/'outputs', '.gpu'
CARRIED, HOME, PIECE = 64 * MIB, 58 * MIB, 15 * MIB  # of a command, of all that comes home, of a file of it
LARGEST = 500_000  # bytes of a file of a run's record
START, TRANSFER, LAST = 120, 30, 15  # seconds until a machine is there, around a command, for packing
STOPPING, RESCUE, REPORT = 30, 10, 40  # seconds that a process has to stop; kept for what was stopped, for the report
MINUTES = {'speed': 3, 'pretrain': 3.5, 'book': 5}
# images of a file, of a row in it, of CIFAR-10, of its training split
CHUNK, ROW, IMAGES, TRAINED = 2000, 50, 60_000, 45_000
LEFT_OUT = ('stages', 'html', 'production', 'production-student', 'index.html')  # of a run folder: caches, copies and weights
CHAPTERS = ('5-8,10,12', '14', '9,11,0-4,13,A1,A2', '14')  # one group after the other
AHEAD = ('siblings', 'direct_logits', 'look_alikes')  # stages begun beside the chapters that will ask for them
# of the metrics
SHOWN = ('accuracy', 'member_accuracy', 'probabilities_accuracy', 'knn:frozen', 'linear:frozen', 'mean_corruption')
TRAININGS = 4  # of phase 2's length, in the first group: more, but several share the GPU
PLATFORMS = [f'manylinux{p}_x86_64' for p in ('_2_28', '_2_27', '_2_17', '2014', '1')]
LARGE = {'model': 'dinov2_vitb14', 'side': 224, 'squares': (4096, 8192, 16384), 'sizes': (64, 256, 1024),
         'presets': {'reference': 64, 'best': 256}, 'lead': 2, 'steps': 6, 'rounds': 2, 'seconds': 0.5, 'timed': 16,
         'probes': 40,
         'most': {'pretrain_epochs': 1000, 'phase2_epochs': 60}, 'compile': 'on',
         'cifar': dict(at_once=3, pretrain_batch=1024, pretrain_lr=2e-3)}
TINY = {'model': 'book-digits', 'side': 32, 'squares': (64, 128), 'sizes': (2, 4),
        'presets': {'reference': 2, 'best': 4}, 'lead': 1, 'steps': 1, 'rounds': 1, 'seconds': 0.01, 'timed': 2,
        'probes': 5,
        'most': {'pretrain_epochs': 3, 'phase2_epochs': 1},
        'compile': 'off', 'cifar': dict(at_once=2, train_size=100, val_size=50, test_size=100, batch_size=25,
                                        phase1_epochs=1,
                      members=2, study_seeds=2, study_size=50, attention_images=10, corruption_images=2,
                      benchmark_seconds=0.1, pretrain_batch=25, lr_grid='((1e-4, 1e-2), (1e-2,))')}


# Here, where there is a network
def to_mosaic(x): return x.reshape(-1, ROW, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32 * ROW, 3)
def of_mosaic(x): return x.reshape(-1, 32, ROW, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def share_out(files: list, room: int) -> list[list]:
    "Divide files among as few folders as hold them in their order. Raise `UserError` for one that is too large."
    folders, used = [[]], 0
    for f in files:
        if (size := f.stat().st_size) > room:
            raise UserError(f'{f.name} does not fit into {room / MIB:.1f} MiB, which is left beside the checkout.')
        if used + size > room: folders.append([]); used = 0
        folders[-1].append(f)
        used += size
    return folders


def commands(folders: int) -> list[tuple]:  # command, number of the folder that it carries or 0, minutes
    "Return what to run: all folders are there by `pretrain`, and all of it takes 15 minutes, start and transfers included."
    more = max(0, folders - 2)  # that come with a `speed` of their own
    left = 15 - (START + (3 + more) * TRANSFER) / 60 - MINUTES['speed'] - MINUTES['book'] - 0.5 * more
    first = [('speed', 1, MINUTES['speed']), *(('speed', 2 + i, 0.5) for i in range(more))]
    return [*first, ('pretrain', len(first) + 1 if folders > 1 else 0, left), ('book', 0, MINUTES['book'])]


def prepare(args):
    "Fill the folders that travel, and say with which commands."
    from PIL import Image
    from dinocls.kit.datasets import load_dataset
    from dinocls.errors import JUDGES
    shutil.rmtree(stock := ROOT/STOCK, ignore_errors=True)
    (fresh := stock/'all').mkdir(parents=True)
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps', '--only-binary=:all:',
                    '--implementation', 'cp', '-d', fresh,
                    '--python-version', '3.12', *(f'--platform={p}' for p in PLATFORMS), '-r',
                    ROOT/'benchmarks'/'wheels.txt'], check=True)
    data = load_dataset('cifar10')
    np.save(fresh/'labels.npy', data.labels.astype(np.uint8))
    for i in range(0, IMAGES, CHUNK):
        picture = Image.fromarray(to_mosaic(data.images[i:i + CHUNK]))
        picture.save(fresh/f'images-{i // CHUNK:02d}.webp', lossless=True, quality=100, method=4)
    more = [args.studies/name for name, _ in JUDGES.values()] if args.studies else []
    for f in [*more, *(args.resume.glob('home-*.tgz') if args.resume else [])]: shutil.copyfile(f, fresh/f.name)
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True,
                            text=True, check=True)
    checkout = sum(f.lstat().st_size for name in listed.stdout.split('\0')[:-1] if (f := ROOT/name).is_file())
    files = sorted(fresh.iterdir(), key=lambda f: (f.suffix == '.tgz', f.suffix == '.webp', f.name))  # wheels go first
    for i, folder in enumerate(folders := share_out(files, CARRIED - MIB - checkout), 1):
        (stock/str(i)).mkdir()
        for f in folder: f.rename(stock/str(i)/f.name)
    fresh.rmdir()
    records = sum(f.stat().st_size for f in OUT.glob('record-*/**/*') if f.is_file() and 'stages' not in f.parts)
    if records > MIB: print(f'Committed records travel with the checkout, {records / MIB:.1f} MiB: fewer folders are '
                            'needed if outputs/record-* is moved away meanwhile.')
    for command, folder, minutes in commands(len(folders)):
        size = checkout + sum(f.stat().st_size for f in (stock/str(folder)).glob('*'))
        print(f'with {f"{STOCK}/{folder}" if folder else "nothing"} ({size / MIB:.1f} MiB in all):  '
              f'DINOCLS_COMMIT={machine.git_commit()} '
              f'python3 benchmarks/gpu.py {command} --minutes {minutes:.3g} --out "$OUT"')
    print('$OUT is the folder that comes home. The minutes add up to 15 with the start and the transfers; for the last two, '
          '--left SECONDS of the 15 minutes, where it is known, is better than --minutes.')


# There: each command goes on in a copy of the checkout
def settle(args, until: float):
    "Put what was carried aside, and start the command again where wheels, data and results stay from one to the next."
    parts, book = args.work/'parts', args.work/'book'
    for folder in [*(ROOT/STOCK).glob('[0-9]*'), *filter(None, [args.resume])]:
        shutil.copytree(folder, parts, dirs_exist_ok=True)
    left = lambda _, names: [n for n in names if n.startswith('.') or n in ('outputs', '__pycache__')]
    shutil.copytree(ROOT, book, ignore=left, dirs_exist_ok=True)
    (book/'outputs').mkdir(exist_ok=True)
    pieces = sorted(parts.glob('home-*.tgz'))
    if pieces and len(pieces) == int(pieces[0].stem.rpartition('-')[2]) and not (args.work/'resumed').exists():
        subprocess.run(['sh', '-c', 'cat "$0"/home-*.tgz | tar xzf - -C "$1"', parts, book/'outputs'], check=True)
        (args.work/'resumed').touch()
    path = lambda name, *first: os.pathsep.join(filter(None, [*map(str, first), os.environ.get(name)]))
    environment = {'PYTHONPATH': path('PYTHONPATH', book, SITE),
                   'JUPYTER_PATH': path('JUPYTER_PATH', SITE/'share'/'jupyter'),
                   'DINOCLS_DATA': str(args.work/'data'), 'DINOCLS_HOME': str(book), 'PYTHONUNBUFFERED': '1',
                   'PYTHONWARNINGS': 'ignore',
                   'TORCHINDUCTOR_CACHE_DIR': str(args.work/'compiled')}
    os.chdir(book)
    words = [sys.executable, book/'benchmarks'/'gpu.py', *sys.argv[1:], '--out', args.out, '--work', args.work,
             '--until', until]
    os.execve(sys.executable, [*map(str, words)],
              {'OMP_NUM_THREADS': str(max(1, machine.cores() // 4))} | os.environ | environment)


def say(text: str):
    "Print a line, and note it in the log."
    print(text, flush=True)
    with open(OUT/'log.txt', 'a') as log: print(text, file=log)


def begin(words: list):
    "Start a Python command, its output into the log."
    with open(OUT/'log.txt', 'a') as log:
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=log,
                                start_new_session=True)


def end(process):
    "Ask a process to stop, and after a while stop whatever is left of its group."
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child(words: list, until: float) -> int | None:
    "Run a Python command; return its status, or None if it was stopped by the end of the time."
    process = begin(words)
    try: return process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired: return None
    finally: end(process)


# Speeds: each part returns rows (work, batch, images a second, forward passes' worth of an image) or lines of text
def case(size: dict, batch: int, **more) -> dict:
    "Return a case of `train.py`."
    fixed = {k: size[k] for k in ('model', 'side', 'lead', 'steps', 'rounds')}
    return fixed | {'batch': batch, 'options': False, 'stored': False, 'threads': machine.cores()} | more


def seconds(f, at_least: float) -> float:
    "Return the median seconds of a call, once the GPU is done."
    from torch.utils.benchmark import Timer
    return Timer('f()', globals={'f': f}).blocked_autorange(min_run_time=at_least).median


def result(name: str) -> dict:
    "Return what a part has found, {} if it is not there or has failed."
    file = OUT/'speed'/f'{name}.json'
    found = files.read_json(file) if file.exists() else {}
    return {} if 'fails' in found else found


def check(size) -> dict:
    "Try what the other commands need: a chapter by papermill, and both trainings of the small backbone, timed."
    words = [sys.executable, '-m', 'dinocls', 'run', '--preset', 'smoke', '--chapters', '5', '--out', OUT/'check']
    chapter = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    import cleanlab, lightly  # noqa: F401
    found = epochs(size)
    said, _ = chapter.communicate()
    if chapter.returncode:
        return found | {'fails': 'chapter 5 by papermill: ' + ' '.join(said.strip().splitlines()[-2:])}
    return found | {'text': ['Chapter 5 by papermill passes.',
                             *(f'{k}: {v["rate"]:,.0f} images/s.' for k, v in found.items())]}


def epochs(size, fields=('pretrain_epochs', 'phase2_epochs'), **more) -> dict:
    "Time epochs of trainings on random images: field → seconds of an epoch on the training split and before it is at speed."
    import torch
    from dinocls.model import classifier, device
    from dinocls.pretrain import self_supervise
    from recipe import step_flops
    from dinocls.train import fit
    cfg, found = config.preset('cifar', **size['cifar'] | more | {'weights': 'random'}), {}
    quick = stage.variant(cfg, pretrain_epochs=4, compile=size['compile'])
    where, trained = device(cfg), cfg.train_size or TRAINED
    def timed(name, batch, training):
        x, ends = torch.randint(0, 256, (size['timed'] * batch, 3, 32, 32), dtype=torch.uint8,
                                device=where), [time.perf_counter()]
        with tempfile.TemporaryDirectory() as tmp: training(x, Path(tmp), lambda *_: ends.append(time.perf_counter()))
        best = min(b - a for a, b in zip(ends, ends[1:]))
        found[name] = {'epoch': best * trained / len(x), 'first': ends[-1] - ends[0] - best * (len(ends) - 1),
                       'rate': len(x) / best}
    def phase2(x, tmp, on_epoch):
        images, y, n = x.permute(0, 2, 3, 1).cpu().numpy(), torch.arange(len(x)) % 10, max(1,
            len(x) * cfg.val_size // trained)
        fit(classifier(cfg, 10), (images, y), (x[:n], y[:n].to(where)), cfg, epochs=3, lr_backbone=cfg.lr_backbone,
            lr_head=cfg.lr_head,
            folder=tmp, on_epoch=on_epoch)
    if 'pretrain_epochs' in fields:
        timed('pretrain_epochs', cfg.pretrain_batch,
              lambda x, tmp, on_epoch: self_supervise(x, quick, tmp, on_epoch=on_epoch))
        found['pretrain_epochs']['gflop'] = step_flops(cfg) / 1e9  # of an image
    if 'phase2_epochs' in fields: timed('phase2_epochs', cfg.batch_size, phase2)
    return found


def peak(size) -> dict:
    "Multiply square matrices in bf16, random ones since zeros are faster."
    import torch
    from train import DEVICE
    tflops = {}
    for n in size['squares']:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in 'ab')
        tflops[n] = 2 * n ** 3 / seconds(lambda: a @ b, size['seconds']) / 1e12
    return {'peak': max(tflops.values()),
            'text': ['Products of bf16 matrices: '
                     + ', '.join(f'{n}: {t:.3g} TFLOP/s' for n, t in tflops.items()) + '.']}


def inference(size, batches=None, wrap=lambda model: model, how: str = '') -> dict:
    "Measure `infer`, from uint8 images of 32×32 to logits, by batch size."
    import torch
    from dinocls.model import classifier, infer, precision
    from train import CLASSES, DEVICE, configuration
    cfg, rows = configuration(case(size, 1)), []
    model = wrap(classifier(cfg, CLASSES).to(DEVICE).eval())
    for batch in batches or size['sizes']:
        images = torch.randint(0, 256, (4 * batch, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
        infer(model, images, cfg, batch)
        rate = len(images) / seconds(lambda: infer(model, images, cfg, batch), size['seconds'])
        rows.append({'work': f'inference, {precision(cfg, DEVICE)}{how} (aim: 60 %)', 'batch': batch, 'rate': rate,
                     'passes': size is LARGE})
    return {'rows': rows}


def step(size, name: str, phase: int, **more) -> dict:
    "Take steps of a recipe's phase: images a second and peak memory."
    import train
    c = case(size, size['presets'][name], precision=config.preset(name).precision, variant='dinocls',
             phase=phase) | more
    gc.collect()
    if train.GPU: train.torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()) as told: rate = train.turn(train.ours(c), c)['rate']
    divided = ', batch divided' if 'memory ran out' in told.getvalue() else ''
    how = ', compiled' if c['variant'] == 'compiled' else ''
    return {'work': f'`{name}`, phase {phase}, {c["precision"]}{how}{divided}'
            + (' (aim: 50 %)' if phase == 2 else ''), 'batch': c['batch'],
            'rate': rate, 'passes': (size is LARGE) * (3 if phase == 2 else 1),
            'peak_mb': machine.peak_memory()['gpu' if train.GPU else 'resident'], 'of': f'{name} {phase}'}


def training(size) -> dict:
    "Measure the recipes' steps, what augmentation takes of them, and say how long the recipes would take."
    import torch
    from dinocls.augment import augment, mix, preprocess
    from train import DEVICE, configuration
    rows, text = [step(size, name, phase) for name in size['presets'] for phase in (2, 1)], []
    rate, scoring = {r['of']: r['rate'] for r in rows}, max((r['rate'] for r in result('inference').get('rows', ())),
                                                            default=np.inf)
    for name, batch in size['presets'].items():
        cfg, generator = config.preset(name), torch.Generator().manual_seed(0)
        # both averages each epoch, all at the ends
        scored = cfg.phase2_epochs * 2 * cfg.val_size + 3 * (cfg.val_size + 10_000)
        trained = TRAINED * (cfg.phase1_epochs / rate[f'{name} 1'] + cfg.phase2_epochs / rate[f'{name} 2'])
        text.append(f'Both phases of `{name}` would take {(trained + scored / scoring) / 60:.0f} minutes at these rates.')
        cfg, x, y = configuration(case(size, batch)), torch.rand(batch, 3, 32, 32, device=DEVICE), torch.zeros(batch,
            dtype=torch.int64, device=DEVICE)
        images, last = (255 * x).byte(), preprocess(x, cfg)
        s = seconds(lambda: preprocess(mix(augment(images, cfg, generator), y, cfg, generator)[0], cfg, out=last),
                    size['seconds'])
        text.append(f'Augmentation, mixing and resizing of a batch of {batch}: {1e3 * s:.2f} ms, {100 * s * rate[f"{name} 2"] / batch:.1f} % of a step (aim: 3 %).')
    return {'rows': rows, 'text': text}


def others(size, phase: int = 2) -> dict:
    "Let a tutorial's loop and timm's training step take turns with the library, at the largest batch."
    import train
    c = case(size, max(size['presets'].values()))
    v = train.compare(c, phase)
    said = [f'{train.ratios(v["dinocls"]["rates"], v[name]["rates"])} as fast as {name}' if {name, 'dinocls'} <= {*v}
            else f'{name} fails here'
            for name in ('tutorial', 'timm')]
    return {'variants': v, 'text': [f'Phase {phase}, batch {c["batch"]}: {"; ".join(said)}.']}


def compiled(size) -> dict:
    "Measure training and inference once more, compiled."
    import torch
    if size is TINY: return {}  # minutes on a CPU
    return {'rows': [step(size, 'best', 2, variant='compiled'),
                     *inference(size, (256,), torch.compile, ', compiled')['rows']]}


PARTS = {'check': check, 'peak': peak, 'inference': inference, 'training': training, 'others': others,
         'compiled': compiled, 'others-1': lambda size: others(size, 1)}  # the most important first


def measure(args):
    "In a process of its own: measure parts, and write each as soon as it is there."
    import torch
    for name in args.parts:
        torch.manual_seed(0)
        clock = time.perf_counter()
        try: found = PARTS[name](TINY if args.tiny else LARGE)
        except Exception as e: found = {'fails': f'{type(e).__name__}: {files.reason(e)}'}
        found |= {'seconds': time.perf_counter() - clock, 'hardware': machine.hardware(),
                  'versions': machine.versions()}
        files.write_json(OUT/'speed'/f'{name}.json', found)
        gc.collect(), torch.cuda.empty_cache()  # for the next


def speed(args, until: float):
    "Measure what is missing; a part that ends its process costs itself alone."
    for f in (OUT/'speed').glob('*.json'):
        if not result(f.stem): f.unlink()
    missing = lambda: [name for name in PARTS if not (OUT/'speed'/f'{name}.json').exists()]
    while (todo := missing()) and time.monotonic() < until:
        status = child([__file__, 'measure', *todo, *['--tiny'] * args.tiny], until)
        if status and missing():
            files.write_json(OUT/'speed'/f'{missing()[0]}.json', {'fails': f'its process ended with status {status}'})
    say('speed: ' + (f'left for another call: {", ".join(missing())}' if missing() else 'all is measured'))


# The backbone
def restore(args):
    "Write CIFAR-10's binary version from its parts, each file with the publisher's MD5, and the studies of its labels beside it."
    from PIL import Image
    from dinocls.kit.datasets import BATCHES
    parts, target = args.work/'parts', args.work/'data'/'cifar-10-batches-bin'
    if target.exists(): return
    if len(files := sorted(parts.glob('images-*.webp'))) < IMAGES // CHUNK:
        raise UserError(f'{len(files)} of {IMAGES // CHUNK} parts of CIFAR-10 have come: carry the other folders of {STOCK} with a command first.')
    with ThreadPoolExecutor() as pool:
        images = np.concatenate([*pool.map(lambda f: of_mosaic(np.asarray(Image.open(f))), files)])
    rows = np.concatenate([np.load(parts/'labels.npy')[:, None], images.transpose(0, 3, 1, 2).reshape(IMAGES, -1)], 1)
    (draft := target.with_suffix('.partial')).mkdir(parents=True, exist_ok=True)
    for (name, md5), part in zip(BATCHES.items(), np.split(rows, len(BATCHES))):
        if hashlib.md5(part, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f'{name} is not the publisher\'s: its MD5 differs. Make the parts anew.')
        part.tofile(draft/f'{name}.bin')
    for f in parts.glob('cifar10*'): shutil.copyfile(f, args.work/'data'/f.name)
    draft.rename(target)


def fitting(args, field: str, left: float, trainings: float = 1) -> int:
    "Return how many epochs fit into some seconds and what measuring their speed leaves of them."
    clock, size = time.monotonic(), TINY if args.tiny else LARGE
    plan = epochs(size, [field], **config.parse_overrides(' '.join(args.set)))[field]
    left -= time.monotonic() - clock
    # what was compiled once comes out of a cache: half of the seconds before the first epoch at speed
    n = max(1, min(size['most'][field], int((left - plan['first'] / 2) / trainings / plan['epoch'])))
    print(f'{field}={n}: {plan["epoch"]:.2f} s each, and {plan["first"]:.0f} s', flush=True)
    files.write_json(OUT/'plan'/f'{field}.json', plan | {'epochs': n})
    return n


def preset(args, **more):
    "Return the configuration of the two commands that train."
    return config.preset('cifar', **(TINY if args.tiny
                                     else LARGE)['cifar'] | config.parse_overrides(' '.join(args.set)) | more)


def train_backbone(args):
    "In a process of its own: pre-train, probe and publish; with --rescue, publish what a training that was stopped has come to."
    from safetensors.torch import save_file
    from dinocls import pretrain
    from dinocls.data import splits
    size = TINY if args.tiny else LARGE
    run, file, before = OUT/'pretrain', OUT/'weights'/'book-cifar.safetensors', OUT/'before'/'teacher.safetensors'
    if not run.exists() and file.exists():
        before.parent.mkdir(exist_ok=True), shutil.copyfile(file.with_stem('teacher'), before)  # of another day
    if (run/'run.json').exists(): n = files.read_json(run/'run.json')['config']['pretrain_epochs']
    else:
        watch, body = pretrain.watcher(trial := preset(args, out=str(OUT/'trial'))), pretrain.backbone('book-cifar',
            32, 'random')
        body.to(pretrain.device(trial))
        for _ in range(2): clock = time.monotonic(), watch(body)  # the first time is slower
        watching = 22 * (time.monotonic() - clock[0])  # points of the curve
        n = fitting(args, 'pretrain_epochs', args.until - time.monotonic() - watching - size['probes'])
    cfg = preset(args, pretrain_epochs=n, pretrain_from=f'outputs/before/{before.name}' if before.exists() else '',
                 weights='random',
                 compile=size['compile'], out=str(run))
    stage = pretrain.pretrain
    if not args.rescue: pretrain.publish(cfg, file.parent, study=False)
    found = stage(cfg) if stage.is_done(cfg) else pretrain.so_far(stage.partial(cfg))
    for name, part in {'teacher': 'teacher', **({'book-cifar': 'weights'} if args.rescue else {})}.items():
        with files.replacing(file.with_stem(name)) as tmp: save_file(found[part], tmp)
    if args.rescue:
        made_from = {f: getattr(cfg, f) for f in config.FIELDS if f not in (*config.WHERE, 'data_root')}
        files.write_json(file.with_suffix('.json'), {
            'config': made_from, 'git': machine.git_commit(), 'versions': machine.versions(),
            'hardware': machine.hardware(),
            'backbone': cfg.backbone, 'sha256': files.file_digest(file), 'command': pretrain.command(cfg),
            'seed': cfg.seed, 'seconds': None,
            'data': splits(cfg)['fingerprint'], 'probes': [], 'history': found['history'], 'study': [],
            'stopped': True})


def pretrain(args, until: float):
    "Pre-train for as long as there is time; what the end of it stops is rescued."
    restore(args)
    by = until - RESCUE
    words = [__file__, 'train_backbone', '--until', by, *['--tiny'] * args.tiny, *(f'--set={s}' for s in args.set)]
    status = child(words, by)
    if status != 0 and (OUT/'pretrain').exists() and child([*words, '--rescue'], time.monotonic() + 2 * STOPPING) != 0:
        say('pretrain: nothing to rescue yet')
    say('pretrain: ' + {0: 'done', None: 'stopped by the end of the time; the same command goes on'}.get(status,
        f'status {status}, see the log'))


# The book
def chosen(args, run: Path, left: float):
    "Return the book's configuration: pre-training as it was done, as many epochs of phase 2 as fit; a run that has begun keeps its own."
    record, fields = OUT/'weights'/'book-cifar.json', {*config.PretrainConfig.__dataclass_fields__,
                                                       *config.ViewConfig.__dataclass_fields__}
    made = {k: v for k, v in files.read_json(record)['config'].items()
            if k in fields} if record.exists() else {}  # else the weights that are shipped
    for f in (record, record.with_suffix('.safetensors')) if record.exists() else ():
        shutil.copyfile(f, fetch.shipped('book-cifar').with_suffix(f.suffix))
    had = files.read_json(run/'run.json')['config'] if (run/'run.json').exists() else {}
    n = config.parse_overrides(' '.join(args.set)).get('phase2_epochs') or had.get('phase2_epochs') or fitting(args,
        'phase2_epochs', left / 2, TRAININGS)
    cfg = preset(args, **{'weights': ''} | made, out=f'outputs/{run.name}', phase2_epochs=n)
    try: stage.open_run(cfg)
    except UserError: shutil.rmtree(run), stage.open_run(cfg)  # the run of other weights, which came home before
    return cfg


def book(args, until: float):
    "Execute chapters group by group; one that fails costs itself alone."
    restore(args)
    told = subprocess.run('nvidia-smi --query-gpu=name --format=csv,noheader', shell=True, capture_output=True,
                          text=True).stdout
    name = re.search(r'\b[A-Z]+\d+\w*', told)  # as H100
    run = next(iter(OUT.glob('cifar-*')), OUT/f'cifar-{name[0].lower() if name else "cpu"}')
    cfg = chosen(args, run, until - time.monotonic())
    for f in (OUT/'pretrain').glob('stages/*/run.json'):  # for appendix A1
        if not (copy := run/'stages'/f.parent.name).exists(): shutil.copytree(f.parent, copy, copy_function=os.link)
    options = ['--preset', 'cifar', '--out', cfg.out,
               *(f'--set={field}' for field in shlex.split(config.format_overrides(cfg)))]
    ahead = [begin(['-m', 'dinocls', 'stage', name, *options]) for name in AHEAD]
    try:
        for which in CHAPTERS:
            # half a report would take the place of the last one
            if which == '14' and until - time.monotonic() < REPORT / 2: continue
            by = until - REPORT * (which != '14')
            status = child(['-m', 'dinocls', 'run', *options, '--eager', '--chapters', which,
                            *['--force'] * (which == '14')], by)
            how = {0: 'done', 1: 'not all went well', None: 'stopped by the end of the time'}
            say(f'book: chapters {which}: {how.get(status, f"status {status}")}')
            pack(args.out)
    finally:
        for process in ahead: end(process)


# Home
def pack(out: Path):
    "Gather speeds, weights and the run's record, and of the stages' results those that took longest for their size."
    out.mkdir(parents=True, exist_ok=True)
    runs = [f.parent for f in OUT.glob('cifar-*/run.json')]
    parcel = [f for name in ('speed', 'plan', 'weights') for f in (OUT/name).glob('*')]
    record = [f for run in runs for f in run.rglob('*') if f.is_file() and f.relative_to(run).parts[0] not in LEFT_OUT
              and f.suffix != '.svg' and not f.name.startswith('.')]
    for f in record:
        if f.stat().st_size > LARGEST: say(f'{f.relative_to(OUT)} is left out: {f.stat().st_size / 1e6:.1f} MB')
    parcel += [*(f for f in record if f.stat().st_size <= LARGEST),
              *(f for run in runs for f in run.glob('stages/chapters/*'))]
    left = HOME - sum(f.stat().st_size for f in parcel)
    stages = [f.parent for run in runs for f in run.glob('stages/*/run.json') if f.parent.suffix != '.partial'
              and not f.parent.name.startswith('pretrain-')]
    size = {stage: sum(f.stat().st_size for f in stage.iterdir()) for stage in stages}
    for folder in sorted(stages, key=lambda s: files.read_json(s/'run.json')['seconds'] / size[s], reverse=True):
        if size[folder] <= left: left -= size[folder]; parcel += folder.iterdir()
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode='w:gz', compresslevel=1) as tar:
            for f in parcel: tar.add(f, f.relative_to(OUT))
        pieces = -(-whole.tell() // PIECE)
        whole.seek(0)
        for old in out.glob('home-*.tgz'): old.unlink()
        for i in range(pieces): (out/f'home-{i + 1}-of-{pieces}.tgz').write_bytes(whole.read(PIECE))


def report() -> list[str]:
    "Return the speeds, what the backbone is worth, and how the book went, as Markdown."
    import train
    read = lambda pattern: [files.read_json(f) for f in sorted(OUT.glob(pattern))]
    parts, top = {name: result(name) for name in PARTS}, result('peak').get('peak', np.nan)
    text = [f'- {f.stem} failed: {files.read_json(f)["fails"]}' for f in (OUT/'speed').glob('*.json')
            if not result(f.stem)]
    text += ['| ViT-B/14 at 224 | batch | images/s | of the peak (%) | peak memory (MB) |', '|---|---|---|---|---|']
    text += [f'| {r["work"]} | {r["batch"]} | {r["rate"]:,.0f} | {100 * r["rate"] * r["passes"] * train.GFLOP / 1e3 / top:.0f} | {r.get("peak_mb", "")} |'
             for part in parts.values() for r in part.get('rows', ())] + ['']
    text += [f'- {line}' for part in parts.values() for line in part.get('text', ())]
    for made, plan in zip(read('weights/book-cifar.json'),
                          [*read('plan/pretrain_epochs.json'), {'rate': np.nan, 'gflop': np.nan}]):
        share = 100 * plan['rate'] * plan['gflop'] / 1e3 / top
        text += [f'- `book-cifar`: {len(made["history"])} epochs{", stopped" * made.get("stopped", False)}, {plan["rate"]:,.0f} images/s, {share:.0f} % of the peak']
        text += [f'- {r["features"]}, {r["method"]}: {r["accuracy"]:.2f} % of {r["n"]:,} test images'
                 for r in made['probes'] if r['split'] == 'test']
    ended = {name: r for b in read('cifar-*/book.json') for name, r in b['chapters'].items()}
    text += [f'- {name} {r["status"]}: {r.get("error")}: {r.get("text")}' for name, r in ended.items()
             if r['status'] != 'done']
    text += ['- Chapters: ' + ', '.join(f'{name} {r["seconds"]:.0f} s' for name, r in ended.items()
                                        if r['status'] == 'done')] * bool(ended)
    text += [f'- {r["chapter"]}, {r["metric"]}: {100 * r["value"]:.2f} % of {r["n"]:,} test images'
             for rows in read('cifar-*/*/metrics.json') for r in rows
             if r['split'] == 'test' and r['metric'] in SHOWN and r['value'] is not None]
    claims = [c['holds'] for rows in read('cifar-*/*/claims.json') for c in rows]
    return (text + [f'- Claims: {claims.count(True)} hold, {claims.count(False)} do not, {claims.count(None)} cannot be told'] * bool(claims))


def bring_home(args, begun: float):
    "Put what is worth keeping, the log and a short report into --out, and print the report."
    pack(args.out)
    shutil.copyfile(OUT/'log.txt', args.out/'log.txt')
    text = '\n'.join(report()) + '\n'
    (args.out/'gpu.md').write_text(text, encoding='utf-8')
    print(f'{text}\n{args.command}: {time.monotonic() - begun:.0f} s; '
          + ', '.join(f'{f.name} {f.stat().st_size / 1e6:.1f} MB' for f in sorted(args.out.iterdir())), flush=True)


COMMANDS = {'speed': speed, 'pretrain': pretrain, 'book': book}


def main():
    parser, place = argparse.ArgumentParser(description=__doc__.splitlines()[0]), lambda text: Path(text).expanduser().absolute()
    parser.add_argument('command', choices=['prepare', *COMMANDS, 'measure', 'train_backbone'],
                        metavar='prepare | speed | pretrain | book')
    parser.add_argument('parts', nargs='*', help=argparse.SUPPRESS)
    parser.add_argument('--minutes', type=float, help=f'end after so many; unless given, {MINUTES}')
    parser.add_argument('--left', type=float,
                        help='seconds left of the machine in all, in place of --minutes: later commands get their share')
    parser.add_argument('--out', type=place, default=place('home'), help='folder of what comes home')
    parser.add_argument('--work', type=place, default=Path(tempfile.gettempdir())/'dinocls-gpu',
                        help='folder that stays between commands')
    parser.add_argument('--resume', type=place, help='folder of what came home on another day')
    parser.add_argument('--set', action='append', default=[], metavar='field=value',
                        help='change a field of the preset cifar, may be repeated')
    parser.add_argument('--tiny', action='store_true',
                        help='small models, few steps and images: to try all of it on any machine')
    parser.add_argument('--studies', type=place, help='prepare: folder of the studies of CIFAR-10\'s labels')
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--rescue', action='store_true', help=argparse.SUPPRESS)
    args, begun = parser.parse_args(), time.monotonic()
    try:
        if args.command not in COMMANDS: return globals()[args.command](args)
        if args.left:
            args.minutes = (args.left - TRANSFER
                            - (60 * MINUTES['book'] + TRANSFER) * (args.command == 'pretrain')) / 60
        if not args.until: return settle(args, begun + 60 * (args.minutes or MINUTES[args.command]) - LAST)
    except UserError as e: sys.exit(f'gpu: {e}')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say(f'$ {args.command}, {args.until - begun:.0f} s left')
    try: COMMANDS[args.command](args, args.until)
    except (Exception, KeyboardInterrupt) as e: say(f'{args.command}: {type(e).__name__}: {e}')
    finally: bring_home(args, begun)


if __name__ == '__main__': main()
