"""The tables of docs/families.md: what each family has, and how far its logits and gradients are from transformers'.

``python -m tests.family_table`` measures and writes them between the page's marks; a few minutes.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from megatron_tgdpo.models.families import BEYOND, EXPERTS_BEYOND, FAMILIES
from tests.distributed import test_experts_conversion as experts
from tests.distributed.test_conversion import Reference
from tests.distributed.worker_conversion import LENGTHS
from tests.distributed.worker_families import LAYOUTS
from tests.processes import run_forked
from tests.tiny_models import DENSE_OPTIONS, EXPERT_OPTIONS, MIXED_OPTIONS, logits_divisor, make_model

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# Models, and what of them is computed beside the plain dense decoder (grouped queries, RMSNorm, a SiLU-gated MLP).
NOTES = {
    "LlamaForCausalLM": ("Llama 2, 3, 3.1, 3.2, SmolLM2", "rotary scaling of every type"),
    "Gemma2ForCausalLM": ("Gemma-2", "four norms a layer, softcaps, windows on every other layer, scaled embeddings"),
    "Qwen2ForCausalLM": ("Qwen2, Qwen2.5", "biases of query, key and value; windows"),
    "Qwen3ForCausalLM": ("Qwen3, dense", "norms of query and key heads; windows"),
    "MistralForCausalLM": ("Mistral v0.1, v0.3, Nemo, Small 2501", "windows; a head size of its own"),
    "Gemma3ForCausalLM": (
        "Gemma-3 1B; the text part of others, saved alone",
        "as Gemma-2 with norms of query and key heads; a rotary base for windowed layers, another for full ones",
    ),
    "Phi3ForCausalLM": (
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        "files with fused projections; rotation of a part of each head; LongRoPE, for sequences up to "
        "`original_max_position_embeddings`: a longer `data.max_length` is refused",
    ),
    "Olmo2ForCausalLM": (
        "OLMo-2",
        "norms after attention and MLP only; norms over all query heads and all key heads, which span the tensor ranks "
        "(as many as key/value heads at most)",
    ),
    "Olmo3ForCausalLM": ("Olmo-3", "as OLMo-2, with windows, and rotary scaling on full layers alone"),
    "GlmForCausalLM": ("glm-4-9b-hf", "neighbours rotated together, in half of each head; biases; fused gate and up"),
    "Glm4ForCausalLM": ("GLM-4-9B-0414, GLM-4-32B-0414", "the same, with norms after attention and MLP"),
    "SmolLM3ForCausalLM": ("SmolLM3", "layers without rotation"),
    "MinistralForCausalLM": ("Ministral-8B", "windows on some layers"),
    "Ministral3ForCausalLM": (
        "Ministral-3, the text part saved alone",
        "YaRN; queries scaled by position are those of the original context, so sequences are limited to "
        "`original_max_position_embeddings`",
    ),
    "GraniteForCausalLM": ("Granite 3, dense", "multipliers of embeddings, residuals, scores and logits"),
    "SeedOssForCausalLM": ("Seed-OSS 36B", "biases of query, key and value; its dropout is off"),
    "Exaone4ForCausalLM": (
        "EXAONE-4 1.2B, 32B",
        "norms after attention and MLP only, and of query and key heads; full layers beside windows do not rotate",
    ),
    "Ernie4_5ForCausalLM": ("ERNIE-4.5 0.3B", "neighbours rotated together"),
    "CwmForCausalLM": ("CWM 32B", "windows on three layers of four"),
    "VaultGemmaForCausalLM": ("VaultGemma 1B", "as Gemma-2 without the norms after attention and MLP"),
    "HyperCLOVAXForCausalLM": ("HyperCLOVA X SEED Think 14B", "as Granite, with norms after attention and MLP"),
    "HeliumForCausalLM": ("Helium 1", "neighbours rotated together"),
    "YoutuForCausalLM": (
        "Youtu-LLM 2B",
        "latent attention (MLA): keys, values and queries of small vectors with norms, a rotated part of keys that all "
        "heads share, values of a size of their own; YaRN's factor of all scores; neighbours or halves rotated",
    ),
    "MiniCPM3ForCausalLM": (
        "MiniCPM3 4B",
        "latent attention, halves rotated together; multipliers of embeddings, residuals and logits",
    ),
    "Qwen3MoeForCausalLM": ("Qwen3-30B-A3B, Qwen3-235B-A22B", "Qwen3's attention; experts in every layer, or some"),
    "Qwen2MoeForCausalLM": (
        "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        "Qwen2's attention; experts in every layer, or some, one for all tokens",
    ),
    "MixtralForCausalLM": ("Mixtral 8x7B, 8x22B", "windows; experts in every layer"),
    "OlmoeForCausalLM": ("OLMoE 1B-7B", "norms over all query heads and all key heads; experts in every layer"),
    "Glm4MoeForCausalLM": (
        "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
        "rotation of a part of each head; biases; norms of query and key heads; dense layers, then experts, one for "
        "all tokens; sigmoid scores with a bias in fp32, groups of experts",
    ),
    "Glm4MoeLiteForCausalLM": ("GLM-4.7-Flash", "latent attention; experts as those of GLM-4.5"),
    "GptOssForCausalLM": (
        "gpt-oss-20b, gpt-oss-120b, dequantised",
        "attention sinks; windows on every other layer; YaRN; biases, those of the router and the experts included; "
        "experts in every layer, with a clamped gate",
    ),
    "DeepseekV2ForCausalLM": (
        "DeepSeek-V2, V2-Lite, DeepSeek-Coder-V2",
        "latent attention; dense layers, then experts, one for all tokens; groups of experts",
    ),
    "DeepseekV3ForCausalLM": (
        "DeepSeek-V3, R1, dequantised; Moonlight",
        "latent attention; dense layers, then experts, one for all tokens; sigmoid scores with a bias in fp32, groups "
        "of experts",
    ),
    "Dots1ForCausalLM": (
        "dots.llm1",
        "norms of query and key heads; windows; dense layers, then experts as those of DeepSeek-V3",
    ),
    "ExaoneMoeForCausalLM": (
        "K-EXAONE 236B-A23B",
        "norms of query and key heads; full layers beside windows do not rotate; experts in most layers, as those of "
        "DeepSeek-V3",
    ),
    "SolarOpenForCausalLM": ("Solar Open 100B", "biases; YaRN; experts in every layer, as those of DeepSeek-V3"),
}


def supported(measured: Mapping[str, tuple[float, ...]]) -> str:
    """The table of families.

    Args:
        measured: By architecture the largest differences, of a logit and of a weight's gradient; those with experts,
            whose gradients are compared in training, have the first alone.
    """
    lines = ["| family | models | beside the dense decoder | logits | gradients |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        models, what = NOTES[family.architecture]
        shown = [f"{figure:.0e}" for figure in measured[family.architecture]]
        cells = " | ".join(shown if len(shown) == 2 else [*shown, "[in training](experts.md)"])
        lines.append(f"| `{family.architecture}` | {models} | {what} | {cells} |")
    return "\n".join(lines)


def refused() -> str:
    """The table of what no family here has."""
    lines = ["| it has | architectures |", "|---|---|"]
    for beside, table in (("", BEYOND), ("experts, with ", EXPERTS_BEYOND)):
        for what in dict.fromkeys(table.values()):
            parts = ", ".join(f"`{part}...`" for part in table if table[part] == what)
            lines.append(f"| {beside}{what} | {parts} |")
    return "\n".join(lines)


def between(text: str, name: str, table: str) -> str:
    """A page with the table put between its marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n\n{end}", text, flags=re.S)


