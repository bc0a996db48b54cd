"Several configurations at once: in workers, in order, and whatever fails or is stopped takes nothing else with it."
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, environment

from dinocls.kit import config, stage
from dinocls.kit.files import UserError
from dinocls.kit.parallel import run_stages
from dinocls.kit.stage import variant

pytestmark = pytest.mark.slow  # it starts processes

TOY = '''
import os, time
from dinocls.kit.files import UserError
from dinocls.kit.stage import stage

def wait_for(what, seconds=30):
    end = time.time() + seconds
    while not what() and time.time() < end: time.sleep(0.02)
    return bool(what())

@stage
def toy(cfg, folder):
    "Seeds 1 and 2 wait for each other, 3 fails, 4 is killed, 5 sleeps."
    (cfg.folder/f'{cfg.seed}.pid').write_text(str(os.getpid()))
    if cfg.seed in (1, 2) and not wait_for((cfg.folder/f'{3 - cfg.seed}.pid').exists):
        raise UserError('The other one did not come.')
    if cfg.seed == 3: raise UserError('Three is not wanted.')
    if cfg.seed == 4: os._exit(9)
    if cfg.seed >= 5: time.sleep(60)
    return {'seed': cfg.seed, 'process': os.getpid(), 'device': cfg.device}
'''
STOPPED = '''
import toys
from dinocls.kit.config import preset
from dinocls.kit.parallel import run_stages
from dinocls.kit.stage import variant
if __name__ == '__main__':
    cfg = preset('smoke', out='run')
    run_stages(toys.toy, [variant(cfg, seed=s) for s in (5, 6)], devices=['cpu', 'cpu'])
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A stage in a module of its own, which workers can import."
    from joblib.externals.loky import get_reusable_executor
    get_reusable_executor().shutdown(wait=True)  # of earlier tests: it is dying, or does not find this module
    (tmp_path/'toys.py').write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    import toys
    yield toys.toy
    stage.STAGES.pop('toy', None)
    sys.modules.pop('toys')


@pytest.fixture
def cfgs(tmp_path):
    base = config.preset('smoke', out=tmp_path/'run', seed=0)
    return {seed: variant(base, seed=seed) for seed in range(6)}


def test_workers_compute_at_the_same_time_and_results_keep_their_order(toy, cfgs):
    # 1 and 2 end only if both are running
    two, zero, one, again = run_stages(toy, [cfgs[s] for s in (2, 0, 1, 2)], devices=['cpu', 'cpu:0'])
    assert [r['seed'] for r in (two, zero, one, again)] == [2, 0, 1, 2]
    assert (len({two['process'], one['process'], os.getpid()}) == 3
            and {two['device'], one['device']} <= {'cpu', 'cpu:0'})
    assert again.record == two.record


@pytest.mark.skipif(torch.cuda.is_available(), reason='the work would be shared among GPUs')
def test_a_device_is_shared_by_as_many_as_at_once_says(toy, cfgs):
    one, two = run_stages(toy, [variant(cfgs[s], at_once=2) for s in (1, 2)])  # they end only if both are running
    assert len({one['process'], two['process'], os.getpid()}) == 3


def test_without_several_devices_this_process_does_the_work(toy, cfgs):
    results = run_stages(toy, [variant(cfgs[s], device='cpu') for s in (0, 0)])
    assert [r['process'] for r in results] == [os.getpid()] * 2


@pytest.mark.parametrize('devices, bad', [(['cpu', 'cpu'], (3, 4)), (None, (3,))])
def test_a_failure_leaves_the_others_stored(toy, cfgs, devices, bad):
    chosen = [variant(c, device='cpu') for s, c in cfgs.items() if s in {0, *bad}][::-1]
    with pytest.raises(UserError) as e: run_stages(toy, chosen, devices)
    assert (f'toy failed for {len(bad)} of {len(chosen)}' in str(e.value)
            and 'seed=3: Three is not wanted' in str(e.value))
    if 4 in bad: assert 'seed=4: its process ended' in str(e.value)
    assert toy.is_done(cfgs[0]) and not any(toy.is_done(cfgs[s]) for s in bad)


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_first_process(tmp_path, how):
    (tmp_path/'toys.py').write_text(TOY)
    (tmp_path/'stopped.py').write_text(STOPPED)
    process = subprocess.Popen([sys.executable, 'stopped.py'], cwd=tmp_path,
                               env=environment(PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}'), stderr=subprocess.DEVNULL)
    files = [tmp_path/'run'/f'{s}.pid' for s in (5, 6)]
    end = time.time() + 60
    while not all(f.exists() and f.read_text() for f in files) and time.time() < end: time.sleep(0.05)
    pids = [int(f.read_text()) for f in files]
    assert all(psutil.pid_exists(p) for p in pids)
    process.send_signal(how)
    process.wait(20)
    end = time.time() + 10
    while any(alive(p) for p in pids) and time.time() < end: time.sleep(0.05)
    assert not any(alive(p) for p in pids)


def alive(pid: int) -> bool:
    "Tell whether a process is still running."
    try: return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False
