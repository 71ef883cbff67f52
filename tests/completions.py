"""A small server of completions around a real model, as vLLM and SGLang answer, for tests of what asks them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from textenv.lm import TokenRule, load_language_model, pad_left, sample_responses
from textenv.lm.adapters import adapter_base


class CompletionServer(ThreadingHTTPServer):
    """Serves ``lm`` on 127.0.0.1; adapters and weights are loaded from folders on request.

    ``answer`` may change what is sent (a dict) or replace it (bytes, or a status).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, lm, answer=lambda completion: completion):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base = self.only = lm
        self.named: dict = {}
        self.answer, self.seen, self.lock = answer, [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path):
        return [body for place, body in self.seen if place == path]

    def reply(self, path, body):
        self.seen.append((path, body))
        if path == "/v1/load_lora_adapter":
            self.named[body["lora_name"]] = load_language_model(body["lora_path"], base=self.base)
            return b"Success"
        if path == "/v1/unload_lora_adapter":
            del self.named[body["lora_name"]]
            return b"Success"
        if path == "/update_weights_from_disk":
            if adapter_base(body["model_path"]) is not None:
                return {"success": False, "message": "an adapter"}
            self.only = load_language_model(body["model_path"])
            return {"success": True, "message": "loaded"}
        assert path == "/v1/completions"
        return self.answer(complete(self.named[body["model"]] if "model" in body else self.only, body))


def complete(lm, body):
    """One completion, drawn by ``sample_responses`` with the seed of the request."""
    stops, greedy = body["stop_token_ids"], body["temperature"] == 0
    rule = TokenRule(temperature=body["temperature"] or 1.0, min_new_tokens=body["min_tokens"], stop_ids=tuple(stops))
    how = {"greedy": True} if greedy else {"generator": torch.Generator().manual_seed(body["seed"])}
    how |= {"max_new_tokens": body["max_tokens"], "rule": rule, "pad_id": 0}
    drawn = sample_responses(lm.model, *pad_left([body["prompt"]], 0), **how)
    length = int(drawn.response_lengths[0])
    ids = drawn.response_ids[0, :length].tolist()
    choice = {"index": 0, "text": "", "token_ids": ids, "finish_reason": "stop" if ids[-1] in stops else "length"}
    return {"choices": [{**choice, "logprobs": {"token_logprobs": drawn.logprobs[0, :length].tolist()}}]}


class _Handler(BaseHTTPRequestHandler):
    server: CompletionServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            answer = self.server.reply(self.path, body)
        status, answer = (answer, b"as asked") if isinstance(answer, int) else (200, answer)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass
