"The service of several replicas: refusals, right answers, limits, overload, a lost replica, a restart, a clean end."
import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import psutil
import pytest
from conftest import COMMAND, ROOT, environment, refused, wait

from dinocls.kit.files import UserError
from dinocls.kit.machine import cores
from dinocls.kit.pictures import as_png

pytest.importorskip('fastapi', reason="the service is an extra: pip install '.[serve]'")
httpx = pytest.importorskip('httpx')
pytest.register_assert_rewrite('clients')
from clients import CFG, CLASSES, KIND, NOISE, PNG, alike, claims, encoded, head, serving  # noqa: E402
from PIL import Image  # noqa: E402

from dinocls.app import replicas  # noqa: E402

pytest_plugins = 'clients'
LIMITS = {'max_queue': 8, 'max_count': 8, 'max_bytes': 2**20, 'max_connections': 8, 'timeout': 60}
KEY = {'x-api-key': 'secret'}


@pytest.fixture
def ray_there(monkeypatch):
    "As if Ray were installed, and no cluster named."
    monkeypatch.setattr(os, 'environ', os.environ.copy())  # Ray's settings are for the command's own process
    monkeypatch.setitem(sys.modules, 'ray', types.SimpleNamespace(serve=None))
    monkeypatch.setattr(replicas, 'cores', lambda: 4)
    monkeypatch.delenv('RAY_ADDRESS', raising=False)


def test_without_ray_it_says_what_to_install(ray_there, monkeypatch, in_process, saved):
    monkeypatch.setitem(sys.modules, 'ray', None)
    refused(in_process('serve', saved, '--replicas', 2, '--port', 0),
            "several replicas needs ray: `pip install '.[ray]'")


def test_what_cannot_be_is_refused_before_anything_begins(ray_there, monkeypatch, in_process, saved, tmp_path):
    def two(*more, replicas=2): return in_process('serve', '--replicas', replicas, '--port', 0, *more)
    refused(two(saved, replicas=5), '--replicas 5 are more than there are cores (4)')
    refused(two(saved, '--device', 'cuda:1'), 'say --device cuda instead of cuda:1')
    refused(two(saved, '--limit', 'max_queue=0'), 'max_queue=0 of the service: it must be above 0')
    refused(two(tmp_path/'none'), 'no production folder')
    assert two(saved, replicas=0).returncode == 2
    with socket.create_server(('127.0.0.1', 0)) as taken:
        refused(two(saved, '--port', taken.getsockname()[1]), 'Cannot listen on 127.0.0.1')
        monkeypatch.setenv('RAY_ADDRESS', f'127.0.0.1:{taken.getsockname()[1]}')
        replicas.prepare(2, 'auto')  # somebody listens there
    refused(two(saved), 'No cluster of Ray answers at 127.0.0.1')


@pytest.mark.parametrize('nodes, n, gpu, each', [
    ([(8, 0)], 2, False, (4, 0)), ([(8, 0)], 3, False, (2, 0)), ([(8, 0)], 8, True, (1, 0)),
    ([(2, 0), (2, 0), (2, 0)], 2, False, (2, 0)), ([(2, 0), (9, 0)], 4, False, (2, 0)),
    ([(8, 1)], 4, True, (2, 1 / 4)), ([(8, 2)], 3, True, (2, 1 / 2)), ([(64, 0), (8, 2)], 2, True, (4, 1)),
    ([(32, 1), (8, 4)], 5, True, (2, 1)), ([(8, 1)], 2, False, (4, 0))])
def test_cores_and_gpus_are_shared_out(nodes, n, gpu, each):
    nodes = [{'CPU': float(cpus)} | ({'GPU': float(gpus)} if gpus else {}) for cpus, gpus in nodes]
    assert replicas.share(nodes, n, gpu) == {'num_cpus': each[0], 'num_gpus': each[1]}


def test_more_replicas_than_cores_of_all_nodes_are_refused():
    with pytest.raises(UserError, match=r'--replicas 5 are more than there are cores \(4\)'):
        replicas.share([{'CPU': 2.0}, {'CPU': 2.0}], 5)


def test_metrics_of_all_replicas_are_one_list():
    from prometheus_client import CollectorRegistry, Counter, generate_latest
    def counted(n):
        registry = CollectorRegistry()
        Counter('asked', 'Questions', ['path'], registry=registry).labels('/x').inc(n)
        return list(registry.collect())
    merged = replicas.merge([('a', counted(1)), ('b', counted(2))])
    text = generate_latest(types.SimpleNamespace(collect=lambda: merged)).decode()
    assert text.count('# TYPE asked_total counter') == 1
    assert 'asked_total{path="/x",replica="a"} 1.0\n' in text and 'asked_total{path="/x",replica="b"} 2.0\n' in text


