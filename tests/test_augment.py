"Augmentation beside torchvision's functional reference, image by image, and what a seed fixes."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import AutoAugmentPolicy
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from dinocls.kit import config
from dinocls.augment import (
    MEAN, OPS, STD, adjust_brightness, adjust_contrast, adjust_saturation, augment, autoaugment, by_op, erase,
    flip, jitter, magnitude, mix, mixed_loss, preprocess, randaugment, resize, shift, turn_hue, uniform, warp)

STEP = 1 / 255
RAND = v2.RandAugment()
seed = lambda s=0: torch.Generator().manual_seed(s)


def pictures(h=32, w=32) -> torch.Tensor:
    "Return noise, smooth colours, flat, black, white and nearly grey images with 8-bit values, 0 … 1."
    noise = torch.randint(0, 256, (12, 3, h, w), generator=seed(9)).float() / 255
    coarse = torch.rand(12, 3, 4, 4, generator=seed(8))
    smooth = (F.interpolate(coarse, (h, w), mode='bicubic').clamp(0, 1) * 255).round() / 255
    x = torch.where(torch.arange(12).view(-1, 1, 1, 1) % 2 == 0, noise, smooth)
    x[1], x[3], x[5], x[7] = 0.4, 0, 1, x[7].mean(0).mul(255).round() / 255
    return x


def one_by_one(x, m, function): return torch.stack([function(t, k) for t, k in zip(x, m.tolist())])


def sequential(image, light, spread, colour, turn):
    "Change brightness, contrast, saturation and hue of one image as torchvision does."
    image = reference.adjust_contrast(reference.adjust_brightness(image, light), spread)
    return reference.adjust_hue(reference.adjust_saturation(image, colour), turn)


@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
@pytest.mark.parametrize('op', OPS)
def test_an_operation_agrees_with_torchvision_at_each_level(op, size):
    x = pictures(*size)
    theirs = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._AUGMENTATION_SPACE | RAND._AUGMENTATION_SPACE
    assert set(theirs) == set(OPS)
    for bins in (31, 10):  # those of RandAugment, of AutoAugment
        table, signed = theirs[op][0](bins, *size), theirs[op][1]
        levels, signs = torch.arange(bins) / (bins - 1), torch.where(torch.arange(bins) % 3 == 0, -1, 1)
        m = magnitude(op, levels, signs, size)
        if table is not None:
            torch.testing.assert_close(m, table.float() * (signs if signed else 1), atol=1e-5, rtol=1e-5)
        batch = x[torch.arange(bins) % 12]
        wanted = one_by_one(batch, m, lambda t, k: RAND._apply_image_or_video_transform(t, op, k, 'nearest', {}))
        exact = size == (32, 32) or op not in ('ShearX', 'ShearY')
        nudges = (1,) if exact else (1, 1 - 1e-5, 1 + 1e-5)  # a place halfway between two pixels rounds either way
        off = torch.stack([(OPS[op](batch, m.view(-1, 1, 1, 1) * k) - wanted).abs() for k in nudges]).amin(0) > STEP
        assert not off.any(), f'{op}: {100 * off.float().mean():.3f} % of the values'


def test_jitter_agrees_with_torchvision_with_a_factor_an_image():
    x = pictures()
    f = torch.rand(4, 12, 1, 1, 1, generator=seed()) * 2
    f[3] = f[3] / 2 - 0.5
    wanted = torch.stack([sequential(t, *k) for t, k in zip(x, f.flatten(1).T.tolist())])
    assert (jitter(x, *f) - wanted).abs().max() < 1e-4
    assert torch.equal(jitter(x, *f[:3]), jitter(x, *f[:3], None))
    assert (jitter(x, *torch.ones(3, 12, 1, 1, 1)) - x).abs().max() < 1e-6


@pytest.mark.parametrize(('ours', 'theirs', 'low', 'high'), [
    (adjust_brightness, reference.adjust_brightness, 0, 2), (adjust_contrast, reference.adjust_contrast, 0, 2),
    (adjust_saturation, reference.adjust_saturation, 0, 2), (turn_hue, reference.adjust_hue, -0.5, 0.5)])
def test_each_change_of_colour_agrees_with_torchvision(ours, theirs, low, high):
    x, f = pictures().repeat(4, 1, 1, 1), torch.linspace(low, high, 48).view(-1, 1, 1, 1)
    assert (ours(x, f) - one_by_one(x, f.flatten(), theirs)).abs().max() < STEP / 10


