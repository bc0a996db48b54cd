"Pre-training without labels, and the weights that come with the package."
import contextlib
import dataclasses
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinocls.kit import config, fetch, files
from dinocls import augment, model, pretrain
from dinocls.kit.files import UserError
from dinocls.kit.datasets import loaded, load_dataset
from dinocls.data import load_split, splits

pytestmark = pytest.mark.slow  # it trains

SMALL = dict(train_size=60, pretrain_epochs=1, pretrain_batch=20)
NOISE = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights(cfg): return pretrain.pretrain(cfg)['weights']


def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def changed(monkeypatch):
    "Let pre-training see images and labels that a function has changed, split by split; the splits stay."
    def change(how, cfg):
        data, parts = loaded(cfg), {s: splits(cfg)[s] for s in ('train', 'val', 'test')}
        images, labels = data.images.copy(), torch.from_numpy(data.labels.copy())
        for name, index in parts.items():
            x, y = how(name, torch.from_numpy(images[index]).permute(0, 3, 1, 2), labels[index])
            images[index], labels[index] = x.permute(0, 2, 3, 1).numpy(), y
        other = dataclasses.replace(data, images=images, labels=labels.numpy())
        monkeypatch.setattr(pretrain, 'loaded', lambda cfg: other)
        monkeypatch.setattr(pretrain, 'load_split',
                            lambda cfg, s: (torch.from_numpy(images[parts[s]]).permute(0, 3, 1, 2), labels[parts[s]]))
    return change


def test_no_label_is_read(tmp_path, changed):
    cfg = config.preset('smoke', out=str(tmp_path/'true'), **SMALL)
    before = weights(cfg)
    assert {'schedule', 'pretrain_lr'} <= pretrain.pretrain(cfg).record['fields'].keys()  # read far below
    changed(lambda name, x, y: (x, y[torch.randperm(len(y))]), cfg)
    assert same(before, weights(config.preset('smoke', out=str(tmp_path/'shuffled'), **SMALL)))


def test_only_the_training_split_is_used(tmp_path, changed):
    cfg = config.preset('smoke', out=str(tmp_path/'true'), **SMALL)
    before = weights(cfg)
    changed(lambda name, x, y: (x if name == 'train' else torch.randint_like(x, 256), y), cfg)
    assert same(before, weights(config.preset('smoke', out=str(tmp_path/'noise'), **SMALL)))
    changed(lambda name, x, y: (x.flip(-1), y), cfg)
    assert not same(before, weights(config.preset('smoke', out=str(tmp_path/'mirrored'), **SMALL)))


def test_images_of_no_split_are_learned_from_as_well(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, 'self_supervise', lambda images, *_: seen.append(images) or {'weights': {}})
    for size in (0, 150):
        pretrain.pretrain(config.preset('smoke', out=str(tmp_path/str(size)), **SMALL, pretrain_size=size))
    train = load_split(config.preset('smoke', out=str(tmp_path/'0'), **SMALL), 'train')[0]
    assert torch.equal(seen[0], train) and len(seen[1]) == 150
    assert {x.numpy().tobytes() for x in train} <= {x.numpy().tobytes() for x in seen[1]}


@pytest.mark.parametrize('options', [dict(patch_loss=1.0, koleo=0.1, local_views=2),
                                     dict(centring='mean', patch_loss=0.5), dict(pretrain_method='simclr'),
                                     dict(view_grey=0.5, view_saturation=0.4, view_flip=True, view_zoom=(0.4, 1.0))])
def test_each_option_trains_reproducibly(tmp_path, options):
    "On the backbone for CIFAR-10, whose 8×8 patches leave room for local views and masks."
    images = load_split(config.preset('smoke'), 'train')[0][:12]
    runs = []
    for i in range(2):
        cfg = config.preset('smoke', backbone='book-cifar', weights='random', out=str(tmp_path/str(i)),
                            **SMALL | dict(pretrain_batch=6) | options)
        runs.append(pretrain.self_supervise(images, cfg, tmp_path/str(i)))
    assert same(runs[0]['weights'], runs[1]['weights']) and np.isfinite(runs[0]['history'][0]['loss'])


METHODS = pytest.mark.parametrize('options',
                                  [{}, dict(pretrain_method='simclr'),
                                   dict(backbone='book-cifar', local_views=2, koleo=0.1), dict(centring='mean')])
