"""A stage is a function of `Config` whose result is kept on disk, and found again while it would come out the same.

What a result depends on is measured while it is made: the fields that were read, the content of data and weights, the
code that was reached, and the results of other stages that were used. A stored result counts if all of them are as they
were; one whose code or data have changed is computed anew, and that is said.
"""
import ast
import contextlib
import dataclasses
import functools
import inspect
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import machine
from .config import FIELDS, WHERE, Config, parse_overrides, preset
from .files import (
    UserError, as_os_error, digest, explain, known_digest, locked, plain, read_json, reason, replacing, write_json)

RUN_FORMAT = 2  # layout of a run folder; raised when an older one could be misread
STAGES = {}  # name → stage, filled as modules are imported
NOT_READ = {*WHERE, 'data_root'}  # data count by their content


def open_run(cfg: Config) -> Path:
    "Return the run folder, made if need be. Raise `UserError` if it cannot be written, or is another run's."
    folder, wanted = cfg.folder, plain({f: getattr(cfg, f) for f in FIELDS if f not in WHERE})
    there = [p for p in folder.iterdir() if not p.name.startswith('.run-')] if folder.is_dir() else []
    if not (folder/'run.json').exists():  # asked after `there`: another process may be opening it
        if there: raise UserError(f'{folder} is not empty and not a run folder: choose a new or empty one with --out.')
        about = {'format': RUN_FORMAT, 'version': machine.version(), 'preset': cfg.preset, 'config': wanted}
        write_json(folder/'run.json', about, sealed=True)
        return folder
    try: record = read_json(folder/'run.json')
    except UserError as e:
        why = str(e).partition(': ')[0]
        raise UserError(f'{why}: choose another folder with --out, or delete that one.') from None
    if not isinstance(record, dict): record = {}
    if record.get('format') != RUN_FORMAT:
        raise UserError(f'{folder} was written by another version of dinocls ({record.get("version", "unknown")}; '
                        f'this is {machine.version()}): choose a new folder with --out.')
    had = plain(dataclasses.asdict(Config())) | (record.get('config') or {})  # a later field was at its default
    other = [k for k in wanted if k not in NOT_READ and had.get(k) != wanted[k]]
    if other: raise UserError(f'{folder} holds a run with {other[0]}={had.get(other[0])!r}, this one has '
                              f'{other[0]}={wanted[other[0]]!r}: choose another folder with --out, or delete that one.')
    return folder


def configure(name: str,  # preset
              overrides: str = '',  # single fields, as in 'seed=7 batch_size=32'
              out: str = '') -> Config:  # run folder
    "Return the configuration of a chapter and open its run folder."
    cfg = preset(name, **parse_overrides(overrides), **({'out': out} if out else {}))
    open_run(cfg)
    return cfg


class MissingPart(UserError, KeyError): "A stored result lacks a part, because an older version of the book made it."


class Result(Mapping):
    "What a stage returned, read from its folder when asked for. Raise `MissingPart` for what is not in it."
    def __init__(self, folder, record=None):
        self.folder, self.record = Path(folder), record or read_json(Path(folder)/'run.json')

    def __iter__(self): return iter(self.record['parts'])
    def __len__(self): return len(self.record['parts'])
    def __repr__(self): return f'Result({self.folder.name}: {", ".join(self)})'

    def damage(self) -> str:
        "Say which file is not as it was written, or nothing. Each is read once a process."
        for name, known in self.record['files'].items():
            file = self.folder/name
            try: same = file.stat().st_size == known['bytes'] and known_digest(file) == known['sha256']
            except OSError as e: return f'{name} of {self.folder.name} cannot be read ({reason(e)})'
            if not same: return f'{name} of {self.folder.name} is damaged'
        return ''

    def __getitem__(self, name):
        kind = self.record['parts'].get(name)
        if not kind:
            raise MissingPart(f'{self.folder} holds no {name!r}: it was made by another version of the book; delete '
                              'that folder, or run with --force, to renew it.')
        if kind == 'json': return read_json(self.folder/'result.json')[name]
        if kind == 'array':
            with np.load(self.folder/'arrays.npz', allow_pickle=False) as f: return f[name]
        from safetensors.torch import load_file
        return load_file(self.folder/f'{name}.safetensors')


def save_result(folder: Path, result: dict) -> dict:
    "Write a stage's result into `folder`; return the kind of each part."
    kinds = {name: 'array' if isinstance(v, np.ndarray) else 'tensors' if _is_weights(v) else 'json'
             for name, v in result.items()}
    write_json(folder/'result.json', {n: result[n] for n, k in kinds.items() if k == 'json'})
    arrays = {n: result[n] for n, k in kinds.items() if k == 'array'}
    with replacing(folder/'arrays.npz') as tmp: np.savez_compressed(tmp, **arrays)
    for name in (n for n, k in kinds.items() if k == 'tensors'):
        from safetensors.torch import save_file
        weights = {k: t.detach().cpu().contiguous() for k, t in result[name].items()}
        with replacing(folder/f'{name}.safetensors') as tmp, as_os_error(): save_file(weights, tmp)
    return kinds