def test_a_flip_and_a_shift_are_torchvisions():
    x = pictures(12, 16).repeat(20, 1, 1, 1)
    flipped, moved = flip(x, seed()), shift(x, 2, seed())
    mirror = reference.horizontal_flip
    turned = torch.tensor([torch.equal(t, mirror(u)) and not torch.equal(t, u) for t, u in zip(flipped, x)])
    assert torch.equal(flipped[~turned], x[~turned]) and 60 < turned.sum() < 140  # two of twelve are flat, one is black
    padded, places = reference.pad(x, [2, 2, 2, 2]), []
    for t, u in zip(moved, padded):
        places.append([(i, j) for i in range(5) for j in range(5) if torch.equal(t, reference.crop(u, i, j, 12, 16))])
        assert places[-1], 'it is no crop of the padded picture'
    assert {p[0] for p in places if len(p) == 1} == {(i, j) for i in range(5) for j in range(5)}


def test_erasing_replaces_a_box_as_torchvision_does():
    x, sides = torch.full((400, 3, 32, 32), 2.0), []
    out = erase(x, 0.25, seed())
    for t, u in zip(out, x):
        rows, cols = ((t != 2).any(0).any(d).nonzero().flatten().tolist() for d in (1, 0))
        if not rows: continue
        i, j, h, w = rows[0], cols[0], len(rows), len(cols)
        noise = t[:, i:i + h, j:j + w]
        assert torch.equal(t, reference.erase(u, i, j, h, w, noise)) and (noise <= 1).all()
        sides.append((h, w))
    areas = np.prod(sides, 1) / 1024
    assert 70 < len(sides) < 130 and 0.01 < areas.min() < 0.05 < 0.25 < areas.max() < 0.36 and len(set(sides)) > 40


