"""Tiny models of transformers, and a load with the backend against the same load without it."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import weightlift as wl
from backend_support import engine_moves, tensor_bytes
from support import assert_same

# torchao and bitsandbytes, which transformers imports if they are installed, warn about this
# machine.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers import (  # noqa: F401  # for who imports this
        conversion_mapping,
        core_model_loading,
        initialization,
        modeling_utils,
    )

CALLER = "transformers"
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# Before, the library walks, and reads what it then finds to be of another shape.
walked = pytest.mark.skipif(
    VERSION < (5, 16), reason="the walk of transformers before 5.16 is left as it is"
)
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {
    **LLAMA,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 8,
    "num_experts": 12,
    "num_local_experts": 12,
    "num_experts_per_tok": 2,
    "head_dim": 4,
}
BERT = {**LLAMA, "max_position_embeddings": 16, "num_hidden_layers": 2}


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    model.train()(torch.randn(2, 3, 32, 32))  # the running statistics are no longer 0 and 1
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "resnet": resnet,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, use_swiglu_ffn=True,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``made("llama", dtype, **save_arguments)``: the folder of a saved model."""

    @functools.cache
    def make(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(sum(map(ord, name)))
        MODELS[name]().to(dtype).save_pretrained(folder, **arguments)
        return folder

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars; restores the state after every test."""
    transformers.utils.logging.disable_progress_bar()
    yield
    wl.disable()


@dataclass
class Outcome:
    """Everything that a load shows."""

    model: Any = None
    info: dict[str, Any] = field(default_factory=dict)
    logs: list[tuple[str, str]] = field(default_factory=list)
    warned: list[tuple[type, str]] = field(default_factory=list)
    error: Exception | None = None


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        # The rows of the loading report come in the order of a set.
        lines = sorted(line.strip() for line in record.getMessage().splitlines())
        self.found.append((record.levelname, "\n".join(lines)))


def load(
    cls: Any, path: Path | str | None, /, raises: type[Exception] | None = None, **kwargs: Any
) -> Outcome:
    """One load, with its messages."""
    outcome = Outcome()
    records = Records()
    logger = logging.getLogger("transformers")
    for once in (logging.Logger.warning_once, logging.Logger.info_once):  # type: ignore[attr-defined]
        once.cache_clear()
    torch.manual_seed(7)
    logger.addHandler(records)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if raises is None:
                found = cls.from_pretrained(path, output_loading_info=True, **kwargs)
                outcome.model, outcome.info = found
            else:
                with pytest.raises(raises) as error:
                    cls.from_pretrained(path, **kwargs)
                outcome.error = error.value
    finally:
        logger.removeHandler(records)
    outcome.logs = records.found
    outcome.warned = [(w.category, str(w.message)) for w in warned]
    return outcome


def assert_same_models(ours: Any, theirs: Any) -> None:
    """The same tensors in the same places, with the same ties and the same messages."""
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(ours, kind)(remove_duplicate=False))
        stock = dict(getattr(theirs, kind)(remove_duplicate=False))
        assert list(mine) == list(stock)
        for name, tensor in stock.items():
            assert type(mine[name]) is type(tensor), name
            assert mine[name].device == tensor.device, name
            assert mine[name].requires_grad == tensor.requires_grad, name
            assert mine[name].stride() == tensor.stride(), name
            assert vars(mine[name]).keys() == vars(tensor).keys(), name
            if tensor.device.type == "meta":
                assert (mine[name].shape, mine[name].dtype) == (tensor.shape, tensor.dtype)
            else:
                assert_same(mine[name].data.cpu(), tensor.data.cpu())
        tied = [
            {names[0]: names for names in groups.values()}
            for groups in (_by_identity(mine), _by_identity(stock))
        ]
        assert tied[0] == tied[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.training == theirs.training
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)
    conversions = [
        [(type(c), c.source_patterns, c.target_patterns) for c in model._weight_conversions]
        for model in (ours, theirs)
    ]
    assert conversions[0] == conversions[1]


def _by_identity(tensors: dict[str, torch.Tensor]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return groups


def assert_same_outcomes(ours: Outcome, theirs: Outcome) -> None:
    assert ours.info == theirs.info
    assert ours.logs == theirs.logs
    assert ours.warned == theirs.warned
    if theirs.error is None:
        assert ours.error is None
        assert_same_models(ours.model, theirs.model)
    else:
        assert type(ours.error) is type(theirs.error)
        assert str(ours.error) == str(theirs.error)


def both(cls: Any, path: Path, moved: int | None = None, /, **kwargs: Any) -> tuple[Any, Any]:
    """Loads without and with the backend, and compares; returns (ours, theirs).

    ``moved`` are the tensor bytes that the engine is to move: by default, the checkpoint's.
    """
    theirs = load(cls, path, **kwargs)
    nbytes = tensor_bytes(path / kwargs.get("subfolder", "")) if moved is None else moved
    with wl.enabled(CALLER), engine_moves(nbytes, CALLER):
        ours = load(cls, path, **kwargs)
    assert_same_outcomes(ours, theirs)
    return ours, theirs


DTYPES = [None, "auto", "float32", "bfloat16"]
CAUSAL = transformers.AutoModelForCausalLM