def _is_weights(value) -> bool:
    "Tell whether a value is a non-empty dict of tensors."
    return isinstance(value, Mapping) and bool(value) and all(hasattr(t, 'detach') for t in value.values())


class View:
    "A configuration that notes which of its fields are read, and which results of stages are used."
    def __init__(self, cfg: Config, fields: dict, after: dict, changed=()):
        self.__dict__.update(_cfg=cfg, _fields=fields, _after=after, _changed=frozenset(changed))

    def __getattr__(self, name):
        value = getattr(self._cfg, name)
        if name in FIELDS and name not in NOT_READ | self._changed: self._fields[name] = plain(value)
        return value

    def uses(self, result: Result):
        "Note that a stage's result is used, and so all that it depends on."
        for name in result.record['fields']: getattr(self, name)
        self._after[result.folder.name] = result.record['digest']


def variant(cfg, **changes):
    """Return the configuration with some fields changed, in the same run folder. Within a stage, what is changed is not
    read of the stage's own configuration."""
    if not isinstance(cfg, View): return dataclasses.replace(cfg, out=str(cfg.folder), **changes)
    return View(variant(cfg._cfg, **changes), cfg._fields, cfg._after, cfg._changed | changes.keys())


NO_RESULT = ('cluster', 'config', 'figures', 'machine')  # of kit: fields are compared by value, the rest gives none
PACKAGE = Path(__file__).parents[1]


class Code:
    "A module of the package without what changes no result: comments, docstrings, and functions that draw."
    def __init__(self, file: Path):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        self.file, self.imports = file, _imported(tree, file)
        self.body = [_bare(node) for node in tree.body if not _is_idle(node)]
        self.digest = digest([ast.dump(node) for node in self.body])

    def defines(self, name: str) -> bool:
        "Tell whether the module has a stage of this name."
        return any(getattr(n, 'name', '') == name and any(getattr(d, 'id', '') == 'stage' for d in n.decorator_list)
                   for n in self.body if isinstance(n, ast.FunctionDef))


@functools.lru_cache
def _code(file: Path, mtime: int) -> Code: return Code(file)


def code(file: Path) -> Code:
    "Read a module, again only if it has changed."
    return _code(file, file.stat().st_mtime_ns)


def _is_idle(node: ast.stmt) -> bool:
    "Tell whether a statement of a module changes no result: docstring, list of names, a function that draws."
    if isinstance(node, ast.Expr): return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign): return getattr(node.targets[0], 'id', '') == '__all__'
    return getattr(node, 'name', '').lstrip('_').startswith('draw')


def _bare(tree: ast.AST) -> ast.AST:
    "Take the docstrings out of a tree."
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None: node.body = node.body[1:]
    return tree


def _imported(tree: ast.Module, file: Path) -> set:
    "Return the files of the package's modules that a module imports, anywhere in it."
    found = set()
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
        path = (node.module or '').split('.') if node.module else []
        if node.level: base = file.parents[node.level - 1].joinpath(*path)
        elif path[:1] == [PACKAGE.name]: base = PACKAGE.joinpath(*path[1:])
        else: continue
        found |= {base.with_suffix('.py'), *(base/f'{name.name}.py' for name in node.names)}
    return {f for f in found if f.is_file() and not (f.parent.name == 'kit' and f.stem in NO_RESULT)}


def code_digests(stage) -> dict:  # module → digest
    "Return digests of the code that a stage reaches by imports; of its own module, as a running notebook has it."
    here = stage.fn.__module__
    if here.partition('.')[0] == PACKAGE.name: file = Path(inspect.getfile(stage.fn))
    else: file = next((f for f in PACKAGE.glob('*.py') if here == '__main__' and code(f).defines(stage.name)), None)
    if not file: return {here: digest(_as_defined(stage))}
    found, todo = {}, [file]
    while todo:
        if (module := todo.pop()) in found: continue
        found[module] = code(module).digest
        todo += code(module).imports
    if here == '__main__': found[file] = _digest_in_notebook(code(file))
    return {str(f.relative_to(PACKAGE).with_suffix('')): d for f, d in sorted(found.items())}


@functools.lru_cache
def _tree(value) -> str:
    "Return the tree of a function or class, as text. Finding its source takes long, and it stays what it is."
    return ast.dump(_bare(ast.parse(textwrap.dedent(inspect.getsource(getattr(value, 'fn', value))))).body[0])


