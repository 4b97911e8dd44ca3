"""A served model as tests call it."""

import asyncio
import contextlib

import httpx

from laserrec.server.app import make_app
from laserrec.server.service import Service
from laserrec.server.settings import Limits

NEW = {"item_id": "new 1/a", "title": "steel drill 99", "brand": "redco", "category": None}


class Client:
    """Synchronous calls into the ASGI application, several at once with `together`."""

    def __init__(self, service, token=None):
        self.service, self.app = service, make_app(service, token)

    def together(self, *requests, headers=None):
        async def run():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return await asyncio.gather(*(client.request(m, u, **more) for m, u, more in requests))

        return asyncio.run(run())

    def __call__(self, method, url, headers=None, **more):
        return self.together((method, url, more), headers=headers)[0]

    def recommend(self, history, **more):
        return self("POST", "/v1/recommend", json={"history": history, **more})


@contextlib.contextmanager
def served(folder, state, token=None, **limits):
    with Service.opened(folder, state, Limits(**limits)) as service:
        yield Client(service, token)


def ids(answer):
    return [item["item_id"] for item in answer.json()["items"]]
