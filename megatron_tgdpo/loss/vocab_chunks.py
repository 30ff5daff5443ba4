"""How many rows of the vocabulary have their logits in memory at a time; without torch, for plans."""

# Elements of the one fp32 buffer of logits. On a GPU (128 MiB) wide enough to keep the matrix units busy; on a CPU
# (8 MiB) small enough that what follows the product finds the logits in the cache.
CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 2**21}
# Vocabulary rows of a chunk at least, however many tokens there are.
_FEWEST_ROWS = 256
# On a GPU rows come in multiples of this: they are the leading dimension of the logits, and the fast bf16 products want
# that aligned.
_ROW_STEP = 64


def chunk_rows(tokens: int, rows: int, device_type: str, chunk_elements: int | None = None) -> int:
    """Vocabulary rows of a chunk that holds ``tokens`` tokens, of ``rows`` in all."""
    wanted = (chunk_elements or CHUNK_ELEMENTS[device_type]) // max(tokens, 1)
    found = min(max(wanted, 1 if chunk_elements else _FEWEST_ROWS), max(rows, 1))
    if device_type == "cuda" and found > _ROW_STEP:
        # What is left over of the vocabulary is a small chunk of its own.
        found -= found % _ROW_STEP
    return found
