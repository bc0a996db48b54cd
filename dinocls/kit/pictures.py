"Pictures as a camera meant them: decoded by Pillow, upright, RGB; folders of them decoded once."
import base64
import contextlib
import hashlib
import io
import os
import shutil
import stat
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from .fetch import data_folder
from .files import UserError, digest, expand, file_digest, locked, plain, read_json, reason, replacing, write_json
from .machine import cores, memory_free, progress


MAX_PIXELS = 89_478_485  # Pillow's limit: a quarter of a GiB as RGB


BACKGROUND = 255, 255, 255  # white: what lies behind transparent pixels, in training and for predictions alike
TURNS = dict(zip(range(2, 9), ('FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_270',
                               'TRANSVERSE', 'ROTATE_90')))  # the camera's orientation → what sets it upright


def to_rgb(image):
    """Return a Pillow image upright, as 8-bit RGB, transparency on `BACKGROUND`; of one with 16 bits a channel,
    `bits_used` says how many hold something. Raise `ValueError` if it is empty, too large, or of floats."""
    if 0 in image.size: raise ValueError('it is empty')
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f'it has {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}')
    raw, turn, bits = str(getattr(image, 'tile', '')), None, 0  # how the file holds its pixels, before they are loaded
    with contextlib.suppress(Exception): turn = TURNS.get(image.getexif().get(0x0112))  # malformed EXIF: as it lies
    if image.mode == 'F': raise ValueError('its pixels are floats of unknown range: give 8 bits a channel')
    if image.mode.startswith('I'):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.int64) << (4 if 'I;12' in raw else 0)  # 12 bits, as the file says itself
        if values.min() < 0 or values.max() > 65535:
            raise ValueError('its greys are outside 0 … 65,535: give 8 bits a channel')
        bits = int(values.max()).bit_length()
        image = Image.fromarray((values >> 8).astype(np.uint8))  # Pillow would cut them off at 255: a white picture
    elif ';16' in raw:  # Pillow keeps the upper eight
        bits = 8 + max(high for _, high in image.convert('RGB').getextrema()).bit_length()
    if 'transparency' in image.info or image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa'):
        image = image.convert('RGBA')
        behind = Image.new('RGBA', image.size, BACKGROUND)
        image = Image.alpha_composite(behind, image)
    image.load()
    if image.mode != 'RGB': image = image.convert('RGB')
    if turn: image = image.transpose(Image.Transpose[turn])
    image.bits_used = bits
    return image


FORMATS = 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'  # no EPS, whose reader starts Ghostscript


def _open(path):
    "Open a file to be read; `~` is the user's folder. Raise `ValueError` if it is something else or not there."
    path = expand(path)
    if path.is_dir(): raise ValueError('it is a folder, not a file')
    try: kind = path.stat().st_mode
    except FileNotFoundError as e: raise FileNotFoundError(e.errno, 'there is no such file', str(path)) from None
    if not stat.S_ISREG(kind): raise ValueError('there is no such file')  # a device, which might never end
    return open(path, 'rb')


def decode(source):  # path or bytes
    "Return the picture in a file or in bytes, as upright RGB. Raise `ValueError` or `OSError` if there is none."
    with contextlib.ExitStack() as held:
        file = io.BytesIO(source) if not isinstance(source, (str, os.PathLike)) else held.enter_context(_open(source))
        try: return to_rgb(held.enter_context(Image.open(file, formats=FORMATS)))
        except Image.DecompressionBombError: raise ValueError(f'it claims more than {MAX_PIXELS:,} pixels') from None
        except UnidentifiedImageError:
            raise ValueError(f'it is not a picture in one of the formats {", ".join(FORMATS)}') from None


def fit_to(picture, size: tuple):  # (width, height)
    "Crop a picture in its middle to the shape of `size`, and scale it to that."
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.BICUBIC)


def photograph(name: str,  # flower or china, the two that come with scikit-learn
               side: int):  # pixels
    "Return a real photograph to look at, as a square Pillow image."
    from sklearn.datasets import load_sample_image
    return fit_to(Image.fromarray(load_sample_image(f'{name}.jpg')), (side, side))


SUFFIXES = {'', *('.apng .bmp .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pgm .png .pnm .ppm '
                  '.tif .tiff .webp').split(),  # what is none of `FORMATS` is meant, too, and refused when it is read
            *'.avif .heic .heif .ico .jxl .pfm .psd .svg .tga'.split()}
BY_PRODUCTS = {'thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r', '@eadir', '__macosx', '#recycle', '@recycle',
               '@tmp', '$recycle.bin', 'system volume information', 'lost+found'}  # of file managers and systems


def is_by_product(name: str) -> bool:
    "Tell whether a file or a folder was left by a file manager or a system, and means nothing."
    name = name.lower()
    return name.startswith('.') or name in BY_PRODUCTS or name.endswith((':zone.identifier', '.db:encryptable'))


