"""The training of the guide that section ``guide`` of a TGDPO config asks for, as a config of its own."""

from dataclasses import replace

from megatron_tgdpo.config.loading import config_from_dict, to_dict
from megatron_tgdpo.config.schema import Config, ExportConfig, GuidanceConfig, GuideConfig, LossConfig
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS


def guide_config(config: Config, source: str = "config") -> Config:
    """The run in ``config.guide_dir``: from the policy's start, on its data, with the section's method and values.

    Args:
        config: Of the TGDPO run.
        source: Where it comes from, for errors.

    Raises:
        UserError: It has no section ``guide``, or its values contradict with that method.
    """
    guide = config.guide
    if guide.method is None:
        raise UserError(f"{source}: guide.method is not set: set it to the method of the guide's training, as dpo")
    train, optimizer = config.train, config.optimizer
    if guide.steps is not None or guide.epochs is not None:
        train = replace(train, steps=guide.steps, epochs=guide.epochs)
    if guide.lr is not None:
        optimizer = replace(optimizer, lr=guide.lr)
    layers = replace(config.parallel.pipeline_layers, guide=None)
    if "reference" not in METHODS[guide.method].frozen:
        layers = replace(layers, reference=None)
    derived = replace(
        config,
        model=replace(config.model, guide=None),
        loss=LossConfig(method=guide.method, beta=guide.beta, gamma=guide.gamma),
        guide=GuideConfig(),
        # Its reference is the policy's, so that no cache of the TGDPO run is there yet.
        guidance=GuidanceConfig(),
        parallel=replace(config.parallel, pipeline_layers=layers),
        train=replace(train, branch_from=None),
        # Of the policy: its metric may be one that the guide's method has not, and nobody serves the guide.
        checkpoint=replace(config.checkpoint, best_metric=None),
        export=ExportConfig(),
        optimizer=optimizer,
        output_dir=config.guide_dir,
    )
    if "reference" not in derived.method.frozen:
        derived = replace(derived, model=replace(derived.model, reference=None))
    return config_from_dict(to_dict(derived), f"{source}: the guide's training")
