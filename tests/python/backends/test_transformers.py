"""The transformers backend: each load has the same result as without it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import weightlift as wl
from backend_support import engine_moves, falls_back, tensor_bytes
from support import assert_same, open_files, run_python, sparse_file
from transformers_models import (
    CALLER,
    CAUSAL,
    DTYPES,
    LLAMA,
    MOE,
    VERSION,
    Outcome,
    assert_same_models,
    assert_same_outcomes,
    both,
    conversion_mapping,
    core_model_loading,
    initialization,
    load,
    made,
    modeling_utils,
    quiet,
    transformers,
    walked,
)
from weightlift.backends import signature_text
from weightlift.backends.transformers import compat, prefetch, walk
from weightlift.backends.transformers import weights as weights_of
from weightlift.backends.transformers.shards import Cut
from weightlift.core.errors import OutOfMemoryError, ReadError

__all__ = ["made", "quiet"]  # fixtures


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_language_models(
    made: Callable[..., Path], name: str, stored: torch.dtype, dtype: str | None
) -> None:
    ours, _ = both(CAUSAL, made(name, stored), dtype=dtype)
    wanted = {None: stored, "auto": stored}.get(dtype) or getattr(torch, str(dtype))
    assert ours.model.dtype == wanted
    if name == "tied":
        assert ours.model.lm_head.weight is ours.model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}]
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_shards_and_device_maps(made: Callable[..., Path], device_map: Any, dtype: str) -> None:
    folder = made("llama", max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    both(CAUSAL, folder, device_map=device_map, dtype=dtype)
    report = wl.last_report()
    assert report is not None
    assert len(report.files) == len(list(folder.glob("*.safetensors")))
    assert report.bytes == tensor_bytes(folder)


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_in_inference_mode_can_be_trained(
    made: Callable[..., Path], name: str, dtype: str
) -> None:
    """The library makes the tensors in threads, where the mode does not apply; only stacked tensors
    are made where it does."""
    folder = made(name)
    with torch.inference_mode():
        theirs = CAUSAL.from_pretrained(folder, dtype=dtype)
        with wl.enabled(CALLER):
            ours = CAUSAL.from_pretrained(folder, dtype=dtype)
    stacked = [n for n, parameter in theirs.named_parameters() if parameter.is_inference()]
    assert all(n.rpartition(".")[0].endswith("experts") for n in stacked)
    ours(torch.arange(4)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtures(made: Callable[..., Path], name: str, dtype: str | None) -> None:
    folder = made(name, torch.bfloat16, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours, _ = both(CAUSAL, folder, dtype=dtype)
    assert ours.model.model.layers[0].mlp.experts.gate_up_proj.shape == (
        12,
        *([16, 16] if name == "qwen3_moe" else [48, 16]),
    )
    assert ours.model._weight_conversions


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_parts_that_stay_in_float32(
    made: Callable[..., Path], stored: torch.dtype, dtype: str
) -> None:
    ours, _ = both(transformers.AutoModelForSeq2SeqLM, made("t5", stored), dtype=dtype)
    wo = ours.model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    if ours.model.dtype == torch.float16:
        assert wo.dtype == torch.float32


def test_buffers(made: Callable[..., Path]) -> None:
    ours, _ = both(transformers.AutoModelForImageClassification, made("resnet"), dtype="bfloat16")
    counted = ours.model.resnet.embedder.embedder.normalization.num_batches_tracked
    assert counted.dtype == torch.int64
    assert counted == 1


def test_what_the_library_converts(made: Callable[..., Path]) -> None:
    folder = made("dinov2")
    names = safetensors.safe_open(folder / "model.safetensors", "pt").keys()
    assert any("weights_in" in name for name in names)  # one tensor there, two in the model
    for dtype in ("auto", "bfloat16"):
        both(transformers.AutoModel, folder, dtype=dtype)


def test_a_head_that_is_not_there(made: Callable[..., Path]) -> None:
    _, theirs = both(transformers.AutoModelForSequenceClassification, made("bert"), num_labels=5)
    assert theirs.info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert "MISSING" in theirs.logs[0][1]


def test_a_head_that_is_not_wanted(made: Callable[..., Path]) -> None:
    folder = made("masked")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        head = [name for name in file.keys() if not name.startswith("bert.")]  # noqa: SIM118
        unwanted = sum(file.get_tensor(name).nbytes for name in head)
    _, theirs = both(
        transformers.AutoModel, folder, tensor_bytes(folder) - unwanted, add_pooling_layer=False
    )
    assert head
    assert theirs.info["unexpected_keys"] == set(head)


def test_names_of_old(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("bert"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, path, {"format": "pt"})
    ours, _ = both(transformers.BertModel, tmp_path)
    assert not ours.info["missing_keys"]


def test_names_by_key_mapping(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    renamed = {name.replace("self_attn", "attention"): value for name, value in tensors.items()}
    safetensors.torch.save_file(renamed, path, {"format": "pt"})
    ours, _ = both(CAUSAL, tmp_path, key_mapping={r"\.attention\.": ".self_attn."})
    assert not ours.info["missing_keys"]


@walked
def test_sizes_that_do_not_match(made: Callable[..., Path]) -> None:
    folder = made("llama")
    config = transformers.LlamaConfig(**{**LLAMA, "vocab_size": 40})
    two = 2 * 32 * 16 * 4  # the embeddings, which the engine need not read
    kwargs = {"config": config, "ignore_mismatched_sizes": True}
    ours, _ = both(CAUSAL, folder, tensor_bytes(folder) - two, **kwargs)
    assert ours.info["mismatched_keys"] == {
        (name, torch.Size([32, 16]), torch.Size([40, 16]))
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    both(CAUSAL, folder, tensor_bytes(folder) - two, config=config, raises=RuntimeError)


def test_experts_that_do_not_match(made: Callable[..., Path]) -> None:
    folder = made("mixtral")
    config = transformers.MixtralConfig(**{**MOE, "num_local_experts": 13})
    both(CAUSAL, folder, config=config, ignore_mismatched_sizes=True)


@walked
def test_experts_that_memory_has_no_room_for(tmp_path: Path) -> None:
    """3 TB of a sparse file, most of which would be one merged tensor."""
    few = {"num_hidden_layers": 1, "num_experts": 2, "num_local_experts": 2}
    config = transformers.MixtralConfig(**{**MOE, **few})
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    path, wide, end = tmp_path / "model.safetensors", 1 << 34, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in safetensors.torch.load_file(path).items():
        shape = [wide if n == config.intermediate_size else n for n in tensor.shape]
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    sparse_file(path, header, end)
    config.intermediate_size = wide
    config.save_pretrained(tmp_path)
    text = r"model\.safetensors: tensor 'model\.layers\.0\..*gate_up_proj': .*load fewer"
    with wl.enabled(CALLER), pytest.raises(OutOfMemoryError, match=text):
        CAUSAL.from_pretrained(tmp_path, dtype="auto")


def test_an_expert_that_is_not_there(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("mixtral"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.4.w3.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    theirs = load(CAUSAL, tmp_path, raises=RuntimeError)
    with wl.enabled(CALLER):
        ours = load(CAUSAL, tmp_path, raises=RuntimeError)
    assert type(ours.error) is type(theirs.error)
    assert str(ours.error) == str(theirs.error)
    # The report quotes a traceback, whose files differ.
    stacked = re.compile(r"Error: .* on tensors destined for .*")
    found = [[stacked.findall(text) for _, text in outcome.logs] for outcome in (ours, theirs)]
    assert found[0] == found[1]
    assert any(found[0]) or VERSION < (5, 1)


def test_variant_subfolder_and_attention(made: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(made("llama"), dtype=torch.float16)
    model.save_pretrained(tmp_path / "sub", variant="fp16", max_shard_size="6KB")
    kwargs = {"subfolder": "sub", "variant": "fp16", "attn_implementation": "eager"}
    ours, _ = both(CAUSAL, tmp_path, **kwargs)
    assert ours.model.config._attn_implementation == "eager"
    assert ours.model.dtype == torch.float16


def test_a_generation_config(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama"), tmp_path, dirs_exist_ok=True)
    transformers.GenerationConfig(max_new_tokens=3, pad_token_id=1).save_pretrained(tmp_path)
    ours, theirs = both(CAUSAL, tmp_path)
    assert ours.model.generation_config == theirs.model.generation_config
    assert ours.model.generation_config.max_new_tokens == 3
    prompt = torch.tensor([[1, 2, 3]])
    made_up = [
        one.model.generate(prompt, do_sample=False, attention_mask=torch.ones_like(prompt))
        for one in (ours, theirs)
    ]
    assert torch.equal(*made_up)


def test_mapped_as_the_library_does(made: Callable[..., Path]) -> None:
    folder = made("llama")
    with wl.enabled(CALLER):
        model = CAUSAL.from_pretrained(folder)
        report = wl.last_report()
        assert report is not None
        assert report.mapped_bytes == report.bytes
        if VERSION >= (5, 6):
            CAUSAL.from_pretrained(folder, disable_mmap=True)
            report = wl.last_report()
            assert report is not None
            assert report.mapped_bytes == 0
    # Each parameter owns its memory, and can be trained.
    sizes = {p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()}
    assert sizes == {True}
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@walked
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_progress_bar(
    made: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []

    class Bar:
        def __init__(self, given: Any = None, *, total: Any = None, desc: str = "") -> None:
            self.given = given
            self.count = 0
            self.said = (desc, len(given) if total is None else total)

        def __iter__(self) -> Iterator[Any]:
            for one in self.given:
                yield one
                self.count += 1
            shown.append((*self.said, self.count))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            shown.append((*self.said, self.count))

        def update(self, count: int) -> None:
            self.count += count

    folder = made(name)  # saving shows a bar, too
    monkeypatch.setattr(transformers.utils.logging, "tqdm", Bar)
    monkeypatch.setattr(core_model_loading, "tqdm", Bar, raising=False)
    both(CAUSAL, folder)
    assert len(shown) == 2
    assert shown[0] == shown[1]
    assert shown[0][1] == shown[0][2] > 10


# --- On the disk


def _index(model: Any) -> dict[str, Any]:
    """The weights on the disk that accelerate's hooks know."""
    found: dict[str, Any] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            found.update(getattr(weights, "dataset", weights).index)
    return found


DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def both_on_disk(
    cls: Any, path: Path, moved: int, given: dict[str, Any], folder: Path, /, **kwargs: Any
) -> None:
    """Like ``both``, for models that are partly on the disk."""
    outcomes = []
    for side in ("theirs", "ours"):
        with contextlib.ExitStack() as stack:
            if side == "ours":
                stack.enter_context(wl.enabled(CALLER))
                stack.enter_context(engine_moves(moved, CALLER))
            outcomes.append(load(cls, path, offload_folder=folder / side, **kwargs))
    theirs, ours = outcomes
    assert_same_outcomes(ours, theirs)
    indices = [
        json.loads(json.dumps(_index(one.model)).replace(f"/{side}/", "/"))
        for one, side in ((ours, "ours"), (theirs, "theirs"))
    ]
    assert indices[0] == indices[1]
    assert indices[0]
    saved = [sorted(file.name for file in (folder / side).iterdir()) for side in ("ours", "theirs")]
    assert saved[0] == saved[1]
    for name in saved[1]:
        own = safetensors.torch.load_file(folder / "ours" / name)
        for key, tensor in safetensors.torch.load_file(folder / "theirs" / name).items():
            assert_same(own[key], tensor)
    with torch.no_grad():
        assert_same(ours.model(**given).logits, theirs.model(**given).logits)


