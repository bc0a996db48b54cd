"The house: imports go down only, and a name is defined once."
import ast
import json
import re

import pytest
from conftest import ROOT

CHAPTERS = [re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8'))[1]
            for p in sorted(ROOT.glob('nbs/*.ipynb'))]
FILES = [p for p in sorted(ROOT.glob('dinocls/**/*.py')) if p.name not in ('_modidx.py', '__init__.py', '__main__.py')]


def name_of(file) -> str: return '.'.join(file.relative_to(ROOT/'dinocls').with_suffix('').parts)


def floor(module: str) -> int:
    "Return how high a module lies: kit 0, chapters by their order, app above them all."
    top = module.partition('.')[0]
    return {'kit': 0, 'app': 100}.get(top) if top in ('kit', 'app') else 1 + CHAPTERS.index(top)


def imported(file) -> set:
    "Return the package's modules that a module imports, anywhere in it."
    package, found = ROOT/'dinocls', set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom): continue
        path = node.module.split('.') if node.module else []
        if node.level: base = file.parents[node.level - 1].joinpath(*path)
        elif path[:1] == ['dinocls']: base = package.joinpath(*path[1:])
        else: continue
        found |= {p for p in (base.with_suffix('.py'), *(base/f'{n.name}.py' for n in node.names)) if p.is_file()}
    return {name_of(p) for p in found}


def test_each_module_of_the_middle_floor_is_a_chapter():
    assert {name_of(f) for f in FILES if f.parent.name == 'dinocls'} == set(CHAPTERS)


@pytest.mark.parametrize('file', FILES, ids=name_of)
def test_imports_go_down_only(file):
    here = name_of(file)
    above = {m for m in imported(file) if floor(m) > floor(here) or floor(m) == floor(here)
             and not here.startswith(('kit', 'app'))}
    assert not above - {here}, f'{here} imports {above}'


def test_a_name_is_defined_once():
    homes = {}
    for file in (f for f in FILES if f.parent.name != 'app'):
        for node in ast.parse(file.read_text(encoding='utf-8')).body:
            targets = [t.id for t in getattr(node, 'targets', ()) if isinstance(t, ast.Name)]
            for name in ([node.name] if hasattr(node, 'name') else targets):
                if not name.startswith('_'): homes.setdefault(name, set()).add(name_of(file))
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not twice


def test_private_names_stay_at_home():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('dinocls')):
                private = [n.name for n in node.names if n.name.startswith('_') and n.name != '__version__']
                assert not private, f'{name_of(file)} imports {private}'


def test_no_chapter_is_longer_than_a_reader_bears():
    cells = {p.stem: len(json.loads(p.read_text(encoding='utf-8'))['cells']) for p in ROOT.glob('nbs/*.ipynb')}
    assert sum(cells.values()) <= 1000 + 44, cells  # 44: A2, which came when the 1,000 were full


@pytest.mark.parametrize('file', sorted((ROOT/'.github'/'workflows').iterdir()), ids=lambda p: p.stem)
def test_a_workflow_runs_only_what_was_seen_and_may_only_read(file):
    text = file.read_text()
    used = re.findall(r'uses: (\S+)', text)
    assert used and all(re.search('@[0-9a-f]{40}$', u) for u in used) and 'permissions:\n  contents: read' in text


@pytest.mark.parametrize('file', FILES, ids=name_of)
def test_nobody_is_sent_to_what_an_index_has_under_this_name(file):
    assert not re.search(r"""pip install [^\n]*\bdinocls(\[\w+\])?['"`]""", file.read_text(encoding='utf-8'))
