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
CARRIED, PIECE, HOME, LARGEST, RECORD = 64 * MIB, 15 * MIB, 58 * MIB, 500_000, 20_000_000  # bytes: of a command, of a file that comes home, of all that does, of a file and all files of a run's record
START, TRANSFER, LAST, STOPPING = 120, 30, 15, 30  # seconds: until a machine is there; around a command; kept for packing; that a process has to stop
MINUTES = {'speed': 2.5, 'pretrain': 4, 'book': 5}
CHUNK, ROW, IMAGES, TRAINED = 2000, 50, 60_000, 45_000  # images of a file, in a row of its mosaic, of CIFAR-10, of the training split
RESCUE, REPORT, TRAININGS = 25, 40, 8  # seconds kept for what is stopped, for the report; trainings of phase 2's length among the chapters that come first
AHEAD = ('ensemble', 'direct_logits', 'siblings')  # stages that are begun beside the chapters which will ask for them
LEFT_OUT = ('stages', 'html', 'production', 'index.html')  # of a run folder: caches, copies and weights
FIRST, THEN = '5-8,10,12,14', '0-4,9,11,13,15,A1,A2'  # chapters
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_27_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64', 'manylinux1_x86_64')
LARGE = {'model': 'dinov2_vitb14', 'side': 224, 'squares': (4096, 8192, 16384), 'sizes': (64, 256, 1024), 'presets': {'reference': 64, 'best': 256}, 'lead': 2, 'steps': 6, 'rounds': 2, 'seconds': 0.5,
         'cifar': {'compile': 'on', 'at_once': 3}, 'most': {'pretrain_epochs': 1000, 'phase2_epochs': 60}, 'probes': 45, 'timed': 16}
TINY = {'model': 'book-digits', 'side': 32, 'squares': (64, 128), 'sizes': (2, 4), 'presets': {'reference': 2, 'best': 4}, 'lead': 1, 'steps': 1, 'rounds': 1, 'seconds': 0.01,
        'cifar': dict(compile='off', at_once=2, train_size=100, val_size=50, test_size=100, batch_size=25, phase1_epochs=1, members=2, study_seeds=2, study_size=50, attention_images=10, corruption_images=2,
                      benchmark_seconds=0.1, pretrain_batch=25, lr_grid='((1e-4, 1e-2), (1e-2,))'), 'most': {'pretrain_epochs': 3, 'phase2_epochs': 1}, 'probes': 5, 'timed': 2}


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
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps', '--only-binary=:all:', '--python-version', args.python, '--implementation', 'cp',
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


def start(words: list):
    "Start a Python command, its output into the log."
    with open(LOG, 'a') as log: return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def child(words: list, until: float) -> int | None:
    "Run a Python command; ask it to stop when the time is over. Return the status, None if it was stopped."
    process = start(words)
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
    return {**{k: size[k] for k in ('model', 'side', 'lead', 'steps', 'rounds')}, 'batch': batch, 'options': False, 'stored': False, 'threads': core.cores(), **more}


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
    return found | ({} if chapter.returncode == 0 else {'fails': 'chapter 5 by papermill: ' + ' '.join(said.strip().splitlines()[-2:])})


