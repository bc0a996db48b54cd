"Attention: maps against independent computations, whatever transformer; nothing changed behind; registers."
import numpy as np
import pytest
import timm
import torch

from dinocls.kit import config, files, stage
from dinocls import attention, model, stats

GRID = (4, 6)


def vit(**options):
    torch.manual_seed(0)
    options = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0) | options
    return timm.models.VisionTransformer(**options).eval()


def eva():
    torch.manual_seed(0)
    return timm.models.eva.Eva(img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0,
                               use_rot_pos_emb=True, num_reg_tokens=3).eval()


@pytest.fixture
def x(): return 3 * torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('body', [vit(), vit(reg_tokens=4, init_values=0.5), vit(qk_norm=True, qkv_bias=False), eva()],
                         ids=['plain', 'registers', 'norms', 'rotary'])
def test_weights_are_those_that_the_fast_kernel_uses(body, x):
    "Applied to the values, the weights must give the module's own output, which the fused kernel computes without."
    calls = []
    attn = body.blocks[-1].attn
    with attn.register_forward_hook(lambda m, args, kwargs, out: calls.append((args, kwargs, out)),
                                    with_kwargs=True), torch.no_grad():
        body(x)
    (given, *args), kwargs, out = calls[0]
    assert attn.fused_attn, 'else nothing is independent'
    with torch.no_grad():
        weights = attention.attention_weights(attn, given, *args, **kwargs)
        v = torch.nn.functional.linear(given, attn.qkv.weight, attn.qkv.bias).unflatten(2, (3, attn.num_heads, -1))[:,
            :, 2].transpose(1, 2)  # (b, heads, tokens, dim of a head)
        if getattr(attn, 'q_bias', None) is not None: v = v + attn.v_bias.unflatten(0, (attn.num_heads, 1, -1))
        again = attn.proj(attn.norm((weights @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)
    maps = attention.attention_maps(body, x)
    assert maps.shape == (2, attn.num_heads, *GRID)
    patches = weights[:, :, 0, body.num_prefix_tokens:]
    torch.testing.assert_close(maps.flatten(2), patches / patches.sum(-1, keepdim=True))


def test_registers_are_no_patches(x):
    body = vit(reg_tokens=4)
    assert body.num_prefix_tokens == 5
    maps, rolled, distances = attention.inspect_attention(body, x)
    assert maps.shape == (2, 3, 4, *GRID) and rolled.shape == (2, *GRID) and distances.shape == (2, 3, 4)
    for part in (maps.sum((3, 4)), rolled.sum((1, 2))): torch.testing.assert_close(part, torch.ones_like(part))


def test_rollout_by_powers(x):
    "A model whose blocks all attend alike is rolled out as a power of one matrix."
    torch.manual_seed(0)
    weights = torch.randn(1, 2, 5, 5).softmax(-1)
    rolled = None
    for _ in range(4): rolled = attention.rollout(rolled, weights)
    mixed = (weights.mean(1)[0].double() + torch.eye(5)) / 2
    torch.testing.assert_close(rolled[0].double(), torch.linalg.matrix_power(mixed, 4), atol=1e-6, rtol=1e-5)


def test_no_map_under_lower_precision_loses_its_sum(x):
    body = vit()
    with torch.autocast('cpu', torch.bfloat16): maps = attention.attention_maps(body, x)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize('fails', [lambda body: body.norm, lambda body: body.blocks[1].attn.attn_drop,
                                   lambda body: body.blocks[0].attn.proj], ids=['norm', 'weights', 'projection'])
def test_a_failure_leaves_the_model_as_it_was(fails, x):
    body = vit().train()
    body.blocks[0].attn.fused_attn = False  # as someone may have set it
    fused = [b.attn.fused_attn for b in body.blocks]
    with fails(body).register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        attention.inspect_attention(body, x)
    assert [b.attn.fused_attn for b in body.blocks] == fused == [False, True, True]
    assert all(m.training and not m._forward_pre_hooks and not m._forward_hooks for m in body.modules())
    attention.inspect_attention(body, x)
    assert [b.attn.fused_attn for b in body.blocks] == fused and all(m.training for m in body.modules())


@pytest.mark.parametrize('other', [torch.nn.Linear(3, 3), vit(class_token=False, global_pool='avg'),
                                   timm.create_model('resnet10t', num_classes=0)],
                                   ids=['linear', 'no CLS', 'convolutions'])
def test_other_models_are_refused(other, x):
    with pytest.raises(files.UserError, match='vision transformer'): attention.attention_maps(other, x)
    stored = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(files.UserError, match='vision transformer'):
        attention.gather_attention(other, stored, config.preset('smoke'))


@pytest.mark.parametrize('body', [vit(), vit(reg_tokens=4), eva()], ids=['plain', 'registers', 'rotary'])
def test_tokens_are_measured_before_the_norm(body, x):
    seen = []
    with body.blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out)), torch.no_grad(): body(x)
    expected = seen[0][:, body.num_prefix_tokens:].norm(dim=2).unflatten(1, GRID)
    torch.testing.assert_close(attention.token_norms(body.train(), x), expected)
    assert body.training and not attention.outliers(expected.numpy(), times=10).any()


