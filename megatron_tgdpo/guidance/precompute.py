"""Fills a guidance cache, shard by shard, on any layout; checks one against the models.

Data-parallel replicas work on shards of their own, without waiting for each other.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.console import progress
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend, resolve_device
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel
from megatron_tgdpo.distributed.ranks import (
    RankEnvironment,
    init_distributed,
    raise_on_all_ranks,
    run_on_all_ranks,
    run_on_rank0,
)
from megatron_tgdpo.errors import AgreedError
from megatron_tgdpo.guidance.cache import (
    MANIFEST_FILE,
    GuidanceCache,
    GuidanceKey,
    Shards,
    guidance_key,
    model_fingerprints,
    whole_shards,
    write_manifest,
    write_shard,
)
from megatron_tgdpo.guidance.frozen_logps import FrozenEngine, build_frozen_engine
from megatron_tgdpo.models.logp_tolerance import DRAWS, LogpDifference, logp_difference, rounding_noise
from megatron_tgdpo.resilience.open_files import allow_open_files, files_needed
from megatron_tgdpo.setup.datasets import Prepared, prepare_data
from megatron_tgdpo.setup.fingerprints import HASHES_FILE, hash_files, weights_fingerprint
from megatron_tgdpo.setup.hub_inputs import pin_inputs
from megatron_tgdpo.setup.layout import fitted_layout, layout_of
from megatron_tgdpo.setup.model_inputs import check_tokenizers, read_model_configs
from megatron_tgdpo.setup.model_sources import check_bases, model_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One dataset's cache.

    Attributes:
        directory: Of the cache.
        dataset: That it is of.
        key: What its values follow from.
        shards: Its division.
        missing: Shards that are not there, or not whole.
    """

    directory: Path
    dataset: PreferenceDataset
    key: GuidanceKey
    shards: Shards
    missing: list[int]

    @property
    def roles(self) -> tuple[str, ...]:
        """The models whose log-probs it holds, in the order of the engine's."""
        return ("reference",) if self.key.guide is None else ("reference", "guide")


def precompute_guidance(config: Config, block_pairs: int, ranks: RankEnvironment, store: dist.Store) -> None:
    """Completes the caches of a run's datasets in ``guidance.cache``, continuing what is there. Every rank calls.

    Args:
        config: The run; its layout and packs may differ from those of the training that will use the cache.
        block_pairs: Pairs of a shard.
        ranks: This process's place.
        store: Joins all ranks.

    Raises:
        UserError: Bad input, or the disk is full; what was written is kept.
    """

    def fill(engine: FrozenEngine, name: str, work: Work) -> None:
        if work.missing:
            _compute(engine, name, work)
        # Shards of other replicas are there only after this.
        dist.barrier()
        raise_on_all_ranks(lambda: _complete(work))

    _on_each_dataset(config, block_pairs, ranks, store, fill)


def verify_guidance(config: Config, sample: int, ranks: RankEnvironment, store: dist.Store) -> None:
    """Computes some pairs of complete caches again and compares. Every rank calls.

    Args:
        config: The run.
        sample: Pairs of each dataset, drawn with ``train.seed``.
        ranks: This process's place.
        store: Joins all ranks.

    Raises:
        UserError: A cache is not complete, or not of this run; a log-prob differs by more than rounding explains.
    """

    def verify(engine: FrozenEngine, name: str, work: Work) -> None:
        cache = GuidanceCache(work.directory, work.dataset.trained_lengths, use_guide=work.key.guide is not None)
        rng = np.random.default_rng(config.train.seed)
        pairs = sorted(rng.choice(len(work.dataset), min(sample, len(work.dataset)), replace=False).tolist())
        values = engine.logps(work.dataset, pairs)
        noisy = []
        for draw in range(DRAWS):
            with rounding_noise(engine.models, engine.device, draw):
                noisy.append(engine.logps(work.dataset, pairs))
        cached = {index: np.stack([logps for logps in cache.logps(index) if logps is not None]) for index in values}
        for number, role in enumerate(work.roles):

            def apart(others: list[dict[int, np.ndarray]], number: int = number) -> LogpDifference:
                parts = [
                    (
                        torch.from_numpy(other[index][number] - values[index][number]),
                        torch.from_numpy(work.dataset.trained_lengths[index, 1:].astype(np.int64)),
                    )
                    for other in others
                    for index in values
                ]
                return logp_difference(parts, engine.device)

            found, allowed = apart([cached]), apart(noisy).allowing()
            if not found.within(allowed):
                raise AgreedError(
                    f"{work.directory}: a log-prob of the {role} in {len(pairs)} sampled pairs differs by {found} nats "
                    f"from the model's, and rounding explains {allowed}: remove the cache and run "
                    "tgdpo guidance again"
                )
            logger.info("%s: %s of %d pairs computed again: differs by up to %s nats", name, role, len(pairs), found)

    _on_each_dataset(config, None, ranks, store, verify)


