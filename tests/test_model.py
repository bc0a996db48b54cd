"Backbones of every kind, where their weights come from, and what is trained of them."
import copy
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dinocls.kit import config
from dinocls import model
from dinocls.app.cli import settings
from dinocls.kit.files import UserError
from dinocls.kit.stage import content_of
from dinocls.model import BACKBONES, Classifier, add_lora, backbone, head, merge_lora, param_groups, random_backbone

KINDS = ('book-digits', 'book-stem', 'dinov2_vits14', 'dinov2_vits14_reg', 'dinov3_vits16')


BACKBONES['book-stem'] = model.Backbone(96, 4, 4, 3, stem=(8, 16))  # as book-cifar, but narrow
TRANSFORMERS = [n for n, spec in BACKBONES.items() if spec.heads]


def small(name, **options):
    "Return a classifier of a backbone's kind, narrow and two blocks deep, with layer scales that let the blocks count."
    torch.manual_seed(0)
    if BACKBONES[name].timm: options = dict(depth=2, embed_dim=96, num_heads=3) | options
    body = random_backbone(name, 2 * BACKBONES[name].patch, **options)
    for n, p in body.named_parameters():
        if 'gamma' in n: nn.init.constant_(p, 0.5)
    return Classifier(body, head(body.embed_dim, 5, (16,), (0.0,)))


def images(m): return torch.randn(4, 3, *m.backbone.patch_embed.img_size)


def test_keys_do_not_change_with_a_download(cache):
    for weights in ('official', '', 'https://host.invalid/a.pth'):
        cfg = config.preset('smoke', backbone='dinov2_vits14', image_size=28, weights=weights, out=str(cache/'run'))
        before = content_of(cfg, ('weights',))
        for name in ('dinov2_vits14_pretrain.pth', 'a.pth'): (cache/'torch'/'checkpoints'/name).write_bytes(b'1')
        assert content_of(cfg, ('weights',)) == before


