"""Rollouts from a vLLM server: answers by token ids, and the policy's weights through a folder that both see.

Facts of vLLM: completions take `prompt` as ids, `seed`, `stop_token_ids` and `return_token_ids`
(entrypoints/openai/completion/protocol.py); under VLLM_SERVER_DEV_MODE=1 the server has /collective_rpc, whose method
reload_weights reads the safetensors files of `weights_path` into the loaded model (pull request 48284 shows the call).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepaudio_train.config.errors import UserError
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.data.json_posts import JsonPosts, ReplyError
from stepaudio_train.engines.base import Engine
from stepaudio_train.models.step1.weight_map import VALUE_HEAD
from stepaudio_train.rollout.generate import Generation, require_prompts
from stepaudio_train.rollout.replica_model import largest_entry_bytes
from stepaudio_train.rollout.sampling import SamplingConfig

_COMPLETION_TIMEOUT_S = 1800.0
"""A request waits for its turn, too."""
_RELOAD_TIMEOUT_S = 1800.0
_IF_UNREACHABLE = "see that the server runs there"


@dataclass(frozen=True)
class VllmServer:
    """One server, which answers for all replicas. See `rollouts.Generator`."""

    url: str
    """As http://localhost:8000, with or without /v1."""
    model: str
    """The name under which it serves the model."""
    folder: Path
    """Folder that the server sees under the same path. Weights in it are overwritten."""
    dtype: torch.dtype
    """Of the weights in that folder."""
    num_requests: int = 64
    """In flight at once, from each replica."""

    def take_over(self, engine: Engine) -> int:
        """Write the engine's present weights, without a value head, and have the server load them.

        Raises:
            UserError: on every rank; the server is not there, or cannot do it.
        """
        # No replica still waits for answers of the weights before.
        engine.barrier()
        writer = self._writer(engine) if engine.is_main else None
        for name, tensor in engine.export_weights():
            if writer is not None and name not in VALUE_HEAD:
                writer.write_tensor(name, tensor.to(self.dtype))
        problem = None
        if writer is not None:
            writer.finish()
            problem = self._reload()
        if engine.any_rank(problem is not None):
            raise problem or UserError(f"{self.url}: has not taken over the weights; rank 0 says why")
        return 2 * largest_entry_bytes(engine.config.model) if engine.is_main else 0

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generation]:
        """Go on from every prompt; results in the prompts' order. Raises as `rollout.generate.generate`, and:

        Raises:
            UserError: a prompt could not be answered.
        """
        require_prompts(prompts, seeds)
        posts = self._posts("/v1/completions", _COMPLETION_TIMEOUT_S, "see that rollout.server_model is right")
        with ThreadPoolExecutor(self.num_requests) as pool:
            requests = [
                pool.submit(_completion, posts, self._request(prompt, sampling, seed), sampling.stop_ids)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            try:
                return [request.result() for request in requests]
            finally:
                # After a failure the others' answers are of no use.
                pool.shutdown(cancel_futures=True)

    def weights(self) -> dict[str, Tensor]:
        return {}

    def _request(self, prompt: Sequence[int], sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        # All that a generation_config.json beside the served model could set is set here.
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop_token_ids": list(sampling.stop_ids),
            "return_token_ids": True,
        }

    def _writer(self, engine: Engine) -> SafetensorsWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.safetensors"):
            # Not written over: the server may have the old ones mapped into its memory.
            old.unlink()
        return SafetensorsWriter(self.folder, replace(engine.config.model, value_head=False), self.dtype)

    def _reload(self) -> UserError | None:
        """What went wrong, if something did."""
        dev_mode = "start the server with VLLM_SERVER_DEV_MODE=1, without which it takes over no weights"
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder.resolve())}}
        try:
            # Once each: loading is not made better by repeating it.
            self._posts("/collective_rpc", _RELOAD_TIMEOUT_S, dev_mode, attempts=1).send(json.dumps(reload).encode())
            # Keys and values of the old weights.
            self._posts("/reset_prefix_cache", _RELOAD_TIMEOUT_S, dev_mode, attempts=1).send(b"")
        except UserError as error:
            return error
        except ReplyError as error:
            return UserError(
                f"{error}; the server has to see {self.folder.resolve()}, and its log says more: a vLLM whose "
                "reload_weights takes no weights_path is too old"
            )
        return None

    def _posts(self, path: str, timeout_s: float, if_refused: str, attempts: int = 5) -> JsonPosts:
        url = self.url.rstrip("/").removesuffix("/v1") + path
        return JsonPosts(url, if_refused, _IF_UNREACHABLE, timeout_s=timeout_s, attempts=attempts)


def _completion(posts: JsonPosts, request: dict[str, Any], stop_ids: Sequence[int]) -> Generation:
    try:
        reply = posts.send(json.dumps(request).encode())
    except ReplyError as error:
        raise UserError(f"{error}; a prompt of {len(request['prompt'])} tokens was not answered") from None
    try:
        choice = json.loads(reply)["choices"][0]
        ids, reason = [int(index) for index in choice["token_ids"]], choice["finish_reason"]
    except (ValueError, TypeError, LookupError):
        raise UserError(
            f"{posts.url}: the reply is no completion with token_ids, which vLLM gives from 0.10.2 on: {reply[:200]!r}"
        ) from None
    if ids and ids[-1] in stop_ids:
        return Generation(ids[:-1], ids[-1])
    if reason != "length":
        raise UserError(
            f"{posts.url}: an answer ended by {reason!r} with no stop id; start it with the run's own model"
        )
    return Generation(ids, None)