def test_a_model_that_fails_is_not_healthy(model):
    class Broken:
        left = 1  # answers
        def __getattr__(self, name): return getattr(model, name)
        def answers(self, pixels):
            self.left -= 1
            if self.left < 0: raise RuntimeError('broken')
            return model.answers(pixels)
    for made, healthy in ((model, True), (Broken(), False)):
        with serving(made) as client:
            probe = client.app.state.service.probe
            with contextlib.nullcontext() if healthy else pytest.raises(Exception, match='could not answer'):
                client.portal.call(probe)


# --- with Ray itself


class Command:
    "`dinocls serve` with two replicas, in a process of its own."
    def __init__(self, folder, log, *options, **env):
        pytest.importorskip('ray.serve', reason="Ray Serve is not installed: pip install '.[ray]'")
        if cores() < 2: pytest.skip('two replicas need two cores')
        limits = [f'--limit={k}={v}' for k, v in LIMITS.items()]
        self.log, clean = log, environment(OMP_NUM_THREADS=1, DINOCLS_API_KEY='secret', **env)
        with open(log, 'w') as out:
            self.process = subprocess.Popen(
                [COMMAND, 'serve', str(folder), '--replicas', '2', '--port', '0', '--device', 'cpu', '--no-page',
                 '--backend', 'torch', *limits, *options], stdout=out, stderr=out, cwd=ROOT, env=clean)
        wait(lambda: self.process.poll() is not None or 'answers;' in log.read_text(), 400)
        self.url = re.search(r'http://127.0.0.1:\d+(?= answers)', log.read_text())[0]

    def replicas(self) -> set:
        "Return the processes of the replicas."
        found = set()
        for p in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if 'ServeReplica:dinocls' in ''.join(p.cmdline()): found.add(p.pid)
        return found

    def predict(self, data=PNG, **more):
        return httpx.post(self.url + '/predict', content=data, headers=KIND | KEY, timeout=60, **more)

    def end(self, how=signal.SIGTERM) -> int:
        "End it, and return its status."
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        return self.process.wait(200)

    def __enter__(self): return self

    def __exit__(self, *error):
        if self.process.poll() is None: self.end(signal.SIGINT)


@pytest.fixture(scope='module')
def service(saved, tmp_path_factory):
    "The command, and the folder that it serves."
    place = tmp_path_factory.mktemp('served')
    shutil.copytree(saved, place/'production')
    with Command(place/'production', place/'log.txt') as command: yield command, place/'production'


@contextlib.contextmanager
def asking(command, clients=4):
    "Let clients ask without a pause for the length of a block; yield the list of the answers."
    answers, over = [], threading.Event()
    def ask():
        while not over.is_set(): answers.append(command.predict())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask) for _ in range(clients)]
        try: yield answers
        finally: over.set()
        for a in asked: a.result()


@pytest.mark.slow
def test_all_replicas_answer_as_the_model_does(service, model):
    command, _ = service
    right = [model.predict(x) for x in NOISE]
    for x, expected in zip(NOISE, right): alike(command.predict(as_png(x)).json(), expected)
    form = [('files', (f'{i}.png', as_png(x))) for i, x in enumerate(NOISE[:8])]
    several = httpx.post(command.url + '/predict/batch', files=form, headers=KEY, timeout=60).json()
    for found, expected in zip(several, right, strict=False): alike(found, expected)
    text = httpx.get(command.url + '/metrics', headers=KEY).text
    counts = re.findall(r'dinocls_requests_total\{path="/predict",replica="(\w+)",status="200"\} (\d+)', text)
    assert len({name for name, _ in counts}) == 2 and sum(int(n) for _, n in counts) >= 64
    assert httpx.get(command.url + '/info', headers=KEY).json()['classes'] == CLASSES


@pytest.mark.slow
def test_refusals_are_those_of_one_process(service, model):
    command, _ = service
    with serving(model, api_key='secret', **LIMITS) as alone:
        for method, path, sent in (
                ('POST', '/predict', {'content': bytes(2**20 + 1)}), ('GET', '/predict', {}), ('GET', '/nowhere', {}),
                ('POST', '/predict', {'content': claims(9000, 9000)}), ('POST', '/predict', {'content': b'no picture'}),
                ('POST', '/predict', {'content': PNG, 'headers': KEY | {'content-type': 'text/plain'}}),
                ('POST', '/predict', {'content': PNG, 'headers': KIND}), ('OPTIONS', '/predict', {}),
                ('GET', '/healthz', {'headers': {'host': 'elsewhere.org'}}), ('GET', '/readyz', {}),
                ('GET', '/info', {'headers': KEY | {'host': 'elsewhere.org'}}),
                ('POST', '/predict/batch', {'files': [('files', ('x', b'x'))] * 9, 'headers': KEY})):
            sent = {'headers': KIND | KEY} | sent
            here = alone.request(method, path, **sent)
            there = httpx.request(method, command.url + path, timeout=60, **sent)
            assert (there.status_code, there.text) == (here.status_code, here.text), (method, path)
            assert {k: v for k, v in here.headers.items() if k != 'date'}.items() <= there.headers.items()


