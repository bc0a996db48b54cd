"""The book as a site: the executed chapters of a run, a first page, all figures, something to play with, a reference of
the library. jupyter-book lays it out; nothing in it is fetched from elsewhere."""
import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from ..kit.config import Config, preset, root
from ..kit.datasets import loaded
from ..kit.figures import read_findings, read_metrics
from ..kit.files import UserError, plain, read_json, replacing
from ..kit.machine import install
from ..kit.pictures import as_url
from ..kit.stage import PACKAGE, stored
from .site import colab_link, read_notebook, repositories, telling

HERE = Path(__file__).parent


def build_site(run: Path, to: Path, book: list) -> Path:  # run folder; site's folder; chapters
    "Build the site and return its first page. Raise `UserError` if it can't be built, or a link in it leads nowhere."
    if not find_spec('jupyter_book'): raise UserError(f'The site needs jupyter-book: {install("site")}.')
    if to.is_dir() and any(to.iterdir()) and not (to/'searchindex.js').is_file():
        raise UserError(f'{to} holds something else than a site: choose a new or empty folder with --to.')
    if not any((run/f'{c.name}.ipynb').is_file() for c in book):
        raise UserError(f'{run} holds no executed chapter: execute the book first (dinocls run).')
    with TemporaryDirectory() as tmp:
        source, built = Path(tmp), Path(tmp)/'_build'/'html'
        write_sources(run, source, book)
        made = subprocess.run([sys.executable, '-c', 'from jupyter_book.cli.main import main; main()', 'build', tmp],
                              capture_output=True, text=True, cwd=tmp)
        if made.returncode: raise UserError(f'jupyter-book failed: {(made.stderr or made.stdout).strip()[-2000:]}')
        for page in built.rglob('*.html'):  # what unfolds is to be called what it says, and else something
            text = page.read_text('utf-8').replace('<summary aria-label="Toggle hidden content">', '<summary>')
            text = text.replace('<summary><span class="toctree', '<summary aria-label="Its pages"><span class="toctree')
            page.write_text(text, 'utf-8')
        lost = re.findall(r'\S*: WARNING: (.*(?:xref_missing|not readable).*)', made.stderr)
        if found := lost + faults(built): raise UserError('The site is not whole:\n' + '\n'.join(found))
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(built, to)
    return to/'index.html'


def write_sources(run: Path, source: Path, book: list):
    "Write what jupyter-book makes the site from."
    about = read_json(run/'run.json')
    cfg = preset(about['preset'], **about['config'], out=str(run))
    record, found = read_json(run/'book.json'), read_findings(cfg)
    modules = {'.'.join(f.relative_to(PACKAGE).with_suffix('').parts): f for f in
               [*sorted(PACKAGE.glob('kit/*.py')), *(PACKAGE/f'{c.module}.py' for c in book),
                *sorted(PACKAGE.glob('app/*.py'))] if f.is_file() and not f.name.startswith('_')}
    texts = {f'{c.name}.ipynb': chapter_page(c, run, record) for c in book}
    texts |= {f'api/{name}.md': api_page(name, file, book) for name, file in modules.items()}
    texts |= {'index.md': landing(run, book, found), 'gallery.md': gallery(run, book), 'play.md': play_page(run),
              'record.md': record_page(cfg, book, record),
              'api.md': '# The library\n\nOne page a module: what it offers, as it stands in its file.',
              'data/play-data.js': f'window.RUN = {json.dumps(play_data(cfg))}'}
    parts = {'Chapters': [c for c in book if not c.name.startswith('A')],
             'Appendices': [c for c in book if c.name.startswith('A')]}
    toc = [{'caption': k, 'chapters': [{'file': c.name, 'title': f'{c.name.partition("_")[0]} {c.title}'} for c in v]}
           for k, v in parts.items() if v]
    docs = {f.stem: f.read_text(encoding='utf-8') for f in sorted((root()/'docs').glob('*.md'))}
    source_at = github(book[0].name).partition('/nbs/')[0]
    texts |= {f'{name}.md': text.replace('](../nbs/', '](').replace('](../', f']({source_at}/')
              for name, text in docs.items()}
    toc += [{'caption': 'Use it', 'chapters': [{'file': name} for name in docs]}] if docs else []
    toc += [{'caption': 'Beside them', 'chapters': [
        {'file': 'gallery'}, {'file': 'play'}, {'file': 'glossary'}, {'file': 'record'},
        {'file': 'api', 'sections': [{'file': f'api/{name}'} for name in modules]}]}]
    texts['_toc.yml'] = json.dumps({'format': 'jb-book', 'root': 'index', 'parts': toc})
    texts['_config.yml'] = json.dumps(CONFIG | {'sphinx': {'config': SPHINX}})
    for name, text in texts.items():
        (source/name).parent.mkdir(exist_ok=True)
        (source/name).write_text(text, encoding='utf-8')
    for c in book:  # as it was executed
        if (run/c.name).is_dir(): shutil.copytree(run/c.name, source/c.name, ignore=shutil.ignore_patterns('.*'))
        if (run/f'{c.name}.ipynb').is_file(): shutil.copy(run/f'{c.name}.ipynb', source/'data')
    shutil.copy(root()/'nbs'/'glossary.md', source)
    shutil.copy(HERE/'web'/'play.js', source/'data')
    (source/'_static').mkdir()
    for name in ('web/site.css', 'static/icon.svg'): shutil.copy(HERE/name, source/'_static')