def test_gradients_leave_no_trace(x):
    whole, y = model.Classifier(vit(), torch.nn.Linear(32, 3)).train(), torch.tensor([0, 2])
    maps = attention.gradient_maps(whole, x, y)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))
    assert (maps >= 0).all() and not maps.requires_grad and (maps[0] - maps[1]).abs().max() > 1e-4
    with whole.head.register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        attention.gradient_maps(whole, x, y)
    assert torch.is_grad_enabled() and all(p.grad is None for p in whole.parameters())
    assert whole.training and all(b.attn.fused_attn and not b.attn.attn_drop._forward_pre_hooks
                                  for b in whole.backbone.blocks)


def test_patches_go_one_after_the_other(x):
    whole, y = model.Classifier(vit(), torch.nn.Linear(32, 3)).eval(), torch.tensor([0, 2])
    blank, order = torch.zeros(1, 3, 32, 48), torch.stack([torch.randperm(24) for _ in x])
    curve = attention.deletion_curve(whole, x, y, order, blank, steps=24)
    for k, shown in ((0, x), (24, blank.expand_as(x))):
        with torch.no_grad(): p = whole(shown).softmax(1)[[0, 1], y]
        np.testing.assert_allclose(curve[:, k], p, atol=1e-6)
    gone = attention.take_away(x, order[:, :5], blank, GRID).unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)) == 0
    assert [sorted(np.flatnonzero(row)) for row in gone.flatten(1)] == order[:, :5].sort(1).values.tolist()


def test_many_images_pass_in_batches(monkeypatch):
    cfg, pixels = config.preset('smoke'), torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    body, sizes, inspect = model.backbone('book-digits', 32, 'random').eval(), [], attention.inspect_attention
    def counted(body, images, *args): sizes.append(len(images)); return inspect(body, images, *args)
    monkeypatch.setattr(attention, 'inspect_attention', counted)
    whole = attention.gather_attention(body, pixels, cfg)
    for i, picture in enumerate(pixels):
        for a, b in zip(whole, attention.gather_attention(body, picture[None], cfg), strict=True):
            np.testing.assert_allclose(a[i], b[0], atol=1e-5)
    attention.gather_attention(body, pixels.repeat(40, 1, 1, 1), cfg)
    assert sizes == [7] + [1] * 7 + [256, 24]
    def none(body, images, blocks): sizes.append(len(images)); return [torch.zeros(len(images), 1)]
    monkeypatch.setattr(attention, 'inspect_attention', none)
    monkeypatch.setattr(attention, 'preprocess', lambda images, cfg: images)
    large = model.backbone('dinov2_vitb14', 224, 'random').to('meta')
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *args, **kwargs: self)
    sizes.clear()
    attention.gather_attention(large, pixels.repeat(40, 1, 1, 1), cfg, slice(-1, None))
    assert max(sizes) * 12 * 257**2 * 4 <= 2**28, 'a quarter of a gigabyte'


def test_plain_against_registers(tmp_path, monkeypatch):
    cfg = config.preset('smoke', out=str(tmp_path))
    with pytest.raises(files.UserError, match='no twin'): attention.registers(cfg)
    monkeypatch.setitem(attention.BACKBONES, 'book-digits_reg', attention.BACKBONES['book-digits'])
    made = []
    def build(name, size): made.append(name); return vit(img_size=size, reg_tokens=4 if name.endswith('_reg') else 0)
    monkeypatch.setattr(attention, 'backbone', build)
    with pytest.raises(files.UserError, match='chance'): attention.registers(stage.variant(cfg, weights='random'))
    result = attention.registers(cfg)
    assert made == ['book-digits', 'book-digits_reg']
    for kind in ('plain', 'registers'): np.testing.assert_allclose(result[kind].sum((2, 3)), 1, atol=1e-5)
    assert result['plain'].shape == result['registers'].shape == (len(result['sample']), 4, 4, 4)
    assert np.abs(result['plain'] - result['registers']).max() > 1e-4


def test_ten_classes_and_groups():
    rng = np.random.default_rng(0)
    p = [stats.correlate(*rng.normal(size=(2, 10)))['p'] for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09  # as often as 5 % say
    groups = np.repeat(np.arange(10), 30)
    x, y = (rng.normal(size=(2, 10))[:, groups] + 0.5 * rng.normal(size=(2, 300)))
    within = stats.correlate(x, y, groups)
    assert within['n'] == 300 and within['p'] > 0.001
    means = np.array([[v[groups == g].mean() for g in range(10)] for v in (x, y)])[:, groups]
    assert within['r'] == pytest.approx(np.corrcoef(x - means[0], y - means[1])[0, 1])
    assert stats.correlate(x, means[0], groups)['r'] is None  # nothing varies within
