"""Whether rows fit into the positions that models have, known from their configurations, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from srd_lightning.errors import SettingError, SRDError
from srd_lightning.models.pretrained import Pretrained


def check_positions(models: Mapping[str, Pretrained | nn.Module | None], tokens: Mapping[str, int]) -> None:
    """Check that no row may be longer than a model has positions for.

    Args:
        models: By name; one whose configuration does not say how many positions it has is not looked at.
        tokens: Most tokens that a setting lets a row have, by name of the setting.

    Raises:
        SettingError: A setting lets rows be longer than a model has positions for.
    """
    for name, model in models.items():
        positions = _positions(model)
        for setting, number in tokens.items():
            if positions is not None and number > positions:
                raise SettingError(
                    f"{setting} lets a row have {number} tokens, but the {name} has {positions} positions; set it "
                    f"to at most {positions}"
                )


def _positions(model: Pretrained | nn.Module | None) -> int | None:
    config: Any = _configuration(model) if isinstance(model, Pretrained) else getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _configuration(source: Pretrained) -> Any:
    """Return the configuration of a model that is not loaded yet; what is wrong with it is said where it is loaded."""
    if source.gguf_file is not None:
        return None
    try:
        return source.config()
    except SRDError:
        return None