CONFIG = {'title': 'dinocls', 'author': 'The dinocls authors', 'copyright': '2026 onwards',
          'only_build_toc_files': True, 'execute': {'execute_notebooks': 'off'},
          'html': {'favicon': '_static/icon.svg'}, 'latex': {'use_jupyterbook_latex': False}}
SPHINX = {'extensions': ['sphinx_copybutton', 'myst_nb', 'jupyter_book', 'sphinx_external_toc', 'sphinx_design',
                         'sphinx_book_theme', 'dinocls.app.website'],  # without those that fetch from elsewhere
          'html_extra_path': ['data'], 'html_copy_source': False,
          'html_theme_options': {'navbar_persistent': [], 'use_download_button': False},
          'html_math_renderer': 'mathml', 'myst_update_mathjax': False, 'myst_heading_anchors': 3, 'numfig': False,
          'nb_ipywidgets_js': {}, 'nb_render_markdown_format': 'myst',
          'nb_code_prompt_show': 'Show the code', 'nb_code_prompt_hide': 'Hide the code'}


def setup(app):
    "Let Sphinx write formulas as MathML, which browsers know by themselves."
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert
    def written(display):
        def visit(self, node):
            self.body.append(convert(node.astext(), display=display))
            raise SkipNode
        return visit, None
    app.add_html_math_renderer('mathml', written('inline'), written('block'))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}


def figures(run: Path, chapter: str) -> dict:  # file's name → title, description
    "Return what the figures of a chapter say of themselves."
    found = {}
    for file in sorted((run/chapter).glob('[!.]*.png')):
        with Image.open(file) as image: text = getattr(image, 'text', {})
        title = ' '.join(text.get('Title', '').split()) or file.stem.replace('_', ' ')
        found[file.stem] = title, ' '.join(text.get('Description', '').split()) or title
    return found


