"""A reload that the end of the server overtakes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
from fastapi import FastAPI

from helm_engine.entrypoints import admin_routes
from helm_engine.entrypoints.errors import install_error_handlers


def test_a_reload_that_is_cut_off_is_answered_with_503() -> None:
    async def cut_off() -> httpx.Response:
        begun = asyncio.Event()

        async def reload(_: object) -> None:
            begun.set()
            await asyncio.Event().wait()

        app = FastAPI()
        install_error_handlers(app)
        app.include_router(admin_routes.router)
        app.state.is_draining = False
        app.state.recommender = SimpleNamespace(fleet=SimpleNamespace(reload=reload))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asking = asyncio.create_task(client.post("/v1/admin/reload"))
            await begun.wait()
            asking.cancel()  # As uvicorn does once it has waited long enough.
            return await asking

    answer = asyncio.run(cut_off())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
