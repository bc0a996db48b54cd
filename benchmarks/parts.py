"""What the book's work on CIFAR-10 beside training takes: seconds and memory of each part at the sizes of preset `cifar`, on this machine's CPU.

    python benchmarks/parts.py [--root FOLDER] [part …]

Each part runs in a process of its own, on all 45,000 training, 5,000 validation and 10,000 test images. Features are random numbers in a few directions for
each class, as wide as the backbone's, since what searching and fitting costs hardly depends on them; the networks' answers to corrupted images are random
too. Writes `parts.md` beside this file.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dinocls.kit import config, machine
from dinocls.model import BACKBONES

LIMIT = 4 * 2**10  # MB that no chapter may take


def configuration(root: str, out: str): return config.preset('cifar', data_root=root, out=out)


def made_up(cfg) -> tuple[dict, dict]:  # split → features (n, dim), labels (n,)
    "Return features that a linear probe gets mostly right, and the labels."
    from dinocls.data import load_split
    rng, dim = np.random.default_rng(0), BACKBONES[cfg.backbone].dim
    labels = {s: load_split(cfg, s)[1].numpy() for s in ('train', 'val', 'test')}
    centres = rng.normal(size=(10, dim)).astype(np.float32)
    return {s: centres[y] + 4 * rng.normal(size=(len(y), dim)).astype(np.float32) for s, y in labels.items()}, labels


def splits(cfg):
    "1 · load, split, check for overlap and drift"
    from dinocls.data import splits as stage
    stage(cfg)

def look_alikes(cfg):
    "1 · look-alikes between the splits, mirrored too"
    from dinocls.data import look_alikes as stage
    stage(cfg)

def pixels(cfg):
    "8 · raw pixels: k-NN and linear probe, four strengths"
    from dinocls.probe import pixels as raw, probe_one
    _, labels = made_up(cfg)
    probe_one(raw(cfg), labels, cfg.knn_k)

def features(cfg):
    "8 · features: k-NN, its curve, linear probe, SGD probe"
    from dinocls.probe import knn_curve, probe_one, sgd_probe
    feats, labels = made_up(cfg)
    probe_one(feats, labels, cfg.knn_k)
    knn_curve(feats['train'], labels['train'], feats['val'], labels['val'], temperatures=(None, 0.07))
    sgd_probe(feats['train'], labels['train'], feats['val'], labels['val'], feats['test'])

def few_shot(cfg):
    "8 · few labels: 1 to 50 a class, 5 draws, raw pixels and features"
    from dinocls.probe import few_shot as probe, pixels as raw
    feats, labels = made_up(cfg)
    for some in (feats, raw(cfg)): probe(some, labels)

def layouts(cfg):
    "8 · maps by PCA and t-SNE"
    from dinocls.probe import layouts as stage
    stage(made_up(cfg)[0]['test'])

def suspects(cfg):
    "10 · suspect labels among the test images"
    from scipy.special import softmax
    from dinocls.errors import label_suspects, planted
    feats, labels = made_up(cfg)
    p = softmax(feats['test'][:, :10] + 3 * np.eye(10)[labels['test']], axis=1)
    label_suspects(p, labels['test']), planted(p, labels['test'])

def corruptions(cfg):
    "12 · 19 corruptions at 5 severities of 10,000 images, and what both probes say of them"
    from dinocls import robustness
    from dinocls.data import load_split
    feats, _ = made_up(cfg)
    rng, dim = np.random.default_rng(0), BACKBONES[cfg.backbone].dim
    names = [m for m in robustness.MODELS if m not in ('knn', 'linear')]
    def answers(nets, images, cfg):
        return {'feats': rng.normal(size=(len(images), dim)).astype(np.float32),
                **{f'{m}_guess': rng.integers(0, 10, len(images)).astype(np.int16) for m in names},
                **{f'{m}_confidence': rng.random(len(images), np.float32) for m in names}}
    robustness.contenders, robustness.answers, robustness.features = lambda cfg: None, answers, lambda cfg: feats
    images = load_split(cfg, 'test')[0]
    sets = {'clean': lambda: images, **{n: lambda n=n: robustness.all_severities(images, n, cfg.seed)
                                        for n in robustness.CORRUPTIONS}}
    robustness.judge(cfg, sets, Path(cfg.out))


PARTS = {f.__name__: f for f in (splits, look_alikes, pixels, features, few_shot, layouts, suspects, corruptions)}


def inside(name: str, root: str):
    "Measure one part in this process, and print the result."
    with tempfile.TemporaryDirectory() as tmp:
        cfg = configuration(root, tmp)
        if name != 'splits': PARTS['splits'](cfg)  # what each other part finds stored
        before, clock, cpu = machine.peak_memory()['resident'], time.perf_counter(), time.process_time()
        PARTS[name](cfg)
        print(json.dumps({'seconds': time.perf_counter() - clock, 'cpu': time.process_time() - cpu,
                          'mb': machine.peak_memory()['resident'], 'before': before}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}; all unless given')
    parser.add_argument('--root', default='', help='folder of the data, as data_root')
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if {*args.parts} - {*PARTS}: parser.error(f'unknown part among {", ".join(args.parts)}')
    if args.inside: return inside(args.parts[0], args.root)
    rows = []
    for name in args.parts or PARTS:
        done = subprocess.run([sys.executable, __file__, name, '--inside', '--root', args.root], capture_output=True,
                              text=True)
        if done.returncode: sys.exit(f'{name} failed:\n{done.stderr[-2000:]}')
        r = json.loads(done.stdout.splitlines()[-1])
        rows.append(f'| {PARTS[name].__doc__} | {r["seconds"]:.0f} | {r["cpu"]:.0f} | {r["mb"]:,}{" (more than it may)" if r["mb"] > LIMIT else ""} |')
        print(rows[-1], flush=True)
    h, v = machine.hardware(), machine.versions()
    lines = ['# CIFAR-10 beside training', '',
             f'{h["cpu"]}, {h["cores"]} cores, {h["memory_gb"]} GB ({h["instructions"]}); Python {v["python"]}, torch {v["torch"]}. 45,000 training, 5,000 validation, '
             '10,000 test images; each part in a process of its own, once.', '',
             '| chapter · part | seconds | CPU seconds | peak MB |', '|---|---|---|---|', *rows]
    if not args.parts: Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
