"""The OpenAI dialect; so far GET /v1/models."""

import asyncio
from typing import Any

from server.api.spec import ChorusSpec


class OpenAIRoutes:
    """The dialect's handlers over one spec."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("GET", "/v1/models", self.models)

    async def models(self) -> dict[str, Any]:
        """The base first, then every adapter that can be served and every alias, by name."""
        state = self._spec.state
        base, longest = state.model_name, state.max_model_len
        cards = [_card(base, None, state.created, longest)]
        judged = {} if self._spec.link is None else self._spec.link.residency
        for entry in await asyncio.to_thread(state.store.servable):
            if judged.get(entry.value or "", ("", None))[0] == "refused":
                continue  # by the engine: of its golden prompts, say
            cards.append(_card(entry.name, base, entry.created, longest))
        return {"object": "list", "data": cards}


def _card(name: str, base: str | None, created: float, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "chorus",
        "root": base or name,
        "parent": base,
        "max_model_len": max_model_len,
        "permission": [],
    }
