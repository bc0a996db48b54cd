"""How long loading a folder of pictures takes: torchvision's ImageFolder read once through, the book's decoding, and the book's decoded cache.

    python benchmarks/loading.py pictures    # pictures/train/<class>/…, pictures/test/<class>/…

Each measurement is a process of its own, in which the libraries are imported before the clock starts; the three take turns.
The files are read once beforehand, so that all three find them in the system's cache. Nothing is written outside a temporary folder.
"""
import os
import statistics
import subprocess
import sys
import tempfile

SETUP = ('import sys, time; import numpy as np; from dinocls.data import load_dataset; from torchvision.datasets import ImageFolder; root = sys.argv[1]\n')
WAYS = {'torchvision': "images = [np.asarray(x) for part in ('train', 'test') for x, _ in ImageFolder(f'{root}/{part}')]",
        'decoded': "images = load_dataset('imagefolder', root).images",
        'cache': "images = load_dataset('imagefolder', root).images\ntouched = int(images[::97].sum())"}


def seconds(way: str, root: str, place: str) -> float:
    "Run one way of loading in a process and return the time it took."
    code = f'{SETUP}start = time.perf_counter()\n{WAYS[way]}\nprint("seconds", time.perf_counter() - start)'
    result = subprocess.run([sys.executable, '-c', code, root], env=os.environ | {'DINOCLS_DATA': place}, check=True,
                            capture_output=True, text=True)
    return float(result.stdout.split()[-1])


def main(root: str, rounds: int = 3):
    "Measure and print medians, and how many times longer the others take than the cache."
    taken = {way: [] for way in WAYS}
    for i in range(rounds + 1):
        with tempfile.TemporaryDirectory() as place:
            for way in WAYS:
                took = seconds(way, root, place)  # the second leaves the cache that the third finds
                if way == 'decoded' and not os.path.isdir(f'{place}/decoded'):
                    sys.exit(f'{root} is so small that nothing is cached: at least a MiB of files is needed.')
                if i: taken[way].append(took)  # the first round warms the system's cache
    middle = {way: statistics.median(t) for way, t in taken.items()}
    for way, t in taken.items():
        print(f'{way:<12} {middle[way]:8.2f} s   ({min(t):.2f} – {max(t):.2f})   {middle[way] / middle["cache"]:6.1f} × the cache')


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    main(*sys.argv[1:2])
