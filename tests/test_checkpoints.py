"Checkpoints that people have: the layouts of DINOv2's training, timm and transformers give the same features."
import argparse
import re

import pytest
import torch

from dinocls.kit.fetch import read_weights
from dinocls.kit.files import UserError
from dinocls.model import fit_weights, random_backbone

SMALL = dict(depth=3, embed_dim=96, num_heads=3)


def small(name, side=2):
    torch.manual_seed(0)
    m = random_backbone(name, side * (16 if 'v3' in name else 14), **SMALL).eval()
    for p in m.parameters(): torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.1)
    return m


def same(name, state, source='the file'):
    m = small(name)
    x, other = torch.randn(2, 3, *m.patch_embed.img_size), random_backbone(name, m.patch_embed.img_size[0], **SMALL)
    return torch.allclose(fit_weights(other.eval(), state, source)(x), m(x), atol=1e-5)


def trained(m):
    "Return a state dict as DINOv2's training names it: mask token, blocks in chunks, heads beside the backbone."
    state = {re.sub(r'^blocks\.(\d+)', lambda b: f'blocks.{int(b[1]) // 2}.{b[1]}', k): v for k, v in m.items()}
    state = {f'backbone.{k}': v for k, v in (state | {'mask_token': torch.zeros(1, 96)}).items()}
    return state | {'dino_head.mlp.0.weight': torch.ones(2, 2), 'ibot_head.last_layer.weight': torch.ones(2)}


@pytest.mark.parametrize('wrap', ['', 'module.', '_orig_mod.', '_fsdp_wrapped_module.module.'])
def test_training_checkpoints(tmp_path, wrap):
    right = small('dinov2_vits14').state_dict()
    wrong = {k: v + 1 for k, v in right.items()}
    good, bad = ({f'{wrap}{k}': v for k, v in trained(s).items()} for s in (right, wrong))
    both = {f'{n}.{k}': v for n, s in (('student', bad), ('teacher', good)) for k, v in s.items()}
    options = argparse.Namespace(lr=0.1)
    for i, held in enumerate(({'teacher': good, 'student': bad}, {'model': both, 'iteration': 3}, good,
                              {'state_dict': {f'{wrap}{k}': v for k, v in right.items()}, 'args': options},
                              {'state_dict': wrong, 'state_dict_ema': right, 'epoch': 1})):
        torch.save(held, file := tmp_path/f'{i}.pth')
        assert same('dinov2_vits14', read_weights(file)), i
    torch.save({'net': right, 'epoch': 1}, file)
    with pytest.raises(UserError, match="it holds some under 'net': save that part alone"): read_weights(file)


def test_a_head_of_timms_is_left_out():
    state = small('dinov2_vits14').state_dict() | {'head.weight': torch.ones(10, 96), 'head.bias': torch.ones(10)}
    assert same('dinov2_vits14', state)
    with pytest.raises(UserError, match='of another model'):
        same('dinov2_vits14', state | {'neck.weight': state['norm.bias']})


def as_transformers(m, v3=False, registers=False):
    "Name a state dict as transformers' Dinov2Model and DINOv3ViTModel do."
    out, registers_of = {}, 'embeddings.register_tokens'
    state = dict(m)
    if registers and not v3:  # the table of transformers and the authors holds a row for CLS
        cls, table = state.pop('cls_token'), state.pop('pos_embed')
        state |= {'cls_token': cls - 1, 'pos_embed': torch.cat([torch.ones(1, 1, 96), table], 1)}
    for k, v in state.items():
        if '.qkv.' in k:
            names = [f'{p}_proj' for p in 'qkv'] if v3 else [f'attention.{p}' for p in ('query', 'key', 'value')]
            head, _, kind = k.partition('.attn.qkv.')
            for name, part in zip(names, v.chunk(3)):
                out[f'{head}.attention.{name}.{kind}'.replace('blocks', 'layer' if v3 else 'encoder.layer')] = part
            continue
        for a, b in (('reg_token', registers_of), ('cls_token', 'embeddings.cls_token'),
                     ('pos_embed', 'embeddings.position_embeddings'), ('.attn.proj', '.attention.o_proj' if v3 else
                     '.attention.output.dense'), ('.gamma_1', '.layer_scale1.lambda1'),
                     ('.gamma_2', '.layer_scale2.lambda1'),
                     ('.ls1.gamma', '.layer_scale1.lambda1'), ('.ls2.gamma', '.layer_scale2.lambda1'),
                     ('patch_embed.proj', 'embeddings.patch_embeddings' + ('' if v3 else '.projection'))):
            k = k.replace(a, b)
        if v3: k = k.replace('fc1', 'up_proj').replace('fc2', 'down_proj')
        elif k.startswith('norm.'): k = k.replace('norm.', 'layernorm.')
        out[k.replace('blocks', 'layer' if v3 else 'encoder.layer')] = v
    if v3: out |= {f'layer.{i}.attention.{p}_proj.bias': torch.zeros(96) for i in range(3) for p in 'qv'}
    return out | {'embeddings.mask_token': torch.zeros(1, 96)}


@pytest.mark.parametrize('name', ['dinov2_vits14', 'dinov2_vits14_reg', 'dinov3_vits16'])
@pytest.mark.parametrize('prefix', ['', 'dinov2.'])
def test_transformers(name, prefix):
    state = as_transformers(small(name).state_dict(), 'v3' in name, 'reg' in name)
    state = {prefix + k: v for k, v in state.items()} | ({'classifier.weight': torch.ones(2)} if prefix else {})
    assert same(name, state)
