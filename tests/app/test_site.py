"What follows from the chapters: badges, Colab cells, README blocks, pages; and what the committed run is of."
import json
import re
import subprocess

import pytest
from conftest import ROOT, chapter
from PIL import Image

from dinocls.app import site
from dinocls.app.driver import chapters
from dinocls.kit.config import PRESETS

BOOK, RECORD = chapters(), ROOT/site.RECORD
README = (ROOT/'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('c', BOOK, ids=lambda c: c.name)
def test_a_notebook_is_as_it_is_committed(c):
    text = c.path.read_text(encoding='utf-8')
    assert text in [site.as_source(c.path, repo) for repo in site.repositories()] and f'nbs/{c.name}.ipynb)' in text


def test_badges_follow_from_settings():
    links = re.findall(r'\[Colab\]\((.*?)\)', README)
    assert links in [[site.colab_link(c.name, repo) for c in BOOK] for repo in site.repositories()]
    start = 'https://colab.research.google.com/github/ann/cats/blob/trunk/'
    assert site.colab_link('05_phase1', dict(user='ann', repo='cats', branch='trunk')) == f'{start}nbs/05_phase1.ipynb'


@pytest.mark.parametrize('user, url, expected', [
    ('dinocls', 'git@github.com:ann/cats.git', ['ann/cats', 'dinocls/dinocls']),
    ('dinocls', 'https://github.com/ann/cats', ['ann/cats', 'dinocls/dinocls']),
    ('dinocls', '/srv/cats', ['dinocls/dinocls']), ('bob', 'https://github.com/ann/cats', ['bob/dinocls'])])
def test_badges_lead_to_the_checkouts_own_repository(tmp_path, monkeypatch, user, url, expected):
    lines = '[DEFAULT]', 'lib_name = dinocls', f'user = {user}', 'repo = dinocls', 'branch = main'
    (tmp_path/'settings.ini').write_text('\n'.join(lines))
    for words in ('init -q', f'remote add origin {url}'):
        subprocess.run(['git', *words.split()], cwd=tmp_path, check=True)
    monkeypatch.setenv('DINOCLS_HOME', str(tmp_path))
    found = site.repositories()
    assert ['{user}/{repo}'.format(**repo) for repo in found] == expected and {r['branch'] for r in found} == {'main'}


def test_outputs_and_foreign_badges_are_mended(book):
    chapter(book, '01_first', '1 + 1')
    path = book/'nbs'/'01_first.ipynb'
    nb = json.loads(path.read_text())
    nb['cells'][1] |= {'source': '[![Open in Colab](elsewhere)](elsewhere)'}
    nb['cells'][2] |= {'source': '# In Colab, install something else'}
    nb['cells'][3] |= {'outputs': [{'output_type': 'stream', 'name': 'stdout', 'text': '2'}], 'execution_count': 1}
    path.write_text(json.dumps(nb))
    repo = site.repositories()[0]
    badge, install, code = (''.join(c['source']) for c in json.loads(site.as_source(path, repo))['cells'][1:])
    assert (badge, install) == site.colab_cells('01_first', repo) and code == '1 + 1'
    assert json.loads(site.as_source(path, repo))['cells'][3]['outputs'] == []


def test_tables_list_all():
    found = {BOOK[0].name: {'figure': 'key', 'alt': 'A "bar" | two', 'answer': 'Yes.', 'claims': []}}
    lines = site.chapter_table(BOOK, found, site.repositories()[0]).splitlines()[2:]
    for c, line in zip(BOOK, lines, strict=True):  # what the record lacks is linked to its source
        page = f'{site.RECORD}/{c.name}.ipynb'
        assert f']({page if (ROOT/page).is_file() else f"nbs/{c.name}.ipynb"})' in line
    assert f'{BOOK[0].name}/key.png" width="180" alt="A bar ,  two"' in lines[0] and lines[0].count(' | ') == 2
    told = site.findings_list(BOOK, found, 'Run x.')
    assert told.startswith(f'- **[{BOOK[0].question}]') and 'Yes.' in told and '\n- ' not in told and 'Run x.' in told
    assert [line.split('`')[1] for line in site.preset_table().splitlines()[2:]] == [*PRESETS]


def test_readme_and_notebooks_are_up_to_date(in_process):
    changed = subprocess.run(['git', 'status', '--porcelain', '--', site.RECORD], cwd=ROOT, capture_output=True)
    if changed.stdout: pytest.skip('the record is being made anew, and has its own numbers')
    result = in_process('sync', '--check')
    assert result.returncode == 0, result.stdout


def test_sync_mends_and_check_only_tells(tmp_path, monkeypatch, in_process):
    from dinocls.app import cli
    (tmp_path/'a.md').write_text('old')
    monkeypatch.setattr(cli, 'generated', lambda book, repo: {tmp_path/'a.md': 'new'})
    told = in_process('sync', '--check')
    assert told.returncode == 1 and 'is out of date' in told.stdout and (tmp_path/'a.md').read_text() == 'old'
    assert in_process('sync').returncode == 0 and (tmp_path/'a.md').read_text() == 'new'
    assert in_process('sync', '--check').returncode == 0


def test_the_record_is_of_the_chapters_as_they_are_or_says_of_which_commit():
    said = site.of_which_commit(RECORD, BOOK)
    assert said in (ROOT/'docs'/'reported.md').read_text(encoding='utf-8')
    if said.startswith('It is of commit'): assert re.fullmatch('[0-9a-f]{12}', re.search('`(.*)`', said)[1])


def test_a_changed_or_missing_chapter_is_noticed(book):
    for name in ('01_same', '02_changed', '03_new'): chapter(book, name, '1 + 1')
    run = book/'run'
    run.mkdir()
    for name in ('01_same', '02_changed'):
        nb = json.loads((book/'nbs'/f'{name}.ipynb').read_text())
        nb['cells'].insert(3, {'cell_type': 'code', 'source': 'x = 1', 'metadata': {'tags': ['injected-parameters']}})
        nb['cells'][-1]['source'] = ['1 + ', '1' if 'same' in name else '2']
        (run/f'{name}.ipynb').write_text(json.dumps(nb))
    (run/'book.json').write_text('{"git": "0123456789ab"}')
    found = chapters()
    said = 'It is of commit `0123456789ab`; chapters whose code has changed since: 02_changed, 03_new.'
    assert site.of_which_commit(run, found) == said
    assert site.of_which_commit(run, found[:1]) == 'It is of the chapters as they are here.'


def test_pages_are_written_for_what_was_executed_and_kept_while_newer(book):
    for name in ('01_first', '02_later'): chapter(book, name, '1 + 1')
    found = chapters()
    (run := book/'run').mkdir()
    nb = json.loads((book/'nbs'/'01_first.ipynb').read_text())
    nb['cells'][1]['source'] = '![A dot](01_first/dot.png) is a [word](glossary.md#word)'
    (run/'01_first.ipynb').write_text(json.dumps(nb))
    (run/'01_first').mkdir()
    Image.new('L', (1, 1)).save(run/'01_first'/'dot.png')
    contents, page = site.write_pages(run, found), run/'html'/'01_first.html'
    assert 'src="data:image/png' in page.read_text() and 'href="../glossary.md#word"' in page.read_text()
    assert '01_first · dinocls' in page.read_text() and [p.name for p in page.parent.iterdir()] == ['01_first.html']
    assert 'html/01_first.html' in contents.read_text() and '02_later' not in contents.read_text()
    page.write_text('kept')
    site.write_pages(run, found)
    assert page.read_text() == 'kept'
