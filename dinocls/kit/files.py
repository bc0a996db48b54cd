"A user's mistake is one sentence; a file is written whole or not at all; what was found out once is remembered."
import contextlib
import difflib
import errno
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class UserError(Exception):
    "A mistake that the user can mend, told in one sentence, which shows no password or token of an address."
    def __init__(self, sentence=''):
        sentence = re.sub(r'(\w+://[^\s?#]+\?)[^\s#;,)\'"]+', r'\1…', str(sentence))  # the query of an address
        super().__init__(re.sub(r'(\w+://)[^/@\s]*@', r'\1…@', sentence))  # user and password

    def _render_traceback_(self):  # how IPython shows the exception
        return [f'{type(self).__name__}: {self}']


def nearest(word: str,  # what was given
            known) -> str:  # what there is
    "Return a clause that names the closest known word, or all of them."
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f'did you mean {close[0]!r}?' if close else f'there are: {", ".join(known)}.'


def reason(error: Exception | str) -> str:
    "Return the first line of an error's message, at most 160 characters, or its type if it has none."
    text = str(getattr(error, 'strerror', None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip('.')


@contextlib.contextmanager
def explain(kinds, what: str, remedy: str):  # of exceptions
    "Tell exceptions of a block in a sentence: what went wrong, why, and what to do."
    try: yield
    except kinds as e: raise UserError(f'{what} ({reason(e)}): {remedy}') from None


def digest(value) -> str:
    "Return the SHA-256 of a value's canonical JSON, as 64 hex digits."
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path, kind: str = 'sha256', before: bytes = b'') -> str:  # what is to precede the content
    "Return the SHA-256 of a file, as 64 hex digits, or a digest of another kind."
    sha = hashlib.new(kind, before, usedforsecurity=False)
    with open(path, 'rb') as f:
        while block := f.read(2**20): sha.update(block)
    return sha.hexdigest()


def known_digest(path: Path) -> str:
    "Return the SHA-256 of a file, which is read once a process while it stays as it is."
    seen = os.stat(path)
    return _known_digest(Path(path), seen.st_mtime_ns, seen.st_size, seen.st_ino)


@functools.lru_cache(2**12)
def _known_digest(path: Path, *seen) -> str: return file_digest(path)


@contextlib.contextmanager
def replacing(path: Path):  # the file to write
    "Yield a temporary path beside `path`, which replaces it if the block ends well. Raise `UserError` if it can't."
    path, name = Path(path), ''
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f'.{path.stem}-', suffix=path.suffix, dir=path.parent)
        os.close(handle)
        yield Path(name)
        with contextlib.suppress(OSError): os.chmod(name, 0o644)  # not every file system has modes
        os.replace(name, path)
    except OSError as e:
        why = f'Cannot write {path}: {reason(e)}; free space there or choose another folder with --out.'
        raise UserError(why) from None
    finally:
        if name: Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def as_os_error():
    "Turn the error of a library's own writer, of safetensors or torch, into an `OSError`."
    try: yield
    except OSError: raise
    except Exception as e: raise OSError(reason(e)) from None


SEAL = 'sha256_of_the_rest'


def write_json(path: Path, value,
               sealed: bool = False):  # an object keeps a digest of itself, which `read_json` checks
    "Write a value as indented JSON, short lists and objects on one line; floats that are not finite become null."
    value = plain(value)
    if sealed: value[SEAL] = digest(value)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    def in_line(m):  # inside of a JSON string no line ends
        return m[1] + line + m[3] if len(line := re.sub(r'\n\s+', ' ', m[2])) < 300 else m[0]
    text = re.sub(r'([\[{])\n\s+([^\[\]{}]*?)\n\s*([\]}])', in_line, text)
    with replacing(path) as tmp: tmp.write_text(text + '\n', 'utf-8', 'backslashreplace')  # names that are no UTF-8


def read_json(path: Path):
    "Read a JSON file. Raise `UserError` if it is missing, damaged, or sealed and changed since."
    try: value = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError: raise UserError(f'{path} is not there: run the chapter that writes it.') from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f'{path} cannot be read ({reason(e)}): delete it and run again.') from None
    if isinstance(value, dict) and value.pop(SEAL, None) not in (None, digest(value)):
        raise UserError(f'{path} is damaged, or was changed by hand: delete it and run again.')
    return value


def plain(value):
    "Turn NumPy's scalars and arrays, tuples and paths into what JSON knows."
    if isinstance(value, Mapping): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if isinstance(value, np.ndarray): return plain(value.tolist())
    if isinstance(value, np.generic): return plain(value.item())
    if isinstance(value, float): return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def expand(path) -> Path:
    "Return a path with a leading ~ or ~user as that home folder; as it is where there is none of that name."
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    "Return the folder of caches, in $XDG_CACHE_HOME, else in ~/.cache. Raise `UserError` if there is no home folder."
    folder = expand(os.environ.get('XDG_CACHE_HOME') or '~/.cache')/'dinocls'
    if folder.is_absolute(): return folder
    raise UserError('There is no home folder here for caches: name a folder in XDG_CACHE_HOME.')


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1):  # seconds to wait, then filelock's `Timeout` is raised; -1: for ever
    "Hold a lock on a file. A file system that has no locks is told of once, and work goes on without."
    from filelock import FileLock
    lock = FileLock(path, timeout=timeout)
    try: lock.acquire()
    except (OSError, NotImplementedError) as e:
        if isinstance(e, OSError) and e.errno not in NO_LOCKS: raise
        if path.parent not in _told: print(f'Note: {path.parent} has no locks ({reason(e)}): run one thing at a time.')
        _told.add(path.parent)
    try: yield
    finally: lock.release()


NO_LOCKS, _told = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS), set()


def recall(what: str,  # the question, as in 'bf16'
           key: str):  # what the answer depends on
    "Return what was remembered, or None."
    with contextlib.suppress(UserError, AttributeError, RecursionError):
        return read_json(cache_folder()/f'{what}.json').get(key)


def remember(what: str, key: str, answer):  # JSON
    "Keep an answer, and return it."
    with contextlib.suppress(UserError):  # no home, no space
        file, known = cache_folder()/f'{what}.json', None
        with contextlib.suppress(UserError, RecursionError): known = read_json(file)
        write_json(file, (known if isinstance(known, dict) else {}) | {key: answer})  # a damaged one is made anew
    return answer
