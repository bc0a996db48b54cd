"What follows from the chapters and their execution: a run's pages, badges, Colab cells, the generated blocks of texts."
import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

from ..kit.config import PRESETS, preset, root
from ..kit.figures import read_findings
from ..kit.files import explain, read_json, reason, replacing

RECORD, OF = 'outputs/record-laptop', 'laptop'  # the committed run that README and site show, and its preset
NOBODY = 'dinocls'  # the user whom settings.ini names until the book has an owner


def read_notebook(path: Path) -> dict:
    "Read a notebook. Raise `UserError` if it is damaged."
    with explain((OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError), f'{path} is not a '
                 'notebook, or damaged', 'run the chapter again, or take it from git if it is a source.'):
        nb = json.loads(path.read_text(encoding='utf-8'))
        for cell in nb['cells']: cell['cell_type'], cell['metadata'].get('tags'), ''.join(cell['source'])
    return nb


def write_pages(folder: Path, book: list) -> Path:  # run folder; chapters
    "Write each executed chapter as a page, and a page of contents; return the latter. What is newer stays."
    from nbconvert import HTMLExporter
    exporter, done = HTMLExporter(embed_images=True), [c for c in book if (folder/f'{c.name}.ipynb').exists()]
    for c in done:
        source, page = folder/f'{c.name}.ipynb', folder/'html'/f'{c.name}.html'
        if page.exists() and page.stat().st_mtime > source.stat().st_mtime: continue
        about = {'metadata': {'name': f'{c.title} · dinocls', 'path': str(folder)}}  # where its pictures are
        try: body, _ = exporter.from_file(str(source), about)
        except Exception as e:  # whatever a damaged one makes nbconvert raise
            print(f'Note: {source} is damaged ({reason(e)}): run the chapter again.')
            continue
        body = body.replace('href="glossary.md', 'href="../glossary.md')
        with replacing(page) as tmp: tmp.write_text(body, encoding='utf-8')
    items = '\n'.join(f'<li><a href="html/{c.name}.html">{c.title}</a><br><span>{c.claim}</span></li>' for c in done)
    contents = CONTENTS.format(run=folder.name, items=items)
    with replacing(folder/'index.html') as tmp: tmp.write_text(contents, encoding='utf-8')
    return folder/'index.html'


CONTENTS = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dinocls: {run}</title>
<style>body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem;
  color: #222 }}
