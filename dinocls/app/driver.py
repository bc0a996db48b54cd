"Papermill executes the chapters in the order of their dependencies, side by side where it can."
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..kit.config import Config, format_overrides, root
from ..kit.fetch import shipped_record
from ..kit.files import UserError, digest, file_digest, nearest, read_json, reason, replacing, write_json
from ..kit.machine import cores, git_commit, hardware, versions
from ..kit.stage import STAGES, content_of, forget, open_run


@dataclass(frozen=True)
class Chapter:
    "A notebook of the book."
    name: str  # as in '05_phase1'
    path: Path
    title: str
    claim: str  # one line
    reads: tuple  # names of chapters it depends on
    cost: dict  # preset → seconds
    alone: bool = False  # measures time, so nothing may run beside it

    @property
    def module(self) -> str: return self.name.partition('_')[2]


def notebook_folder() -> Path:
    "Return the folder of the notebooks. Raise `UserError` where there is none, as beside an installed package."
    folder = root()/'nbs'
    if not folder.is_dir():
        raise UserError(f'There are no notebooks at {folder}: run this inside a checkout of the book, or point $DINOCLS_HOME to one.')
    return folder


def read_chapter(path: Path) -> Chapter:
    "Read what a notebook says of itself."
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    title, claim = re.search(r'# (.+)\n+> (.+)', cells[0]).groups()
    table = next((c for c in cells if '| reads |' in c), '')
    row = lambda name: (re.search(rf'\| {name} \| (.*) \|', table) or [None, ''])[1]
    return Chapter(path.stem, path, title, claim, ('all',) if row('reads') == 'all' else tuple(re.findall(r'`(\w+)`', row('reads'))),
                   {p: seconds(t) for p, t in re.findall(r'(\w+) ([\d.]+ (?:s|min|h))', row('cost'))}, row('runs').startswith('alone'))


def seconds(text: str) -> float:
    "Read `5 min` as 300."
    number, unit = text.split()
    return float(number) * {'s': 1, 'min': 60, 'h': 3600}[unit]


def chapters() -> list[Chapter]:
    "Return the book's chapters in order; those that read 'all' depend on every one before them."
    found = [read_chapter(p) for p in sorted(notebook_folder().glob('[0-9A]*_*.ipynb'))]
    names = [c.name for c in found]
    return [replace(c, reads=tuple(names[:i])) if c.reads == ('all',) else c for i, c in enumerate(found)]


def choose(book: list[Chapter], text: str) -> list[Chapter]:
    "Pick chapters by numbers, ranges or names, as in '5-8,12'. Raise `UserError` for one that does not exist."
    if not text: return book
    keys = {k: c for c in book for k in (c.name, c.module, c.name.partition('_')[0], c.name.partition('_')[0].lstrip('0') or '0')}
    order, picked = [c.name for c in book], set()
    for word in text.replace(' ', '').split(','):
        first, _, last = word.partition('-')
        for k in (first, last or first):
            if k not in keys: raise UserError(f'There is no chapter {k!r}: {nearest(k, [c.name for c in book])}')
        a, b = order.index(keys[first].name), order.index(keys[last or first].name)
        if a > b: raise UserError(f'The range {word!r} of chapters runs backwards: write {last}-{first}.')
        picked |= set(order[a:b + 1])
    return [c for c in book if c.name in picked]


def check_parameters(path: Path, given: dict):
    "Raise `UserError` if a notebook lacks one of the parameters."
    import papermill
    known = papermill.inspect_notebook(str(path))
    for name in given:
        if name not in known: raise UserError(f'{path.name} has no parameter {name!r}: {nearest(name, known) if known else "no cell is tagged parameters."}')


def execute(path: Path, target: Path, parameters: dict) -> dict:
    "Execute a notebook into `target`; return {} or the cell and the text of its error."
    import papermill
    work = target.parent/'stages'/'working'/target.name
    work.parent.mkdir(parents=True, exist_ok=True)
    error = {}
    try:
        papermill.execute_notebook(str(path), str(work), parameters, kernel_name='python3', cwd=str(root()), progress_bar=False)
    except papermill.PapermillExecutionError as e:
        error = {'cell': e.cell_index, 'error': e.ename, 'text': e.evalue.strip() and reason(e.evalue)}
    except RuntimeError as e: error = {'cell': None, 'error': type(e).__name__, 'text': reason(e)}  # the kernel died
    if work.exists():
        with replacing(target) as tmp: tmp.write_text(tidy(work.read_text(encoding='utf-8')), encoding='utf-8')
        work.unlink()
    return error


