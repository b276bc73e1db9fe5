"""vLLM on a CPU, in this process."""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # read on import; GiB

import numpy as np
import vllm
from vllm import LLM, SamplingParams


class Engine:
    version = vllm.__version__

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        self.llm = LLM(
            str(checkpoint),
            dtype=dtype,
            enforce_eager=True,
            max_num_seqs=1,
            logprobs_mode="raw_logits",
            max_logprobs=-1,  # all of the vocabulary
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """vLLM gives a position's scores with the token that follows, so the last come with a generated one."""
        output = self._generate(ids, max_tokens=1, logprobs=-1, prompt_logprobs=-1)
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        return np.array([[scores[token].logprob for token in range(len(scores))] for scores in positions], np.float32)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        return list(self._generate(ids, max_tokens=count).outputs[0].token_ids)

    def kv_heads(self) -> int:
        """A layer's cache is (blocks, heads, tokens of a block, K and V)."""
        return self.llm.collective_rpc(lambda worker: worker.model_runner.kv_caches[0].shape[1])[0]

    def tokenize(self, text: str) -> list[int]:
        return self.llm.get_tokenizer()(text).input_ids

    def _generate(self, ids: list[int], **options):
        prompt, sampling = {"prompt_token_ids": ids}, SamplingParams(temperature=0.0, **options)
        return self.llm.generate(prompt, sampling, use_tqdm=False)[0]