def pictures(folder: Path,
             passed_over: list | None = None) -> list[Path]:  # takes the paths of what is no picture by its name
    "Return the files below a folder that are meant to be pictures, sorted. Raise `UserError` if it can't be read."
    def stop(e): raise UserError(f'The folder {printable(e.filename)} cannot be read ({reason(e)}): make it readable.')
    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        idle = [name for name in folders if is_by_product(name)]
        folders[:] = sorted(set(folders) - set(idle))
        for name in (n for n in names if not is_by_product(n)):
            if (file := Path(here, name)).suffix.lower() in SUFFIXES and file.is_file(): found.append(file)
            else: idle.append(name)
        if passed_over is not None: passed_over += [Path(here, n) for n in sorted(idle) if not n.startswith('.')]
    return sorted(found)


def printable(name) -> str:  # text or path
    "Return a name in composed letters, bytes that are no UTF-8 as escapes, so that it can be printed and stored."
    return unicodedata.normalize('NFC', os.fsencode(name).decode('utf-8', 'backslashreplace'))


def _in_groups(work: Callable, files: list):  # of the indices of some files → list
    "Yield a function's answers over files. Threads share the work where decoding, which needs no lock, is most of it."
    Image.init()  # not by several threads at once
    large, n = np.mean([f.stat().st_size for f in files[:64]]) > 20_000, len(files)
    with ThreadPoolExecutor(min(8, cores()) if large else 1) as pool:
        for group in pool.map(work, [range(i, min(i + 64, n)) for i in range(0, n, 64)]): yield from group


class _Mixed(Exception): "Pictures of different sizes."


def _fill(files: list, size: tuple | None, images: np.ndarray) -> tuple[np.ndarray, dict]:
    """Decode files into `images`, cropped and scaled where need be; return them without the broken ones, whose gaps
    are closed in place, and index → why a file cannot be read. Raise `_Mixed` if `size` is given and another is met,
    `UserError` for what says nothing of the pictures, a disk that fails say, and where upper bits are unused."""
    broken, bits = {}, {}
    def fill(group):
        for i in group:
            try: picture = decode(files[i])
            except Exception as e:  # a decoder raises almost anything over a damaged file
                if isinstance(e, MemoryError) or getattr(e, 'errno', None): raise _not_now(files[i], e) from None
                broken[i] = reason(e)
                continue
            if size and picture.size != size: raise _Mixed
            if picture.bits_used: bits[i] = picture.bits_used
            images[i] = fit_to(picture, images.shape[2:0:-1])
        return [group.stop]
    for done in _in_groups(fill, files): progress('decode', done, len(files), 'images')
    if bits and (used := max(bits.values())) <= 14:
        raise Unreadable(f'The pictures of 16 bits a channel, as {printable(files[min(bits)])}, leave {16 - used} of '
                        f'them unused and would be dark: multiply all values by {2 ** (16 - used)}, or save 8 bits.')
    whole = [i for i in range(len(files)) if i not in broken] or range(len(files))
    for row, i in enumerate(whole if broken else ()): images[row] = images[i]
    return images[:len(whole)], dict(sorted(broken.items()))


class Unreadable(UserError): "Pictures that can't be used, wherever they would be kept."


def _not_now(file: Path, error: Exception) -> Unreadable:
    return Unreadable(f'{printable(file)} could not be read ({reason(error)}), which need not be the picture\'s fault: '
                     'make it readable, and try again.')


def _decode_into(files: list, side: int, make) -> tuple[np.ndarray, dict]:  # make: shape → array
    "Decode files into an array (n, height, width, 3), all of one size, without the broken ones; return it, and those."
    for file in files:
        with contextlib.suppress(Exception):
            size = decode(file).size
            break
    else: return _fill(files, None, make((len(files), 1, 1, 3)))
    least = min(side or min(size), *size)
    width, height = (max(1, round(n * least / min(size))) for n in size)
    try: return _fill(files, size, make((len(files), height, width, 3)))
    except _Mixed: pass  # seldom known before some are decoded, and then soon
    def shorter(i):  # side, as the file's header tells
        with contextlib.suppress(Exception), Image.open(files[i], formats=FORMATS) as image: return min(image.size)
    sides = _in_groups(lambda group: [*map(shorter, group)], files)
    least = int(np.median([s for s in sides if s]))
    least = min(side or least, least)
    return _fill(files, None, make((len(files), least, least, 3)))


CACHE_FROM = 2**20  # bytes of files


def _in_memory(shape):
    "Return an empty array. Raise `UserError` if there is no memory for it."
    if np.prod(shape, dtype=float) > memory_free():
        raise UserError(f'{shape[0]:,} pictures of {shape[2]}×{shape[1]} do not fit into memory: free space for them '
                        'on disk, or name a folder that has it with DINOCLS_DATA.')
    return np.zeros(shape, np.uint8)


