"What follows from the chapters: badges, Colab cells, and the README's generated blocks."
import json
from pathlib import Path

from ..kit.config import PRESETS, root
from .driver import chapters


def colab_cells(name: str) -> tuple[str, str]:
    "Return the badge and the installing cell of a chapter, as settings.ini determines them."
    from configparser import ConfigParser
    config = ConfigParser(delimiters=['='])
    config.read(root()/'settings.ini', encoding='utf-8')
    s = config['DEFAULT']
    url = f'https://colab.research.google.com/github/{s["user"]}/{s["repo"]}/blob/{s["branch"]}/nbs/{name}.ipynb'
    badge = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})'
    return badge, ("# In Colab, install the book's library; elsewhere this does nothing.\n"
                   f"if 'google.colab' in str(get_ipython()):\n    %pip install -q \"dinocls[book] @ git+{s['git_url']}@{s['branch']}\"")


def as_source(path: Path) -> str:
    "Return a notebook's text as it is committed: without outputs, its badge and installing cell up to date."
    nb = json.loads(path.read_text(encoding='utf-8'))
    badge, install = colab_cells(path.stem)
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code': cell |= {'outputs': [], 'execution_count': None}
        if cell['cell_type'] == 'markdown' and source.startswith('[![Open in Colab]'): cell['source'] = badge.splitlines(keepends=True)
        if cell['cell_type'] == 'code' and source.startswith('# In Colab, install'): cell['source'] = install.splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'


def chapter_table() -> str:
    "Return the README's table of chapters."
    rows = [f'| [{c.name}](nbs/{c.name}.ipynb) | {c.claim} | {colab_cells(c.name)[0]} |' for c in chapters()]
    return '\n'.join(['| chapter | what it shows | |', '|---|---|---|', *rows])


def preset_table() -> str:
    "Return the README's table of presets."
    return '\n'.join(['| preset | for | cost | result |', '|---|---|---|---|', *(f'| `{n}` | {p.purpose} | {p.cost} | {p.expect} |' for n, p in PRESETS.items())])
