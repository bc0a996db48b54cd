"The losses that the reference only proposes, the statistics of the ablation, and grids in which a cell fails."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinocls.kit import config, files
from dinocls import phase1 as chapter5, train
from dinocls.ablation import (
    add_rows, cka, contrasts, cross_fitted, drift, ema_study, grid, leave_rows, phase2_drift, summarise, turned_off,
    weight_change)
from dinocls.augment import label_loss, mixed_loss
from dinocls.data import halves
from dinocls.kit.config import preset
from dinocls.kit.stage import variant
from dinocls.model import classifier
from dinocls.phase1 import phase1
from dinocls.phase2 import phase2, with_weights
from dinocls.probe import embed

pytestmark = pytest.mark.slow  # it trains


def batch(n=12, classes=10):
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, classes, generator=g), *torch.randint(classes, (2, n), generator=g), torch.rand(n,
        generator=g)


def by_hand(z, y, smoothing, gamma):
    "The focal loss of one image, class by class."
    p, total = z.double().softmax(0), 0.0
    for c in range(len(z)):
        q = (1 - smoothing) * (c == y) + smoothing / len(z)
        total -= q * (1 - p[c]) ** gamma * p[c].log()
    return total


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('hard', [0.0, 1.0, 0.5])
def test_the_loss_is_the_formula(gamma, smoothing, hard):
    logits, a, b, lam = batch()
    each = torch.stack([k * by_hand(z, i, smoothing, gamma) + (1 - k) * by_hand(z, j, smoothing, gamma)
                        for z, i, j, k in zip(logits, a, b, lam)])
    wanted = (each ** hard / (each ** hard).mean() * each).mean()
    torch.testing.assert_close(mixed_loss(logits, a, b, lam, smoothing, gamma, hard).double(), wanted, rtol=1e-5,
                               atol=1e-6)


def test_both_are_off_by_default_to_the_bit():
    logits, a, b, lam = batch()
    x, y = (F.cross_entropy(logits, i, label_smoothing=0.1, reduction='none') for i in (a, b))
    assert torch.equal(mixed_loss(logits, a, b, lam, 0.1, 0.0, 0.0), (lam * x + (1 - lam) * y).mean())
    assert preset('reference').focal_gamma == preset('reference').hard_weight == 0


def test_no_gradient_passes_through_the_weights():
    logits, a, _, _ = batch()
    logits.requires_grad_()
    mixed_loss(logits, a, a, torch.ones(12), hard=1.0).backward()
    each = F.cross_entropy(logits, a, reduction='none')
    wanted, = torch.autograd.grad((each.detach() / each.detach().mean() * each).mean(), logits)
    torch.testing.assert_close(logits.grad, wanted)


@pytest.mark.parametrize('gamma', [0.5, 1.0, 2.0])
def test_sure_predictions_and_half_precision_stay_finite(gamma):
    for sign in (200.0, -200.0):
        logits = torch.zeros(2, 10).index_fill_(1, torch.tensor([0]), sign).requires_grad_()
        loss = mixed_loss(logits, *torch.zeros(2, 2, dtype=torch.long), torch.ones(2), 0.1, gamma, 1.0)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(label_loss(torch.randn(4, 10).bfloat16(), torch.arange(4), 0.1, gamma)).all()


def test_training_uses_the_configured_loss(monkeypatch, tmp_path):
    seen, original = [], train.mixed_loss
    monkeypatch.setattr(train, 'mixed_loss', lambda *args: (seen.append(args[4:]), original(*args))[1])
    phase1(preset('smoke', out=str(tmp_path), phase1_epochs=1, focal_gamma=2.0, hard_weight=0.5, label_smoothing=0.2))
    assert set(seen) == {(0.2, 2.0, 0.5)}


def run(row, seed, right): return {'row': row, 'seed': seed, 'chosen': np.array(right) > 0, 'last': np.array(right) > 0}


def test_an_epoch_has_no_say_from_the_images_that_it_scores():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 101)
    first, second = halves(labels, 42)
    right = rng.random((20, 101)) < 0.5
    for part, other in ((first, second), (second, first)):
        changed = right.copy()
        changed[:, part] = rng.random((20, len(part))) < 0.5  # what is scored does not choose
        epoch = max(range(20), key=lambda e: (right[e, other].sum(), e))
        assert (cross_fitted(changed, first, second)[part] == changed[epoch, part]).all()


def test_an_early_epoch_is_chosen_and_the_last_stands_beside_it():
    "As at rates of 1e-2 and 1e-1, where the first epoch had 49.7 % and the last 10.6 %."
    epochs = np.arange(1000) % 10 < np.array([[5], [3], [1]])
    assert cross_fitted(epochs, *halves(np.zeros(1000, int), 0)).mean() == 0.5 and epochs[-1].mean() == 0.1


def test_equal_rows_are_rarely_told_apart():
    "Under no difference at all, a table of ten shows one that differs in at most about 5 % of studies."
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        right = rng.random((11, 8, 100)) < 0.9
        rows = contrasts({str(i): 1.0 * r - right[0] for i, r in enumerate(right[1:])})
        found.append(any(r['verdict'] == 'differs' for r in rows))
    assert np.mean(found) < 0.12


def test_rows_are_paired_by_seed_and_missing_runs_are_left_out():
    runs = [run('a', 1, [1, 0]), run('a', 2, [1, 0]), run('a', 3, [0, 0]), run('b', 3, [1, 0]), run('b', 1, [1, 1]),
            run('c', 4, [1, 1])]
    a, b, c = summarise(runs)
    assert (b['seeds'], b['gain'], b['gain_last']) == (2, 0.5, 0.5) and a['verdict'] is None
    assert c['gain'] is None and c['p'] is None
    assert summarise(runs, sign=-1)[1]['gain'] == -0.5
    assert summarise([]) == [] and summarise([run('a', 1, [1]), run('b', 1, [0])])[1]['verdict'] == "can't tell"


