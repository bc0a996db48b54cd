"The site: what its pages are made of, what its builder refuses, and, where jupyter-book is installed, the whole of it."
import json
import re
import shutil
import subprocess
from base64 import b64decode
from importlib.util import find_spec
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, chapter, refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinocls.app import website
from dinocls.app.driver import chapters
from dinocls.app.site import RECORD
from dinocls.kit.config import preset
from dinocls.kit.datasets import loaded
from dinocls.kit.files import write_json

GLOSSARY = (ROOT/'nbs'/'glossary.md').read_text(encoding='utf-8')
TERMS = re.findall('^## (.+)$', GLOSSARY, re.M)


def slug(heading): return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def figure(file, **told):
    "Write a picture that says what it shows."
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, text in told.items(): info.add_text(key, text)
    Image.new('RGB', (4, 4)).save(file, pnginfo=info)


@pytest.fixture
def run(book):
    "A run of two small chapters, as the driver leaves it behind."
    for name, reads in (('01_first', 'nothing'), ('02_last', 'all')):
        chapter(book, name, "#| export\nsave_figure(cfg, '01_first', 'one', fig)", reads=reads)
    (book/'nbs'/'glossary.md').write_text('# Glossary\n\n## EMA\n\nA mean.\n')
    run = book/'outputs'/'quick'
    figure(run/'01_first'/'one.png', Title='Up', Description='A line goes up.')
    for i, c in enumerate(chapters()):
        answer = {'cell_type': 'markdown', 'id': 'findings', 'metadata': {}, 'source': '## The answer\n\nYes.'}
        nb = json.loads(c.path.read_text())
        (run/f'{c.name}.ipynb').write_text(json.dumps(nb | {'cells': [nb['cells'][0], answer, *nb['cells'][1:]]}))
        (run/c.name).mkdir(exist_ok=True)
        claims = [{'claim': 'It holds.', 'holds': True, 'evidence': '1'}] * i
        write_json(run/c.name/'findings.json', {'answer': f'Answer {i}.', 'figure': 'one' if not i else '', 'alt': 'Up',
                                                'claims': claims, 'untold': '', 'change': ''})
    write_json(run/'run.json', {'preset': 'quick', 'config': {'seed': 7}})
    write_json(run/'book.json', {'chapters': {'01_first': {'seconds': 3.2, 'peak_mb': 1234}}, 'hardware': {'cores': 2},
                                 'versions': {'torch': '2'}, 'git': '0123'})
    return run


def test_the_glossary_is_in_order_and_short_and_leads_to_chapters():
    assert sorted(TERMS, key=str.lower) == TERMS and len(TERMS) == len(set(map(slug, TERMS))) > 40
    for entry in re.split('^## ', GLOSSARY, flags=re.M)[1:]:
        assert re.findall(r'\]\((\w+)\.ipynb\)', entry) and len(entry.split()) < 70, entry
    assert all((ROOT/'nbs'/target).is_file() for target in re.findall(r'\]\((\w+\.ipynb)\)', GLOSSARY))


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_what_chapters_link_in_the_glossary_is_there(path):
    linked = set(re.findall(r'glossary\.md#([^)\s\\"]+)', path.read_text(encoding='utf-8')))
    assert linked <= set(map(slug, TERMS))


