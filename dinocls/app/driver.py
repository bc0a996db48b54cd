"Papermill executes the chapters in the order of their dependencies, side by side where it can."
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import psutil

from ..kit.config import Config, format_overrides, root
from ..kit.fetch import shipped_record
from ..kit.figures import Findings, few_colours, read_findings
from ..kit.files import UserError, digest, file_digest, locked, nearest, read_json, reason, replacing, write_json
from ..kit.machine import cores, git_commit, hardware, install, memory_free, versions
from ..kit.stage import PACKAGE, STAGES, content_of, forget, open_run, record_of
from .site import read_notebook, write_pages
from .website import write_beside


@dataclass(frozen=True)
class Chapter:
    "A notebook of the book."
    name: str  # as in '05_phase1'
    path: Path
    title: str
    claim: str  # one line
    reads: tuple  # names of chapters it depends on
    cost: dict  # preset → seconds
    question: str = ''  # the first sentence in bold that asks
    alone: bool = False  # measures time, so nothing may run beside it

    @property
    def module(self) -> str: return self.name.partition('_')[2]


def read_chapter(path: Path) -> Chapter:
    "Read what a notebook says of itself."
    cells = read_notebook(path)['cells']
    prose = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    title, claim = re.search(r'# (.+)\n+> (.+)', prose[0]).groups()
    table = next((text for text in prose if '| reads |' in text), '')
    rows = dict(re.findall(r'\| (\w+) \| (.*) \|', table))
    reads, cost, runs = (rows.get(name, '') for name in ('reads', 'cost', 'runs'))
    seconds = {preset: float(number) * {'s': 1, 'min': 60, 'h': 3600}[unit]
               for preset, number, unit in re.findall(r'(\w+) ([\d.]+) (s|min|h)\b', cost)}
    question = next((q for text in prose for q in re.findall(r'\*\*([^*]+\?)\*\*', text)), '')
    return Chapter(path.stem, path, title, claim, ('all',) if reads == 'all' else tuple(re.findall(r'`(\w+)`', reads)),
                   seconds, question, runs.startswith('alone'))


def chapters() -> list[Chapter]:
    """Return the book's chapters in order; those that read 'all' depend on every one before them. Raise `UserError`
    where there is none, as beside an installed package."""
    folder = root()/'nbs'
    if not folder.is_dir():
        raise UserError(f'There are no notebooks at {folder}: run this inside a checkout of the book, or point '
                        '$DINOCLS_HOME to one.')
    found = [read_chapter(p) for p in sorted(folder.glob('[0-9A]*_*.ipynb'))]
    names = [c.name for c in found]
    return [replace(c, reads=tuple(names[:i])) if c.reads == ('all',) else c for i, c in enumerate(found)]


def choose(book: list[Chapter], text: str) -> list[Chapter]:
    "Pick chapters by numbers, ranges or names, as in '5-8,12-'. Raise `UserError` for one that does not exist."
    if not text: return book
    places, picked = {}, set()
    for i, c in enumerate(book):
        number = c.name.partition('_')[0]
        places |= dict.fromkeys((c.name, c.module, number, number.lstrip('0') or '0'), i)
    for word in text.replace(' ', '').split(','):
        first, dash, last = word.partition('-')
        if dash: first, last = first or book[0].name, last or book[-1].name  # from the first on, to the last
        for k in (first, last or first):
            if k not in places: raise UserError(f'There is no chapter {k!r}: {nearest(k, (c.name for c in book))}')
        a, b = places[first], places[last or first]
        if a > b: raise UserError(f'The range {word!r} of chapters runs backwards: write {last}-{first}.')
        picked |= {*range(a, b + 1)}
    return [book[i] for i in sorted(picked)]


def stages() -> dict:
    "Return all stages of the book by name, importing the modules that define them."
    for file in sorted(PACKAGE.glob('[a-z]*.py')): import_module(f'{PACKAGE.name}.{file.stem}')
    return STAGES


def parameters(cfg: Config) -> dict:
    "Return a configuration as the parameters of a chapter; those at their defaults are left out."
    given = {'preset': cfg.preset, 'overrides': format_overrides(cfg), 'out': cfg.out and str(cfg.folder)}
    return {k: v for k, v in given.items() if v}