EVERYTHING = dict(pretrain_batch=8, weights='random', view_hue=0.1, view_grey=0.2, view_noise=0.1, view_erasing=0.2)


class Watched(TorchDispatchMode):
    "Raise where a GPU would make the host wait: for a number, a mask's places, what is copied from the host's memory."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, (_, _, name) = tree_leaves((args, kwargs)), func._schema.name.rpartition('::')
        places = args[1] if name.startswith('index') and isinstance(args[1], (list, tuple)) else ()
        assert name not in ('_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal',
                            'masked_select') and not any(torch.is_tensor(i) and i.dtype == torch.bool
                                                         for i in places), f'{func} waits'
        out = func(*args, **(kwargs or {}))
        copied = any(torch.is_tensor(t) and t.device.type == 'cpu' and t.ndim
                     for t in before) and any(torch.is_tensor(t) and t.is_meta for t in tree_leaves(out))
        assert not copied, f'{func} copies from the host'
        return out


def a_loop(cfg):
    settings = pretrain.recipe(cfg)
    loop = pretrain.start(pretrain.Student(settings), settings, 1, 4, 1e-3, 1e-3)
    loop.ema.module.requires_grad_(False)
    loop.model.train(), loop.ema.module.train()
    return loop


@METHODS
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_step_does_not_wait_for_the_device(options, precision):
    loop = a_loop(config.preset('smoke', precision=precision, **EVERYTHING | options))
    with Watched():
        for done in (0.0, 0.5):
            pretrain.pretrain_step(loop, loop.model, NOISE[:8], torch.Generator().manual_seed(0), done)
        with pytest.raises(AssertionError, match='waits'):
            pretrain.optimise(loop, loop.model(torch.randn(8, 3, 32, 32))[1].sum())


@METHODS
def test_views_and_loss_take_nothing_from_the_host(options, monkeypatch):
    "On the device without memory, which refuses what lies elsewhere; copies are noticed."
    numbers = lambda *shape, generator, kind=torch.rand: kind(shape, device='meta')
    for module in (augment, pretrain): monkeypatch.setattr(module, 'random_numbers', numbers)
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())  # does not know that device
    cfg, images = pretrain.recipe(config.preset('smoke', **EVERYTHING | options)), torch.zeros(8, 3, 32, 32,
        dtype=torch.uint8, device='meta')
    with torch.device('meta'): student = pretrain.Student(cfg)
    with Watched():
        views = pretrain.sample_views(images, cfg, None, 0.5)
        loss, _ = pretrain.contrast_loss(student, views,
                                         cfg) if cfg.pretrain_method == 'simclr' else pretrain.dino_loss(student,
                                             student, views, cfg)
        loss.backward()
        with pytest.raises(AssertionError, match='copies from the host'): torch.ones(8).to('meta')
    assert loss.is_meta


def test_random_numbers_come_from_where_the_generator_is():
    if not torch.cuda.is_available(): pytest.skip('no GPU')
    drawn = augment.random_numbers(4, generator=torch.Generator('cuda').manual_seed(0))
    assert (drawn.is_cuda and torch.equal(drawn,
                                          augment.random_numbers(4, generator=torch.Generator('cuda').manual_seed(0))))


class Stopped(Exception): pass


@pytest.fixture
def stoppable():
    def stop(*_): raise Stopped
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize('options', [dict(patch_loss=1.0), dict(pretrain_method='simclr')])
@pytest.mark.parametrize('after', [2, 3])  # within an epoch, and as it ends
def test_a_stop_at_any_step_loses_nothing(options, after, tmp_path, monkeypatch, stoppable, capsys):
    step, taken = pretrain.pretrain_step, []
    cfg = config.preset('smoke', out=str(tmp_path/'run'), **SMALL | dict(pretrain_epochs=2) | options)
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    whole = pretrain.self_supervise(NOISE, cfg, tmp_path/'a')

    def until(*args):
        taken.append(1)
        if len(taken) == after: signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(pretrain, 'pretrain_step', until)
    with pytest.raises(Stopped): pretrain.self_supervise(NOISE, cfg, tmp_path/'b')
    assert len(taken) == after and 'stopped after step' in capsys.readouterr().out
    halfway = pretrain.so_far(tmp_path/'b')
    assert len(halfway['history']) == after // 3 and halfway['weights'].keys() == whole['weights'].keys()
    again = pretrain.self_supervise(NOISE, cfg, tmp_path/'b')
    assert (len(taken) == 6 and again['history'] == whole['history']
            and all(same(whole[k], again[k]) for k in ('weights', 'teacher')))
    with pytest.raises(UserError, match='no checkpoint of pre-training'): pretrain.so_far(tmp_path)


