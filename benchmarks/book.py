"""Time and peak memory of `make book`, by chapter, beside a plain papermill loop over the same notebooks.

    .venv/bin/python benchmarks/book.py [preset]     writes benchmarks/book.md; about 15 minutes on 2 cores for quick

Three runs, one after the other, in folders of their own: `dinocls run` from nothing, `dinocls run` once more with
everything memoised, and what one would do otherwise: papermill on each notebook in turn. The last profits from the
stages as well, since chapters find what earlier ones stored; it lacks only the driver.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dinocls.kit import config, files
from dinocls.app.cli import chapters, duration

BIN = Path(sys.executable).parent


def timed(*command) -> float:
    "Run a command to its end; return its seconds."
    clock = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=config.root(), check=True,
                   env={**os.environ, 'PYTHONWARNINGS': 'ignore'}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - clock


def main(preset: str):
    with tempfile.TemporaryDirectory() as tmp:
        run = [BIN/'dinocls', 'run', '--preset', preset, '--out', f'{tmp}/driver']
        first = timed(*run)
        record = files.read_json(Path(tmp)/'driver'/'book.json')
        second = timed(*run)
        loop = sum(timed(BIN/'papermill', '--no-progress-bar', '--log-level', 'ERROR', c.path, f'{tmp}/{c.name}.ipynb',
                         '-p', 'preset', preset, '-p', 'out', f'{tmp}/loop')
                   for c in chapters())
    h, v = record['hardware'], record['versions']
    lines = [f'# `dinocls run --preset {preset}`, by chapter', '',
             f'{h["cpu"]}, {h["cores"]} cores, {h["memory_gb"]} GB, GPU: {h.get("gpu", "none")}; Python {v["python"]}, torch {v["torch"]}. {record["jobs"]} chapters side by side. One run each.', '',
             '| | time | relative |', '|---|---|---|', f'| the book, from nothing | {duration(first)} | 1 |',
             f'| the book, once more | {duration(second)} | {second / first:.2f} |',
             f'| papermill on one notebook after the other, from nothing | {duration(loop)} | {loop / first:.2f} |', '',
             'Wall time of a chapter beside its neighbour; memory is the resident peak of its kernel and what that started, sampled five times a second.', '',
             '| chapter | seconds | peak MB |', '|---|---|---|',
             *(f'| {n} | {r["seconds"]:.0f} | {r["peak_mb"]:,} |' for n, r in record['chapters'].items())]
    with files.replacing(Path(__file__).with_suffix('.md')) as out:
        out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))


if __name__ == '__main__': main(sys.argv[1] if len(sys.argv) > 1 else 'quick')
