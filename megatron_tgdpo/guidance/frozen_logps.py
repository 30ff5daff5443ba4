"""Forward passes of the frozen models alone, on any layout.

The reference takes the policy's place in the pipeline and the guide runs co-located with it, so that what runs is the
very forward of co-located training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.frozen.colocated import ColocatedModel, TokenLogps
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator
from megatron_tgdpo.frozen.forward_logps import forward_logps
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.models.lora import set_active
from megatron_tgdpo.setup.layout import pack_format
from megatron_tgdpo.setup.models import load_frozen_models


@dataclass(frozen=True)
class FrozenEngine:
    """The frozen models of this rank, and what moves their hidden states (None with one stage)."""

    model: ColocatedModel
    communicator: ColocatedCommunicator | None
    pg: ProcessGroupCollection
    pack_format: PackFormat
    device: torch.device

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """Those of reference and guide; one, where both are adapters of it."""
        return tuple(dict.fromkeys((self.model.policy, *self.model.frozen.models)))

    @property
    def receives(self) -> bool:
        """Whether this rank is the one of its data-parallel replica that gets the results."""
        pg = self.pg
        result: bool = pg.pp.rank() == pg.pp.size() - 1 and pg.tp.rank() == 0 and pg.cp.rank() == 0
        return result

    def logps(self, dataset: PreferenceDataset, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """Token log-probs of some pairs. Collective over the ranks of one data-parallel replica; where replicas divide
        experts among them over all ranks, of which some may have no pairs.

        Returns:
            On the rank that ``receives``: by pair, [models, chosen + rejected tokens] float32. Empty elsewhere.
        """
        tokens = self.pack_format.pair_tokens(dataset.lengths[list(indices)]).tolist()
        (plan,) = plan_packs(indices, tokens, self.pack_format.tokens, 1)
        packs = [pack for pack in plan if pack]
        # Empty ones for the experts that are here.
        filled: list[list[int]] = packs + [[]] * (self._most_packs(len(packs)) - len(packs))
        batches = [collate([dataset[i] for i in pack], self.pack_format).to(self.device) for pack in filled]
        results = (
            forward_logps([self.model], batches, self.communicator, self.pg, self.pack_format.tokens) if batches else []
        )
        found: dict[int, np.ndarray] = {}
        for pack, batch, logps in zip(packs, batches, results, strict=False):
            lengths = dataset.trained_lengths[pack, 1:].sum(axis=1)
            whole = self._whole(batch, logps, int(lengths.sum()))
            if self.receives:
                found |= zip(pack, np.split(whole.cpu().numpy(), np.cumsum(lengths)[:-1], axis=1), strict=True)
        return found

    def _most_packs(self, packs: int) -> int:
        """The packs of this replica, or where each layer is collective over replicas those of the one that has most."""
        pg = self.pg
        # Ranks lie tensor, context, data: groups of experts that divide a replica's lie within it.
        within = pg.tp.size() * pg.cp.size() % (pg.expt_tp.size() * pg.ep.size()) == 0
        if within or not any(model.config.num_moe_experts for model in self.models):
            return packs
        most = torch.tensor(packs, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=pg.dp)
        return int(most)

    def _whole(self, batch: PreferenceBatch, logps: TokenLogps, tokens: int) -> Tensor:
        """[models, tokens] float32 of all response tokens of a pack, put together over the context-parallel ranks."""
        own = torch.stack([logps.policy, *logps.frozen])
        whole = own.new_zeros(own.shape[0], tokens)
        whole[:, batch.response_order.to(own.device)] = own
        if self.pg.cp.size() > 1:
            dist.all_reduce(whole, group=self.pg.cp)
        return whole


def build_frozen_engine(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> FrozenEngine:
    """Builds and loads reference and guide. Collective over all ranks; arguments as for ``build_engine``."""
    directory = Path(str(config.guidance.cache))
    ((first, *guide),) = load_frozen_models(config, configs, layout, pg, device, directory=directory)
    reference = first.model
    if reference.config.adapters:
        set_active(reference, first.adapter)
    model = ColocatedModel(reference, guide)
    if (release := first.release) is not None:
        model.register_forward_hook(lambda *_: release())
    communicator = None
    if layout.pipeline > 1:
        communicator = ColocatedCommunicator(pg.pp, reference.config, model.p2p_buffer, device)
    return FrozenEngine(model, communicator, pg, pack_format(config, pg), device)