def tidy(notebook: str) -> str:
    "Take times, durations, random ids and this machine's paths out of an executed notebook."
    nb = json.loads(notebook)
    nb['metadata'].pop('papermill', None)
    nb['metadata'].get('language_info', {}).pop('version', None)
    for cell in nb['cells']:
        cell['metadata'] = {k: v for k, v in cell['metadata'].items() if k == 'tags'}
        if 'injected-parameters' in cell['metadata'].get('tags', ()): cell['id'] = 'injected-parameters'  # papermill draws one at random
        for output in cell.get('outputs', ()):
            output.get('metadata', {}).pop('papermill', None)
            if 'image/png' in output.get('data', {}): output['data']['image/png'] = smaller(output['data']['image/png'])
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    for folder, short in ((str(root()) + os.sep, ''), (str(Path.home()), '~')): text = text.replace(folder, short)
    return text


def smaller(png: str) -> str:
    "Return a picture (PNG in base64) with 256 colours, if that is shorter: a figure does not miss the others, and git is spared them."
    from base64 import b64decode, b64encode
    from io import BytesIO
    from PIL import Image
    Image.open(BytesIO(b64decode(png))).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(small := BytesIO(), 'PNG', optimize=True)
    return min(png, b64encode(small.getvalue()).decode() + '\n', key=len)


def chapter_digest(chapter: Chapter, book: list[Chapter], cfg: Config) -> str:
    "Return a digest of all that a chapter's output depends on."
    package = Path(__file__).parents[1]
    below = [package/f'{c.module}.py' for c in book if c.name <= chapter.name]
    sources = {p.stem: file_digest(p) for p in (*package.glob('kit/*.py'), *below) if p.exists()}
    values = {f.name: getattr(cfg, f.name) for f in fields(Config) if f.name != 'out'}
    return digest([file_digest(chapter.path), sources, values, content_of(cfg, values), versions()])


def is_current(chapter: Chapter, book: list[Chapter], cfg: Config) -> bool:
    "Tell whether the executed chapter in the run folder is up to date."
    record = cfg.folder/'stages'/'chapters'/f'{chapter.name}.json'
    if not record.exists() or not (cfg.folder/f'{chapter.name}.ipynb').exists(): return False
    return read_json(record).get('digest') == chapter_digest(chapter, book, cfg)


def jobs(cfg: Config) -> int:
    "Return how many chapters may run at once: one for each core and 2 GB of free memory, one alone if a large model is trained on a GPU."
    import psutil
    gpu = cfg.device.startswith('cuda') or (cfg.device == 'auto' and (shutil.which('nvidia-smi') is not None))
    if gpu and cfg.image_size > 64: return 1
    return max(1, min(cores(), int(psutil.virtual_memory().available / 2**31), 8))


def _worker(chapter: Chapter, cfg_text: dict, target: Path, environment: dict, log: Path, pipe):
    "Execute a chapter in a process of its own and send back what went wrong, if anything."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    with open(log, 'w') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    driver = os.getppid()
    threading.Thread(target=_follow, args=(driver,), daemon=True).start()
    try: pipe.send(execute(chapter.path, target, cfg_text))
    except Exception as e: pipe.send({'cell': None, 'error': type(e).__name__, 'text': reason(e)})


def _follow(driver: int):
    "End this process when the driver is gone."
    while os.getppid() == driver: time.sleep(0.5)
    os._exit(1)


@dataclass
class Job:
    "A chapter under way."
    chapter: Chapter
    process: object
    pipe: object  # the end that receives
    progress: Path
    started: float = field(default_factory=time.time)
    peak_mb: float = 0.0  # resident memory of the worker and its kernel

    def state(self) -> dict:
        "Return what the chapter last said of its progress."
        try: return json.loads(self.progress.read_text(encoding='utf-8'))
        except (OSError, ValueError): return {}


