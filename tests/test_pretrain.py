"Pre-training without labels, and the weights that come with the package."
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file
from test_package import BLOCKED

from dinocls import core, model, pretrain
from dinocls.core import UserError
from dinocls.data import load_dataset, load_split, splits

SMALL = dict(train_size=60, pretrain_epochs=1, pretrain_batch=20)


def weights(cfg): return pretrain.pretrain(cfg)['weights']


def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def changed(monkeypatch):
    "Let pre-training see splits that a function has changed."
    def change(how): monkeypatch.setattr(pretrain, 'load_split', lambda cfg, name, device='cpu': how(name, *load_split(cfg, name, device)))
    return change


def test_no_label_is_read(tmp_path, changed):
    cfg = core.preset('smoke', out=str(tmp_path/'true'), **SMALL)
    before = weights(cfg)
    changed(lambda name, x, y: (x, y[torch.randperm(len(y))]))
    assert same(before, weights(core.preset('smoke', out=str(tmp_path/'shuffled'), **SMALL)))


def test_only_the_training_split_is_used(tmp_path, changed):
    before = weights(core.preset('smoke', out=str(tmp_path/'true'), **SMALL))
    changed(lambda name, x, y: (x if name == 'train' else torch.randint_like(x, 256), y))
    assert same(before, weights(core.preset('smoke', out=str(tmp_path/'noise'), **SMALL)))
    changed(lambda name, x, y: (x.flip(-1), y))
    assert not same(before, weights(core.preset('smoke', out=str(tmp_path/'mirrored'), **SMALL)))


@pytest.mark.parametrize('options', [dict(patch_loss=1.0, koleo=0.1, local_views=2), dict(centring='mean', patch_loss=0.5), dict(pretrain_method='simclr'),
                                     dict(view_grey=0.5, view_saturation=0.4, view_flip=True, view_zoom=(0.4, 1.0))])
def test_each_option_trains_reproducibly(tmp_path, options):
    "On the backbone for CIFAR-10, whose 8×8 patches leave room for local views and masks."
    images = load_split(core.preset('smoke'), 'train')[0][:12]
    runs = []
    for i in range(2):
        cfg = core.preset('smoke', backbone='book-cifar', weights='random', out=str(tmp_path/str(i)), **SMALL | dict(pretrain_batch=6) | options)
        runs.append(pretrain.self_supervise(images, cfg, tmp_path))
    assert same(runs[0]['weights'], runs[1]['weights']) and np.isfinite(runs[0]['history'][0]['loss'])


@pytest.mark.parametrize('grid', [(1, 2), (2, 2), (4, 4)])
def test_a_mask_hides_a_patch_however_few_there_are(grid):
    pretrain.random.seed(0)
    for _ in range(300):
        mask = pretrain.random_mask(2, grid)
        assert mask.shape == (2, *grid) and mask.any()


def test_local_views_need_room():
    with pytest.raises(UserError, match='at least 4 patches wide; 16 pixels of book-digits are 2'):
        pretrain.draw_views(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), core.preset('smoke', image_size=16, local_views=1), torch.Generator(), 1.0)


@pytest.mark.parametrize('field, value', [('pretrain_method', 'byol'), ('centring', 'none'), ('pretrain_batch', 1), ('teacher_momentum', 0), ('teacher_momentum', 1),
                                          ('teacher_temperature', 0), ('view_zoom', (0, 1)), ('projection', (64,)), ('prototypes', 0), ('view_rotation', -1)])
def test_impossible_fields_are_refused(field, value):
    with pytest.raises(UserError, match=field): core.preset('smoke', **{field: value})


def test_without_lightly_it_says_what_to_install(tmp_path):
    code = BLOCKED.replace("'nbdev', ", "'lightly', 'nbdev', ") + f"sys.argv = ['dinocls', 'stage', 'pretrain', '-p', 'smoke', '--out', {str(tmp_path/'run')!r}]\nfrom dinocls.book import main\nmain()"
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert result.returncode == 2 and "pip install 'dinocls[pretrain]'" in result.stderr and 'Traceback' not in result.stderr


SHIPPED = sorted((ROOT/'dinocls'/'weights').glob('*.safetensors'))
BY_NAME = pytest.mark.parametrize('name', [p.stem for p in SHIPPED])


