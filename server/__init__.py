"""The inference server: HTTP (`server.api`) over a continuously batched engine (`server.engine`)."""