@METHODS
def test_training_goes_on_from_what_came_home(options, tmp_path, monkeypatch):
    cfg = config.preset('smoke', weights='random', out=str(tmp_path/'run'), **SMALL | dict(pretrain_batch=6) | options)
    (tmp_path/'a').mkdir()
    home = pretrain.self_supervise(NOISE[:12], dataclasses.replace(cfg, seed=7), tmp_path/'a')
    for part in ('weights', 'teacher'): save_file(home[part], tmp_path/f'{part}.safetensors')
    assert ((tmp_path/'weights.safetensors').stat().st_size <= 12e6
            and (tmp_path/'teacher.safetensors').stat().st_size <= 16e6)
    start, begun = pretrain.start, []
    monkeypatch.setattr(pretrain, 'start',
                        lambda student, *args: begun.append({k: v.clone() for k, v in student.state_dict().items()})
                        or start(student, *args))
    for i, part in enumerate(('', 'weights', 'teacher')):
        (tmp_path/str(i)).mkdir()
        pretrain.self_supervise(NOISE[:12],
                                dataclasses.replace(cfg, pretrain_from=part and str(tmp_path/f'{part}.safetensors')),
                                tmp_path/str(i))
    fresh, bare, whole = begun
    full = {k: v.float() if v.is_floating_point() else v for k, v in home['teacher'].items()}
    assert whole.keys() == full.keys() and all(torch.equal(v, full[k]) for k, v in whole.items())
    assert all(torch.equal(v, (full if k.startswith('backbone.') else fresh)[k]) for k, v in bare.items())
    assert (fresh['backbone.blocks.0.attn.qkv.weight'] - bare['backbone.blocks.0.attn.qkv.weight']).abs().max() > 0.01


def test_training_goes_on_from_this_model_only(tmp_path):
    file = tmp_path/'w.safetensors'
    save_file({'norm.weight': torch.zeros(96)}, file)
    for path, why in ((file, 'of another model'), (tmp_path/'none.safetensors', 'cannot be read')):
        student = pretrain.Student(config.preset('smoke'))
        with pytest.raises(UserError, match=why): pretrain.started_from(student, str(path))


def test_work_is_counted_as_torch_counts_it():
    from test_benchmarks import script
    from torch.utils.flop_counter import FlopCounterMode
    for method in ('simclr', 'dino'):
        cfg = config.preset('smoke', backbone='book-cifar', pretrain_method=method, pretrain_batch=4)
        loop = a_loop(cfg)
        with FlopCounterMode(display=False) as counter:
            pretrain.pretrain_step(loop, loop.model, NOISE[:4], torch.Generator().manual_seed(0), 0.0)
        found = counter.get_total_flops() / script('recipe').step_flops(pretrain.recipe(cfg), 4)
        assert found == pytest.approx(1, abs=0.05)  # torch does not count all of fused attention


@pytest.mark.parametrize('grid', [(1, 2), (2, 2), (4, 4)])
def test_a_mask_hides_a_patch_however_few_there_are(grid):
    pretrain.random.seed(0)
    for _ in range(300):
        mask = pretrain.random_mask(2, grid)
        assert mask.shape == (2, *grid) and mask.any()


def test_local_views_need_room():
    with pytest.raises(UserError, match='at least 4 patches wide; 16 pixels of book-digits are 2'):
        pretrain.sample_views(torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
                              config.preset('smoke', image_size=16, local_views=1), torch.Generator(), 1.0)


@pytest.mark.parametrize('field, value',
                         [('pretrain_method', 'byol'), ('centring', 'none'), ('pretrain_batch', 1),
                          ('teacher_momentum', 0), ('teacher_momentum', 1),
                                          ('teacher_temperature', 0), ('contrast_temperature', 0), ('view_hue', 0.6),
                                          ('view_zoom', (0, 1)), ('projection', (64,)), ('prototypes', 0),
                                          ('view_rotation', -1)])
def test_impossible_fields_are_refused(field, value):
    with pytest.raises(UserError, match=field): config.preset('smoke', **{field: value})


