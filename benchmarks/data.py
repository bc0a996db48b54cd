"""Images a second from stored 32×32 uint8 to prepared 224×224 batches, beside what one would do otherwise; and memory.

    .venv/bin/python benchmarks/data.py [rounds]     writes benchmarks/data.md; 2 to 3 minutes on 2 cores

All variants make the recipe's augmentations: padded crop, flip, brightness, contrast and saturation by 1 ± 0.2, bicubic
resize to 224, normalisation, Random Erasing with probability 0.25. They take turns in every round, each starting
idle with its workers up, and go through the same images; the first round warms up and is not counted. Ratios are taken
within a round. kornia is no dependency: where it can be imported it takes part, as after
`pip install --target /tmp/kornia --no-deps kornia kornia_rs` with PYTHONPATH=/tmp/kornia.
"""
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dinocls.kit import config, files, machine
from dinocls.augment import MEAN, STD, augment, preprocess
from dinocls.data import Loader

BATCH, STEPS, SIDE, WORKERS = 64, 16, 224, 2
CFG = config.preset('reference', brightness=0.2, contrast=0.2, saturation=0.2, erasing=0.25, batch_size=BATCH,
                    image_size=SIDE)
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)
LABELS = np.zeros(len(IMAGES), np.int64)
AIMS = {'PIL, jitter after the resize': 5, 'PIL, jitter before the resize': 2, 'kornia, resize last': 4}


class Pictures(torch.utils.data.Dataset):
    "The images, one at a time through Pillow and torchvision's transforms."
    def __init__(self, transform): self.transform = transform
    def __len__(self): return len(IMAGES)

    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(IMAGES[i])), LABELS[i]


def pil(jitter_first: bool, workers: int = WORKERS):
    "Return an epoch of the usual pipeline: a DataLoader whose workers stay."
    from torchvision import transforms as T
    jitter, resize = T.ColorJitter(CFG.brightness, CFG.contrast, CFG.saturation), T.Resize(SIDE,
        T.InterpolationMode.BICUBIC)
    steps = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(),
             *((jitter, resize) if jitter_first else (resize, jitter)),
             T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing(CFG.erasing)]
    loader = torch.utils.data.DataLoader(Pictures(T.Compose(steps)), BATCH, shuffle=True, drop_last=True,
                                         num_workers=workers, persistent_workers=workers > 0)
    return lambda epoch: loader


def ours(reuse: bool):
    "Return an epoch of this library's pipeline, which writes each batch over the last or takes fresh memory for it."
    loader, ready = Loader(IMAGES, LABELS, BATCH, seed=0), None

    def epoch(number):
        nonlocal ready
        generator = torch.Generator().manual_seed(number)
        for x, y in loader.epoch(number):
            ready = preprocess(augment(x, CFG, generator), CFG, out=ready if reuse else None)
            yield ready, y
    return epoch


