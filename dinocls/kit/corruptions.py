"""The nineteen corruptions of CIFAR-10-C at its five strengths, for images of any size, each with its own random numbers.

Hendrycks and Dietterich (2019), https://arxiv.org/abs/1903.12261.
"""
import functools
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .files import UserError, digest, nearest


@dataclass(frozen=True)
class Corruption:
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


def _signed(bits: int) -> int:
    "Return 64 bits as the signed number that torch has for them."
    return (bits + 2**63) % 2**64 - 2**63

GOLDEN = _signed(0x9E3779B97F4A7C15)  # step of the counter


def _scramble(z: Tensor) -> Tensor:  # int64
    "Return the output of SplitMix64 for a counter; products wrap around."
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)) * _signed(factor)
    return z ^ (z >> 31 & 2**33 - 1)


class Draws:
    "Random numbers for images of a set: each image has a stream of its own, which its position in the set and a key decide."
    def __init__(self, key: int,  # any 64 bits
                 index: Tensor,  # positions in the set, int64 (n,), on the images' device
                 dtype=torch.float64):
        self.state, self.used, self.dtype = _scramble((index + 1) * GOLDEN + _signed(key)), 0, dtype

    def uniform(self, *shape, low: float = 0, high: float = 1) -> Tensor:  # (n, *shape), low … high, high itself excluded
        count, digits = math.prod(shape), 53 if self.dtype == torch.float64 else 24
        step = torch.arange(self.used + 1, self.used + count + 1, device=self.state.device)
        self.used += count
        bits = _scramble(self.state[:, None] + step * GOLDEN) >> 64 - digits & 2**digits - 1
        return low + (high - low) * (bits.to(self.dtype) * 2.0**-digits).view(len(bits), *shape)

    def normal(self, *shape, mean: float = 0, sigma: float = 1) -> Tensor:
        return mean + sigma * torch.special.ndtri(self.uniform(*shape) + (2.0**-54 if self.dtype == torch.float64 else 2.0**-25))

    def integers(self, low: int, high: int, *shape) -> Tensor:  # low … high - 1
        return self.uniform(*shape, low=low, high=high).floor().long()


@corruption('noise', .04, .06, .08, .09, .10)
def gaussian_noise(x, sigma, draws):
    "Add normal noise of a deviation, to each value its own."
    return x + draws.normal(*x.shape[1:], sigma=sigma)


@functools.lru_cache(maxsize=8)
def _poisson(rate: float) -> Tensor:  # (256, counts)
    "Return the cumulative Poisson probabilities of each 8-bit value at a rate for white, raised by the value."
    from scipy.stats import poisson
    counts = np.arange(int(rate + 12 * rate ** 0.5 + 20))
    return torch.from_numpy(np.arange(256)[:, None] + poisson.cdf(counts, np.arange(256)[:, None] / 255 * rate))


@corruption('noise', 500, 250, 100, 75, 50)
def shot_noise(x, rate, draws):
    "Replace each value by the share of photons that arrive, where white has `rate` of them on average."
    table, value = _poisson(rate).to(x), (x * 255).round()
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


@functools.lru_cache(maxsize=256)
def _bell(n: int, sigma: float, mode: str = 'nearest', truncate: float = 4) -> Tensor:  # (n, n)
    "Return the matrix that blurs n pixels with a Gaussian; what lies beyond the border is as SciPy's `mode` says."
    from scipy.ndimage import gaussian_filter1d
    return torch.from_numpy(gaussian_filter1d(np.eye(n), sigma, axis=0, mode=mode, truncate=truncate)) if sigma else torch.eye(n, dtype=torch.float64)