def chapter_page(c, run: Path, record: dict) -> str:  # chapter; run folder; book.json
    """Return an executed chapter as a page: links and how it was executed below the title, directives and badges away,
    and each picture with the description that its file has, else with the sentence before it. Where the run lacks the
    chapter, its source is shown."""
    copy = run/f'{c.name}.ipynb'
    nb, drawn, said = read_notebook(copy if copy.is_file() else c.path), figures(run, c.name), c.title
    colab, source = colab_link(c.name, repositories()[0]), github(c.name)
    for cell in nb['cells']:
        text, tags = ''.join(cell['source']), cell['metadata'].setdefault('tags', [])
        if cell['cell_type'] == 'markdown':
            text = re.sub(r'\[!\[Open in Colab\]\(.*?\)\]\(.*?\)', '', text).strip()
            text = text.replace('](../', f']({source.partition("/nbs/")[0]}/')
            said = re.sub(r'[#>*`\[]|\]\(.*?\)', '', text).strip().partition('\n')[0] or said
        else:
            text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
            if 'injected-parameters' in tags: tags.append('hide-cell')
            names = [n for n in re.findall(r"save_figure\(cfg, '\w+', '(\w+)'", text) if n in drawn]
            alt = '; '.join(drawn[n][1] for n in names) or said
            cell['metadata']['mystnb'] = {'image': {'alt': alt}}
        cell['source'] = text
    done = record['chapters'].get(c.name, {})
    took = f': {done["seconds"]:.0f} s, {done["peak_mb"]:,} MB' if 'seconds' in done else ''
    chips = {'Open in Colab': colab, 'Executed notebook': copy.is_file() and f'{c.name}.ipynb', 'Source': source,
             f'Run {run.name}{took}' if copy.is_file() else f'Run {run.name} has not executed it': 'record.html'}
    row = ' '.join(f'<a class="chip" href="{url}">{text}</a>' for text, url in chips.items() if url)
    nb['cells'].insert(1, {'cell_type': 'markdown', 'id': 'links', 'metadata': {}, 'source': row})
    cells, folded = [], None
    for cell in nb['cells']:
        fold = 'hide-cell' in cell['metadata'].get('tags', ()) and not cell.get('outputs')
        if fold and folded: folded['source'] += f'\n\n{cell["source"]}'  # one to unfold, not four
        elif cell['source'] or cell.get('outputs'): cells.append(cell)
        folded = folded or cell if fold and cell['source'] else None
    return json.dumps(nb | {'cells': cells})


def github(chapter: str) -> str:
    "Return the address of a chapter's source."
    return colab_link(chapter, repositories()[0]).replace('colab.research.google.com/github', 'github.com')


def picture(path: str, alt: str, look: str = 'large') -> str:
    "Return a picture in MyST's Markdown, of a class of looks."
    return f'```{{image}} {path}\n:alt: {alt}\n:class: {look}\n```'


def landing(run: Path, book: list, found: dict) -> str:
    "Return the first page: what the book promises, and the eight findings with most claims that could be decided."
    cards = [CARD.format(title=c.question or c.title, name=c.name, **found[c.name]) for c in telling(book, found)]
    shown = [c for c in book if found.get(c.name, {}).get('figure')]
    last = max(shown, key=lambda c: len(c.reads), default=None)  # reads all others
    hero = picture(f'{last.name}/{found[last.name]["figure"]}.png', found[last.name]['alt']) if last else ''
    return LANDING.format(run=run.name, first=book[0].name, hero=hero, cards='\n'.join(cards), n=len(book))


LANDING = """# dinocls

> An experiment book: a vision transformer is fine-tuned, from data to served model, and every number is measured again.

{n} chapters, in order. Each asks one question, shows a picture and gives an answer that follows from a run: what a page
says of a result was computed, never typed. Execute the book with other data, and all pages follow.

{hero}

## What was found

::::{{grid}} 1 1 2 2
:gutter: 3

{cards}
::::

## Read, play, run

- [Begin with the first chapter]({first}.ipynb), look at [all figures](gallery.md), or [play](play.md) with a model's
  answers in this browser.
- Run it yourself: `make book` in a checkout takes minutes on two cores; there is no GPU to rent and nothing to download
  but packages.
- How this run, `{run}`, came about: [hardware, time, versions](record.md).
"""
CARD = """:::{{grid-item-card}} {title}
:link: {name}.html#the-answer
:link-type: url
:img-top: {name}/{figure}.png
:img-alt: {alt}

{answer}
:::
"""


