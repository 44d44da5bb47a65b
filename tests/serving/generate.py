"""Starts vLLM on the CPU and prints the tokens it generates: `generate.py MODEL LOAD_FORMAT`."""

# ruff: noqa: E402 -- vLLM reads the environment when it is imported

import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="INFO",
)

import torch

torch.accelerator.empty_cache = lambda: None  # it raises where there is no accelerator

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(
        model=sys.argv[1],
        load_format=sys.argv[2],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        dtype="bfloat16",
    )
    sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": [5, 9, 77, 3]}], sampling)
    print("tokens", list(outputs[0].outputs[0].token_ids))
