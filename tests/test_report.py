"The report and its page: each number in them was measured by the run that they name."
import csv
import json
import re
from itertools import combinations

import jsonschema
import numpy as np
import pytest
from conftest import ROOT

from dinocls import report
from dinocls.app import site
from dinocls.kit import config, figures

RECORD, REPORTED = ROOT/site.RECORD, ROOT/'docs'/'reported.md'
METRICS = [row for file in sorted(RECORD.glob('*/metrics.json')) for row in json.loads(file.read_text())]
CLAIMS = report.listed(figures.read_claims(config.preset('quick', out=str(ROOT/'outputs'/'record-quick'))))
OLDER = 'the committed run is older than its chapters: renew it with `make record`'
UNITS = {'%': '%', 'points': 'points', '/s': '/s'}


def readme_rows(text: str) -> list[list[str]]:
    "Return the cells of the page's compared rows."
    block = re.search(r'<!-- begin: reported -->\n(.*?)<!-- end: reported -->', text, re.S)[1]
    return [[c.strip() for c in line.strip('|').split('|')] for line in block.splitlines() if line.startswith('| ')
            and not line.startswith('| |')]


def strangers(rows: list[list[str]], metrics: list[dict]) -> list[str]:
    "Return the measured numbers of table rows that no metric of the run has, as the report writes it."
    def known(unit):
        scale = report.SCALE.get(unit, 1)
        return {report.written(v, unit) for m in metrics if m['value'] is not None
                for v in ((m['value'] * scale, int(m['value'])) if unit == '' else (m['value'] * scale,))}
    by_unit, found = {u: known(u) for u in ('', *UNITS)}, []
    pairs = [m['value'] for m in metrics if m['metric'].startswith('pair:')]
    for item, _, measured, *_ in rows:
        unit = (re.search(r' \((%|points|/s)\)$', item) or [None, ''])[1]
        sums = {report.written(a + b, '') for a, b in combinations(pairs, 2)} if ' or ' in item else set()
        if measured != 'not run' and measured not in by_unit[unit] | sums: found.append(f'{item}: {measured}')
    return found


def test_each_number_of_the_page_is_a_metric_of_the_committed_run():
    rows = readme_rows(REPORTED.read_text())
    assert len(rows) > 50 and not strangers(rows, METRICS)


def test_a_number_that_nobody_measured_is_found():
    rows = readme_rows(REPORTED.read_text())
    i = next(i for i, r in enumerate(rows) if r[0] == 'accuracy (%)')
    assert strangers([*rows[:i], [*rows[i][:2], '99.41', *rows[i][3:]]], METRICS) == ['accuracy (%): 99.41']


def test_each_number_of_the_executed_report_is_a_metric_of_its_run():
    cells = json.loads((RECORD/'14_report.ipynb').read_text())['cells']
    shown = '\n'.join(''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', ())
                      if 'text/markdown' in o.get('data', {}))
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in shown.splitlines() if line.startswith('| ')
            and not line.startswith('| |')]
    rows = [r for r in rows if len(r) == 6]  # the claims have four columns, and evidence of their own
    with open(RECORD/'14_report'/'compared.csv', encoding='utf-8') as f: compared = [*csv.DictReader(f)]
    assert len(rows) == sum(r['measured'] != '' for r in compared) > 40 and not strangers(rows, METRICS)


def test_the_summary_names_measured_numbers():
    summary = re.search(r'<!-- begin: summary -->\n(.*?)\n<!-- end', REPORTED.read_text(), re.S)[1]
    known = {f'{100 * m["value"]:.2f}' for m in METRICS if m['value'] is not None and 0 <= m['value'] <= 1}
    shown = re.findall(r'(\d+\.\d+) % \(', summary)
    assert len(shown) == 3 and set(shown) <= known


def test_the_record_has_its_published_form():
    record = json.loads((RECORD/'experiment_results.json').read_text())
    if 'p_agrees' not in record['reported_and_measured'][0]: pytest.skip(OLDER)
    assert json.loads((RECORD/'14_report'/'experiment_results.schema.json').read_text()) == report.schema()
    jsonschema.validate(record, report.schema())
    for broken in ({'metrics': [{'chapter': 'x'}]}, {'stages': [{}]},
                   {'reported_and_measured': [{**record['reported_and_measured'][0], 'verdict': 'better'}]}):
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(record | broken, report.schema())


TOLD = {r['item']: r for r in report.reference()}


def judged(item, value, n, **more):
    return report.compared_row(TOLD[item], {'metric': TOLD[item]['metric'], 'value': value, 'n': n} | more, '')


