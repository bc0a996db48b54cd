"""The whole book on CIFAR-10 on a GPU without a network: pre-train `book-cifar`, execute every chapter, gather what is worth keeping.

    python benchmarks/gpu_book.py --data ARCHIVE_OR_FOLDER [--wheels FOLDER] [--minutes M] [--pack FOLDER] [--resume FOLDER] [--set field=value …]

The data are an image folder (train/<class>/…, test/<class>/…), an archive of one, or a folder that holds such an archive; other files of that folder, such
as those of CIFAR-10's judges, go along. Wheels are installed into a folder of their own where papermill or lightly is missing. The steps, each of which a
later call goes on with:

1. plan:      an epoch of pre-training and one of phase 2 are timed, and as many are planned as fit; `--set pretrain_epochs=…` and `--set phase2_epochs=…` decide instead.
2. pre-train: `dinocls publish` puts the backbone's weights into the package, unless they are there; `--weights random` does without.
3. run:       `dinocls run --preset cifar`, asked to stop before the time is over; then the chapters that it skipped because one before them failed.

Whatever happened, `--pack` then gets the record of the run (book.tar.gz: executed chapters, figures, tables, metrics), the weights and their record, and the
results of the stages that took longest for their size (state.tar.gz in pieces), from which `--resume` goes on where the run folder is gone.
"""
import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dinocls import core
from dinocls.core import UserError

MINUTES = {'pretrain_epochs': 5, 'phase2_epochs': 1}  # that the epochs of one training may take together
MOST = {'pretrain_epochs': 400, 'phase2_epochs': 100}
LAST, STOPPING, PIECE = 40, 30, 15 * 2**20  # seconds kept for packing; seconds that a process has to stop; bytes of a file that is carried
LARGEST = 500_000  # bytes of a file of the record
LEFT_OUT = ('stages', 'html', 'production', 'index.html')  # of a run folder: caches, copies and weights


def provide(wheels: Path | None, site: Path) -> dict:
    "Install wheels where something is missing; return the environment of what is started here."
    missing = [name for name in ('papermill', 'lightly', 'cleanlab', 'fastcore') if not importlib.util.find_spec(name)]
    if missing and not wheels: raise UserError(f'{", ".join(missing)} cannot be imported: install dinocls[book,pretrain], or give --wheels.')
    if missing and not site.exists():
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--target', f'{site}.partial', *sorted(wheels.glob('*.whl'))], check=True)
        Path(f'{site}.partial').rename(site)
    paths = [str(ROOT), *([str(site)] if site.exists() else [])]
    sys.path[1:1] = paths[1:]
    before = lambda name: list(filter(None, [os.environ.get(name)]))
    return os.environ | {'PYTHONPATH': os.pathsep.join(paths + before('PYTHONPATH')), 'JUPYTER_PATH': os.pathsep.join([str(site/'share'/'jupyter'), *before('JUPYTER_PATH')]),  # nbconvert's templates
                         'PYTHONUNBUFFERED': '1', 'PYTHONWARNINGS': 'ignore'}


def unpacked(data: Path, folder: Path) -> Path:
    "Return the image folder that some data are, or are unpacked to."
    if (data/'train').is_dir(): return data
    if (folder/'train').is_dir(): return folder
    archive = data if data.is_file() else next((f for f in sorted(data.glob('*')) if f.is_file() and tarfile.is_tarfile(f)), None)
    if not archive: raise UserError(f'{data} is neither an image folder nor an archive of one, nor holds one.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.unpacking-', dir=folder.parent) as tmp:
        with tarfile.open(archive) as tar: tar.extractall(new := Path(tmp)/'data', filter='data')
        for other in archive.parent.glob('*') if data.is_dir() else ():
            if other.is_file() and other != archive: shutil.copyfile(other, new/other.name)
        if not (new/'train').is_dir(): raise UserError(f'{archive} does not hold train/<class>/….')
        new.rename(folder)
    return folder


