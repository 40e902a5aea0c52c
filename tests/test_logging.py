"""The library says what it does through `logging`, and prints nothing itself."""

from __future__ import annotations

import logging

import torch

from lottery_tickets import Mask, compute_lottery_ticket_quality, create_magnitude_mask


def test_each_step_is_logged_under_the_librarys_name(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG, logger="lottery_tickets")
    model = torch.nn.Linear(4, 4)
    mask = create_magnitude_mask(model, 0.5)
    mask.save(tmp_path / "ticket.safetensors")
    Mask.load(tmp_path / "ticket.safetensors")
    compute_lottery_ticket_quality(model, mask, [(torch.eye(4), torch.arange(4))])
    said = caplog.text
    for part in (
        "16 weights: histograms for 1 ranks",
        "drawn by magnitude, scope global: Mask(1 tensors, 16 weights, 8 kept",
        f"wrote {tmp_path / 'ticket.safetensors'}: sparsity 0.5, digest {mask.digest()}",
        f"read {tmp_path / 'ticket.safetensors'}",
        "batch 0, the dense model: loss",
        "batch 0, ticket 'mask': loss",
    ):
        assert part in said
    assert all(record.name.startswith("lottery_tickets.") for record in caplog.records)
    assert capsys.readouterr() == ("", "")


def test_nothing_is_logged_unless_asked(capfd):
    create_magnitude_mask(torch.nn.Linear(4, 4), 0.5)
    assert capfd.readouterr() == ("", "")
