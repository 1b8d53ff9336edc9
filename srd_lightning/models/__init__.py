"""Models of Hugging Face: loaded, cut, checked, called, taken apart, and asked for answers.

Imports `losses`, `data` and `distributed`. Begin with `pretrained`; `split` has body and head of a model apart.
"""

from srd_lightning.models.pretrained import Pretrained

__all__ = [
    "Pretrained",
]