def epoch_seconds(cfg, steps: int = 16) -> dict:  # field → seconds
    "Time some steps of pre-training and of phase 2 once they are warm, and return what an epoch takes."
    import torch
    from dinocls.data import load_dataset, on_device
    from dinocls.model import classifier, device
    from dinocls.pretrain import self_supervise
    from dinocls.train import fit
    data = load_dataset(cfg.dataset, cfg.data_root, cfg.on_broken)
    cfg, index, where = replace(cfg, weights='random', pretrain_epochs=2), data.splits['train'], device(cfg)
    val, train, labels = index[:cfg.val_size], index[cfg.val_size:][:cfg.train_size or None], torch.from_numpy(data.labels)
    def timed(size: int, training) -> float:
        ends, some = [], train[:steps * size]
        with tempfile.TemporaryDirectory() as tmp: training(some, Path(tmp), lambda *_: ends.append(time.perf_counter()))
        return (ends[1] - ends[0]) * len(train) / len(some)
    def pretraining(some, tmp, on_epoch): self_supervise(on_device(data.images, some, where), cfg, tmp, on_epoch=on_epoch)
    def phase2(some, tmp, on_epoch):
        fit(classifier(cfg, len(data.classes)), (data.images, data.labels, some), (on_device(data.images, val, where), labels[val].to(where)), cfg,
            epochs=2, lr_backbone=cfg.lr_backbone, lr_head=cfg.lr_head, folder=tmp, on_epoch=on_epoch)
    return {'pretrain_epochs': timed(cfg.pretrain_batch, pretraining), 'phase2_epochs': timed(cfg.batch_size, phase2)}


def plan(cfg, given: dict, run: Path, until: float) -> dict:  # fields that were given → further fields
    "Choose how many epochs fit; a run that has begun keeps what was chosen, since it has one configuration."
    wanted = [field for field in MINUTES if field not in given]
    if (run/'run.json').exists(): return {field: core.read_json(run/'run.json')['config'][field] for field in wanted}
    if not wanted: return {}
    def late(*_): raise UserError('The time was over before epochs were timed: set pretrain_epochs and phase2_epochs.')
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1, until - time.monotonic()))
    seconds = epoch_seconds(cfg)
    signal.setitimer(signal.ITIMER_REAL, 0)
    chosen = {field: max(1, min(MOST[field], int(60 * MINUTES[field] / seconds[field]))) for field in wanted}
    print(f'An epoch of pre-training takes {seconds["pretrain_epochs"]:.2f} s, one of phase 2 {seconds["phase2_epochs"]:.2f} s: ' + ', '.join(f'{k}={v}' for k, v in chosen.items()), flush=True)
    return chosen


def dinocls(command: list, environment: dict, until: float) -> int | None:
    "Run the command line, and ask it to stop when the time is over; return the status, or None if it was stopped."
    print('$ dinocls ' + ' '.join(command), flush=True)
    process = subprocess.Popen([sys.executable, '-m', 'dinocls', *command], cwd=ROOT, env=environment, start_new_session=True)
    try: return process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        try: process.wait(STOPPING)
        except subprocess.TimeoutExpired: pass
        return None
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
        except ProcessLookupError: pass
        process.wait()


def inside(path: Path) -> str:
    "Return a path as it is written into records: relative to the project if it lies in it, so that it is the same everywhere."
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def worth(folder: Path) -> float:
    "Return the seconds that a stage took for each byte of its result."
    record = core.read_json(folder/'run.json')
    return record['seconds'] / sum(f['bytes'] for f in record['files'].values())


def pack(run: Path, target: Path, weights: Path, state_mb: float) -> list[str]:  # what was written, and what was left out
    "Gather the record of a run, its weights, and as much of its state as may be carried."
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob('state.tar.gz.*'): old.unlink()
    files = [f for f in sorted(run.rglob('*')) if f.is_file() and f.relative_to(run).parts[0] not in LEFT_OUT and not f.name.startswith('.')]
    large = [f for f in files if f.stat().st_size > LARGEST]
    with core.replacing(target/'book.tar.gz') as tmp, tarfile.open(tmp, 'w:gz') as tar:
        for f in files:
            if f not in large: tar.add(f, f'{run.name}/{f.relative_to(run)}')
    for f in (weights, weights.with_suffix('.json')):
        if f.is_file(): shutil.copyfile(f, target/f.name)
    stages, left = run/'stages', state_mb * 2**20
    whole = [f.parent for f in stages.glob('*/run.json') if f.parent.suffix != '.partial']
    with tempfile.TemporaryFile() as state:
        with tarfile.open(fileobj=state, mode='w:gz') as tar:
            for folder in [stages/'chapters', *sorted(whole, key=worth, reverse=True)]:
                size = sum(f.stat().st_size for f in folder.glob('*'))
                if folder.is_dir() and size <= left: left -= size; tar.add(folder, f'{run.name}/stages/{folder.name}')
        state.seek(0)
        for i, piece in enumerate(iter(lambda: state.read(PIECE), b'')): (target/f'state.tar.gz.{i:02d}').write_bytes(piece)
    return [f'{f.name}: {f.stat().st_size / 1e6:.1f} MB' for f in sorted(target.iterdir()) if f.is_file()] + [f'{inside(f)} is left out: {f.stat().st_size / 1e6:.1f} MB' for f in large]