def test_without_lightly_it_says_what_to_install(monkeypatch):
    for name in ('lightly.loss', 'lightly.models.modules.heads'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install '\.\[pretrain\]'"): pretrain.Student(config.preset('smoke'))


SHIPPED = sorted((ROOT/'dinocls'/'weights').glob('*.safetensors'))
BY_NAME = pytest.mark.parametrize('name', [p.stem for p in SHIPPED])


def test_digits_come_with_weights(): assert 'book-digits' in [p.stem for p in SHIPPED]


@BY_NAME
def test_record_is_of_these_weights(name):
    file, record = fetch.shipped(name), fetch.shipped_record(name)
    assert file.stat().st_size <= {'book-digits': 2e6}.get(name, 12e6)
    assert files.file_digest(file) == record['sha256'] and record['seed'] == record['config']['seed']
    words = record['command'].split()
    assert words[:3] == ['dinocls', 'publish', '--preset']
    given = config.parse_overrides(' '.join(w for w in words[4:] if w != '--set'))
    cfg = config.preset(words[3], **given
                        | ({'data_root': 'anywhere'} if given.get('dataset') == 'imagefolder' else {}))
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in record['config'].items() if k != 'weights'}
    assert {k: getattr(cfg, k) for k in made} == made, 'the preset has changed since: publish the weights anew'
    assert record['config']['weights'] in ('', 'random')  # it starts from none: from `pretrain_from`, if from any
    if cfg.dataset == 'digits': assert record['data'] == load_dataset('digits').fingerprint


def test_record_says_what_the_weights_are_worth(tmp_path):
    cfg = config.preset('quick', out=str(tmp_path/'run'))
    right = pretrain.probe_backbone(cfg, None)
    for row in fetch.shipped_record('book-digits')['probes']:
        if row['features'] == 'shipped weights':
            # one image of 200, five of 900: other processors round otherwise
            assert abs(100 * right[f'{row["method"]}_{row["split"]}'].mean() - row['accuracy']) < 0.6, row


def test_images_that_the_weights_have_seen_are_counted(tmp_path):
    seen = model.seen_in_pretraining(config.preset('quick', out=str(tmp_path/'same')))
    assert seen == {'train': 100, 'val': 0, 'test': 0}  # and 597 that are in no split
    other = model.seen_in_pretraining(config.preset('quick', split_seed=7, out=str(tmp_path/'other')))
    assert other['test'] > 250
    assert set(model.seen_in_pretraining(config.preset('quick', weights='random',
                                                       out=str(tmp_path/'random'))).values()) == {0}


def test_changed_and_missing_weights_are_refused(tmp_path, monkeypatch):
    for f in SHIPPED: shutil.copy(f, tmp_path), shutil.copy(f.with_suffix('.json'), tmp_path)
    for module in (fetch, model):
        monkeypatch.setattr(module, 'shipped', lambda name: tmp_path/f'{name}.safetensors', raising=False)
    model.backbone('book-digits', 32)
    content = bytearray((tmp_path/'book-digits.safetensors').read_bytes())
    content[-1] ^= 1
    (tmp_path/'book-digits.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='does not have the SHA-256 of its record'): model.backbone('book-digits', 32)
    (tmp_path/'book-digits.json').unlink()
    with pytest.raises(UserError, match='No weights of book-digits come with this version'):
        model.backbone('book-digits', 32)


def test_other_weights_make_features_anew(tmp_path):
    file = tmp_path/'w.safetensors'
    shutil.copy(fetch.shipped('book-digits'), file)
    cfg = config.preset('smoke', weights=str(file), out=str(tmp_path/'run'))
    model.features(cfg)
    assert model.features.is_done(cfg) and splits.is_done(cfg)
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    assert not model.features.is_done(cfg) and splits.is_done(cfg)


def test_publish_writes_weights_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, 'STUDY', {'as shipped': {}})
    cfg = config.preset('smoke', out=str(tmp_path/'run'), **SMALL)
    file = pretrain.publish(cfg, tmp_path/'package')
    record = files.read_json(file.with_suffix('.json'))
    assert record['sha256'] == files.file_digest(file) and [r['variant'] for r in record['study']] == ['as shipped']
    assert 'data_root' not in record['config'] and record['config']['pretrain_epochs'] == 1
    again = files.read_json(pretrain.publish(cfg, tmp_path/'package', study=False).with_suffix('.json'))
    assert again == record | {'study': []}
    body = model.backbone('book-digits', 32, str(file))
    assert all(torch.equal(v, body.state_dict()[k].half()) for k, v in weights(cfg).items())
