"""Which recipe pre-trains book-cifar best for the same work? Choices tried one at a time on 5,000 photographs, scored frozen on validation.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/recipe.py [--minutes 75] [--data FOLDER]     goes on where it stopped; 8 minutes a try

Every try may spend the same FLOPs, counted by `step_flops` (teacher included), which `EPOCHS` of the first one take; the epochs of another
follow, rounded up. Method and stem come first; the better of them is then changed in one thing at a time, and last in all that helped at once.
Scored on all validation images by k-NN (20 and 3 neighbours) and by the linear probe, whose strength is chosen on the same images; the test set is
not read. One thread, bf16, one seed: differences below two points mean little. Each row is written into the record, which ships with the package, as
soon as it is there. Attention is not fused: on the CPU, going back through the fused one takes longer than all else.
"""
import argparse
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

if __name__ == '__main__': os.environ.setdefault('TIMM_FUSED_ATTN', '0')  # before timm is imported

import torch

from dinocls.kit import config, fetch, files, machine
from dinocls import stats
from dinocls.data import load_split
from dinocls.model import BACKBONES, infer, outline, random_backbone
from dinocls.pretrain import embedding_spread, local_size, projection_head, self_supervise
from dinocls.probe import knn, linear_probe

RECORD = fetch.shipped('book-cifar').with_name('book-cifar-recipe.json')
EPOCHS, SPEC = 4, BACKBONES['book-cifar']
BASE = dict(dataset='cifar10', train_size=5000, val_size=5000, test_size=0, backbone='book-cifar', image_size=32,
            seed=42, precision='bf16', device='cpu',
            pretrain_method='simclr', pretrain_batch=128, pretrain_lr=1e-3, projection=(512, 64),
            contrast_temperature=0.2,
            prototypes=1024, centring='sinkhorn', teacher_temperature=0.05, teacher_momentum=0.9, local_views=0,
            koleo=0.0, patch_loss=0.0,
            view_zoom=(0.45, 1.0), view_aspect=0.15, view_flip=True, view_brightness=0.4, view_contrast=0.4,
            view_saturation=0.4, view_hue=0.0,
            view_grey=0.2, view_start=0.4, view_ramp=0.5)
PLAIN = {'stem': ()}  # in place of the stem that book-cifar has
FIRST = {'SimCLR, plain patches': PLAIN, 'SimCLR, convolutional stem': {},
         'DINO, convolutional stem': {'pretrain_method': 'dino'}}
THEN = {'temperature 0.5': {'contrast_temperature': 0.5}, 'rate × 3': {'pretrain_lr': 3e-3},
        'hue as well': {'view_hue': 0.1},
        'average at one momentum': {'teacher_rise': False}, 'batch 256': {'pretrain_batch': 256},
        'twice the colour jitter': {'view_brightness': 0.8, 'view_contrast': 0.8, 'view_saturation': 0.8,
                                    'view_hue': 0.2},
        'full strength from the start': {'view_start': 1.0}, 'rate ÷ 3': {'pretrain_lr': 1e-3 / 3},
        'temperature 0.1': {'contrast_temperature': 0.1},
        'batch 64': {'pretrain_batch': 64}, 'another seed': {'seed': 43}}
# where there is a teacher, in place of temperatures
LOCAL = {'4 local views': {'local_views': 4}, 'no teacher’s balancing': {'centring': 'mean'}}


def blocks_flops(spec, n: int) -> int:  # tokens
    "Return the FLOPs of a backbone's blocks forward: 24·n·d² + 4·n²·d each (Hoffmann et al. 2022, appendix F)."
    return spec.depth * (24 * n * spec.dim ** 2 + 4 * n ** 2 * spec.dim)


def forward_flops(cfg, side: int) -> int:
    """Return the FLOPs of one view forward: 24·n·d² + 4·n²·d a block (Hoffmann et al. 2022, appendix F), the stem's
    convolutions, the head."""
    spec, body, stem = BACKBONES[cfg.backbone], outline(cfg.backbone, side), 0
    n, h = 1 + spec.registers + body.patch_embed.num_patches, side
    for conv in (m for m in body.patch_embed.modules() if isinstance(m, torch.nn.Conv2d)):
        h //= conv.stride[0]
        stem += 2 * conv.weight.numel() * h * h
    with torch.device('meta'): head = projection_head(cfg, spec.dim)
    head = sum(2 * p.numel() for p in head.parameters() if p.ndim > 1)
    return blocks_flops(spec, n) + stem + head


def step_flops(cfg, images: int = 1) -> int:
    "Return the FLOPs of one step: the student three times a forward pass (Kaplan et al. 2020, section 2.1), a teacher once."
    teacher = cfg.pretrain_method != 'simclr'
    local = cfg.local_views * 3 * forward_flops(cfg, local_size(cfg)) if cfg.local_views and teacher else 0
    return images * (2 * (3 + teacher) * forward_flops(cfg, cfg.image_size) + local)


def config_of(changes: dict, data: str):
    "Return the configuration of a try, and give book-cifar its stem."
    fields = BASE | {k: v for k, v in changes.items() if k != 'stem'}
    BACKBONES['book-cifar'] = replace(SPEC, stem=changes.get('stem', SPEC.stem))
    return config.preset('cifar', **fields, data_root=data, out=tempfile.gettempdir() + '/recipe')


