"""A user's code, for mypy: what the library's functions return is known, and what is wrong is told.

Under --strict an error that is ignored and does not come is an error itself.
"""

import torch
from torch import nn
from typing_extensions import assert_type

import lottery_tickets
from lottery_tickets.detection import EarlyBirdDetector, Verdict
from lottery_tickets.early_bird import EarlyBirdResults, compute_early_bird_tickets
from lottery_tickets.evaluation import TicketQuality
from lottery_tickets.importance_scoring import compute_fisher_importance
from lottery_tickets.iterative_pruning import IterativePruningResults, PruningRound
from lottery_tickets.large_models import MemoryPlan, PrunedCheckpoint, plan_memory, prune_checkpoint
from lottery_tickets.masks import Mask

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]

mask = lottery_tickets.create_magnitude_mask(model, sparsity=0.5)
assert_type(mask, Mask)
assert_type(lottery_tickets.create_magnitude_mask(model, [0.5, 0.9]), list[Mask])
assert_type(mask["0.weight"], torch.Tensor)
assert_type(mask.sparsity, float)
assert_type(lottery_tickets.Mask.load("ticket.safetensors"), Mask)
lottery_tickets.create_magnitude_mask(model, sparsity="half")  # type: ignore[arg-type]
lottery_tickets.create_magnitude_mask(model, sparsty=0.5)  # type: ignore[call-overload]

results = compute_early_bird_tickets(model, batches, max_epochs=1, target_sparsity=0.5)
assert_type(results, EarlyBirdResults)
assert_type(results["converged"], bool)
assert_type(results["convergence_epoch"], int | None)
assert_type(results["final_mask"], Mask)
several = compute_early_bird_tickets(model, batches, max_epochs=1, target_sparsity=[0.5, 0.9])
assert_type(several[0]["final_mask"], Mask)
results["mask"]  # type: ignore[typeddict-item]

quality = lottery_tickets.compute_lottery_ticket_quality(model, mask, batches)
assert_type(quality, TicketQuality)
assert_type(quality["performance_retention"], float | None)

overlap = lottery_tickets.compute_ticket_overlap(mask, {"0.weight": torch.ones(8, 4, dtype=torch.bool)})
assert_type(overlap["overall_overlap"], float)

scores = compute_fisher_importance(model, batches)
assert_type(lottery_tickets.create_importance_mask(scores, 0.5), Mask)
assert_type(lottery_tickets.create_structured_mask(model, 0.5, unit="neuron"), Mask)
lottery_tickets.create_structured_mask(model, 0.5, unit="neurone")  # type: ignore[call-overload]

pruning = lottery_tickets.compute_iterative_magnitude_pruning(model, batches)
assert_type(pruning, IterativePruningResults)
assert_type(pruning["iterations"], list[PruningRound])
assert_type(pruning["final_mask"], Mask)

with lottery_tickets.applied(model, mask) as pruned:
    assert_type(pruned, nn.Module)

plan = plan_memory("SmolLM2-135M", "fisher")
assert_type(plan, MemoryPlan)
assert_type(plan["total"], int)
assert_type(prune_checkpoint("folder", mask, "pruned"), PrunedCheckpoint)

detector = EarlyBirdDetector(sparsity=0.5)
assert_type(detector.update(mask), Verdict)