def decoded(root: Path, files: list,
            side: int = 0) -> tuple[np.ndarray, dict, str]:  # uint8 (n, h, w, 3); index → why it can't be read; SHA-256
    """Decode the files under `root` that can be read, or open what an earlier process decoded. Larger pictures are
    shrunk until their shorter side has `side` pixels; 0: none is."""
    def in_memory():
        images, broken = _decode_into(files, side, _in_memory)
        return images, broken, hashlib.sha256(images).hexdigest()
    try: seen = [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f in files for s in [f.stat()]]
    except OSError as e: raise _not_now(e.filename, e) from None
    if sum(size for _, size, _, _ in seen) < CACHE_FROM: return in_memory()
    name = f'{digest(str(root.resolve()))[:12]}-{digest([3, PIL.__version__, side, BACKGROUND, seen])[:20]}.rgb'
    file = data_folder()/'decoded'/name
    if found := _open_cache(file): return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix('.lock')): return _open_cache(file) or _write_cache(file, files, side)
    except Unreadable: raise
    except (OSError, UserError) as e:
        print(f'Note: decoded images cannot be kept in {file.parent} ({reason(e)}), so they are decoded again each '
              'time; DINOCLS_DATA names another folder.')
        return in_memory()


def _stamp(file: Path) -> list:
    "Return what changes whenever a file is written."
    s = file.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _open_cache(file: Path) -> tuple | None:
    """Map decoded images into memory, if they are there, and what was written: a file that was touched since is read
    through and compared."""
    with contextlib.suppress(Exception):  # a damaged record raises almost anything
        check, about = read_json(file.with_suffix('.json'))
        if digest(about) != check: return None
        if about['stamp'] != _stamp(file) and file_digest(file) != about['sha256']: return None
        images = np.memmap(file, np.uint8, 'r', shape=tuple(about['shape']))
        return images, {int(i): why for i, why in about['broken'].items()}, about['sha256']


def _write_cache(file: Path, files: list, side: int) -> tuple:
    "Decode files into an array on disk, whole or not at all, and delete what was decoded of the folder before."
    def make(wanted):  # on a full disk the process would be ended later, in the middle of writing
        if shutil.disk_usage(file.parent).free < 1.1 * np.prod(wanted, dtype=float): raise OSError('No space left')
        return np.memmap(tmp, np.uint8, 'w+', shape=wanted)
    with replacing(file) as tmp:
        images, broken = _decode_into(files, side, make)
        images.flush()
        shape, size = images.shape, images.nbytes
        del images
        os.truncate(tmp, size)
    about = plain({'shape': shape, 'broken': broken, 'sha256': file_digest(file), 'stamp': _stamp(file)})
    write_json(file.with_suffix('.json'), [digest(about), about])  # last: it says that all is there
    for old in file.parent.glob(f'{file.name[:12]}-*'):
        if old.stem != file.stem:
            with contextlib.suppress(OSError): old.unlink()
    return np.memmap(file, np.uint8, 'r', shape=shape), broken, about['sha256']


def from_array(values):  # array (h, w, 3) or (h, w), or tensor (3, h, w), uint8
    "Return an array or a tensor as a picture in RGB. Raise `ValueError` for other shapes and types."
    shape, kind = tuple(values.shape), str(values.dtype).removeprefix('torch.')
    if kind != 'uint8': raise ValueError(f'its values are {kind}: give uint8, 0 to 255')
    if hasattr(values, 'detach'):  # a tensor, without importing torch for it
        if shape[0:1] != (3,) or len(shape) != 3:
            raise ValueError(f'it is a tensor of shape {shape}: give (3, height, width)')
        values = values.detach().cpu().permute(1, 2, 0).numpy()
    elif not (len(shape) == 2 or len(shape) == 3 and shape[2] == 3):
        raise ValueError(f'it is an array of shape {shape}: give (height, width, 3) or (height, width)')
    if 0 in shape: raise ValueError('it is empty')
    return Image.fromarray(np.ascontiguousarray(values)).convert('RGB')


def to_pixels(item,  # path, bytes, Pillow image, array or tensor
              native: tuple,  # (height, width)
              name: str = 'the image') -> np.ndarray:  # uint8 (height, width, 3)
    "Return any picture, upright, at the native size. Raise `UserError` that names the item if it is none."
    if isinstance(item, (str, os.PathLike)): name = f'{name} ({printable(item)[-200:]})'
    try:
        if isinstance(item, Image.Image): image = to_rgb(item)
        elif isinstance(item, np.ndarray) or hasattr(item, 'detach'): image = from_array(item)
        elif isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)): image = decode(item)
        else:
            raise ValueError(f'it is a {type(item).__name__}: give a path, bytes, a Pillow image, an array or a tensor')
        if 0 < (bits := getattr(image, 'bits_used', 0)) <= 12:
            raise ValueError(f'of 16 bits a channel it uses {bits} and would be nearly black: multiply its values by '
                             f'{2 ** (16 - bits)}, or save it with 8 bits')
        return np.asarray(fit_to(image, (native[1], native[0])))
    except Exception as e:  # a decoder raises almost anything over a damaged file
        raise UserError(f'Cannot use {name}: {reason(e)}.') from None


def as_png(pixels: np.ndarray) -> bytes:
    "Encode uint8 pixels as a PNG file."
    Image.fromarray(pixels).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()


def as_url(pixels: np.ndarray) -> str:
    "Return uint8 pixels as an address that holds them."
    return 'data:image/png;base64,' + base64.b64encode(as_png(pixels)).decode()
