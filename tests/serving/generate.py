"""Starts vLLM on the CPU and reloads: `generate.py MODEL LOAD_FORMAT RANKS [EXTRA]`.

Prints the tokens that it generates at first; after every rank has lost its weights, as after a
sleep of level 2 (which vLLM's worker for the CPU lacks), and `reload_weights` has loaded them; and
after `reload_weights` of MODEL.again. With weightlift, also checks that no rank recorded again, and
prints the bytes that each load read.
"""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="INFO",
)

import worker_extension  # noqa: F401 -- torch as vLLM's worker for the CPU wants it
from vllm import LLM, SamplingParams


def tokens_of(engine: LLM) -> list[int]:
    sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": [5, 9, 77, 3]}], sampling)
    return list(outputs[0].outputs[0].token_ids)


def main() -> None:
    model, load_format, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    extra = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    engine = LLM(
        model=model,
        load_format=load_format,
        model_loader_extra_config=extra,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else "uni",
        worker_extension_cls="worker_extension.WorkerExtension",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=2,
        dtype="bfloat16",
    )
    first = tokens_of(engine)
    print("tokens", first)
    engine.collective_rpc("lose_weights")
    lost = tokens_of(engine)
    if lost == first:
        sys.exit("the ranks have not lost their weights: nothing is tested")
    engine.collective_rpc("reload_weights")
    print("tokens when it is loaded again", tokens_of(engine))
    engine.collective_rpc("lose_weights")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": f"{model}.again"})
    print("tokens of the other", tokens_of(engine))
    if load_format != "weightlift":
        return
    for rank, (recordings, read) in enumerate(engine.collective_rpc("what_was_read")):
        print(f"rank {rank} of {ranks}: {recordings} recording, bytes of its loads {read}")
        if recordings != 1 or len(read) != 3 or len(set(read)) != 1:
            sys.exit(f"rank {rank}: one recording and three loads of as many bytes were due")


if __name__ == "__main__":
    main()
