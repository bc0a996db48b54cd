"""What would it take with more images, or a larger model? A model of cost from the steps that were measured: writes docs/scaling.md.

    .venv/bin/python benchmarks/scale.py [--price 3]     dollars an hour of the GPU; takes a second

Rates come from `gpu.json` (a GPU), `train.md` and `knn.md` (two cores). Work of other models is scaled by its FLOPs, at the same share of the peak.
"""
import argparse
from pathlib import Path

from dinocls.kit.files import read_json
from dinocls.model import BACKBONES
from recipe import blocks_flops

HERE = Path(__file__).resolve().parent
SETS = {'CIFAR-10': (50_000, 32), 'ImageNet-1k': (1_281_167, 224), '100 million pictures': (100_000_000, 224)}  # images, stored side
MODELS = {'ViT-S/14': 'dinov2_vits14', 'ViT-B/14': 'dinov2_vitb14', 'ViT-L/14': 'dinov2_vitl14', 'ViT-g/14': 'dinov2_vitg14'}
EPOCHS, QUERIES, SIDE = (10, 40), 10_000, 224  # of the reference's phases; of a search; pixels that the backbone sees


def gflop(name: str) -> float:
    "Return the GFLOP of an image forward through a backbone's blocks."
    return blocks_flops(BACKBONES[name], (SIDE // BACKBONES[name].patch) ** 2 + 1) / 1e9


def of_table(file: str, start: str, column: int) -> float:
    "Return a number of a Markdown table's row."
    row = next(line for line in (HERE/file).read_text(encoding='utf-8').splitlines() if line.startswith(start))
    return float(row.split('|')[column].strip().replace(',', ''))


def time(seconds: float) -> str:
    "Write a time with two digits, in the largest fitting unit."
    for unit, size in (('years', 3.15e7), ('days', 86_400), ('h', 3600), ('min', 60), ('s', 1)):
        if seconds >= size: return f'{seconds / size:.2g} {unit}' if seconds < 100 * size else f'{seconds / size:,.0f} {unit}'
    return f'{seconds:.1g} s'


def memory(size: float) -> str:
    "Write bytes with two or three digits."
    for unit, of in (('TB', 1e12), ('GB', 1e9)):
        if size >= of: return f'{size / of:,.3g} {unit}'
    return f'{size / 1e6:,.3g} MB'


def page(price: float) -> str:
    "Return docs/scaling.md."
    gpu = read_json(HERE/'gpu.json')
    def rate(start): return max(r['rate'] for r in gpu['rows'] if r['work'].startswith(start))
    embed, first, second = rate('inference'), rate('`best`, phase 1'), rate('`best`, phase 2')
    slow = {p: of_table('train.md', f'| dinov2_vitb14, 224 px, batch 8 | {p} | dinocls', 4) for p in (1, 2)}
    search = of_table('knn.md', '| dinocls | ', 2)
    def train(n, a, b): return n * (EPOCHS[0] / a + EPOCHS[1] / b)
    lines = ['| | ' + ' | '.join(SETS) + ' |', '|---' * (1 + len(SETS)) + '|']
    def row(title, f): lines.append(f'| {title} | ' + ' | '.join(f(n, side) for n, side in SETS.values()) + ' |')
    row('images', lambda n, _: f'{n:,}')
    row('pictures in memory, as stored', lambda n, side: memory(3 * side ** 2 * n))
    row('embeddings, 768 numbers in fp32', lambda n, _: memory(768 * 4 * n))
    row(f'neighbours of {QUERIES:,} images, exactly, two cores', lambda n, _: time(search * n / 50_000))
    row('look-alikes of each in all others, two cores', lambda n, _: time(search * n / 50_000 * n / QUERIES))
    row('embedding all once, GPU', lambda n, _: time(n / embed))
    row('embedding all once, two cores', lambda n, _: time(n / slow[1]))
    row(f'both phases, {EPOCHS[0]} and {EPOCHS[1]} epochs, GPU', lambda n, _: time(train(n, first, second)))
    def dollars(n): return train(n, first, second) / 3600 * price
    row(f'the same at ${price:g} an hour', lambda n, _: f'${dollars(n):,.{0 if dollars(n) > 10 else 2}f}')
    row('the same, two cores', lambda n, _: time(train(n, slow[1], slow[2])))
    base = gflop('dinov2_vitb14')
    sizes = ['| model | GFLOP an image | embedding an image | both phases on CIFAR-10 | on ImageNet-1k |', '|---|---|---|---|---|']
    for title, name in MODELS.items():
        more = gflop(name) / base
        sizes.append(f'| {title} | {gflop(name):.1f} | {1e6 * more / embed:,.0f} µs | '
                     + ' | '.join(time(more * train(SETS[s][0], first, second)) for s in ('CIFAR-10', 'ImageNet-1k')) + ' |')
    return TEXT.format(lines='\n'.join(lines), sizes='\n'.join(sizes), name=gpu['hardware']['gpu'], embed=embed, second=second,
                       slow=slow[2], search=search, price=price, peak=gpu['peak_tflops'])


TEXT = '''# How it scales

What would the book cost with more pictures, or with a larger model, and what gives way first? This page is arithmetic on steps that were measured, not a measurement of its own: `benchmarks/scale.py` writes it.

**Measured** ([GPU](../benchmarks/gpu.md), [two cores](../benchmarks/train.md), [search](../benchmarks/knn.md)): on one {name} ViT-B/14 at 224 pixels embeds {embed:,.0f} images a second and learns from {second:,.0f} (attention not fused, not compiled: a lower bound); on two cores it learns from {slow:.2f}. {search:.2f} s of two cores find the neighbours of 10,000 images among 50,000, exactly. **Assumed**: work grows in proportion to images and to FLOPs, the share of the GPU's peak ({peak:.0f} TFLOP/s) stays, a GPU costs ${price:g} an hour, and the disk keeps up. Several GPUs divide training by less than their number; by how much was not measured.

## More pictures

{lines}

Nobody trains for fifty epochs on a hundred million pictures; two would do, at a twenty-fifth of it.

## What gives way first

- **CIFAR-10**: nothing. Everything is resident: pictures as bytes, embeddings, splits, exact neighbours.
- **ImageNet-1k**: the resident data set. Pictures at 224 pixels no longer fit into memory, so the loader streams them from their decoded copies on disk, the next batch read while the device works, in the same order and to the same result (chapter 1); with a fast disk that costs little, with a slow one it is the limit. The search for look-alikes between all pictures, which grows with the square, goes from seconds to hours; between a test set and the rest it stays minutes. Probes still fit: embeddings are 4 GB.
- **100 million pictures**: all that is kept for each picture. Embeddings are 307 GB and belong on disk, in pieces (`numpy.memmap`, half precision halves them); exact neighbours take over an hour for 10,000 images, and approximate ones take over: an inverted index of `faiss` (IVF with product quantisation, 64 bytes a picture, 6.4 GB in all) answers much sooner at the price of some neighbours; how many has to be measured on a sample by the exact search. A decision on every picture (splits, indices) is 0.8 GB, no matter. Reading JPEG files may become the bottleneck before the GPU does: one H100 embeds more than five thousand a second; `benchmarks/loading.py FOLDER` tells how many a machine decodes.
- **Further models and seeds**, not pictures, are what studies cost: chapter 9 trains dozens of models. They are independent, so they go side by side (`at_once`), or over the machines of [a cluster](clusters.md).

## Larger models

{sizes}
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--price', type=float, default=3, help='dollars an hour of the GPU')
    (HERE.parent/'docs'/'scaling.md').write_text(page(parser.parse_args().price), encoding='utf-8')


if __name__ == '__main__': main()
