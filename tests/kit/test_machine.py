"The machine: what a container grants of it, and kernels that tell less."
from pathlib import Path

import psutil
import pytest

from dinocls.kit import machine


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    "Return a function that writes files of control groups, which this process is then in."
    def write(**files):
        for name, text in files.items():
            file = tmp_path/name.replace('__', '/').replace('_dot_', '.')
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    monkeypatch.setattr(machine, 'CGROUPS', tmp_path)
    monkeypatch.setattr(machine.os, 'sched_getaffinity', lambda pid: set(range(64)))
    return write


def test_a_container_of_version_2_grants_cores_and_memory(cgroup):
    assert machine.cores() == 64 and machine.memory_limit() == psutil.virtual_memory().total
    cgroup(cpu_dot_max='max 100000', memory_dot_max='max')
    assert machine.cores() == 64
    cgroup(cpu_dot_max='250000 100000', memory_dot_max=str(2**29), memory_dot_current=str(2**28))
    assert (machine.cores(), machine.memory_limit()) == (3, 2**29) and machine.memory_free() <= 2**28
    cgroup(cpu_dot_max='1000 100000')
    assert machine.cores() == 1


def test_a_container_of_version_1_does_too(cgroup):
    cgroup(cpu__cpu_dot_cfs_quota_us='-1', cpu__cpu_dot_cfs_period_us='100000')
    assert machine.cores() == 64
    cgroup(cpu__cpu_dot_cfs_quota_us='400000', memory__memory_dot_limit_in_bytes=str(2**29),
           memory__memory_dot_usage_in_bytes=str(2**29 + 1))
    assert (machine.cores(), machine.memory_limit(), machine.memory_free()) == (4, 2**29, 0)


def test_a_kernel_that_does_not_tell_the_peak(monkeypatch):
    read = Path.read_text
    assert machine.peak_memory()['resident'] > 10
    monkeypatch.setattr(Path, 'read_text', lambda self, *a, **k: 'VmRSS: 5 kB' if self.name == 'status'
                        else read(self, *a, **k))
    assert 10 < machine.peak_memory()['resident'] < 10**5
