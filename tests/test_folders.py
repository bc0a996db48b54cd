"""Any folder of pictures goes through the whole book: every chapter under `smoke`, on pictures whose colour tells the
class. Chapters are executed cell by cell in one process, which spares sixteen kernels their start."""
import ast
import builtins
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dinocls.kit.config import format_overrides, preset
from dinocls.kit.figures import read_metrics

SMALL = dict(train_size=0, batch_size=16, phase1_epochs=2, phase2_epochs=1, study_seeds=1, lr_grid=((1e-4,), (1e-2,)),
             lr_pairs=((1e-4, 1e-2),), attention_images=6, corruption_images=3, benchmark_seconds=0.01,
             pretrain_epochs=1, pretrain_batch=8, on_drift='report', test_size=0)


def picture(rng, size: tuple, colour: tuple, kind: str = 'RGB') -> Image.Image:
    "Return a grainy picture of a colour; (width, height)."
    x = rng.normal(colour, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    made = Image.fromarray(x)
    if kind == 'LA': made.putalpha(Image.fromarray(np.full(x.shape[:2], 255, np.uint8)))
    if kind == 'I;16': return Image.fromarray(x.mean(2).astype(np.uint16) * 257)
    return made.convert(kind) if kind == 'L' else made


def colours(n: int, grey: bool = False) -> list:
    "Return n colours that are easily told apart."
    if grey: return [(v, v, v) for v in np.linspace(20, 235, n)]
    steps = int(np.ceil(n ** (1 / 3)))
    return [tuple(30 + 195 * ((i // steps ** k) % steps) / max(1, steps - 1) for k in range(3)) for i in range(n)]


def two(root, rng):
    "Two classes of 48×64, with names that a shell, a plot or a table could trip over, and val/ beside train/."
    for part, n in (('train', 24), ('val', 12), ('test', 12)):
        for name, colour in zip(('Käfer & $x_1$ <b>*_|', '猫 100%'), colours(2)):
            (root/part/name).mkdir(parents=True)
            for i in range(n): picture(rng, (48, 64), colour).save(root/part/name/f'bild {i} ä.png')
    return {'val_size': 24}


def twelve(root, rng):
    "Twelve classes of 48×48 in grey, unbalanced, one with a single picture."
    for part, most in (('train', 10), ('test', 4)):
        for c, colour in enumerate(colours(12, grey=True)):
            (root/part/f'class {c}').mkdir(parents=True)
            n = (1 if part == 'train' else 0) if c == 0 else most + c % 3
            for i in range(n): picture(rng, (48, 48), colour, 'L').save(root/part/f'class {c}'/f'{i}.png')
    if not any((root/'test'/'class 0').iterdir()): (root/'test'/'class 0').rmdir()
    return {'val_size': 24}


def photographs(root, rng):
    "Three classes of 160×120: turned by EXIF, with alpha, with 16 bits."
    for part, n in (('train', 16), ('test', 8)):
        for c, colour in enumerate(((220, 220, 220), (128, 128, 128), (40, 40, 40))):
            (root/part/'abc'[c]).mkdir(parents=True)
            for i in range(n):
                kind = ('RGB', 'LA', 'I;16')[i % 3]
                made, exif = picture(rng, (160, 120), colour, kind), Image.Exif()
                exif[0x0112] = 1 + i % 8
                more = {'exif': exif, 'quality': 95} if kind == 'RGB' else {}
                made.save(root/part/'abc'[c]/f'{i}{".jpg" if kind == "RGB" else ".png"}', **more)
    return {'val_size': 12}


def execute(path, overrides: str, out: str):
    "Execute a chapter's cells one after the other; what a cell ends in is shown as JupyterLab would."
    import matplotlib.pyplot as plt
    space = {'__name__': '__main__'}
    for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or '%pip' in source: continue
        if 'parameters' in cell['metadata'].get('tags', ()):
            source = f'preset, overrides, out = "smoke", {overrides!r}, {out!r}'
        tree = ast.parse(source)
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
            exec(compile(tree, f'{path.stem} cell {i}', 'exec'), space)
            shown = eval(compile(last, f'{path.stem} cell {i}', 'eval'), space)
            for way in ('_repr_markdown_', '_repr_html_'):
                if hasattr(shown, way): getattr(shown, way)()
        else: exec(compile(tree, f'{path.stem} cell {i}', 'exec'), space)
        plt.close('all')


def read_the_book(overrides: str, out: str):
    "Execute every chapter; print which of them failed, and how."
    matplotlib.use('Agg')
    builtins.display, builtins.get_ipython = (lambda *a, **k: None), (lambda: None)
    failed = {}
    for path in sorted((Path(__file__).parents[1]/'nbs').glob('[0-9A]*_*.ipynb')):
        try: execute(path, overrides, out)
        except Exception as e: failed[path.stem] = f'{type(e).__name__}: {e}'
    print(json.dumps(failed))


@pytest.mark.slow
@pytest.mark.parametrize('build', [two, twelve, photographs])
def test_any_folder_goes_through_the_whole_book(build, tmp_path):
    more = build(tmp_path/'pictures', np.random.default_rng(0))
    cfg = preset('smoke', dataset='imagefolder', data_root=str(tmp_path/'pictures'), out=str(tmp_path/'run'),
                 **SMALL | more)
    done = subprocess.run([sys.executable, __file__, format_overrides(cfg), cfg.out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, '\n'.join(f'{name}: {text}' for name, text in failed.items())
    scores = {r['metric']: r['value'] for r in read_metrics(cfg) if r['chapter'] == '08_probe' and r['split'] == 'test'}
    assert scores['linear:raw'] == 1 and scores['linear:frozen'] > 0.9, scores  # the colour tells the class


if __name__ == '__main__': read_the_book(*sys.argv[1:])