def _product(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    "Apply a matrix to the columns of images and one to their rows."
    return rows.to(x) @ x @ cols.to(x).T


def _blur(x: Tensor, sigma: float, **how) -> Tensor:
    "Blur images with a Gaussian."
    return _product(x, *(_bell(n, sigma, **how) for n in x.shape[-2:]))


def _unit(x: Tensor) -> float:
    "Return how many pixels of these images are one pixel of a 32×32 image."
    return min(x.shape[-2:]) / 32


@corruption('blur', .4, .6, .7, .8, 1, extra=True)
def gaussian_blur(x, sigma, draws):
    "Blur each channel with a Gaussian; the border pixels are repeated outwards."
    return _blur(x, sigma * _unit(x))


def _mirrored(i: Tensor, n: int) -> Tensor:
    "Return the place inside 0 … n − 1 of places outside, mirrored at the centres of the border pixels."
    return (n - 1 - (i % max(1, 2 * n - 2) - (n - 1)).abs()) if n > 1 else torch.zeros_like(i)


def _pad(x: Tensor, p: int) -> Tensor:
    "Pad images by p mirrored pixels on each side, however small they are."
    rows, cols = (_mirrored(torch.arange(-p, n + p, device=x.device), n) for n in x.shape[-2:])
    return x[..., rows[:, None], cols]


def _filter(x: Tensor, kernel: Tensor) -> Tensor:  # kernel (k, k), k odd
    "Correlate each channel with a kernel; the border is mirrored."
    flat = _pad(x, len(kernel) // 2).flatten(0, -3).unsqueeze(1)
    return F.conv2d(flat, kernel.to(x)[None, None]).view(x.shape)


@functools.lru_cache(maxsize=32)
def _disc(radius: float, sigma: float) -> Tensor:  # (k, k), sums to 1
    "Return the kernel of a disc of a radius whose steps are softened by 3×3 (above a radius of 8, 5×5) values of a Gaussian."
    reach = 2 if radius > 8 else 1
    at = torch.arange(-int(radius) - reach, int(radius) + reach + 1, dtype=torch.float64)
    disc = (at[:, None] ** 2 + at ** 2 <= radius ** 2).double()
    soft = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2 / (2 * sigma ** 2))
    disc = F.conv2d(disc[None, None], (soft[:, None] * soft)[None, None], padding=reach)[0, 0]
    return disc / disc.sum()


@corruption('blur', (.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))
def defocus_blur(x, strength, draws):
    "Spread each point over a disc of a radius, softened by a Gaussian."
    return _filter(x, _disc(*(v * _unit(x) for v in strength)))


def _shuffled(h: int, w: int, most: int, passes: int, draws) -> Tensor:  # (n, h·w)
    "Return for each image where its pixels come from, after passes in which each copies one that is up to `most` pixels away."
    device = draws.state.device
    rows, cols = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    inner = (rows > most) & (rows <= h - most) & (cols > most) & (cols <= w - most)
    place = (rows * w + cols).flatten().repeat(len(draws.state), 1)
    for _ in range(passes):
        down, right = draws.integers(-most, most, 2, h, w).unbind(1)  # -most … most - 1, as published
        source = torch.where(inner, (rows + down) * w + cols + right, rows * w + cols)
        place = place.gather(1, source.flatten(1))
    return place


@corruption('blur', (.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))
def glass_blur(x, strength, draws):
    "Blur, mix pixels with their neighbours, and blur again."
    sigma, most, passes = strength[0] * _unit(x), max(1, round(strength[1] * _unit(x))), strength[2]
    x = (_blur(x, sigma) * 255 + 1e-9).floor() / 255  # stored as 8 bits in between
    place = _shuffled(*x.shape[-2:], most, passes, draws)
    return _blur(x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).view(x.shape), sigma)


def _motion(x: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:  # angle in degrees, (n,)
    "Blur images along a line that starts at each pixel; the border pixels are repeated outwards; values are rounded to 8 bits."
    (h, w), step = x.shape[-2:], torch.arange(2 * math.ceil(radius) + 1, device=x.device)
    weight = torch.exp(-step.to(x) ** 2 / (2 * sigma ** 2))
    down, right = (torch.ceil(step * f(torch.deg2rad(angle))[:, None] - 0.5).long() for f in (torch.sin, torch.cos))  # (n, steps)
    rows, cols = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    flat, total = x.flatten(2), torch.zeros_like(x)
    for i, share in enumerate((weight / weight.sum()).tolist()):
        place = (rows + down[:, i, None, None]).clamp(0, h - 1) * w + (cols + right[:, i, None, None]).clamp(0, w - 1)
        total += share * flat.gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return (total.clamp(0, 1) * 255 + 0.5).floor() / 255


@corruption('blur', (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
def motion_blur(x, strength, draws):
    "Blur along a line at an angle of up to 45° to the rows."
    return _motion(x, *(v * _unit(x) for v in strength), draws.uniform(low=-45, high=45))


@functools.lru_cache(maxsize=1024)
def _zoom(n: int, factor: float) -> Tensor:  # (n, n)
    "Return the matrix that enlarges the middle of n pixels to n pixels, linearly."
    from scipy.ndimage import zoom
    kept = math.ceil(n / factor)
    large, start = zoom(np.eye(kept), (factor, 1), order=1), (n - kept) // 2
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


def _fit(layer: Tensor, x: Tensor) -> Tensor:  # (n, c, h, w)
    "Resize a layer (n, c, …) to images, linearly."
    return layer if layer.shape[-2:] == x.shape[-2:] else F.interpolate(layer, x.shape[-2:], mode='bilinear')


def _frost(h: int, w: int, draws) -> Tensor:  # (n, 3, h, w), 0 … 1
    "Return a texture like ice on a pane: ridges of noise at four scales, white with a touch of blue."
    total = 0
    for size in (4, 8, 16, 32):
        ridge = F.interpolate(draws.normal(1, size, size).abs(), (h, w), mode='bicubic')
        total = total + (1 - ridge).clamp(0, 1) * size ** -0.5
    low, high = (f((1, 2, 3), keepdim=True) for f in (total.amin, total.amax))
    return (total - low) / (high - low) * torch.tensor([0.86, 0.94, 1.0]).to(total).view(1, 3, 1, 1)


@corruption('weather', (1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))
def frost(x, strength, draws):
    "Lay a procedural frost texture over the image."
    return strength[0] * x + strength[1] * _fit(_frost(*_grid(x), draws), x)


@corruption('weather', (.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))
def snow(x, strength, draws):
    "Whiten the image and let flakes fall, in two directions."
    mean, sigma, factor, threshold, radius, reach, weight = strength
    h, w = _grid(x)
    flakes = _product(draws.normal(1, h, w, mean=mean, sigma=sigma), _zoom(h, factor), _zoom(w, factor))
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor() / 255
    flakes = _fit(_motion(flakes, radius, reach, draws.uniform(low=-135, high=-45)), x)
    light = (x * torch.tensor([0.299, 0.587, 0.114]).to(x).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return weight * x + (1 - weight) * torch.maximum(x, light * 1.5 + 0.5) + flakes + flakes.flip(-1, -2)


def _distance(marked: Tensor) -> Tensor:  # (n, h, w)
    "Return the Euclidean distance of each pixel to the nearest marked one of its image, infinite where there is none."
    h, w = marked.shape[-2:]
    near = torch.where(marked, 0.0, math.inf)
    for n, axis in ((h, 1), (w, 2)):  # along the columns, then along the rows
        apart = torch.arange(n, device=marked.device)
        apart = (apart[:, None] - apart) ** 2
        near = (near.movedim(axis, -1)[..., None, :] + apart).amin(-1).movedim(-1, axis)
    return near.sqrt()


def _equalise(v: Tensor) -> Tensor:  # whole numbers 0 … 255, (n, h, w)
    "Spread each image's values so that they are used about equally often (histogram equalisation)."
    n, size = len(v), v[0].numel()
    counts = torch.zeros(n, 256, device=v.device, dtype=v.dtype).scatter_add_(1, v.flatten(1).long(), torch.ones_like(v).flatten(1)).cumsum(1)
    least = counts.gather(1, v.flatten(1).amin(1, keepdim=True).long())
    table = ((counts - least) / (size - least).clamp(min=1) * 255).round().clamp(0, 255)
    return table.gather(1, v.flatten(1).long()).view(v.shape)


def _shimmer(liquid: Tensor) -> Tensor:  # (n, h, w), 0 … 1 → 0 … 255
    "Return how light plays in drops of water: strongest along their edges, from one side."
    inside = liquid > 0
    inner = -F.max_pool2d(-inside.to(liquid), 3, 1, 1) > 0  # with all neighbours inside
    far = _distance(inside & ~inner).clamp(max=20).to(liquid)
    mean = torch.full((3, 3), 1 / 9)
    v = _equalise(_filter(far[:, None], mean)[:, 0].floor())
    v = _filter(v[:, None], torch.tensor([[-2., -1, 0], [-1, 1, 1], [0, 1, 2]])).clamp(0, 255)
    return _filter(v, mean)[:, 0].round()


@corruption('weather', (.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0), (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1), extra=True)
def spatter(x, strength, draws):
    "Spatter the lens with water, or with mud."
    mean, sigma, smooth, threshold, amount, mud = strength
    liquid = _blur(draws.normal(*_grid(x), mean=mean, sigma=sigma), smooth)
    if mud:
        cover = _blur((liquid > threshold).to(x), amount)
        cover = _fit(torch.where(cover < 0.8, 0, cover)[:, None], x)
        return x * (1 - cover) + cover * torch.tensor([63, 42, 20]).to(x).view(1, 3, 1, 1) / 255
    drops = (torch.where(liquid < threshold, 0, liquid) * 255).floor()
    drops = drops * _shimmer(drops)
    drops = amount * drops / drops.amax((1, 2), keepdim=True).clamp(min=1)
    return x + _fit(drops[:, None], x) * torch.tensor([175, 238, 238]).to(x).view(1, 3, 1, 1) / 255


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
    red = torch.tensor([0, 1, 1]).to(x).view(1, 3, 1, 1)
    return value * (1 - new * torch.where(old > 0, below / torch.where(old > 0, old, 1), red))


@corruption('digital', .75, .5, .4, .3, .15)
def contrast(x, factor, draws):
    "Pull the values towards the mean of their image and channel."
    mean = x.mean((2, 3), keepdim=True)  # (n, 3, 1, 1)
    return (x - mean) * factor + mean


@functools.lru_cache(maxsize=64)
def _box(n: int, to: int) -> Tensor:  # (to, n)
    "Return the matrix by which Pillow's box filter resizes n pixels."
    from PIL import Image
    return torch.from_numpy(np.array(Image.fromarray(np.eye(n, dtype=np.float32)).resize((n, to), Image.Resampling.BOX)).astype(np.float64))


@corruption('digital', .95, .90, .85, .75, .65)
def pixelate(x, share, draws):
    "Resize to a share of the pixels of each side, and back."
    (h, w), v = x.shape[-2:], x * 255
    small = [max(1, int(n * share)) for n in (h, w)]
    for rows, cols in ((_box(h, small[0]), _box(w, small[1])), (_box(small[0], h), _box(small[1], w))):
        v = (v @ cols.to(v).T + 0.5 + 1e-6).floor()  # along the rows first, as Pillow does
        v = (rows.to(v) @ v + 0.5 + 1e-6).floor()
    return v / 255


@corruption('digital', 80, 65, 58, 50, 40)
def jpeg_compression(x, quality, draws):
    "Compress and decompress by JPEG at a quality."
    from PIL import Image
    def through(image):
        Image.fromarray(image).save(file := io.BytesIO(), 'JPEG', quality=quality)
        return np.asarray(Image.open(file))
    flat = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor(4) as pool: done = np.stack([*pool.map(through, flat)])
    return torch.from_numpy(done).permute(0, 3, 1, 2).to(x) / 255


def _sample(x: Tensor, rows: Tensor, cols: Tensor,  # places (n, h, w)
            inside) -> Tensor:  # function of (places, size) for what lies beyond the border
    "Read images between the pixels, linearly."
    h, w = x.shape[-2:]
    top, left = rows.floor(), cols.floor()
    total = torch.zeros_like(x)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (cols - left - right).abs())
            place = inside(top.long() + down, h) * w + inside(left.long() + right, w)
            total += weight[:, None] * x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return total


def _repeated(i: Tensor, n: int) -> Tensor:
    "Return the place inside 0 … n − 1 of places outside, mirrored at the border itself: its pixels come twice."
    return torch.minimum(i % (2 * n), 2 * n - 1 - i % (2 * n))


def _affine(h: int, w: int, most: float, draws) -> Tensor:  # (n, 3, 2)
    "Return the map from places (column, row, 1) back to where they come from, if three points each move by up to `most` pixels."
    side = min(h, w) // 3
    points = torch.tensor([[w // 2, h // 2]]) + torch.tensor([[side, side], [side, -side], [-side, -side]])
    points = points.to(draws.state.device, draws.dtype)
    if not side: return torch.eye(3, 2).to(points).expand(len(draws.state), -1, -1)  # too small to move
    moved = points + draws.uniform(3, 2, low=-most, high=most)
    return torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[..., :1])], 2), points.expand_as(moved))


@corruption('digital', (0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03))
def elastic_transform(x, strength, draws):
    "Warp images by a random affine map, then by a smooth random field."
    (h, w), (alpha, sigma, most) = x.shape[-2:], (v * min(x.shape[-2:]) for v in strength)
    rows, cols = torch.arange(h).to(x)[:, None].expand(h, w), torch.arange(w).to(x).expand(h, w)
    back = torch.stack([cols, rows, torch.ones_like(cols)], 2) @ _affine(h, w, most, draws)[:, None]  # (n, h, w, 2)
    x = _sample(x, back[..., 1], back[..., 0], _mirrored)
    if not alpha: return x
    right, down = alpha * _blur(draws.uniform(2, h, w, low=-1, high=1), sigma, mode='reflect', truncate=3).transpose(0, 1)
    return _sample(x, rows + down, cols + right, _repeated)


def _check(images, name, severity, seed, first):
    "Raise `UserError` for what `corrupt` cannot work on."
    if name not in CORRUPTIONS: raise UserError(f'Unknown corruption {name!r}: {nearest(name, CORRUPTIONS)}')
    def whole(v, low): return isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= low
    if not whole(severity, 1) or severity > 5: raise UserError(f'severity={severity!r} of {name}: it must be a whole number from 1 to 5.')
    for what, value in (('seed', seed), ('first', first)):
        if not whole(value, 0): raise UserError(f'{what}={value!r} of {name}: it must be a whole number, 0 or more.')
    tensor = isinstance(images, Tensor)
    if not isinstance(images, (np.ndarray, Tensor)) or images.dtype != (torch.uint8 if tensor else np.uint8) or images.ndim != 4 \
            or images.shape[1 if tensor else 3] != 3 or 0 in images.shape[1:]:
        given = f'{images.dtype} {tuple(images.shape)}' if hasattr(images, 'dtype') and hasattr(images, 'shape') else type(images).__name__
        raise UserError(f'corrupt needs uint8 images, a NumPy array (n, height, width, 3) or a tensor (n, 3, height, width), not {given}.')


def corrupt(images,  # uint8, array (n, h, w, 3) or tensor (n, 3, h, w)
            name: str,  # a name in `CORRUPTIONS`
            severity: int,  # 1 to 5
            seed: int = 0,
            first: int = 0):  # position of the first image in its set → uint8, as the images were
    "Corrupt images at the strength of CIFAR-10-C. Raise `UserError` for an unknown name, a wrong severity or other images."
    _check(images, name, severity, seed, first)
    if isinstance(images, np.ndarray):
        x = corrupt(torch.tensor(images).permute(0, 3, 1, 2), name, severity, seed, first)
        return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    how, key, done = CORRUPTIONS[name], int(digest([name, int(severity), int(seed)])[:16], 16), torch.empty_like(images)
    dtype = torch.float32 if images.device.type == 'mps' else torch.float64  # as NumPy computed the published files
    size = max(1, 2**22 // images[0].numel()) if len(images) else 1
    for i in range(0, len(images), size):
        x = images[i:i + size].to(dtype) / 255
        draws = Draws(key, torch.arange(first + i, first + i + len(x), device=x.device), dtype)
        x = how.apply(x, how.strengths[severity - 1], draws).clamp(0, 1) * 255
        done[i:i + size] = (x + (1e-6 if dtype == torch.float64 else 1e-4)).to(torch.uint8)  # whole numbers stay so
    return done