def _as_defined(value) -> str:
    "Return the tree of a function or class that a cell defined, as text; empty if its source is not at hand."
    try: return _tree(value)
    except (OSError, TypeError, SyntaxError): return ''


def _digest_in_notebook(module: Code) -> str:
    "Return the digest of a module with each definition as the running notebook has it."
    mine = [getattr(sys.modules['__main__'], getattr(node, 'name', ''), None) for node in module.body]
    return digest([m is not None and _as_defined(m) or ast.dump(node) for m, node in zip(mine, module.body)])


class Stage:
    "A function `fn(cfg, folder) -> dict` whose result is computed once and then loaded."
    def __init__(self, fn):
        self.fn, self.name, self.__doc__, self._said = fn, fn.__name__, fn.__doc__, set()
        self.module = fn.__module__.rpartition('.')[2]
        STAGES[self.name] = self

    def __call__(self, cfg) -> Result:
        "Load the result for a configuration, or compute it."
        result = self._result(cfg._cfg if isinstance(cfg, View) else cfg)
        if isinstance(cfg, View): cfg.uses(result)
        return result

    def is_done(self, cfg) -> bool: return self.find(cfg)[0] is not None

    def partial(self, cfg) -> Path:
        "Return the folder in which a result is made, with what a stopped attempt left there."
        return self._places(getattr(cfg, '_cfg', cfg))[0]

    def find(self, cfg) -> tuple[Result | None, str]:
        "Return the stored result that holds for a configuration, or none, and what speaks against the nearest one."
        cfg, objection = getattr(cfg, '_cfg', cfg), ''
        for result in stored(cfg.folder, self.name):
            if any(plain(getattr(cfg, f, None)) != v for f, v in result.record['fields'].items()): continue
            why = self._objection(result.record, cfg)
            if why and not cfg.keep:
                objection = f'{why} since {time.strftime("%Y-%m-%d %H:%M", time.localtime(result.record["started"]))}'
            elif damage := result.damage(): objection = damage
            else: return (_marked(result, why) if why else result), why
        return None, objection

    def _objection(self, record: dict, cfg: Config) -> str:
        "Say what a result depends on that is no longer as it was, or nothing."
        code, content = code_digests(self), content_of(cfg, record['fields'])
        other = sorted(m for m in code.keys() | record['code'].keys() if code.get(m) != record['code'].get(m))
        if other: return f'the code of {", ".join(other)} has changed'
        other = sorted(f for f in content if content[f] != record['content'].get(f))
        if other: return f'the content of {", ".join(other)} has changed'
        for name, known in record['after'].items():
            before = record_of(cfg.folder/'stages'/name)
            if before and before['digest'] != known: return f'{name} has been computed anew'
        return ''

    def _result(self, cfg: Config) -> Result:
        "Load a result, or compute it while nobody else does."
        found, why = self.find(cfg)
        if found:
            if why: self._say(f'{found.folder.name} is kept, although {why}.')
            return found
        if why: self._say(f'{self.name} is computed anew: {why}.')
        if not (cfg.folder/'run.json').exists(): open_run(cfg)
        partial, locks = self._places(cfg)
        if machine.rank():  # takes part in what the first process computes, and waits for its result
            self.fn(View(cfg, {}, {}), partial)
            while not (found := self.find(cfg)[0]): time.sleep(0.1)
            return found
        with contextlib.ExitStack() as held:
            with explain(OSError, f'{self.name} cannot be computed in {cfg.folder}',
                         'make it writable, or choose another folder with --out.'):
                partial.parent.mkdir(parents=True, exist_ok=True)
                for lock in locks: held.enter_context(locked(lock))
                if not (found := self.find(cfg)[0]): partial.mkdir(exist_ok=True)
            return found or self._compute(cfg, partial)

    def _say(self, sentence: str):
        "Say something once per process."
        if sentence not in self._said and not machine.rank(): print(f'Note: {sentence}')
        self._said.add(sentence)

    def _places(self, cfg: Config) -> tuple[Path, list]:
        """Return where a result is made, which all fields, their content and the code decide, and what locks it: this
        place, and, so that configurations with one result wait for each other, the fields that the stage read before.
        """
        fields = {f: plain(getattr(cfg, f)) for f in FIELDS if f not in WHERE}
        before = next((result.record['fields'] for result in stored(cfg.folder, self.name)), fields)
        made = digest([fields, code_digests(self), content_of(cfg, fields)])[:12]
        likely = digest({f: fields[f] for f in before if f in fields})[:12]
        stages = cfg.folder/'stages'
        locks = [stages/f'{self.name}-{key}.lock' for key in dict.fromkeys((likely, made))]
        return stages/f'{self.name}-{made}.partial', locks

    def _compute(self, cfg: Config, partial: Path) -> Result:
        "Compute in a folder of its own, and rename that when it is complete."
        for file in partial.glob('.*'): file.unlink(missing_ok=True)  # what a killed attempt was writing
        fields, after, start, clock = {}, {}, time.time(), time.perf_counter()
        machine.progress(self.name)
        kinds = _save(partial, self.fn(View(cfg, fields, after), partial))
        kept = {'result.json', 'arrays.npz', *(f'{name}.safetensors' for name in kinds)}
        for file in partial.iterdir():
            if file.is_file() and file.name not in kept: file.unlink()
        files = {p.name: {'bytes': p.stat().st_size, 'sha256': known_digest(p)} for p in sorted(partial.iterdir())}
        record = {'stage': self.name, 'fields': dict(sorted(fields.items())), 'content': content_of(cfg, fields),
                  'code': code_digests(self), 'after': after}
        key = digest(record)
        stale = [name for name in after if (record_of(cfg.folder/'stages'/name) or {}).get('kept')]
        record |= {'key': key, 'digest': digest(files), 'git': machine.git_commit(),
                   'kept': f'it rests on {", ".join(stale)}, kept although stale' if stale else '',
                   'config': plain(dataclasses.asdict(cfg)), 'versions': machine.versions(),
                   'hardware': machine.hardware(), 'peak_memory_mb': machine.peak_memory(), 'started': round(start),
                   'seconds': round(time.perf_counter() - clock, 3), 'parts': kinds, 'files': files}
        write_json(partial/'run.json', record, sealed=True)
        done = cfg.folder/'stages'/f'{self.name}-{key[:12]}'
        shutil.rmtree(done, ignore_errors=True)
        partial.rename(done)
        return Result(done)


