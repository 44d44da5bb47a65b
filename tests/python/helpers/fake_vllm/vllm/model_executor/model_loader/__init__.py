_LOAD_FORMAT_TO_MODEL_LOADER: dict = {}
registrations: list = []


def register_model_loader(name):
    def wrapper(kind):
        registrations.append(name)
        _LOAD_FORMAT_TO_MODEL_LOADER[name] = kind
        return kind

    return wrapper
