"""transformers: what ``PreTrainedModel`` and ``AutoModel*`` load from files, adapters included.

Hooked (`calls`):

- ``PreTrainedModel.from_pretrained``: notes its options, and takes ``load_in_8bit``.
- ``_get_resolved_checkpoint_files`` and ``get_model_conversion_mapping``: when the files are known
  and the model is built, what needs no renaming is on its way (`prefetch`).
- ``PreTrainedModel._load_pretrained_model``: is given the tensors of a ``Checkpoint`` (`weights`)
  in the place of slices of opened files.
- ``convert_and_load_state_dict_in_model``: the library's walk over the tensors. Where it is one of
  those that are known (`compat`), `walk` takes its place: `targets` says which tensor becomes
  which, `layout` what is written straight to its place in a stack, `shards` what this rank reads of
  a model that the library has cut (tensor and expert parallel, FSDP), and one plan brings every
  tensor to its parameter's device and dtype.
- ``caching_allocator_warmup``: left out where the walk reserves device memory itself.
- peft's ``safe_load_file``.

Decided in `open_files`, load by load: whether the engine can do it. Where the walk is not known
(quantizers; other versions) the library walks: what it takes as it is finds its tensor already at
its place, everything else is handed out as mapped.

Falls back: GGUF, pipeline parallel, accelerate's FSDP, DeepSpeed ZeRO-3, devices that are neither
CPU nor CUDA, files that hold more than tensors; and, before any tensor is placed, a load in which
the engine fails.
"""

from __future__ import annotations

from weightlift.backends.hooks import Hook
from weightlift.backends.safetensors import load_file_adapters
from weightlift.backends.transformers.calls import (
    files_found,
    from_pretrained,
    load_of_class,
    load_of_keys,
    load_of_model,
    model_built,
    not_walked,
    replace_walk,
    warm_up,
)
from weightlift.backends.transformers.weights import CALLER

__all__ = ["HOOKS"]

_MODEL = "transformers.modeling_utils"
_FROM_PRETRAINED = (
    "(cls, pretrained_model_name_or_path, *model_args, config=None, cache_dir=None, "
    "ignore_mismatched_sizes=False, force_download=False, local_files_only=False, token=None, "
    "revision='main', use_safetensors=None, weights_only=True, {}**kwargs)"
)
_RESOLVED = (
    "(pretrained_model_name_or_path, variant, gguf_file, use_safetensors, user_agent, "
    "is_remote_code, transformers_explicit_filename=None, download_kwargs=None{})"
)
HOOKS = (
    Hook(
        _MODEL,
        "PreTrainedModel._load_pretrained_model",
        {
            "(cls, model, state_dict, checkpoint_files, load_config)": load_of_class,  # 5.0
            "(model, state_dict, checkpoint_files, load_config)": load_of_model,  # 5.1
            "(model, state_dict, checkpoint_files, load_config, expected_keys=None)": (
                load_of_keys  # 5.4
            ),
        },
    ),
    Hook(
        _MODEL,
        "convert_and_load_state_dict_in_model",
        {
            "(model, state_dict, load_config, tp_plan, dtype_plan=None, disk_offload_index=None)": (
                not_walked  # 5.0
            ),
            "(model, state_dict, load_config, tp_plan, disk_offload_index=None)": (
                not_walked  # 5.1
            ),
            "(model, state_dict, load_config, disk_offload_index=None)": replace_walk,  # 5.16
        },
    ),
    Hook(
        _MODEL,
        "caching_allocator_warmup",
        {"(model, expanded_device_map, hf_quantizer)": warm_up},
    ),
    Hook(
        _MODEL,
        "PreTrainedModel.from_pretrained",
        {
            _FROM_PRETRAINED.format(""): from_pretrained,
            _FROM_PRETRAINED.format("fusion_config=None, disable_mmap=None, "): (
                from_pretrained  # 5.6
            ),
        },
    ),
    Hook(
        _MODEL,
        "_get_resolved_checkpoint_files",
        {
            _RESOLVED.format(""): files_found,
            _RESOLVED.format(", tqdm_class=None"): files_found,  # 5.4
        },
    ),
    Hook(
        _MODEL,
        "get_model_conversion_mapping",
        {"(model, key_mapping=None, hf_quantizer=None, add_legacy=True)": model_built},
    ),
    Hook("peft.utils.save_and_load", "safe_load_file", load_file_adapters(CALLER)),
)
