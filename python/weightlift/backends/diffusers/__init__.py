"""diffusers: the weights of models, pipelines, single files and adapters.

Hooked:

- ``ModelMixin.from_pretrained`` (`calls`): notes its options; ``_get_model_file`` and
  ``_get_checkpoint_shard_files`` say which files it found, and reading begins, before the module
  is built.
- ``load_state_dict`` (`state_dicts`): hands ``from_pretrained`` the names in a file in the place of
  tensors, and everybody else the tensors, read by the engine.
- ``ModelMixin._load_pretrained_model`` (`weights`): the engine reads all tensors to where they
  belong at once; diffusers is asked for its keys, warnings and loading info with nothing left to
  place. ``dispatch_model``: diffusers' hooks read what is on the disk from the checkpoint's files.
- ``DiffusionPipeline.from_pretrained``, ``_identify_model_variants``, ``load_sub_model``
  (`pipelines`, `archive`, `prefetch`): device maps by component, DDUF files, and the page cache.
- ``from_single_file`` and ``load_model_dict_into_meta`` (`single_file`).
- ``safetensors`` and ``safe_open`` in the loaders of adapters (`adapters`); the Hub's functions,
  where a mirror is named (`arguments`).

- ``apply_group_offloading`` and ``ModuleGroup`` (`group_offload`): the executor brings groups in.

Decided in `weights`, load by load: whether the engine can place all tensors as diffusers would; if
not, it reads them and diffusers places them.

Falls back: quantized weights, tensor parallel, GGUF, FlashPack, files that hold more than tensors,
a tensor that is in several shards, dtypes that torch does not have, other devices.
"""

from __future__ import annotations

from weightlift.backends.diffusers import group_offload
from weightlift.backends.diffusers.adapters import safetensors_module
from weightlift.backends.diffusers.arguments import from_mirror
from weightlift.backends.diffusers.calls import model_from_pretrained, on_model_file, on_shard_files
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.diffusers.pipelines import (
    load_sub_model,
    on_components,
    pipeline_from_pretrained,
)
from weightlift.backends.diffusers.single_file import from_single_file, load_model_dict_into_meta
from weightlift.backends.diffusers.state_dicts import load_state_dict
from weightlift.backends.diffusers.weights import dispatch_model, load_pretrained_model
from weightlift.backends.hooks import ANY_SIGNATURE, WITHOUT_SIGNATURE, Hook
from weightlift.backends.safetensors import open_adapters

__all__ = ["HOOKS", "release"]


