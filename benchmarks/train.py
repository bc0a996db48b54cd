"""Images a second and peak memory of both phases of training, beside a tutorial's loop and timm's training step.

    .venv/bin/python benchmarks/train.py [model …] [--rounds N]     writes benchmarks/train.md; up to 15 minutes on 2 cores, 2 for book-digits alone

Phase 1 trains the head on a frozen backbone, phase 2 everything; the model has random weights, the images are random, uint8, 32×32.
dinocls:   `train_epoch` as `fit` calls it: `Loader`, augmentation, MixUp and CutMix, clipping, averaged weights, in the precision that it chooses by
           itself, not compiled.
tutorial:  PIL and torchvision (padded crop, flip, colour, resize, Random Erasing) in a DataLoader with a worker for two cores, fp32, torch's AdamW, cross
           entropy with smoothed labels, the frozen part by `requires_grad=False`. Nothing is mixed, clipped or averaged.
timm:      timm's `create_loader` with PIL and as many workers, `Mixup`, `SoftTargetCrossEntropy`, `create_optimizer_v2`, `dispatch_clip_grad`, `ModelEmaV3`,
           fp32 on a CPU and bf16 on a GPU, as its train.py does with `--amp --amp-dtype bfloat16`.
Each variant has a process of its own, so that the peak of memory is its own; those of one phase take turns, an epoch each a round, while the others
sleep. The first round warms up and is not counted, nor are the first steps of an epoch where steps are short. Ratios are taken within a round.
"""
import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dinocls.kit import config, files, machine
from dinocls.kit.training import compiles
from dinocls.augment import MEAN, STD
from dinocls.data import Loader
from dinocls.model import autocast, classifier, precision
from dinocls.train import Divided, start, train_epoch

GPU, WORKERS, CLASSES = torch.cuda.is_available(), max(2, machine.cores() // 2), 10
DEVICE, SYNC = torch.device('cuda' if GPU else 'cpu'), torch.cuda.synchronize if GPU else lambda: None
FIELDS = ('model', 'side', 'batch', 'lead', 'steps', 'rounds', 'options')  # lead: steps of an epoch that are not counted; steps: those of phase 2 that are
CASES = [dict(zip(FIELDS, values)) for values in (
    [('book-digits', 32, 64, 8, 100, 5, True), ('dinov2_vits14', 224, 64, 4, 20, 5, True), ('dinov2_vitb14', 224, 64, 4, 20, 5, True), ('dinov2_vitb14', 224, 256, 4, 10, 5, True)] if GPU else
    [('book-digits', 32, 64, 8, 40, 5, True), ('dinov2_vits14', 224, 16, 0, 1, 3, True), ('dinov2_vitb14', 224, 8, 0, 1, 3, False)])]
STORED = dict(lead=8, steps=100)  # steps on stored embeddings are short, whatever the model
OPTIONS = {'compiled': {'compile': 'on'}, 'gradient checkpointing': {'gradient_checkpointing': True}, 'half a batch at once': {'micro_batch': 0.5}}
GFLOP = 46.3  # of ViT-B/14 at 224, an image forward; training takes three times as many (gpu.py)


def configuration(case):
    "Return the configuration of a case."
    changes = OPTIONS.get(case.get('variant'), {})
    if 'micro_batch' in changes: changes = {'micro_batch': case['batch'] // 2}
    return config.preset('reference', backbone=case['model'], weights='random', image_size=case['side'], batch_size=case['batch'], precision=case.get('precision', 'auto'), device=DEVICE.type, **changes)


def images(case):
    "Return an epoch of random images and labels."
    n, rng = case['batch'] * (case['lead'] + case['steps']), np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, CLASSES, n)


def ours(case):
    "Return a function that trains an epoch with this library, and calls its argument after each step."
    cfg = configuration(case)
    model = classifier(cfg, CLASSES)
    if case['phase'] == 1: model.freeze()
    loop = start(model, cfg, 100, case['lead'] + case['steps'], 1e-5, 1e-4)
    divided, where, (x, y) = Divided(loop.model, loop.accelerator), loop.accelerator.device, images(case)
    forward = loop.accelerator.prepare(divided)
    if case['variant'] == 'stored': x = torch.randn(len(x), model.backbone.num_features, device=where)
    source = Loader(x, y, cfg.batch_size, cfg.seed, where)

    def epoch(after_step):
        train_epoch(loop, forward, source, after_step)
        loop.epoch, loop.step, loop.losses = loop.epoch + 1, 0, None
    if compiles(cfg, where, 1): divided.embed[0] = torch.compile(loop.model.backbone)  # the first epoch compiles
    return epoch


class Pictures(torch.utils.data.Dataset):
    "Images, one at a time through Pillow and a transform."
    def __init__(self, x, y, transform=None): self.x, self.y, self.transform = x, y, transform
    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.x[i])), int(self.y[i])