def epochs(size) -> dict:
    "Time epochs of pre-training and of phase 2 on some random images; return the seconds of one on the training split, and those before it."
    import numpy as np
    import torch
    from dinocls import core
    from dinocls.data import on_device
    from dinocls.model import classifier, device
    from dinocls.pretrain import self_supervise, step_flops
    from dinocls.train import fit
    cfg = core.preset('cifar', **size['cifar'] | {'weights': 'random', 'pretrain_epochs': 4})
    where, trained, found = device(cfg), cfg.train_size or TRAINED, {}
    def timed(name, batch, training):
        x, ends = np.random.default_rng(0).integers(0, 256, (size['timed'] * batch, 32, 32, 3), dtype=np.uint8), [time.perf_counter()]
        with tempfile.TemporaryDirectory() as tmp: training(x, Path(tmp), lambda *_: ends.append(time.perf_counter()))
        best = min(b - a for a, b in zip(ends[1:], ends[2:]))
        found[name] = {'epoch': best * trained / len(x), 'first': ends[-1] - ends[0] - best * (len(ends) - 1), 'rate': len(x) / best}
    def phase2(x, tmp, on_epoch):
        y, n = torch.arange(len(x)) % 10, max(1, len(x) * cfg.val_size // trained)
        fit(classifier(cfg, 10), (on_device(x, np.arange(len(x)), where), y.to(where)), (on_device(x, np.arange(n), where), y[:n].to(where)), cfg, epochs=3,
            lr_backbone=cfg.lr_backbone, lr_head=cfg.lr_head, folder=tmp, on_epoch=on_epoch)
    timed('pretrain_epochs', cfg.pretrain_batch, lambda x, tmp, on_epoch: self_supervise(on_device(x, np.arange(len(x)), where), cfg, tmp, on_epoch=on_epoch))
    timed('phase2_epochs', cfg.batch_size, phase2)
    found['pretrain_epochs']['gflop'] = step_flops(cfg) / 1e9  # of an image
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
    if size is TINY: return {'rows': [], 'training': []}  # minutes on a CPU
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
    from dinocls import core
    (folder := OUT/'speed').mkdir(exist_ok=True)
    for f in folder.glob('*.json'):
        if 'fails' in core.read_json(f): f.unlink()
    missing = lambda: [p.__name__ for p in PARTS if not (folder/f'{p.__name__}.json').exists()]
    while (todo := missing()) and time.monotonic() < until:
        status = child([__file__, 'measure', *todo, *['--tiny'] * args.tiny], until)
        if status and (left := missing()): (folder/f'{left[0]}.json').write_text(f'{{"fails": "its process ended with status {status}"}}')
    say('speed: ' + (f'left for another call: {", ".join(missing())}' if missing() else 'all is measured'))


# The backbone
def restore(args):
    "Write CIFAR-10's binary version from its parts, each file with the publisher's MD5, and the studies of its labels beside it."
    import hashlib
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    from PIL import Image
    from dinocls.core import UserError
    from dinocls.data import BATCHES
    parts, target = args.work/'parts', Path(os.environ['DINOCLS_DATA'])/'cifar-10-batches-bin'
    for f in (*parts.glob('cifar10*.npy'), *parts.glob('cifar10*.json')): (target.parent).mkdir(exist_ok=True), shutil.copyfile(f, target.parent/f.name)
    if target.exists(): return
    files = sorted(parts.glob('images-*.webp'))
    if len(files) < IMAGES // CHUNK: raise UserError(f'{len(files)} of {IMAGES // CHUNK} parts of CIFAR-10 have come: carry the other folders of {STOCK} with a command first.')
    with ThreadPoolExecutor() as pool: images = np.concatenate(list(pool.map(lambda f: of_mosaic(np.asarray(Image.open(f))), files)))
    rows = np.concatenate([np.load(parts/'labels.npy')[:, None], images.transpose(0, 3, 1, 2).reshape(IMAGES, -1)], 1)
    (draft := target.with_suffix('.partial')).mkdir(parents=True, exist_ok=True)
    for (name, md5), part in zip(BATCHES.items(), np.split(rows, len(BATCHES))):
        if hashlib.md5(part, usedforsecurity=False).hexdigest() != md5: raise UserError(f'{name} is not the publisher\'s: its MD5 differs. Make the parts anew.')
        part.tofile(draft/f'{name}.bin')
    draft.rename(target)


def fitting(args, field: str, left: float, trainings: float = 1) -> int:
    "Return how many epochs fit into some seconds, by the speed that was measured on this machine, or is measured now."
    from dinocls import core
    file, size = OUT/'speed'/'check.json', TINY if args.tiny else LARGE
    known = core.read_json(file) if file.exists() else {}
    if field not in known or known['hardware'] != core.hardware(): known = epochs(size)
    plan = known[field] | {'epochs': max(1, min(size['most'][field], int((left - known[field]['first']) / trainings / known[field]['epoch'])))}
    core.write_json(OUT/'plan'/f'{field}.json', plan)
    print(f'{field}={plan["epochs"]}: {plan["epoch"]:.2f} s each, the first {plan["first"]:.0f} s more', flush=True)
    return plan['epochs']


def preset(args, **more):
    "Return the configuration of the two commands that train."
    from dinocls import core
    return core.preset('cifar', **{**(TINY if args.tiny else LARGE)['cifar'], **core.parse_overrides(' '.join(args.set)), **more})


def train_backbone(args):
    "In a process of its own: pre-train, probe and publish into the results; or else write there what a training that was stopped has come to."
    import torch
    from safetensors.torch import save_file
    from dinocls import core, pretrain
    from dinocls.data import splits
    run, file, before = OUT/'pretrain', OUT/'weights'/'book-cifar.safetensors', OUT/'before'/'teacher.safetensors'
    if not run.exists() and file.exists(): before.parent.mkdir(exist_ok=True), shutil.copyfile(file.with_stem('teacher'), before)  # of another day
    known = core.read_json(run/'run.json')['config'] if (run/'run.json').exists() else {}
    n = known.get('pretrain_epochs') or fitting(args, 'pretrain_epochs', args.until - time.monotonic() - (TINY if args.tiny else LARGE)['probes'])
    cfg, stage = preset(args, pretrain_epochs=n, pretrain_from=f'outputs/before/{before.name}' if before.exists() else '', weights='random', out=str(run)), pretrain.pretrain
    if not args.rescue: pretrain.publish(cfg, file.parent, study=False)
    found = stage(cfg) if stage.is_done(cfg) else pretrain.so_far(stage.folder(cfg).with_suffix('.partial'))
    for name in ('teacher', *(['book-cifar'] if args.rescue else [])):
        with core.replacing(file.with_stem(name)) as tmp: save_file(found['teacher' if name == 'teacher' else 'weights'], tmp)
    if args.rescue: core.write_json(file.with_suffix('.json'), {'backbone': cfg.backbone, 'sha256': core.file_digest(file), 'command': pretrain.command(cfg), 'seed': cfg.seed, **core.stage_record(stage, cfg), 'seconds': None,
                                                                'data': splits(cfg)['fingerprint'], 'probes': [], 'history': found['history'], 'study': [], 'stopped': True})


def pretrain(args, until: float):
    "Pre-train for as long as there is time; what the end of it stops is rescued."
    restore(args)
    by = until - (5 if args.tiny else RESCUE)
    words = [__file__, 'train_backbone', '--until', by, *['--tiny'] * args.tiny, *(w for s in args.set for w in ('--set', s))]
    status = child(words, by)
    if status != 0 and (OUT/'pretrain').exists() and child([*words, '--rescue'], time.monotonic() + 2 * STOPPING) != 0: say('pretrain: nothing to rescue yet')
    say('pretrain: ' + {0: 'done', None: 'stopped by the end of the time; the same command goes on'}.get(status, f'failed, see the log (status {status})'))


# The book
def gpu_name() -> str:
    "Return a short name of the GPU, as h100."
    if not shutil.which('nvidia-smi'): return 'cpu'
    name = subprocess.run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], capture_output=True, text=True).stdout
    return (re.search(r'\b[A-Z]+\d+\w*', name) or ['gpu'])[0].lower()


