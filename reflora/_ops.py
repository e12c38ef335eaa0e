"""The name under which the operators are registered; a copy from the Hugging Face kernels hub has its own."""

import torch

NAMESPACE = "reflora"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The name that `torch.library` takes; the function is the kernels hub's convention."""
    return f"{NAMESPACE}::{name}"