def test_a_page_is_the_executed_chapter_with_folds_links_and_descriptions(run):
    c = chapters()[0]
    nb = json.loads((run/f'{c.name}.ipynb').read_text())
    badge = '[![Open in Colab](elsewhere)](elsewhere)'
    nb['cells'][1:1] = [{'cell_type': 'markdown', 'id': 'a', 'metadata': {}, 'source': s}
                        for s in (badge, 'See [how](../CONTRIBUTING.md). Then **this**:\nand so on.')]
    nb['cells'][5]['metadata']['tags'] = ['parameters', 'hide-cell']
    for s in ('seed = 7', 'import math'):
        nb['cells'].insert(6, {'cell_type': 'code', 'id': s[:4], 'metadata': {'tags': ['hide-cell']}, 'source': s,
                               'outputs': [], 'execution_count': 1})
    picture = {'output_type': 'display_data', 'data': {'image/png': ''}, 'metadata': {}}
    nb['cells'][-1]['outputs'] = [picture]
    nb['cells'].append(nb['cells'][-1] | {'id': 'z', 'metadata': {}, 'source': '#| hide\ndraw()'})
    (run/f'{c.name}.ipynb').write_text(json.dumps(nb))
    record = json.loads((run/'book.json').read_text())
    cells = json.loads(website.chapter_page(c, run, record))['cells']
    text = '\n'.join(cell['source'] for cell in cells)
    assert 'elsewhere' not in text and '#|' not in text and '/blob/main/CONTRIBUTING.md)' in text
    assert 'class="chip"' in cells[1]['source'] and '3 s, 1,234 MB' in cells[1]['source']
    assert [cell['source'].split('\n')[0] for cell in cells if 'hide-cell' in cell['metadata'].get('tags', ())] == [
        "preset: str = 'smoke'"] and 'import math\n\nseed = 7' in text
    alts = [cell['metadata']['mystnb']['image']['alt'] for cell in cells if cell.get('outputs')]
    assert alts == ['A line goes up.', '| | |']  # what the file says, else the text before it
    (run/f'{c.name}.ipynb').unlink()
    source = json.loads(website.chapter_page(c, run, record))['cells']
    assert 'has not executed it' in source[1]['source'] and not any(cell.get('outputs') for cell in source)


def test_the_first_page_shows_the_findings_that_could_be_decided():
    book = [SimpleNamespace(name=f'{i:02}_c', title=f'T{i}', question='', reads=('x',) * i) for i in range(12)]
    found = {c.name: {'answer': f'A{i}.', 'figure': '' if i == 11 else 'f', 'alt': f'Alt {i}',
                      'claims': [{'holds': True if j < i else None} for j in range(11)]} for i, c in enumerate(book)}
    page = website.landing(ROOT/RECORD, book, found)
    assert re.findall(r'grid-item-card} (\w+)', page) == [f'T{i}' for i in range(3, 11)] and '12 chapters' in page
    assert '{image} 10_c/f.png' in page and ':link: 03_c.html#the-answer' in page
    assert 'grid-item' not in website.landing(ROOT/RECORD, book, {})


def test_all_figures_are_shown_with_what_they_say(run):
    figure(run/'02_last'/'two.png')
    page = website.gallery(run, chapters())
    assert '**Up**\\\nA line goes up.' in page and ':alt: two' in page and page.count(':target:') == 2


def test_the_reference_is_what_stands_in_the_file(tmp_path):
    (tmp_path/'m.py').write_text('"What it is for."\nclass A:\n    "An A."\n    n: int = 1  # how many\n    @property\n'
                                 '    def more(self) -> int:\n        "Return more."\n        return self.n + 1\n'
                                 '    def _own(self): pass\n\n\n'
                                 'def f(x: int,  # a number\n      ) -> int:\n    return x\n'
                                 'def g(): return 1\ndef _hidden(): pass\n')
    page = website.api_page('m', tmp_path/'m.py', [SimpleNamespace(module='m', title='T', name='01_m')])
    assert page.startswith('# m\n\nWhat it is for.\n\nTold in [T](../01_m.ipynb).') and 'hidden' not in page
    assert ('    n: int = 1  # how many\n\n'
            '    @property\n    def more(self) -> int:\n        "Return more."\n```') in page
    assert 'def f(x: int,  # a number\n      ) -> int:\n```' in page and 'def g(): return 1\n```' in page
    assert 'self.n + 1' not in page and '_own' not in page


