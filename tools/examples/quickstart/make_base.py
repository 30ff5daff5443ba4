"""Trains the demonstration's SentencePiece tokenizer and a small Llama on its text, and saves both as an HF directory.

    python -m tools.examples.quickstart.make_base --data DIR --out DIR [--steps 600] [--batch 48] [--lr 3e-3] [--seed 0]

The model reads `pretrain.jsonl`, good and bad answers alike, so what it writes is well formed and often bad: the state
that preference training starts from. It runs on a GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from tools.examples.quickstart.make_data import read_jsonl
from tools.examples.quickstart.tokenizer import MAX_TOKENS, chat_ids, save_tokenizer, train_sentencepiece

WARMUP_SHARE = 0.05


def chat(prompt: str, response: str) -> list[dict[str, str]]:
    """Returns one exchange as chat messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def model_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Returns a Llama of about 1.2 million parameters: grouped-query attention, untied embeddings, four layers."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(sequences: list[list[int]], steps: int, batch: int, rng: Random) -> Iterator[list[list[int]]]:
    """Yields `steps` batches, each of sequences of about one length so that little of it is padding."""
    made = 0
    while made < steps:
        ordered = sorted(rng.sample(sequences, len(sequences)), key=len)
        chunks = [ordered[i : i + batch] for i in range(0, len(ordered) - batch + 1, batch)]
        rng.shuffle(chunks)
        yield from chunks[: steps - made]
        made += len(chunks)


def train(
    model: LlamaForCausalLM, sequences: list[list[int]], steps: int, batch: int, lr: float, seed: int, pad_id: int
) -> None:
    """Trains `model` in place on next-token cross-entropy over whole sequences.

    Args:
        sequences: token ids, one list an exchange.
        batch: sequences a step.
        lr: peak learning rate, after a linear warm-up and before a cosine decay to zero.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=WARMUP_SHARE)
    model.train()
    start = time.monotonic()
    for step, rows in enumerate(batches(sequences, steps, batch, Random(seed)), start=1):
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(
                f"step {step}/{steps}: loss {loss.item():.3f} nats a token, {time.monotonic() - start:.0f} s",
                flush=True,
            )


def main(argv: list[str] | None = None) -> None:
    """Trains tokenizer and model and writes the HF directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that make_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="HF directory to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=48, help="sequences a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    disable_progress_bar()  # of one file that is written
    args.out.mkdir(parents=True, exist_ok=True)
    records = read_jsonl(args.data / "pretrain.jsonl")
    texts = (text for record in records for text in (record["prompt"], record["response"]))
    save_tokenizer(train_sentencepiece(texts), args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    exchanges = (chat(record["prompt"], record["response"]) for record in records)
    sequences = [chat_ids(tokenizer, messages) for messages in exchanges]
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(model_config(tokenizer))
    tokens = sum(map(len, sequences))
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}, {tokens:,} tokens of text, on {device}")
    train(model, sequences, args.steps, args.batch, args.lr, args.seed, tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        max_new_tokens=MAX_TOKENS // 2,
    )
    model.cpu().save_pretrained(args.out, safe_serialization=True)


if __name__ == "__main__":
    main()
