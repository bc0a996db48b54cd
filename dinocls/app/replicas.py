"""The service in several processes, or on several machines: Ray Serve starts it once for each replica, shares the
requests out, and puts another in the place of one that fails."""
import asyncio
import contextlib
import gc
import logging
import math
import os
import queue
import secrets
import signal
import sys
from types import SimpleNamespace

from ..inference import ProductionModel, load_model
from ..kit.cluster import knock
from ..kit.files import UserError, explain
from ..kit.machine import cores, needing
from .service import Limits, announce, create_app

NAME, QUIET = 'dinocls', {'log_level': 'ERROR', 'enable_access_log': False}
OWN = {'RAY_USAGE_STATS_ENABLED': '0', 'RAY_AUTH_MODE': 'token', 'GRPC_VERBOSITY': 'ERROR',
       'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}  # whatever the system: Ray's ports are open to this machine alone


def prepare(replicas: int, device: str):
    """Make this process ready for Ray, and give it a replica's threads, so that the backend that is the fastest here is
    so there. Raise `UserError` for what can be refused before there is a model or a cluster."""
    import torch
    if ':' in device: raise UserError(f'Ray chooses the GPU of each replica: say --device cuda instead of {device}.')
    threads = torch.get_num_threads()
    if address := os.environ.get('RAY_ADDRESS'): knock(address)
    else:
        threads = min(threads, share([{'CPU': cores()}], replicas)['num_cpus'])
        os.environ.update({**OWN, 'RAY_AUTH_TOKEN': secrets.token_hex(32)} | os.environ)  # before Ray is imported
    with needing('ray', 'A service of several replicas'): from ray import serve  # noqa: F401
    with needing('serve', 'The service'): import python_multipart  # noqa: F401
    torch.set_num_threads(threads)


def share(nodes: list, replicas: int, gpu: bool = False) -> dict:  # resources of each; num_cpus, num_gpus
    "Return what each replica gets, as much as lets all find a place. Raise `UserError` if there are too many."
    nodes = [n for n in nodes if gpu and n.get('GPU')] or nodes
    gpus = int(sum(n.get('GPU', 0) for n in nodes)) if gpu else 0
    each = -(-replicas // gpus) if gpus else 0  # replicas to a GPU
    for cpus in range(int(max(n['CPU'] for n in nodes)), 0, -1):
        places = (min(n['CPU'] // cpus, n['GPU'] * each if gpus else replicas) for n in nodes)
        if sum(places) >= replicas: return {'num_cpus': cpus, 'num_gpus': 1 / each if gpus else 0}
    raise UserError(f'--replicas {replicas} are more than there are cores ({sum(int(n["CPU"]) for n in nodes)}): '
                    'each needs one for itself.')


def merge(found: list) -> list:  # (replica, its metrics)
    "Return the metrics of all replicas as one list; each number says whose it is."
    merged = {}
    for replica, metrics in found:
        for m in metrics:
            m.samples = [s._replace(labels=s.labels | {'replica': replica}) for s in m.samples]
            if m.name in merged: merged[m.name].samples += m.samples
            else: merged[m.name] = m
    return list(merged.values())


class Kept:
    "Middleware that ends what was begun; else, where a client leaves, Ray ends the request and with it its reader."
    def __init__(self, app): self.app, self.running = app, set()

    async def __call__(self, *of):
        self.running.add(task := asyncio.ensure_future(self.app(*of)))  # else it might be collected before its end
        task.add_done_callback(self.running.discard)
        await asyncio.shield(task)


def patience(limits: Limits) -> float: return 2 * limits.timeout + 5  # seconds in which a request surely ends


def application(path, replicas: int, given: dict, limits: Limits, device: str, backend: str, *how):
    "Return what Ray Serve is to run: each replica makes the service by itself, of which nothing could be sent to it."
    from prometheus_client import generate_latest
    from ray import serve

    def build():
        app = create_app(ProductionModel(path, device, backend), *how, **limits.model_dump())
        async def metrics() -> bytes:
            asked = serve.get_deployment_handle('Replica', NAME).broadcast('metrics')
            told = await asked.results_async(timeout_s=5, return_exceptions=True)
            found = merge([t for t in told if isinstance(t, tuple)])
            return generate_latest(SimpleNamespace(collect=lambda: found))
        app.state.metrics = metrics
        app.add_middleware(Kept)
        gc.collect()
        gc.freeze()  # as in `serve` of one process
        return app

    @serve.deployment(num_replicas=replicas, ray_actor_options=given, max_ongoing_requests=limits.max_connections,
                      max_queued_requests=limits.max_queue, logging_config=QUIET,
                      backpressure_config={'status_code': 429, 'retry_after_s': 1},
                      health_check_timeout_s=patience(limits), graceful_shutdown_timeout_s=patience(limits))
    @serve.ingress(build)
    class Replica:
        async def metrics(self) -> tuple:
            return serve.get_replica_context().replica_tag, list(self.app.state.service.registry.collect())

        async def check_health(self): await self.app.state.service.probe()

    return Replica.bind()


@contextlib.contextmanager
def cluster():
    "Yield the nodes of the cluster at $RAY_ADDRESS, which stays, or of one on this machine that ends with the block."
    import ray
    from ray import serve
    logging.getLogger('ray.serve').setLevel(logging.ERROR)
    address = os.environ.get('RAY_ADDRESS')
    own = {} if address else {'num_cpus': cores(), 'include_dashboard': False}
    with explain((OSError, RuntimeError, ValueError), 'Ray cannot be used', 'see $RAY_ADDRESS, or leave --replicas.'):
        ray.init(address or 'local', logging_level='ERROR', **own)
    try:
        if serve.status().proxies:
            raise UserError(f'The cluster at {address} has something to serve already: `serve shutdown` ends it.')
        try: yield [n['Resources'] for n in ray.nodes() if n['Alive'] and n['Resources'].get('CPU')]
        finally:
            if address: serve.shutdown()
    finally: ray.shutdown()


def run(path, replicas: int, device: str, backend: str, host: str, port: int, api_key: str, page: bool, names, limits):
    """Serve a model by several replicas until SIGINT or SIGTERM; SIGHUP makes them anew, one after the other, of what
    the folder holds then. Raise `UserError` for what can't be had."""
    from ray import exceptions, serve
    again = queue.SimpleQueue()
    def end(number, frame): raise SystemExit(128 + number)
    if hasattr(signal, 'SIGHUP'): signal.signal(signal.SIGHUP, lambda *_: again.put(True))  # not on Windows
    with cluster() as nodes:
        signal.signal(signal.SIGTERM, end)  # Ray has one of its own until here
        given = share(nodes, replicas, gpu=device != 'cpu')
        if 'readers' not in limits.model_fields_set:
            limits = limits.model_copy(update={'readers': min(limits.readers, given['num_cpus'])})
        def deploy():
            app = application(path, replicas, given, limits, device, backend, api_key, page, (host, *names))
            with explain((RuntimeError, exceptions.RayError), 'The replicas do not start', 'the lines above say why.'):
                serve.run(app, name=NAME, logging_config=QUIET)
        serve.start(logging_config=QUIET, http_options={
            'host': host, 'port': port, 'keep_alive_timeout_s': math.ceil(limits.idle_seconds),
            'request_timeout_s': patience(limits)})
        try:
            deploy()
            announce(host, port, page, api_key)
            while again.get():
                print('The replicas are made anew.', flush=True)
                try:
                    load_model(path)
                    deploy()
                except UserError as e: print(f'The old ones stay: {e}', file=sys.stderr)
        finally:  # what was taken in is answered before the proxy goes
            with contextlib.suppress(TimeoutError, exceptions.RayError): serve.delete(NAME)
