def should_skip_weight(name, local_expert_ids):
    if local_expert_ids is None or ".experts." not in name:
        return False
    return int(name.partition(".experts.")[2].partition(".")[0]) not in local_expert_ids
