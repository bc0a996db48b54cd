"A study on a cluster: Ray and Dask, with a shared run folder and without one, and with a worker that is lost."
import concurrent.futures
import contextlib
import dataclasses
import importlib
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import pytest
from conftest import ROOT, wait

from dinocls.data import splits
from dinocls.kit import cluster as cluster_of, stage
from dinocls.kit.cluster import knock, store_results, work
from dinocls.kit.config import preset
from dinocls.kit.files import UserError
from dinocls.kit.parallel import run_stages
from dinocls.kit.stage import code_digests, open_run, variant
from dinocls.phase1 import phase1_logits

STUDY = '''
import os, time
from pathlib import Path
from dinocls.kit import cluster
from dinocls.kit.files import UserError
from dinocls.kit.stage import stage
from dinocls.phase1 import phase1_logits

HERE = Path(__file__).parent
if (HERE/'apart').exists(): cluster.is_shared = lambda sign: False  # as on a machine that does not see the run folder

def wait_for(what):
    end = time.time() + 120
    while not what():
        if time.time() > end: raise UserError('It did not come.')
        time.sleep(0.05)

@stage
def trained(cfg, folder):
    "Train the head. Seeds 1 and 2 wait for each other; seed 1 waits then until its process is killed; 3 fails."
    attempts = len([*HERE.glob(f'{cfg.seed}-*.pid')])
    (HERE/f'{cfg.seed}-{attempts}.pid').write_text(f'{os.getpid()}')
    if cfg.seed == 3: raise UserError('Three is not wanted.')
    if cfg.seed in (1, 2): wait_for((HERE/f'{3 - cfg.seed}-0.pid').exists)
    logits = phase1_logits(cfg)['test_logits']
    if cfg.seed == 1 and not attempts:
        (HERE/'ready').touch()
        wait_for(lambda: False)
    return {'logits': logits, 'attempts': attempts + 1, 'process': os.getpid()}
'''


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A stage in a module of its own, which workers can import."
    (tmp_path/'study.py').write_text(STUDY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{tmp_path}')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield importlib.import_module('study').trained
    stage.STAGES.pop('trained', None)
    sys.modules.pop('study')


@pytest.fixture
def cluster(request, study, monkeypatch):
    "Two workers, each with room for one stage; return how one of them is lost, given the process that works there."
    yield from {'ray': ray_cluster, 'dask': dask_cluster}[request.param](monkeypatch)


def ray_cluster(monkeypatch):
    pytest.importorskip('ray', reason='Ray is not installed')
    from ray.cluster_utils import Cluster
    monkeypatch.setenv('RAY_worker_niceness', '0')  # else whatever runs beside the test takes all the time
    made = Cluster(initialize_head=True, head_node_args={'num_cpus': 0, 'include_dashboard': False})
    monkeypatch.setenv('RAY_ADDRESS', made.address)
    nodes = [made.add_node(num_cpus=1, wait=False) for _ in range(2)]

    def lose(pid: int):
        parent = psutil.Process(pid).ppid()
        made.remove_node(next(n for n in nodes if n.all_processes['raylet'][0].process.pid == parent),
                         allow_graceful=False)

    made.wait_for_nodes(120)
    yield lose
    made.shutdown()



def dask_cluster(monkeypatch):
    dask = pytest.importorskip('dask', reason='Dask is not installed')
    pytest.importorskip('distributed', reason='Dask is not installed')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    def start(*command): return subprocess.Popen([sys.executable, '-m', 'dask', *command], stderr=subprocess.DEVNULL)
    address = f'tcp://127.0.0.1:{port}'
    processes = [start('scheduler', '--host', '127.0.0.1', '--port', str(port), '--no-dashboard')]
    processes += [start('worker', address, '--nthreads', '1', '--no-nanny', '--no-dashboard') for _ in range(2)]
    with dask.config.set({'scheduler-address': address}): yield lambda pid: os.kill(pid, signal.SIGKILL)
    for p in processes: p.kill(), p.wait()


@pytest.fixture
def cfgs(tmp_path, request):
    cfg = preset('smoke', out=tmp_path/'run', precision='fp32', cluster=request.node.callspec.params['cluster'])
    return {s: variant(cfg, seed=s) for s in range(4)}


@pytest.mark.slow  # it starts processes
@pytest.mark.parametrize('cluster', ['ray', 'dask'], indirect=True)
@pytest.mark.parametrize('shared', [True, False])
def test_a_lost_workers_stage_is_started_again_with_the_same_numbers(study, cluster, cfgs, tmp_path, shared):
    if not shared: (tmp_path/'apart').touch()
    def lose():
        wait((tmp_path/'ready').exists, 120)
        cluster(int((tmp_path/'1-0.pid').read_text()))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lost = pool.submit(lose)
        with pytest.raises(UserError) as e: run_stages(study, list(cfgs.values()))
        lost.result()
    assert str(e.value) == ('trained failed for 1 of 4 configurations, the others are stored: '
                            'seed=3: Three is not wanted.')
    zero, one, two = (study.find(cfgs[s])[0] for s in range(3))
    assert [r['attempts'] for r in (zero, one, two)] == [1, 2, 1]
    assert one['process'] == two['process'] != os.getpid()  # the worker that is left
    alone = [phase1_logits(dataclasses.replace(cfgs[s], out=str(tmp_path/'alone'), cluster='none')) for s in range(3)]
    for far, near in zip((zero, one, two), alone): assert np.array_equal(far['logits'], near['test_logits'])
    assert all(phase1_logits.is_done(cfgs[s]) for s in range(3))  # what they rest on came home, too


def test_results_come_home_from_a_worker_that_does_not_see_the_run_folder(study, tmp_path):
    cfg = preset('smoke', out=tmp_path/'run', seed=4)
    sent, nowhere = dataclasses.replace(cfg, out='nowhere'), str(tmp_path/'no file')
    code = code_digests(phase1_logits)
    assert work('dinocls.phase1', 'phase1_logits', sent, code, nowhere, None) == ('', {})  # known results come first
    why, files = work('dinocls.phase1', 'phase1_logits', sent, code, nowhere, {})
    assert not why and {name.rpartition('-')[0] for name in files} >= {'splits', 'phase1', 'phase1_logits'}
    store_results(open_run(cfg), files)
    home, alone = phase1_logits.find(cfg)[0], phase1_logits(dataclasses.replace(cfg, out=str(tmp_path/'alone')))
    assert np.array_equal(home['test_logits'], alone['test_logits'])
    before = {name: files.pop(name) for name in list(files) if not name.startswith('phase1_logits')}
    assert work('dinocls.phase1', 'phase1_logits', sent, code, nowhere, before)[1].keys() == files.keys()
    (home.folder/'arrays.npz').write_bytes(b'damaged')
    assert not phase1_logits.is_done(cfg)
    store_results(cfg.folder, files)
    assert phase1_logits.is_done(cfg) and not [*cfg.folder.glob('stages/*/.*'), *cfg.folder.glob('stages/*.partial')]


def test_a_study_may_vary_what_its_run_was_opened_with(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def one_worker(cfg):
        with concurrent.futures.ThreadPoolExecutor(1) as pool: yield lambda *job: pool.submit(work, *job)
    monkeypatch.setattr(cluster_of, '_ray', one_worker)
    cfg = preset('smoke', out=tmp_path/'run', cluster='ray')
    open_run(cfg)
    found = run_stages(splits, [variant(cfg, split_seed=s) for s in (7, 8)])
    assert not np.array_equal(*(f['train'] for f in found))


def test_a_worker_with_other_code_says_so(tmp_path):
    code = code_digests(phase1_logits) | {'phase1': 'another'}
    cfg = preset('smoke', out=tmp_path/'run')
    why, files = work('dinocls.phase1', 'phase1_logits', cfg, code, str(tmp_path), None)
    assert why.endswith('has other code of phase1: install the same there') and not files


@pytest.mark.parametrize('cluster, library', [('ray', 'ray'), ('dask', 'distributed')])
def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch, cluster, library):
    monkeypatch.setitem(sys.modules, library, None)
    cfg = preset('smoke', out=tmp_path/'run', cluster=cluster)
    with pytest.raises(UserError, match=rf"needs {library}: `pip install '.\[{cluster}\]'"):
        run_stages(phase1_logits, [cfg])


def test_without_a_cluster_of_ray_it_says_how_to_name_one(tmp_path, monkeypatch):
    def init(**_): raise ConnectionError('nobody is there')
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.setattr(pytest.importorskip('ray', reason='Ray is not installed'), 'init', init)
    with pytest.raises(UserError, match=r'No cluster of Ray can be used \(nobody is there\): start one by'):
        run_stages(phase1_logits, [preset('smoke', out=tmp_path/'run', cluster='ray')])


@pytest.mark.parametrize('scheme', ['', 'ray://'])
def test_where_nobody_listens_ray_is_not_asked(monkeypatch, tmp_path, scheme):
    with socket.create_server(('127.0.0.1', 0)) as there:
        address = f'{scheme}127.0.0.1:{there.getsockname()[1]}'
        knock(address), knock('auto')
    with pytest.raises(UserError, match=rf'No cluster of Ray answers at {address} \(Connection refused\): see'):
        knock(address)
    pytest.importorskip('ray', reason='Ray is not installed')
    monkeypatch.setenv('RAY_ADDRESS', address)
    with pytest.raises(UserError, match='No cluster of Ray answers'):
        run_stages(phase1_logits, [preset('smoke', out=tmp_path/'run', cluster='ray')])


@pytest.mark.parametrize('address, said', [('', 'Which cluster of Dask'), ('nowhere', 'at nowhere does not answer')])
def test_without_a_cluster_of_dask_it_says_how_to_name_one(tmp_path, monkeypatch, address, said):
    pytest.importorskip('distributed', reason='Dask is not installed')
    monkeypatch.setitem(importlib.import_module('dask').config.config, 'scheduler-address', address)
    with pytest.raises(UserError, match=said):
        run_stages(phase1_logits, [preset('smoke', out=tmp_path/'run', cluster='dask')])
