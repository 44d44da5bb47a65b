"""Tensors into a module: parameter references, matching, device maps, DTensors, offload."""
