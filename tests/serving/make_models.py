"""Small random checkpoints, one folder an architecture: `make_models.py FOLDER`."""

import sys
from pathlib import Path

import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
MODELS = {
    # First one with experts: vLLM makes the groups of ranks that experts need for such alone.
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "num_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **EXPERTS,
            "topk_method": "noaux_tc",
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
    "llama": ("Llama", {}),
    "started": ("Llama", {"hidden_size": 128}),  # vLLM's attention on the CPU begins with 32
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
}


def make(folder: Path, kind: str, options: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, max_shard_size="200KB")


if __name__ == "__main__":
    for name, (kind, options) in MODELS.items():
        path = Path(sys.argv[1], name)
        if not (path / "config.json").exists():
            make(path, kind, options)