def test_a_run_keeps_its_answers_and_the_glossary_beside_the_chapters(run, monkeypatch):
    cfg = preset('quick', seed=7, out=str(run))
    rng = np.random.default_rng(0)
    arrays = {'test_logits': rng.normal(0, 3, (50, 4)), 'test_labels': np.arange(50) % 4, 'test': np.arange(50, 100),
              'sample': np.array([0, 3]), 'label': np.arange(50) % 4, 'maps': np.full((2, 1, 2, 2, 2), 0.25)}
    class Made(dict):
        def __init__(self, seed, damage=''):
            super().__init__(arrays)
            self.record, self.damage = {'fields': {'seed': seed}}, lambda: damage
    monkeypatch.setattr(website, 'stored', lambda folder, name: [Made(8), Made(7, 'a bit flipped'), Made(7)])
    website.write_beside(cfg)
    kept = json.loads((run/'play.json').read_text())
    assert (run/'glossary.md').read_text().startswith('# Glossary') and kept['labels'][:5] == [0, 1, 2, 3, 0]
    below = np.array(kept['below'])
    assert (below.min(1) == 0).all() and (below.argmin(1) == arrays['test_logits'].argmax(1)).all()
    first, second = kept['looks']
    assert first['maps'] == [[[2500, 2500], [2500, 2500]]] * 2 and (first['name'], second['name']) == ('0', '3')
    picture = Image.open(BytesIO(b64decode(second['picture'].partition(',')[2])))
    assert (np.asarray(picture) == loaded(cfg).images[53]).all()
    monkeypatch.setattr(website, 'stored', lambda folder, name: [])
    rows = [{'metric': 'temperature', 'value': 0.5}, {'metric': 'clean', 'value': 0.9},
            {'metric': 'corruption:gaussian_noise', 'value': 0.8, 'low': 0.7, 'high': 0.85, 'severity': 1},
            {'metric': 'corruption:gaussian_noise', 'value': 0.8, 'severity': 'mean'}]
    write_json(run/'01_first'/'metrics.json', rows)
    data = website.play_data(cfg)
    assert data == kept | {'temperature': 0.5, 'clean': 0.9, 'corruptions': {'gaussian noise': [[0.8, 0.7, 0.85]]}}
    arrays['test_logits'], arrays['test_labels'] = np.zeros((10_000, 100)), np.zeros(10_000, int)
    monkeypatch.setattr(website, 'stored', lambda folder, name: [Made(7)])
    website.write_beside(cfg)
    assert 0 < (run/'play.json').stat().st_size < 200_000


def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.html').write_text('<a href="sub/b.html#x">b</a><a href="#here">h</a><i id="here"></i>'
                                   '<a href="https://example.org/paper">paper</a><img src="data:image/png;base64,">')
    (tmp_path/'sub'/'b.html').write_text('<i id="x"></i><a href="../a.html">a</a><a href="mailto:a@b.c">m</a>')
    (tmp_path/'a.css').write_text('a { background: url("data:image/svg+xml;utf8,http://www.w3.org") }')
    assert website.faults(tmp_path) == []
    (tmp_path/'c.html').write_text('<a href="sub/b.html#y">b</a><img src="no.png"><script src="https://cdn.example/x.js">'
                                   '</script><script>load("https://cdn.example/y.js")</script>')
    (tmp_path/'c.css').write_text('@import "//fonts.example/f.css";')
    assert set(website.faults(tmp_path)) == {
        'c.html links to sub/b.html#y', 'c.html links to no.png', 'c.html loads https://cdn.example/x.js',
        'c.html loads https://cdn.example/y.js', 'c.css loads //fonts.example/f.css'}


