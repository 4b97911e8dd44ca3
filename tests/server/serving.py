"""A served model as tests call it."""

import asyncio
import contextlib

import httpx

from laserrec.server.app import LOOPBACK, make_app
from laserrec.server.service import Service
from laserrec.server.settings import Limits

NEW = {"item_id": "new 1/a", "title": "steel drill 99", "brand": "redco", "category": None}


class Client:
    """Synchronous calls into the ASGI application, several at once with `together`."""

    def __init__(self, service, token=None, hosts=LOOPBACK):
        self.service, self.app = service, make_app(service, token, hosts)

    def inside(self, calls, headers=None):
        """The result of `calls`, a coroutine function of one argument: what sends a request."""
        async def run():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return await calls(client.request)

        return asyncio.run(run())

    def together(self, *requests, headers=None):
        return self.inside(lambda call: asyncio.gather(*(call(m, u, **more) for m, u, more in requests)), headers)

    def __call__(self, method, url, headers=None, **more):
        return self.together((method, url, more), headers=headers)[0]

    def recommend(self, history, **more):
        return self("POST", "/v1/recommend", json={"history": history, **more})


@contextlib.contextmanager
def served(folder, state, token=None, hosts=LOOPBACK, **limits):
    with Service.opened(folder, state, Limits(**limits)) as service:
        yield Client(service, token, hosts)


def ids(answer):
    return [item["item_id"] for item in answer.json()["items"]]