@pytest.mark.parametrize('value, n, expected',
                         [(0.994, 10_000, 'agrees'), (0.9925, 10_000, "can't tell"), (0.98, 10_000, 'differs'),
                          (0.90, 20, "can't tell"), (0.994, 100, "can't tell")])
def test_verdicts_know_chance(value, n, expected):
    assert judged('accuracy', value, n)['verdict'] == expected


@pytest.mark.parametrize('errors, expected', [(60, 'agrees'), (30, 'differs'), (40, "can't tell")])
def test_counts_of_unlike_numbers_of_images_are_rates(errors, expected):
    assert judged('errors', errors, 10_000)['verdict'] == expected
    assert judged('errors', errors, 10_000)['low'] < errors < judged('errors', errors, 10_000)['high']


def test_what_cannot_be_told_and_what_cannot_be_compared():
    assert judged('ROC AUC', 0.99981, 10_000)['why'] == 'it has no interval'
    assert judged('ROC AUC', 0.99981, 10_000, low=0.9996, high=0.9999)['verdict'] == 'agrees'
    assert [judged(item, 0.994, n)['verdict'] for item, n in (('weighted F1', 10_000), ('cat, f1', 1000))] == [
        'agrees', "can't tell"]
    r = judged('correlation of variance and class accuracy', 0.05, 10, low=-0.6, high=0.66)
    assert r['verdict'] == "can't tell" and r['p_differs'] > 0.05 < r['p_agrees']
    assert judged('baseline: frozen backbone, val', 0.9811, 20)['verdict'] == "can't tell"
    for item in ('images per second', 'blur', 'contrast, drop', 'mean'):
        assert judged(item, 0.97, 10_000, low=0.96, high=0.98)['verdict'] == 'not comparable'
    assert judged('after phase 1, val', 0.968, 10_000)['verdict'] in ('agrees', "can't tell")
    assert judged('total parameters', 88_030_217, 0)['verdict'] == 'differs'
    assert '98.10' in report.markdown_rows([judged('baseline: frozen backbone, val', 0.9811, 20)])


def test_equal_runs_seldom_differ_and_shifted_ones_seldom_agree():
    "Made-up runs over 10,000 images beside made-up references of 5,000."
    rng, said = np.random.default_rng(0), {0: [], 0.003: []}
    for shift, verdicts in said.items():
        for _ in range(300):
            spec = TOLD['accuracy'] | {'reported': round(100 * rng.binomial(5000, 0.99) / 5000, 2)}
            row = {'metric': 'accuracy', 'value': rng.binomial(10_000, 0.99 + shift) / 10_000, 'n': 10_000}
            verdicts.append(report.compared_row(spec, row, '')['verdict'])
    assert np.mean([v == 'differs' for v in said[0]]) < 0.08 > np.mean([v == 'agrees' for v in said[0.003]])


def test_the_claims_of_the_quick_run_hold_or_cannot_be_told():
    if not CLAIMS: pytest.skip(OLDER)
    assert not [c for c in CLAIMS if c['holds'] is False]
    assert all(c['claim'].endswith('.') and re.search(r'\d', c['evidence']) for c in CLAIMS)
    assert len({c['chapter'] for c in CLAIMS}) >= 10 and sum(c['holds'] is True for c in CLAIMS) > len(CLAIMS) / 2


def test_claims_are_kept_listed_and_counted(tmp_path):
    cfg = config.preset('smoke', out=str(tmp_path))
    told = {'06_phase2': [figures.claim('It helps.', None, 'one | two'),
                          figures.claim('It moves.', np.bool_(True), '4 %')],
            '05_phase1': [figures.claim('It learns.', np.bool_(False), '9 %')]}
    for chapter, rows in told.items(): figures.write_findings(cfg, chapter, 'told', rows)
    rows = report.listed(figures.read_claims(cfg))
    assert [(r['chapter'], r['holds']) for r in rows] == [('05_phase1', False), ('06_phase2', None),
                                                          ('06_phase2', True)]
    table = report.claims_rows(rows).splitlines()
    assert [line[2] for line in table[2:]] == ['✗', '?', '✓'] and 'one \\| two' in table[3]
    assert report.tally(rows) == "1 of 3 claims hold in this run, 1 do not, and 1 can't be told."
    assert report.tally([]) == 'No chapter of this run made a claim.'
    kind = report.schema()['properties']['claims']
    jsonschema.validate(rows, kind)
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate([rows[0] | {'holds': 'yes'}], kind)
