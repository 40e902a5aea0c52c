"""Peak memory of one training step over the weights' bytes, and what it would be for Qwen2.5-14B.

    python benchmarks/early_bird_memory.py [--quick]

A Llama-shaped model of half a billion random weights takes one step, each way of training in a fresh process: ours
(step in the backward pass, activations made again, loss in chunks) beside torch's optimizers as they are mostly
used. Peaks are of the resident set, so what the allocator holds back counts too; code and its libraries, loaded by
a step of a tiny model beforehand, do not. Then the predicted bytes, by the same arithmetic that the trainer logs:
beside those measured, and for Qwen2.5-14B's shape on the meta device. Bars: ours at most 1.25 of the weights; at
most 36 GB for 14B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from _common import benchmark_parser, keep, peak_bytes_in_fresh_process
from lottery_tickets._batches import measure
from lottery_tickets.training import checkpointed, make_optimizer, training_bytes

HALF_BILLION = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
TINY = {**HALF_BILLION, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
# huggingface.co/Qwen/Qwen2.5-14B, config.json
QWEN_14B = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
QWEN_BATCH, QWEN_LENGTH = 2, 512
RATIO_BAR, QWEN_BAR = 1.25, 36e9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = {"float32": 128, "bfloat16": 8}  # backward passes in bfloat16 are slow on CPUs
OURS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd, momentum": {"momentum": 0.9},
    "sgd, global clipping": {"clip": "global"},
    "adamw": {},
}
TORCH = {
    "torch sgd": torch.optim.SGD,
    "torch sgd, checkpointed": torch.optim.SGD,
    "torch adamw": torch.optim.AdamW,
}


def llama(sizes: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), dtype=dtype).train()


def step(model: nn.Module, way: str, tokens: int) -> None:
    """One step, as a user of this way would make it."""
    ids = torch.arange(tokens).remainder(64)[None]
    if way in TORCH:
        optimizer = TORCH[way](model.parameters(), lr=1e-4)
        with checkpointed(model, "checkpointed" in way):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return
    kind, options = way.partition(",")[0], OURS[way]
    ours = make_optimizer(kind, model.named_parameters(), lr=1e-4, max_grad_norm=1.0, **options)
    with checkpointed(model):
        rows = measure(model, {"input_ids": ids, "labels": ids}).rows
        assert rows is not None
        loss = rows.losses.mean()
        del rows  # it could draw labels, for which it keeps the logits
        ours.backward(loss)


def prepare(way: str, dtype: str) -> Callable[[], object]:
    """The model in memory and all code loaded."""
    torch.set_num_threads(2)
    step(llama(TINY, DTYPES[dtype]), way, 8)
    model = llama(HALF_BILLION, DTYPES[dtype])
    return lambda: step(model, way, TOKENS[dtype])


def predicted(model: nn.Module, way: str, batch: int, length: int, device: str) -> Any:
    """By the arithmetic of the library, as `step` trains."""
    return training_bytes(
        model,
        batch_size=batch,
        sequence_length=length,
        optimizer=way.partition(",")[0],
        **OURS.get(way, {}),
        checkpointing=way not in TORCH or "checkpointed" in way,
        chunked_loss=way not in TORCH,
        device=device,
    )


def measured(dtype: str, ways: list[str]) -> list[dict[str, Any]]:
    """A row for each way of training."""
    with torch.device("meta"):
        shapes = llama(HALF_BILLION, DTYPES[dtype])
    weights = sum(one.numel() * one.element_size() for one in shapes.parameters())
    rows = []
    for way in ways:
        peak = weights + peak_bytes_in_fresh_process(prepare, way, dtype)
        rows.append(
            {
                "dtype": dtype,
                "way": way,
                "tokens": TOKENS[dtype],
                "weights_bytes": weights,
                "peak_bytes": peak,
                "ratio": peak / weights,
                "bar": RATIO_BAR if way == "sgd" else None,
                "predicted_bytes": predicted(shapes, way, 1, TOKENS[dtype], "cpu")["peak"],
            }
        )
    return rows


def qwen() -> list[dict[str, Any]]:
    """Predictions for Qwen2.5-14B in bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**QWEN_14B), dtype=torch.bfloat16)
    ways = [*OURS, "adamw8bit", *TORCH]
    return [{"way": way, **predicted(model, way, QWEN_BATCH, QWEN_LENGTH, "cuda")} for way in ways]


def measured_table(rows: list[dict[str, Any]]) -> Table:
    """Peaks beside the bar and the prediction."""
    shown = Table(title="One step of a Llama-shaped model of 0.5B weights")
    for heading in ("dtype", "tokens", "way", "peak", "over the weights", "bar", "predicted"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row["dtype"],
            str(row["tokens"]),
            row["way"],
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"x {row['ratio']:.2f}",
            "" if row["bar"] is None else f"x {row['bar']}",
            f"x {row['predicted_bytes'] / row['weights_bytes']:.2f}",
        )
    return shown


def qwen_table(rows: list[dict[str, Any]]) -> Table:
    """Items of ours and sums of the others."""
    shown = Table(title=f"Qwen2.5-14B in bfloat16, {QWEN_BATCH} x {QWEN_LENGTH} tokens, predicted; bar 36 GB")
    for heading in ("way", "item", "GB"):
        shown.add_column(heading, justify="right")
    for row in rows:
        for moment in ("throughout", "at_the_loss", "in_a_block", "at_the_embedding"):
            for name, count in row[moment].items():
                if count and row["way"] == "sgd":
                    shown.add_row("", f"{moment.replace('_', ' ')}: {name}", f"{count / 1e9:.2f}")
        shown.add_row(row["way"], "peak", f"{row['peak'] / 1e9:.1f}")
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/early_bird_memory.json."""
    given = benchmark_parser(__doc__, "ours and torch's SGD in float32").parse_args()
    console, ways = Console(), ["sgd", "torch sgd"] if given.quick else [*OURS, *TORCH]
    rows = [row for dtype in (("float32",) if given.quick else DTYPES) for row in measured(dtype, ways)]
    predictions = qwen()
    console.print(measured_table(rows))
    console.print(qwen_table(predictions))
    results = {
        "model": HALF_BILLION,
        "weights": rows[0]["weights_bytes"] // DTYPES[rows[0]["dtype"]].itemsize,
        "ratio_bar": RATIO_BAR,
        "rows": rows,
        "qwen": predictions,
        "qwen_batch": QWEN_BATCH,
        "qwen_length": QWEN_LENGTH,
        "qwen_bar_bytes": QWEN_BAR,
    }
    console.print(keep("early_bird_memory", results, given))


if __name__ == "__main__":
    main()