def gallery(run: Path, book: list) -> str:
    "Return the page of all figures."
    parts = ['# All figures', 'Each leads to its chapter.']
    for c in book:
        drawn = figures(run, c.name)
        parts += [f'## {c.title}'] if drawn else []
        parts += [f':::{{figure}} {c.name}/{name}.png\n:target: {c.name}.html\n:alt: {said}\n\n**{title}**'
                  + (f'\\\n{said}' if said != title else '') + '\n:::' for name, (title, said) in drawn.items()]
    return '\n\n'.join(parts)


def record_page(cfg: Config, book: list, record: dict) -> str:
    "Return the page that says when, where and with what the chapters were executed."
    done = [(c, record['chapters'].get(c.name, {})) for c in book]
    rows = [f'| [{c.title}]({c.name}.ipynb) | {d.get("seconds", "")} | {d.get("peak_mb", "")} |' for c, d in done]
    facts = record['hardware'] | record['versions'] | {'commit': record['git']}
    return '\n'.join(['# How it was executed\n', f'Run `{cfg.folder.name}`, preset `{cfg.preset}`.\n',
                      '| chapter | seconds | memory (MB) |', '|---|--:|--:|', *rows, '',
                      '| with | which |', '|---|---|', *(f'| {k} | {v} |' for k, v in facts.items())])


def held(cfg: Config, name: str):
    "Return the newest result of a stage that the run would take; None: it holds none."
    for result in stored(cfg.folder, name):
        other = any(plain(getattr(cfg, f, None)) != v for f, v in result.record['fields'].items())
        if not other and not result.damage(): return result


