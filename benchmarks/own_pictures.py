"""What does `dinocls train FOLDER` make of few and of many pictures of one's own?

    .venv/bin/python benchmarks/own_pictures.py [--busy]     writes benchmarks/own_pictures.md; a quarter of an hour

Folders of three classes are made of test pictures of CIFAR-10, which no backbone of the book has seen (`DINOCLS_DATA`
or `dinocls download -p cifar`). On each the command is run as a user would, and then `dinocls predict` with its model.
With --busy, where something else is running, no times are written.
"""
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dinocls import load_dataset
from dinocls.kit import files, machine

CLASSES, COUNTS, MINUTES = ('airplane', 'cat', 'ship'), (3, 10, 50, 300, 1000), 2
SCORE = re.compile(r'^ +([\d.]+ % \([\d.]+ to [\d.]+\))  (.+)$', re.M)


def write_folder(folder: Path, data, count: int) -> Path:
    "Write so many test pictures of each class, drawn at random; return one of them."
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder/name).mkdir(parents=True)
        of_class = [i for i in data.splits['test'] if data.labels[i] == data.classes.index(name)]
        for i in rng.choice(of_class, count, replace=False):
            Image.fromarray(data.images[i]).save(file := folder/name/f'{i}.png')
    return file


def dinocls(*args) -> str:
    "Run a command of the book; return what it prints."
    done = subprocess.run([sys.executable, '-m', 'dinocls', *map(str, args)], capture_output=True, text=True)
    if done.returncode: sys.exit(f'{done.stdout}{done.stderr}dinocls {" ".join(map(str, args))} failed.')
    return done.stdout


def row(said: str, answer: str, count: int, seconds: float | None) -> str:
    "Return the table's row on what `train` and `predict` said."
    scores = {name: score for score, name in SCORE.findall(said)}
    epochs = re.search(r'(\d+) epochs? of the head alone and (\d+) of everything', said)
    if json.loads(answer)['prediction'] not in CLASSES: sys.exit(f'{answer}\nThat is none of the classes.')
    cells = [f'{count:,}', re.search(r'On ([\d,]+) test pictures', said)[1], scores['the fine-tuned model'],
             scores['its head alone'], scores['the nearest picture by raw pixels'], ' + '.join(epochs.groups())]
    return f'| {" | ".join(cells + ([f"{seconds:.0f}"] if seconds else []))} |'


def main(busy: bool):
    data, rows = load_dataset('cifar10'), []
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as tmp:
            picture, start = write_folder(Path(tmp)/'photos', data, count), time.perf_counter()
            said = dinocls('train', f'{tmp}/photos', '--minutes', MINUTES, '--out', f'{tmp}/run')
            seconds = None if busy else time.perf_counter() - start
            print(said)
            answer = dinocls('predict', picture, '--json', '--model', f'{tmp}/run/production')
            rows.append(row(said, answer, count, seconds))
    h, v = machine.hardware(), machine.versions()
    backbone = next(line for line in said.splitlines() if line.startswith(('The weights of', 'The backbone is')))
    lines = ['# Own pictures, few and many', '',
             f'`dinocls train photos --minutes {MINUTES}` by `python benchmarks/own_pictures.py{" --busy" * busy}`: '
             f'{h["cpu"]}, {h["cores"]} cores{", busy with other work" * busy}, torch {v["torch"]}. The pictures are test '
             f'pictures of CIFAR-10 of the classes {", ".join(CLASSES)}, a fifth of them kept for validation and a fifth '
             'for the test; one draw for each row. Accuracies are in % of the test pictures, with 95 % intervals.', '',
             f'> {backbone}', '',
             '| pictures per class | test pictures | fine-tuned model | its head alone | nearest picture by raw pixels | '
             f'epochs of the head + of everything |{"" if busy else " seconds in all |"}', '|---' * (7 - busy) + '|', *rows]
    with files.replacing(Path(__file__).with_suffix('.md')) as out:
        out.write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__': main('--busy' in sys.argv[1:])
