"The package as others install it: from its wheel, without nbdev or Jupyter."
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, environment

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
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path/'dist', ROOT], check=True,
                   capture_output=True)
    wheel = next((tmp_path/'dist').glob('dinocls-*.whl'))
    names = zipfile.ZipFile(wheel).namelist()
    assert ({'dinocls/book.mplstyle', 'dinocls/weights/book-digits.safetensors',
             'dinocls/weights/book-digits.json'} <= {*names}
             and not [n for n in names if n.startswith(('nbs/', 'outputs/', 'tests/'))])
    subprocess.run([*pip, 'install', '--no-deps', '--target', tmp_path/'site', wheel], check=True, capture_output=True)
    result = subprocess.run([sys.executable, '-c', USE, str(tmp_path/'site')], cwd=tmp_path, capture_output=True,
                            text=True, env=environment(PYTHONPATH=tmp_path/'site'))
    assert result.stdout.endswith('used\n'), result.stderr[-2000:]
    assert (tmp_path/'run').is_dir()


def test_executing_without_papermill_says_what_to_install(tmp_path):
    code = (BLOCKED + "sys.argv = ['dinocls', 'run', '-p', 'smoke', '--out', sys.argv[1]]\n"
            'from dinocls.app.cli import main\nmain()')
    result = subprocess.run([sys.executable, '-c', code, str(tmp_path/'run')], cwd=ROOT, capture_output=True,
                            text=True, env=environment())
    assert (result.returncode == 2 and "pip install '.[book]'" in result.stderr
            and 'Traceback' not in result.stderr)