@walked
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "llama in a torch file"])
def test_weights_on_the_disk(
    made: Callable[..., Path], tmp_path: Path, name: str, dtype: str
) -> None:
    folder = made(name.split()[0])
    moved = tensor_bytes(folder)
    if "torch" in name:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        shutil.copy(folder / "config.json", tmp_path)
        torch.save(state, tmp_path / "pytorch_model.bin")
        folder = tmp_path
    else:
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            moved -= sum(
                file.get_tensor(name).nbytes
                for name in file.keys()  # noqa: SIM118
                if re.match(r"model\.layers\.[12]", name) and "experts" not in name
            )
    given = {"input_ids": torch.tensor([[1, 2, 3]])}
    both_on_disk(CAUSAL, folder, moved, given, tmp_path, device_map=DISK, dtype=dtype)


@walked
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers_on_the_disk(
    made: Callable[..., Path], tmp_path: Path, offload_buffers: bool
) -> None:
    folder = made("resnet")
    stays = re.compile("resnet.embedder" if offload_buffers else r"resnet.embedder.*(weight|bias)$")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        moved = sum(
            file.get_tensor(name).nbytes
            for name in file.keys()  # noqa: SIM118
            if not stays.match(name)
        )
    given = {"pixel_values": torch.ones(1, 3, 32, 32)}
    device_map = {"resnet.embedder": "disk", "resnet.encoder": "cpu", "classifier": "cpu"}
    both_on_disk(
        transformers.AutoModelForImageClassification,
        folder,
        moved,
        given,
        tmp_path,
        device_map={**device_map, "resnet.pooler": "cpu"},
        offload_buffers=offload_buffers,
    )


# --- Files of torch


