"""What a GPU gives with ViT-B/14 at 224 and random weights: its own limits, inference, training, memory, serving, and the wall time of the recipes.

    python benchmarks/gpu.py [part …] [--minutes M] [--out FOLDER]     writes outputs/gpu/gpu.md; needs no network
    python benchmarks/gpu.py --tiny                                    all parts at tiny size, on any machine, in seconds

ceiling:    products of bf16 matrices and a copy within the GPU's memory: what everything else is held against.
inference:  `infer`, from uint8 images of 32×32 to embeddings and logits, by batch size, plain and compiled.
phase…:     `train_epoch` beside a tutorial's loop and timm's training step, as `train.py` describes them, at a small and at a large batch.
memory:     the peak of a step of each phase by batch size, until the library would divide the batch.
pipeline:   what augmentation, mixing and resizing take of a step.
serve:      `ProductionModel`, from pixels and from PNG and JPEG files in memory.

Each part has a process of its own and writes its result as JSON as soon as it is measured; a part whose file is there is not measured again. What does not
fit into the minutes is left for the next call. At the end `gpu.md` is made of all results that are there.
"""
import argparse
import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import train
from train import CLASSES, DEVICE, GPU, config, number, ratios

from dinocls import core
from dinocls.augment import augment, mix, prepare
from dinocls.data import Loader
from dinocls.model import BACKBONES, classifier, infer, precision

REFERENCE, TRAINED, RECIPES = 49.6, 45_000, ('reference', 'best')  # images/s that the reference reports; training images of the recipe
AIMS = {'inference': 60, 'training': 50, 'minutes': 12}  # percent of the peak, twice; minutes of a recipe
LARGE = {'model': 'dinov2_vitb14', 'side': 224, 'squares': (4096, 8192, 16384), 'copy': 2**32, 'batches': (64, 256), 'compile': True, 'sizes': (16, 64, 256, 1024), 'memory': (64, 256, 512, 1024),
         'lead': 4, 'steps': 10, 'rounds': 2, 'seconds': 1.0}
TINY = {'model': 'book-digits', 'side': 32, 'squares': (64, 128), 'copy': 2**16, 'batches': (2, 4), 'compile': False, 'sizes': (2, 4), 'memory': (2, 4), 'lead': 1, 'steps': 1, 'rounds': 1, 'seconds': 0.01}
PARTS = {'ceiling': 30, 'inference': 60, 'phase2-large': 150, 'phase1-large': 90, 'phase2-small': 60, 'phase1-small': 60, 'pipeline': 20, 'memory': 60, 'serve': 60}  # → seconds that must be left to begin


def case(size: dict, batch: int, **more) -> dict:
    "Return a case of `train.py`."
    return {**{k: size[k] for k in ('model', 'side', 'lead', 'steps', 'rounds')}, 'batch': batch, 'options': size['compile'] and batch == max(size['batches']), 'threads': core.cores(), **more}


def seconds(f, at_least: float) -> float:
    "Return the median seconds of a call, once the GPU is done."
    from torch.utils.benchmark import Timer
    return Timer('f()', globals={'f': f}, num_threads=core.cores()).blocked_autorange(min_run_time=at_least).median


def gflop(model: str, side: int) -> float:
    "Return the GFLOP of an image forward through a transformer: its products of matrices, a multiplication and an addition each."
    spec = BACKBONES[model]
    tokens, dim = (side // spec.patch) ** 2 + 1 + spec.registers, spec.dim
    return (spec.depth * (24 * tokens * dim ** 2 + 4 * tokens ** 2 * dim) + 6 * side ** 2 * dim) / 1e9


def peak_mb() -> int:
    "Return the peak of memory since the last reset; without a GPU that of the process."
    return core.peak_memory()['gpu' if GPU else 'resident']


def ceiling(size) -> dict:
    "Measure products of square matrices in bf16, random ones since zeros are faster, and a copy."
    found = {}
    for n in size['squares']:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in 'ab')
        found[n] = 2 * n ** 3 / seconds(lambda: a @ b, size['seconds']) / 1e12
    a = torch.randint(0, 256, (size['copy'],), device=DEVICE, dtype=torch.uint8)
    b = torch.empty_like(a)
    return {'tflops': found, 'peak': max(found.values()), 'copy_tb': 2 * size['copy'] / seconds(lambda: b.copy_(a), size['seconds']) / 1e12}


