"""Models of Hugging Face: loaded, cut, checked, called, taken apart, and asked for answers.

Imports `losses`, `data` and `distributed`. Begin with `pretrained`; `split` takes body and head of a decoder apart,
`encoder_decoder` what comes before the head of an encoder-decoder; `lockstep` lets ranks ask a sharded model.
"""

from srd_lightning.models.pretrained import Pretrained

__all__ = [
    "Pretrained",
]