def _on_each_dataset(
    config: Config,
    block_pairs: int | None,
    ranks: RankEnvironment,
    store: dist.Store,
    action: Callable[[FrozenEngine, str, Work], None],
) -> None:
    device = resolve_device(config.parallel.device)
    if device.type == "cpu":
        enable_cpu_backend()
    layout = replace(layout_of(config.parallel, ranks.world_size), virtual=1)
    config, _ = pin_inputs(config, ranks, dist.PrefixStore("hub", store))
    configs = read_model_configs(config)
    layout = fitted_layout(config, configs, layout)
    needed = files_needed(layout, device)
    run_on_all_ranks(lambda: allow_open_files(needed), dist.PrefixStore("open_files", store), ranks)
    cache, sources = Path(str(config.guidance.cache)), model_sources(config)
    # The policy's base as well, where an adapter says of which base it is.
    adapted = any(sources[role].adapter is not None for role in config.method.frozen)
    read = ("policy", *config.method.frozen) if adapted else config.method.frozen
    digests = hash_files(
        lambda: [file for role in read for file in sources[role].files],
        cache / HASHES_FILE,
        ranks,
        dist.PrefixStore("hashes", store),
        again=config.train.rehash,
    )
    plans = run_on_rank0(
        lambda: {name: asdict(plan) for name, plan in _plans(config, block_pairs, digests).items()}, store, ranks.rank
    )
    init_distributed(ranks, device, config.parallel.timeout_minutes, store)
    pg = init_model_parallel(layout, config.train.seed, config.parallel.timeout_minutes)
    try:
        engine = build_frozen_engine(config, configs, layout, pg, device)
        for name, plan in plans.items():
            action(engine, name, _Plan.of_json(plan).work(cache / name))
    finally:
        destroy_model_parallel()


@dataclass(frozen=True)
class _Plan:
    """What :class:`Work` is made from on any rank.

    Attributes:
        data: The dataset.
        key: Of its cache.
        block_pairs: Pairs of a shard.
        missing: Shards that are not there, or not whole.
    """

    data: Prepared
    key: GuidanceKey
    block_pairs: int
    missing: list[int]

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "_Plan":
        """What ``dataclasses.asdict`` made of one."""
        return cls(**{**value, "data": Prepared(**value["data"]), "key": GuidanceKey(**value["key"])})

    def work(self, directory: Path) -> Work:
        """On the cache in a directory."""
        dataset = self.data.open()
        return Work(directory, dataset, self.key, Shards(dataset.trained_lengths, self.block_pairs), self.missing)


def _plans(config: Config, block_pairs: int | None, digests: Mapping[str, str]) -> dict[str, _Plan]:
    """What is to be done for each dataset; ``block_pairs`` is None where complete caches are wanted. On one rank."""
    sources = model_sources(config)
    if any(source.adapter is not None for role, source in sources.items() if role in config.method.frozen):
        check_bases(sources, weights_fingerprint(sources["policy"].base, digests))
    lacking = check_tokenizers(config)
    cache = Path(str(config.guidance.cache))
    models = model_fingerprints(config, digests)
    plans = {}
    for name, prepared in prepare_data(config, cache / "data", lacking).items():
        dataset, directory = prepared.open(), cache / name
        dataset.verify()
        key = guidance_key(config, dataset, models)
        directory.mkdir(parents=True, exist_ok=True)
        if block_pairs is None or (directory / MANIFEST_FILE).exists():
            whole = GuidanceCache(directory, dataset.trained_lengths, use_guide=key.guide is not None)
            whole.check_key(key)
            if block_pairs is None:
                whole.check_content()
            shards, key = whole.shards, whole.key
        else:
            shards = Shards(dataset.trained_lengths, block_pairs)
        missing = sorted(set(range(shards.count)) - whole_shards(directory, key, shards).keys())
        logger.info("%s: %d pairs, %d of %d shards to compute", name, len(dataset), len(missing), shards.count)
        plans[name] = _Plan(prepared, key, shards.block_pairs, missing)
    return plans


def _compute(engine: FrozenEngine, name: str, work: Work) -> None:
    """This replica's part of the missing shards."""
    mine = work.missing[engine.pg.dp.rank() :: engine.pg.dp.size()]
    pairs = sum(len(work.shards.pairs(shard)) for shard in mine)
    with progress(f"guidance, {name}", pairs, "pair", shown=dist.get_rank() == 0) as bar:
        for turn in range(math.ceil(len(work.missing) / engine.pg.dp.size())):
            # Without a shard at the last turn this replica's experts may be asked for.
            shard = mine[turn] if turn < len(mine) else None
            indices: Sequence[int] = [] if shard is None else work.shards.pairs(shard)
            found = engine.logps(work.dataset, indices)
            if shard is not None and engine.receives:
                values = np.concatenate([found[index] for index in indices], axis=1)
                write_shard(work.directory, shard, work.key, dict(zip(work.roles, values, strict=True)))
            bar.update(len(indices))


def _complete(work: Work) -> None:
    if dist.get_rank() == 0:
        write_manifest(work.directory, work.key, work.shards)
        logger.info("%s: complete", work.directory)