def test_digits_come_with_weights(): assert 'book-digits' in [p.stem for p in SHIPPED]


@BY_NAME
def test_record_is_of_these_weights(name):
    file, record = core.shipped(name), model.shipped_record(name)
    assert file.stat().st_size <= {'book-digits': 2e6}.get(name, 12e6)
    assert core.file_digest(file) == record['sha256'] and record['seed'] == record['config']['seed']
    words = record['command'].split()
    assert words[:3] == ['dinocls', 'publish', '--preset']
    given = core.parse_overrides(' '.join(w for w in words[4:] if w != '--set'))
    cfg = core.preset(words[3], **given | ({'data_root': 'anywhere'} if given.get('dataset') == 'imagefolder' else {}))
    assert {k: getattr(cfg, k) for k in record['config']} == {k: tuple(v) if isinstance(v, list) else v for k, v in record['config'].items()}, \
        'the preset has changed since: publish the weights anew'
    if cfg.dataset == 'digits': assert record['data'] == load_dataset('digits').fingerprint


def test_record_says_what_the_weights_are_worth(tmp_path):
    cfg = core.preset('quick', out=str(tmp_path/'run'))
    right = pretrain.probe_backbone(cfg, None)
    for row in model.shipped_record('book-digits')['probes']:
        if row['features'] == 'shipped weights':
            assert abs(100 * right[f'{row["method"]}_{row["split"]}'].mean() - row['accuracy']) < 0.6, row  # two images of 360: other processors round otherwise


def test_images_that_the_weights_have_seen_are_counted(tmp_path):
    seen = model.seen_in_pretraining(core.preset('quick', out=str(tmp_path/'same')))
    assert seen == {'train': 1077, 'val': 0, 'test': 0}
    other = model.seen_in_pretraining(core.preset('quick', split_seed=7, out=str(tmp_path/'other')))
    assert sum(other.values()) == 1077 and other['test'] > 100
    assert set(model.seen_in_pretraining(core.preset('quick', weights='random', out=str(tmp_path/'random'))).values()) == {0}


def test_changed_and_missing_weights_are_refused(tmp_path, monkeypatch):
    for f in SHIPPED: shutil.copy(f, tmp_path), shutil.copy(f.with_suffix('.json'), tmp_path)
    monkeypatch.setattr(core, 'shipped', lambda name: tmp_path/f'{name}.safetensors')
    monkeypatch.setattr(model, 'shipped', core.shipped)
    model.backbone('book-digits', 32)
    content = bytearray((tmp_path/'book-digits.safetensors').read_bytes())
    content[-1] ^= 1
    (tmp_path/'book-digits.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='does not have the SHA-256 of its record'): model.backbone('book-digits', 32)
    (tmp_path/'book-digits.json').unlink()
    with pytest.raises(UserError, match='No weights of book-digits come with this version'): model.backbone('book-digits', 32)


def test_other_weights_make_other_keys(tmp_path):
    state = load_file(core.shipped('book-digits'))
    file = tmp_path/'w.safetensors'
    shutil.copy(core.shipped('book-digits'), file)
    cfg = core.preset('smoke', weights=str(file))
    first = model.features.key(cfg)
    from safetensors.torch import save_file
    save_file({k: v + 1 for k, v in state.items()}, file)
    assert model.features.key(cfg) != first
    assert splits.key(cfg) == splits.key(core.preset('smoke'))


def test_publish_writes_weights_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, 'STUDY', {'as shipped': {}})
    cfg = core.preset('smoke', out=str(tmp_path/'run'), **SMALL)
    file = pretrain.publish(cfg, tmp_path/'package')
    record = core.read_json(file.with_suffix('.json'))
    assert record['sha256'] == core.file_digest(file) and [r['variant'] for r in record['study']] == ['as shipped']
    assert 'data_root' not in record['config'] and record['config']['pretrain_epochs'] == 1
    again = core.read_json(pretrain.publish(cfg, tmp_path/'package', study=False).with_suffix('.json'))
    assert again == record | {'study': []}
    body = model.backbone('book-digits', 32, str(file))
    assert all(torch.equal(v, body.state_dict()[k].half()) for k, v in weights(cfg).items())