@pytest.mark.parametrize("name", ["llama", "tied", "bert", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_torch_files(made: Callable[..., Path], tmp_path: Path, name: str, dtype: str) -> None:
    folder = made(name)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    cls = transformers.AutoModel if name == "bert" else CAUSAL
    both(cls, tmp_path, tensor_bytes(folder), dtype=dtype)
    report = wl.last_report()
    assert report is not None
    mapped = report.bytes if dtype == "auto" and name != "qwen3_moe" else 0
    assert report.mapped_bytes >= mapped


def test_a_torch_file_with_tensors_that_share(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("llama")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    both_norms = torch.stack([torch.ones(16), torch.zeros(16)], 1)
    state["model.norm.weight"] = both_norms[:, 0]
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    nbytes = tensor_bytes(folder) - 32 * 16 * 4 + 15 * 4  # the norm's stride covers 31 elements
    for dtype, shared in (("auto", True), ("bfloat16", False)):
        ours, theirs = both(CAUSAL, tmp_path, nbytes, dtype=dtype)
        for one in (ours, theirs):
            places = {
                parameter.data_ptr()
                for parameter in (one.model.lm_head.weight, one.model.model.embed_tokens.weight)
            }
            assert len(places) == (1 if shared else 2)


def test_a_torch_file_with_more_than_tensors(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("llama")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"state_dict": state}, tmp_path / "pytorch_model.bin")
    both_ways = []
    for enabled in (False, True):
        with wl.enabled(CALLER) if enabled else contextlib.nullcontext():
            both_ways.append(load(CAUSAL, tmp_path))
    assert_same_outcomes(both_ways[1], both_ways[0])
    assert both_ways[1].info["unexpected_keys"] == {"state_dict"}


# --- Converters of every kind, in a model made for them


class ToyConfig(transformers.PreTrainedConfig):
    model_type = "weightlift_toy"


class Toy(transformers.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.plain = torch.nn.Linear(4, 4)
        self.experts = torch.nn.Module()
        self.experts.merged = torch.nn.Parameter(torch.zeros(3, 2, 4))
        self.experts.both = torch.nn.Parameter(torch.zeros(3, 5, 4))
        self.joined = torch.nn.Parameter(torch.zeros(7, 4))
        self.on_cpu = torch.nn.Parameter(torch.zeros(4, 4))
        self.turned = torch.nn.Parameter(torch.zeros(4, 6))
        self.first = torch.nn.Parameter(torch.zeros(3, 4))
        self.second = torch.nn.Parameter(torch.zeros(3, 4))
        self.twice = torch.nn.Parameter(torch.zeros(4))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.rnn = torch.nn.GRU(4, 4)  # which sets its weights in its own way
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, Toy):
            initialization.constant_(module.turned, 5.0)
            initialization.copy_(module.scratch, torch.arange(3.0))
            initialization.copy_(module.seen, torch.tensor([1, 2]))


def toy_mapping() -> list[Any]:
    core = core_model_loading
    converter = core.WeightConverter
    return [
        core.WeightRenaming(r"^ancient\.", "plain."),
        converter("experts.*.one", "experts.merged", [core.MergeModulelist(dim=0)]),
        converter(
            ["experts.*.up", "experts.*.down"],
            "experts.both",
            [core.MergeModulelist(dim=0), core.Concatenate(dim=1)],
        ),
        converter(["part_a", "part_b"], "joined", [core.Concatenate(dim=0)]),
        converter("far.*.piece", "on_cpu", [core.Concatenate(dim=0)], force_cpu=True),
        converter("upright", "turned", [core.Transpose(dim0=0, dim1=1)]),
        converter("fused", ["first", "second"], [core.Chunk(dim=0)]),
        converter("lost", ["lost.first", "lost.second"], [core.Chunk(dim=0)]),
        core.WeightRenaming(r"^normed\.bias$", "normed.shift"),  # of another model
    ]


def toy_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = {f"experts.{i}.one": torch.randn(2, 4) for i in range(3)}
    for i in range(3):
        state[f"experts.{i}.up"] = torch.randn(2, 4)
        state[f"experts.{i}.down"] = torch.randn(3, 4)
    state |= {"part_b": torch.randn(4, 4), "part_a": torch.randn(3, 4)}
    state |= {f"far.{i}.piece": torch.randn(2, 4) for i in (10, 9)}
    state |= {"upright": torch.randn(6, 4), "fused": torch.randn(6, 4)}
    state |= {"ancient.weight": torch.randn(4, 4), "ancient.bias": torch.randn(4)}
    state |= {"twice": torch.randn(4), "toy.twice": torch.randn(4), "seen": torch.tensor([5, 6])}
    made = Toy(ToyConfig())
    state |= {
        name: torch.randn_like(value)
        for name, value in made.state_dict().items()
        if name.startswith(("rnn.", "normed."))
    }
    return state


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _without(*names: str) -> Change:
    return lambda state: {name: value for name, value in state.items() if name not in names}


def _with(**tensors: torch.Tensor) -> Change:
    return lambda state: {**state, **{name.replace("__", "."): t for name, t in tensors.items()}}


TOYS: dict[str, tuple[Change, bool]] = {
    "as it is": (lambda state: state, True),
    "in another dtype": (lambda state: {k: v.to(torch.bfloat16) for k, v in state.items()}, True),
    "with integers for numbers": (
        _with(twice=torch.arange(4), part_a=torch.ones(3, 4).int()),
        True,
    ),
    "of two dtypes": (_with(experts__1__one=torch.ones(2, 4).half()), True),
    "without a buffer": (_without("seen"), True),
    "without the upright one": (_without("upright"), True),
    "one expert less": (_without("experts.1.one"), False),
    "no lower halves": (_without(*(f"experts.{i}.down" for i in range(3))), False),
    "one lower half less": (_without("experts.1.down"), False),
    "one expert of another shape": (_with(experts__1__one=torch.ones(3, 4)), False),
    "one upper half of another shape": (_with(experts__1__up=torch.ones(4, 4)), False),
    "parts of other widths": (_with(part_a=torch.ones(3, 5)), False),
    "more than is needed": (_with(part_a=torch.ones(9, 4)), False),
    "unknown names": (_with(nobody=torch.ones(2), nobody__else=torch.ones(1)), True),
    "what would become two unknown ones": (_with(lost=torch.ones(4, 2)), True),
    "both the halves and the whole": (_with(joined=torch.ones(7, 4)), True),
}


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[Callable[[Change], Path]]:
    conversion_mapping.register_checkpoint_conversion_mapping("Toy", toy_mapping())

    def save(change: Change) -> Path:
        ToyConfig().save_pretrained(tmp_path)
        state = change(toy_state())
        safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    yield save
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    del cache["Toy"]
    getattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set()).discard("Toy")


def without_traces(outcome: Outcome) -> Outcome:
    """Reports quote tracebacks of failed conversions, which differ."""
    outcome.logs = [
        (
            level,
            "\n".join(
                re.findall(
                    r"^\w+(?:Error)?: .*|^.*(?:MISSING|MISMATCH|UNEXP).*", text, re.MULTILINE
                )
            ),
        )
        for level, text in outcome.logs
    ]
    return outcome


@walked
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOYS)
def test_converters(toys: Callable[[Change], Path], name: str, dtype: str) -> None:
    change, works = TOYS[name]
    folder = toys(change)
    before = wl.stats().fallbacks
    outcomes = []
    for enabled in (False, True):
        with wl.enabled(CALLER) if enabled else contextlib.nullcontext():
            raises = None if works else RuntimeError
            outcomes.append(without_traces(load(Toy, folder, raises, dtype=dtype)))
    theirs, ours = outcomes
    assert_same_outcomes(ours, theirs)
    assert wl.stats().fallbacks == before
    if name == "as it is":
        # One of two tensors with the same name is used: the other one's read had begun first.
        with wl.enabled(CALLER), engine_moves(tensor_bytes(folder), CALLER):
            load(Toy, folder, dtype=dtype)


