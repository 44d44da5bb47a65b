"""Makes small random checkpoints, one folder for each architecture: `make_models.py FOLDER`."""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

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
    # First a model with experts, because vLLM makes the experts' groups of ranks only for such a
    # model.
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


def make(
    folder: Path, kind: str, options: dict[str, object], max_shard_size: str = "200KB"
) -> None:
    generator = torch.Generator().manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def make_llava(folder: Path) -> None:
    """Pictures and text: a CLIP tower, a projector, a Llama."""
    generator = torch.Generator().manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=64,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=255
    )
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    # As in published models; vLLM needs it.
    tensors = _taken_out(folder)
    for name in list(tensors):
        inner = name.partition("vision_tower.")[2]
        if inner and not inner.startswith("vision_model."):
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _taken_out(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a folder and deletes its weight files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    Path(folder, "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def make_fp8(folder: Path) -> None:
    """A Llama with weights in blocks of 128 x 128 float8 with a scale each, like DeepSeek-V3."""
    make(
        folder, "Llama", {"hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": True}
    )
    tensors = _taken_out(folder)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-extent // 128) for extent in weight.shape)
        blocks = weight.float().view(rows, 128, columns, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (
            (blocks / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
        )
        tensors[name.replace(".weight", ".weight_scale_inv")] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_again(folder: Path, like: Path) -> None:
    """The same model after some training: each tensor with its rows in reverse."""
    shutil.copytree(like, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {
            name: (tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)
            .flip(0)
            .contiguous()
            .view(tensor.dtype)
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})


if __name__ == "__main__":
    home = Path(sys.argv[1])
    makers = {"llava": make_llava, "llama_fp8": make_fp8}
    for name in [*MODELS, *makers]:
        path = home / name
        if path.with_suffix(".again").exists():
            continue
        shutil.rmtree(path, ignore_errors=True)
        if name in MODELS:
            make(path, *MODELS[name])
        else:
            makers[name](path)
        make_again(path.with_suffix(".again"), path)
