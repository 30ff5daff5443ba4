"""docs/configuration.md names every key with its default."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import omegaconf
import pytest

from megatron_tgdpo.config.schema import Config

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def keys(config: type = Config, prefix: str = "") -> list[tuple[str, Any]]:
    hints, found = get_type_hints(config), []
    for field in fields(config):
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found += keys(kind, f"{prefix}{field.name}.")
        else:
            found.append((f"{prefix}{field.name}", field.default))
    return found


@pytest.mark.parametrize(("key", "default"), keys())
def test_every_key_is_documented_with_its_default(key: str, default: Any) -> None:
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{key}` |")]
    required = default is MISSING or default == omegaconf.MISSING
    words = {"True": "true", "False": "false", "None": "null"}
    shown = "" if required else words.get(str(default), str(default))
    assert row.split("|")[2].strip() == shown