def test_the_techniques_together_are_the_recipe():
    for name in config.PRESETS:
        cfg = preset(name)
        off, rows = turned_off(cfg), add_rows(cfg)
        bare = variant(cfg, **rows['baseline'])
        assert turned_off(bare) == {} and not chapter5.varies(bare)
        assert variant(bare, **{f: getattr(cfg, f) for fields in off.values() for f in fields}) == variant(cfg)
        for technique in off:
            assert set(turned_off(variant(cfg, **leave_rows(cfg)[technique]))) == set(off) - {technique}
        assert set(rows) >= {'baseline', 'mixup', 'cutmix', 'erasing', 'jitter', 'smoothing', 'ema', 'dropout',
                             'clipping', 'schedule', 'focal', 'hard'}
        for row in ('mixup', 'cutmix', 'erasing', 'jitter', 'smoothing', 'dropout', 'clipping', 'schedule', 'focal',
                    'hard'):
            assert set(turned_off(variant(cfg, **rows[row]))) == {row}


def test_an_average_kept_along_is_the_one_of_phase1(tmp_path):
    bare = add_rows(cfg := preset('smoke', out=str(tmp_path), phase1_epochs=3))['baseline']
    rows = ema_study(variant(cfg, **bare))['rows']
    steps = max(r['steps'] for r in rows)
    for decay, warmup in ((0.9, False), (0.9999, True)):
        last = phase1(variant(cfg, **bare | dict(ema_decay=decay, ema_warmup=warmup)))['history'][-1]
        assert [r['val_accuracy'] for r in rows
                if (r['steps'], r['decay'], r['warmup']) == (steps, decay, warmup)] == [last['val_accuracy']]
        assert [r['val_accuracy'] for r in rows if (r['steps'], r['decay']) == (steps, 0)] == [last['raw_val_accuracy']]


def test_a_failed_cell_does_not_lose_the_grid(monkeypatch, tmp_path):
    cfg, original, tried = preset('smoke', out=str(tmp_path), phase1_epochs=1), chapter5.fit, []
    def broken(model, train, val, c, **options):
        tried.append(c.seed)
        if c.seed == 43 and c.clip_norm == 0: raise RuntimeError('a bad day')
        return original(model, train, val, c, **options)
    monkeypatch.setattr(chapter5, 'fit', broken)
    rows = {'recipe': {}, 'clipping': {'clip_norm': 0.0}}
    found, failed = grid(phase1, cfg, rows, (42, 43))
    assert [(r['row'], r['seed']) for r in found] == [('recipe', 42), ('recipe', 43), ('clipping', 42)]
    assert len(failed) == 1 and 'clip_norm=0.0' in failed[0] and 'a bad day' in failed[0]
    assert summarise(found)[1]['seeds'] == 1

    monkeypatch.setattr(chapter5, 'fit',
                        lambda *args, **options: (tried.append('again'), original(*args, **options))[1])
    found, failed = grid(phase1, cfg, rows, (42, 43))
    assert len(found) == 4 and not failed and tried.count('again') == 1


def test_cka_knows_turns_and_scale_from_change():
    g = np.random.default_rng(0)
    x, turn = g.normal(size=(200, 6)), np.linalg.qr(g.normal(size=(6, 6)))[0]
    assert cka(x, -2 * x @ turn + 5) == pytest.approx(1)
    assert cka(x, g.normal(size=(200, 6))) < 0.2
    assert cka(x.astype(np.float32), x) == pytest.approx(1)


@pytest.mark.parametrize('pooling', ['cls', 'cls+mean', 'attention'])
def test_drift_of_every_kind_of_backbone(pooling, tmp_path):
    cfg = preset('smoke', out=str(tmp_path), pooling=pooling)
    still = classifier(cfg, 10).backbone
    moved = copy.deepcopy(still)
    with torch.no_grad(): moved.blocks[0].mlp.fc1.weight.mul_(3)
    before, after = (embed(b, cfg, ('val',))['val'] for b in (still, moved))
    assert list(drift(before, before).values()) == pytest.approx([1, 1], abs=1e-5) and weight_change(still, still) == 0
    assert max(drift(before, after).values()) < 0.999 and weight_change(still, moved) > 0


def test_what_is_probed_is_the_backbone_of_the_last_epoch(tmp_path):
    "Rates that destroy the head leave the best epoch early; the probe sees the backbone as training left it."
    cfg = preset('smoke', out=str(tmp_path), phase1_epochs=1, lr_backbone=1e-2, lr_head=1e-1, ema_decay=0.0)
    found, trained = phase2_drift(cfg), phase2(cfg)
    last, start = with_weights(cfg, trained['last_weights']), classifier(cfg, 10)
    assert found['weight_change'] == pytest.approx(weight_change(start.backbone, last.backbone))
    assert {k: found[k].shape for k in ('linear', 'knn', 'frozen_linear', 'frozen_knn')} == dict.fromkeys(
        ('linear', 'knn', 'frozen_linear', 'frozen_knn'), (100,))
    assert found['frozen_linear'].mean() > 0.5


def test_a_map_of_rates_must_be_two_lists():
    for bad in ('[1e-3]', '[[1e-3], []]', '[[1e-3], [-1]]', '[1e-3, 1e-2]'):
        with pytest.raises(files.UserError, match='lr_grid'): preset('quick', lr_grid=bad)
    for cfg in map(preset, config.PRESETS):
        assert cfg.preset == 'smoke' or set(cfg.lr_pairs) <= {(b, h) for b in cfg.lr_grid[0]
                                                              for h in cfg.lr_grid[1]}, 'pairs are cells of the map'
