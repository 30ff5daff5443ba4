"""Configurations from YAML files, overrides and plain values, and back."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_tgdpo.config.checks import check
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.config.values import known, merged, typed, typed_override
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.storage.yaml_text import read_yaml_file


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies ``section.key=value`` overrides and checks every value.

    Values have the types of their fields, however they look: ``output_dir: 2026_11_27`` is text. ``${oc.env:NAME}`` is
    replaced by an environment variable.

    Raises:
        UserError: The file cannot be read, a key is unknown, missing, repeated or of the wrong type, or values
            contradict.
    """
    try:
        written = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from error
    values = typed(Config, written, "", str(path))
    for override in overrides:
        values = merged(values, typed_override(Config, override))
    return _build(values, str(path))


def config_from_dict(values: dict[str, Any], source: str = "config") -> Config:
    """Builds a checked :class:`Config` from nested plain values, as :func:`load_config` does from a file."""
    return _build(typed(Config, values, "", source), source)


def read_recorded(path: Path) -> dict[str, Any]:
    """The values in a ``config.yaml`` that a run wrote, of whatever version: keys that there are no more are left out.

    Raises:
        UserError: It cannot be read.
        OSError: Reading fails.
    """
    result: dict[str, Any] = typed(Config, known(Config, read_yaml_file(path)), "", str(path))
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as nested plain values."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def changed_yaml(config: Config, *, options: bool = True) -> str:
    """The keys of a config that are not as they are by default: YAML of an equal config.

    Args:
        config: The config.
        options: Whether the method's options are shown where they are as by default, too.
    """
    default = Config()
    if not options and config.loss.method in METHODS:
        unset: dict[str, Any] = dict(METHODS[config.loss.method].options)
        default = replace(default, loss=replace(default.loss, **unset))
    defaults = to_dict(default)

    def changed(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value != default[key]}

    found = changed(to_dict(config), defaults)
    nested = {k: changed(v, defaults[k]) if isinstance(defaults[k], dict) else v for k, v in found.items()}
    nested = {k: v for k, v in nested.items() if v != {}}
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def _build(values: dict[str, Any], source: str) -> Config:
    try:
        combined = OmegaConf.merge(OmegaConf.structured(Config), values)
        missing = sorted(OmegaConf.missing_keys(combined))
        if missing:
            raise UserError(f"{source}: required key {missing[0]} is not set")
        config = OmegaConf.to_object(combined)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        what = str(error).splitlines()[0]
        raise UserError(f"{source}: {key}: {what}" if key else f"{source}: {what}") from error
    assert isinstance(config, Config)
    if config.loss.method in METHODS:
        config = _with_trained_guide(_with_method_defaults(config))
    check(config, source)
    return config


def _with_method_defaults(config: Config) -> Config:
    unset: dict[str, Any] = {
        name: default for name, default in config.loss.row.options.items() if getattr(config.loss, name) is None
    }
    return replace(config, loss=replace(config.loss, **unset))


def _with_trained_guide(config: Config) -> Config:
    """With ``model.guide`` where section ``guide`` has the guide trained, unless it is set."""
    if config.guide.method is None or config.model.guide is not None or "guide" not in config.method.frozen:
        return config
    return replace(config, model=replace(config.model, guide=config.guide_dir))