@pytest.mark.parametrize('side', [20, 57])
def test_prepare_agrees_with_torchvisions_resize(side):
    x = pictures()
    resized = reference.resize(x, [side, side], v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    wanted = reference.normalize(resized, MEAN, STD)
    assert (preprocess(x, config.preset('smoke', image_size=side)) - wanted).abs().max() < STEP


@pytest.mark.parametrize(('vary', 'kinds'), [
    (lambda x, g: flip(x, g), 2), (lambda x, g: shift(x, 4, g), 81), (lambda x, g: erase(x, 1, g), 512),
    (lambda x, g: adjust_brightness(x, uniform(x, 0.8, 1.2, g)), 512),
    (lambda x, g: adjust_contrast(x, uniform(x, 0.8, 1.2, g)), 512),
    (lambda x, g: adjust_saturation(x, uniform(x, 0.8, 1.2, g)), 512),
    (lambda x, g: turn_hue(x, uniform(x, -0.1, 0.1, g)), 512)])
def test_each_augmentation_draws_for_each_image(vary, kinds):
    x = (pictures()[9:10] * 0.5 + 0.2).repeat(512, 1, 1, 1)
    assert len({t.numpy().tobytes() for t in vary(x, seed())}) >= 0.97 * kinds
    assert torch.equal(vary(x, seed(1)), vary(x, seed(1))) and not torch.equal(vary(x, seed(1)), vary(x, seed(2)))


@pytest.mark.parametrize('fields', [
    {'mixup': 0.0, 'cutmix': 1.0}, {'mixup': 1.0, 'cutmix': 0.0}, {'mixup': 1.0, 'cutmix': 1.0}])
def test_mixing_draws_for_each_pair(fields):
    x, y = pictures(64, 64).repeat(20, 1, 1, 1), torch.arange(240)
    cfg = config.preset('cifar', mix_probability=1.0, **fields)
    mixed, a, b, lam = mix(x, y, cfg, seed())  # CutMix alone: a square box of whole pixels has one of 65 sides
    assert lam.unique().numel() > (150 if cfg.mixup else 60)
    assert torch.equal(b.sort().values, y) and (a != b).float().mean() > 0.9
    assert all(torch.equal(s, t) for s, t in zip((mixed, a, b, lam), mix(x, y, cfg, seed())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('fields', [{'hue': 0.1}, {'policy': 'randaugment'}, {'policy': 'autoaugment'}])
def test_a_seed_gives_the_same_batch_on_a_gpu(fields):
    x, cfg = (pictures() * 255).to(torch.uint8), config.preset('cifar', **fields)
    near = (augment(x.cuda(), cfg, seed(3)).cpu() - augment(x, cfg, seed(3))).abs() < STEP
    assert near.float().mean() > 0.999  # a place halfway between two pixels may round the other way
    assert torch.equal(augment(x.cuda(), cfg, seed(3)), augment(x.cuda(), cfg, seed(3)))


def test_8_bit_rounding_between_the_steps_is_all_that_differs_from_8_bit_torchvision():
    x, f = pictures(), torch.tensor([1.2, 0.8, 1.1])
    eight = (x * 255).round().to(torch.uint8)
    wanted = torch.stack([sequential(t, *f.tolist(), 0.0) for t in eight]).float() / 255
    assert (jitter(x, *f) - wanted).abs().max() < 3 * STEP  # a step for each of the three roundings downwards


def test_hue_leaves_grey_alone_and_a_full_circle_changes_nothing():
    x, half = pictures(), torch.full((12, 1, 1, 1), 0.5)
    assert (turn_hue(turn_hue(x, half), half) - x).abs().max() < 1e-4
    assert torch.equal(turn_hue(x[3:4], half[:1]), x[3:4])


@pytest.mark.parametrize('fields', [
    {}, {'hue': 0.1}, {'policy': 'randaugment'}, {'policy': 'autoaugment'},
    {'policy': 'randaugment', 'randaugment_ops': 1, 'randaugment_magnitude': 30}])
def test_each_image_has_its_own_draw_and_a_seed_fixes_the_batch(fields):
    cfg = config.preset('cifar', **fields)
    image = (pictures()[:1] * 255).to(torch.uint8).repeat(64, 1, 1, 1)
    out = augment(image, cfg, seed(1))
    assert len({t.numpy().tobytes() for t in out}) == 64
    assert torch.equal(out, augment(image, cfg, seed(1))) and not torch.equal(out, augment(image, cfg, seed(2)))
    assert out.shape == image.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1


@pytest.mark.parametrize('vary', [lambda x, g: randaugment(x, 1, 9, g), autoaugment])
def test_a_policy_draws_for_each_image(vary):
    x = pictures()[:1].repeat(512, 1, 1, 1)
    before = x.clone()
    kinds = len({t.numpy().tobytes() for t in vary(x, seed())})
    assert kinds >= 20 and torch.equal(x, before)  # 14 operations, nine of them with a sign


def test_randaugment_takes_all_operations_but_inversion_and_none_twice_as_often():
    x, seen = (0.2 + 0.6 * pictures()[9:10]).repeat(2000, 1, 1, 1), {}
    out = randaugment(x, 1, 9, seed(3))
    for name in OPS:
        m = [magnitude(name, torch.tensor([0.3]), torch.tensor([s]), (32, 32)).view(1, 1, 1, 1) for s in (-1, 1)]
        kinds = {OPS[name](x[:1], one).numpy().tobytes() for one in m}
        seen[name] = np.mean([t.numpy().tobytes() in kinds for t in out])
    assert seen.pop('Invert') == 0
    assert all(0.04 < share < 0.11 for share in seen.values()), seen


def test_autoaugment_applies_its_operations_with_their_probabilities():
    x = (0.2 + 0.6 * pictures()[9:10]).repeat(3000, 1, 1, 1)
    left = (autoaugment(x, seed()) == x).flatten(1).all(1).float().mean().item()
    policies = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
    expected = np.mean([(1 - a[1]) * (1 - b[1]) for a, b in policies])
    assert expected - 0.03 < left < expected + 0.06  # Color at level 0 changes nothing either


def test_images_of_one_operation_do_not_touch_the_others():
    x, ops = pictures(), ['Rotate', 'Identity', 'Equalize', 'Rotate'] * 3
    level = torch.linspace(0.1, 1, 12)
    together = by_op(x, ops, level, seed(4))
    sign = torch.randint(0, 2, (12,), generator=seed(4)) * 2 - 1
    for i, op in enumerate(ops):
        m = magnitude(op, level[i:i + 1], sign[i:i + 1], (32, 32)).view(1, 1, 1, 1)
        assert torch.equal(together[i], OPS[op](x[i:i + 1], m)[0])


def test_small_images_pass_every_operation():
    for side in (1, 2, 3):
        x = pictures(side, side)
        for op in OPS: assert OPS[op](x, torch.full((12, 1, 1, 1), 0.5)).shape == x.shape
    assert torch.equal(warp(x, 1, 0, 0, 0, 1, 0), x)


def test_mix_probability_and_cutmix_share():
    x, y = torch.cat([torch.zeros(500, 3, 8, 8), torch.ones(500, 3, 8, 8)]), torch.arange(1000)
    for probability in (0.0, 0.3, 1.0):
        cfg = config.preset('cifar', mix_probability=probability, mixup=1.0)
        mixed, a, b, lam = mix(x, y, cfg, seed())
        assert abs((lam < 1).float().mean() - probability) < 0.07
        assert torch.equal(mixed[lam == 1], x[lam == 1]) and torch.equal(a, y)
    for share in (0.0, 0.8, 1.0):
        mixed, a, b, lam = mix(x, y, config.preset('cifar', cutmix_share=share, mixup=1.0), seed())
        halves = (a < 500) != (b < 500)  # of a black and a white image: a box leaves values 0 and 1 alone
        pasted = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)[halves]
        assert abs(pasted.float().mean() - share) < 0.07
        white = torch.where(a >= 500, lam, 0) + torch.where(b >= 500, 1 - lam, 0)
        assert (mixed.mean((1, 2, 3)) - white).abs().max() < 1e-5


def test_one_alone_and_neither():
    x, y = pictures(), torch.arange(12)
    for fields in ({'mixup': 0.0}, {'cutmix': 0.0}):
        for share in (0.0, 0.5, 1.0):  # the share decides only where both are on
            assert (mix(x, y, config.preset('cifar', cutmix_share=share, **fields), seed())[3] < 1).any()
    same, *_, lam = mix(x, y, config.preset('cifar', mixup=0.0, cutmix=0.0), seed())
    assert torch.equal(same, x) and (lam == 1).all()


def test_the_mixed_loss_is_the_reference_formula():
    logits, lam = torch.randn(12, 10, generator=seed()), torch.rand(12, generator=seed())
    a, b = torch.arange(12) % 10, torch.arange(12).flip(0) % 10
    entropy = lambda z, y: F.cross_entropy(z[None], y[None], label_smoothing=0.1)
    wanted = sum(k * entropy(z, i) + (1 - k) * entropy(z, j) for z, i, j, k in zip(logits, a, b, lam)) / 12
    torch.testing.assert_close(mixed_loss(logits, a, b, lam, 0.1), wanted)


@pytest.mark.parametrize('size', [(32, 32), (28, 28), (20, 31), (64, 48), (300, 200)])
def test_prepare_resizes_as_torch_does(size):
    x, side = pictures(*size), 57
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    plain = F.interpolate(x, (side, side), mode='bicubic', antialias=True).clamp(0, 1)
    cfg = config.preset('smoke', image_size=side)
    ours = preprocess(x, cfg)
    assert (ours * std + mean - plain).abs().max() < 1e-5
    assert (preprocess((x * 255).round().to(torch.uint8), cfg) - ours).abs().max() < 1e-4


def test_prepare_at_the_native_size_only_normalises():
    x = pictures()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(preprocess(x, config.preset('smoke')), (x - mean) / std)


def test_prepare_keeps_its_precision_under_autocast_and_serves_gradients_after_inference():
    x, cfg = pictures(), config.preset('smoke', image_size=50)  # a size that no other test asks for
    with torch.inference_mode(): first = preprocess(x, cfg)
    with torch.autocast('cpu', dtype=torch.bfloat16): again = preprocess(x, cfg)
    assert torch.equal(again, first) and again.dtype == torch.float32
    leaf = x.clone().requires_grad_()
    preprocess(leaf, cfg).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert resize(x.double(), 50).dtype == torch.float64


def test_prepare_writes_over_a_batch_that_fits_and_over_no_other():
    x, cfg = pictures(), config.preset('smoke', image_size=57)
    fresh = preprocess(x, cfg)
    double = torch.zeros(12, 3, 57, 57, dtype=torch.float64)
    for last in (None, torch.zeros(12, 3, 57, 57), torch.zeros(11, 3, 57, 57), double):
        again = preprocess(x, cfg, out=last)
        assert torch.equal(again, fresh)
        assert (again is last) == (last is not None and last.shape == fresh.shape and last.dtype == fresh.dtype)
    native = torch.zeros(12, 3, 32, 32)
    assert torch.equal(preprocess(x, config.preset('smoke'), out=native), preprocess(x, config.preset('smoke')))
