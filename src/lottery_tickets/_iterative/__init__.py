"""Parts of iterative pruning."""
