"""The nineteen corruptions of CIFAR-10-C (Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261).

Strengths are those for 32×32 pixels. At another size, lengths in pixels (of blurs, shifts, swaps) grow with the shorter
side, and what is laid over the image (snow, frost, spatter) is drawn for a shorter side of 32 and enlarged: a larger
image is as bad to look at as a small one.
"""
import functools
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, special
from torch import Tensor

from .files import UserError, digest, nearest


class Corruption(NamedTuple):
    "A way in which images get worse."
    apply: Callable  # (x (n, 3, h, w) in 0 … 1, strength, draws) → images of that shape, any range
    strengths: tuple  # of severity 1 to 5
    kind: str  # noise, blur, weather or digital
    extra: bool = False  # not part of the benchmark's mean


CORRUPTIONS = {}  # name → corruption, in the order of definition


def corruption(kind: str, *strengths, extra: bool = False):
    "Enter the decorated function into `CORRUPTIONS` under its name."
    def enter(fn):
        CORRUPTIONS[fn.__name__] = Corruption(fn, strengths, kind, extra)
        return fn
    return enter


GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # step of the counter; torch's 64 bits are signed


def _scramble(z: Tensor) -> Tensor:  # int64
    "Return the output of SplitMix64 for a counter; products wrap around."
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)) * factor
    return z ^ (z >> 31 & 2**33 - 1)


class Draws:
    "Random numbers for images of a set: a key and the position in the set decide each image's stream (SplitMix64)."
    def __init__(self, key: int,  # any 64 bits
                 index: Tensor,  # positions in the set, int64 (n,), on the images' device
                 dtype=torch.float64):
        self.state, self.used, self.dtype = _scramble((index + 1) * GOLDEN + (key + 2**63) % 2**64 - 2**63), 0, dtype

    def uniform(self, *shape, low: float = 0, high: float = 1) -> Tensor:  # (n, *shape), high itself excluded
        count, digits = math.prod(shape), 53 if self.dtype == torch.float64 else 24
        step = torch.arange(self.used + 1, self.used + count + 1, device=self.state.device)
        self.used += count
        bits = _scramble(self.state[:, None] + step * GOLDEN) >> 64 - digits & 2**digits - 1
        return low + (high - low) * (bits.to(self.dtype) * 2.0**-digits).view(len(bits), *shape)

    def normal(self, *shape, mean: float = 0, sigma: float = 1) -> Tensor:
        half = 2.0 ** (-54 if self.dtype == torch.float64 else -25)
        return mean + sigma * torch.special.ndtri(self.uniform(*shape) + half)


@corruption('noise', .04, .06, .08, .09, .10)
def gaussian_noise(x, sigma, draws):
    "Add normal noise of a deviation, to each value its own."
    return x + draws.normal(*x.shape[1:], sigma=sigma)


@corruption('noise', 500, 250, 100, 75, 50)
def shot_noise(x, rate, draws):
    "Replace each value by the share of photons that arrive, where white has `rate` of them on average."
    values, counts = np.arange(256)[:, None], np.arange(int(rate + 12 * rate ** 0.5 + 20))
    # the cumulative Poisson probabilities of each 8-bit value, raised by it: one sorted table, one search for all
    table = torch.from_numpy(values + special.pdtr(counts, values / 255 * rate)).to(x)
    value = (x * 255).round()
    found = torch.searchsorted(table.flatten(), (value + draws.uniform(*x.shape[1:])).contiguous())
    return (found - value.long() * table.shape[1]).to(x) / rate


@corruption('noise', .01, .02, .03, .05, .07)
def impulse_noise(x, amount, draws):
    "Set a share of the values to 0 or 1, half of them each."
    u = draws.uniform(*x.shape[1:])
    return torch.where(u < amount, (u < amount / 2).to(x), x)


@corruption('noise', .06, .10, .12, .16, .20, extra=True)
def speckle_noise(x, sigma, draws):
    "Add normal noise in proportion to the value."
    return x + x * draws.normal(*x.shape[1:], sigma=sigma)


