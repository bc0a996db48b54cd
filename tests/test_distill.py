"Students: what they go down, what they are told, and that each is a model like any other."
import io
import math

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401, puts the checkout in front

from dinocls import distill, model
from dinocls.data import splits
from dinocls.distill import STUDENTS, TEACHINGS, feature_loss, known_loss, soft_loss, wanted_answers
from dinocls.inference import ProductionModel, save_production
from dinocls.kit import config
from dinocls.kit.datasets import loaded
from dinocls.kit.engines import export_onnx, lacking
from dinocls.kit.files import UserError
from dinocls.kit.pictures import as_png
from dinocls.kit.stage import Stage, variant
from dinocls.model import BACKBONES, Classifier, backbone, classifier, count, head

SMALL = dict(train_size=40, val_size=20, test_size=20, batch_size=20, phase1_epochs=1, phase2_epochs=2, members=2,
             pretrain_size=60, device='cpu', precision='fp32')
CLASSES = [str(i) for i in range(10)]


@pytest.fixture
def cfg(tmp_path): return config.preset('smoke', out=str(tmp_path/'run'), **SMALL)


def test_the_soft_loss_is_what_one_works_out_by_hand():
    logits, wanted = torch.tensor([[math.log(9.0), 0.0]]), torch.tensor([[0.5, 0.5]])
    # at temperature 2 the odds of 9 are 3: (3/4, 1/4)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert soft_loss(logits, wanted, 2.0).item() == pytest.approx(4 * kl, rel=1e-5)
    assert soft_loss(logits, torch.tensor([[0.9, 0.1]]), 1.0).item() == pytest.approx(0, abs=1e-6)


def test_the_soft_loss_has_gradients_that_temperature_leaves_as_large():
    sizes = []
    for t in (4.0, 8.0, 16.0):
        logits = torch.tensor([[0.2, -0.1, 0.3]]).requires_grad_()
        soft_loss(logits, torch.softmax(torch.tensor([[1.0, 0.0, -1.0]]) / t, 1), t).backward()
        sizes.append(logits.grad.norm().item())
    assert max(sizes) < 1.2 * min(sizes)


def test_features_and_labels_by_hand():
    a, b = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    assert feature_loss(a, b).item() == pytest.approx(0.5)
    logits, y = torch.tensor([[math.log(3.0), 0.0]] * 2), torch.tensor([0, -1])
    # of two images one has a label, and that makes up a quarter of it: log 4/3; the other one's is unknown
    assert known_loss(logits, y, torch.tensor([-1, -1]), torch.tensor([0.25, 1.0])).item() == pytest.approx(
        0.25 * math.log(4 / 3) / 2, rel=1e-5)
    assert known_loss(logits, torch.tensor([-1, -1]), torch.tensor([-1, -1]), torch.ones(2)).item() == 0


def test_fixed_answers_are_mixed_as_labels_are():
    how, said = TEACHINGS['fixed'], {'fixed': torch.tensor([[80.0, 0.0], [0.0, 80.0]]), 'logits': None}
    p = wanted_answers(how, said, None, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.3]))
    assert p.tolist() == [[pytest.approx(0.3, abs=1e-4), pytest.approx(0.7, abs=1e-4)]]
    said = {'logits': torch.tensor([[0.0, 0.0], [4 * math.log(3.0), 0.0]])}
    p = wanted_answers(TEACHINGS['hot'], said, torch.tensor([1]), None, None, None)
    assert p.tolist() == [[pytest.approx(0.75), pytest.approx(0.25)]]


def test_nothing_flows_into_the_teacher():
    teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = torch.randn(8, 4)
    loss = soft_loss(student(x), teacher(x).softmax(1), 2.0) + feature_loss(student(x), teacher(x))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    classify = classifier(config.preset('smoke', backbone='student-vit32', weights='random', device='cpu'), 10)
    logits, feats = distill.teacher_answers(classify, torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
                                            config.preset('smoke', device='cpu', precision='fp32'))
    assert (logits.shape, feats.shape, logits.dtype) == ((3, 10), (3, 32), np.float16)


@pytest.mark.slow
def test_the_twin_asks_no_teacher_and_the_student_does(cfg, monkeypatch):
    def refuse(*args): raise AssertionError('the teacher was asked')
    with monkeypatch.context() as m:
        m.setattr(distill, 'lessons', refuse)
        m.setattr(distill, 'phase2_model', refuse)
        twin = distill.distilled(variant(cfg, student='student-cnn', teaching='labels'))
        with pytest.raises(AssertionError, match='was asked'):
            distill.distilled(variant(cfg, student='student-cnn', teaching='hot'))
    assert [name.partition('-')[0] for name in twin.record['after']] == ['splits']
    both = distill.distilled(variant(cfg, student='student-cnn', teaching='both'))
    assert {name.partition('-')[0] for name in both.record['after']} >= {'splits', 'lessons'}
    assert twin['weights'].keys() == both['weights'].keys()  # the projection is no part of the student
    assert both['test_logits'].shape == (20, 10) and both['test_logits'].dtype == np.float16
    assert np.isfinite(both['history']).all() and len(both['history']) == cfg.phase2_epochs


@pytest.mark.slow
def test_labels_of_the_pool_are_not_known(cfg):
    index, labels = distill.taught_images(cfg)
    train = set(splits(cfg)['train'].tolist())
    assert len(index) == 60 and [i in train for i in index.tolist()] == (labels >= 0).tolist()
    assert (labels[:40].numpy() == loaded(cfg).labels[splits(cfg)['train']]).all()
    twin, known = distill.taught_images(cfg, twin=True)
    assert len(twin) == 60 and set(twin.tolist()) == train and (known >= 0).all()
    made = distill.sample_lessons(cfg, index)
    assert torch.equal(made['pictures'], distill.sample_lessons(cfg, index)['pictures'])
    assert not torch.equal(made['pictures'], distill.sample_lessons(variant(cfg, seed=1), index)['pictures'])
    assert distill.taught_images(variant(cfg, pretrain_size=0))[1].min() >= 0


@pytest.mark.parametrize('name', STUDENTS)
def test_a_student_is_saved_exported_and_served_as_any_model(name, tmp_path):
    cfg = config.preset('smoke', student=name, device='cpu', precision='fp32')
    own = distill.student_config(cfg)
    net = classifier(own, 10).eval()
    folder = save_production(tmp_path/'student', net, own, CLASSES, {}, native=(8, 8))
    served = ProductionModel(folder, 'cpu')
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(3)]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    wanted = torch.from_numpy(model.infer(net, x, own)).softmax(1).numpy()
    got = served.predict_batch(pictures)
    assert [list(a['probabilities'].values()) for a in got] == [pytest.approx(w, abs=1e-4) for w in wanted.tolist()]
    assert served.predict(as_png(pictures[0]))['prediction'] == got[0]['prediction']
    assert count(net) * 5 < count(classifier(config.preset('smoke'), 10))


@pytest.mark.slow
@pytest.mark.parametrize('name', ('student-vit48', 'student-cnn'))
def test_a_student_goes_to_onnx_and_answers_over_http(name, tmp_path):
    if why := lacking('onnx', torch.device('cpu')): pytest.skip(why)
    starlette = pytest.importorskip('starlette.testclient')
    from dinocls.app.service import create_app
    own = distill.student_config(config.preset('smoke', student=name, device='cpu', precision='fp32'))
    folder = save_production(tmp_path/'student', classifier(own, 10).eval(), own, CLASSES, {}, native=(8, 8))
    served = ProductionModel(folder, 'cpu')
    assert export_onnx(served.subject, tmp_path/'student.onnx').stat().st_size > 1e5  # it proves itself equal
    png = as_png(np.zeros((8, 8, 3), np.uint8))
    with starlette.TestClient(create_app(served, page=False), base_url='http://localhost') as client:
        said = client.post('/predict', files={'file': ('a.png', io.BytesIO(png), 'image/png')})
        assert said.status_code == 200 and said.json()['prediction'] == served.predict(png)['prediction']
        assert client.get('/info').json()['backbone'] == name


def test_a_student_as_backbone_of_a_configuration():
    for name, side in (('student-cnn', 32), ('student-vit64', 64)):
        cfg = config.preset('smoke', backbone=name, weights='random', image_size=side, pooling='mean')
        assert classifier(cfg, 7).eval()(torch.randn(2, 3, side, side)).shape == (2, 7)
    seen = [distill.student_config(config.preset('smoke', image_size=side)).image_size for side in (224, 64, 32, 28, 7)]
    assert seen == [64, 64, 32, 24, 8]
    for pooling, dim in (('cls', 64), ('mean', 64), ('cls+mean', 128)):
        assert backbone('student-cnn', 32, 'random', pooling).eval()(torch.randn(2, 3, 32, 32)).shape == (2, dim)


@pytest.mark.parametrize('ask, words', [
    (lambda: config.preset('smoke', student='student-vit84'), "Unknown student 'student-vit84'"),
    (lambda: config.preset('smoke', teaching='colder'), "Unknown teaching 'colder'"),
    (lambda: config.preset('smoke', backbone='student-cn'), "Unknown backbone 'student-cn'.*'student-cnn'"),
    (lambda: backbone('student-vit48', 32), 'student-vit48 comes without weights: weights=random'),
    (lambda: backbone('student-vit48', 30, 'random'), 'multiple of the 8-pixel patch of student-vit48: use 32')])
def test_a_mistake_is_one_sentence(ask, words):
    with pytest.raises(UserError, match=words) as said: ask()
    assert '\n' not in str(said.value)


def test_the_small_network_halves_the_side_with_each_block():
    net = backbone('student-cnn', 32, 'random').train()
    net.set_grad_checkpointing()
    groups = model.param_groups(Classifier(net, head(64, 3, (), ())), 0.1, 0.2, 0.05, layer_decay=0.5)
    assert {g['lr'] for g in groups} == {0.2, 0.1 * 0.5, 0.1 * 0.25, 0.1 * 0.125}  # head; blocks 1 and 0; stem
    assert net.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 16, 64)
    assert model.bf16_gain('student-cnn', 32) == 1.0 and set(STUDENTS) < set(BACKBONES)


def test_a_stage_of_a_notebook_goes_to_workers_only_as_it_was_exported():
    from dinocls.kit.parallel import _home
    from dinocls.kit.stage import STAGES
    kept = STAGES['distilled']
    def distilled(cfg, folder): "As exported, for all that its source tells here."
    try:
        assert _home(kept) == 'dinocls.distill'
        distilled.__module__ = '__main__'
        assert _home(Stage(distilled)) == 'dinocls.distill'  # no other source is at hand in this process
        distilled.__name__ = 'of_the_notebook_alone'
        assert _home(Stage(distilled)) == ''
    finally:
        STAGES['distilled'] = kept
        STAGES.pop('of_the_notebook_alone', None)
