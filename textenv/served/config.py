"""Settings of a sampler behind a URL."""

from dataclasses import dataclass

from textenv.served.sampler import ServedSampler
from textenv.settings import Positive


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Who generates the responses of training; see docs/scale.md."""

    sampler_url: str | None = None
    """A vLLM or SGLang server that generates the responses, like http://127.0.0.1:8000; None generates them here."""
    sampler_update: str | None = None
    """How the server gets the policy's weights before each batch: "vllm-lora" (needs lora_rank), "sglang-disk", or
    "module:callable", which is called with their folder. None leaves it the weights that it has."""
    sampler_folder: str | None = None
    """Folder for those weights, on a disk that the server sees under the same path; None: a temporary one."""
    sampler_timeout: Positive = 600.0
    """Seconds in which the server must have answered a request."""
    sampler_token_variable: str | None = None
    """Environment variable with the server's bearer token; None sends no token."""

    def sampler(self) -> ServedSampler | None:
        """The server, or None without a URL. ValueError: the URL or the way of the weights is impossible."""
        if self.sampler_url is None:
            if self.sampler_update is not None:
                raise ValueError(f"sampler_update needs sampler_url, got {self.sampler_update!r} alone. Give both.")
            return None
        where = {"update": self.sampler_update, "folder": self.sampler_folder}
        how = {"timeout": self.sampler_timeout, "token_variable": self.sampler_token_variable}
        return ServedSampler(self.sampler_url, **where, **how)