def inference(size) -> dict:
    "Measure `infer` by batch size, and compiled at the largest batch of training."
    rows, cfg = [], config(case(size, 1))
    model = classifier(cfg, CLASSES).to(DEVICE).eval()
    for batch, how in [(b, 'plain') for b in size['sizes']] + [(max(size['batches']), 'compiled')] * size['compile']:
        images = torch.randint(0, 256, (8 * batch, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
        part = torch.compile(model) if how == 'compiled' else model
        if GPU: torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter()
        try: infer(part, images, cfg, batch)
        except Exception as e: rows.append({'batch': batch, 'how': how, 'fails': core.reason(e)}); continue  # no compiler, or no memory
        first = time.perf_counter() - clock
        rows.append({'batch': batch, 'how': how, 'rate': len(images) / seconds(lambda: infer(part, images, cfg, batch), size['seconds']), 'peak_mb': peak_mb(), 'first': first})
    return {'precision': precision(cfg, DEVICE), 'rows': rows}


def phase(size, which: int, batch: int) -> dict:
    "Train beside others."
    c = case(size, batch)
    return {'phase': which, 'case': c, 'variants': train.compare(c, which)}


def memory(size) -> dict:
    "Take two steps of each phase at rising batch sizes; stop where the library divides the batch, since memory runs out."
    rows = []
    for which in (1, 2):
        for batch in size['memory']:
            gc.collect()  # what is left of the step before
            if GPU: torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
            with contextlib.redirect_stdout(io.StringIO()) as said: train.ours(case(size, batch, variant='dinocls', phase=which) | {'lead': 1, 'steps': 1})(lambda: None)
            if 'memory ran out' in said.getvalue(): break
            rows.append({'phase': which, 'batch': batch, 'peak_mb': peak_mb()})
    return {'rows': rows}


def pipeline(size) -> dict:
    "Time what happens to a batch before the model sees it."
    rows = []
    for batch in size['batches']:
        cfg, generator = config(case(size, batch)), torch.Generator().manual_seed(0)
        x, y = next(Loader(np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8), np.zeros(batch, np.int64), batch, 0, DEVICE).epoch(0))
        last = prepare(x.float() / 255, cfg)
        rows.append({'batch': batch, 'ms': 1e3 * seconds(lambda: prepare(mix(augment(x, cfg, generator), y, cfg, generator)[0], cfg, out=last), size['seconds'])})
    return {'rows': rows}


def pictures(n: int, side: tuple, kind: str) -> list[bytes]:
    "Return smooth random pictures as files of a format."
    from PIL import Image
    small, files = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), [io.BytesIO() for _ in range(n)]
    for x, file in zip(small, files): Image.fromarray(x).resize(side, Image.Resampling.BICUBIC).save(file, kind)
    return [file.getvalue() for file in files]


def serve(size) -> dict:
    "Measure a `ProductionModel` from pixels and from files, plain and compiled; pictures are decoded while the model works on those before."
    from dinocls.inference import ProductionModel, save_production
    cfg, batch, rows, many = config(case(size, 1)), max(size['batches']), [], 4 * max(size['batches'])
    inputs = {'pixels, 32×32': list(np.random.default_rng(0).integers(0, 256, (many, 32, 32, 3), dtype=np.uint8)),
              'PNG, 32×32': pictures(many, (32, 32), 'PNG'), 'JPEG, 32×32': pictures(many, (32, 32), 'JPEG'), 'JPEG, 500×375': pictures(many, (500, 375), 'JPEG')}
    with tempfile.TemporaryDirectory() as tmp:
        folder = save_production(Path(tmp)/'production', classifier(cfg, CLASSES), cfg, [f'class {i}' for i in range(CLASSES)], {}, (32, 32))
        for backend in ('torch', 'compile')[:1 + size['compile']]:
            try: model = ProductionModel(folder, DEVICE.type, backend)
            except core.UserError as e: rows.append({'backend': backend, 'batch': batch, 'fails': str(e)}); continue
            rows += [{'backend': backend, 'input': name, 'batch': batch, 'rate': many / seconds(lambda: model.predict_batch(items, size=batch), size['seconds'])} for name, items in inputs.items()]
    return {'rows': rows}


def measure(part: str, out: Path, tiny: bool):
    "In a process of its own: measure a part and write its result."
    torch.manual_seed(0)
    size, clock = TINY if tiny else LARGE, time.perf_counter()
    name, _, scale = part.partition('-')
    found = phase(size, int(name[-1]), (min if scale == 'small' else max)(size['batches'])) if scale else globals()[name](size)
    core.write_json(out/f'{part}.json', {**found, 'size': size, 'seconds': time.perf_counter() - clock, 'hardware': core.hardware(), 'versions': core.versions(), 'git': core.git_commit()})


def run(parts: list, out: Path, tiny: bool, until: float) -> list[str]:  # parts that remain
    "Measure what is missing, each part in a process group that is ended when the time is over."
    for part in parts:
        if (out/f'{part}.json').exists(): continue
        left = until - time.monotonic()
        if left < (0 if tiny else PARTS[part]): print(f'{part}: left for the next call', flush=True); continue
        process = subprocess.Popen([sys.executable, __file__, part, '--out', out, '--inside', *(['--tiny'] if tiny else [])], start_new_session=True)
        try: status = process.wait(left)
        except subprocess.TimeoutExpired: status = 'over time'
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
        print(f'{part}: ' + (f'{core.read_json(out/f"{part}.json")["seconds"]:.0f} s' if (out/f'{part}.json').exists() else f'no result ({status})'), flush=True)
    return [part for part in parts if not (out/f'{part}.json').exists()]


def phases(found: dict, which: int) -> list[dict]:
    "Return what has been measured of a phase, by batch size."
    return sorted((f for f in found.values() if f.get('phase') == which), key=lambda f: f['case']['batch'])


def own_rate(part: dict) -> float:
    "Return the library's images a second in training: compiled where that pays, as it decides by itself."
    return max(median(part['variants'][v]['rates']) for v in ('dinocls', 'compiled') if v in part['variants'])


def recipe_minutes(name: str, found: dict) -> float:
    "Return the minutes that a preset's two phases take on the training images, validation and final scores included."
    cfg, fastest = core.preset(name), max(r['rate'] for r in found['inference']['rows'] if 'rate' in r)
    epochs = sum(n / own_rate(min(phases(found, which), key=lambda f: abs(f['case']['batch'] - cfg.batch_size))) for which, n in ((1, cfg.phase1_epochs), (2, cfg.phase2_epochs)))
    scored = cfg.phase2_epochs * 2 * cfg.val_size + 3 * (cfg.val_size + 10_000)  # raw and averaged weights each epoch; all that is scored at the ends
    return (TRAINED * epochs + scored / fastest) / 60


def shares(found: dict) -> list[str]:
    "Return rows: what share of the measured peak each kind of work reaches."
    size, lines = found['ceiling']['size'], ['| work | batch | images/s | TFLOP/s | of the peak (%) | aim (%) |', '|---|---|---|---|---|---|']
    work = gflop(size['model'], size['side']) / 1e3
    def row(name, batch, rate, passes, aim): return f'| {name} | {batch} | {number(rate)} | {number(rate * passes * work)} | {100 * rate * passes * work / found["ceiling"]["peak"]:.0f} | {aim} |'
    lines += [row(f'inference, {r["how"]}', r['batch'], r['rate'], 1, AIMS['inference']) for r in found.get('inference', {'rows': ()})['rows'] if 'rate' in r]
    for which, passes, aim in ((1, 1, ''), (2, 3, AIMS['training'])):
        lines += [row(f'phase {which}, {name}', f['case']['batch'], median(f['variants'][name]['rates']), passes, aim)
                  for f in phases(found, which) for name in ('dinocls', *train.OPTIONS) if name in f['variants']]
    return lines


def others(found: dict) -> list[str]:
    "Return rows: the library beside a tutorial's loop and timm."
    lines = ['| phase | batch | images/s | faster than the tutorial (range over rounds) | faster than timm | peak memory (MB): dinocls, tutorial, timm |', '|---|---|---|---|---|---|']
    for f in phases(found, 1) + phases(found, 2):
        v, base = f['variants'], f['variants']['dinocls']
        against = [ratios(base['rates'], v[o]['rates']) if o in v else 'fails here' for o in ('tutorial', 'timm')]
        peaks = [f'{v[o]["peak"]:,.0f}' if o in v else '–' for o in ('dinocls', 'tutorial', 'timm')]
        lines.append(f'| {f["phase"]} | {f["case"]["batch"]} | {number(median(base["rates"]))} | {" | ".join(against)} | {", ".join(peaks)} |')
    return lines