_MODELS = "diffusers.models.modeling_utils"
_PIPELINES = "diffusers.pipelines.pipeline_utils"
_SUB_MODEL = (
    "(library_name, class_name, importable_classes, pipelines, is_pipeline_module, pipeline_class, "
    "dtype, provider, sess_options, device_map, max_memory, offload_folder, offload_state_dict, "
    "model_variants, name, variant, low_cpu_mem_usage, cached_folder, use_safetensors, {}"
    "provider_options, disable_mmap, quantization_config=None, use_flashpack=False, "
    "trust_remote_code=False)"
)
_LOAD_STATE_DICT = (
    "(checkpoint_file, disable_mmap=False, map_location='cpu')",
    "(checkpoint_file, dduf_entries=None, disable_mmap=False, map_location='cpu')",  # 0.40
)
HOOKS = (
    Hook(
        _MODELS,
        "ModelMixin.from_pretrained",
        {"(cls, pretrained_model_name_or_path, **kwargs)": model_from_pretrained},
    ),
    Hook(
        _MODELS,
        "ModelMixin._load_pretrained_model",
        {
            "(cls, model, state_dict, resolved_model_file, pretrained_model_name_or_path, "
            "loaded_keys, ignore_mismatched_sizes=False, assign_to_params_buffers=False, "
            "hf_quantizer=None, low_cpu_mem_usage=True, dtype=None, keep_in_fp32_modules=None, "
            "device_map=None, offload_state_dict=None, offload_folder=None, "
            "is_parallel_loading_enabled=False, disable_mmap=False, tp_shard_specs=None, "
            "tp_config=None)": load_pretrained_model,
            # 0.40
            "(cls, model, state_dict, resolved_model_file, pretrained_model_name_or_path, "
            "loaded_keys, ignore_mismatched_sizes=False, assign_to_params_buffers=False, "
            "hf_quantizer=None, low_cpu_mem_usage=True, dtype=None, keep_in_fp32_modules=None, "
            "device_map=None, offload_state_dict=None, offload_folder=None, dduf_entries=None, "
            "is_parallel_loading_enabled=False, disable_mmap=False)": load_pretrained_model,
        },
    ),
    *(
        Hook(module, "load_state_dict", dict.fromkeys(_LOAD_STATE_DICT, load_state_dict))
        for module in (
            "diffusers.models.model_loading_utils",
            _MODELS,
            "diffusers.loaders.ip_adapter",
            "diffusers.loaders.lora_base",
            "diffusers.loaders.single_file_utils",
            "diffusers.loaders.textual_inversion",
            "diffusers.loaders.unet",
        )
    ),
    Hook(
        _MODELS,
        "_get_model_file",
        {
            "(pretrained_model_name_or_path, *, weights_name, subfolder=None, cache_dir=None, "
            "force_download=False, proxies=None, local_files_only=False, token=None, "
            "user_agent=None, revision=None, commit_hash=None)": on_model_file,
            # 0.40
            "(pretrained_model_name_or_path, *, weights_name, subfolder=None, cache_dir=None, "
            "force_download=False, proxies=None, local_files_only=False, token=None, "
            "user_agent=None, revision=None, commit_hash=None, dduf_entries=None)": on_model_file,
        },
    ),
    Hook(
        _MODELS,
        "_get_checkpoint_shard_files",
        {
            "(pretrained_model_name_or_path, index_filename, cache_dir=None, proxies=None, "
            "local_files_only=False, token=None, user_agent=None, revision=None, "
            "subfolder='')": on_shard_files,
            # 0.40
            "(pretrained_model_name_or_path, index_filename, cache_dir=None, proxies=None, "
            "local_files_only=False, token=None, user_agent=None, revision=None, subfolder='', "
            "dduf_entries=None)": on_shard_files,
        },
    ),
    Hook(_MODELS, "dispatch_model", {ANY_SIGNATURE: dispatch_model}),
    Hook(
        "diffusers.loaders.single_file_model",
        "FromOriginalModelMixin.from_single_file",
        {"(cls, pretrained_model_link_or_path_or_dict=None, **kwargs)": from_single_file},
    ),
    Hook(
        "diffusers.loaders.single_file",
        "FromSingleFileMixin.from_single_file",
        {"(cls, pretrained_model_link_or_path, **kwargs)": from_single_file},
    ),
    *(
        Hook(
            f"diffusers.loaders.{module}",
            "safetensors",
            {WITHOUT_SIGNATURE: safetensors_module},
        )
        for module in ("lora_base", "textual_inversion", "unet")
    ),
    Hook("diffusers.loaders.ip_adapter", "safe_open", open_adapters(NAME)),
    Hook(
        _PIPELINES,
        "DiffusionPipeline.from_pretrained",
        {"(cls, pretrained_model_name_or_path, **kwargs)": pipeline_from_pretrained},
    ),
    Hook(
        _PIPELINES,
        "_identify_model_variants",
        {"(folder, variant, config)": on_components},
    ),
    Hook(
        _PIPELINES,
        "load_sub_model",
        dict.fromkeys(
            (
                _SUB_MODEL.format(""),
                _SUB_MODEL.format("dduf_entries, "),  # 0.40
            ),
            load_sub_model,
        ),
    ),
    *(
        Hook(
            module,
            "load_model_dict_into_meta",
            {
                "(model, state_dict, dtype=None, model_name_or_path=None, hf_quantizer=None, "
                "keep_in_fp32_modules=None, device_map=None, unexpected_keys=None, "
                "offload_folder=None, offload_index=None, state_dict_index=None, "
                "state_dict_folder=None)": load_model_dict_into_meta
            },
        )
        for module in (
            "diffusers.loaders.single_file_model",
            "diffusers.loaders.single_file_utils",
        )
    ),
    *(
        Hook(module, name, {ANY_SIGNATURE: from_mirror})
        for module, names in (
            ("diffusers.configuration_utils", ("hf_hub_download",)),
            ("diffusers.utils.hub_utils", ("hf_hub_download", "model_info", "snapshot_download")),
            (
                _PIPELINES,
                ("hf_hub_download", "model_info", "snapshot_download"),
            ),
        )
        for name in names
    ),
    # What `apply_group_offloading` calls, which others have imported by its name.
    Hook(
        "diffusers.hooks.group_offloading",
        "_apply_group_offloading",
        {"(module, config)": group_offload.apply_group_offloading},
    ),
    *(
        Hook("diffusers.hooks.group_offloading", f"ModuleGroup.{name}", {"(self)": adapter})
        for name, adapter in (
            ("_init_cpu_param_dict", group_offload.init_cpu_param_dict),
            ("onload_", group_offload.onload),
            ("offload_", group_offload.offload),
        )
    ),
)
# When the backend is switched off.
release = group_offload.release
