"""Loads of models by their libraries, by accelerate and by weightlift."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from .adapter import Job, Load, dtype_of, reports
from .files import with_phases

if TYPE_CHECKING:
    from weightlift.load.options import Mode

__all__ = [
    "accelerate",
    "backend",
    "construction",
    "load_into",
    "mixin",
    "mixin_twin",
    "reading",
    "reported",
    "stock",
]


def model_class(job: Job) -> Any:
    module, name = job.model_class()
    return getattr(importlib.import_module(module), name)


def from_pretrained(job: Job, cls: Any, mode: Mode | None = None) -> Load:
    """``mode``: weightlift's, which only its own classes take."""
    options: dict[str, object] = {} if mode is None else {"mode": mode}
    if job.dtype is not None:
        options["dtype"] = dtype_of(job)
    if job.device != "cpu":
        options["device_map"] = job.device
    if job.mode == "read":
        options["disable_mmap"] = True  # the libraries' own option for this
    if job.files and all(file.endswith(".bin") for file in job.files):
        options["use_safetensors"] = False  # there may be .safetensors files beside them
    return lambda: cls.from_pretrained(job.folder, **options)


def stock(job: Job) -> Load:
    return from_pretrained(job, model_class(job))


def on_meta(job: Job) -> Any:
    import accelerate

    cls = model_class(job)
    with accelerate.init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            return cls.from_config(cls.load_config(job.folder))
        return cls(cls.config_class.from_pretrained(job.folder))


def accelerate(job: Job) -> Load:
    """``load_checkpoint_in_model``: the model is on ``meta`` when the clock starts."""
    import accelerate

    model = on_meta(job)
    where = job.files[0] if len(job.files) == 1 else job.folder

    def load() -> Any:
        accelerate.load_checkpoint_in_model(
            model, where, device_map={"": job.device}, dtype=dtype_of(job)
        )
        return model

    return load


def reported(load: Load) -> Load:
    from weightlift.core.report import last_report

    with_phases()

    def reported() -> Any:
        model = load()
        reports.append(last_report())
        return model

    return reported


def backend(job: Job) -> Load:
    from weightlift.backends import enable

    cls = model_class(job)
    enable()
    return reported(from_pretrained(job, cls))


def _mixin_class(job: Job) -> Any:
    from weightlift.models.model_mixin import ModelMixin

    stock = model_class(job)
    return type(stock.__name__, (ModelMixin, stock), {})


def mixin(job: Job) -> Load:
    """The same model, as a subclass of weightlift's ModelMixin."""
    return reported(from_pretrained(job, _mixin_class(job), job.mode))


def mixin_twin(job: Job) -> Load:
    """The same, from the files with the suffix .safetensors."""
    return mixin(dataclasses.replace(job, files=job.files_as(".safetensors")))


def construction(job: Job) -> Load:
    """The model's construction alone, without memory for its weights."""
    from weightlift.models.building import Builder

    cls = _mixin_class(job)
    config = cls.load_config(job.folder)
    return lambda: Builder(cls, config, {}, dtype_of(job)).build(empty=True)


def reading(job: Job) -> Load:
    """Only the reading of the model's from_pretrained."""
    from weightlift.load_file import load_checkpoint

    return reported(
        lambda: load_checkpoint(job.folder or "", job.device, dtype=job.dtype, mode=job.mode)
    )


def load_into(job: Job) -> Load:
    """``load_into`` alone: the model is on ``meta`` when the clock starts."""
    from weightlift.load_into import load_into

    model = on_meta(job)
    folder, dtype = job.folder or "", dtype_of(job) or "auto"
    with_phases()

    def load() -> Any:
        reports.append(
            load_into(
                model, folder, device_map=job.device, dtype=dtype, strict=False, mode=job.mode
            )
        )
        return model

    return load