@walked
def test_converters_ask_for_little_at_a_time(
    toys: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that the library converts are read in groups, each while the previous one is
    converted."""
    folder = toys(lambda state: state)
    theirs = load(Toy, folder)
    monkeypatch.setattr(walk, "_WAVE_BYTES", 1)
    loads = wl.stats().loads
    with wl.enabled(CALLER), engine_moves(tensor_bytes(folder), CALLER):
        ours = load(Toy, folder)
    assert_same_outcomes(ours, theirs)
    # Unchanged and merged tensors; on_cpu, transposed, first and second.
    assert wl.stats().loads - loads == 2 + 3


# --- Reads that begin while the library prepares


@walked
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_begins_before_the_renamings_are_compiled(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    events = []
    start = weights_of.Batch.start
    compiled = conversion_mapping.get_checkpoint_conversion_mapping
    with monkeypatch.context() as patch:
        patch.setattr(weights_of.Batch, "start", lambda self: (events.append("start"), start(self)))
        patch.setattr(
            conversion_mapping,
            "get_checkpoint_conversion_mapping",
            lambda *args: (events.append("renamings"), compiled(*args))[1],
        )
        folder = made("llama")
        with wl.enabled(CALLER), engine_moves(tensor_bytes(folder), CALLER):
            load(CAUSAL, folder, dtype=dtype)
    assert events[:2] == ["start", "renamings"]
    both(CAUSAL, folder, dtype=dtype)


@walked
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_begun_ends_with_the_call(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Also if the library fails before it requests a tensor."""
    folder = made("llama")
    begun = []
    begin = weights_of.Weights.prefetch
    monkeypatch.setattr(
        weights_of.Weights,
        "prefetch",
        lambda self, batch: (begun.append(batch), begin(self, batch)),
    )
    files = open_files()
    with monkeypatch.context() as patch, wl.enabled(CALLER):
        patch.setattr(modeling_utils, "LoadStateDictConfig", None)
        with pytest.raises(TypeError, match="NoneType"):
            CAUSAL.from_pretrained(folder, dtype=dtype)
    assert len(begun) == 1
    begun.clear()
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert open_files() == files
    both(CAUSAL, folder, dtype=dtype)


@walked
@pytest.mark.parametrize(
    "options",
    [
        {"key_mapping": {"^lm_head": "lm_head"}},
        {"device_map": "auto"},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_begins_that_the_library_may_take_elsewhere(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    begun = []
    monkeypatch.setattr(weights_of.Weights, "prefetch", lambda self, batch: begun.append(batch))
    with wl.enabled(CALLER):
        load(CAUSAL, made("llama"), **options)
    assert not begun


@walked
@pytest.mark.parametrize(
    ("option", "begins"),
    [
        ("attn_implementation", True),
        ("device_mesh", False),
        ("distributed_config", False),
        ("gguf_file", False),
        ("quantization_config", False),
        ("tp_plan", False),
        ("tp_size", False),
    ],
)
def test_nothing_begins_for_models_that_are_cut_or_quantized(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, option: str, begins: bool
) -> None:
    folder = made("llama")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    begun = []
    monkeypatch.setattr(weights_of.Weights, "prefetch", lambda self, batch: begun.append(batch))
    with wl.enabled(CALLER), prefetch.watching({option: "anything"}):
        prefetch.found(list(map(str, folder.glob("*.safetensors"))))
        prefetch.begin(model, None, None)
    assert bool(begun) == begins


@walked
def test_what_is_on_its_way_is_given_to_all_who_want_some(tmp_path: Path) -> None:
    """A converter uses tensors whose reads have begun under their own names, beside unconverted
    ones."""
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path)
    theirs = load(cls, tmp_path)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(tmp_path), CALLER):
        ours = load(cls, tmp_path)
    assert_same_outcomes(ours, theirs)


@walked
def test_a_load_in_the_constructor_of_a_model_that_is_loaded(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    """The outer construction sees the inner load's ties, and the outer file's values."""
    diffusers = pytest.importorskip("diffusers")
    inner = made("llama", tie_word_embeddings=True)

    class Outer(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc, name-defined]
        @diffusers.configuration_utils.register_to_config
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.lm = CAUSAL.from_pretrained(inner)
            self.own = torch.nn.Linear(size, size)

    outer = Outer()
    with torch.no_grad():
        outer.lm.model.embed_tokens.weight.add_(1)
    tensors = dict(outer.state_dict())
    del tensors["lm.lm_head.weight"]
    outer.save_config(tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = Outer.from_pretrained(tmp_path)
    with wl.enabled(CALLER):
        ours = Outer.from_pretrained(tmp_path)
    tied = [m.lm.lm_head.weight is m.lm.model.embed_tokens.weight for m in (theirs, ours)]
    assert tied[0] == tied[1]
    for name, tensor in theirs.state_dict().items():
        own = ours.state_dict()[name]
        assert own.device == tensor.device
        if not tensor.is_meta:  # diffusers leaves tensors there that its file lacks
            assert_same(own, tensor)


@walked
def test_a_load_in_the_constructor_of_a_model_of_ours(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    inner = made("llama", tie_word_embeddings=True)

    class Outer(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.lm = CAUSAL.from_pretrained(inner)
            self.own = torch.nn.Linear(size, size)

    outer = Outer()
    with torch.no_grad():
        outer.lm.model.embed_tokens.weight.add_(1)
    outer.save_pretrained(tmp_path)
    with wl.enabled(CALLER):
        ours = Outer.from_pretrained(tmp_path)
    assert (ours.lm.lm_head.weight is ours.lm.model.embed_tokens.weight) == (
        outer.lm.lm_head.weight is outer.lm.model.embed_tokens.weight
    )
    for name, tensor in outer.state_dict().items():
        assert_same(ours.state_dict()[name], tensor)


# --- A walk that is not known


@pytest.fixture
def unknown_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_KNOWN", frozenset())
    monkeypatch.setattr(compat, "_verdicts", {})


@walked
def test_the_walk_is_known() -> None:
    with wl.enabled(CALLER):
        config = modeling_utils.LoadStateDictConfig()
        assert compat.is_walked(config)


@pytest.mark.usefixtures("unknown_walk")
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(CAUSAL, "tied"), (CAUSAL, "mixtral"), (transformers.AutoModelForSeq2SeqLM, "t5"),
     (transformers.AutoModel, "dinov2"), (transformers.AutoModelForSequenceClassification, "bert")],
)  # fmt: skip
def test_an_unknown_walk(made: Callable[..., Path], cls: Any, name: str, dtype: str) -> None:
    both(cls, made(name), dtype=dtype)
    both(cls, made(name, torch.bfloat16), dtype=dtype)


@pytest.mark.usefixtures("unknown_walk")
def test_an_unknown_walk_reads_what_is_asked_for(made: Callable[..., Path]) -> None:
    folder = made("masked")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        own = [name for name in file.keys() if name.startswith("bert.")]  # noqa: SIM118
        wanted = sum(file.get_tensor(name).nbytes for name in own)
    both(transformers.AutoModel, folder, wanted, add_pooling_layer=False)


@pytest.mark.usefixtures("unknown_walk")
def test_slices(made: Callable[..., Path]) -> None:
    """The object that the library's walk uses as a slice of a file."""
    path = made("llama") / "model.safetensors"
    checkpoint = wl.Checkpoint.from_file(path)
    weights = weights_of.Weights(checkpoint, "auto")
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(weights) == sorted(file.keys())
        for name, ours in weights.items():
            theirs = file.get_slice(name)
            assert ours.get_shape() == theirs.get_shape()
            assert ours.get_dtype() == theirs.get_dtype()
            assert_same(ours[...], theirs[...])
            assert_same(ours[1:3], theirs[1:3])


# --- Quantizers


@pytest.fixture(scope="session")
def bnb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.usefixtures("bnb")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_as_it_is_loaded(made: Callable[..., Path], bits: int) -> None:
    folder = made("llama", max_shard_size="6KB")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    ours, _ = both(CAUSAL, folder, quantization_config=config, device_map="cpu")
    assert getattr(ours.model, f"is_loaded_in_{bits}bit")


@pytest.mark.usefixtures("bnb")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_before(made: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = CAUSAL.from_pretrained(made("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    both(CAUSAL, tmp_path)


@pytest.mark.usefixtures("bnb")
def test_load_in_8bit(made: Callable[..., Path]) -> None:
    folder = made("llama")
    kwargs = {"llm_int8_threshold": 5.0, "llm_int8_skip_modules": ["lm_head"]}
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, **kwargs)
    theirs = load(CAUSAL, folder, quantization_config=config)
    with pytest.raises(TypeError, match="load_in_8bit"):
        CAUSAL.from_pretrained(folder, load_in_8bit=True)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(folder), CALLER):
        ours = load(CAUSAL, folder, load_in_8bit=True, **kwargs)
        (warned,) = [text for kind, text in ours.warned if kind is FutureWarning]
        assert "quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_t" in warned
    assert_same_models(ours.model, theirs.model)
    with wl.enabled(CALLER):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", FutureWarning)
            CAUSAL.from_pretrained(folder, load_in_8bit=True)
        assert __file__ in [warned.filename for warned in told]
        assert not hasattr(CAUSAL.from_pretrained(folder, load_in_8bit=False), "hf_quantizer")
        with pytest.raises(ValueError, match="quantization_config are given"):
            CAUSAL.from_pretrained(folder, load_in_4bit=True, quantization_config=config)


# --- Adapters


@pytest.fixture(scope="session")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def adapter(made: Callable[..., Path], tmp_path: Path, peft: Any) -> Path:
    model = CAUSAL.from_pretrained(made("llama"))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that this transformers no longer has
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_load_adapter(made: Callable[..., Path], adapter: Path) -> None:
    models = []
    for enabled in (False, True):
        model = CAUSAL.from_pretrained(made("llama"))
        with contextlib.ExitStack() as stack:
            if enabled:
                stack.enter_context(wl.enabled(CALLER))
                stack.enter_context(engine_moves(tensor_bytes(adapter), CALLER))
            model.load_adapter(adapter)
        models.append(model)
    assert any("lora_A" in name for name, _ in models[0].named_parameters())
    assert_same_models(models[1], models[0])


def test_a_folder_of_an_adapter(made: Callable[..., Path], adapter: Path) -> None:
    moved = tensor_bytes(made("llama")) + tensor_bytes(adapter)
    if VERSION >= (5, 16):
        ours = both(CAUSAL, adapter, moved)[0].model
    else:  # with output_loading_info=True these fail on adapters
        theirs = CAUSAL.from_pretrained(adapter)
        with wl.enabled(CALLER), engine_moves(moved, CALLER):
            ours = CAUSAL.from_pretrained(adapter)
        assert_same_models(ours, theirs)
    assert "default" in ours.peft_config


@pytest.mark.parametrize("also", [(), ("safetensors",)])
def test_peft_model(
    made: Callable[..., Path], adapter: Path, peft: Any, also: tuple[str, ...]
) -> None:
    states = []
    for enabled in (False, True):
        model = CAUSAL.from_pretrained(made("llama"))
        with contextlib.ExitStack() as stack:
            if enabled:
                stack.enter_context(wl.enabled(CALLER, *also))
                if not also:
                    stack.enter_context(engine_moves(tensor_bytes(adapter), CALLER))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.PeftModel.from_pretrained(model, adapter)
        states.append(dict(model.named_parameters()))
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same(states[1][name].data, tensor.data)


# --- What falls back, and what fails


def test_what_is_no_file_is_left_alone(made: Callable[..., Path]) -> None:
    folder = made("llama")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    config = transformers.LlamaConfig(**LLAMA)
    with wl.enabled(CALLER), falls_back(CALLER, times=0):
        model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.message for r in caplog.records if r.name == "weightlift" and "falls back" in r.message
    ]


@pytest.mark.parametrize(
    ("function", "reason"),
    [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_zero3_enabled", "DeepSpeed ZeRO-3")],
)
def test_parallel_plans_fall_back(
    made: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    reason: str,
) -> None:
    import transformers.integrations

    folder = made("llama")
    caplog.set_level(logging.INFO, "weightlift")
    monkeypatch.setattr(transformers.integrations, function, lambda: True)
    with wl.enabled(CALLER), falls_back(CALLER, times=0):
        CAUSAL.from_pretrained(folder)
    assert [line.rpartition("its own loading: ")[2] for line in _told(caplog)] == [reason]


@walked
def test_a_stage_of_a_pipeline_falls_back(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made("llama")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model._pp_stage = 0
    config = modeling_utils.LoadStateDictConfig()
    caplog.set_level(logging.INFO, "weightlift")
    with wl.enabled(CALLER), falls_back(CALLER, times=0):
        type(model)._load_pretrained_model(model, None, [str(folder / "model.safetensors")], config)
    assert _told(caplog)[0].endswith("its own loading: pipeline parallel")
    expected = safetensors.torch.load_file(folder / "model.safetensors")
    assert_same(model.lm_head.weight.data, expected["lm_head.weight"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="loads there")
@pytest.mark.parametrize(
    ("device", "reason"),
    [(0, "device 0, and torch has no CUDA device"), ("meta", "device meta")],
)
def test_devices_that_are_not_ours(
    made: Callable[..., Path], caplog: pytest.LogCaptureFixture, device: Any, reason: str
) -> None:
    folder = made("llama")
    outcomes: list[Any] = []
    for enabled in (False, True):
        with wl.enabled(CALLER) if enabled else contextlib.nullcontext():
            caplog.clear()
            caplog.set_level(logging.INFO, "weightlift")
            try:
                model = CAUSAL.from_pretrained(folder, device_map={"": device})
                outcomes.append({n: (p.device, p.shape) for n, p in model.named_parameters()})
            except (AssertionError, RuntimeError) as error:
                outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    assert [line.rpartition("its own loading: ")[2] for line in _told(caplog)] == [reason]


@pytest.mark.usefixtures("unknown_walk")
def test_a_disk_by_an_unknown_walk(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device_map = {"model": "cpu", "lm_head": "disk"}
    tokens = torch.arange(6)[None]
    results = []
    for enabled in (False, True):
        with wl.enabled(CALLER) if enabled else contextlib.nullcontext():
            caplog.clear()
            caplog.set_level(logging.INFO, "weightlift")
            model = CAUSAL.from_pretrained(
                made("llama"), device_map=device_map, offload_folder=tmp_path / str(enabled)
            )
            results.append(model(tokens).logits)
    assert torch.equal(*results)
    assert "offload to the disk, of quantized weights or by a walk" in _told(caplog)[0]


def test_pieces_of_a_tensor(made: Callable[..., Path]) -> None:
    """The way in which a rank takes gate and up from a tensor that has both."""
    path = made("llama") / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    whole = safetensors.torch.load_file(path)[name]
    pieces = ([(0, 1, 16), (3, 1, 4)], [(0, 1, 16), (15, 1, 5)])
    for dtype in (torch.float32, torch.bfloat16):
        weights = weights_of.Weights(wl.Checkpoint.from_file(path), "auto")
        batch = weights_of.Batch(weights)
        batch.add(name, torch.device("cpu"), dtype, Cut(pieces, 1, (16, 9)))
        batch.start()
        expected = torch.cat([whole[:, 3:7], whole[:, 15:20]], 1).to(dtype)
        assert_same(batch.result()[name], expected)
        assert weights.report is not None
        assert weights.report.bytes == 16 * 9 * 4


def test_what_nobody_asks_for_is_given_up(made: Callable[..., Path]) -> None:
    path = made("llama") / "model.safetensors"
    weights = weights_of.Weights(wl.Checkpoint.from_file(path), "read")
    batch = weights_of.Batch(weights)
    for name in weights:
        batch.add(name, torch.device("cpu"), None)
    weights.start(batch)
    weights.close()
    assert weights.report is None
    assert batch.result() == {}
    weights.close()
    expected = safetensors.torch.load_file(path)
    assert_same(weights["lm_head.weight"][...], expected["lm_head.weight"])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the data": lambda data: data[:-100],
    "cut in the header": lambda data: data[:50],
    "not JSON": lambda data: data[:8] + b"#" + data[9:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(made: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    shutil.copytree(made("llama"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    theirs = load(CAUSAL, tmp_path, raises=safetensors.SafetensorError)
    with wl.enabled(CALLER):
        ours = load(CAUSAL, tmp_path, raises=safetensors.SafetensorError)
    assert_same_outcomes(ours, theirs)


def _fails(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@walked
def test_a_failure_falls_back_before_tensors_are_placed(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("mixtral")
    theirs = load(CAUSAL, folder)
    error = ReadError(5, "the disk has gone", "somewhere")
    monkeypatch.setattr(weights_of.Batch, "result", _fails(error))
    with wl.enabled(CALLER), falls_back(CALLER):
        ours = load(CAUSAL, folder)
    ((kind, text),) = ours.warned
    assert kind is UserWarning
    assert "its own loading" in text
    assert "the disk has gone" in text
    ours.warned = []
    assert_same_outcomes(ours, theirs)
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    with wl.enabled(CALLER), pytest.raises(wl.WeightliftError, match="the disk has gone"):
        CAUSAL.from_pretrained(folder)


@pytest.mark.parametrize("cls", [CAUSAL, transformers.LlamaForCausalLM])
def test_a_warning_points_at_who_loads(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cls: Any
) -> None:
    reason = f"the disk has gone from {cls.__name__}"  # each is told once
    monkeypatch.setattr(weights_of.Batch, "start", _fails(ReadError(5, reason, "somewhere")))
    with wl.enabled(CALLER), pytest.warns(UserWarning, match=reason) as told:
        cls.from_pretrained(made("llama"))
    assert [warned.filename for warned in told] == [__file__]


@pytest.mark.parametrize("known", [True, False])
def test_memory_that_does_not_suffice(
    made: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    known: bool,
) -> None:
    if not known:
        request.getfixturevalue("unknown_walk")
    error = OutOfMemoryError("no memory")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(weights_of.Batch, "start", _fails(error))
    with wl.enabled(CALLER), falls_back(CALLER, 0), pytest.raises(torch.OutOfMemoryError):
        CAUSAL.from_pretrained(made("llama"))


@pytest.mark.usefixtures("unknown_walk")
def test_a_failure_amid_the_library_s_walk_is_raised(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ReadError(5, "the disk has gone", "somewhere")
    monkeypatch.setattr(weights_of.Batch, "result", _fails(error))
    with wl.enabled(CALLER), pytest.raises(OSError, match="the disk has gone"):
        CAUSAL.from_pretrained(made("llama"))


@walked
def test_loads_of_several_threads(made: Callable[..., Path]) -> None:
    folder = made("mixtral")
    # Built one after another, because building changes the process's default dtype.
    models = [transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE)) for _ in range(3)]
    files = [str(folder / "model.safetensors")]
    errors: list[BaseException] = []

    def run(model: Any) -> None:
        try:
            mapping = conversion_mapping.get_model_conversion_mapping(model)
            config = modeling_utils.LoadStateDictConfig(weight_mapping=mapping)
            info, _ = type(model)._load_pretrained_model(model, None, files, config)
            assert not info.missing_keys
            report = wl.last_report()
            assert report is not None
            assert report.bytes == tensor_bytes(folder)
        except BaseException as error:
            errors.append(error)

    with wl.enabled(CALLER), engine_moves(3 * tensor_bytes(folder), CALLER):
        threads = [threading.Thread(target=run, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    theirs = CAUSAL.from_pretrained(folder)
    for model in models:
        for name, tensor in theirs.state_dict().items():
            assert_same(model.state_dict()[name], tensor)


# --- Hooks


def test_disable_restores() -> None:
    names = (
        "convert_and_load_state_dict_in_model",
        "caching_allocator_warmup",
        "PreTrainedModel._load_pretrained_model",
        "PreTrainedModel.from_pretrained",
    )

    def held() -> list[Any]:
        found = []
        for name in names:
            owner: Any = modeling_utils
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            found.append(vars(owner)[last])
        return found

    before = held()
    with wl.enabled(CALLER):
        assert all(ours is not theirs for ours, theirs in zip(held(), before, strict=True))
    assert all(ours is theirs for ours, theirs in zip(held(), before, strict=True))


def test_enabled_before_the_import(made: Callable[..., Path]) -> None:
    code = """
        import sys, warnings
        warnings.simplefilter("ignore")
        import weightlift
        weightlift.enable("transformers")
        assert "torch" not in sys.modules or "transformers" not in sys.modules
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(weightlift.stats().by_caller["transformers"].bytes, weightlift.stats().fallbacks)
        """
    folder = made("tied")
    lines = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    ran = run_python(lines, folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tensor_bytes(folder)), "0"]


def test_every_hooked_signature_is_known() -> None:
    from weightlift.backends import transformers as backend

    for hook in backend.HOOKS:
        if hook.module.startswith("transformers"):
            owner: Any = modeling_utils
            for part in hook.target.split("."):
                owner = vars(owner)[part]
            function = getattr(owner, "__func__", owner)
            assert signature_text(function) in hook.adapters
