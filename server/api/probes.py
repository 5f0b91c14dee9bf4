"""What orchestrators ask: is it alive, is it ready, how is it doing."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from adapters.errors import AdapterUnavailable
from server import metric_totals
from server.api.processes import METRICS
from server.api.spec import ChorusSpec


class ProbeRoutes:
    """GET /health, /ready and /metrics; open without a key."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec
        self._thread = ThreadPoolExecutor(1, "ready")  # of its own: slow reads elsewhere don't make us look unready

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("GET", "/health", self.health)
        self._spec.route("GET", "/ready", self.ready)
        self._spec.route("GET", "/metrics", self.metrics)

    async def health(self) -> Response:
        """200 while the worker answers, 503 while it is down or hangs."""
        if self._spec.link is not None and self._spec.link.up:
            return Response()
        return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)

    async def ready(self) -> Response:
        """200 when requests are taken, else 503 with what is missing."""
        if self._spec.link is None or not self._spec.link.up:
            missing = "the inference worker does not answer (starting or restarting)"
            return JSONResponse({"ready": False, "missing": [missing]}, 503, {"Retry-After": "2"})
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._spec.state.store.check)
        except AdapterUnavailable as error:
            return JSONResponse({"ready": False, "missing": [str(error)]}, 503, {"Retry-After": "2"})
        return JSONResponse({"ready": True, "missing": []})

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        metrics, peers = self._spec.state.metrics, self._spec.peers
        text = metrics.render() if peers.alone else metric_totals.render(metrics, await peers.ask(METRICS))
        return Response(text, media_type=CONTENT_TYPE_LATEST)