def others_model(case):
    "Return the same model as others would hold it."
    model = classifier(configuration(case), CLASSES).to(DEVICE).train()
    model.backbone.requires_grad_(case['phase'] == 2)
    return model


def tutorial(case):
    "Return an epoch of the loop that a tutorial would write."
    from torchvision import transforms as T
    cfg, model = configuration(case), others_model(case)
    transform = T.Compose([T.RandomCrop(32, padding=cfg.crop), T.RandomHorizontalFlip(), T.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation),
                           T.Resize(cfg.image_size, T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing(cfg.erasing)])
    loader = torch.utils.data.DataLoader(Pictures(*images(case), transform), cfg.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=WORKERS > 0, pin_memory=GPU)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=cfg.weight_decay)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=cfg.label_smoothing)

    def epoch(after_step):
        for x, y in loader:
            x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
            optimiser.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimiser.step()
            after_step()
        loss.item()
    return epoch


def timms(case):
    "Return an epoch of timm's training step."
    from timm.data import Mixup, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, dispatch_clip_grad
    cfg, model = configuration(case), others_model(case)
    loader = create_loader(Pictures(*images(case)), (3, cfg.image_size, cfg.image_size), cfg.batch_size, is_training=True, re_prob=cfg.erasing, re_mode='pixel', color_jitter=cfg.brightness,
                           interpolation='bicubic', mean=MEAN, std=STD, num_workers=WORKERS, pin_memory=GPU, device=DEVICE)  # its workers stay unless told otherwise
    mixup = Mixup(cfg.mixup, cfg.cutmix, label_smoothing=cfg.label_smoothing, num_classes=CLASSES)
    optimiser, loss_of = create_optimizer_v2(model, 'adamw', lr=1e-5, weight_decay=cfg.weight_decay), SoftTargetCrossEntropy()
    ema, updates = ModelEmaV3(model, decay=cfg.ema_decay, use_warmup=cfg.ema_warmup), 0

    def epoch(after_step):
        nonlocal updates
        for x, y in loader:
            x, y = mixup(x, y)
            with torch.autocast('cuda', torch.bfloat16) if GPU else contextlib.nullcontext(): loss = loss_of(model(x), y)
            loss.backward()
            dispatch_clip_grad(model.parameters(), cfg.clip_norm)
            optimiser.step()
            optimiser.zero_grad()
            updates += 1
            ema.update(model, step=updates)
            after_step()
        loss.item()
    return epoch


def turn(epoch, case) -> dict:
    "Train an epoch; return images a second after the first steps, and the seconds of all."
    done, begun = 0, time.perf_counter()
    clock = begun

    def after_step():
        nonlocal done, clock
        done += 1
        if done == case['lead']: SYNC(); clock = time.perf_counter()
    epoch(after_step)
    SYNC()
    end = time.perf_counter()
    assert done == case['lead'] + case['steps']
    if GPU: torch.cuda.empty_cache()  # for those whose turn is next
    return {'rate': case['batch'] * case['steps'] / (end - clock), 'seconds': end - begun}


def measure(case):
    "In a process of its own: take a turn for each line that comes in, at last tell the peak of memory."
    import psutil
    torch.set_num_threads(case['threads'])
    say = lambda **what: print(json.dumps(what), flush=True)
    before = psutil.Process().memory_info().rss / 2**20
    epoch = {'tutorial': tutorial, 'timm': timms}.get(case['variant'], ours)(case)
    say(before=before, precision=precision(configuration(case), DEVICE))
    for _ in sys.stdin: say(**turn(epoch, case))
    say(peak=machine.peak_memory()['gpu' if GPU else 'resident'])