def kornia(resize_first: bool):
    "Return an epoch of kornia's batched augmentations in the main process, or None where it is not installed."
    try: import kornia.augmentation as K
    except ImportError: return None
    crop, resize = K.RandomCrop((32, 32), padding=4), K.Resize((SIDE, SIDE), resample='bicubic', align_corners=False)
    vary = [K.RandomHorizontalFlip(), K.ColorJitter(CFG.brightness, CFG.contrast, CFG.saturation, p=1.0),
            K.RandomErasing((0.02, 0.33), (0.3, 3.3), p=CFG.erasing)]
    steps = torch.nn.Sequential(crop, *((resize, *vary) if resize_first else (*vary, resize)),
                                K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    loader = Loader(IMAGES, LABELS, BATCH, seed=0)

    def epoch(number):
        for x, y in loader.epoch(number): yield steps(x.float() / 255), y
    return epoch


def seconds(epoch, number: int) -> float:
    "Go through one epoch; return its seconds."
    clock, images = time.perf_counter(), 0
    for x, _ in epoch(number):
        assert x.shape == (BATCH, 3, SIDE, SIDE)
        images += len(x)
    assert images == len(IMAGES)
    return time.perf_counter() - clock


def cpu_time(epoch, steps: int = 8) -> float:
    "Return the processor's milliseconds an image, on one thread of this process: what other work on the machine changes little."
    threads, batches = torch.get_num_threads(), iter(epoch(0))
    torch.set_num_threads(1)
    for _ in range(3): next(batches)
    clock = time.process_time()
    for _ in range(steps): next(batches)
    clock = time.process_time() - clock
    torch.set_num_threads(threads)
    return 1e3 * clock / steps / BATCH


def compare(rounds: int) -> tuple[dict, dict]:  # name → seconds of each counted round, or None; name → milliseconds of processor time an image
    "Let the variants take turns."
    variants = {'dinocls, each batch written over the last': ours(True),
                'dinocls, fresh memory for each batch': ours(False), 'PIL, jitter after the resize': pil(False),
                'PIL, jitter before the resize': pil(True),
                'kornia, resize last': kornia(False), 'kornia, resize first': kornia(True)}
    times = {name: [] if epoch else None for name, epoch in variants.items()}
    ready = [name for name in variants if times[name] is not None]
    for number in range(rounds + 1):
        for name in ready[number % len(ready):] + ready[:number % len(ready)]:  # nobody always comes first
            times[name].append(seconds(variants[name], number))
            print(f'round {number}: {name} {len(IMAGES) / times[name][-1]:,.0f} images/s', flush=True)
    alone = {'PIL, jitter after the resize': pil(False, 0), 'PIL, jitter before the resize': pil(True, 0)}
    return {name: t and t[1:] for name, t in times.items()}, {name: cpu_time(alone.get(name, variants[name]))
                                                              for name in ready}


def parts(rounds: int = 20) -> dict:  # what → milliseconds a batch, the median
    "Time what our pipeline consists of, and torch's own resize in place of ours."
    import torch.nn.functional as F
    (x, _), generator = next(Loader(IMAGES, LABELS, BATCH, seed=0).epoch(0)), torch.Generator().manual_seed(0)
    varied, (mean, std) = augment(x, CFG, generator), (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    plain = lambda: (F.interpolate(varied, (SIDE, SIDE), mode='bicubic').clamp(0, 1) - mean) / std
    assert (plain() - preprocess(varied, CFG)).abs().max() < 1e-4
    last = preprocess(varied, CFG)
    what = {'augment, at 32×32': lambda: augment(x, CFG, generator),
            'preprocess (resize by two products, normalise)': lambda: preprocess(varied, CFG),
            'preprocess, written over the last batch': lambda: preprocess(varied, CFG, out=last),
            'the same by F.interpolate': plain,
            'for comparison: filling as much fresh memory': lambda: torch.empty(BATCH, 3, SIDE, SIDE).fill_(0)}
    found = {name: [] for name in what}
    for _ in range(rounds):
        for name, f in what.items():
            clock = time.perf_counter()
            f()
            found[name].append(1e3 * (time.perf_counter() - clock))
    return {name: median(t[2:]) for name, t in found.items()}


def memory():
    "Print MB of a set of CIFAR-10's size, and by how much the peak grows when a Loader takes it from memory and works on it."
    def work(images, steps):
        generator = torch.Generator().manual_seed(0)
        for _, (x, _) in zip(range(steps), Loader(images, np.zeros(len(images), np.int64), BATCH, seed=0).epoch(0)):
            preprocess(augment(x, CFG, generator), CFG)

    work(IMAGES, 5)
    images = np.random.default_rng(0).integers(0, 256, (60_000, 32, 32, 3), dtype=np.uint8)
    peak = lambda: machine.peak_memory()['resident'] * 2**20 / 1e6
    before = peak()
    work(images, 50)
    print(f'{images.nbytes / 1e6:.0f} {peak() - before:.0f}')


def on_gpu() -> list[str]:
    "Return what the pipeline takes of a training step of ViT-B/14 in bf16 on this GPU, as lines of the report."
    from dinocls.augment import mix
    from dinocls.model import backbone
    if not torch.cuda.is_available():
        return ['No GPU was at hand: the share of a ViT-B/14 training step (aim: at most 3 %) is not measured.']
    loader, generator = Loader(IMAGES, LABELS, BATCH, seed=0, device='cuda'), torch.Generator().manual_seed(0)
    model = backbone('dinov2_vitb14', SIDE, 'random').cuda().train()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = next(loader.epoch(0))
    data = lambda: preprocess(mix(augment(x, CFG, generator), y, CFG, generator)[0], CFG)
    ready = data()

    def step():
        with torch.autocast('cuda', dtype=torch.bfloat16): loss = model(ready).square().mean()
        loss.backward(), optimiser.step(), optimiser.zero_grad()

    def timed(f, n=30):
        for _ in range(5): f()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(n): f()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - clock) / n
    ours, theirs = timed(data), timed(step)
    return ([f'On the GPU a batch takes {ours:.2f} ms with MixUp and CutMix, {100 * ours / theirs:.1f} % of a training step of ViT-B/14 in bf16 ({theirs:.1f} ms); aim: at most 3 %.'])


def table(times: dict, cpu: dict) -> list[str]:
    "Return the rows of the comparison."
    reused, fresh, *_ = times.values()
    against = lambda t, ours: (lambda r: f'{median(r):.1f}× ({min(r):.1f} – {max(r):.1f})')([theirs / mine
        for theirs, mine in zip(t, ours)])
    rows = (['| pipeline | images/s, median | dinocls is faster by (range over rounds) | with fresh memory for each batch | aim | processor time an image (ms) |', '|---|---|---|---|---|---|'])
    aim = lambda name: f'{AIMS[name]}×' if name in AIMS else ''
    for name, t in times.items():
        if t is None: rows.append(f'| {name} | not installed | | | {aim(name)} | |')
        else:
            rows.append(f'| {name} | {len(IMAGES) / median(t):,.0f} | {against(t, reused)} | {against(t, fresh)} | {aim(name)} | {cpu[name]:.2f} |')
    return rows


def main(rounds: int):
    torch.set_num_threads(os.cpu_count() if not hasattr(os, 'sched_getaffinity') else len(os.sched_getaffinity(0)))
    (times, cpu), pieces = compare(rounds), parts()
    size, growth = subprocess.run([sys.executable, __file__, 'memory'], check=True, capture_output=True,
                                  text=True).stdout.split()
    import PIL
    import torchvision
    h, v = machine.hardware(), {'torch': torch.__version__, 'torchvision': torchvision.__version__,
                                'Pillow': PIL.__version__}
    if times['kornia, resize last']: v['kornia'] = __import__('kornia').__version__
    lines = ['# From stored images to batches for the model', '',
             f'{h["cpu"]}, {torch.get_num_threads()} threads, {h["memory_gb"]} GB, GPU: {h.get("gpu", "none")}; {", ".join(f"{k} {n}" for k, n in v.items())}. '
             f'{rounds} rounds of {len(IMAGES):,} random images of 32×32, batches of {BATCH}, {SIDE} px; Pillow in a DataLoader with {WORKERS} workers that stay, the others in the main process.', '',
             *table(times, cpu), '', 'Processor time is that of one thread, without the workers, which cost a DataLoader a little more.', '', 'What a batch of ours takes:', '', '| | ms |', '|---|---|', *(f'| {name} | {ms:.1f} |' for name, ms in pieces.items()), '',
             f'Memory: {size} MB of images in memory; handing them to a `Loader` and taking 50 batches raises the peak by {growth} MB.', '', *on_gpu()]
    with files.replacing(Path(__file__).with_suffix('.md')) as out:
        out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))


if __name__ == '__main__':
    if sys.argv[1:] == ['memory']: memory()
    else: main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