def report(found: dict) -> list[str]:
    "Return the tables of all that has been measured."
    any_part = next(iter(found.values()))
    h, v, size = any_part['hardware'], any_part['versions'], any_part['size']
    gpu = f'{h["gpu"]} ({h["gpu_memory_gb"]} GB)' if 'gpu' in h else 'none'
    lines = [f'# {size["model"]} at {size["side"]} with random weights on {h.get("gpu", "a CPU")}', '',
             f'{h["cpu"]}, {h["cores"]} cores, GPU: {gpu}; Python {v["python"]}, torch {v["torch"]}, timm {v["timm"]}. Medians, the GPU synchronised.', '']
    missing = [p for p in PARTS if p not in found]
    if missing: lines += [f'Not measured yet: {", ".join(missing)}.', '']
    if c := found.get('ceiling'):
        lines += ['Products of bf16 matrices: ' + ', '.join(f'{n}: {number(t)} TFLOP/s' for n, t in c['tflops'].items()) + f'; a copy moves {number(c["copy_tb"])} TB/s, read and written. '
                  f'One image forward takes {gflop(size["model"], size["side"]):.3g} GFLOP, three times that in training.', '', *shares(found), '']
    if phases(found, 1) + phases(found, 2): lines += [*others(found), '']
    steps = {f['case']['batch']: 1e3 * f['case']['batch'] / own_rate(f) for f in phases(found, 2)}  # ms
    for r in found.get('pipeline', {'rows': ()})['rows']:
        share = f', {100 * r["ms"] / steps[r["batch"]]:.1f} % of a step of phase 2' if r['batch'] in steps else ''
        lines.append(f'- Augmentation, mixing and resizing of a batch of {r["batch"]} take {r["ms"]:.2f} ms{share}.')
    if phases(found, 1) and phases(found, 2) and 'inference' in found:
        lines += [f'- The recipe `{name}` takes {recipe_minutes(name, found):.0f} minutes at these rates, in {found["inference"]["precision"]} (aim on a large GPU: {AIMS["minutes"]}).' for name in RECIPES]
    if m := found.get('memory'):
        lines += ['', '| phase | ' + ' | '.join(f'batch {b}' for b in size['memory']) + ' |', '|---|' + '---|' * len(size['memory'])]
        peaks = {(r['phase'], r['batch']): f'{r["peak_mb"]:,} MB' for r in m['rows']}
        lines += [f'| {which} | ' + ' | '.join(peaks.get((which, b), 'too much') for b in size['memory']) + ' |' for which in (1, 2)]
    if s := found.get('serve'):
        lines += ['', f'| served from, batch {s["rows"][0]["batch"]} | images/s | times the {REFERENCE} of the reference |', '|---|---|---|', *(f'| {r["input"]}, {r["backend"]} | {number(r["rate"])} | {r["rate"] / REFERENCE:.3g} |' for r in s['rows'] if 'rate' in r)]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}; all unless given')
    parser.add_argument('--minutes', type=float, default=9.5, help='end after so many')
    parser.add_argument('--out', type=Path, default=core.root()/'outputs'/'gpu', help='folder of the results')
    parser.add_argument('--tiny', action='store_true', help='a small model and few steps, to try the script on any machine')
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if {*args.parts} - {*PARTS}: parser.error(f'unknown part among {", ".join(args.parts)}')
    if args.inside: return measure(args.parts[0], args.out, args.tiny)
    if not GPU and not args.tiny: parser.error('there is no CUDA GPU here: --tiny tries the script without one')
    remaining = run([p for p in PARTS if p in (args.parts or PARTS)], args.out, args.tiny, time.monotonic() + 60 * args.minutes)
    found = {p: core.read_json(args.out/f'{p}.json') for p in PARTS if (args.out/f'{p}.json').exists()}
    if found:
        lines = report(found)
        with core.replacing(args.out/'gpu.md') as tmp: tmp.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        print('\n'.join(lines))
    print(f'Remaining: {", ".join(remaining)}; the same command goes on.' if remaining else f'All is measured: {args.out/"gpu.md"}')


if __name__ == '__main__': main()
