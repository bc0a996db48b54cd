"What a chapter leaves behind: rows of metrics, claims, tables, figures in one style."
import json

from .config import Config
from .files import plain, read_json, replacing, write_json


def metric(name: str,  # what was measured
           value: float,  # accuracies as fractions
           split: str = 'test',  # train, val or test
           n: int = 0,  # images it was measured on
           seed: int | None = None,  # None: over several seeds, or none involved
           **more) -> dict:  # further columns, as `std`, `seeds` or `low` and `high`
    "Return one row of metrics."
    value = None if value is None else float(value)
    return {'metric': name, 'value': value, 'split': split, 'n': int(n), 'seed': seed, **more}


def write_metrics(cfg: Config, chapter: str,  # as in '05_phase1'
                  rows: list[dict]) -> list[dict]:
    "Write a chapter's rows into its folder of the run, and return them complete."
    rows = [{'chapter': chapter, 'run': cfg.folder.name, **row} for row in rows]
    write_json(cfg.folder/chapter/'metrics.json', rows)
    return rows


def read_metrics(cfg: Config) -> list[dict]:
    "Read the rows of all chapters of a run."
    return [row for file in sorted(cfg.folder.glob('*/metrics.json')) for row in read_json(file)]


def write_history(cfg: Config, chapter: str, rows: list[dict]):
    "Write a training curve into a chapter's folder of the run, one line of JSON an epoch."
    lines = ''.join(json.dumps(plain(row)) + '\n' for row in rows)
    with replacing(cfg.folder/chapter/'history.jsonl') as tmp: tmp.write_text(lines, encoding='utf-8')


def claim(text: str,  # what is expected, in a sentence
          holds: bool | None,  # whether this run shows it; None: it can't tell
          evidence: str) -> dict:  # the numbers behind it
    "Return one claim about a run."
    return {'claim': text, 'holds': None if holds is None else bool(holds), 'evidence': evidence}


class Claims(list):
    "A chapter's claims, shown with ✓, ✗ or ? and their evidence."
    def _repr_markdown_(self):
        marks = {True: '✓', False: '✗', None: '?'}
        return '\n'.join(f'- {marks[c["holds"]]} {c["claim"]} — {c["evidence"]}' for c in self)


def write_claims(cfg: Config, chapter: str,  # as in '05_phase1'
                 rows: list[dict]) -> Claims:
    "Write a chapter's claims into its folder of the run, and return them for display."
    write_json(cfg.folder/chapter/'claims.json', rows)
    return Claims(rows)


def read_claims(cfg: Config) -> dict:  # chapter → claims
    "Read the claims of all chapters of a run."
    return {file.parent.name: Claims(read_json(file)) for file in sorted(cfg.folder.glob('*/claims.json'))}


def subplots(rows: int = 1, cols: int = 1,
             size: tuple = (6.4, 3.6),  # inches
             **kwargs):  # for `plt.subplots`
    "Return a figure and its axes in the book's style."
    import matplotlib.pyplot as plt
    plt.style.use('dinocls.book')
    return plt.subplots(rows, cols, figsize=size, **kwargs)


def headline(fig, title: str):
    "Put a title, in bold, at the top left of a figure; return the figure."
    fig.suptitle(title, x=0, ha='left', fontweight='bold', fontsize=11)
    return fig


def save_figure(cfg: Config, chapter: str, name: str, fig):
    "Write a figure as `<chapter>/<name>.png` into the run; the notebook shows it as the cell ends."
    with replacing(cfg.folder/chapter/f'{name}.png') as tmp: fig.savefig(tmp, metadata={'Software': None})


def save_table(cfg: Config, chapter: str, name: str, table):
    "Write a DataFrame as `<chapter>/<name>.csv` into the run, and return it for display."
    with replacing(cfg.folder/chapter/f'{name}.csv') as tmp: table.to_csv(tmp, index=False, lineterminator='\n')
    return table