def chosen(args, run: Path, left: float):
    "Return the book's configuration: pre-training as it was done, as many epochs of phase 2 as fit; a run that has begun keeps its own."
    from dinocls import core
    record, had, fields = OUT/'weights'/'book-cifar.json', {}, {*core.PretrainConfig.__dataclass_fields__, *core.ViewConfig.__dataclass_fields__}
    made = {k: v for k, v in core.read_json(record)['config'].items() if k in fields} | {'weights': ''} if record.exists() else {'weights': 'random'}
    for f in (record, record.with_suffix('.safetensors')) if record.exists() else (): shutil.copyfile(f, core.shipped('book-cifar').with_suffix(f.suffix))
    if (run/'run.json').exists(): had = core.read_json(run/'run.json')['config']
    given = core.parse_overrides(' '.join(args.set)).get('phase2_epochs') or had.get('phase2_epochs')
    cfg = preset(args, **made, out=f'outputs/{run.name}', phase2_epochs=given or fitting(args, 'phase2_epochs', 0.5 * left, TRAININGS))
    try: core.open_run(cfg)
    except core.UserError: shutil.rmtree(run), core.open_run(cfg)  # the run of other weights, which came home before
    return cfg


def book(args, until: float):
    "Execute chapters group by group; one that fails costs itself alone."
    from dinocls import core
    restore(args)
    run = next(OUT.glob('cifar-*/'), OUT/f'cifar-{gpu_name()}')
    cfg = chosen(args, run, until - time.monotonic())
    for folder in (OUT/'pretrain').glob('stages/*'):
        if (folder/'run.json').exists(): shutil.copytree(folder, run/'stages'/folder.name, copy_function=os.link, dirs_exist_ok=True)
    options = [*(word for field in core.shlex.split(core.format_overrides(cfg)) for word in ('--set', field)), '--preset', 'cifar', '--out', cfg.out]
    ahead = [start(['-m', 'dinocls', 'stage', name, *options]) for name in AHEAD]
    try:
        for which in (FIRST, THEN, '14'):
            by = until - (0 if which == '14' else REPORT)
            status = child(['-m', 'dinocls', 'run', *options, '--chapters', which], by)
            skipped = [name for name, r in core.read_json(run/'book.json')['chapters'].items() if r['status'] == 'skipped'] if status == 1 else []
            if skipped: child(['-m', 'dinocls', 'run', *options, '--chapters', ','.join(skipped)], by)
            say(f'book: chapters {which}: ' + {0: 'done', 1: 'not all went well', None: 'stopped by the end of the time'}.get(status, f'status {status}'))
            pack(args.out)
    finally:
        for process in ahead: end(process)


