"""How far does a rerun on another number of threads drift?

    python benchmarks/threads.py [PRESET]

Trains phase 1, phase 2 and everything at once (`direct`) with the preset `quick`, or another, for three seeds, with one
thread and with all cores, and prints on how many test images the answers differ.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WAYS = 'phase1_logits', 'phase2_logits', 'direct_logits'


def train(preset: str, file: str):
    "Train with the threads that there are, and store the logits on test."
    from dinocls import phase1, phase2
    from dinocls.kit import config
    from dinocls.kit.stage import variant
    stages = dict(zip(WAYS, (phase1.phase1_logits, phase2.phase2_logits, phase2.direct_logits)))
    with tempfile.TemporaryDirectory() as out:
        cfg = config.preset(preset, out=out, device='cpu')
        made = {f'{way}-{seed}': stage(variant(cfg, seed=seed))
                for seed in range(cfg.seed, cfg.seed + 3) for way, stage in stages.items()}
        np.savez(file, labels=made[f'{WAYS[0]}-{cfg.seed}']['test_labels'],
                 **{name: found['test_logits'] for name, found in made.items()})


def main():
    preset = sys.argv[1] if len(sys.argv) > 1 else 'quick'
    with tempfile.TemporaryDirectory() as tmp:
        found = []
        for threads in (1, os.cpu_count()):
            file = Path(tmp)/f'{threads}.npz'
            subprocess.run([sys.executable, __file__, preset, file], check=True, stdout=subprocess.DEVNULL,
                           env=os.environ | {'OMP_NUM_THREADS': str(threads)})
            found.append(dict(np.load(file)))
    one, all_of_them = found
    labels = one.pop('labels')
    print(f'| {preset} | answers that differ, of {len(labels):,} | accuracy with 1 thread | with {os.cpu_count()} |')
    print('|---|---|---|---|')
    for name, logits in one.items():
        a, b = logits.argmax(1), all_of_them[name].argmax(1)
        print(f'| {name} | {(a != b).sum()} | {100 * (a == labels).mean():.2f} | {100 * (b == labels).mean():.2f} |')


if __name__ == '__main__': train(*sys.argv[1:]) if len(sys.argv) > 2 else main()