def stored_answers(cfg: Config) -> dict:
    "Return what the fine-tuned model answered to test images, if the run holds it."
    if not (result := held(cfg, 'phase2_logits')): return {}
    logits, labels = result['test_logits'], result['test_labels']
    some = slice(None, None, 1 + logits.size // 20_000)  # else the file would be large
    below = 100 * (logits.max(1, keepdims=True) - logits)  # hundredths below the likeliest class
    return {'labels': labels[some].tolist(), 'below': below[some].round().astype(int).tolist()}


def stored_attention(cfg: Config, most: int = 6) -> dict:  # pictures
    "Return test pictures and what share of its attention each head gives to each patch, if the run holds it."
    made, found = held(cfg, 'splits'), held(cfg, 'attention')
    if not made or not found: return {}
    data, (n, *_) = loaded(cfg), found['sample'].shape
    some = range(0, n, 1 + (n - 1) // most)
    looks = []
    for i, image in zip(some, data.images[made['test'][found['sample'][some]]]):
        (picture := Image.fromarray(image)).thumbnail((96, 96))  # else the file would be large
        maps = (1e4 * found['maps'][i, -1]).round().astype(int)  # of the last block (heads, rows, columns)
        looks.append({'name': data.classes[found['label'][found['sample'][i]]], 'maps': maps.tolist(),
                      'picture': as_url(np.asarray(picture))})
    return {'looks': looks}


def write_beside(cfg: Config):
    "Put beside executed chapters what they link to, and the answers, for a site that is built without the stages."
    if (glossary := root()/'nbs'/'glossary.md').is_file():
        with replacing(cfg.folder/'glossary.md') as tmp: shutil.copy(glossary, tmp)
    if found := stored_answers(cfg) | stored_attention(cfg):
        with replacing(cfg.folder/'play.json') as tmp: tmp.write_text(json.dumps(found) + '\n', encoding='utf-8')


def play_data(cfg: Config) -> dict:
    "Return what the page that plays needs: answers and their temperature, accuracies under corruptions, attention."
    rows, answers = read_metrics(cfg), cfg.folder/'play.json'
    found = {'temperature': next((r['value'] for r in rows if r['metric'] == 'temperature'), 1), 'corruptions': {},
             'clean': next((r['value'] for r in rows if r['metric'] == 'clean'), None)}
    for r in rows:
        if r['metric'].startswith('corruption:') and isinstance(r['severity'], int):
            place = found['corruptions'].setdefault(r['metric'][11:].replace('_', ' '), [])
            place.append([round(r[k], 4) for k in ('value', 'low', 'high')])
    return found | (read_json(answers) if answers.is_file() else {})  # none where chapters 6 and 11 were not executed


PLAY = {  # what can be moved → its heading, chapter and figure that stand for it where no script runs
    'threshold': ('When should it rather not answer?', '10_errors', 'coverage'),
    'temperature': ('How sure may it say it is?', '10_errors', 'reliability'),
    'corruption': ('How much of a bad picture does it bear?', '12_robustness', 'severity'),
    'head': ('Where does each head look?', '11_attention', 'heads')}


def play_page(run: Path) -> str:
    "Return the page whose figures can be moved, with still ones for where no script runs."
    parts = ['# Play', "Everything here is computed in your browser, from what this run's fine-tuned model answered to "
             'its test images.']
    for name, (heading, chapter, figure) in PLAY.items():
        parts.append(f'## {heading}\n\n<div class="play" id="{name}"></div>')
        if said := figures(run, chapter).get(figure):
            parts.append(picture(f'{chapter}/{figure}.png', said[1], f'still-{name}'))
    return '\n\n'.join([*parts, '<script src="play-data.js"></script>\n<script src="play.js"></script>'])


def api_page(name: str, file: Path, book: list) -> str:  # as in 'kit.files'
    "Return a module's public definitions as they stand in its file, without their bodies."
    lines, tree = (text := file.read_text(encoding='utf-8')).splitlines(), ast.parse(text)

    def head(node) -> list:
        first = min(n.lineno for n in (node, *node.decorator_list)) - 1
        last = node.body[0].end_lineno if ast.get_docstring(node) else max(node.lineno, node.body[0].lineno - 1)
        found = lines[first:last]
        for n in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(n, ast.AnnAssign): found += lines[n.lineno - 1:n.end_lineno]
            if isinstance(n, ast.FunctionDef) and not n.name.startswith('_'): found += ['', *head(n)]
        return found
    told = [f'Told in [{c.title}](../{c.name}.ipynb).' for c in book if c.module == name]
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith('_')]
    shown = ['\n'.join([f'## {n.name}\n\n```{{code-block}} python\n:class: api\n', *head(n), '```']) for n in public]
    return '\n\n'.join([f'# {name}', ast.get_docstring(tree) or '', *told, *shown])


def faults(site: Path) -> list[str]:
    "Return what is wrong with a built site: links that lead nowhere, and what it would load from elsewhere."
    from bs4 import BeautifulSoup
    pages = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser').find_all(True)
             for p in site.rglob('*.html') if '_static' not in p.parts}  # a theme's templates
    ids = {p: {tag.get('id') for tag in tags} | {tag.get('name') for tag in tags if tag.name == 'a'}
           for p, tags in pages.items()}
    found = [f'{p.relative_to(site)} loads {url}' for p in site.rglob('*.css')
             for url in re.findall(r'(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')\s]+)', p.read_text('utf-8'))]
    for page, tags in pages.items():
        links = {(tag[k], tag.name != 'a') for tag in tags for k in ('href', 'src', 'srcset', 'poster', 'data')
                 if tag.get(k)}  # address, and whether it is loaded
        links |= {(url, True) for tag in tags if tag.name == 'script'
                  for url in re.findall(r'''["'](https?://[^"']+)''', tag.string or '')}
        for url, loads in sorted(links):
            u, where = urlsplit(url), page.relative_to(site)
            if u.netloc and loads: found.append(f'{where} loads {url}')
            if u.scheme or u.netloc: continue
            file = (page.parent/unquote(u.path)).resolve() if u.path else page
            if file.is_dir(): file = file/'index.html'
            lost = not file.exists() or u.fragment and unquote(u.fragment) not in ids.get(file, {u.fragment})
            if lost: found.append(f'{where} links to {url}')
    return found