# Home
def unpack(pieces: list, target: Path):
    "Unpack what came home."
    with tempfile.TemporaryFile() as whole:
        for piece in pieces: whole.write(piece.read_bytes())
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar: tar.extractall(target, filter='data')


def worth(folder: Path) -> float:
    "Return the seconds that a stage took for each byte of its result."
    from dinocls import core
    record = core.read_json(folder/'run.json')
    return record['seconds'] / sum(f['bytes'] for f in record['files'].values())


def record_of(run: Path) -> list[Path]:
    "Return the files of a run's record: executed chapters, figures, tables, metrics; none too large, and the largest left out while all are too many."
    files = sorted((f for f in run.rglob('*') if f.is_file() and f.relative_to(run).parts[0] not in LEFT_OUT and not f.name.startswith('.')), key=lambda f: f.stat().st_size)
    sizes = [f.stat().st_size for f in files]
    kept = [f for i, f in enumerate(files) if sizes[i] <= LARGEST and sum(sizes[:i + 1]) <= RECORD]
    for f in files[len(kept):]: say(f'{f.relative_to(OUT)} is left out: {f.stat().st_size / 1e6:.1f} MB')
    return kept


def pack(out: Path):
    "Gather speeds, weights and the run's record, and of the stages' results those that took longest for their size."
    runs = [run for run in OUT.glob('*/') if (run/'run.json').exists() and run.name != 'check']
    files = [*(f for name in ('speed', 'plan', 'weights', 'before') for f in (OUT/name).glob('*')), *(f for run in runs for f in record_of(run)), *(f for run in runs for f in run.glob('stages/chapters/*'))]
    left = HOME - sum(f.stat().st_size for f in files)
    stages = [f.parent for run in runs for f in run.glob('stages/*/run.json') if f.parent.suffix != '.partial' and (run.name == 'pretrain' or not (OUT/'pretrain'/'stages'/f.parent.name).exists())]
    for folder in sorted(stages, key=worth, reverse=True):
        size = sum(f.stat().st_size for f in folder.iterdir())
        if size <= left: left -= size; files += folder.iterdir()
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode='w:gz', compresslevel=1) as tar:
            for f in files: tar.add(f, f.relative_to(OUT))
        size, _ = whole.tell(), whole.seek(0)
        for old in out.glob('home-*.tgz'): old.unlink()
        pieces = -(-size // PIECE)
        for i in range(pieces): (out/f'home-{i + 1}-of-{pieces}.tgz').write_bytes(whole.read(PIECE))


def lines() -> list[str]:
    "Return a short report of all that there is, as Markdown."
    from dinocls import core
    found = {f.stem: core.read_json(f) for name in ('speed', 'plan') for f in sorted((OUT/name).glob('*.json'))}
    text = [f'- {name} failed: {f["fails"]}' for name, f in found.items() if 'fails' in f]
    found = {name: f for name, f in found.items() if 'fails' not in f}
    return text + speed_lines(found) + backbone_lines(found) + book_lines()


def number(value: float) -> str: return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def speed_lines(found: dict) -> list[str]:
    "Report speeds: shares of the measured peak, what is beside, memory, augmentation, the recipes' wall time."
    from dinocls import core
    if not found: return []
    h, v = (next(f[k] for f in found.values() if k in f) for k in ('hardware', 'versions'))
    text = [f'{h.get("gpu", "No GPU")}, {h["cpu"]}, {h["cores"]} cores; torch {v["torch"]}, timm {v["timm"]}.', '']
    if 'check' in found: text += ['- Chapter 5 by papermill passes. ' + '; '.join(f'{k}: {number(f["rate"])} images/s' for k, f in found['check'].items() if k.endswith('_epochs')) + '.']
    if 'peak' not in found: return text
    top, work = found['peak']['peak'], gflop(*((TINY if 'gpu' not in h else LARGE)[k] for k in ('model', 'side'))) / 1e3
    text += ['- bf16 products of matrices: ' + ', '.join(f'{n}: {number(t)} TFLOP/s' for n, t in found['peak']['tflops'].items()), '', '| work | batch | images/s | of the peak (%) | aim (%) | peak memory (MB) |', '|---|---|---|---|---|---|']
    more = found.get('compiled', {'rows': [], 'training': []})
    rows = [(f'inference, {r["how"]}', r, 1, 60, '') for r in [*found.get('inference', more)['rows'], *more['rows']]]
    trained = [*found.get('training', {'rows': []})['rows'], *more['training']]
    rows += [(f'`{r["preset"]}`, phase {r["phase"]}, {r["precision"]}' + ', compiled' * (r['how'] == 'compiled'), r, 3 if r['phase'] == 2 else 1, 50 if r['phase'] == 2 else '', f'{r["peak_mb"]:,}' + '' * r['fits']) for r in trained]
    text += [f'| {name} | {r["batch"]} | {number(r["rate"])} | {100 * r["rate"] * passes * work / top:.0f} | {aim} | {memory} |' for name, r, passes, aim, memory in rows]
    from train import ratios
    text += ['']
    for part in ('others', 'others_phase1'):
        for name in ('tutorial', 'timm') if part in found else ():
            v = found[part]['variants']
            text += [f'- Phase {found[part]["phase"]}, batch {found[part]["case"]["batch"]}: ' + (f'{ratios(v["dinocls"]["rates"], v[name]["rates"])} as fast as {name} ({number(median(v[name]["rates"]))} images/s)' if name in v and 'dinocls' in v else f'{name} fails here')]
    rate = {(r['preset'], r['phase']): max(x['rate'] for x in trained if (x['preset'], x['phase']) == (r['preset'], r['phase'])) for r in trained}
    text += [f'- Augmentation of a batch of {r["batch"]}: {r["ms"]:.2f} ms, {100 * r["ms"] * rate[r["preset"], 2] / r["batch"] / 1e3:.1f} % of a step (aim: 3 %)' for r in found.get('augmentation', {'rows': []})['rows'] if (r['preset'], 2) in rate]
    for name in ('reference', 'best') if trained and 'inference' in found else ():
        cfg, fastest = core.preset(name), max(r['rate'] for r in found['inference']['rows'])
        scored = cfg.phase2_epochs * 2 * cfg.val_size + 3 * (cfg.val_size + 10_000)  # raw and averaged weights each epoch; all that is scored at the ends
        text += [f'- Both phases of `{name}` would take {(TRAINED * (cfg.phase1_epochs / rate[name, 1] + cfg.phase2_epochs / rate[name, 2]) + scored / fastest) / 60:.0f} minutes at these rates']
    return text


def backbone_lines(found: dict) -> list[str]:
    "Report pre-training: how long, what share of the peak, what the frozen features are worth."
    from dinocls import core
    file = OUT/'weights'/'book-cifar.json'
    if not file.exists(): return []
    made, plan = core.read_json(file), found.get('pretrain_epochs', {})
    share = f', {100 * plan["rate"] * plan["gflop"] / 1e3 / found["peak"]["peak"]:.0f} % of the peak' if plan and 'peak' in found else ''
    text = ['', f'`book-cifar`: {len(made["history"])} epochs' + (f' in {made["seconds"]:.0f} s' if made['seconds'] else ', then stopped') + (f'; {number(plan["rate"])} images/s' if plan else '') + f'{share}; '
            f'{file.with_suffix(".safetensors").stat().st_size / 1e6:.1f} MB.', '', '| features | method | split | accuracy (%) |', '|---|---|---|---|']
    return [*text, *(f'| {r["features"]} | {r["method"]} | {r["split"]}, {r["n"]:,} images | {r["accuracy"]:.2f} ({r["low"]:.2f} – {r["high"]:.2f}) |' for r in made['probes'] if r['split'] == 'test')]


METRICS = {'05_phase1': ('accuracy',), '06_phase2': ('accuracy',), '07_ensemble': ('member_accuracy', 'probabilities_accuracy', 'gain_over_single'), '08_probe': ('knn:frozen', 'linear:frozen'), '12_robustness': ('clean', 'mean_corruption')}


def book_lines() -> list[str]:
    "Report the book: which chapters are there, what failed, the headline numbers, how many claims hold."
    from dinocls import core
    text = []
    for file in OUT.glob('cifar-*/book.json'):
        run, ended = file.parent, core.read_json(file)['chapters']
        config = core.read_json(run/'run.json')['config']
        text += ['', f'`{run.name}`: {len(list(run.glob("*.ipynb")))} executed chapters, {config["phase2_epochs"]} epochs of phase 2; ' + ', '.join(f'{name} {r.get("seconds", 0):.0f} s' for name, r in ended.items() if r['status'] == 'done') + '.']
        text += [f'- {name} {r["status"]}: {r.get("error")}: {r.get("text")}' for name, r in ended.items() if r['status'] != 'done']
        rows = {(r['chapter'], r['metric']): r for f in run.glob('*/metrics.json') for r in core.read_json(f) if r['split'] == 'test' and r['value'] is not None}
        text += [f'- {chapter}, {name}: {100 * rows[chapter, name]["value"]:.2f} % of {rows[chapter, name]["n"]:,} test images' for chapter, names in METRICS.items() for name in names if (chapter, name) in rows]
        claims = [c['holds'] for f in run.glob('*/claims.json') for c in core.read_json(f)]
        text += [f'- {sum(c is True for c in claims)} of {len(claims)} claims hold, {sum(c is False for c in claims)} do not']
    return text


def bring_home(args, begun: float):
    "Put what is worth keeping, the log and a short report into --out, and print the report."
    args.out.mkdir(parents=True, exist_ok=True)
    pack(args.out)
    text = '\n'.join(lines()) + '\n'
    (args.out/'gpu.md').write_text(text, encoding='utf-8')
    shutil.copyfile(LOG, args.out/'log.txt')
    print(f'{text}\n{args.command}: {time.monotonic() - begun:.0f} s; ' + ', '.join(f'{f.name} {f.stat().st_size / 1e6:.1f} MB' for f in sorted(args.out.iterdir())), flush=True)


COMMANDS = {'speed': speed, 'pretrain': pretrain, 'book': book}


def main():
    parser, place = argparse.ArgumentParser(description=__doc__.splitlines()[0]), lambda text: Path(text).expanduser().absolute()
    parser.add_argument('command', choices=['prepare', *COMMANDS, 'measure', 'train_backbone'], metavar='prepare | speed | pretrain | book')
    parser.add_argument('parts', nargs='*', help=argparse.SUPPRESS)
    parser.add_argument('--minutes', type=float, help=f'end after so many; unless given, {MINUTES}')
    parser.add_argument('--left', type=float, help='seconds left of the machine in all, transfers included, in place of --minutes: the later commands get their share')
    parser.add_argument('--out', type=place, default=place('home'), help='folder of what comes home')
    parser.add_argument('--work', type=place, default=Path(tempfile.gettempdir())/'dinocls-gpu', help='folder outside of the checkout, kept from one command to the next')
    parser.add_argument('--resume', type=place, help='folder of what came home on another day')
    parser.add_argument('--set', action='append', default=[], metavar='field=value', help='change a field of the preset cifar, may be repeated')
    parser.add_argument('--tiny', action='store_true', help='small models, few steps and images: to try all of it on any machine')
    parser.add_argument('--studies', type=place, help='prepare: folder of the studies of CIFAR-10\'s labels')
    parser.add_argument('--python', default='3.12', help='prepare: Python there')
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--rescue', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command not in COMMANDS: return globals()[args.command](args)
    begun = time.monotonic()
    later = {'pretrain': 60 * MINUTES['book'] + TRANSFER, 'book': 0}.get(args.command, 0)
    minutes = (args.left - TRANSFER - later) / 60 if args.left else args.minutes or MINUTES[args.command]
    if not args.until: return settle(args, begun + 60 * minutes - LAST)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say(f'$ {args.command}, {args.until - begun:.0f} s left')
    try: COMMANDS[args.command](args, args.until)
    except (Exception, KeyboardInterrupt) as e: say(f'{args.command}: {type(e).__name__}: {e}')
    finally: bring_home(args, begun)


if __name__ == '__main__': main()
