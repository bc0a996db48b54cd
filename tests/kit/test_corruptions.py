"The nineteen corruptions beside independent definitions of them, and what a seed fixes."
import colorsys
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dinocls.kit.corruptions import BENCHMARK, CORRUPTIONS, GOLDEN, Corruption, Draws, corrupt, corruption
from dinocls.kit.files import UserError

STRENGTHS = {  # as in the benchmark's published definition, typed a second time
    'gaussian_noise': (.04, .06, .08, .09, .10), 'shot_noise': (500, 250, 100, 75, 50),
    'impulse_noise': (.01, .02, .03, .05, .07), 'speckle_noise': (.06, .10, .12, .16, .20),
    'gaussian_blur': (.4, .6, .7, .8, 1), 'defocus_blur': ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
    'glass_blur': ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
    'motion_blur': ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), 'zoom_blur': (1.06, 1.11, 1.16, 1.21, 1.26),
    'fog': ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
    'frost': ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
    'snow': ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
             (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
    'spatter': ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)),
    'brightness': (.05, .10, .15, .20, .30), 'contrast': (.75, .5, .4, .3, .15),
    'saturate': ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),
    'elastic_transform': ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),
    'pixelate': (.95, .90, .85, .75, .65), 'jpeg_compression': (80, 65, 58, 50, 40)}
FIXED = {'brightness', 'contrast', 'defocus_blur', 'gaussian_blur', 'jpeg_compression', 'pixelate', 'saturate',
         'zoom_blur'}  # nothing is drawn


def pictures(n=6, h=32, w=32) -> np.ndarray:
    "Return smooth colours and noise, uint8 (n, h, w, 3)."
    rng = np.random.default_rng(3)
    smooth = np.stack([ndimage.zoom(rng.random((4, 4, 3)), (h / 4, w / 4, 1), order=1) for _ in range(n)])
    return ((0.8 * smooth + 0.2 * rng.random(smooth.shape)) * 255).astype(np.uint8)


def grey(n, value=128): return np.full((n, 32, 32, 3), value, np.uint8)


def test_the_list_is_the_published_one():
    assert {name: c.strengths for name, c in CORRUPTIONS.items()} == STRENGTHS
    assert {name for name, c in CORRUPTIONS.items() if c.extra} == {'speckle_noise', 'gaussian_blur', 'spatter',
                                                                    'saturate'}
    assert len(BENCHMARK) == 15 and {c.kind for c in CORRUPTIONS.values()} == {'noise', 'blur', 'weather', 'digital'}


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_a_result_depends_on_seed_position_and_severity_alone(name):
    x = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous()
    whole = corrupt(x, name, 3, seed=5)
    assert whole.dtype == torch.uint8 and whole.shape == x.shape
    assert torch.equal(whole, torch.cat([corrupt(x[i:i + 1], name, 3, seed=5, first=i) for i in range(len(x))]))
    assert np.array_equal(corrupt(x.permute(0, 2, 3, 1).numpy(), name, 3, seed=5), whole.permute(0, 2, 3, 1).numpy())
    same = x[:1].repeat(3, 1, 1, 1)
    three, again = corrupt(same, name, 3, seed=5), corrupt(same, name, 3, seed=6)
    assert torch.equal(three[0], whole[0])
    for a, b in ((three[0], three[1]), (three[1], three[2]), (three[0], again[0])):
        assert torch.equal(a, b) == (name in FIXED)
    assert not torch.equal(corrupt(x, name, 4, seed=5), whole)
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pictures())  # the input is left alone


def test_draws_differ_between_severities_and_corruptions():
    noise = [(corrupt(grey(1), name, s).astype(float) - 128).ravel()
             for name, s in (('gaussian_noise', 4), ('gaussian_noise', 5), ('speckle_noise', 5))]
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.08


def test_a_large_set_is_worked_through_in_parts():
    x = grey(1400)
    assert np.array_equal(corrupt(x, 'gaussian_noise', 1)[1360:], corrupt(x[1360:], 'gaussian_noise', 1, first=1360))


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_odd_sizes_and_flat_images_are_corrupted_too(name):
    for shape in ((1, 1, 1, 3), (1, 2, 5, 3), (2, 40, 24, 3), (1, 64, 64, 3)):
        for value in (0, 255): assert corrupt(np.full(shape, value, np.uint8), name, 5).shape == shape
    assert corrupt(np.empty((0, 32, 32, 3), np.uint8), name, 1).shape == (0, 32, 32, 3)
    flat = np.array([10, 20, 30], np.uint8)[None, None, None].repeat(4, 1)  # one image of 4×1 pixels
    assert corrupt(flat, name, 5).shape == flat.shape


