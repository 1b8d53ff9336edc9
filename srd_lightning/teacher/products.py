"""The weights of a frozen model's products, once in the type in which autocast makes these.

Autocast keeps what it has cast of weights that are trained, and casts those of a frozen model anew at every call.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Give linear layers weights as autocast would cast them, which changes no bit of what the model says under it.

    Embeddings, norms, and weights that are no linear layer's (of experts, of routers) stay as they are. A head that is
    tied to an embedding gets a weight of its own.

    Args:
        model: Frozen; changed.
        dtype: Of the products.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4), nn.LayerNorm(4))
        >>> cast_products(model, torch.bfloat16)
        >>> [weight.dtype for weight in model.parameters()]
        [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    """
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):  # what is derived from them may want its weights otherwise
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dtype == torch.float32:
                    setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
