"Pictures as a camera meant them: decoded by Pillow, upright, RGB; folders of them decoded once."
import contextlib
import errno
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .fetch import data_folder
from .files import UserError, digest, read_json, reason, replacing, write_json
from .machine import cores, progress


MAX_PIXELS = 89_478_485  # Pillow's limit: a quarter of a GiB as RGB


def to_rgb(image):
    "Return a Pillow image upright, as 8-bit RGB. Raise `ValueError` if it is empty, too large, or of floats."
    from PIL import Image, ImageOps
    if 0 in image.size: raise ValueError('it is empty')
    if image.width * image.height > MAX_PIXELS: raise ValueError(f'it has {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}')
    image = ImageOps.exif_transpose(image)
    if image.mode == 'F': raise ValueError('its pixels are floats of unknown range: give 8 bits a channel')
    if image.mode.startswith('I'):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535: raise ValueError('its greys are outside 0 … 65,535: give 8 bits a channel')
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return (image.convert('RGBA') if 'transparency' in image.info else image).convert('RGB')


FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')


def decode(source):  # path or bytes
    "Return the picture in a file or in bytes, as upright RGB. Raise `ValueError` if there is none."
    from PIL import Image, UnidentifiedImageError
    if isinstance(source, (str, os.PathLike)):
        source = Path(source).expanduser()
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
    return sorted(Path(e.path) for e in os.scandir(folder) if e.is_file() and not e.name.startswith('.') and e.name.lower() not in ('thumbs.db', 'desktop.ini')) \
        if folder.is_dir() else []


def _threads(files: list) -> int:
    "Return how many threads to decode with: one where pictures are so small that Python's own part, which holds its lock, is most of the work."
    return min(8, cores()) if np.mean([f.stat().st_size for f in files[:64]]) > 20_000 else 1


class _Mixed(Exception): "Pictures of different sizes."


def _fill(files: list, size: tuple, fit: bool, images: np.ndarray) -> dict:  # index → why the file cannot be read
    "Decode files into `images`, each cropped and scaled to `size` if `fit`. Raise `_Mixed` if not, and another size is met."
    from PIL import Image, ImageOps
    broken = {}
    def some(start):
        for i in range(start, min(start + 64, len(files))):
            try:
                picture = decode(files[i])
                if picture.size != size and not fit: raise _Mixed
                images[i] = ImageOps.fit(picture, size, Image.Resampling.BICUBIC) if picture.size != size else picture
            except _Mixed: raise
            except Exception as e: broken[i] = reason(e)  # a decoder raises almost anything over a damaged file
    Image.init()  # not by several threads at once
    with ThreadPoolExecutor(_threads(files)) as pool:
        for done, _ in enumerate(pool.map(some, range(0, len(files), 64)), 1): progress('decode', min(64 * done, len(files)), len(files), 'images')
    return dict(sorted(broken.items()))


def _sizes(files: list) -> list:
    "Return the sizes that the headers of files tell, (width, height); those of broken ones are left out."
    from PIL import Image
    def size(file):
        with contextlib.suppress(Exception), Image.open(file, formats=FORMATS) as image: return image.size
    Image.init()
    with ThreadPoolExecutor(_threads(files)) as pool: return [s for s in pool.map(size, files, chunksize=64) if s]


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


def _cache_file(root: Path, files: list) -> Path:
    "Return where the decoded images of some files under `root` are kept."
    import PIL
    stats = [f.stat() for f in files]
    key = digest([1, PIL.__version__, [[f.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]])
    return data_folder()/'decoded'/f'{digest(str(root.resolve()))[:12]}-{key[:20]}.npy' if sum(s.st_size for s in stats) >= CACHE_FROM else None


def decoded(root: Path, files: list) -> tuple[np.ndarray, dict]:  # uint8 (n, height, width, 3); index → why a file cannot be read
    "Decode files under `root`, or open what an earlier process decoded."
    from filelock import FileLock
    file = _cache_file(root, files)
    if not file: return _decode_into(files, lambda shape: np.zeros(shape, np.uint8))
    with contextlib.suppress(OSError, ValueError, UserError): return _open_cache(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix('.lock')):
            with contextlib.suppress(OSError, ValueError, UserError): return _open_cache(file)  # another process was faster
            _write_cache(file, files)
            return _open_cache(file)
    except (OSError, UserError) as e:
        print(f'Note: decoded images cannot be kept in {file.parent} ({reason(e)}), so they are decoded again each time; DINOCLS_DATA names another folder.')
        return _decode_into(files, lambda shape: np.zeros(shape, np.uint8))


def _open_cache(file: Path) -> tuple[np.ndarray, dict]:
    "Map decoded images into memory. Raise `OSError` or `ValueError` if they are not there, or cut short."
    images = np.load(file, mmap_mode='r', allow_pickle=False)
    return images, {int(i): why for i, why in read_json(file.with_suffix('.json')).items()}


def _write_cache(file: Path, files: list):
    "Decode files into an array on disk, whole or not at all, and delete what was decoded of an older state of the same folder."
    def make(shape):
        if shutil.disk_usage(file.parent).free < 1.1 * np.prod(shape): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk would end the process later
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
        if len(shape) != 3 or shape[0] != 3: raise ValueError(f'it is a tensor of shape {shape}: give (3, height, width)')
        values = values.detach().cpu().permute(1, 2, 0).numpy()
    elif not (len(shape) == 2 or len(shape) == 3 and shape[2] == 3):
        raise ValueError(f'it is an array of shape {shape}: give (height, width, 3) or (height, width)')
    if 0 in shape: raise ValueError('it is empty')
    return Image.fromarray(np.ascontiguousarray(values)).convert('RGB')


def to_pixels(item,  # path, bytes, Pillow image, array or tensor
              native: tuple,  # (height, width)
              name: str = 'the image') -> np.ndarray:  # uint8 (height, width, 3)
    "Return any picture at the native size. Raise `UserError` that names the item if it is none."
    from PIL import Image, ImageOps
    if isinstance(item, (str, os.PathLike)): name = f'{name} ({str(item)[-200:]})'
    try:
        if isinstance(item, Image.Image): image = to_rgb(item)
        elif isinstance(item, np.ndarray) or hasattr(item, 'detach'): image = from_array(item)
        elif isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)): image = decode(item)
        else: raise ValueError(f'it is a {type(item).__name__}: give a path, bytes, a Pillow image, an array or a tensor')
        if image.size != (size := (native[1], native[0])): image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return np.asarray(image)
    except Exception as e:  # a decoder raises almost anything over a damaged file
        raise UserError(f'Cannot use {name}: {reason(e)}.') from None


def as_png(pixels: np.ndarray) -> bytes:
    "Encode uint8 pixels as a PNG file."
    from PIL import Image
    Image.fromarray(pixels).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()