def launch(chapter: Chapter, cfg: Config, width: int) -> Job:
    "Start a chapter in a process of its own, with its share of the cores."
    work = cfg.folder/'stages'
    for name in ('progress', 'logs', 'chapters'): (work/name).mkdir(parents=True, exist_ok=True)
    progress = work/'progress'/f'{chapter.name}.json'
    progress.unlink(missing_ok=True)
    shutil.rmtree(cfg.folder/chapter.name, ignore_errors=True)  # what this run does not make must not look as if it did
    threads = str(max(1, cores() // (1 if chapter.alone else width)))
    environment = {'DINOCLS_PROGRESS': str(progress), 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads, 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}
    receive, send = (context := multiprocessing.get_context('fork' if os.name == 'posix' else 'spawn')).Pipe(duplex=False)
    process = context.Process(target=_worker, daemon=False, args=(chapter, parameters(cfg), cfg.folder/f'{chapter.name}.ipynb',
                                                                environment, work/'logs'/f'{chapter.name}.log', send))
    process.start()
    send.close()
    return Job(chapter, process, receive, progress)


def parameters(cfg: Config) -> dict:
    "Return a configuration as the parameters of a chapter; those at their defaults are left out."
    given = {'preset': cfg.preset, 'overrides': format_overrides(cfg)}
    if cfg.out: given['out'] = os.path.relpath(cfg.folder, root()) if cfg.folder.is_relative_to(root()) else str(cfg.folder)
    return {k: v for k, v in given.items() if v}


def urgency(book: list[Chapter], preset: str) -> dict:
    "Return for each chapter the seconds of the longest chain that begins with it."
    chain = {}
    for c in reversed(book):
        chain[c.name] = c.cost.get(preset, 5) + max((chain[d.name] for d in book if c.name in d.reads), default=0)
    return chain


class Run:
    "Executes chapters in the order of their dependencies, side by side."
    def __init__(self, cfg: Config, chosen: list[Chapter], show):
        self.cfg, self.book, self.show = cfg, chapters(), show
        self.waiting, self.running, self.ended = {c.name: c for c in chosen}, {}, {}  # ended: name → record
        self.urgency, self.width = urgency(self.book, cfg.preset), min(jobs(cfg), len(chosen))

    def ready(self) -> list[Chapter]:
        "Return the waiting chapters whose dependencies are over, most urgent first."
        open_names = {*self.waiting, *self.running}
        return sorted((c for c in self.waiting.values() if not open_names & set(c.reads)), key=lambda c: -self.urgency[c.name])

    def fits(self, c: Chapter) -> bool:
        "Tell whether a chapter may start beside what runs now."
        quiet = not c.alone and not any(job.chapter.alone for job in self.running.values())
        return len(self.running) < self.width if quiet else not self.running

    def go(self) -> bool:
        "Execute everything; return whether all went well."
        try:
            while self.waiting or self.running:
                for c in self.ready():
                    if not self._settle(c) and self.fits(c):
                        self.running[c.name] = launch(self.waiting.pop(c.name), self.cfg, self.width)
                        self.show.started(self.running[c.name])
                self._poll()
        finally: self._stop()
        return all(r['status'] in ('done', 'current') for r in self.ended.values())


def _settle(self, c: Chapter) -> bool:
    "End a waiting chapter without running it, if it is current or cannot run."
    before = [self.ended[n]['status'] for n in c.reads if n in self.ended]
    if 'failed' in before or 'skipped' in before: self._end(c, {'status': 'skipped'})
    elif 'done' not in before and is_current(c, self.book, self.cfg): self._end(c, {'status': 'current'})
    return c.name not in self.waiting


def _end(self, c: Chapter, record: dict):
    "Note how a chapter ended."
    if record['status'] == 'skipped': shutil.rmtree(self.cfg.folder/c.name, ignore_errors=True)
    self.waiting.pop(c.name, None)
    self.running.pop(c.name, None)
    self.ended[c.name] = record
    self.show.ended(c, record)

Run._settle, Run._end = _settle, _end


def _poll(self):
    "Look after what is running: memory, progress, ends."
    time.sleep(0.2)
    for job in list(self.running.values()):
        job.peak_mb = max(job.peak_mb, _memory_mb(job.process.pid))
        over = not job.process.is_alive()
        if not over and not job.pipe.poll(): continue
        try: error = job.pipe.recv() if job.pipe.poll() else {'cell': None, 'error': 'Stopped', 'text': 'its process ended, perhaps for lack of memory'}
        except EOFError: error = {'cell': None, 'error': 'Stopped', 'text': 'its process ended, perhaps for lack of memory'}
        job.process.join()
        record = {'status': 'failed', **error} if error else {'status': 'done'}
        record |= {'seconds': round(time.time() - job.started, 1), 'peak_mb': round(job.peak_mb)}
        if not error: write_json(self.cfg.folder/'stages'/'chapters'/f'{job.chapter.name}.json',
                                 record | {'digest': chapter_digest(job.chapter, self.book, self.cfg)})
        self._end(job.chapter, record)
    self.show.tick(self)


def _stop(self, patience: float = 20):  # seconds
    "End whatever still runs: the kernels first, which may have a checkpoint to write, while their workers hold still."
    import psutil
    family, end = [], time.time() + patience
    for job in self.running.values():
        with contextlib.suppress(psutil.Error):
            (worker := psutil.Process(job.process.pid)).suspend()  # a kernel without a parent gives up at once
            family += worker.children(recursive=True)
    for p in family:
        with contextlib.suppress(psutil.Error): p.terminate()
    while time.time() < end and not all(map(_is_over, family)): time.sleep(0.05)
    for p in family:
        with contextlib.suppress(psutil.Error): p.kill()
    for job in self.running.values(): job.process.kill(), job.process.join()


def _is_over(process) -> bool:
    "Tell whether a process has ended, collected by its parent or not."
    import psutil
    try: return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error: return True


def _memory_mb(pid: int) -> float:
    "Return the resident memory of a process and its children, in MB."
    import psutil
    try:
        worker = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (worker, *worker.children(recursive=True))) / 2**20
    except psutil.Error: return 0.0  # it has just ended

Run._poll, Run._stop = _poll, _stop


def duration(seconds: float) -> str:
    "Write a number of seconds as 45 s, 3 min 20 s or 2 h 5 min."
    s = round(seconds)
    return f'{s} s' if s < 60 else f'{s // 60} min {s % 60} s' if s < 3600 else f'{s // 3600} h {s % 3600 // 60} min'


class Plain:
    "Progress as lines."
    def __init__(self): self.begin, self.stages = time.time(), {}
    def line(self, text): print(f'[{duration(time.time() - self.begin):>12}] {text}', flush=True)
    def started(self, job): self.line(f'{job.chapter.name} …')

    def ended(self, c, record):
        end = {'done': 'done', 'current': 'is current', 'skipped': 'skipped: a chapter it reads failed', 'failed': f'FAILED {_where(record)}'}[record['status']]
        self.line(f'{c.name} {end}' + (f' in {duration(record["seconds"])}' if record['status'] == 'done' else ''))

    def tick(self, run):
        for job in run.running.values():
            state = job.state()
            if state and self.stages.get(job.chapter.name) != state['stage']:
                self.stages[job.chapter.name] = state['stage']
                self.line(f'{job.chapter.name}: {state["stage"]}')


def _where(record: dict) -> str:
    "Say in which cell a chapter failed, and with what."
    cell = '' if record.get('cell') is None else f'in cell {record["cell"] + 1}: '
    return cell + ': '.join(filter(None, (record.get('error'), record.get('text'))))


class Live(Plain):
    "Progress as a table that changes in place."
    def __init__(self):
        from rich.live import Live as RichLive
        super().__init__()
        self.firsts, self.live = {}, RichLive(auto_refresh=False)
        self.live.start()

    def line(self, text): self.live.console.print(f'[dim]{duration(time.time() - self.begin):>12}[/] ', text, highlight=False, sep='')
    def started(self, job): pass
    def tick(self, run): self.live.update(self.table(run), refresh=True)

    def table(self, run):
        "Return the running chapters as a table: chapter, stage, steps, time left."
        from rich.table import Table
        table = Table('chapter', 'stage', 'steps', 'left', 'since', title=f'{len(run.ended)} of {len(run.ended) + len(run.waiting) + len(run.running)} chapters')
        for job in run.running.values():
            s = job.state()
            steps, left = (f'{s["done"]}/{s["total"]}', self.left(job, s)) if s.get('total') else ('', '')
            table.add_row(job.chapter.name, s.get('stage', 'starting'), f'{steps} {s.get("note", "")}', left, duration(time.time() - job.started))
        return table


def _left(self, job, state: dict) -> str:
    "Estimate a stage's time left from the steps since it was first seen."
    first = self.firsts.setdefault((job.chapter.name, state['stage'], state['total']), (state['done'], state['time']))
    steps, spent = state['done'] - first[0], state['time'] - first[1]
    return duration(spent / steps * (state['total'] - state['done'])) if steps > 0 else ''

Live.left = _left


def run_book(cfg: Config, which: str = '', force: bool = False,
             eager: bool = False) -> int:  # let chapters wait for the stages they need, and not for the chapters they read
    "Execute the chosen chapters of the book; return the exit status. Raise `UserError` before anything starts."
    from filelock import FileLock, Timeout
    try: import nbconvert, papermill  # noqa: F401  imported here once, inherited by each worker
    except ImportError: raise UserError("Executing the book needs papermill and Jupyter: pip install 'dinocls[book]'.") from None
    chosen = choose(chapters(), which)
    if eager: chosen = [c if read_chapter(c.path).reads == ('all',) else replace(c, reads=()) for c in chosen]
    for c in chosen: check_parameters(c.path, parameters(cfg))
    if cfg.backbone.startswith('book-') and not cfg.weights: shipped_record(cfg.backbone)  # refused before the work begins
    folder = open_run(cfg)
    (folder/'stages').mkdir(exist_ok=True)
    try:
        with FileLock(folder/'stages'/'run.lock', timeout=0): return _run_locked(cfg, chosen, force)
    except Timeout: raise UserError(f'Another run is using {folder}: wait for it to end, or choose another folder with --out.') from None


def _run_locked(cfg: Config, chosen: list[Chapter], force: bool) -> int:
    "Execute chapters while nobody else uses the run folder."
    clock = time.time()
    if force: _forget(cfg, chosen)
    show = Live() if sys.stdout.isatty() else Plain()
    run = Run(cfg, chosen, show)
    if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, from a scheduler
    try: well = run.go()
    except KeyboardInterrupt:
        print(f'\nStopped. What was done is kept in {short(cfg.folder)}; the same command goes on from there.')
        return 130
    finally:
        if isinstance(show, Live): show.live.stop()
        _note(cfg, run)
    _finish(cfg, run, time.time() - clock)
    return 0 if well else 1


def _forget(cfg: Config, chosen: list[Chapter]):
    "Make everything new that the chosen chapters compute: results stored until now do not count for them."
    forget(cfg.folder, [s.name for s in stages().values() if s.module in {c.module for c in chosen}])
    for c in chosen: (cfg.folder/'stages'/'chapters'/f'{c.name}.json').unlink(missing_ok=True)


def stages() -> dict:
    "Return all stages of the book by name, importing the modules that define them."
    import importlib
    for c in chapters(): importlib.import_module(f'dinocls.{c.module}')
    return STAGES


def short(path: Path) -> str:
    "Write a path relative to the current folder where that is shorter."
    return min(str(path), os.path.relpath(path), key=len)


def _note(cfg: Config, run: Run):
    "Record the times and memory of the chapters that have ended."
    old = read_json(cfg.folder/'book.json') if (cfg.folder/'book.json').exists() else {}
    kept = old.get('chapters', {}) | {n: r for n, r in run.ended.items() if r['status'] != 'current'}
    write_json(cfg.folder/'book.json', {'chapters': {c.name: kept[c.name] for c in run.book if c.name in kept}, 'jobs': run.width,
                                        'hardware': hardware(), 'versions': versions(), 'git': git_commit()})


def _finish(cfg: Config, run: Run, spent: float):
    "Write the pages, and say where they are."
    page = write_pages(cfg, run.book)
    failed = [n for n, r in run.ended.items() if r['status'] in ('failed', 'skipped')]
    for n in failed: print(f'{n}: {_where(run.ended[n]) if run.ended[n]["status"] == "failed" else "skipped, it reads a chapter that failed"}')
    print(f'{len(run.ended) - len(failed)} of {len(run.ended)} chapters in {duration(spent)}. Results: {short(cfg.folder)}. Open {short(page)}')


def write_pages(cfg: Config, book: list[Chapter]) -> Path:
    "Write each executed chapter as a page, and a page of contents; return the latter. Pages that are newer than their notebook stay."
    from nbconvert import HTMLExporter
    exporter, folder, done = HTMLExporter(), cfg.folder/'html', []
    for c in book:
        source, page = cfg.folder/f'{c.name}.ipynb', folder/f'{c.name}.html'
        if not source.exists(): continue
        done.append(c)
        if page.exists() and page.stat().st_mtime > source.stat().st_mtime: continue
        body, _ = exporter.from_filename(str(source), {'metadata': {'name': f'{c.title} · dinocls'}})
        with replacing(page) as tmp: tmp.write_text(body, encoding='utf-8')
    items = '\n'.join(f'<li><a href="html/{c.name}.html">{c.title}</a><br><span>{c.claim}</span></li>' for c in done)
    with replacing(cfg.folder/'index.html') as tmp: tmp.write_text(CONTENTS.format(run=cfg.folder.name, items=items), encoding='utf-8')
    return cfg.folder/'index.html'


CONTENTS = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dinocls: {run}</title>
<style>body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; color: #222 }}
a {{ color: #0072b2; font-weight: 600; text-decoration: none }} span {{ color: #555 }} li {{ margin: .6rem 0 }}</style>
<h1>dinocls, run <code>{run}</code></h1>
<p>Every chapter as it was executed. The numbers are gathered in <a href="html/14_report.html">the report</a>.</p>
<ol start="0">
{items}
</ol></html>
'''