def measure(root: Path) -> dict[str, tuple[float, float]]:
    """Runs every family, tiny and random, and compares it with transformers."""
    for family in DENSE_OPTIONS:
        make_model(root / "hf" / family, family, seed=6)
    run_forked("tests.distributed.worker_families", [str(root)], processes=2)
    reference, found = Reference(root), {}
    for family in DENSE_OPTIONS:
        config = json.loads((root / "hf" / family / "config.json").read_text())
        wanted, logits, gradients = reference[family], [], []
        for layout in LAYOUTS:
            ours = load_file(root / "out" / layout / family / "logits.safetensors")["logits"][: sum(LENGTHS)]
            logits.append(float((ours - wanted.logits).abs().max() / wanted.logits.abs().max()))
        scaling = logits_divisor(config)
        for name, gradient in load_file(root / "out" / LAYOUTS[0] / family / "gradients.safetensors").items():
            theirs = wanted.gradients[name]
            gradients.append(float((gradient * scaling - theirs).norm() / theirs.norm()))
        found[config["architectures"][0]] = (max(logits), max(gradients))
    return found


def measure_experts(root: Path) -> dict[str, tuple[float]]:
    """The same of those with experts, by logits alone."""
    models = {family: {"family": family} for family in EXPERT_OPTIONS}
    models |= {name: options for name, options in MIXED_OPTIONS.items() if name == options["family"]}
    for name, options in models.items():
        make_model(root / "hf" / name, hidden_size=32, layers=2, seed=6, **options)
    run_forked(experts.WORKER, [str(root), "single", *experts.LAYOUTS[1]])
    for processes in (2, 4):
        run_forked(experts.WORKER, [str(root), *experts.LAYOUTS[processes]], processes=processes)
    found = {}
    for name in models:
        wanted = experts.by_transformers(root / "hf" / name)["logits"]
        files = (root / "out").glob(f"*/{name}/logits.safetensors")
        logits = [load_file(file)["logits"][: sum(LENGTHS)] for file in files]
        config = json.loads((root / "hf" / name / "config.json").read_text())
        found[config["architectures"][0]] = (
            max(float((ours - wanted).abs().max() / wanted.abs().max()) for ours in logits),
        )
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        measured = measure(Path(temporary, "dense")) | measure_experts(Path(temporary, "experts"))
    text = between(PAGE.read_text(encoding="utf-8"), "families", supported(measured))
    PAGE.write_text(between(text, "refused", refused()), encoding="utf-8")


if __name__ == "__main__":
    main()
