"What a chapter leaves behind: rows of metrics, claims, tables, figures in one style."
import json
import re
import sys

from PIL import Image, PngImagePlugin

from .config import Config
from .files import plain, read_json, replacing, write_json


def proper(text: str) -> str:
    "Write a hyphen before a number as a minus sign, and a space before a percent sign."
    return re.sub(r'(?<=\d)%', ' %', re.sub(r'(?<![\w.])-(?=\d)', '−', text))


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


MARKS = {True: '✓', False: '✗', None: '?'}


class Findings(dict):
    "What a chapter found: the answer to its question, the claims behind it, and what the run leaves open."
    def _repr_markdown_(self): return f'{self.summary()}\n\n{self.reasons()}'.strip()

    def summary(self, folder: str = '') -> str:
        "Write the answer as Markdown; with a folder, that of the chapter's figures, the key figure below it."
        figure = f'\n\n![{self["alt"]}]({folder}/{self["figure"]}.png)' if folder and self['figure'] else ''
        return f'**{self["answer"]}**{figure}'

    def reasons(self) -> str:
        "Write as Markdown what stands behind the answer: claims, what the run leaves open, what would change it."
        claims = '\n'.join(f'- {MARKS[c["holds"]]} {c["claim"]} ({c["evidence"]})' for c in self['claims'])
        untold = self['untold'] and f'**What this run can\'t tell.** {self["untold"]}'
        change = self['change'] and f'**What would change the answer.** {self["change"]}'
        return '\n\n'.join(filter(None, (claims, untold, change)))


def write_findings(cfg: Config, chapter: str,  # as in '05_phase1'
                   answer: str,  # to the chapter's question, in a sentence or two that follow from the run
                   claims: list[dict] = (),  # of `claim`
                   figure: str = '',  # name of the key figure, as it was saved
                   alt: str = '',  # what that figure shows
                   untold: str = '',  # what the run can't tell
                   change: str = '') -> Findings:  # what would change the answer
    "Write what a chapter found into its folder of the run, and return it for display."
    claims = [{k: proper(v) if isinstance(v, str) else v for k, v in c.items()} for c in claims]
    texts = {'answer': answer, 'figure': figure, 'alt': alt or answer, 'untold': untold, 'change': change}
    found = {k: proper(v) if k != 'figure' else v for k, v in texts.items()} | {'claims': claims}
    write_json(cfg.folder/chapter/'findings.json', found)
    return Findings(found)


def read_findings(cfg: Config) -> dict:  # chapter → findings
    "Read the findings of all chapters of a run."
    return {file.parent.name: Findings(read_json(file)) for file in sorted(cfg.folder.glob('*/findings.json'))}


def read_claims(cfg: Config) -> dict:  # chapter → claims
    "Read the claims of all chapters of a run."
    return {chapter: found['claims'] for chapter, found in read_findings(cfg).items()}


def subplots(rows: int = 1, cols: int = 1,
             size: tuple = (6.4, 3.6),  # inches
             **kwargs):  # for `plt.subplots`
    "Return a figure and its axes in the book's style."
    import matplotlib.pyplot as plt
    plt.style.use('dinocls.book')
    return plt.subplots(rows, cols, figsize=size, **kwargs)


COLOURS = {  # one for each model and representation, through the whole book; Okabe & Ito 2008, and two greys
    'raw pixels': '#888888', 'random weights': '#BBBBBB', 'from scratch': '#CC79A7',
    'frozen features': '#0072B2', 'linear probe': '#0072B2', 'k-NN': '#56B4E9', 'phase 1': '#009E73',
    'fine-tuned features': '#D55E00', 'phase 2': '#D55E00', 'ensemble': '#000000', 'test-time augmentation': '#E69F00',
    'direct': '#CC79A7', 'soup': '#882255', 'LoRA': '#E69F00', 'SimCLR': '#332288', 'DINO': '#999933',
    'student': '#117733', 'labels only': '#888888', 'right': '#0072B2', 'wrong': '#D55E00'}