def tidy(notebook: Path, findings: Findings | None = None) -> str:
    """Return an executed notebook without times, durations, random ids and this machine's paths; the answer that the
    chapter found, if it says so, stands below its title, and at its end the reasons alone."""
    nb = read_notebook(notebook)
    whole = findings and findings._repr_markdown_()
    nb['metadata'].pop('papermill', None)
    nb['metadata'].get('language_info', {}).pop('version', None)
    for cell in nb['cells']:
        cell['metadata'] = {k: v for k, v in cell['metadata'].items() if k == 'tags'}
        if 'injected-parameters' in cell['metadata'].get('tags', ()): cell['id'] = 'injected-parameters'  # else random
        for output in cell.get('outputs', ()):
            output.get('metadata', {}).pop('papermill', None)
            data = output.get('data', {})
            if 'image/png' in data: data['image/png'] = smaller(data['image/png'])
            if whole and ''.join(data.get('text/markdown', '')) == whole:
                output['data'] = {'text/markdown': findings.reasons()}
    if findings: nb['cells'].insert(1, {'cell_type': 'markdown', 'id': 'findings', 'metadata': {'tags': ['findings']},
                                        'source': '## The answer\n\n' + findings.summary(notebook.stem)})
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    text = re.sub(r'/[^\s"]*/ipykernel_\d+/\d+\.py', 'a cell', text)  # where warnings say they are from
    return text.replace(str(root()) + os.sep, '').replace(os.path.expanduser('~'), '~')


def smaller(png: str) -> str:
    "Return a picture (PNG in base64) in few colours, if that is shorter."
    from base64 import b64decode, b64encode
    from io import BytesIO
    from PIL import Image
    few_colours(Image.open(BytesIO(b64decode(png)))).save(file := BytesIO(), 'PNG', optimize=True)
    return min(png, b64encode(file.getvalue()).decode() + '\n', key=len)


def chapter_digest(chapter: Chapter, book: list[Chapter], cfg: Config) -> str:
    "Return a digest of all that a chapter's output depends on."
    modules = [c.module for c in book if c.name <= chapter.name]
    files = (*PACKAGE.glob('kit/*.py'), *(p for m in modules for p in PACKAGE.glob(f'{m}.*')))  # its table as well
    sources = {p.name: file_digest(p) for p in files}
    values = {f.name: getattr(cfg, f.name) for f in fields(Config) if f.name not in ('out', 'data_root')}
    return digest([file_digest(chapter.path), sources, values, content_of(cfg, values), versions()])


def outputs(chapter: Chapter, cfg: Config) -> dict:  # file → SHA-256
    "Return digests of what a chapter has written into a run: its executed copy, figures, tables, metrics."
    files = cfg.folder/f'{chapter.name}.ipynb', *sorted((cfg.folder/chapter.name).rglob('*'))
    return {str(p.relative_to(cfg.folder)): file_digest(p) for p in files if p.is_file()}


