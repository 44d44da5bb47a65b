"""Errors for files that torch cannot read: they say what the file is and what to do."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator

from weightlift.checkpoint.first_bytes import FirstBytes
from weightlift.core.errors import FormatError, OutOfMemoryError, WeightliftError

__all__ = ["ONE_OF_A_PIPELINE", "errors_of_torch", "explained"]

ONE_OF_A_PIPELINE = (
    "this is a whole pipeline: load_checkpoint(path, subfolder=...) loads a component of it"
)

_TORCHSCRIPT = (
    "this is a TorchScript archive, which holds code: if you trust it, load it with torch.jit.load "
    "and save its state_dict()"
)


def explained(error: FormatError, path: str) -> FormatError:
    """Replaces an archive error by one that says what the file is, if recognized."""
    if "torch's tar format" in error.message:  # a pickle, though not a readable one
        return FormatError("malformed_pickle", error.message, path, error.offset)
    if path.lower().endswith(".dduf"):
        return FormatError("not_weights", ONE_OF_A_PIPELINE, path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:
        return error
    inside = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inside or any("/code/" in f"/{name}" for name in names):
        return FormatError("torchscript", _TORCHSCRIPT, path)
    if names and all(name.endswith(".npy") for name in names):
        message = "this is an archive of numpy arrays: load it with numpy.load"
        return FormatError("not_weights", message, path)
    if "[Content_Types].xml" in inside or "config.json" in inside:
        message = "this is a zip archive without a torch checkpoint: unpack it and load its files"
        return FormatError("not_weights", message, path)
    return error


@contextlib.contextmanager
def errors_of_torch(path: str, data: bytes | None = None) -> Iterator[None]:
    """Turns every exception of torch's unpickler into a ``FormatError``.

    Args:
        path: the file.
        data: its pickle, if that is a part of the file.
    """
    try:
        yield
    except (WeightliftError, OSError):
        raise
    except Warning as error:  # the caller turned warnings into errors
        if "pickle protocol" not in str(error):
            raise
        raise FormatError("unsafe_pickle", _refused("", path, data), path) from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{path}: too little memory to unpickle it") from error
    except NotImplementedError as error:
        raise FormatError(
            "unsupported_tensor",
            f"it has tensors that cannot be indexed (perhaps quantized or nested ones): "
            f"{str(error)[:200]}",
            path,
        ) from error
    except pickle.UnpicklingError as error:
        # torch.load adds advice to load with weights_only=False, which is removed here.
        text = str(error)
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = reason.partition(" Please use `torch.serialization")[0]
        raise FormatError("unsafe_pickle", _refused(reason, path, data), path) from error
    except Exception as error:
        # A malformed pickle may cause any error in torch: IndexError, KeyError, TypeError, ...
        raise FormatError("malformed_pickle", _failed(error), path) from error


def _refused(reason: str, path: str, data: bytes | None) -> str:
    first = _first(path) if data is None else data[:2]
    trusted = "if you trust the file, load it with torch.load(weights_only=False), and save"
    if first[:1] == b"\x80" and len(first) > 1 and first[1] not in (2, 3):
        return (
            f"it was saved with pickle_protocol={first[1]}, and torch's weights-only unpickler "
            f"reads protocol 2: {trusted} the state dict again with torch's own protocol"
        )
    if "DTensor" in reason or "torch.distributed" in reason:
        return (
            "it has DTensors, parts of a model that several processes share: import "
            "torch.distributed.tensor before the load, or save whole tensors "
            "(tensor.full_tensor(), or get_model_state_dict with full_state_dict=True)"
        )
    if first[:1] == b"(" or (data is not None and first[:1] != b"\x80"):
        return (
            "it is a pickle of protocol 0 or 1, and torch's weights-only unpickler reads protocol "
            f"2: {trusted} the state dict again with torch's own protocol"
        )
    if first[:1] != b"\x80":
        return (
            f"this is not a file of torch.save: it begins with {first[:8]!r}, not with a zip "
            "archive or a pickle; check what it is, or download it again"
        )
    if data is None and not _is_legacy(path):
        return (
            "this is a pickle that torch.save did not write (perhaps pickle.dump or joblib): "
            f"{trusted} the state dict with torch.save or weightlift.save_file"
        )
    if re.search(r"Unsupported (global|class|function)", reason):
        reason = _whole_object(reason)
    return (
        f"torch's weights-only unpickler refuses it: {reason[:300]} Save the plain state dict, or, "
        "if you trust the file, allow the name with torch.serialization.add_safe_globals"
    )


def _whole_object(reason: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    name = found[1] if found else ""
    if ".nn.modules." in name or name.rpartition(".")[2][:1].isupper():
        return f"{reason} (it is a whole object, perhaps a module, instead of its state dict)."
    return reason


def _failed(error: Exception) -> str:
    failure = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(error, UnicodeDecodeError):
        return (
            "it has Python 2 text of unknown encoding: load it with "
            "torch.load(path, weights_only=True, encoding='latin1') (or encoding='bytes'), and "
            "save the state dict again"
        )
    if "Invalid magic number" in failure:
        return (
            "this is a pickle that torch.save did not write (perhaps pickle.dump or joblib): if "
            "you trust it, load it with pickle, and save the state dict with torch.save or "
            "weightlift.save_file"
        )
    if "legacy .tar format" in failure:
        return (
            "this is torch's tar format from before 2017: if you trust it, load it with "
            "torch.load(weights_only=False), and save its state dict again"
        )
    if isinstance(error, AttributeError) and "UntypedStorage" in failure:
        return (
            "it is in torch's format from before 1.6 with newer dtypes (float8, unsigned "
            "integers), which the weights-only unpickler cannot load: if you trust the file, load "
            "it with torch.load(weights_only=False), and save it again without "
            "_use_new_zipfile_serialization=False"
        )
    return (
        f"torch cannot unpickle it ({failure}): the file is damaged; download it or save it again"
    )


def _first(path: str) -> bytes:
    try:
        return FirstBytes.of(path).head
    except OSError:
        return b""


def _is_legacy(path: str) -> bool:
    """Whether a file begins with the magic number of torch.save before 1.6."""
    try:
        for opcode, argument, _ in pickletools.genops(FirstBytes.of(path).head):
            if opcode.name in ("LONG1", "LONG"):
                return bool(argument == 0x1950A86A20F9469CFC6C)
            if opcode.name == "STOP":
                return False
    except Exception:
        return False
    return False