@pytest.mark.parametrize('severity', range(1, 6))
def test_noise_has_the_published_strength(severity):
    at = severity - 1
    def spread(name, value): return corrupt(grey(20, value), name, severity).astype(float).std() / 255
    assert spread('gaussian_noise', 128) == pytest.approx(STRENGTHS['gaussian_noise'][at], rel=0.02)
    assert spread('speckle_noise', 102) == pytest.approx(0.4 * STRENGTHS['speckle_noise'][at], rel=0.02)
    # 8 bits add a little
    assert spread('shot_noise', 102) == pytest.approx((0.4 / STRENGTHS['shot_noise'][at]) ** 0.5, rel=0.03)
    salted = corrupt(grey(20), 'impulse_noise', severity)
    for value in (0, 255):
        assert (salted == value).mean() == pytest.approx(STRENGTHS['impulse_noise'][at] / 2, rel=0.15)
    assert ((salted == 0) | (salted == 255) | (salted == 128)).all()


@pytest.mark.parametrize('severity', range(1, 6))
def test_colours_change_as_in_hsv(severity):
    x = pictures(1, 8, 8)
    for name, hsv in (('brightness', lambda h, s, v: (h, s, min(1, v + STRENGTHS['brightness'][severity - 1]))),
                      ('saturate', lambda h, s, v: (h,
                                                    min(1,
                                                        s
                                                        * STRENGTHS['saturate'][severity
                                                            - 1][0] + STRENGTHS['saturate'][severity - 1][1]), v))):
        wanted = np.array([colorsys.hsv_to_rgb(*hsv(*colorsys.rgb_to_hsv(*p)))
                           for p in x.reshape(-1, 3) / 255]).reshape(x.shape)
        assert np.abs(corrupt(x, name, severity) - np.floor(wanted * 255 + 1e-6)).max() <= 1
        assert (corrupt(x, name, severity) == np.floor(wanted * 255 + 1e-6)).mean() > 0.99
    mean = (x / 255).mean((1, 2), keepdims=True)
    assert np.array_equal(corrupt(x, 'contrast', severity),
                          (np.clip((x / 255 - mean) * STRENGTHS['contrast'][severity - 1] + mean, 0, 1) * 255
                           + 1e-6).astype(np.uint8))


@pytest.mark.parametrize('severity', range(1, 6))
@pytest.mark.parametrize('size', [(32, 32), (24, 48)])
def test_pixelate_and_jpeg_are_pillows(severity, size):
    for x in pictures(3, *size):
        picture, share = Image.fromarray(x), STRENGTHS['pixelate'][severity - 1]
        small = picture.resize([int(n * share) for n in picture.size], Image.Resampling.BOX).resize(picture.size,
            Image.Resampling.BOX)
        assert np.array_equal(corrupt(x[None], 'pixelate', severity)[0], np.asarray(small))
        picture.save(file := io.BytesIO(), 'JPEG', quality=STRENGTHS['jpeg_compression'][severity - 1])
        assert np.array_equal(corrupt(x[None], 'jpeg_compression', severity)[0], np.asarray(Image.open(file)))


@pytest.mark.parametrize('severity', range(1, 6))
def test_blurs_beside_scipy(severity):
    x, at = pictures(2), severity - 1
    wanted = ndimage.gaussian_filter(x / 255, (0, *[STRENGTHS['gaussian_blur'][at]] * 2, 0), mode='nearest', truncate=4)
    assert np.abs(corrupt(x, 'gaussian_blur', severity) - (wanted * 255).astype(np.uint8).astype(int)).max() <= 1
    radius, sigma = STRENGTHS['defocus_blur'][at]
    i = np.arange(-8, 9)
    disc = (i[:, None] ** 2 + i ** 2 <= radius ** 2).astype(float)
    soft = np.exp(-np.arange(-1, 2) ** 2 / (2 * sigma ** 2))
    kernel = ndimage.convolve(disc / disc.sum(), np.outer(soft, soft) / soft.sum() ** 2, mode='constant')
    wanted = np.stack([ndimage.correlate(x[0, :, :, c] / 255, kernel, mode='mirror') for c in range(3)], -1)
    assert np.abs(corrupt(x[:1], 'defocus_blur', severity)[0] - (wanted * 255).astype(np.uint8).astype(int)).max() <= 1
    total, factors = x[0] / 255, np.arange(1, STRENGTHS['zoom_blur'][at], 0.01)
    for f in factors:
        n = int(np.ceil(32 / f))
        top = (32 - n) // 2
        large = ndimage.zoom(x[0, top:top + n, top:top + n] / 255, (f, f, 1), order=1)
        cut = (len(large) - 32) // 2
        total = total + large[cut:cut + 32, cut:cut + 32]
    assert np.abs(corrupt(x[:1], 'zoom_blur',
                          severity)[0] - (total / (len(factors) + 1) * 255).astype(np.uint8).astype(int)).max() <= 1


