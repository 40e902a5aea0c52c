"""Lottery tickets: sparse subnetworks that do as well as the whole network, found and judged exactly."""

from lottery_tickets.masks import Mask, applied, apply_mask, prunable_parameters, remove_mask

__all__ = ["Mask", "applied", "apply_mask", "prunable_parameters", "remove_mask"]
