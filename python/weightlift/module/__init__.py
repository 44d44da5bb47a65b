"""Fills modules with tensors: parameter references, matching, device maps, DTensors, offload."""