@pytest.mark.parametrize('name', ['gaussian_blur', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur',
                                  'elastic_transform', 'pixelate'])
def test_what_moves_or_averages_pixels_leaves_a_flat_image(name):
    # cut off, not rounded
    for severity in range(1, 6): assert np.abs(corrupt(grey(2, 200), name, severity).astype(int) - 200).max() <= 1


def test_blur_grows_with_the_image():
    large = pictures(1, 64, 64)
    wanted = ndimage.gaussian_filter(large / 255, (0, 2, 2, 0), mode='nearest', truncate=4)
    assert np.abs(corrupt(large, 'gaussian_blur', 5) - (wanted * 255).astype(np.uint8).astype(int)).max() <= 1


def test_fog_snow_frost_and_spatter_do_to_black_and_white_what_they_should():
    for severity in range(1, 6):
        amount = STRENGTHS['fog'][severity - 1][0]
        # where the fog is thinnest
        assert corrupt(grey(4, 255), 'fog', severity).min() == pytest.approx(255 / (1 + amount), abs=1)
        assert corrupt(grey(4, 0), 'fog', severity).max() == 0  # as published: nothing to scale by
        assert corrupt(grey(4, 0), 'snow', severity).min() >= 255 * (1 - STRENGTHS['snow'][severity - 1][-1]) / 2 - 1
        assert corrupt(grey(4, 0), 'frost', severity).max() <= 255 * STRENGTHS['frost'][severity - 1][1]
    assert (corrupt(grey(4, 100), 'spatter', 2) >= 100).all() and (corrupt(grey(4, 100), 'spatter', 5) <= 100).all()


@pytest.mark.parametrize('say, bad', [
    ("did you mean 'gaussian_blur'", lambda x: corrupt(x, 'gausian_blur', 1)),
    *(('from 1 to 5', lambda x, s=s: corrupt(x, 'fog', s)) for s in (0, 6, 2.5, '3', None, True)),
    ('0 or more', lambda x: corrupt(x, 'fog', 1, seed=1.5)), ('0 or more', lambda x: corrupt(x, 'fog', 1, seed=-1)),
    ('first=-1', lambda x: corrupt(x, 'fog', 1, first=-1)), ('float64', lambda x: corrupt(x.astype(float), 'fog', 1)),
    ('(n, height, width, 3)', lambda x: corrupt(x[0], 'fog', 1)), ('not list', lambda x: corrupt(list(x), 'fog', 1)),
    ('tensor (n, 3, height, width)', lambda x: corrupt(torch.from_numpy(x), 'fog', 1)),
    ('32, 1)', lambda x: corrupt(x[..., :1], 'fog', 1))])
def test_a_mistake_is_one_sentence(say, bad):
    with pytest.raises(UserError) as e: bad(pictures(2))
    assert say in str(e.value) and '\n' not in str(e.value)


def unit(*shape) -> torch.Tensor:
    "Return values 0 … 1, float64."
    return torch.from_numpy(np.random.default_rng(0).random(shape))


def apply(name: str, x, strength, draws=None):
    "Corrupt a batch (n, 3, h, w) of values 0 … 1 at a strength of one's own."
    return CORRUPTIONS[name].apply(x, strength, draws)


def some_draws(n=1): return Draws(0, torch.arange(n))


class Told:
    "Stands for draws: each answer was given beforehand."
    def __init__(self, *answers): self.answers = list(answers)
    def uniform(self, *shape, low=0, high=1): return self.answers.pop(0)


