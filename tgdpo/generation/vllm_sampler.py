"""The same sampler on vLLM, where that is installed. Checked against vLLM 0.33.0's source; not run on a GPU yet."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError, one_line
from tgdpo.generation.models import stop_ids
from tgdpo.generation.sampling import Answer, Request, check_context, context_limit, make_answer


class VllmSampler:
    """Batched generation by vLLM, with a seed a request.

    vLLM's batches change as requests finish, so rounding, and with it a sample now and then, may differ between runs.

    Args:
        directory: HF directory.
        tokenizer: Of the same directory.
        top_p: As for :class:`~tgdpo.generation.transformers_sampler.TransformersSampler`.
        max_new_tokens: Limit of an answer.
        dtype: Of the weights.

    The model is shared among the GPUs that this process sees, by tensor parallelism.

    Raises:
        UserError: vLLM is not installed, or refuses the model.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, top_p: float, max_new_tokens: int, dtype: torch.dtype
    ) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"--backend vllm: vLLM cannot be imported ({error}): install it, or leave it out"
            ) from error
        self._params = SamplingParams
        self._tokenizer = tokenizer
        self._top_p = top_p
        self._max_new_tokens = max_new_tokens
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self._limit = context_limit(config)
        self._stops = stop_ids(_generation_config(directory), tokenizer)
        try:
            self._llm = LLM(
                model=str(directory),
                dtype=str(dtype).removeprefix("torch."),
                tensor_parallel_size=max(torch.cuda.device_count(), 1),
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own sampling settings
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **_memory(),
            )
        except Exception as error:  # pydantic's, its own, or those of a process that it started
            raise UserError(f"--backend vllm: {directory}: {one_line(error)}") from error

    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`~tgdpo.generation.sampling.Sampler`."""
        check_context(requests, self._max_new_tokens, self._limit)
        params = [
            self._params(
                temperature=request.temperature,
                top_p=self._top_p,
                max_tokens=self._max_new_tokens,
                seed=request.seed,
                stop_token_ids=self._stops,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            make_answer(request.prompt_ids, list(output.outputs[0].token_ids), self._stops, self._tokenizer)
            for request, output in zip(requests, outputs, strict=True)
        ]


def _generation_config(directory: Path) -> GenerationConfig | None:
    if not (directory / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(directory, local_files_only=True)


def _memory() -> dict[str, float]:
    """How much of a GPU's whole memory vLLM may take: of what is free, since a reward model may be there already."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": 0.9 * free / total}
