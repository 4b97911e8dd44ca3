"""What every section of the settings is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; unknown names are errors; each field's description stands below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def check_heads(name: str, width: int, heads: int) -> None:
    """Raises ValueError where attention heads can't share a width evenly; name: the setting of the width."""
    if width % heads:
        raise ValueError(f"{name} {width} is not a multiple of heads {heads}")
