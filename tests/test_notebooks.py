"The notebooks as files: what the driver, nbdev, papermill and Colab rely on."
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, environment

from dinocls.app import driver
from dinocls.kit import config

CHAPTERS = driver.chapters()
BY_NAME = pytest.mark.parametrize('path', [c.path for c in CHAPTERS], ids=lambda p: p.stem)


def cells(path): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(path.read_text())['cells']]


def code(path): return [source for kind, source, _ in cells(path) if kind == 'code']


@BY_NAME
def test_opens_as_the_style_says(path):
    kinds = cells(path)
    assert re.match(r'# .+\n\n> .+\n\n\[!\[Open in Colab\]', kinds[0][1])
    assert kinds[1][1].startswith(f'#| default_exp {path.stem.partition("_")[2]}\n# In Colab, install')
    tagged = [source for _, source, c in kinds if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and re.findall(r'^(\w+): str = ', tagged[0], re.M) == ['preset', 'overrides', 'out']
    assert "preset: str = 'smoke'" in tagged[0]


@pytest.mark.parametrize('c', CHAPTERS, ids=lambda c: c.name)
def test_a_chapter_asks_is_short_and_leaves_something_to_try(c):
    kinds = cells(c.path)
    prose = ' '.join(source for kind, source, _ in kinds if kind == 'markdown')
    assert c.question and len(kinds) <= 70 and len(prose.split()) <= 1300
    assert 'write_findings(' in ''.join(code(c.path)) and '<details><summary>' in prose
    for _, source, cell in kinds[1:3]: assert 'hide-cell' in cell['metadata'].get('tags', ()), source


@pytest.mark.parametrize('c', CHAPTERS, ids=lambda c: c.name)
def test_a_picture_comes_within_eight_cells_of_the_source(c):
    record = ROOT/'outputs'/'record-quick'/c.path.name
    mine = [x for x in json.loads(record.read_text())['cells']
            if not {'injected-parameters', 'findings'} & {*x['metadata'].get('tags', ())}]
    seen = [i for i, x in enumerate(mine) if any('image/png' in o.get('data', {}) for o in x.get('outputs', ()))]
    assert seen[0] < 8


@BY_NAME
def test_is_a_source(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec']['language'] == 'python'
    assert not any(c.get('outputs') or c.get('execution_count') for c in nb['cells'])
    assert not any(re.search(r'^\s*from \S+ import \*', source, re.M) for source in code(path))
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])


@BY_NAME
def test_expects_the_same_of_every_preset(path):
    assert not [source for source in code(path) if re.search(r'\bif cfg\.preset\b', source)]


@pytest.mark.parametrize('c', CHAPTERS, ids=lambda c: c.name)
def test_says_what_it_costs(c): assert set(c.cost) == set(config.PRESETS)


def test_order_is_the_order_of_dependencies():
    names = [c.name for c in CHAPTERS]
    assert names == sorted(names)
    for i, c in enumerate(CHAPTERS): assert set(c.reads) <= set(names[:i]), c.name


def test_reads_names_the_chapters_whose_stages_are_used():
    stages, above = driver.stages(), {}
    by_module = {c.module: c.name for c in CHAPTERS}
    for c in CHAPTERS:
        above[c.name] = {c.name, *c.reads}.union(*(above[n] for n in c.reads))
        for imported in re.findall(r'^\s*from (?:dinocls)?\.\w+ import (.+)', '\n'.join(code(c.path)), re.M):
            for name in re.findall(r'\w+', imported):
                if name in stages: assert by_module[stages[name].module] in above[c.name], f'{c.name} uses {name}'


@pytest.mark.slow
@pytest.mark.parametrize('names', ['^0[0-6]', '^(0[7-9]|10)', '^(1[1-4]|A)'])
def test_all_cells_run_and_their_asserts_hold(names):
    "Several notebooks in a process, which spares them the imports, beside the other tests."
    command = [Path(sys.executable).with_name('nbdev_test'), '--file_re', names, '--n_workers', '0', '--do_print']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(OMP_NUM_THREADS=1))
    assert done.returncode == 0, done.stderr[-5000:]
    executed = re.findall(r'Completed .*/(\w+)\.ipynb', done.stdout)
    assert executed == [c.name for c in CHAPTERS if re.search(names, c.name)]


@pytest.mark.slow
def test_clean_and_export_change_nothing(tmp_path):
    ignored = shutil.ignore_patterns('__pycache__', '.last_checked', '.ipynb_checkpoints')
    for name in ('nbs', 'dinocls'): shutil.copytree(ROOT/name, tmp_path/name, ignore=ignored)
    for name in ('settings.ini', 'setup.py', 'README.md', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    for name in ('nbs', 'dinocls'):
        files = [p.name for p in (ROOT/name).iterdir() if p.is_file() and p.suffix in ('.ipynb', '.py')]
        assert filecmp.cmpfiles(ROOT/name, tmp_path/name, files, shallow=False)[1:] == ([], [])
    for path in (tmp_path/'nbs').glob('*.ipynb'):
        assert len([c for _, _, c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]) == 1


def test_committed_runs_are_small_and_say_nothing_of_a_machine():
    listed = subprocess.run(['git', 'ls-files', 'outputs'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT/f for f in listed if (ROOT/f).exists()]
    sizes = [f.stat().st_size for f in files]
    runs = {f.relative_to(ROOT/'outputs').parts[0] for f in files}
    of = {run: sum(f.stat().st_size for f in files if run in f.parts) for run in runs}
    assert sizes and max(sizes) <= 500_000 and max(of.values()) <= 10_000_000 and sum(sizes) <= 20_000_000, of
    machine = (f'{ROOT.parent}/', f'{Path.home()}/', 'site-packages', tempfile.gettempdir())
    for f in files:
        if f.suffix in ('.ipynb', '.json', '.csv'):
            text = re.sub(r'"image/png": "[^"]*"', '', f.read_text(encoding='utf-8'))  # which may spell anything
            assert not [word for word in machine if word in text], f
