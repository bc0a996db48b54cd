"Pictures as a camera meant them: decoded by Pillow, upright, RGB; folders of them decoded once."
import contextlib
import io
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .fetch import data_folder
from .files import UserError, digest, expand, locked, read_json, reason, replacing, write_json
from .machine import cores, progress


MAX_PIXELS = 89_478_485  # Pillow's limit: a quarter of a GiB as RGB


def to_rgb(image):
    "Return a Pillow image upright, as 8-bit RGB. Raise `ValueError` if it is empty, too large, or of floats."
    from PIL import Image, ImageOps
    if 0 in image.size: raise ValueError('it is empty')
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f'it has {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}')
    image = ImageOps.exif_transpose(image)
    if image.mode == 'F': raise ValueError('its pixels are floats of unknown range: give 8 bits a channel')
    if image.mode.startswith('I'):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError('its greys are outside 0 … 65,535: give 8 bits a channel')
        image = Image.fromarray((values >> 8).astype(np.uint8))  # Pillow would cut them off at 255: a white picture
    return (image.convert('RGBA') if 'transparency' in image.info else image).convert('RGB')


FORMATS = 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'  # no EPS, whose reader starts Ghostscript


def decode(source):  # path or bytes
    "Return the picture in a file or in bytes, as upright RGB. Raise `ValueError` if there is none."
    from PIL import Image, UnidentifiedImageError
    if isinstance(source, (str, os.PathLike)):
        source = expand(source)
        if source.is_dir(): raise ValueError('it is a folder, not a file')
        if not source.is_file(): raise ValueError('there is no such file')
    else: source = io.BytesIO(source)
    try:
        with Image.open(source, formats=FORMATS) as image: return to_rgb(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise ValueError(f'it claims more than {MAX_PIXELS:,} pixels' if isinstance(e, Image.DecompressionBombError)
                         else f'it is not a picture in one of the formats {", ".join(FORMATS)}') from None


def pictures(folder: Path) -> list[Path]:
    "Return the files of a folder that are meant to be pictures, sorted by name."
    meant = (e for e in (os.scandir(folder) if folder.is_dir() else ()) if e.is_file() and not e.name.startswith('.'))
    return sorted(Path(e.path) for e in meant if e.name.lower() not in ('thumbs.db', 'desktop.ini'))


def _in_groups(work: Callable, files: list):  # of the indices of some files → list
    "Yield a function's answers over files. Threads share the work where decoding, which needs no lock, is most of it."
    from PIL import Image
    Image.init()  # not by several threads at once
    large, n = np.mean([f.stat().st_size for f in files[:64]]) > 20_000, len(files)
    with ThreadPoolExecutor(min(8, cores()) if large else 1) as pool:
        for group in pool.map(work, [range(i, min(i + 64, n)) for i in range(0, n, 64)]): yield from group


class _Mixed(Exception): "Pictures of different sizes."


def _fill(files: list, size: tuple, fit: bool, images: np.ndarray) -> dict:  # index → why the file cannot be read
    "Decode files into `images`, cropped and scaled to `size` if `fit`. Raise `_Mixed` if not, and another size is met."
    from PIL import Image, ImageOps
    broken = {}
    def fill(group):
        for i in group:
            try:
                picture = decode(files[i])
                if picture.size != size and not fit: raise _Mixed
                images[i] = ImageOps.fit(picture, size, Image.Resampling.BICUBIC) if picture.size != size else picture
            except _Mixed: raise
            except Exception as e: broken[i] = reason(e)  # a decoder raises almost anything over a damaged file
        return [group.stop]
    for done in _in_groups(fill, files): progress('decode', done, len(files), 'images')
    return dict(sorted(broken.items()))


def _sizes(files: list) -> list:
    "Return the sizes that the headers of files tell, (width, height); those of broken ones are left out."
    from PIL import Image
    def size(i):
        with contextlib.suppress(Exception), Image.open(files[i], formats=FORMATS) as image: return image.size
    return [s for s in _in_groups(lambda group: [*map(size, group)], files) if s]


def _decode_into(files: list, make) -> tuple[np.ndarray, dict]:  # make: shape → array
    "Decode files into an array (n, height, width, 3), all of one size; return it, and which are broken."
    for file in files:
        with contextlib.suppress(Exception):
            size = decode(file).size
            break
    else: return make((len(files), 1, 1, 3)), dict.fromkeys(range(len(files)), 'none of them is')
    try: return (images := make((len(files), *size[::-1], 3))), _fill(files, size, False, images)
    except _Mixed: pass  # seldom known before some are decoded, and then soon
    side = int(np.median([min(s) for s in _sizes(files)]))
    return (images := make((len(files), side, side, 3))), _fill(files, (side, side), True, images)


CACHE_FROM = 2**20  # bytes of files


def _in_memory(shape): return np.zeros(shape, np.uint8)


def decoded(root: Path, files: list) -> tuple[np.ndarray, dict]:  # uint8 (n, h, w, 3); index → why it can't be read
    "Decode files under `root`, or open what an earlier process decoded."
    import PIL
    seen = [(f.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]]
    if sum(size for _, size, _ in seen) < CACHE_FROM: return _decode_into(files, _in_memory)
    name = f'{digest(str(root.resolve()))[:12]}-{digest([1, PIL.__version__, seen])[:20]}.npy'
    file = data_folder()/'decoded'/name
    with contextlib.suppress(OSError, ValueError, UserError): return _open_cache(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix('.lock')):
            with contextlib.suppress(OSError, ValueError, UserError): return _open_cache(file)  # another was faster
            _write_cache(file, files)
            return _open_cache(file)
    except (OSError, UserError) as e:
        print(f'Note: decoded images cannot be kept in {file.parent} ({reason(e)}), so they are decoded again each '
              'time; DINOCLS_DATA names another folder.')
        return _decode_into(files, _in_memory)


def _open_cache(file: Path) -> tuple[np.ndarray, dict]:
    "Map decoded images into memory. Raise `OSError` or `ValueError` if they are not there, or cut short."
    images = np.load(file, mmap_mode='r', allow_pickle=False)
    return images, {int(i): why for i, why in read_json(file.with_suffix('.json')).items()}


def _write_cache(file: Path, files: list):
    "Decode files into an array on disk, whole or not at all, and delete what was decoded of the folder before."
    def make(shape):  # on a full disk the process would be ended later, in the middle of writing
        if shutil.disk_usage(file.parent).free < 1.1 * np.prod(shape): raise OSError('No space left')
        return np.lib.format.open_memmap(tmp, 'w+', np.uint8, shape)
    with replacing(file) as tmp:
        images, broken = _decode_into(files, make)
        images.flush()
        del images
        write_json(file.with_suffix('.json'), broken)  # before the array, whose presence says that both are there
    for old in file.parent.glob(f'{file.name[:12]}-*'):
        if old.stem != file.stem:
            with contextlib.suppress(OSError): old.unlink()


def from_array(values):  # array (h, w, 3) or (h, w), or tensor (3, h, w), uint8
    "Return an array or a tensor as a picture in RGB. Raise `ValueError` for other shapes and types."
    from PIL import Image
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
    from PIL import Image, ImageOps
    if isinstance(item, (str, os.PathLike)): name = f'{name} ({str(item)[-200:]})'
    try:
        if isinstance(item, Image.Image): image = to_rgb(item)
        elif isinstance(item, np.ndarray) or hasattr(item, 'detach'): image = from_array(item)
        elif isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)): image = decode(item)
        else:
            raise ValueError(f'it is a {type(item).__name__}: '
                             'give a path, bytes, a Pillow image, an array or a tensor')
        if image.size != (size := (native[1], native[0])): image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return np.asarray(image)
    except Exception as e:  # a decoder raises almost anything over a damaged file
        raise UserError(f'Cannot use {name}: {reason(e)}.') from None


def as_png(pixels: np.ndarray) -> bytes:
    "Encode uint8 pixels as a PNG file."
    from PIL import Image
    Image.fromarray(pixels).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()