def stage(fn) -> Stage:
    "Turn a function `fn(cfg, folder) -> dict` into a stage."
    return Stage(fn)


def content_of(cfg: Config, fields) -> dict:  # field → digest
    "Return digests of the data and the weights that fields stand for, as far as they are asked for and at hand."
    from .datasets import fingerprint_at_hand
    from .fetch import weights_digest
    find = {'dataset': lambda: fingerprint_at_hand(cfg), 'weights': lambda: weights_digest(cfg.backbone, cfg.weights),
            'pretrain_from': lambda: cfg.pretrain_from and weights_digest(cfg.backbone, cfg.pretrain_from)}
    return {f: made for f in find if f in fields and (made := find[f]())}


def record_of(folder: Path) -> dict | None:
    "Return the record of a stored result; none if it is in the making, damaged, or of an older version."
    if folder.suffix: return None  # in the making, or a lock
    try: seen = (folder/'run.json').stat()
    except OSError: return None
    return _record_of(folder, seen.st_mtime_ns, seen.st_size, seen.st_ino)


@functools.lru_cache(2**12)
def _record_of(folder: Path, *seen) -> dict | None:  # a study asks for hundreds of records at each of its runs
    try: record = read_json(folder/'run.json')
    except UserError: return None
    whole = isinstance(record, dict) and {'fields', 'content', 'code', 'after', 'files', 'parts'} <= record.keys()
    return record if whole else None


def stored(run: Path, name: str) -> list[Result]:
    "Return the results of a stage in a run folder, the newest first; their files are not looked at."
    found = [Result(f, record) for f in (run/'stages').glob(f'{name}-*') if (record := record_of(f))]
    return sorted(found, key=lambda r: -(r.folder/'run.json').stat().st_mtime_ns)


def read_result(folder: Path) -> Result:
    "Return a stage's result from its folder. Raise `UserError` if it is not one, or damaged."
    if not (record := record_of(folder)):
        raise UserError(f'{folder} holds no whole result of a stage: run the chapter that makes it again.')
    if damage := (result := Result(folder, record)).damage():
        raise UserError(f'{damage}: run the chapter that makes it again.')
    return result


def _save(folder: Path, result: dict) -> dict:
    "Save a result; where there is no space for it, checkpoints make room, the oldest first."
    spare = sorted(folder.glob('checkpoint*'), key=lambda f: f.stat().st_mtime_ns)
    while True:
        try: return save_result(folder, result)
        except UserError:
            if not spare: raise
            spare.pop(0).unlink()


def _marked(result: Result, why: str) -> Result:
    "Write into a result's record that it was kept, and why."
    if result.record['kept'] != why: write_json(result.folder/'run.json', result.record | {'kept': why}, sealed=True)
    return Result(result.folder)


def forget(folder: Path, names):  # run folder; stages
    "Delete the stored results of stages, so that they are computed anew."
    for name in names:
        for path in (folder/'stages').glob(f'{name}-*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
