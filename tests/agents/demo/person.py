"""A program in the place of a person at the page of the demo."""

import re
import signal
import threading

import httpx2


def rank_shortest_first(link, count):
    """Rank so many items in a thread of its own, the shortest answer first; with items left over, press Ctrl-C."""
    threading.Thread(target=_rank, args=(link, count), daemon=True).start()


def _rank(link, count):
    url, _, token = link.partition("?token=")
    with httpx2.Client(base_url=url) as client:
        client.get("/", params={"token": token})
        client.headers["X-CSRF-Token"] = re.search(r'name="csrf" content="(\w+)"', client.get("/").text)[1]
        client.post("/api/join", json={"name": "Ann"})
        for _ in range(count):
            try:
                lease = client.get("/api/next").json()
            except httpx2.TransportError:  # it was the last one, and the demo has gone on
                return
            if lease["item"] is None:
                return
            order = sorted(range(len(lease["responses"])), key=lambda i: len(lease["responses"][i]))
            request = f"request-{lease['item']}"
            client.post(f"/api/items/{lease['item']}", json={"ranking": [[i] for i in order], "request": request})
    signal.raise_signal(signal.SIGINT)
