"The notebooks as files: what the driver, nbdev, papermill and Colab rely on."
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT, dinocls

from dinocls.kit import config
from dinocls import book

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
BY_NAME = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def cells(path): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(path.read_text())['cells']]


@BY_NAME
def test_opens_as_the_style_says(path):
    kinds = cells(path)
    assert re.match(r'# .+\n\n> .+', kinds[0][1]) and kinds[1][1].startswith('[![Open in Colab]')
    assert kinds[2][1] == f'#| default_exp {path.stem.partition("_")[2]}' and kinds[3][1].startswith('# In Colab, install')
    tagged = [source for _, source, c in kinds if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and re.findall(r'^(\w+): str = ', tagged[0], re.M) == ['preset', 'overrides', 'out']
    assert "preset: str = 'smoke'" in tagged[0]


@BY_NAME
def test_is_a_source(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec']['language'] == 'python'
    assert not any(c.get('outputs') or c.get('execution_count') for c in nb['cells'])
    assert not any(re.search(r'^\s*from \S+ import \*', source, re.M) for kind, source, _ in cells(path) if kind == 'code')
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])


@BY_NAME
def test_expects_the_same_of_every_preset(path):
    assert not [source for kind, source, _ in cells(path) if kind == 'code' and re.search(r'\bif cfg\.preset\b', source)]


@BY_NAME
def test_says_what_it_costs(path):
    assert set(book.read_chapter(path).cost) == set(config.PRESETS)


def test_order_is_the_order_of_dependencies():
    before = set()
    for c in book.chapters():
        assert set(c.reads) <= before, c.name
        before.add(c.name)


def test_reads_names_the_chapters_of_the_stages_before():
    chapters = {c.module: c for c in book.chapters()}
    above = {}
    for c in book.chapters(): above[c.name] = set(c.reads).union(*(above[n] for n in c.reads))
    for stage in book.stages().values():
        for needed in {s.module for s in stage.after} - {stage.module}:
            assert chapters[needed].name in above[chapters[stage.module].name], f'{stage.name} needs {needed}'


def test_clean_and_export_change_nothing(tmp_path):
    for name in ('nbs', 'dinocls'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.last_checked', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'README.md', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    for name in ('nbs', 'dinocls'):
        files = [p.name for p in (ROOT/name).iterdir() if p.is_file() and p.suffix in ('.ipynb', '.py')]
        assert filecmp.cmpfiles(ROOT/name, tmp_path/name, files, shallow=False)[1:] == ([], [])
    assert all(len([c for _, _, c in cells(p) if 'parameters' in c['metadata'].get('tags', [])]) == 1 for p in (tmp_path/'nbs').glob('*.ipynb'))


def test_badges_and_readme_follow_from_settings():
    if not subprocess.run(['git', 'status', '--porcelain', '--', 'outputs/quick'], cwd=ROOT, capture_output=True, text=True).stdout:  # a run made anew has its own numbers
        result = dinocls('sync', '--check')
        assert result.returncode == 0, result.stdout
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    start = 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/'.format(**config['DEFAULT'])
    targets = re.findall(re.escape(start) + r'([^)]+)', (ROOT/'README.md').read_text())
    assert len(targets) == len(NOTEBOOKS) and all((ROOT/t).is_file() for t in targets)


def test_committed_run_is_small_and_says_nothing_of_a_machine():
    files = subprocess.run(['git', 'ls-files', 'outputs'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    sizes = {f: (ROOT/f).stat().st_size for f in files if (ROOT/f).exists()}
    assert sizes and max(sizes.values()) <= 500_000 and sum(sizes.values()) <= 10_000_000
    for f in files:
        if f.endswith(('.ipynb', '.json', '.csv')) and (ROOT/f).exists():
            assert not re.search('|'.join([re.escape(f'{ROOT.parent}/'), re.escape(f'{Path.home()}/'), 'site-packages', tempfile.gettempdir()]), (ROOT/f).read_text(encoding='utf-8')), f
