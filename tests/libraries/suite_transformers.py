"""transformers' own tests for all models, on three generated models: a plain one, a mixture of
experts whose weights are converted, and one with tied weights. The source archive has these tests,
but not their imports for generation and export."""

from __future__ import annotations

import sys
import types
import unittest
from typing import Any

import torch
import transformers

for name, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    module = types.ModuleType(f"tests.{name}")
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules[f"tests.{name.partition('.')[0]}"] = types.ModuleType("package")
    sys.modules[module.__name__] = module

from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,  # rows of 16 bytes, or torch has no grouped product of experts
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Tester:
    """The interface of a model that transformers' tests need."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, config: Any) -> None:
        self._config = config
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> Any:
        return type(self._config)(**self._config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(5, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class OfModel(ModelTesterMixin):
    config: Any

    def setUp(self) -> None:
        self.model_tester = Tester(self.config)


class TestLlama(OfModel, unittest.TestCase):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    all_model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
    )


class TestMixtral(OfModel, unittest.TestCase):
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0
    )
    all_model_classes = (transformers.MixtralModel, transformers.MixtralForCausalLM)


class TestBert(OfModel, unittest.TestCase):
    config = transformers.BertConfig(**SMALL)
    all_model_classes = (
        transformers.BertModel,
        transformers.BertForMaskedLM,
        transformers.BertForTokenClassification,
    )


del OfModel, ModelTesterMixin  # pytest would take them for tests