def jobs(cfg: Config) -> int:
    "Return how many chapters run side by side: one per core and 2 GB of free memory, or one large model per GPU."
    gpu = cfg.device.startswith('cuda') or (cfg.device == 'auto' and shutil.which('nvidia-smi') is not None)
    if gpu and cfg.image_size > 64: return 1
    return max(1, min(cores(), memory_free() // 2**31, 8))


class Job:
    "The execution of a chapter by a kernel of its own, which a thread of this process drives."
    def __init__(self, chapter: Chapter, cfg: Config):
        self.chapter, self.cfg, self.begin = chapter, cfg, 0.0
        self.kernel, self.stopped, self.peak_mb = None, False, 0.0  # resident memory of the kernel and its children

    def file(self, kind: str, suffix: str = '.json') -> Path:
        "Return where something about the chapter is kept."
        (self.cfg.folder/'stages'/kind).mkdir(parents=True, exist_ok=True)
        return self.cfg.folder/'stages'/kind/f'{self.chapter.name}{suffix}'

    def family(self) -> list:
        "Return the kernel and its children, as far as they live; note the memory that they take."
        found = []
        with contextlib.suppress(psutil.Error):  # one has just ended
            if self.kernel: found = [self.kernel, *self.kernel.children(recursive=True)]
            self.peak_mb = max(self.peak_mb, sum(p.memory_info().rss for p in found) / 2**20)
        return found

    def run(self, threads: int) -> dict:
        "Execute the chapter into the run folder; return the record of how it ended."
        import papermill
        from jupyter_client import AsyncKernelManager
        self.begin, job, executing, error = time.time(), self, self.file('working', '.ipynb'), {}
        self.file('progress').unlink(missing_ok=True)
        shutil.rmtree(self.cfg.folder/self.chapter.name, ignore_errors=True)  # nothing old must look as if it were new
        place = {'cwd': str(root()), 'env': os.environ | {
            'DINOCLS_PROGRESS': str(self.file('progress')), 'OMP_NUM_THREADS': str(threads),
            'MKL_NUM_THREADS': str(threads), 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}}

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **kwargs):
                if job.stopped: raise RuntimeError('The run was stopped')
                with open(job.file('logs', '.log'), 'w') as log:
                    await super().start_kernel(**kwargs, **place, stdout=log, stderr=log)
                job.kernel = psutil.Process(self.provisioner.pid)

        try:
            papermill.execute_notebook(str(self.chapter.path), str(executing), parameters(self.cfg), progress_bar=False,
                                       kernel_name='python3', kernel_manager_class=Manager)
        except papermill.PapermillExecutionError as e:
            error = {'cell': e.cell_index, 'error': e.ename, 'text': e.evalue.strip() and reason(e.evalue)}
        except RuntimeError as e: error = {'text': f'{reason(e)}, perhaps for lack of memory'}  # there is no kernel
        except Exception as e: error = {'error': type(e).__name__, 'text': reason(e)}
        if executing.exists() and not self.stopped:
            with replacing(self.cfg.folder/executing.name) as tmp:
                tmp.write_text(tidy(executing, read_findings(self.cfg).get(self.chapter.name)), encoding='utf-8')
        executing.unlink(missing_ok=True)
        return {'status': 'failed' if error else 'done', **error, 'seconds': round(time.time() - self.begin, 1),
                'peak_mb': round(self.peak_mb)}


class Run:
    "Executes chapters in the order of their dependencies, side by side."
    def __init__(self, cfg: Config, chosen: list[Chapter]):
        self.cfg, self.book, self.show = cfg, chapters(), Show()
        self.jobs, self.running, self.ended = {c.name: Job(c, cfg) for c in chosen}, {}, {}  # running: job → future
        self.width, self.urgency = min(jobs(cfg), len(chosen)), {}
        for c in reversed(self.book):  # the seconds of the longest chain that begins with it
            after = (self.urgency[d.name] for d in self.book if c.name in d.reads)
            self.urgency[c.name] = c.cost.get(cfg.preset, 5) + max(after, default=0)
        self.before = {}  # chapter → all chapters that it needs
        for c in self.book: self.before[c.name] = {*c.reads}.union(*(self.before[name] for name in c.reads))

    def go(self) -> bool:
        "Execute everything; return whether all went well."
        order, ready = TopologicalSorter({n: self.jobs.keys() & set(j.chapter.reads) for n, j in self.jobs.items()}), []
        order.prepare()
        with ThreadPoolExecutor(self.width) as pool:
            try:
                while order.is_active():
                    ready += map(self.jobs.get, order.get_ready())
                    for job in sorted(ready, key=lambda job: -self.urgency[job.chapter.name]):
                        alone = any(j.chapter.alone for j in (job, *self.running))
                        if not self.running or not alone and len(self.running) < self.width:
                            self.running[job] = pool.submit(self.settle, ready.pop(ready.index(job)))
                    wait(self.running.values(), 0.5, FIRST_COMPLETED)
                    for job in self.running: job.family()
                    self.show.tick(self.running)
                    for job in [job for job, future in self.running.items() if future.done()]:
                        self.ended[job.chapter.name] = self.running.pop(job).result()
                        self.show.ended(job.chapter.name, self.ended[job.chapter.name])
                        order.done(job.chapter.name)
            finally: self.stop()
        return all(record['status'] in ('done', 'current') for record in self.ended.values())

    def settle(self, job: Job) -> dict:
        "Execute a chapter, unless it is current or one that it reads failed; return the record of how it ended."
        c, before = job.chapter, {self.ended[name]['status'] for name in job.chapter.reads if name in self.ended}
        stored = job.file('chapters')
        if before & {'failed', 'skipped'}:
            shutil.rmtree(self.cfg.folder/c.name, ignore_errors=True)
            return {'status': 'skipped'}
        if 'done' not in before and self.is_current(c, stored): return {'status': 'current'}
        record = job.run(self.threads(c))
        if record['status'] == 'done':
            made = {'digest': chapter_digest(c, self.book, self.cfg), 'files': outputs(c, self.cfg)}
            write_json(stored, record | made, sealed=True)
        return record

    def threads(self, chapter: Chapter) -> int:
        "Return a chapter's share of the cores: all of them where what could run beside it would be done before it is."
        def unrelated(name): return name not in self.before[chapter.name] and chapter.name not in self.before[name]
        costs = {name: job.chapter.cost.get(self.cfg.preset, 5) for name, job in self.jobs.items() if unrelated(name)}
        most = sum(costs.values()) - costs[chapter.name] < costs[chapter.name]
        return max(1, cores() // (1 if chapter.alone or most else self.width))

    def is_current(self, chapter: Chapter, stored: Path) -> bool:
        "Tell whether a chapter would come out the same, and all that it wrote is there as it was written."
        try: record = read_json(stored)
        except UserError: return False
        return (record.get('digest') == chapter_digest(chapter, self.book, self.cfg)
                and record.get('files') == outputs(chapter, self.cfg))

    def stop(self, patience: float = 20):  # seconds
        "End whatever still runs: each process is asked first, since it may have a checkpoint to write."
        asked, end = [], time.time() + patience
        for job in self.running: job.stopped = True
        with contextlib.suppress(KeyboardInterrupt):  # a second one ends the patience
            while time.time() < end and not all(future.done() for future in self.running.values()):
                for process in {p for job in self.running for p in job.family()}.difference(asked):
                    asked.append(process)
                    with contextlib.suppress(psutil.Error): process.terminate()
                time.sleep(0.05)
            psutil.wait_procs(asked, max(0, end - time.time()))
        for process in asked:
            with contextlib.suppress(psutil.Error): process.kill()


def duration(seconds: float) -> str:
    "Write a number of seconds as 45 s, 3 min 20 s or 2 h 5 min."
    s = round(seconds)
    return f'{s} s' if s < 60 else f'{s // 60} min {s % 60} s' if s < 3600 else f'{s // 3600} h {s % 3600 // 60} min'


def outcome(record: dict) -> str:
    "Say how a chapter ended; if it failed, in which cell and with what."
    cell = f' in cell {record["cell"] + 1}' if record.get('cell') is not None else ''
    what = ': '.join(filter(None, (record.get('error'), record.get('text'))))
    return {'done': f'done in {duration(record.get("seconds", 0))}', 'current': 'is current',
            'skipped': 'skipped: a chapter it reads failed', 'failed': f'FAILED{cell}: {what}'}[record['status']]


class Show:
    "Progress: on a terminal a table that changes in place, elsewhere a line when something begins or ends."
    def __init__(self):
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
        columns = '{task.description}', MofNCompleteColumn(), TimeRemainingColumn(), TimeElapsedColumn()
        self.begin, self.stages, self.rows = time.time(), {}, {}
        self.table = Progress(*columns, disable=not sys.stdout.isatty())

    def line(self, text: str): print(f'[{duration(time.time() - self.begin):>12}] {text}', flush=True)

    def tick(self, running):
        "Show what the running chapters say of their progress."
        for job in running:
            if not job.begin: continue
            name, state = job.chapter.name, {}
            with contextlib.suppress(OSError, ValueError): state = json.loads(job.file('progress').read_text('utf-8'))
            stage = state.get('stage', '')
            if name not in self.rows: self.rows[name] = self.table.add_task(name, total=None)
            self.table.update(self.rows[name], completed=state.get('done', 0), total=state.get('total') or None,
                              description=f'{name} {stage} {state.get("note", "")}')
            if self.table.disable and self.stages.get(name) != stage:
                self.line(f'{name}: {stage}' if stage else f'{name} …')
            self.stages[name] = stage

    def ended(self, name: str, record: dict):
        if name in self.rows: self.table.remove_task(self.rows[name])
        self.line(f'{name} {outcome(record)}')


def run_book(cfg: Config, which: str = '', force: bool = False,
             eager: bool = False) -> int:  # let chapters wait for the stages they need, not for the chapters they read
    "Execute the chosen chapters of the book; return the exit status. Raise `UserError` before anything starts."
    from filelock import Timeout
    try: import nbconvert, papermill  # noqa: F401
    except ImportError: raise UserError(f'Executing the book needs papermill and Jupyter: {install("book")}.') from None
    papermill.log.logger.disabled = True  # errors are told by the records
    chosen = choose(chapters(), which)
    if eager: chosen = [c if read_chapter(c.path).reads == ('all',) else replace(c, reads=()) for c in chosen]
    for c in chosen:  # papermill would only warn
        known = papermill.inspect_notebook(str(c.path))
        if lacking := sorted(parameters(cfg).keys() - known.keys()):
            mend = nearest(lacking[0], known) if known else 'no cell is tagged parameters.'
            raise UserError(f'{c.path.name} has no parameter {lacking[0]!r}: {mend}')
    if cfg.backbone.startswith('book-') and not cfg.weights: shipped_record(cfg.backbone)  # refused before work begins
    cache = open_run(cfg)/'stages'
    cache.mkdir(exist_ok=True)
    try:
        with locked(cache/'run.lock', timeout=0): return _run_locked(Run(cfg, chosen), force)
    except Timeout: raise UserError(f'Another run is using {cfg.folder}: wait for it to end, or choose another folder '
                                    'with --out.') from None


def _run_locked(run: Run, force: bool) -> int:
    "Execute chapters while nobody else uses the run folder; say what became of them."
    cfg, modules = run.cfg, {job.chapter.module for job in run.jobs.values()}
    if force:  # results stored until now do not count
        forget(cfg.folder, [s.name for s in stages().values() if s.module in modules])
        for job in run.jobs.values(): job.file('chapters').unlink(missing_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's Ctrl-C
    try:
        with run.show.table: well = run.go()
    except KeyboardInterrupt:
        print(f'\nStopped. What was done is kept in {short(cfg.folder)}; the same command goes on from there.')
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        _note(run)
    bad = [name for name, record in run.ended.items() if record['status'] in ('failed', 'skipped')]
    for name in bad: print(f'{name} {outcome(run.ended[name])}')
    for folder in (cfg.folder/'stages').iterdir() if cfg.keep else ():
        if why := (record_of(folder) or {}).get('kept'): print(f'Note: {folder.name} is kept, although {why}.')
    write_beside(cfg)
    page, spent = write_pages(cfg.folder, run.book), duration(time.time() - run.show.begin)
    print(f'{len(run.ended) - len(bad)} of {len(run.ended)} chapters in {spent}. Results: {short(cfg.folder)}. '
          f'Open {short(page)}')
    return 0 if well else 1


def _note(run: Run):
    "Record the times and memory of the chapters that have ended."
    file, new = run.cfg.folder/'book.json', {n: r for n, r in run.ended.items() if r['status'] != 'current'}
    try: known = read_json(file)['chapters'] | new
    except (UserError, LookupError, TypeError): known = new  # there is none, or it is damaged
    write_json(file, {'chapters': {c.name: known[c.name] for c in run.book if c.name in known}, 'jobs': run.width,
                      'hardware': hardware(), 'versions': versions(), 'git': git_commit()}, sealed=True)


def short(path: Path) -> str:
    "Write a path relative to the current folder where that is shorter."
    return min(str(path), os.path.relpath(path), key=len)