def class_looks(n: int) -> list[dict]:
    "Return `n` looks that can be told apart, as arguments of `Axes.plot`: ten colours, then other markers."
    from matplotlib import colormaps
    return [{'color': colormaps['tab10'](i % 10), 'marker': 'osD^v*Pp'[i // 10 % 8], 'ls': ''} for i in range(n)]


BOXES = {'data': '#FFFFFF', 'frozen': '#CFE3F1', 'learns': '#F9D9A8', 'step': '#ECECEC', 'result': '#CDE8DD'}


def diagram(boxes: dict,  # text → (column, row, look of `BOXES`), or with a width in columns
            arrows: list,  # (from, to), by the texts, or with a word beside the arrow
            size: tuple = (7.2, 1.8),  # inches
            title: str = ''):
    "Draw boxes and the arrows between them, row 0 on top; say by a legend what is frozen and what learns."
    from matplotlib.patches import FancyBboxPatch, Patch
    fig, ax = subplots(size=size)
    drawn = {}
    for text, (x, y, look, *width) in boxes.items():
        width = (*width, 0.74)[0]
        drawn[text] = ax.add_patch(FancyBboxPatch((x - width / 2, -y - 0.24), width, 0.48, facecolor=BOXES[look],
                                                  edgecolor='#444444', boxstyle='round,pad=0,rounding_size=0.08'))
        ax.text(x, -y, text, ha='center', va='center', fontsize=9)
    for start, end, *word in arrows:
        (x0, y0, *_), (x1, y1, *_) = boxes[start], boxes[end]
        ax.annotate('', (x1, -y1), (x0, -y0), arrowprops={'arrowstyle': '-|>', 'color': '#444444', 'shrinkA': 0,
                    'shrinkB': 2, 'patchA': drawn[start], 'patchB': drawn[end]})
        ax.text((x0 + x1) / 2, -(y0 + y1) / 2 + 0.06, *(word or ['']), ha='center', va='bottom', fontsize=8)
    columns, rows, *_ = zip(*(b[:2] for b in boxes.values()))
    ax.set(xlim=(min(columns) - 0.6, max(columns) + 0.6), ylim=(-max(rows) - 0.4, 0.4 - min(rows)))
    ax.axis('off')
    looks = [k for k in ('frozen', 'learns') if any(b[2] == k for b in boxes.values())]
    if looks:
        fig.legend(handles=[Patch(facecolor=BOXES[k], edgecolor='#444444', label=k) for k in looks],
                   loc='outside lower center', ncols=2)
    return headline(fig, title) if title else fig


def lay_over(ax, picture, weights,  # uint8 (h, w, 3); (rows, cols), 0 or more, one for each part of the picture
             top: float = 0):  # the weight that is brightest; 0: the largest
    "Draw a picture in grey, and weights over it, the larger the brighter."
    top = top or float(weights.max()) or 1.0
    ax.imshow(picture.mean(-1), cmap='gray', vmin=0, vmax=255, extent=(0, 1, 0, 1))
    ax.imshow(weights, cmap='inferno', vmin=0, vmax=top, alpha=(0.15 + 0.7 * weights / top).clip(0, 0.85),
              extent=(0, 1, 0, 1))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def headline(fig, title: str):
    "Put a title, in bold, at the top left of a figure, in as many lines as it takes; return the figure."
    fig.suptitle(title, x=0, ha='left', fontweight='bold', fontsize=11, wrap=True)
    return fig


def tile(ax, image,  # (h, w, 3), or what else `imshow` takes
         above: str = '', below: str = '',
         colour: str = 'k'):  # of what is below
    "Show an image without axes, with a few words above and below it."
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(above, fontsize=9, fontweight='normal', loc='center', pad=3)
    ax.set_xlabel(below, fontsize=10, fontweight='bold', color=colour, labelpad=3)


def few_colours(image):  # of Pillow
    "Return a picture with 256 colours, which a figure can do with; rare ones keep theirs, as median cut's would not."
    kept = {'method': Image.Quantize.MAXCOVERAGE, 'kmeans': 1, 'dither': Image.Dither.NONE}
    return image.convert('RGB').quantize(256, **kept)


def save_figure(cfg: Config, chapter: str, name: str, fig,
                alt: str = ''):  # what is to be seen, for whoever does not see it; empty: the title
    """Write a figure as `<chapter>/<name>.png` into the run, with its title and alternative text inside: pictures at
    200 dots per inch, lines at the style's 100, and these as SVG too. The notebook shows it as the cell ends."""
    import matplotlib as mpl
    for text in fig.findobj(mpl.text.Text): text.set_text(proper(text.get_text()))
    title = fig.get_suptitle() or ' · '.join(filter(None, (ax.get_title() for ax in fig.axes)))
    told, pictures = {'Title': title, 'Description': proper(alt) or title}, any(ax.images for ax in fig.axes)
    whole, inside = {'bbox_inches': 'tight', 'pad_inches': 0.06}, PngImagePlugin.PngInfo()
    for key, text in told.items(): inside.add_itxt(key, text)
    with replacing(cfg.folder/chapter/f'{name}.png') as tmp:
        fig.savefig(tmp, dpi=200 if pictures else 'figure', **whole)
        with Image.open(tmp) as drawn: few = few_colours(drawn)
        few.save(tmp, 'PNG', optimize=True, pnginfo=inside)
    if pictures: return
    with replacing(cfg.folder/chapter/f'{name}.svg') as tmp, mpl.rc_context({'svg.hashsalt': 'dinocls'}):
        fig.savefig(tmp, format='svg', metadata={'Date': None, 'Creator': None, **told}, **whole)


def save_table(cfg: Config, chapter: str, name: str, table):
    "Write a DataFrame as `<chapter>/<name>.csv` into the run, and return it for display."
    with replacing(cfg.folder/chapter/f'{name}.csv') as tmp: table.to_csv(tmp, index=False, lineterminator='\n')
    return table


def has_reader() -> bool:
    "Tell whether a front end executes this cell, as JupyterLab, Notebook, VS Code and Colab do, and not a batch."
    from IPython import get_ipython
    kernel = getattr(get_ipython(), 'kernel', None)
    asked = kernel.get_parent('shell') if hasattr(kernel, 'get_parent') else {}
    return 'google.colab' in sys.modules or 'cellId' in (asked or {}).get('metadata', {})


def interact(draw, **choices):  # a function of the choices, which leaves an open figure; name → list of (label, value)
    "Let a reader choose and draw anew at each choice; without one, draw the first and return what `draw` does."
    if not has_reader(): return draw(**{name: options[0][1] for name, options in choices.items()})
    import ipywidgets
    ipywidgets.interact(draw, **{name: ipywidgets.SelectionSlider(options=options, continuous_update=False)
                                 for name, options in choices.items()})
