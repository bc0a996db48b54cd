"The package as others install it: from its wheel, without nbdev or Jupyter."
import ast
import json
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import metadata

import pytest
from conftest import ROOT, environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BLOCKED = '''
import sys

class Block:
    "Make the book's development tools look as if they were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'nbdev', 'fastcore', 'execnb', 'ghapi', 'papermill', 'IPython', 'ipykernel',
                                      'jupyterlab', 'nbconvert', 'nbclient', 'nbformat'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Block())
'''

USE = BLOCKED + '''
import importlib, pkgutil, dinocls
assert dinocls.__file__.startswith(sys.argv[1]), dinocls.__file__
for module in pkgutil.walk_packages(dinocls.__path__, 'dinocls.'):
    if '._' not in module.name: importlib.import_module(module.name)
from dinocls.kit.config import preset
from dinocls.kit.figures import subplots
from dinocls.phase1 import phase1_logits
logits = phase1_logits(preset('smoke', out='run'))
assert logits['test_logits'].shape == (100, 10)
subplots()
print('used')
'''


@pytest.mark.slow
def test_wheel_works_without_nbdev_and_jupyter(tmp_path):
    make = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path/'dist', ROOT]
    subprocess.run(make, check=True, capture_output=True)
    wheel = zipfile.ZipFile(next((tmp_path/'dist').glob('dinocls-*.whl')))
    names = wheel.namelist()
    assert ({'dinocls/book.mplstyle', 'dinocls/weights/book-digits.safetensors',
             'dinocls/weights/book-digits.json'} <= {*names}
             and not [n for n in names if n.startswith(('nbs/', 'outputs/', 'tests/'))])
    wheel.extractall(tmp_path/'site')
    result = subprocess.run([sys.executable, '-c', USE, str(tmp_path/'site')], cwd=tmp_path, capture_output=True,
                            text=True, env=environment(PYTHONPATH=tmp_path/'site'))
    assert result.stdout.endswith('used\n'), result.stderr[-2000:]
    assert (tmp_path/'run').is_dir()


def installed_by(names: list) -> set:
    "Return the distributions that these requirements bring, with all that they require themselves."
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        asked = todo.pop()
        if (name := canonicalize_name(asked.name)) in found: continue
        found.add(name)
        needs = map(Requirement, metadata.requires(name) or ())
        todo += [r for r in needs if not r.marker or any(r.marker.evaluate({'extra': e}) for e in (*asked.extras, ''))]
    return found


def test_the_extra_book_brings_all_that_chapters_import():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    parts = [''] + [f'{extra}_' for extra in ('book', 'pretrain', 'lora', 'export', 'serve')]
    brought = installed_by([r for part in parts for r in config['DEFAULT'][f'{part}requirements'].split()])
    owners, missing = metadata.packages_distributions(), {}
    for file in sorted((ROOT/'nbs').glob('*.ipynb')):
        cells = (''.join(c['source']) for c in json.loads(file.read_text())['cells'] if c['cell_type'] == 'code')
        trees = [ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', cell, flags=re.M)) for cell in cells]
        used = {a.name for t in trees for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names}
        used |= {n.module for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and not n.level}
        for module in {name.partition('.')[0] for name in used} - {*sys.stdlib_module_names, 'dinocls'}:
            if not {canonicalize_name(d) for d in owners.get(module, ())} & brought: missing[module] = file.name
    assert not missing


def test_executing_without_papermill_says_what_to_install(tmp_path):
    code = (BLOCKED + "sys.argv = ['dinocls', 'run', '-p', 'smoke', '--out', sys.argv[1]]\n"
            'from dinocls.app.cli import main\nmain()')
    result = subprocess.run([sys.executable, '-c', code, str(tmp_path/'run')], cwd=ROOT, capture_output=True,
                            text=True, env=environment())
    assert (result.returncode == 2 and "pip install '.[book]'" in result.stderr
            and 'Traceback' not in result.stderr)
