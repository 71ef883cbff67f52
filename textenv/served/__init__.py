"""Responses that a server generates (vLLM, SGLang): for policies beyond one machine, or faster than transformers.

The server draws tokens, nothing more. Log-probabilities and values are computed here, by the policy that learns, and
the server's log-probabilities are only compared with them.
"""