HALF = torch.full((4, 3, 32, 32), 0.5, dtype=torch.float64)


def test_a_further_corruption_is_one_function():
    @corruption('weather', .1, .2, .3, .4, .5)
    def darkness(x, amount, draws): return x - amount
    assert CORRUPTIONS.pop('darkness') == Corruption(darkness, (.1, .2, .3, .4, .5), 'weather')


def test_draws_are_splitmix64_and_spread_as_they_should():
    vector = Draws(1234567, torch.arange(3)).state  # the published test vector
    assert [v % 2**64 for v in vector.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert GOLDEN % 2**64 == 0x9E3779B97F4A7C15
    u, z = (getattr(Draws(1, torch.arange(300)), kind)(400) for kind in ('uniform', 'normal'))
    assert 0 <= u.min() and u.max() < 1
    moments = [u.mean(), u.var(), z.mean(), z.std(), (z ** 4).mean()]
    assert np.allclose(moments, [1 / 2, 1 / 12, 0, 1, 3], atol=0.03, rtol=0)
    for table in (z, z.T):  # as of independent rows
        spread = np.corrcoef(table)[np.triu_indices(len(table), 1)].std()
        assert spread == pytest.approx(table.shape[1] ** -0.5, abs=0.002)
    assert torch.equal(Draws(1, torch.arange(7, 9)).normal(5), Draws(1, torch.arange(20)).normal(5)[7:9])
    assert (Draws(2, torch.arange(9)).uniform(5) != Draws(1, torch.arange(9)).uniform(5)).all()


def test_photons_are_counted_one_by_one():
    for value, rate in ((0.8, 50), (1.0, 500)):
        shot = apply('shot_noise', torch.full((30, 3, 32, 32), value, dtype=torch.float64), rate, some_draws(30))
        assert np.allclose([shot.mean(), rate * shot.var()], value, atol=0.02)  # variance = mean, in photons
        torch.testing.assert_close((shot * rate).round(), shot * rate, atol=1e-9, rtol=0)
    assert not apply('shot_noise', 0 * HALF, 50, some_draws(4)).any()  # without light no photons


def test_blurs_beside_scipy_on_what_is_not_square():
    x = unit(3, 3, 20, 32)
    wanted = ndimage.gaussian_filter(x, (0, 0, 20 / 32, 20 / 32), mode='nearest', truncate=4)
    np.testing.assert_allclose(apply('gaussian_blur', x, 1), wanted, atol=1e-12)
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5
    sharp = apply('defocus_blur', x, (1.6, 0.016))  # a radius of one pixel, hardly softened
    np.testing.assert_allclose(sharp[0, 0], ndimage.convolve(x[0, 0].numpy(), cross, mode='mirror'), atol=1e-9)


@pytest.mark.parametrize('name, strength', [('gaussian_blur', 1), ('zoom_blur', 1.26), ('defocus_blur', (1.5, .1))])
def test_a_blur_sums_to_one(name, strength): torch.testing.assert_close(apply(name, HALF, strength), HALF)


def test_glass_copies_as_the_published_statement_does():
    picture = np.arange(32 * 32 * 3).reshape(32, 32, 3) // 3 % 256
    x = torch.from_numpy(picture / 255).permute(2, 0, 1).repeat(5, 1, 1, 1)
    ours = apply('glass_blur', x, (0, 1, 1), some_draws(5))[2] * 255
    moves = some_draws(5).uniform(2, 32, 32, low=-1, high=1).floor().long()
    for r in range(31, 1, -1):
        for c in range(31, 1, -1):
            i, j = r + moves[2, 0, r, c].item(), c + moves[2, 1, r, c].item()
            picture[r, c], picture[i, j] = picture[i, j], picture[r, c]
    assert np.array_equal(ours.round().permute(1, 2, 0).numpy(), picture)


def test_motion_leaves_half_a_bell_along_the_angle():
    dot = torch.zeros(4, 1, 32, 32, dtype=torch.float64)
    dot[:, :, 15, 15] = 1
    angles = torch.tensor([0., 45, 90, -90])
    trails = apply('motion_blur', dot, (6, 2), Told(angles))[:, 0]
    half = np.exp(-np.arange(13) ** 2 / 8)
    for trail, (down, right) in zip(trails, ((0, 1), (1, 1), (1, 0), (-1, 0))):
        line = [trail[15 - down * k, 15 - right * k] for k in range(10)]  # a pixel shows what lies ahead
        assert sum(line[:3]) > 0.5 and (np.diff(line[2:]) <= 0).all()
        if not down * right: np.testing.assert_allclose(line, half[:10] / half.sum(), atol=1 / 255)
        assert sum(line) == pytest.approx(1, abs=0.05) and trail.sum() == pytest.approx(1, abs=0.05)
    assert torch.equal(trails[2], trails[0].T)


def test_elastic_is_scipys_affine_map_and_field():
    x, (alpha, sigma, most) = unit(3, 3, 32, 32), (.05, .06, .07)
    draws = some_draws(3)
    moves, field = draws.uniform(3, 2, low=-32 * most, high=32 * most), draws.uniform(2, 32, 32, low=-1, high=1)
    points = np.array([[26., 26], [26, 6], [6, 6]])
    rows, cols = np.mgrid[:32, :32].astype(float)
    ours = apply('elastic_transform', x, (alpha, sigma, most), some_draws(3))
    for i in range(3):
        back = np.linalg.solve(np.column_stack([points + moves[i].numpy(), np.ones(3)]), points)
        at = np.stack([cols, rows, np.ones_like(cols)], 2) @ back
        shift = [32 * alpha * ndimage.gaussian_filter(f.numpy(), 32 * sigma, mode='reflect', truncate=3)
                 for f in field[i]]
        for c in range(3):
            once = ndimage.map_coordinates(x[i, c].numpy(), [at[..., 1], at[..., 0]], order=1, mode='mirror')
            twice = ndimage.map_coordinates(once, [rows + shift[1], cols + shift[0]], order=1, mode='reflect')
            np.testing.assert_allclose(ours[i, c], twice, atol=1e-9)
    torch.testing.assert_close(apply('elastic_transform', x, (0, 0, 0), some_draws(3)), x)  # no shift, nothing moves


def test_fog_and_frost_are_textures_of_their_own_per_image():
    white = torch.ones(9, 3, 32, 32, dtype=torch.float64)
    cloud, rough = (apply('fog', white, (1, decay), some_draws(9))[:, 0] * 2 - 1 for decay in (3, 1.75))
    np.testing.assert_allclose([cloud.amin((1, 2)), cloud.amax((1, 2))], [[0] * 9, [1] * 9], atol=1e-12)
    assert cloud.diff(dim=1).abs().mean() < rough.diff(dim=1).abs().mean()  # slower decay, patchier fog
    ice = apply('frost', torch.zeros(50, 3, 32, 32, dtype=torch.float64), (0, 1), some_draws(50))
    assert ice.min() >= 0 and 0.3 < ice.mean() < 0.7 and (ice[0] != ice[1]).any()
    torch.testing.assert_close(apply('frost', 0 * HALF, (.75, .45), some_draws(4)), 0.45 * ice[:4])


def test_snow_falls_in_two_directions():
    fallen = apply('snow', 0 * HALF, CORRUPTIONS['snow'].strengths[4], some_draws(4)) - 0.2 * 0.5
    torch.testing.assert_close(fallen, fallen.flip(-1, -2))  # one layer and its half-turn, on black
    assert fallen.min() > -1e-12 and fallen.mean() > 0.02


def shimmer(liquid: np.ndarray) -> np.ndarray:  # (h, w) → (h, w), 0 … 255
    "Return how light plays in drops of water, by SciPy."
    inside, mean = liquid > 0, np.full((3, 3), np.float32(1 / 9).astype(float))
    edges = inside & ~ndimage.binary_erosion(inside, np.ones((3, 3)), border_value=1)
    far = np.clip(ndimage.distance_transform_edt(~edges), 0, 20)
    v = np.floor(ndimage.correlate(far, mean, mode='mirror') + 1e-9).astype(int)
    below = np.array([(v <= k).sum() for k in range(256)])
    least = below[v.min()]
    v = np.clip(np.round((below - least) / max(1, v.size - least) * 255), 0, 255)[v]
    v = np.clip(ndimage.correlate(v, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode='mirror'), 0, 255)
    return np.round(ndimage.correlate(v, mean, mode='mirror'))


def test_spatter_is_water_that_shimmers_or_mud():
    water, mud = (apply('spatter', HALF, CORRUPTIONS['spatter'].strengths[s], some_draws(4)) for s in (1, 4))
    assert (water >= HALF - 1e-12).all() and 0 < (water > HALF).double().mean() < 1  # water only adds light
    assert (mud <= HALF + 1e-12).all() and 0 < (mud < HALF).double().mean() < 1  # mud only takes it
    mean, sigma, smooth, threshold, amount, _ = CORRUPTIONS['spatter'].strengths[1]
    for ours, liquid in zip(water, some_draws(4).normal(32, 32, mean=mean, sigma=sigma).numpy()):
        liquid = ndimage.gaussian_filter(liquid, smooth, mode='nearest')
        drops = np.floor(np.where(liquid < threshold, 0, liquid) * 255)
        drops = drops * shimmer(drops)
        np.testing.assert_allclose(ours[1] - 0.5, amount * drops / drops.max() * 238 / 255, atol=0.02)


def test_hsv_of_pure_colours_black_and_grey():
    pixels = np.concatenate([np.random.default_rng(0).random((100, 3)), np.eye(4)[:, :3], [[.5] * 3]])
    x, hsv = torch.from_numpy(pixels.T[None, :, None]), [colorsys.rgb_to_hsv(*p) for p in pixels]
    def rgb(change): return np.array([colorsys.hsv_to_rgb(*change(*p)) for p in hsv])
    brighter = apply('brightness', x, 0.2)[0, :, 0].T
    np.testing.assert_allclose(brighter, rgb(lambda h, s, v: (h, s, min(1, v + 0.2))), atol=1e-9)
    for factor, more in CORRUPTIONS['saturate'].strengths:
        wanted = rgb(lambda h, s, v: (h, min(1, s * factor + more), v))
        np.testing.assert_allclose(apply('saturate', x, (factor, more))[0, :, 0].T, wanted, atol=1e-9)


def test_values_are_cut_off_not_rounded():
    flat = np.array([10, 20, 30], np.uint8)[None, None, None].repeat(4, 1)  # one image of 4×1 pixels
    assert corrupt(flat, 'brightness', 1)[0, 0, 0].tolist() == [14, 28, 42]  # 30 + 0.05 · 255 = 42.75, cut off
    two = np.array([0, 200], np.uint8).reshape(1, 2, 1, 1).repeat(3, 3)
    assert corrupt(two, 'contrast', 2)[0, :, 0, 0].tolist() == [50, 150]
    assert corrupt(np.full((1, 2, 2, 3), 255, np.uint8), 'brightness', 5).min() == 255


@pytest.mark.parametrize('name', [n for n in CORRUPTIONS if n not in ('elastic_transform', 'saturate', 'spatter')])
def test_a_higher_severity_changes_more(name):
    "Of five only the ends are compared: some of their steps change the kind of damage rather than its amount."
    severities = (1, 5) if name in ('fog', 'snow', 'frost', 'glass_blur', 'motion_blur') else range(1, 6)
    x = np.repeat(pictures(1), 8, 0)
    assert (np.diff([np.abs(corrupt(x, name, s).astype(float) - x).mean() for s in severities]) > 0).all()


DIGESTS = {  # not of JPEG, whose bits are the library's
    'gaussian_noise': '0f8174065b00', 'shot_noise': '19c943f3367e', 'impulse_noise': 'a68c14dc3281',
    'speckle_noise': '897c3377a28a', 'gaussian_blur': '6359a516676a', 'defocus_blur': '293dc5c804a0',
    'glass_blur': '8bd0be38dcb2', 'motion_blur': '18f73b8ed45d', 'zoom_blur': '2feb0bbfb4d7', 'fog': '6a1e8f69ef26',
    'frost': '4f7c901e3c24', 'snow': '8d8ea974f528', 'spatter': '9cfc1ede118a', 'brightness': '9cbf41fab40e',
    'saturate': '56c14f8b1a89', 'contrast': 'f71495716170', 'pixelate': 'b1cde12478a9',
    'elastic_transform': 'd48824bc8e2a',}


@pytest.mark.parametrize('name', DIGESTS)
def test_the_bits_stay(name):
    "Stored answers and published tables rest on these images: who changes one on purpose changes its digest."
    done = hashlib.sha256()
    for x in (pictures(3), pictures(2, 20, 33)):
        for severity in range(1, 6): done.update(corrupt(x, name, severity, seed=7, first=3).tobytes())
    assert done.hexdigest()[:12] == DIGESTS[name]