def epochs_of(changes: dict, data: str) -> int:
    "Return the epochs that spend what the first try spends; the stem's own 3 % take none away."
    cost = lambda changes: step_flops(config_of(changes, data))
    return math.ceil(0.96 * EPOCHS * cost(PLAIN) / cost(changes))


def parts(cfg) -> tuple[dict, dict]:
    "Return the images and the labels of training and validation."
    found = {s: load_split(cfg, s) for s in ('train', 'val')}
    return {s: x for s, (x, _) in found.items()}, {s: y.numpy() for s, (_, y) in found.items()}


def score(feats: dict, labels: dict) -> dict:
    "Return accuracies on validation with their Wilson intervals."
    n = len(labels['val'])
    right = {f'knn{k}': float((knn(feats['train'], labels['train'], feats['val'], k) == labels['val']).mean())
             for k in (20, 3)}
    right['linear'] = linear_probe(feats['train'], labels['train'], feats['val'], labels['val'])['val_accuracy']
    return {'n': n, **right, **{f'{k}_interval': stats.wilson(v, n) for k, v in right.items()}}


def attempt(name: str, changes: dict, data: str) -> dict:
    "Pre-train and score one try; return its row."
    epochs = epochs_of(changes, data)
    cfg = config_of(changes | {'pretrain_epochs': epochs}, data)
    images, labels = parts(cfg)
    last, clock, cpu = {}, time.perf_counter(), time.process_time()

    def keep(method, row, total):
        last.update(row)
        print(f'  {name}: epoch {row["epoch"]} of {total}, loss {row["loss"]:.3f}, {time.perf_counter() - clock:.0f} s', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        weights = self_supervise(images['train'], cfg, Path(folder), on_epoch=keep)['weights']
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    body = random_backbone(cfg.backbone, cfg.image_size)
    body.load_state_dict(weights)
    feats = {s: infer(body, x, cfg) for s, x in images.items()}
    return {'name': name, 'changes': changes, 'epochs': epochs, 'steps': epochs * (len(images['train']) // cfg.pretrain_batch),
            'tflops': step_flops(cfg, epochs * len(images['train'])) / 1e12, 'parameters': sum(p.numel() for p in body.parameters()), 'loss': last['loss'],
            'spread': embedding_spread(feats['val']), **score(feats, labels), 'seconds': round(seconds, 1), 'cpu_seconds': round(cpu, 1)}


def untrained(data: str) -> list[dict]:
    "Return what raw pixels score, and random weights with either stem."
    images, labels = parts(config_of({}, data))
    found = {'raw pixels': {s: x.flatten(1).float().numpy() / 255 for s, x in images.items()}}
    for name, changes in (('random weights, convolutional stem', {}), ('random weights, plain patches', PLAIN)):
        cfg = config_of(changes, data)
        torch.manual_seed(cfg.seed)
        body = random_backbone(cfg.backbone, cfg.image_size)
        found[name] = {s: infer(body, x, cfg) for s, x in images.items()}
    return [{'name': name, 'changes': {}, 'epochs': 0, 'steps': 0, 'tflops': 0.0, 'seconds': 0.0,
             **score(feats, labels)} for name, feats in found.items()]


def worth(row: dict) -> float: return row['knn20'] + row['linear']


def tries(rows: dict):
    "Yield name and changes of each try in turn, as far as what is known decides it."
    yield from FIRST.items()
    best = max((rows[n] for n in FIRST if n in rows), key=worth)
    dino = best['changes'].get('pretrain_method') == 'dino'
    for name, changes in (LOCAL | {k: v for k, v in THEN.items() if 'contrast_temperature' not in v} if dino
                          else THEN).items():
        yield name, best['changes'] | changes
    gain, together = {}, {}
    for name, changes in THEN.items():
        if name in rows and 'seed' not in changes and worth(rows[name]) > worth(best) + 0.02:
            for k, v in changes.items():
                if worth(rows[name]) > gain.get(k, 0): gain[k], together[k] = worth(rows[name]), v
    if len(together) > 1: yield 'all that helped', best['changes'] | together


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=75, help='no try begins after these')
    parser.add_argument('--data', default='', help='folder of CIFAR-10')
    parser.add_argument('--record', type=Path, default=RECORD)
    args, began = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    core_facts = {'versions': machine.versions(), 'hardware': machine.hardware(), 'threads': 1, 'seed': BASE['seed'],
                  'base': {k: v for k, v in BASE.items() if k != 'device'}, 'base_epochs': EPOCHS}
    rows = {}
    if args.record.exists():
        known = files.read_json(args.record)
        if files.digest(known['base']) == files.digest(files.plain(core_facts['base'])) and known['base_epochs'] == EPOCHS:
            rows = {r['name']: r for r in known['rows']}

    def write(): files.write_json(args.record, core_facts | {'rows': list(rows.values())})

    for name, changes in tries(rows):
        if name in rows: continue
        if time.monotonic() - began > 60 * args.minutes: break
        rows[name] = attempt(name, changes, args.data)
        write()
        r = rows[name]
        print(f'{name}: 20-NN {100 * r["knn20"]:.2f} %, linear {100 * r["linear"]:.2f} %, {r["seconds"]:.0f} s',
              flush=True)
    if 'raw pixels' not in rows:
        rows |= {r['name']: r for r in untrained(args.data)}
        write()


if __name__ == '__main__': main()
