_LOAD_FORMAT_TO_MODEL_LOADER: dict = {}
registrations: list = []


def get_model_loader(load_config):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    kind = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_config.load_format, DefaultModelLoader)
    return kind(load_config)


def register_model_loader(name):
    def wrapper(kind):
        registrations.append(name)
        _LOAD_FORMAT_TO_MODEL_LOADER[name] = kind
        return kind

    return wrapper
