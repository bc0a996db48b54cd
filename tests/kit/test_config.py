"Presets, overrides and what is refused."
import dataclasses
import subprocess
import sys

import pytest

from dinocls.kit import config
from dinocls.kit.config import PRESETS, preset
from dinocls.kit.files import UserError


@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_configurations(name):
    assert preset(name).preset == name


def test_values_may_be_text():
    assert preset('reference').lr_backbone == 1e-6
    given = preset('quick', seed='7', lr_head='1e-3', flip='false', lr_pairs='[[1e-3, 1e-2]]', train_size='1e3')
    assert (given.seed, given.lr_head, given.flip, given.lr_pairs) == (7, 1e-3, False, ((1e-3, 1e-2),))
    assert given.train_size == 1000 and isinstance(given.train_size, int)
    assert preset('quick', lr_grid=[['1e-3'], [1e-2, 1]]).lr_grid == ((1e-3,), (1e-2, 1))


@pytest.mark.parametrize('field, value, words', [
    ('sead', 1, "did you mean 'seed'?"), ('batch_size', 'many', 'expected a whole number'),
    ('batch_size', 2.5, 'expected a whole number'), ('batch_size', 0, 'at least 1'), ('train_size', -1, 'at least 0'),
    ('val_size', 0, 'at least 1'), ('backbone', 'dinov2_vitb', "did you mean 'dinov2_vitb14'?"),
    ('dataset', 'imagefolder', 'needs data_root'), ('policy', 'rand', "did you mean 'randaugment'?"),
    ('layer_decay', 1.5, 'at most 1'), ('layer_decay', 0, 'above 0'), ('hue', 0.6, 'at most 0.5'),
    ('erasing', 1, 'below 1'), ('lr_grid', '[1e-3, 1e-2]', 'expected a list of numbers'),
    ('lr_pairs', '[[1, 2, 3]]', 'expected a list of numbers'), ('lr_pairs', '[]', 'at least 1'),
    ('head_widths', '(1, 2', 'expected a list of numbers'), ('head_widths', '(1,)', 'one dropout for each'),
    ('flip', 'maybe', 'expected true or false'), ('pretrain_batch', 1, 'at least 2'),
    ('view_zoom', '(0, 1)', 'above 0'),
    ('projection', '(1, 2, 3)', 'expected a list of numbers'), ('lr_head', 'nan?', 'expected a number')])
def test_a_wrong_value_is_told_in_a_sentence(field, value, words):
    with pytest.raises(UserError) as error: preset('quick', **{field: value})
    assert words in str(error.value) and '\n' not in str(error.value)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'quick'"): preset('quik')


def test_overrides_are_read_and_written():
    assert config.parse_overrides('seed=7 lr_head=1e-3') == {'seed': '7', 'lr_head': '1e-3'}
    for text in ('seed 7', "seed='7"):
        with pytest.raises(UserError): config.parse_overrides(text)
    changed = preset('quick', seed=7, data_root='a b', lr_pairs=((1e-3, 1e-2),))
    assert preset('quick', **config.parse_overrides(config.format_overrides(changed))) == changed


def test_a_run_is_named_by_what_it_changes():
    assert config.run_name(preset('quick', seed=7)) == 'quick+seed=7'
    assert config.run_name(preset('quick', micro_batch=8, compile='off', keep=True)) == 'quick'
    assert len(config.run_name(preset('quick', data_root='x' * 200))) <= 80


def test_groups_share_no_field():
    groups = [c for c in config.Config.__mro__[1:] if dataclasses.is_dataclass(c)]
    names = [f.name for g in groups for f in dataclasses.fields(g)]
    assert len(names) == len(set(names)) == len(config.FIELDS) - 3  # preset, out, device


def test_the_top_of_the_package_is_light():
    code = ('import sys, dinocls\n'
            'assert not {"torch", "numpy", "matplotlib", "pydantic"} & set(sys.modules), "it loads what nobody wants"\n'
            'from dinocls import preset, load_dataset; assert "torch" not in sys.modules\n'
            'assert preset("smoke").dataset == "digits" and len(load_dataset("digits").labels) == 1797\n'
            'assert set(dinocls.__all__) <= set(dir(dinocls))')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('field, value, words', [
    ('seed', '1e400', 'a whole number'), ('seed', float('inf'), 'a whole number'), ('lr_head', 'inf', 'number'),
    ('head_widths', [10**6] * 3, 'at most 16384'), ('head_widths', str([1] * 10**4), 'at most'),
    ('lr_pairs', '(' * 500, 'a list of numbers'), ('image_size', 10**10, 'at most'), ('flip', 2, 'true or false'),
    ('prototypes', '1e18', 'at most 1048576'), ('lora_rank', 10**9, 'at most 16384'), ('crop', 1e9, 'at most 1024'),
    ('head_dropout', '(2, 1, 1)', 'below 1'), ('weights', None, 'expected text')])
def test_forged_values_are_told_in_a_short_sentence(field, value, words):
    with pytest.raises(UserError) as error: preset('quick', **{field: value})
    if 'at most' != words: assert words in str(error.value)
    assert len(str(error.value)) < 250