@pytest.mark.slow
def test_overload_is_refused_with_a_time_to_come_back(service):
    command, _ = service
    big = encoded(Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)))
    with concurrent.futures.ThreadPoolExecutor(64) as pool: found = list(pool.map(command.predict, [big] * 200))
    assert {f.status_code for f in found} == {200, 429}
    assert all(1 <= int(f.headers['retry-after']) <= 60 for f in found if f.status_code == 429)
    assert command.predict().status_code == 200


@pytest.mark.slow
def test_who_leaves_costs_no_reader_and_who_guesses_keys_is_told_from_others(service):
    command, _ = service
    big = encoded(Image.fromarray(np.zeros((5000, 5000, 3), np.uint8)))
    def readers(): return {p.pid for r in command.replicas() for p in psutil.Process(r).children()}
    before = readers()
    for _ in range(8):
        with socket.create_connection(('127.0.0.1', httpx.URL(command.url).port)) as leaving:
            leaving.sendall(head(len(big), 'X-API-Key: secret') + big)
            time.sleep(0.1)
    wait(lambda: command.predict().status_code == 200, 60)
    assert len(before) == 2 and readers() == before
    wrong = [httpx.get(command.url + '/info', headers={'x-api-key': 'wrong'}).status_code for _ in range(40)]
    assert {*wrong} == {401, 429}
    with httpx.Client(transport=httpx.HTTPTransport(local_address='127.0.0.2')) as other:
        assert {other.get(command.url + '/info', headers=KEY).status_code for _ in range(8)} == {200}
    wait(lambda: {httpx.get(command.url + '/info', headers=KEY).status_code for _ in range(8)} == {200}, 30)


@pytest.mark.slow
def test_another_takes_the_place_of_a_replica_that_was_killed(service):
    command, _ = service
    wait(lambda: len(command.replicas()) == 2, 60)
    before = command.replicas()
    with asking(command) as answers:
        os.kill(min(before), signal.SIGKILL)
        wait(lambda: len(command.replicas() - before) == 1, 200)
    assert sum(a.status_code == 200 for a in answers) > 4
    assert sum(a.status_code != 200 for a in answers) <= 8  # those that it was answering
    assert command.predict().status_code == 200


@pytest.mark.slow
def test_a_restart_brings_another_model_without_a_failed_request(service, model, tmp_path):
    import torch
    from dinocls.inference import ProductionModel, save_production
    from dinocls.model import classifier
    command, folder = service
    wait(lambda: len(command.replicas()) == 2, 200)
    before = command.replicas()
    (folder/'config.json').write_text('damaged')
    command.process.send_signal(signal.SIGHUP)
    wait(lambda: 'The old ones stay: ' in command.log.read_text(), 60)
    alike(command.predict().json(), model.predict(NOISE[0]))
    torch.manual_seed(1)
    shutil.rmtree(folder)
    other = ProductionModel(save_production(folder, classifier(CFG, 10).eval(), CFG, CLASSES, {}), 'cpu')
    with asking(command) as answers:
        command.process.send_signal(signal.SIGHUP)
        wait(lambda: len(command.replicas()) == 2 and not command.replicas() & before, 400)
        time.sleep(1)
    assert {a.status_code for a in answers} == {200}
    alike(answers[0].json(), model.predict(NOISE[0])), alike(answers[-1].json(), other.predict(NOISE[0]))


@pytest.mark.slow
def test_it_answers_what_it_took_in_and_leaves_nothing_behind(service):
    command, _ = service
    big = encoded(Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)))
    form = [('files', (f'{i}.png', big)) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, command.url + '/predict/batch', files=form, headers=KEY, timeout=60)
        held = re.compile(r'dinocls_held_pictures\{.*\} 8.0')
        wait(lambda: held.search(httpx.get(command.url + '/metrics', headers=KEY, timeout=20).text), 20)
        assert command.end() == 128 + signal.SIGTERM
        assert asked.result().status_code == 200
    assert not psutil.wait_procs(command.children, 20)[1]


@pytest.mark.slow
def test_a_cluster_of_ones_own_stays(saved, tmp_path, monkeypatch):
    cluster = pytest.importorskip('ray.cluster_utils', reason='Ray is not installed').Cluster(
        initialize_head=True, head_node_args={'num_cpus': 2, 'include_dashboard': False})
    try:
        with Command(saved, tmp_path/'log.txt', RAY_ADDRESS=cluster.address) as command:
            assert command.predict().status_code == 200
            second = subprocess.run([COMMAND, 'serve', str(saved), '--replicas', '2', '--port', '0', '-b', 'torch'],
                                    text=True, cwd=ROOT, capture_output=True,
                                    env=environment(RAY_ADDRESS=cluster.address))
            refused(second, 'has something to serve already')
            assert command.predict().status_code == 200 and command.end(signal.SIGINT) == 130
        assert all(p.is_running() for p in (psutil.Process(i.process.pid) for i in
                                            cluster.head_node.all_processes['raylet']))
    finally: cluster.shutdown()
