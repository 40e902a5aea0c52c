"""Early-bird tickets: train until the mask has settled, and tell when that was.

A magnitude mask drawn again and again during training changes less and less. Once the distance between masks (the
fraction of their bits that differ) stays small, the ticket that training would end with is already there, long
before the weights are (You et al. 2020). `compute_early_bird_tickets` trains a model with as little memory as
training can take, draws its mask at every check, and stops when the criterion says that it has settled:

- "window": the paper's text. The last 5 distances between consecutive masks are all below 0.1.
- "queue": the authors' code. The newest mask is within 0.1 of each of the 4 before it.
- "rank_correlation": Spearman's correlation of the magnitudes with those at the check before is at least 0.95 at 3
  checks in a row.

The first mask is drawn before training, at epoch 0, as the authors' published loop draws it; then one after every
`check_interval` epochs or `check_every_steps` steps. A mask also stands still where the weights do: each check
measures the share of weights that moved and what distance the same movement would have given at random, and a mask
that is stable because nothing moves is no early bird.

    results = compute_early_bird_tickets(model, dataloader, max_epochs=30, target_sparsity=0.5)
    if results["converged"]:
        results["final_mask"].save("ticket.safetensors")

How training is done:

- The data: any iterable of batches that can be gone through once an epoch; batches are mappings, or pairs (inputs,
  targets). The loss is the one that transformers or torch would take, or `loss_fn(logits, targets)`.
- The optimizer: with `use_sgd=True` the step is taken inside the backward pass, tensor by tensor, and no gradient
  outlives it. `use_sgd=False` is AdamW; `optimizer` names another, or makes any of torch's.
- Two bytes a weight: steps that are too small for bf16 would be rounded away, so they are rounded at random, on
  average correctly (`precision="stochastic"`), or their remainders are kept (`"compensated"`).
- Batches that do not fit: `max_batch_size` splits them, and memory that runs out in the forward pass halves the
  pieces; the update is that of the whole batch.
- `run_dir`: after every check the whole state is on disk. A run that was killed goes on from there when it is called
  in the same way again, sees the same batches, and ends with the same ticket.

For training loops of one's own there is the detector alone: `EarlyBirdDetector`, `detect_early_bird_convergence`.
"""

from __future__ import annotations
