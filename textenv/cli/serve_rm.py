"""``textenv serve-rm``."""

import json
import os
import secrets

import tyro

import textenv
from reward_models.serve import RewardServer
from textenv.cli.common import check_device


def serve(
    model: tyro.conf.Positional[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    token_variable: str | None = None,
) -> None:
    """Serve a reward model over HTTP until Ctrl-C. Clients name it by the JSON object that is printed.

    Args:
        model: a registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON object.
        host: address to listen at; any but this machine's own needs a token.
        port: to listen at; 0 takes a free one.
        device: where the model runs.
        token_variable: environment variable with the bearer token that clients must send; None makes one up.
    """
    check_device(device)
    token = secrets.token_urlsafe() if token_variable is None else os.environ.get(token_variable)
    if not token:
        rule = "token_variable must name an environment variable that is set"
        raise ValueError(f"{rule}, got {token_variable!r}. Export a token there.")
    with RewardServer(textenv.reward_model(model, device), host=host, port=port, token=token) as server:
        if token_variable is None:
            token_variable = "TEXTENV_RM_TOKEN"
            print(f"export {token_variable}={token}", flush=True)
        spec = json.dumps({"http": server.url, "token_variable": token_variable})
        print(f"{model} answers; its name elsewhere is {spec}", flush=True)
        server.serve_forever()
