"The package as others install it: from its wheel, without nbdev or Jupyter."
import ast
import json
import re
import shutil
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


COLAB = {'google/colab/__init__.py': '', 'google/colab/kernel.py': """
from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell

class Shell(ZMQInteractiveShell): __module__ = 'google.colab.shell'
class Kernel(IPythonKernel): shell_class = Shell
"""}


@pytest.mark.slow
def test_a_chapter_runs_in_colab_with_nothing_but_its_own_file(tmp_path):
    "Its own cell installs the package, out of a repository as that of the badge."
    import nbformat
    from nbclient import NotebookClient
    repo, site, alone = (tmp_path/name for name in ('repo', 'site', 'alone'))
    shutil.copytree(ROOT/'dinocls', repo/'dinocls', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, repo)
    book = nbformat.read(ROOT/'nbs'/'00_stats.ipynb', 4)
    url, branch = re.search(r'git\+(\S+?)@(\S+?)"', book.cells[1].source).groups()
    git = ['git', '-C', repo, '-c', 'user.name=a', '-c', 'user.email=a@localhost']
    for args in (['init', '-q', '-b', branch], ['add', '-A'], ['commit', '-q', '-m', 'all']):
        subprocess.run([*git, *args], check=True)
    for name, text in COLAB.items():
        (site/name).parent.mkdir(parents=True, exist_ok=True)
        (site/name).write_text(text)
    alone.mkdir()
    told = environment(PYTHONPATH=site, PIP_TARGET=site, PIP_NO_DEPS=1, PIP_NO_BUILD_ISOLATION=0, HOME=tmp_path,
                       GIT_CONFIG_COUNT=1, GIT_CONFIG_KEY_0=f'url.file://{repo}.insteadOf', GIT_CONFIG_VALUE_0=url)
    where = "import dinocls, IPython; print(dinocls.__file__, IPython.get_ipython())"
    book.cells.append(nbformat.v4.new_code_cell(where))
    NotebookClient(book, timeout=300, resources={'metadata': {'path': str(alone)}}, kernel_name='python3',
                   extra_arguments=['--IPKernelApp.kernel_class=google.colab.kernel.Kernel']).execute(env=told)
    said = book.cells[-1].outputs[0].text
    assert said.startswith(f'{site}/dinocls/__init__.py <google.colab') and (alone/'outputs'/'smoke').is_dir()


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


@pytest.mark.slow
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