def _product(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    "Apply a matrix to the columns of images and one to their rows."
    return rows.to(x) @ x @ cols.to(x).T


def _blur(x: Tensor, sigma: float, mode: str = 'nearest', truncate: float = 4) -> Tensor:
    "Blur images with a Gaussian; what lies beyond the border is as SciPy's `mode` says."
    if not sigma: return x
    bells = (ndimage.gaussian_filter1d(np.eye(n), sigma, 0, mode=mode, truncate=truncate) for n in x.shape[-2:])
    return _product(x, *map(torch.from_numpy, bells))


def _unit(x: Tensor) -> float:
    "Return how many pixels of these images are one pixel of a 32×32 image."
    return min(x.shape[-2:]) / 32


@corruption('blur', .4, .6, .7, .8, 1, extra=True)
def gaussian_blur(x, sigma, draws):
    "Blur each channel with a Gaussian; the border pixels are repeated outwards."
    return _blur(x, sigma * _unit(x))


def _filter(x: Tensor, kernel: Tensor) -> Tensor:  # kernel (k, k), k odd
    "Correlate each channel with a kernel; the border is mirrored, however small the image."
    rows, cols = (torch.from_numpy(np.pad(np.arange(n), len(kernel) // 2, 'reflect')) for n in x.shape[-2:])
    flat = x[..., rows[:, None], cols].flatten(0, -3).unsqueeze(1)
    return F.conv2d(flat, kernel.to(x)[None, None]).view(x.shape)


def _pick(x: Tensor, place: Tensor) -> Tensor:  # place (n, h, w) or (n, h·w), counted row by row
    "Return images whose pixels are those at a place of their own each."
    return x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)


@corruption('blur', (.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))
def defocus_blur(x, strength, draws):
    "Spread each point over a disc, whose steps 3×3 (above a radius of 8, 5×5) values of a Gaussian soften."
    radius, sigma = (v * _unit(x) for v in strength)
    reach = 2 if radius > 8 else 1
    at = torch.arange(-int(radius) - reach, int(radius) + reach + 1, dtype=torch.float64)
    disc = (at[:, None] ** 2 + at ** 2 <= radius ** 2).double()
    soft = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2 / (2 * sigma ** 2))
    disc = F.conv2d(disc[None, None], (soft[:, None] * soft)[None, None], padding=reach)[0, 0]
    return _filter(x, disc / disc.sum())


@corruption('blur', (.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))
def glass_blur(x, strength, draws):
    """Blur, let each pixel copy one that is up to a shift away, in passes, and blur again.

    The published script means to swap, but does so on views of one array, which copies; a gather is a whole pass of it.
    """
    (h, w), device = x.shape[-2:], x.device
    sigma, most, passes = strength[0] * _unit(x), max(1, round(strength[1] * _unit(x))), strength[2]
    rows, cols = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    inner = (rows > most) & (rows <= h - most) & (cols > most) & (cols <= w - most)
    x = (_blur(x, sigma) * 255 + 1e-9).floor() / 255  # stored as 8 bits in between
    place = (rows * w + cols).flatten().repeat(len(x), 1)
    for _ in range(passes):
        down, right = draws.uniform(2, h, w, low=-most, high=most).floor().long().unbind(1)  # -most … most - 1
        place = place.gather(1, torch.where(inner, (rows + down) * w + cols + right, rows * w + cols).flatten(1))
    return _blur(_pick(x, place), sigma)


def _motion(x: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:  # angle in degrees, (n,)
    "Blur along a line that starts at each pixel, its border pixels repeated outwards, and round to 8 bits."
    (h, w), step = x.shape[-2:], torch.arange(2 * math.ceil(radius) + 1, device=x.device)
    weight = torch.exp(-step.to(x) ** 2 / (2 * sigma ** 2))
    turn = torch.deg2rad(angle)[:, None]
    down, right = (torch.ceil(step * part - 0.5).long()[..., None, None] for part in (turn.sin(), turn.cos()))
    rows, cols = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    total = torch.zeros_like(x)
    for i, share in enumerate((weight / weight.sum()).tolist()):
        total += share * _pick(x, (rows + down[:, i]).clamp(0, h - 1) * w + (cols + right[:, i]).clamp(0, w - 1))
    return (total.clamp(0, 1) * 255 + 0.5).floor() / 255


@corruption('blur', (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
def motion_blur(x, strength, draws):
    "Blur along a line at an angle of up to 45° to the rows."
    return _motion(x, *(v * _unit(x) for v in strength), draws.uniform(low=-45, high=45))


@functools.lru_cache(maxsize=1024)
def _zoom(n: int, factor: float) -> Tensor:  # (n, n)
    "Return the matrix that enlarges the middle of n pixels to n pixels, linearly."
    kept = math.ceil(n / factor)
    large, start = ndimage.zoom(np.eye(kept), (factor, 1), order=1), (n - kept) // 2
    matrix, cut = np.zeros((n, n)), (len(large) - n) // 2
    matrix[:, start:start + kept] = large[cut:cut + n]
    return torch.from_numpy(matrix)


@corruption('blur', 1.06, 1.11, 1.16, 1.21, 1.26)
def zoom_blur(x, limit, draws):
    "Average the image with zooms into its centre up to a limit."
    factors = np.arange(1, limit, 0.01).tolist()
    return (x + sum(_product(x, *(_zoom(n, f) for n in x.shape[-2:])) for f in factors)) / (len(factors) + 1)


def _plasma(n: int, decay: float, draws) -> Tensor:  # (images, n, n), 0 … 1
    "Return diamond-square fractals, n a power of two, wrapped around at the borders."
    z = torch.zeros(len(draws.state), n, n, dtype=draws.dtype, device=draws.state.device)
    step, wibble = n, 100.0
    def wibbled(total): return total / 4 + wibble * draws.uniform(*total.shape[1:], low=-wibble, high=wibble)
    while step >= 2:
        half, corners = step // 2, z[:, ::step, ::step]
        total = corners + corners.roll(-1, 1)
        z[:, half::step, half::step] = centres = wibbled(total + total.roll(-1, 2))
        z[:, ::step, half::step] = wibbled(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        z[:, half::step, ::step] = wibbled(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    z = z - z.amin((1, 2), keepdim=True)
    return z / z.amax((1, 2), keepdim=True)


@corruption('weather', (.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))
def fog(x, strength, draws):
    "Add a plasma fractal and scale so that the brightest value stays where it was."
    (h, w), (amount, decay) = x.shape[-2:], strength
    side, most = max(2, 2 ** math.ceil(math.log2(max(h, w)))), x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _plasma(side, decay, draws)[:, None, :h, :w]) * most / (most + amount)


def _grid(x: Tensor) -> tuple:
    "Return the size of a layer for images: the shorter side is 32."
    return tuple(max(1, round(n / _unit(x))) for n in x.shape[-2:])


def _colour(x: Tensor, *values: float) -> Tensor:  # (1, 3, 1, 1)
    "Return a value for red, green and blue, for images."
    return torch.tensor(values).to(x).view(1, 3, 1, 1)


def _fit(layer: Tensor, x: Tensor) -> Tensor:  # (n, c, h, w)
    "Resize a layer (n, c, …) to images, linearly."
    return layer if layer.shape[-2:] == x.shape[-2:] else F.interpolate(layer, x.shape[-2:], mode='bilinear')


@corruption('weather', (1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))
def frost(x, strength, draws):
    "Lay a texture like ice on a pane over the image: ridges of noise at four scales (the benchmark has photographs)."
    ridges = ((n, F.interpolate(draws.normal(1, n, n).abs(), _grid(x), mode='bicubic')) for n in (4, 8, 16, 32))
    total = sum((1 - ridge).clamp(0, 1) * n ** -0.5 for n, ridge in ridges)
    low, high = (f((1, 2, 3), keepdim=True) for f in (total.amin, total.amax))
    ice = (total - low) / (high - low) * _colour(x, 0.86, 0.94, 1)  # white with a touch of blue
    return strength[0] * x + strength[1] * _fit(ice, x)


@corruption('weather', (.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
            (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))
def snow(x, strength, draws):
    "Whiten the image and let flakes fall, in two directions."
    mean, sigma, factor, threshold, radius, reach, weight = strength
    grains = draws.normal(1, *_grid(x), mean=mean, sigma=sigma)
    flakes = _product(grains, *(_zoom(n, factor) for n in _grid(x)))
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor() / 255
    flakes = _fit(_motion(flakes, radius, reach, draws.uniform(low=-135, high=-45)), x)
    light = (x * _colour(x, 0.299, 0.587, 0.114)).sum(1, keepdim=True)
    return weight * x + (1 - weight) * torch.maximum(x, light * 1.5 + 0.5) + flakes + flakes.flip(-1, -2)


def _shimmer(liquid: Tensor) -> Tensor:  # (n, h, w), 0 … 1 → 0 … 255
    "Return how light plays in drops of water: strongest along their edges, from one side."
    inside = liquid > 0
    inner = -F.max_pool2d(-inside.to(liquid), 3, 1, 1) > 0  # with all neighbours inside
    far = [ndimage.distance_transform_edt(middle) for middle in (inner | ~inside).cpu().numpy()]  # from the edge
    far, mean = torch.from_numpy(np.float32(far)).clamp(max=20).to(liquid), torch.full((3, 3), 1 / 9)
    v = _filter(far[:, None], mean).floor().flatten(1)
    counts = torch.zeros(len(v), 256).to(v).scatter_add_(1, v.long(), torch.ones_like(v)).cumsum(1)
    least = counts.gather(1, v.long().amin(1, keepdim=True))
    table = ((counts - least) / (v.shape[1] - least).clamp(min=1) * 255).round().clamp(0, 255)  # equalises
    v = table.gather(1, v.long()).view(liquid[:, None].shape)
    v = _filter(v, torch.tensor([[-2., -1, 0], [-1, 1, 1], [0, 1, 2]])).clamp(0, 255)
    return _filter(v, mean)[:, 0].round()


@corruption('weather', (.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
            (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1), extra=True)
def spatter(x, strength, draws):
    "Spatter the lens with water, or with mud."
    mean, sigma, smooth, threshold, amount, mud = strength
    liquid = _blur(draws.normal(*_grid(x), mean=mean, sigma=sigma), smooth)
    if mud:
        cover = _blur((liquid > threshold).to(x), amount)
        cover = _fit(torch.where(cover < 0.8, 0, cover)[:, None], x)
        return x * (1 - cover) + cover * _colour(x, 63, 42, 20) / 255
    drops = (torch.where(liquid < threshold, 0, liquid) * 255).floor()
    drops = drops * _shimmer(drops)
    drops = amount * drops / drops.amax((1, 2), keepdim=True).clamp(min=1)
    return x + _fit(drops[:, None], x) * _colour(x, 175, 238, 238) / 255


@corruption('weather', .05, .10, .15, .20, .30)
def brightness(x, amount, draws):
    "Add to the value of HSV."
    value = x.amax(1, keepdim=True)  # (n, 1, h, w)
    new = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * (new / torch.where(value > 0, value, 1)), new)


@corruption('digital', (.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2), extra=True)
def saturate(x, strength, draws):
    "Multiply the saturation of HSV and add to it."
    value = x.amax(1, keepdim=True)
    below = 1 - x / torch.where(value > 0, value, 1)  # each channel's distance from the value, over the value
    old = torch.where(value > 0, below.amax(1, keepdim=True), 0)  # the saturation
    new = (old * strength[0] + strength[1]).clamp(0, 1)
    hue = torch.where(old > 0, below / torch.where(old > 0, old, 1), _colour(x, 0, 1, 1))  # grey counts as red
    return value * (1 - new * hue)


@corruption('digital', .75, .5, .4, .3, .15)
def contrast(x, factor, draws):
    "Pull the values towards the mean of their image and channel."
    mean = x.mean((2, 3), keepdim=True)  # (n, 3, 1, 1)
    return (x - mean) * factor + mean


@corruption('digital', .95, .90, .85, .75, .65)
def pixelate(x, share, draws):
    "Resize to a share of the pixels of each side, and back, by Pillow's box filter."
    def box(n: int, to: int) -> Tensor:  # (to, n): what Pillow makes of the unit matrix
        matrix = Image.fromarray(np.eye(n, dtype=np.float32)).resize((n, to), Image.Resampling.BOX)
        return torch.from_numpy(np.array(matrix)).to(x)
    (h, w), v = x.shape[-2:], x * 255
    small = [max(1, int(n * share)) for n in (h, w)]
    for rows, cols in ((box(h, small[0]), box(w, small[1])), (box(small[0], h), box(small[1], w))):
        v = (v @ cols.T + 0.5 + 1e-6).floor()  # along the rows first, as Pillow does
        v = (rows @ v + 0.5 + 1e-6).floor()
    return v / 255


@corruption('digital', 80, 65, 58, 50, 40)
def jpeg_compression(x, quality, draws):
    "Compress and decompress by JPEG at a quality."
    def through(image):
        Image.fromarray(image).save(file := io.BytesIO(), 'JPEG', quality=quality)
        return np.asarray(Image.open(file))
    flat = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor(4) as pool: done = np.stack([*pool.map(through, flat)])
    return torch.from_numpy(done).permute(0, 3, 1, 2).to(x) / 255


def _sample(x: Tensor, at: Tensor,  # column and row (n, h, w, 2)
            centres: bool) -> Tensor:  # mirror at the centres of the border pixels; else at their outer edges
    "Read images between the pixels, linearly."
    size = torch.tensor(x.shape[:1:-1]).to(x)
    at = 2 * at / (size - 1) - 1 if centres else (2 * at + 1) / size - 1  # -1 … 1
    return F.grid_sample(x, at, padding_mode='reflection', align_corners=centres)


@corruption('digital', (0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03))
def elastic_transform(x, strength, draws):
    "Warp images by a random affine map, of which three points move, then by a smooth random field."
    (h, w), (alpha, sigma, most) = x.shape[-2:], (v * min(x.shape[-2:]) for v in strength)
    rows, cols = torch.arange(h).to(x)[:, None].expand(h, w), torch.arange(w).to(x).expand(h, w)
    if side := min(h, w) // 3:  # else it is too small to move
        points = (torch.tensor([w // 2, h // 2]) + side * torch.tensor([[1, 1], [1, -1], [-1, -1]])).to(x)
        moved = points + draws.uniform(3, 2, low=-most, high=most)
        back = torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[..., :1])], 2), points.expand_as(moved))
        where = torch.stack([cols, rows, torch.ones_like(cols)], 2) @ back[:, None]  # (n, h, w, 2)
        x = _sample(x, where, centres=True)
    if not alpha: return x
    shift = alpha * _blur(draws.uniform(2, h, w, low=-1, high=1), sigma, mode='reflect', truncate=3)
    return _sample(x, torch.stack([cols, rows], 2) + shift.movedim(1, 3), centres=False)


BENCHMARK = [name for name, how in CORRUPTIONS.items() if not how.extra]  # in the benchmark's mean


def _check(images, name, severity, seed, first):
    "Raise `UserError` for what `corrupt` cannot work on."
    if name not in CORRUPTIONS: raise UserError(f'Unknown corruption {name!r}: {nearest(name, CORRUPTIONS)}')
    for what, value, least in (('severity', severity, 1), ('seed', seed, 0), ('first', first, 0)):
        most, allowed = (5, 'from 1 to 5') if what == 'severity' else (math.inf, '0 or more')
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f'{what}={value!r} of {name}: it must be a whole number, {allowed}.')
    kind, channels = (torch.uint8, 1) if isinstance(images, Tensor) else (np.uint8, 3)
    fits = isinstance(images, (np.ndarray, Tensor)) and images.dtype == kind and images.ndim == 4
    if not (fits and images.shape[channels] == 3 and 0 not in images.shape[1:]):
        given = f'{images.dtype} {tuple(images.shape)}' if hasattr(images, 'dtype') else type(images).__name__
        raise UserError('corrupt needs uint8 images, a NumPy array (n, height, width, 3) '
                        f'or a tensor (n, 3, height, width), not {given}.')


def corrupt(images,  # uint8, array (n, h, w, 3) or tensor (n, 3, h, w)
            name: str,  # a name in `CORRUPTIONS`
            severity: int,  # 1 to 5
            seed: int = 0, first: int = 0):  # position of the first image in its set → uint8, as the images were
    "Corrupt images as CIFAR-10-C does. Raise `UserError` for an unknown name, a wrong severity or other images."
    _check(images, name, severity, seed, first)
    if isinstance(images, np.ndarray):
        x = corrupt(torch.tensor(images).permute(0, 3, 1, 2), name, severity, seed, first)
        return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    how, done, key = CORRUPTIONS[name], torch.empty_like(images), int(digest([name, int(severity), int(seed)])[:16], 16)
    dtype = torch.float32 if images.device.type == 'mps' else torch.float64  # as NumPy computed the published files
    size = max(1, 2**22 // images[0].numel()) if len(images) else 1
    for i in range(0, len(images), size):
        x = images[i:i + size].to(dtype) / 255
        draws = Draws(key, torch.arange(first + i, first + i + len(x), device=x.device), dtype)
        x = how.apply(x, how.strengths[severity - 1], draws).clamp(0, 1) * 255
        done[i:i + size] = (x + (1e-6 if dtype == torch.float64 else 1e-4)).to(torch.uint8)  # whole numbers stay so
    return done