@pytest.mark.parametrize('weights', ['official', 'random', 'https://host/a.pth#sha256=' + '0' * 64, ''])
def test_the_command_line_leaves_what_is_no_path(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings('smoke', None, [f'weights={weights}'], None).weights == weights
    assert settings('smoke', None, ['weights=a.pth'], None).weights == str(tmp_path/'a.pth')


@pytest.mark.parametrize('name', TRANSFORMERS)
def test_a_size_must_be_a_multiple_of_the_patch(name):
    patch = BACKBONES[name].patch
    with pytest.raises(UserError, match=f'use {3 * patch}'): model.outline(name, 3 * patch + 1)
    for n in (1, 3, 8): assert model.outline(name, n * patch).patch_embed.num_patches == n * n


def test_a_convolutional_stem_gives_the_tokens_of_patches():
    m = random_backbone('book-cifar', 32)
    assert sum(p.numel() for p in m.parameters()) * 2 < 11.9e6  # half precision
    free = random_backbone('book-stem', 32, dynamic_img_size=True)
    for side in (8, 16, 32, 48):
        assert free.forward_features(torch.randn(2, 3, side, side)).shape == (2, 1 + (side // 4) ** 2, 96)
        assert random_backbone('book-stem',
                               side).forward_features(torch.randn(1, 3, side, side)).shape[1] == 1 + (side // 4) ** 2
    with pytest.raises(AssertionError): m(torch.randn(1, 3, 16, 16))  # one size, unless it was built for any
    x = torch.randn(1, 3, 32, 32).requires_grad_()
    embed = free.patch_embed.eval()
    for layer in embed.proj:
        if isinstance(layer, nn.GroupNorm): layer.forward = lambda x: x  # which every place has a share in
    token = embed(x).flatten(1, 2)[0, 3 * 8 + 5]  # row 3, column 5
    seen = torch.autograd.grad(token.sum(), x)[0].abs().sum((0, 1)) > 0
    rows, columns = (torch.nonzero(seen.any(d)).flatten() for d in (1, 0))
    assert rows.max() - rows.min() < 12, 'a token sees its neighbourhood'
    assert 4 * 3 - 6 <= rows.min() <= 4 * 3 and 4 * 5 - 6 <= columns.min() <= 4 * 5, 'a token is at its place'


def test_dinov3_in_its_authors_layout():
    m = small('dinov3_vits16').backbone.eval()
    state = {k.replace('reg_token', 'storage_tokens').replace('gamma_1', 'ls1.gamma').replace('gamma_2',
        'ls2.gamma'): v for k, v in m.state_dict().items()}
    state |= {'mask_token': torch.zeros(1, 96),
              'rope_embed.periods': torch.ones(8)} | {f'blocks.{i}.attn.qkv.{b}': torch.zeros(288) for i in (0, 1)
                                                      for b in ('bias', 'bias_mask')}
    fit = lambda name, state: model.fit_weights(small(name).backbone, state, 'the file').eval()
    x = images(small('dinov3_vits16'))
    assert torch.equal(fit('dinov3_vits16', state)(x), m(x))
    for name in ('dinov2_vits14', 'dinov2_vits14_reg', 'book-digits'):
        with pytest.raises(UserError, match='holds the weights of another model'): fit(name, state)
    for change in ({'blocks.0.attn.qkv.bias': torch.ones(288)},
                   {'patch_embed.proj.weight': torch.zeros(96, 3, 14, 14)}):
        with pytest.raises(UserError, match=f'1 of its tensors do not fit, .{next(iter(change))}'):
            fit('dinov3_vits16', state | change)


@pytest.mark.parametrize('name', KINDS)
def test_weight_decay_acts_on_matrices_only(name):
    m = small(name)
    m.head = head(96, 5, (16,), (0.0,), 'attention')
    names = {id(p): n for n, p in m.named_parameters()}
    groups = param_groups(m, 1e-6, 1e-4, 0.05)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(names)
    for g in groups:
        assert ((g['weight_decay'] == 0) == ('no decay' in g['name'])
                and g['lr'] == (1e-4 if g['name'].startswith('head') else 1e-6))
        for n in (names[id(p)] for p in g['params']):
            assert n.startswith(g['name'].split(',')[0])
            spared = (r'(bias|norm\d?\.weight|gamma(_\d)?|cls_token|reg_token|pos_embed|latent|'
                      r'head\.2\.weight|patch_embed\.proj\.[14]\.weight)$')
            assert ('no decay' in g['name']) == bool(re.search(spared, n)), n


@pytest.mark.parametrize('name', KINDS)
def test_rates_fall_by_layer(name):
    m = add_lora(small(name), 2)
    m.backbone.requires_grad_(True)
    blocks, names = len(m.backbone.blocks), {id(p): n.removeprefix('backbone.') for n, p in m.named_parameters()}
    for g in param_groups(m, 1.0, 5.0, 0.05, layer_decay=0.5):
        for n in (names[id(p)] for p in g['params']):
            if g['name'].startswith('head'): assert n.startswith('head.') and g['lr'] == 5
            elif n.startswith('blocks.'):
                i = int(n.split('.')[1])
                assert g['name'].startswith(f'backbone block {i},') and g['lr'] == 0.5 ** (blocks - i)
            elif n.startswith('norm.'): assert g['name'].startswith('backbone norm,') and g['lr'] == 1
            else:
                assert (g['name'].startswith('backbone embeddings,') and g['lr'] == 0.5 ** (blocks + 1)
                        and n.startswith(('cls_', 'reg_', 'pos_', 'patch_')))


@pytest.mark.parametrize('name', (*KINDS, 'dinov2_vitg14'))
def test_lora_trains_beside_the_weights_and_is_merged_into_them(name):
    plain, m = small(name).eval(), add_lora(small(name), 2)
    x, before = images(m), {n: p.clone() for n, p in m.named_parameters()}
    assert torch.equal(m.eval()(x), plain(x))
    optimiser = torch.optim.AdamW(param_groups(m.train(), 1e-2, 1e-2, 0.05))
    for _ in range(3): optimiser.zero_grad(); m(x).square().mean().backward(); optimiser.step()
    changed = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert (changed == {n for n in before if 'lora_' in n or n.startswith('head.')}
            and sum('lora_A' in n for n in changed) == 4 * len(m.backbone.blocks))
    y = m.eval()(x)
    average = merge_lora(copy.deepcopy(m))
    assert (torch.allclose(average(x), y, rtol=1e-5, atol=1e-5) and torch.equal(m(x), y)
            and (y - plain(x)).abs().max() > 1e-3)
    assert list(average.state_dict()) == list(plain.state_dict()) and all(p.requires_grad for p in average.parameters())


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(UserError, match=r"pip install '\.\[lora\]'"): add_lora(small('book-digits'), 2)


def test_lora_needs_attention():
    net = Classifier(random_backbone('student-cnn', 32), head(64, 5, (), ()))
    with pytest.raises(UserError, match='set lora_rank=0'): add_lora(net, 2)


def gradients(m, x):
    m.zero_grad()
    m(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('name', TRANSFORMERS)
@pytest.mark.parametrize('rank', [0, 2])
def test_gradient_checkpointing_gives_the_same_gradients(name, rank):
    m = (add_lora(small(name), rank) if rank else small(name)).train()
    x, ran = images(m), []
    kept = gradients(m, x)
    m.backbone.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    m.backbone.set_grad_checkpointing()
    again = gradients(m, x)
    # the block ran a second time
    assert len(ran) == 2 and kept.keys() == again.keys() and bool(rank) == any('lora' in n for n in kept)
    for n in kept: torch.testing.assert_close(again[n], kept[n], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('pooling, dim', [('mean', 96), ('cls+mean', 192), ('attention', 96)])
def test_features_are_pooled_as_configured(tmp_path, pooling, dim):
    cfg = config.preset('smoke', pooling=pooling, out=str(tmp_path), train_size=20, val_size=20, test_size=20)
    feats, images = model.features(cfg), model.load_split(cfg, 'test')[0]
    cls = model.infer(backbone('book-digits', 32), images, cfg)
    assert (feats['test'].shape == (20, dim)
            and feats['weights']['sha256'] == model.shipped_record('book-digits')['sha256'])
    assert np.allclose(feats['test'][:, :96], cls, atol=1e-5) == (pooling != 'mean')
    assert model.classifier(cfg, 10).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize('name', KINDS)
def test_the_mean_leaves_out_cls_and_registers(name):
    m = small(name).backbone.eval()
    x, prefix = torch.randn(2, 3, *m.patch_embed.img_size), 1 + BACKBONES[name].registers
    tokens = m.forward_features(x)
    assert tokens.shape[1] == prefix + 4 and torch.allclose(m(x), tokens[:, 0])
    assert torch.allclose(model.pool(tokens, m.num_prefix_tokens, 'mean'), tokens[:, -4:].mean(1), atol=1e-6)


def test_precision_on_a_cpu_is_measured_once_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    cpu, asked = torch.device('cpu'), []
    def auto(gain, **more):
        model.bf16_gain.cache_clear()
        monkeypatch.setattr(model, 'block_seconds', lambda *args: asked.append(args) or [gain, 1.0])
        return model.precision(config.preset('smoke', **more), cpu)
    assert auto(1.7, backbone='book-cifar') == 'bf16'
    # too little to be sure of
    assert auto(0.5) == 'fp32' and auto(1.1, backbone='dinov2_vits14', image_size=28) == 'fp32'
    assert auto(0.1, backbone='book-cifar') == 'bf16' and len(asked) == 3  # remembered
    assert model.precision(config.preset('smoke', precision='fp32', backbone='book-cifar'), cpu) == 'fp32'
    assert model.precision(config.preset('smoke', precision='fp16'), cpu) == 'bf16'
    model.bf16_gain.cache_clear()


def test_the_measurement_disturbs_nobody():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    full, half = model.block_seconds('book-digits', 32, (torch.float32, torch.bfloat16), rounds=1)
    assert full > 0 < half and torch.equal(torch.rand(3), expected)
    with torch.inference_mode(): assert model.block_seconds('book-digits', 32, (torch.float32,), rounds=1)[0] > 0
