"""Tickets in other people's training loops; each module needs the library it is named after, and loads it.

- `lottery_tickets.integrations.transformers`: callbacks for transformers' Trainer (extra `hf`).
- `lottery_tickets.integrations.lightning`: callbacks for Lightning's Trainer (extra `lightning`).

Both offer the same two. `EarlyBirdCallback` draws the model's mask again and again while it trains, and tells
when it has settled; `HoldMaskCallback` trains a ticket. Both come back from a checkpoint. Adapters of PEFT fill
the zeros of a ticket when they are merged; `compute_filled_zeros` says where.

A loop of one's own needs none of them: see `EarlyBirdDetector` and `held`.
"""

from lottery_tickets.integrations._adapters import compute_filled_zeros

__all__ = ["compute_filled_zeros"]
