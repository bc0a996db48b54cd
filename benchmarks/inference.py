"""Images a second of each backend beside PyTorch's eager fp32, from pixels and from JPEG files.

    .venv/bin/python benchmarks/inference.py [model …] [--rounds N]

writes benchmarks/inference.md; about 10 minutes on 2 cores.

The models have random weights and a native size of 224, so that pictures are not shrunk first. Pixels: uint8 arrays of
that size, through `ProductionModel.probabilities`. Files: JPEGs in memory, crops of photographs of 256 to 427 pixels,
through `predict_batch`, which decodes the next batch while it computes one. Each backend has proved itself equal to
PyTorch before it is timed. They take turns in every round, after each has answered a batch of 1 and one of 8; ratios
are taken within a round.
"""
import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from dinocls.inference import ProductionModel, save_production
from dinocls.kit import config, files, machine
from dinocls.kit.engines import BACKENDS, fastest, processor, synchronise
from dinocls.model import classifier

SIZES, FILES = (1, 8, 32), 32


def photographs(n: int) -> list[bytes]:
    "Cut n pictures of various sizes out of photographs; return them as JPEG files."
    from sklearn.datasets import load_sample_images
    whole, rng, found = [Image.fromarray(a) for a in load_sample_images().images], np.random.default_rng(0), []
    for i in range(n):
        w, h = (int(v) for v in rng.integers(256, 428, 2))
        x, y = (int(rng.integers(0, s - t + 1)) for s, t in zip(whole[i % 2].size, (w, h)))
        whole[i % 2].crop((x, y, x + w, y + h)).save(file := io.BytesIO(), 'JPEG', quality=90)
        found.append(file.getvalue())
    return found


def production(backbone: str, folder: Path) -> Path:
    "Save an untrained model."
    torch.manual_seed(0)
    cfg = config.preset('reference', backbone=backbone, weights='random', precision='fp32')
    return save_production(folder, classifier(cfg, 10).eval(), cfg, [str(i) for i in range(10)], {}, native=(224, 224))


def rate(call, n: int, device) -> float:
    "Return images a second of one call."
    synchronise(device)
    clock = time.perf_counter()
    call()
    synchronise(device)
    return n / (time.perf_counter() - clock)


def measure(backbone: str, rounds: int, skip: list) -> tuple[dict, dict, str]:
    "Let the backends take turns; return (variant, work) → images/s a round, what is lacking, and what auto takes."
    with tempfile.TemporaryDirectory() as tmp:
        path, jpegs, why, models = production(backbone, Path(tmp)/'p'), photographs(FILES), {}, {}
        for name in [b for b in BACKENDS if b not in skip]:
            try: models[name] = ProductionModel(path, 'auto', name)
            except files.UserError as e: why[name] = str(e)
        device, rng = models['torch'].device, np.random.default_rng(0)
        pixels = list(rng.integers(0, 256, (max(SIZES), 224, 224, 3), dtype=np.uint8))
        alone = {name: [rate(lambda: m.probabilities(pixels[:1]), 1, device) for _ in range(3)][-1]
                 for name, m in models.items()}
        for name in [n for n in models if 3 * alone[n] < alone['torch']]:  # bf16 without units for it takes minutes
            why[name] = ('One image at a time it is slower than a third of eager fp32 '
                         f'({alone[name]:.2g} against {alone["torch"]:.2g} images/s).')
            models.pop(name)
        work = {f'batch {b}': (lambda m, b=b: m.probabilities(pixels[:b]), b) for b in SIZES}
        work['files'] = (lambda m: m.predict_batch(jpegs, size=8), len(jpegs))
        rates = {(name, w): [] for name in models for w in work}
        for m in models.values(): m.probabilities(pixels[:8])
        for turn in range(rounds):
            for w, (call, n) in work.items():
                names = list(models)
                for name in names[turn % len(names):] + names[:turn % len(names)]:
                    rates[name, w].append(rate(lambda: call(models[name]), n, device))
                    print(f'{backbone}, {w}, round {turn}: {name} {rates[name, w][-1]:.3g} images/s', flush=True)
        return rates, why, fastest(models['torch'].subject)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=['dinov2_vits14', 'dinov2_vitb14'])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--skip', nargs='*', default=[], help='backends to leave out')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    torch.set_num_threads(machine.cores())
    clock, lines, auto, why = time.perf_counter(), [], {}, {}
    for backbone in args.models:
        rates, why, auto[backbone] = measure(backbone, args.rounds, args.skip)
        works = list(dict.fromkeys(w for _, w in rates))
        for name in dict.fromkeys(name for name, _ in rates):
            cells = []
            for w in works:
                ratios = [a / b for a, b in zip(rates[name, w], rates['torch', w])]
                beside = f' ({median(ratios):.2f}×, {min(ratios):.2f} – {max(ratios):.2f})' if name != 'torch' else ''
                cells.append(f'{median(rates[name, w]):.3g}{beside}')
            label = ('torch, eager fp32' if name == 'torch' else name) + ' (auto)' * (name == auto[backbone])
            lines.append(f'| {backbone} | {label} | {" | ".join(cells)} |')
    h, v = machine.hardware(), machine.versions()
    import onnxruntime, openvino
    where, minutes = torch.device('cuda' if torch.cuda.is_available() else 'cpu'), (time.perf_counter() - clock) / 60
    text = ['# Inference, by backend', '',
            f'{processor(where)}, {h["memory_gb"]} GB, {torch.backends.cpu.get_cpu_capability()}; '
            f'Python {v["python"]}, torch {v["torch"]}, timm {v["timm"]}, onnxruntime {onnxruntime.__version__}, '
            f'openvino {openvino.__version__.split("-")[0]}. {args.rounds} rounds; it took {minutes:.0f} minutes.', '',
            'Images a second at 224 px, median over rounds; in brackets how many times as fast as eager fp32 in the '
            f'same round, median and range. `files`: {FILES} JPEG files in batches of 8, decoded, cropped and scaled '
            'while the batch before is computed. `auto` takes the fastest at batches of 8.', '',
            f'| model | backend | {" | ".join(works)} |', f'|---|---|{"---|" * len(works)}', *lines, '',
            *(f'- {name}: not measured further. {reason}' for name, reason in why.items())]
    with files.replacing(args.out) as out: out.write_text('\n'.join(text) + '\n', encoding='utf-8')
    print('\n'.join(text))


if __name__ == '__main__': main()
