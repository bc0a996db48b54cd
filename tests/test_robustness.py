"Corruptions beside independent definitions of them, what a seed fixes, the published files, and the numbers drawn from answers."
import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dinocls.kit import config
from dinocls import report, robustness
from dinocls.kit.files import UserError
from dinocls.kit.corruptions import CORRUPTIONS, Draws, corrupt
from dinocls.robustness import MODELS, benchmark, drop, robustness_metrics
from dinocls.stats import mean_interval

STRENGTHS = {  # as in the benchmark's published definition, typed a second time
    'gaussian_noise': (.04, .06, .08, .09, .10), 'shot_noise': (500, 250, 100, 75, 50), 'impulse_noise': (.01, .02, .03, .05, .07), 'speckle_noise': (.06, .10, .12, .16, .20),
    'gaussian_blur': (.4, .6, .7, .8, 1), 'defocus_blur': ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
    'glass_blur': ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)), 'motion_blur': ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), 'zoom_blur': (1.06, 1.11, 1.16, 1.21, 1.26),
    'fog': ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)), 'frost': ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
    'snow': ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
    'spatter': ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0), (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)),
    'brightness': (.05, .10, .15, .20, .30), 'contrast': (.75, .5, .4, .3, .15), 'saturate': ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),
    'elastic_transform': ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)), 'pixelate': (.95, .90, .85, .75, .65), 'jpeg_compression': (80, 65, 58, 50, 40)}
FIXED = {'brightness', 'contrast', 'defocus_blur', 'gaussian_blur', 'jpeg_compression', 'pixelate', 'saturate', 'zoom_blur'}  # nothing is drawn


def pictures(n=6, h=32, w=32) -> np.ndarray:
    "Return smooth colours and noise, uint8 (n, h, w, 3)."
    rng = np.random.default_rng(3)
    smooth = np.stack([ndimage.zoom(rng.random((4, 4, 3)), (h / 4, w / 4, 1), order=1) for _ in range(n)])
    return ((0.8 * smooth + 0.2 * rng.random(smooth.shape)) * 255).astype(np.uint8)


def grey(n, value=128): return np.full((n, 32, 32, 3), value, np.uint8)


def test_the_list_is_the_published_one():
    assert {name: c.strengths for name, c in CORRUPTIONS.items()} == STRENGTHS
    assert {name for name, c in CORRUPTIONS.items() if c.extra} == {'speckle_noise', 'gaussian_blur', 'spatter', 'saturate'}
    assert len(benchmark()) == 15 and {c.kind for c in CORRUPTIONS.values()} == {'noise', 'blur', 'weather', 'digital'}


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
    for a, b in ((three[0], three[1]), (three[1], three[2]), (three[0], again[0])): assert torch.equal(a, b) == (name in FIXED)
    assert not torch.equal(corrupt(x, name, 4, seed=5), whole)


def test_draws_differ_between_severities_and_corruptions():
    noise = [(corrupt(grey(1), name, s).astype(float) - 128).ravel() for name, s in (('gaussian_noise', 4), ('gaussian_noise', 5), ('speckle_noise', 5))]
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.08


def test_a_large_set_is_worked_through_in_parts():
    x = grey(1400)
    assert np.array_equal(corrupt(x, 'gaussian_noise', 1)[1360:], corrupt(x[1360:], 'gaussian_noise', 1, first=1360))


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_odd_sizes_and_flat_images_are_corrupted_too(name):
    for shape in ((1, 1, 1, 3), (1, 2, 5, 3), (2, 40, 24, 3), (1, 64, 64, 3)):
        for value in (0, 255): assert corrupt(np.full(shape, value, np.uint8), name, 5).shape == shape
    assert corrupt(np.empty((0, 32, 32, 3), np.uint8), name, 1).shape == (0, 32, 32, 3)


@pytest.mark.parametrize('severity', range(1, 6))
def test_noise_has_the_published_strength(severity):
    at = severity - 1
    spread = lambda name, value: corrupt(grey(20, value), name, severity).astype(float).std() / 255
    assert spread('gaussian_noise', 128) == pytest.approx(STRENGTHS['gaussian_noise'][at], rel=0.02)
    assert spread('speckle_noise', 102) == pytest.approx(0.4 * STRENGTHS['speckle_noise'][at], rel=0.02)
    assert spread('shot_noise', 102) == pytest.approx((0.4 / STRENGTHS['shot_noise'][at]) ** 0.5, rel=0.03)  # 8 bits add a little
    salted = corrupt(grey(20), 'impulse_noise', severity)
    for value in (0, 255): assert (salted == value).mean() == pytest.approx(STRENGTHS['impulse_noise'][at] / 2, rel=0.15)
    assert ((salted == 0) | (salted == 255) | (salted == 128)).all()