a {{ color: #0072b2; font-weight: 600; text-decoration: none }} span {{ color: #555 }} li {{ margin: .6rem 0 }}</style>
<h1>dinocls, run <code>{run}</code></h1>
<p>Every chapter as it was executed. The numbers are gathered in <a href="html/14_report.html">the report</a>.</p>
<ol start="0">
{items}
</ol></html>
'''


def repositories() -> list[dict]:  # user, repo, branch
    "Return where badges may lead: to origin on GitHub, while settings.ini names nobody, and to what that says."
    config = ConfigParser(delimiters=['='])
    config.read(root()/'settings.ini', encoding='utf-8')
    told = {name: config['DEFAULT'][name] for name in ('user', 'repo', 'branch')}
    def git(*args): return subprocess.run(['git', *args], cwd=root(), capture_output=True, text=True).stdout.strip()
    try: url, head = git('remote', 'get-url', 'origin'), git('rev-parse', '--abbrev-ref', 'origin/HEAD')
    except OSError: return [told]
    found = re.search(r'github\.com[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?$', url)
    if told['user'] != NOBODY or not found: return [told]
    branch = head.removeprefix('origin/') if head.startswith('origin/') and head != 'origin/HEAD' else told['branch']
    return [{'user': found[1], 'repo': found[2], 'branch': branch}, told]


def colab_link(name: str, repo: dict) -> str:
    "Return the address at which Colab opens a chapter."
    return 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/'.format(**repo) + f'{name}.ipynb'


def colab_cells(name: str, repo: dict) -> tuple[str, str]:
    "Return the badge and the installing cell of a chapter."
    return (f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab_link(name, repo)})',
            "# In Colab, install the book's library; elsewhere this does nothing.\n"
            "if 'google.colab' in str(get_ipython()):\n"
            '    %pip install -q "dinocls[book] @ git+https://github.com/{user}/{repo}@{branch}"\n'.format(**repo) +
            '    import dinocls  # noqa: F401, what could not be installed is told here')


def as_source(path: Path, repo: dict) -> str:
    "Return a notebook's text as it is committed: without outputs, its badge and installing cell up to date."
    nb = read_notebook(path)
    badge, install = colab_cells(path.stem, repo)
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code': cell |= {'outputs': [], 'execution_count': None}
        for start, now in (('[![Open in Colab]', badge), ('# In Colab, install', install)):  # each ends its cell
            if start in source: cell['source'] = (source.partition(start)[0] + now).splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'


def code_of(notebook: Path) -> list[str]:
    "Return a notebook's code cells, without the parameters that a run injects."
    return [''.join(c['source']) for c in read_notebook(notebook)['cells']
            if c['cell_type'] == 'code' and 'injected-parameters' not in c['metadata'].get('tags', ())]


def of_which_commit(folder: Path, book: list) -> str:  # run folder; chapters
    "Say of which commit a run is, and which chapters have changed since or were not executed."
    copies = {c.name: (c.path, folder/f'{c.name}.ipynb') for c in book}
    other = [n for n, (source, copy) in copies.items() if not copy.exists() or code_of(source) != code_of(copy)]
    commit = read_json(folder/'book.json')['git']
    if not other: return 'It is of the chapters as they are here.'
    return f'It is of commit `{commit}`; chapters whose code has changed since: {", ".join(other)}.'


def chapter_table(book: list, found: dict, repo: dict) -> str:  # chapters; name → findings
    "Return the README's table of chapters, each with its key figure, linked to its executed copy in the record if any."
    rows = []
    for c in book:
        page, told = f'{RECORD}/{c.name}.ipynb', found.get(c.name, {})
        if not (root()/page).is_file(): page = f'nbs/{c.name}.ipynb'
        alt = told.get('alt', '').replace('|', ', ').replace('"', '')
        picture = told.get('figure') and f'<img src="{RECORD}/{c.name}/{told["figure"]}.png" width="180" alt="{alt}">'
        rows.append(f'| {picture or ""} | **[{c.name.partition("_")[0]} {c.title}]({page})**<br>{c.claim} | '
                    f'[source](nbs/{c.name}.ipynb)<br>[Colab]({colab_link(c.name, repo)}) |')
    return '\n'.join(['| | chapter | |', '|---|---|---|', *rows])


def telling(book: list, found: dict) -> list:  # chapters; name → findings
    "Return the eight chapters with a figure and with most claims that could be decided, in the book's order."
    def decided(c): return sum(claim['holds'] is not None for claim in found[c.name]['claims'])
    drawn = [c for c in book if found.get(c.name, {}).get('figure')]
    return sorted(sorted(drawn, key=decided, reverse=True)[:8], key=book.index)


def findings_list(book: list, found: dict, by: str) -> str:  # chapters; name → findings; the run, in words
    "Return the README's list of what chapters asked and answered, the eight with most claims that could be decided."
    lines = [f'- **[{c.question or c.title}]({RECORD}/{c.name}.ipynb)** {found[c.name]["answer"]}'
             for c in telling(book, found)]
    return '\n'.join([*lines, '', f'{by} [Each number of the write-up that the book follows, beside this run\'s]'
                       '(docs/reported.md).'])


def preset_table() -> str:
    "Return the README's table of presets."
    rows = [f'| `{name}` | {p.purpose} | {p.cost} | {p.expect} |' for name, p in PRESETS.items()]
    return '\n'.join(['| preset | for | cost | result |', '|---|---|---|---|', *rows])


def generated(book: list, repo: dict) -> dict:  # file → text
    "Return the notebooks, the README and the pages of docs as they should be."
    from ..report import fill_blocks, readme_blocks
    record = preset(OF, out=str(root()/RECORD))
    found, blocks = read_findings(record), readme_blocks(record)
    blocks |= {'chapters': chapter_table(book, found, repo), 'presets': preset_table(),
               'findings': findings_list(book, found, blocks['reported'].partition('\n')[0]),
               'record': of_which_commit(record.folder, book)}
    pages = root()/'README.md', *sorted((root()/'docs').glob('*.md'))
    return {c.path: as_source(c.path, repo) for c in book} | {
        page: fill_blocks(page.read_text(encoding='utf-8'), blocks) for page in pages}
