"The connections of the service: no more than there is room for, and none that keeps it waiting for long."
import asyncio
import contextlib
import math

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    "Speaks HTTP with a client, and hangs up where it is the client's turn for too long."
    timer, since = None, 0.0

    @property
    def waits(self) -> bool:
        "Whether it is the client's turn: to begin, to go on with a body, or to ask again."
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def expect(self, seconds: float, cycle):
        "Hang up after some seconds if no other request than this has begun by then."
        if self.timer: self.timer.cancel()
        self.since = self.loop.time()
        self.timer = self.loop.call_later(seconds, lambda: self.cycle is cycle and self.transport.abort())

    def connection_made(self, transport):
        super().connection_made(transport)
        self.expect(self.config.timeout_keep_alive, None)

    def on_response_complete(self):
        before = self.cycle
        super().on_response_complete()
        self.expect(self.config.timeout_keep_alive, before)

    def pause_writing(self):  # the client does not read
        super().pause_writing()
        self.stuck = self.loop.call_later(self.config.timeout_keep_alive, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stuck.cancel()

    def connection_lost(self, exc):
        self.timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    "Serves an app of `create_app` on a socket that listens."
    def __init__(self, app, listener):
        self.service, self.listener = app.state.service, listener
        limits, self.most = self.service.limits, self.service.limits.max_connections
        with contextlib.suppress(ImportError):  # Windows
            import resource
            self.most = min(self.most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        super().__init__(uvicorn.Config(
            app, http=Connection, ws='none', lifespan='on', log_level='error', access_log=False, server_header=False,
            timeout_keep_alive=limits.idle_seconds, timeout_graceful_shutdown=math.ceil(2 * limits.timeout) + 5))

    async def accept(self):
        """Let clients in one by one. While the service is full only few come in, to be told so: the others wait where
        they cost nothing."""
        loop, there = asyncio.get_running_loop(), self.server_state.connections
        self.listener.setblocking(False)
        while True:
            await asyncio.sleep(0.01 if self.service.batcher.full() else 0)
            while len(there) >= self.most:
                waiting = [c for c in there if c.waits]
                if waiting: min(waiting, key=lambda c: c.since).transport.abort()
                await asyncio.sleep(0 if waiting else 0.01)
            try:
                client, _ = await loop.sock_accept(self.listener)
                await loop.connect_accepted_socket(
                    lambda: Connection(self.config, self.server_state, self.lifespan.state), client)
            except OSError: await asyncio.sleep(0.1)  # gone already, or no file is left

    async def startup(self, sockets=None):
        await super().startup([])
        self.accepting = asyncio.create_task(self.accept())

    def handle_exit(self, *args):
        "Let nobody in any more."
        self.service.batcher.closing = True
        super().handle_exit(*args)

    async def shutdown(self, sockets=None):
        self.accepting.cancel()
        self.listener.close()
        await super().shutdown()