def copy_weights(source: Path, target: Path):
    "Copy the backbone's weights and their record between folders, where they are missing."
    for name in ('book-cifar.safetensors', 'book-cifar.json'):
        if (source/name).is_file() and not (target/name).exists(): target.mkdir(parents=True, exist_ok=True); shutil.copyfile(source/name, target/name)


def resume(folder: Path, run: Path):
    "Unpack what an earlier call packed, if there is no run folder."
    if run.exists(): return
    if not (folder/'book.tar.gz').is_file(): raise UserError(f'{folder} does not hold what an earlier call packed: book.tar.gz is missing.')
    with tempfile.TemporaryDirectory(prefix='.unpacking-', dir=run.parent) as tmp:
        with tempfile.TemporaryFile() as state:
            for piece in sorted(folder.glob('state.tar.gz.*')): state.write(piece.read_bytes())
            state.seek(0)
            for source in (open(folder/'book.tar.gz', 'rb'), state):
                with source, tarfile.open(fileobj=source) as tar: tar.extractall(tmp, filter='data')
        next(Path(tmp).iterdir()).rename(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    place = lambda text: Path(text).expanduser().absolute()
    parser.add_argument('--data', type=place, required=True, help='image folder, archive of one, or folder that holds the archive')
    parser.add_argument('--wheels', type=place, help='folder of wheels of what is missing')
    parser.add_argument('--out', type=place, default=ROOT/'outputs'/'cifar-gpu', help='run folder; what it takes beside that is in <run folder>-work')
    parser.add_argument('--pack', type=place, help='folder for what is worth keeping; <run folder>-work/pack unless given')
    parser.add_argument('--resume', type=place, help='what an earlier call packed')
    parser.add_argument('--minutes', type=float, default=9.5, help='end after so many')
    parser.add_argument('--weights', choices=('shipped', 'random'), default='shipped', help='what the backbone starts from')
    parser.add_argument('--set', action='append', default=[], metavar='field=value', help='change a field of the preset, may be repeated')
    parser.add_argument('--chapters', default='', help='which, as for dinocls run')
    parser.add_argument('--state-mb', type=float, default=10, help='MB of stages to pack')
    args = parser.parse_args()
    until, run, work = time.monotonic() + 60 * args.minutes - LAST, args.out, args.out.with_name(f'{args.out.name}-work')
    work.mkdir(parents=True, exist_ok=True)
    try: status = book(args, work, run, until)
    except UserError as e: sys.exit(f'gpu_book: {e}')
    finally:
        if run.exists(): print('\n'.join(pack(run, args.pack or work/'pack', core.shipped('book-cifar'), args.state_mb)))
    print({0: 'All is done.', None: 'The time is over; the same command goes on.'}.get(status, 'Not all went well, see above; the same command tries again what failed.'))
    sys.exit(0 if status == 0 else 1)


def book(args, work: Path, run: Path, until: float) -> int | None:  # 0: all went well; None: stopped
    "Take the steps."
    package, kept = core.shipped('book-cifar').parent, work/'weights'  # a copy of the checkout made anew does not have them
    for source in filter(None, (kept, args.resume)): copy_weights(source, package)
    if args.resume: resume(args.resume, run)
    environment = provide(args.wheels, work/'site')
    given = {word.partition('=')[0]: word.partition('=')[2] for word in args.set}
    fields = {'dataset': 'imagefolder', 'data_root': inside(unpacked(args.data, work/'data')), 'weights': '' if args.weights == 'shipped' else 'random'} | given
    os.chdir(ROOT)  # where data_root is meant from
    fields |= plan(core.preset('cifar', **fields), given, run, until)
    options = ['--preset', 'cifar', *(word for name, value in fields.items() for word in ('--set', f'{name}={value}')), '--out', inside(run)]
    if args.weights == 'shipped' and not core.shipped('book-cifar').is_file() and (status := dinocls(['publish', '--no-study', *options], environment, until)) != 0: return status
    copy_weights(package, kept)
    status = dinocls(['run', *options, *(['--chapters', args.chapters] if args.chapters else [])], environment, until)
    skipped = [name for name, record in core.read_json(run/'book.json')['chapters'].items() if record['status'] == 'skipped'] if status == 1 else []
    if skipped: dinocls(['run', *options, '--chapters', ','.join(skipped)], environment, until)  # a claim that does not hold costs its own chapter only
    return status


if __name__ == '__main__': main()