def test_what_can_be_refused_is_refused_first(run, in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(website, 'find_spec', lambda name: None)
    refused(in_process('site'), 'jupyter-book', "pip install '.[site]'")
    monkeypatch.setattr(website, 'find_spec', lambda name: True)
    refused(in_process('site', '--run', run, '--to', run), 'holds something else')
    for copy in run.glob('*.ipynb'): copy.unlink()
    refused(in_process('site', '--run', run, '--to', tmp_path/'new'), 'holds no executed chapter')


@pytest.mark.slow
@pytest.mark.skipif(not find_spec('jupyter_book'), reason='jupyter-book is not installed: the extra site brings it')
@pytest.mark.parametrize('of', ['a small run', 'the committed run'])
def test_the_site_is_built_whole_in_the_place_of_the_one_before(run, tmp_path, monkeypatch, of):
    if of == 'the committed run':
        monkeypatch.delenv('DINOCLS_HOME')
        run = ROOT/RECORD
    book, to = chapters(), tmp_path/'site'
    to.mkdir()
    for name in ('searchindex.js', 'old.html'): (to/name).touch()  # of a site that is there
    page = website.build_site(run, to, book)
    assert (to/'searchindex.js').stat().st_size and not (to/'old.html').exists()
    assert page.read_text().count('sd-card-img-top') == (1 if of == 'a small run' else 8)
    for c in book:
        text = (to/f'{c.name}.html').read_text()
        assert (f'href="{c.name}.ipynb"' in text) == (run/f'{c.name}.ipynb').is_file()
        assert not re.findall('<img(?![^>]*alt="[^"]+)[^>]*>', text)
    assert 'id="ema"' in (to/'glossary.html').read_text() and (to/'play-data.js').stat().st_size < 200_000
    assert not any('mathjax' in p.read_text().lower() for p in to.glob('*.html'))


@pytest.mark.skipif(not shutil.which('node'), reason='there is no node to run it')
def test_the_playing_figures_tell_what_python_tells(tmp_path):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (200, 5)), rng.integers(0, 5, 200)
    below = (100 * (logits.max(1, keepdims=True) - logits)).round().astype(int)
    run = {'temperature': 2.0, 'clean': 0.9, 'labels': labels.tolist(), 'below': below.tolist(),
           'corruptions': {'fog': [[0.8, 0.7, 0.9], [0.6, 0.5, 0.7]]},
           'looks': [{'name': '<b>"cat', 'picture': 'data:,',
                      'maps': [[[1000, 2000], [6000, 1000]], [[2500] * 2] * 2]}]}
    code = (ROOT/'dinocls'/'app'/'web'/'play.js').read_text()
    (tmp_path/'all.mjs').write_text(f'{PAGE}window.RUN = {json.dumps(run)}\n{code}\nconsole.log(JSON.stringify(said))')
    done = subprocess.run(['node', tmp_path/'all.mjs'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    p = np.exp(-below / 200)
    p /= p.sum(1, keepdims=True)
    sure, right = p.max(1), p.argmax(1) == labels
    given, errors = int((sure >= 0.9).sum()), int((~right[sure >= 0.9]).sum())
    assert said['threshold'].startswith(f'At 90.0 %: {given} of 200 images answered, {errors} of them wrongly')
    q = np.exp(-below / 100)
    loss = -np.log((q / q.sum(1, keepdims=True))[np.arange(200), labels]).mean()
    assert f'loss {loss:.3f} nats. Right are {100 * right.mean():.1f} %' in said['temperature']
    assert said['corruption'] == ('fog, severity 2: 60.0 % right (95 % interval 50.0 % to 70.0 %), 90.0 % when clean.')
    assert '<b>' not in said['drawn'] and said['drawn'].count('&#60;b&#62;&#34;cat') == 2
    assert said['head'] == 'Head 1 of 2, <b>"cat: a quarter of the patches get 60.0 % of the attention.'


PAGE = '''const said = {}, values = { threshold: .9, temperature: 0, corruption: 2, head: 1 }
globalThis.window = globalThis
globalThis.addEventListener = () => {}
const drawn = id => ({ set innerHTML(text) { if (id == 'head') said.drawn = (said.drawn ?? '') + text } })
const box = id => ({ __proto__: drawn(id), clientWidth: 640, addEventListener() {}, querySelector: what => ({
  select: { value: id == 'head' ? 0 : 'fog' }, input: { value: values[id] },
  output: { set textContent(text) { said[id] = text } }, '.plane': drawn(id) })[what] })
globalThis.document = { getElementById: box, querySelector: () => ({ addEventListener() {}, remove() {} }) }
'''
