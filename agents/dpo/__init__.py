"""Direct preference optimisation: a policy learned from rankings or pairs, without a reward model.

Objective: that of a reward model (:mod:`reward_models.training.trainer`) whose score is the implicit reward

    r̂(x, y) = β h(x, y),    h(x, y) = log π(y|x) − log π_ref(y|x),

so that the policy is the best one for that score: ``π ∝ π_ref exp(r̂/β)``. A pair y_w ≻ y_l costs ``−log σ(r̂_w − r̂_l)``
(DPO), or with ``loss="ipo"`` ``(h_w − h_l − 1/(2β))²``, which is least at a finite gap even where a pair is always
labelled alike.

How this differs from the papers:

1. Rankings of K responses count as the mean over their C(K, 2) pairs. As for a reward model, tied responses are half a
   win each way, and a margin is an offset of the log-odds (Amini et al. 2024).
2. Log-probabilities are sums over the tokens of a response with its ending token, the same as in RL: temperature 1, the
   chat template of the model. Some implementations of IPO take means.
3. The reference is the model that training starts from. Its log-probabilities are computed once and kept in memory.
4. Responses of several turns, messages or text, are left out: a policy does not write what people say between its own.

References: Rafailov et al. 2023 (DPO); Mitchell 2023 (label smoothing); Azar et al. 2024 (IPO).

Command: ``textenv dpo --model assistant-sft --data rankings.jsonl --output my-dpo``. In an experiment file,
``algorithm: dpo`` trains on the reference's own responses, judged by the environment (:class:`DPO`).
"""

from agents.dpo.agent import DPO
from agents.dpo.trainer import DPOConfig, DPOResult, encode, ipo_loss, train_dpo

__all__ = ["DPO", "DPOConfig", "DPOResult", "encode", "ipo_loss", "train_dpo"]
