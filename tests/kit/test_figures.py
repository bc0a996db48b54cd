"Metrics, claims, tables and figures of a run."
import json

import numpy as np
import pandas as pd
import pytest

from dinocls.kit import figures
from dinocls.kit.config import preset


@pytest.fixture
def cfg(tmp_path): return preset('smoke', out=str(tmp_path))


def test_metrics_come_back(cfg):
    rows = figures.write_metrics(cfg, '05_phase1', [figures.metric('accuracy', 0.5, n=10, seed=1)])
    assert figures.read_metrics(cfg) == rows and rows[0]['run'] == cfg.folder.name


def test_a_history_is_a_line_of_json_per_epoch(cfg):
    figures.write_history(cfg, '05_phase1', [{'epoch': 1, 'loss': 0.5}, {'epoch': 2, 'loss': np.float32('nan')}])
    lines = (cfg.folder/'05_phase1'/'history.jsonl').read_text().splitlines()
    assert json.loads(lines[1]) == {'epoch': 2, 'loss': None}


def test_claims_hold_or_not_or_cannot_be_told(cfg):
    shown = figures.write_findings(cfg, '05_phase1', 'It does.', [
        figures.claim('the head has learned something', np.bool_(True), '96 % of 360, chance is 10 %'),
        figures.claim('phase 2 does no harm', False, '−2 images of 360'),
        figures.claim('it is real', None, 'one seed')])
    assert figures.read_claims(cfg) == {'05_phase1': shown['claims']}
    assert [line[:3] for line in shown._repr_markdown_().splitlines()[2:]] == ['- ✓', '- ✗', '- ?']


def test_findings_answer_first_and_carry_their_claims(cfg):
    told = [figures.claim('phase 2 does no harm', True, '+12 images of 900')]
    found = figures.write_findings(cfg, '06_phase2', 'Yes, by 3 points.', told, 'ways', 'Bars', change='more labels')
    assert figures.read_findings(cfg) == {'06_phase2': found} and figures.read_claims(cfg) == {'06_phase2': told}
    shown = found._repr_markdown_()
    assert found.summary('06_phase2') == '**Yes, by 3 points.**\n\n![Bars](06_phase2/ways.png)' and '![' not in shown
    assert shown.splitlines()[0] == '**Yes, by 3 points.**' and '- ✓ phase 2' in shown
    assert 'can\'t tell' not in shown and 'more labels' in shown and 'by 3 points' not in found.reasons()


def test_a_figure_says_what_it_shows_and_lines_are_drawn_as_vectors_too(cfg):
    import matplotlib.pyplot as plt
    from PIL import Image
    for name, part in (('line', 'plot'), ('picture', 'imshow')):
        fig, ax = figures.subplots(size=(3, 2))
        getattr(ax, part)([[1, 2], [3, 4]])
        figures.save_figure(cfg, '05_phase1', name, figures.headline(fig, 'It rises'), alt='A line from 1 to 4')
        plt.close(fig)
        with Image.open(cfg.folder/'05_phase1'/f'{name}.png') as png:
            assert (png.info['Title'], png.info['Description']) == ('It rises', 'A line from 1 to 4')
    assert [p.name for p in (cfg.folder/'05_phase1').glob('*.svg')] == ['line.svg']


def test_a_figure_and_a_table_change_only_with_their_result(cfg):
    import matplotlib.pyplot as plt
    def draw():
        fig, ax = figures.subplots(size=(3, 2))
        ax.plot([1, 2], [3, 4])
        figures.save_figure(cfg, '05_phase1', 'line', figures.headline(fig, 'It rises'))
        plt.close(fig)
        figures.save_table(cfg, '05_phase1', 'table', pd.DataFrame({'a': [1.5]}))
        return [(cfg.folder/'05_phase1'/name).read_bytes() for name in ('line.png', 'table.csv', 'line.svg')]
    assert draw() == draw()
    assert draw()[1] == b'a\n1.5\n'


def test_ten_classes_and_more_have_looks_that_can_be_told_apart():
    looks = [(look['color'], look['marker']) for look in figures.class_looks(40)]
    assert len(set(looks)) == 40 and len({colour for colour, _ in looks[:10]}) == 10


def test_a_diagram_has_its_boxes_in_place_and_says_what_is_frozen():
    import matplotlib.pyplot as plt
    fig = figures.diagram({'backbone': (0, 0, 'frozen'), 'head': (1, 0, 'learns'), 'logits': (2, 1, 'result')},
                          [('backbone', 'head', 'embedding'), ('head', 'logits')], title='Only the head learns')
    written = {t.get_text(): t.get_position() for t in fig.axes[0].texts}
    assert written['backbone'] == (0, 0) and written['logits'] == (2, -1) and 'embedding' in written
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['frozen', 'learns']
    plt.close(fig)


def test_minus_and_percent_signs_are_set_as_in_print_and_rates_keep_their_hyphen(cfg):
    assert figures.proper('-1.4 to +0.2 (-.5, 1e-2, 5-8, x-1)') == '−1.4 to +0.2 (-.5, 1e-2, 5-8, x-1)'
    assert figures.proper('93% of 5 %') == '93 % of 5 %'
    told = [figures.claim('It costs -1 point', False, '-1.0 (-2.0 to -0.1)')]
    found = figures.write_findings(cfg, '05_phase1', 'By -1 point.', told, 'a-1')
    assert found['answer'] == 'By −1 point.' and found['claims'][0]['evidence'] == '−1.0 (−2.0 to −0.1)'
    assert found['figure'] == 'a-1' and found['claims'][0]['holds'] is False


def test_nothing_is_cut_off_at_the_edge_of_a_figure(cfg):
    import matplotlib.pyplot as plt
    from PIL import Image
    fig, ax = figures.subplots(size=(3, 2))
    fig.text(0.9, 0.5, 'over the edge of the figure')
    figures.save_figure(cfg, '05_phase1', 'wide', fig)
    plt.close(fig)
    with Image.open(cfg.folder/'05_phase1'/'wide.png') as png: assert png.width > 400


def test_few_colours_keep_what_is_rare():
    from PIL import Image
    rng = np.random.default_rng(0)
    x = np.repeat(rng.integers(100, 140, (200, 200, 1)), 3, 2) + rng.integers(0, 12, (200, 200, 3))  # greys, nearly
    x[:4, :4] = (255, 0, 0)
    x[4:8, :4] = (0, 255, 0)
    few = figures.few_colours(Image.fromarray(x.astype(np.uint8)))
    assert len(few.getcolors()) <= 256
    off = np.abs(np.asarray(few.convert('RGB')).astype(int) - x).max(2)
    assert off[:8, :4].max() <= 8 and off.max() <= 24


def test_without_a_reader_the_first_choices_are_drawn():
    assert not figures.has_reader()
    assert figures.interact(lambda a, b: (a, b), a=[('one', 1), ('two', 2)], b=[('three', 3)]) == (1, 3)
