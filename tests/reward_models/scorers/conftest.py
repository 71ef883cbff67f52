"""Servers in threads."""

import threading

import pytest


@pytest.fixture
def run():
    """Start servers in threads, and stop them in the end."""
    servers = []

    def start(server):
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
