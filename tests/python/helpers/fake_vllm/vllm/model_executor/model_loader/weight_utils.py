def filter_safetensors_files_by_weight_name(files, is_unused):
    from safetensors import safe_open

    kept = []
    for file in files:
        with safe_open(file, "pt") as opened:
            if not all(is_unused(name) for name in opened.keys()):  # noqa: SIM118
                kept.append(file)
    return kept