@pytest.mark.parametrize('severity', range(1, 6))
def test_colours_change_as_in_hsv(severity):
    x = pictures(1, 8, 8)
    for name, hsv in (('brightness', lambda h, s, v: (h, s, min(1, v + STRENGTHS['brightness'][severity - 1]))),
                      ('saturate', lambda h, s, v: (h, min(1, s * STRENGTHS['saturate'][severity - 1][0] + STRENGTHS['saturate'][severity - 1][1]), v))):
        wanted = np.array([colorsys.hsv_to_rgb(*hsv(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3) / 255]).reshape(x.shape)
        assert np.abs(corrupt(x, name, severity) - np.floor(wanted * 255 + 1e-6)).max() <= 1
        assert (corrupt(x, name, severity) == np.floor(wanted * 255 + 1e-6)).mean() > 0.99
    mean = (x / 255).mean((1, 2), keepdims=True)
    assert np.array_equal(corrupt(x, 'contrast', severity), (np.clip((x / 255 - mean) * STRENGTHS['contrast'][severity - 1] + mean, 0, 1) * 255 + 1e-6).astype(np.uint8))


@pytest.mark.parametrize('severity', range(1, 6))
@pytest.mark.parametrize('size', [(32, 32), (24, 48)])
def test_pixelate_and_jpeg_are_pillows(severity, size):
    for x in pictures(3, *size):
        picture, share = Image.fromarray(x), STRENGTHS['pixelate'][severity - 1]
        small = picture.resize([int(n * share) for n in picture.size], Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)
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
    assert np.abs(corrupt(x[:1], 'zoom_blur', severity)[0] - (total / (len(factors) + 1) * 255).astype(np.uint8).astype(int)).max() <= 1


@pytest.mark.parametrize('name', ['gaussian_blur', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'elastic_transform', 'pixelate'])
def test_what_moves_or_averages_pixels_leaves_a_flat_image(name):
    for severity in range(1, 6): assert np.abs(corrupt(grey(2, 200), name, severity).astype(int) - 200).max() <= 1  # cut off, not rounded


def test_blur_grows_with_the_image():
    large = pictures(1, 64, 64)
    wanted = ndimage.gaussian_filter(large / 255, (0, 2, 2, 0), mode='nearest', truncate=4)
    assert np.abs(corrupt(large, 'gaussian_blur', 5) - (wanted * 255).astype(np.uint8).astype(int)).max() <= 1


def test_motion_follows_the_angle():
    dot = torch.zeros(4, 1, 31, 31, dtype=torch.float64)
    dot[:, :, 15, 15] = 1
    trails = robustness._motion(dot, 6, 2, torch.tensor([0., 45, 90, -90]))[:, 0]
    for trail, (down, right) in zip(trails, ((0, 1), (1, 1), (1, 0), (-1, 0))):  # a pixel shows what lies ahead, so the trail lies behind
        line = torch.tensor([trail[15 - down * k, 15 - right * k] for k in range(10)])
        assert line.sum() == pytest.approx(1, abs=0.05) and trail.sum() == pytest.approx(1, abs=0.05)
        assert (line[2:].diff() <= 0).all() and line[:3].sum() > 0.5


def test_an_affine_map_takes_its_points_back():
    draws = lambda: Draws(7, torch.arange(5))
    back, moves = robustness._affine(32, 32, 2.5, draws()), draws().uniform(3, 2, low=-2.5, high=2.5)
    points = torch.tensor([[26., 26], [26, 6], [6, 6]], dtype=torch.float64)
    moved = torch.cat([points + moves, torch.ones(5, 3, 1)], 2)
    torch.testing.assert_close(moved @ back, points.expand(5, 3, 2))
    ramp = torch.arange(32.).double().expand(1, 1, 32, 32)
    torch.testing.assert_close(robustness._sample(ramp, ramp[:, 0] * 0 + 3.5, ramp[:, 0] * 0.5, robustness._mirrored), ramp * 0.5)


def test_fog_snow_frost_and_spatter_do_to_black_and_white_what_they_should():
    for severity in range(1, 6):
        amount = STRENGTHS['fog'][severity - 1][0]
        assert corrupt(grey(4, 255), 'fog', severity).min() == pytest.approx(255 / (1 + amount), abs=1)  # where the fog is thinnest
        assert corrupt(grey(4, 0), 'fog', severity).max() == 0  # as published: nothing to scale by
        assert corrupt(grey(4, 0), 'snow', severity).min() >= 255 * (1 - STRENGTHS['snow'][severity - 1][-1]) / 2 - 1
        assert corrupt(grey(4, 0), 'frost', severity).max() <= 255 * STRENGTHS['frost'][severity - 1][1]
    assert (corrupt(grey(4, 100), 'spatter', 2) >= 100).all() and (corrupt(grey(4, 100), 'spatter', 5) <= 100).all()


@pytest.mark.parametrize('bad', [lambda x: corrupt(x, 'blur', 1), lambda x: corrupt(x, 'fog', 0), lambda x: corrupt(x, 'fog', True), lambda x: corrupt(x, 'fog', 1, seed=1.5),
                                 lambda x: corrupt(x, 'fog', 1, first=-1), lambda x: corrupt(x.astype(float), 'fog', 1), lambda x: corrupt(x[0], 'fog', 1), lambda x: corrupt(list(x), 'fog', 1),
                                 lambda x: corrupt(torch.from_numpy(x), 'fog', 1), lambda x: corrupt(x[..., :1], 'fog', 1)])
def test_a_mistake_is_one_sentence(bad):
    with pytest.raises(UserError) as e: bad(pictures(2))
    assert '\n' not in str(e.value)


def made_up(wrong=(1, 1, 1, 2, 2, 2), n=10) -> dict:
    "Return a result in which each model errs on its number of images under corruption, and on none clean."
    lost = np.array(wrong)[:, None] > np.arange(n)
    result = {'names': list(CORRUPTIONS), 'classes': 10, 'labels': np.zeros(n, int), 'clean_guess': np.zeros((6, n), int), 'clean_confidence': np.full((6, n), .9)}
    for name in CORRUPTIONS: result |= {f'{name}_guess': np.tile(lost, 5).astype(int), f'{name}_confidence': np.full((6, 5 * n), .9)}
    return result


def test_the_report_finds_its_numbers():
    rows = [{'chapter': '12_robustness', **r} for r in robustness_metrics(made_up(), 42)]
    asked = [spec for spec in report.reference() if spec['chapter'] == '12_robustness']
    assert len(asked) == 10
    for spec in asked:
        found = report.find(rows, spec)
        assert found['value'] == pytest.approx(1.0 if spec['metric'] == 'clean' else 0.2 if 'drop' in spec['metric'] else 0.8)
    assert len({(r['metric'], r.get('severity')) for r in rows}) == len(rows)


def test_an_interval_covers_the_mean_it_estimates():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        hard = rng.random(80) ** 3  # images differ: severities of one image are no new images
        before, after = rng.random((5, 80)) < 1 - hard / 2, rng.random((5, 80)) < 1 - hard
        inside += (d := drop(before, after))['drop_low'] <= 1 / 8 <= d['drop_high']
    assert 0.92 < inside / 500 <= 0.995
    assert mean_interval(np.zeros(50))[0] == 0 and mean_interval(np.zeros(50))[1] < 0 < mean_interval(np.zeros(50))[2]


def test_a_killed_run_goes_on_with_the_next_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(robustness, 'contenders', lambda cfg: {})
    monkeypatch.setattr(robustness, '_with_probes', lambda cfg, parts: {name: int(p['seen'][0]) for name, p in parts.items()})
    def answers(nets, images, cfg):
        asked.append(images)
        if images == 2 and len(asked) < 3: raise KeyboardInterrupt
        return {'seen': np.array([images])}
    monkeypatch.setattr(robustness, 'answers', answers)
    sets = {f'set{i}': lambda i=i: i for i in (1, 2, 3)}
    with pytest.raises(KeyboardInterrupt): robustness.judge(None, sets, tmp_path)
    assert robustness.judge(None, sets, tmp_path) == {'set1': 1, 'set2': 2, 'set3': 3}
    assert asked == [1, 2, 2, 3]


def test_published_sets_belong_to_cifar10(capsys):
    assert robustness.published_rows(config.preset('smoke')) == []
    assert capsys.readouterr().out.count('this run is of digits') == 2


def test_the_key_knows_the_list_and_the_number_of_images():
    keys = {robustness.robustness.key(config.preset('smoke', **c)) for c in ({}, {'corruption_version': 2}, {'corruption_images': 3}, {'knn_k': 5})}
    assert len(keys) == 4 and list(MODELS)[:2] == ['knn', 'linear']
