"""Log-probs of response tokens under a Hugging Face model directory, by transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tgdpo.console import progress, waiting
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.models.hf_config import read_hf_config


def response_logps(
    directory: Path, pairs: Sequence[PreferencePair], dtype: torch.dtype, device: torch.device, label: str = ""
) -> list[np.ndarray]:
    """Runs a model over pairs, chosen and rejected of one pair at a time, and forgets the model again.

    Args:
        directory: Local HF directory.
        pairs: Their token ids.
        dtype: Of weights and activations; logits are normalised in float32.
        device: Where to run.
        label: Of the progress bar; the directory's name by default.

    Returns:
        For each pair float32 [c + r]: log-probs (nats) of the chosen tokens, then of the rejected ones.

    Raises:
        UserError: No HF model that this project knows is there, or its vocabulary is too small for the pairs.
    """
    vocab_size = read_hf_config(directory).vocab_size
    largest = max(int(ids.max()) for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected))
    if largest >= vocab_size:
        raise UserError(f"{directory}: has a vocabulary of {vocab_size}, the data holds token id {largest}")
    model = _load(directory, dtype, device)
    found = []
    with progress(label or directory.name, len(pairs), "pair") as bar:
        for pair in pairs:
            found.append(_pair_logps(model, pair, device))
            bar.update(1)
    return found


def _load(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with waiting(f"loading {directory}"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:  # transformers raises many types for one cause: the directory's content
        raise UserError(f"{directory}: cannot load the model: {one_line(error)}") from error
    return model.to(device).eval()


@torch.inference_mode()
def _pair_logps(model: Any, pair: PreferencePair, device: torch.device) -> np.ndarray:
    responses = (pair.chosen, pair.rejected)
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(np.concatenate([pair.prompt, response])) for response in responses], batch_first=True
    ).to(device)
    # Padding is on the right, where causal attention cannot see it from a real token. Of the logits, only those from
    # the prompt's last token on are computed.
    kept = ids.shape[1] - len(pair.prompt) + 1
    logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1)
    taken = logps.gather(-1, ids[:, len(pair.prompt) :, None]).squeeze(-1).cpu().numpy()
    whole = np.concatenate([row[: len(response)] for row, response in zip(taken, responses, strict=True)])
    result: np.ndarray = whole[pair.trained]
    return result