def patches(case):
    "In a process of its own: tell the milliseconds of the patch embedding, forward and backward, in both memory formats."
    torch.set_num_threads(case['threads'])
    cfg, found = configuration(case), {'contiguous_format': [], 'channels_last': []}
    embed, x = classifier(cfg, CLASSES).backbone.patch_embed.to(DEVICE), torch.randn(case['batch'], 3, case['side'], case['side'], device=DEVICE)
    for _ in range(22):
        for name, times in found.items():
            kept = getattr(torch, name)
            embed.to(memory_format=kept)
            SYNC()
            clock = time.perf_counter()
            with autocast(cfg, DEVICE): y = embed(x.contiguous(memory_format=kept))
            y.float().sum().backward()
            SYNC()
            times.append(1e3 * (time.perf_counter() - clock))
    print(json.dumps({name: median(times[2:]) for name, times in found.items()}), flush=True)


def child(work: str, case: dict):
    "Start a process for one variant."
    return subprocess.Popen([sys.executable, __file__, work, json.dumps(case)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process, ask: bool = True) -> dict:
    "Return the next thing that a process tells; nothing if it has failed."
    with contextlib.suppress(BrokenPipeError):
        if ask: print(file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith('{'): return json.loads(line)
        print(line, end='')
    return {}


def compare(case: dict, phase: int) -> dict:  # variant → {'rates': images a second in each counted round, 'seconds': of each epoch, the first one too, 'peak', …}
    "Let the variants of a phase take turns; those that fail are left out."
    names = ['dinocls', 'tutorial', 'timm', *(['stored'] * case.get('stored', True) if phase == 1 else OPTIONS if case['options'] else [])]
    cases = {name: {**case, 'variant': name, 'phase': phase, **(STORED if name == 'stored' else {'steps': case['steps'] * (2 if phase == 1 else 1)})} for name in names}
    processes = {name: child('measure', cases[name]) for name in names}
    try:
        found = {name: answer(process, ask=False) | {'rates': [], 'seconds': []} for name, process in processes.items()}
        for turns in range(case['rounds'] + 1):
            for name in names[turns % len(names):] + names[:turns % len(names)]:  # nobody always comes first
                told = answer(processes[name])
                found[name]['rates'].append(told.get('rate')), found[name]['seconds'].append(told.get('seconds'))
                print(f'{case["model"]}, batch {case["batch"]}, phase {phase}, round {turns}: {name} {number(found[name]["rates"][-1] or 0)} images/s', flush=True)
        for name, process in processes.items():
            process.stdin.close()
            found[name] |= answer(process, ask=False)
            found[name]['rates'].pop(0)  # the round that warms up
    finally:
        for process in processes.values(): process.kill(), process.wait()
    return {name: f for name, f in found.items() if all(f['rates']) and 'peak' in f}


def ratios(above: list, below: list) -> str:
    "Return the median of ratios, and their range."
    r = [a / b for a, b in zip(above, below)]
    return f'{median(r):.2f}× ({min(r):.2f} – {max(r):.2f})'


def number(value: float) -> str: return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def tables(found: list) -> list[str]:  # of (case, phase, what `compare` returns)
    "Return the comparison with others, and what the options change."
    title = lambda case: f'{case["model"]}, {case["side"]} px, batch {case["batch"]}'
    rows = ['| model | phase | variant | images/s, median | dinocls is faster by (range over rounds) | peak memory (MB) | of that of dinocls |', '|---|---|---|---|---|---|---|']
    more = ['| model | phase | dinocls | images/s, median | speed, of that without (range over rounds) | peak memory (MB) | of that without |', '|---|---|---|---|---|---|---|']
    for case, phase, variants in found:
        base = variants['dinocls']
        for name in ('dinocls', 'tutorial', 'timm'):
            if not (v := variants.get(name)): rows.append(f'| {title(case)} | {phase} | {name} | fails here | | | |'); continue
            rows.append(f'| {title(case)} | {phase} | {name}{", " + v["precision"] if name == "dinocls" else ""} | {number(median(v["rates"]))} | {ratios(base["rates"], v["rates"])} | {v["peak"]:,.0f} | {v["peak"] / base["peak"]:.2f}× |')
        for name in ('stored',) if phase == 1 else OPTIONS if case['options'] else ():
            label = {'stored': 'nothing varied, from stored embeddings'}.get(name, name)
            if not (v := variants.get(name)): more.append(f'| {title(case)} | {phase} | {label} | fails here | | | |'); continue
            more.append(f'| {title(case)} | {phase} | {label} | {number(median(v["rates"]))} | {ratios(v["rates"], base["rates"])} | {v["peak"]:,.0f} | {v["peak"] / base["peak"]:.2f}× |')
    return [*rows, '', 'What the options of dinocls change:', '', *more]


def remarks(found: list) -> list[str]:
    "Return what the tables do not hold: epochs a second, the time that compiling takes, the patch embedding in channels_last."
    lines = []
    for case, phase, variants in found:
        name, base = f'{case["model"]}, batch {case["batch"]}', median(variants['dinocls']['rates'])
        if 'stored' in variants:
            lines.append(f'- {name}: phase 1 makes {median(variants["stored"]["rates"]) / 1000:.3g} epochs of 1,000 images a second from stored embeddings, {base / 1000:.3g} through the backbone.')
        if 'compiled' in variants:
            first, *later = variants['compiled']['seconds']
            lines.append(f'- {name}: the epoch that compiled took {first - median(later):.0f} s longer than those after it.')
        if phase == 2:
            ms = answer(child('patches', case), ask=False)
            lines.append(f'- {name}: the patch embedding takes {ms["contiguous_format"]:.2f} ms forward and backward as it is, {ms["channels_last"]:.2f} ms in channels_last, of a step of {1e3 * case["batch"] / base:,.0f} ms.')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', help=f'of {", ".join(dict.fromkeys(c["model"] for c in CASES))}; all unless given')
    parser.add_argument('--rounds', type=int, help='counted rounds; 3 to 5 unless given')
    parser.add_argument('--steps', type=int, help='counted steps of an epoch of phase 2, and as many that are not; for a quick look')
    parser.add_argument('--threads', type=int, default=machine.cores())
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    cases = [c | {'threads': args.threads, 'rounds': args.rounds or c['rounds']} | ({'lead': args.steps, 'steps': args.steps} if args.steps else {}) for c in CASES if c['model'] in (args.models or c['model'])]
    if {*args.models} - {c['model'] for c in cases}: parser.error(f'unknown model among {args.models}')
    clock = time.perf_counter()
    found = [(case, phase, compare(case, phase)) for case in cases for phase in (1, 2)]
    h, v = machine.hardware(), machine.versions()
    before = median([f['before'] for _, _, variants in found for f in variants.values()])
    counted = '; '.join(f'{c["model"]}: {c["rounds"]} rounds of {2 * c["steps"]} steps in phase 1, {c["steps"]} in phase 2' for c in cases)
    lines = ['# Training, beside a tutorial\'s loop and timm\'s training step', '',
             f'{h["cpu"]}, {args.threads} threads, {h["memory_gb"]} GB, GPU: {h.get("gpu", "none")}; Python {v["python"]}, {", ".join(f"{k} {v[k]}" for k in ("torch", "torchvision", "timm", "accelerate"))}. {counted}. It took {(time.perf_counter() - clock) / 60:.0f} minutes.', '',
             'The variants are described in `train.py`. Peak memory is that of ' + ('what torch allocated on the GPU.' if GPU else f'the process, without the workers of a DataLoader; importing what all need takes {before:.0f} MB of it.'), '',
             *tables(found), '', *remarks(found)]
    with files.replacing(args.out) as out: out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))


if __name__ == '__main__':
    if sys.argv[1:2] and sys.argv[1] in ('measure', 'patches'): globals()[sys.argv[1]](json.loads(sys.argv[2]))
    else: main()
