"""What users get wrong, a row a case: the call, the error's class, and its text with object and remedy.

The details of each case stand in the tests of its module; this table is the whole of it at one view.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils import parametrizations

from lottery_tickets import (
    Mask,
    applied,
    apply_mask,
    compute_histogram_quantile,
    compute_instability,
    compute_iterative_magnitude_pruning,
    compute_layerwise_magnitude_ticket,
    compute_linear_mode_connectivity,
    compute_lottery_ticket_quality,
    compute_pruning_robustness,
    compute_sparsity,
    compute_ticket_overlap,
    create_importance_mask,
    create_magnitude_mask,
    prunable_parameters,
    remove_mask,
    validate_pruning_correctness,
)
from lottery_tickets.early_bird import compute_early_bird_tickets
from lottery_tickets.errors import (
    BatchError,
    DetectionError,
    EvaluationError,
    LotteryTicketError,
    MaskAppliedError,
    MaskError,
    MaskFileError,
    MaskMismatchError,
    ParameterSelectionError,
    RunFolderError,
    ScoreError,
    SparsityError,
    StateMismatchError,
    TrainingError,
    WeightsError,
)
from lottery_tickets.importance_scoring import compute_gradient_importance, compute_hybrid_importance
from lottery_tickets.runs import RunFolder
from lottery_tickets.stability import make_train_function


def net() -> nn.Module:
    """Two linear layers, called "first" and "last"."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("last", nn.Linear(4, 3))
    return model


def whole(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Decisions for `net`; a change of None leaves the name out."""
    decisions = {"first.weight": torch.ones(4, 4), "last.weight": torch.ones(3, 4)}
    decisions |= {f"{layer}.weight": tensor for layer, tensor in changes.items()}
    return {name: tensor for name, tensor in decisions.items() if tensor is not None}


def meta_net() -> nn.Module:
    with torch.device("meta"):
        return net()


def net_with(value: float) -> nn.Module:
    model = net()
    model.last.weight.data[0, 1] = value
    return model


def tied_net() -> nn.Module:
    model = net()
    model.last.weight = model.first.weight
    return model


def enter(model: nn.Module, mask: object) -> None:
    with applied(model, mask):
        pass


def nested(model: nn.Module) -> None:
    with applied(model, whole()):
        enter(model, whole())


def quality(dataloader: object, **options: object) -> object:
    options = {"model": net(), "mask": whole(), "progress": False, **options}
    return compute_lottery_ticket_quality(dataloader=dataloader, **options)


def birds(data: object = None, **options: object) -> object:
    options = {"model": net(), "max_epochs": 1, "progress": False, **options}
    return compute_early_bird_tickets(dataloader=[BATCH] if data is None else data, **options)


def path(state_b: dict[str, torch.Tensor] | None = None, **options: object) -> object:
    model = net()
    return compute_linear_mode_connectivity(
        model, net().state_dict(), state_b or net().state_dict(), BATCH, **options
    )


def instability(**options: object) -> object:
    train = make_train_function([BATCH], epochs=2)
    return compute_instability(lambda _: net(), train, dataloader=BATCH, seeds=[0], **options)


def rounds(data: object = None, **options: object) -> object:
    options = {"model": net(), "epochs": 2, "num_iterations": 2, "progress": False, **options}
    return compute_iterative_magnitude_pruning(dataloader=[BATCH] if data is None else data, **options)


BATCH = (torch.ones(2, 4), torch.tensor([0, 1]))

# Case -> the call, the error, its text.
CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # Masks
    "mask value": (
        lambda: Mask.from_tensors(whole(last=torch.full((3, 4), 0.5))),
        MaskError,
        r"last\.weight: a mask holds only 0 and 1 \(or bool\), found 0\.5.* create_magnitude_mask",
    ),
    "mask value NaN": (
        lambda: Mask.from_tensors({"fc": torch.tensor([float("nan")])}),
        MaskError,
        r"fc: .* found nan",
    ),
    "mask of no tensors": (
        lambda: Mask.from_tensors({"fc": [1, 0]}),
        MaskError,
        "fc: expected a tensor .* got list",
    ),
    "mask of meta tensors": (
        lambda: Mask.from_tensors({"fc": torch.ones(2, device="meta")}),
        MaskError,
        "fc: a tensor on the meta device holds no decisions; give one with data",
    ),
    "path for a mask": (lambda: enter(net(), "t.safetensors"), MaskError, r"got str.*Mask\.load\(path\)"),
    "masks of other names": (
        lambda: Mask.from_tensors(whole()) & whole(last=None),
        MaskMismatchError,
        r"only in one: \['last\.weight'\].* compute_ticket_overlap",
    ),
    "masks of other shapes": (
        lambda: Mask.from_tensors(whole()) | whole(last=torch.ones(4, 3)),
        MaskMismatchError,
        r"last\.weight \(3, 4\) against \(4, 3\)",
    ),
    "negative seed": (lambda: Mask.random_like(whole(), -1), ValueError, "non-negative integer, got -1"),
    # Models and masks
    "unknown name": (
        lambda: enter(net(), whole(lasst=torch.ones(3, 4))),
        MaskMismatchError,
        r"lasst\.weight: the model has no such parameter.* Draw the mask from this model",
    ),
    "wrong shape": (
        lambda: apply_mask(net(), whole(last=torch.ones(4, 3))),
        MaskMismatchError,
        r"last\.weight: mask \(4, 3\), parameter \(3, 4\)",
    ),
    "tied name": (
        lambda: enter(tied_net(), {"last.weight": torch.ones(4, 4)}),
        MaskMismatchError,
        r"last\.weight: tied to first\.weight, which is the name to use",
    ),
    "meta model": (
        lambda: enter(meta_net(), whole()),
        WeightsError,
        r"first\.weight is on the meta device.* load",
    ),
    "nested use": (
        lambda: nested(net()),
        MaskAppliedError,
        r"first: a mask is already applied .* leave that block first, or combine the masks",
    ),
    "recurrent layer": (
        lambda: enter(nn.LSTM(2, 2), {"weight_ih_l0": torch.ones(8, 2)}),
        MaskAppliedError,
        "weight_ih_l0: LSTM .* use apply_mask and remove_mask",
    ),
    "nothing to put back": (
        lambda: remove_mask(net(), whole(), None),
        MaskMismatchError,
        "got NoneType; apply_mask returns one with clone_weights=True",
    ),
    "missing name to put back": (
        lambda: remove_mask(net(), whole(), {"first.weight": torch.ones(4, 4)}),
        MaskMismatchError,
        r"last\.weight: original_weights lacks it; give what apply_mask returned",
    ),
    # The choice of parameters
    "pattern without a match": (
        lambda: prunable_parameters(net(), include="decoder.*"),
        ParameterSelectionError,
        r"include='decoder\.\*' matches no parameter; names look like 'first\.weight'",
    ),
    "exclusion without a match": (
        lambda: create_magnitude_mask(net(), 0.5, exclude=["first.*", "frist.*"]),
        ParameterSelectionError,
        r"exclude='frist\.\*' matches no parameter",
    ),
    "predicate without a match": (
        lambda: prunable_parameters(net(), exclude=lambda name, parameter: False),
        ParameterSelectionError,
        "exclude=<function .* matches no parameter",
    ),
    "nothing prunable": (
        lambda: create_magnitude_mask(nn.LayerNorm(3), 0.5),
        ParameterSelectionError,
        r"LayerNorm has nothing to prune.* include='\*\.weight' widens",
    ),
    "computed weight": (
        lambda: create_magnitude_mask(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))), 0.5),
        ParameterSelectionError,
        r"0\.weight is computed by a parametrization .*remove_parametrizations.*exclude='0\.weight'",
    ),
    "lazy layer": (
        lambda: create_magnitude_mask(nn.Sequential(nn.LazyLinear(2)), 0.5),
        ParameterSelectionError,
        r"0\.weight is not initialised yet; run one batch",
    ),
    "pattern for a mapping": (
        lambda: create_magnitude_mask({"w": torch.ones(2)}, 0.5, include="w"),
        ParameterSelectionError,
        "of a mapping every tensor is ranked",
    ),
    # Selection
    "sparsity 1": (lambda: create_magnitude_mask(net(), 1.0), SparsityError, r"in \[0, 1\); got 1\.0.* no ticket"),
    "sparsity in percent": (
        lambda: create_magnitude_mask(net(), 90),
        SparsityError,
        "got 90. For 90 percent pass 0.9",
    ),
    "negative sparsity": (lambda: create_magnitude_mask(net(), -0.1), SparsityError, r"got -0\.1"),
    "sparsity NaN": (lambda: create_magnitude_mask(net(), float("nan")), SparsityError, "got nan"),
    "one of many sparsities": (lambda: create_magnitude_mask(net(), [0.5, 1.5]), SparsityError, r"got 1\.5"),
    "NaN weight": (
        lambda: create_magnitude_mask(net_with(float("nan")), 0.5),
        WeightsError,
        r"found in last\.weight \(1\)\. Repair the weights; where masks are drawn, nan='prune'",
    ),
    "NaN weight, sorted": (
        lambda: create_magnitude_mask(net_with(float("nan")), 0.5, use_histogram=False),
        WeightsError,
        r"found in last\.weight \(1\)\. Repair the weights; where masks are drawn, nan='prune'",
    ),
    "meta weights": (
        lambda: create_magnitude_mask(meta_net(), 0.5),
        WeightsError,
        r"first\.weight is on the meta device and has no values; load the model's weights first",
    ),
    "integer weights": (
        lambda: create_magnitude_mask({"fc": torch.ones(3, dtype=torch.int8)}, 0.5),
        WeightsError,
        r"fc: .* got torch\.int8, torch\.strided\. Convert or exclude it",
    ),
    "unknown scope": (
        lambda: create_magnitude_mask(net(), 0.5, scope="all"),
        SparsityError,
        "scope is 'global'.*'all'",
    ),
    "floor too high": (
        lambda: create_magnitude_mask(net(), 0.9, min_density=0.5),
        SparsityError,
        r"Cannot remove 25 weights: min_density=0\.5 lets at most 14 go\. Lower the sparsity or the floor",
    ),
    "importance of an unknown layer": (
        lambda: compute_layerwise_magnitude_ticket(net(), 0.5, layer_importance_weights={"decoder": 2.0}),
        SparsityError,
        "no prunable layer is called 'decoder'; names look like 'first.weight'",
    ),
    "importance zero": (
        lambda: compute_layerwise_magnitude_ticket(net(), 0.5, layer_importance_weights={"last": 0.0}),
        SparsityError,
        r"layer_importance_weights\['last'\]: expected a positive number, got 0\.0",
    ),
    "quantile outside": (lambda: compute_histogram_quantile(torch.ones(2), 1.5), SparsityError, r"got 1\.5"),
    "quantile of nothing": (lambda: compute_histogram_quantile(torch.ones(0), 0.5), SparsityError, "empty tensor"),
    # Scores, allocation, patterns
    "scores of no layer": (lambda: create_importance_mask({}, 0.5), WeightsError, "scores is empty"),
    "NaN score": (
        lambda: create_importance_mask(whole(last=torch.full((3, 4), torch.nan)), 0.5),
        WeightsError,
        r"found in last\.weight \(12\)",
    ),
    "scores that lack a layer": (
        lambda: create_importance_mask(whole(last=None), 0.5, model=net()),
        MaskMismatchError,
        r"No scores for last\.weight of Sequential\. Score them, or pass exclude=",
    ),
    "scores of another shape": (
        lambda: create_importance_mask(whole(last=torch.ones(4, 3)), 0.5, model=net()),
        MaskMismatchError,
        r"last\.weight: scores \(4, 3\), parameter \(3, 4\)",
    ),
    "scores to keep the best of": (
        lambda: create_importance_mask(whole(), 0.5, keep="best"),
        SparsityError,
        "keep is 'largest' or 'smallest', .* got 'best'",
    ),
    "unknown importance": (
        lambda: compute_gradient_importance(net(), BATCH, "fish"),
        ScoreError,
        r"importance_type is one of \('grad_norm', .* got 'fish'",
    ),
    "scores of no sample": (
        lambda: compute_gradient_importance(net(), [], num_samples=None),
        ScoreError,
        "The dataloader gave no batches; one that can be gone through only once",
    ),
    "half a sample": (
        lambda: compute_gradient_importance(net(), BATCH, num_samples=0.5),
        ScoreError,
        "num_samples is a positive integer or None for all, got 0.5",
    ),
    "sums in no known place": (
        lambda: compute_gradient_importance(net(), BATCH, store="tape"),
        ScoreError,
        "store is 'cpu', 'disk', 'device' or a path, got 'tape'",
    ),
    "scores of a loss that is not finite": (
        lambda: compute_gradient_importance(net_with(float("nan")), BATCH),
        ScoreError,
        "Batch 0, sample 0: the loss is nan.* Leave the sample out",
    ),
    "hybrid of nothing": (
        lambda: compute_hybrid_importance(net(), BATCH, {}),
        ScoreError,
        "give at least one criterion and its factor",
    ),
    "hybrid with a stranger": (
        lambda: compute_hybrid_importance(net(), BATCH, {"grasp": 1.0}),
        ScoreError,
        "'grasp' is no criterion of a hybrid; there are",
    ),
    "hybrid that counts backwards": (
        lambda: compute_hybrid_importance(net(), BATCH, {"fisher": -1.0}),
        ScoreError,
        "The factor of 'fisher' is a positive number, got -1.0",
    ),
    "unknown allocation": (
        lambda: create_magnitude_mask(net(), 0.5, allocation="er"),
        SparsityError,
        "allocation is 'global', .* 'owl' or a dict {glob: sparsity}, got 'er'",
    ),
    "allocation to nobody": (
        lambda: create_magnitude_mask(net(), 0.5, allocation={"decoder.*": 0.9}),
        SparsityError,
        r"'decoder\.\*' matches none of the tensors; names look like 'first\.weight'",
    ),
    "two allocations to one tensor": (
        lambda: create_magnitude_mask(net(), 0.5, allocation={"first.*": 0.9, "*": 0.5}),
        SparsityError,
        r"'first\.\*' and '\*' both match first\.weight",
    ),
    "allocation that leaves too much": (
        lambda: create_magnitude_mask(net(), 0.9, allocation={"first.*": 0.1}),
        SparsityError,
        r"so 23 of the 12 in the other tensors would have to go for 25 in all; between 0 and 11 can",
    ),
    "pattern and allocation": (
        lambda: create_magnitude_mask(net(), 0.5, pattern="2:4", allocation="erk"),
        SparsityError,
        "pattern='2:4' and allocation='erk' contradict each other: .* Leave one of them out",
    ),
    "no pattern": (
        lambda: create_magnitude_mask(net(), 0.5, pattern="4:2"),
        SparsityError,
        "pattern is 'N:M', .* such as '2:4'; got '4:2'",
    ),
    "pattern that does not divide": (
        lambda: create_magnitude_mask(net(), None, pattern="1:3"),
        SparsityError,
        r"input dimensions that 3 divides; not so: first\.weight \(4, 4\), last\.weight \(3, 4\)\. pattern_rem",
    ),
    "pattern of another sparsity": (
        lambda: create_magnitude_mask(net(), 0.9, pattern="2:4"),
        SparsityError,
        r"pattern='2:4' removes 0\.5 of the weights, and sparsity says 0\.9\. Pass sparsity=0\.5 or None",
    ),
    # Quality and robustness
    "no batches": (
        lambda: quality([]),
        EvaluationError,
        "The dataloader gave no batches; one that can be iterated",
    ),
    "batch of text": (lambda: quality(["one two"]), BatchError, r"A batch is a mapping, .* or a pair .* got"),
    "batch of one tensor": (lambda: quality([torch.ones(2, 4)]), BatchError, r"A batch is a mapping, .* got"),
    "label out of range": (
        lambda: quality([(torch.ones(2, 4), torch.tensor([0, 7]))]),
        BatchError,
        r"A label is 7, but the model has 3 classes: 0 \.\.\. 2",
    ),
    "labels of another shape": (
        lambda: quality([(torch.ones(2, 4), torch.tensor([0, 1, 2]))]),
        BatchError,
        r"Outputs \(2, 3\) against class numbers \(3,\).* give loss_fn",
    ),
    "loss not finite": (
        lambda: quality([BATCH], model=net_with(float("inf")), baseline_performance=None),
        EvaluationError,
        r"Batch 0: the loss of .* is (nan|inf).* nonfinite='skip'",
    ),
    "unknown precision": (
        lambda: quality([BATCH], precision_mode="low"),
        EvaluationError,
        "'high' .* or 'fast' .*'low'",
    ),
    "confidence outside": (lambda: quality([BATCH], confidence=95), EvaluationError, "between 0 and 1, got 95"),
    "unknown policy": (
        lambda: quality([BATCH], nonfinite="ignore"),
        EvaluationError,
        "'raise' or 'skip', got 'ignore'",
    ),
    "no batch allowed": (
        lambda: quality([BATCH], max_batches=0),
        EvaluationError,
        "max_batches is a positive integer",
    ),
    "quality with a mask of another model": (
        lambda: quality([BATCH], mask=whole(last=torch.ones(4, 3))),
        MaskMismatchError,
        r"last\.weight: mask \(4, 3\), parameter \(3, 4\)",
    ),
    "robustness at sparsity 1": (
        lambda: compute_pruning_robustness(net(), BATCH, sparsity_levels=(0.5, 1.0)),
        SparsityError,
        r"got 1\.0",
    ),
    "validation against a path": (
        lambda: validate_pruning_correctness(net(), "ticket.safetensors"),
        MaskError,
        r"got str.*Mask\.load\(path\)",
    ),
    # Overlap
    "unknown method": (
        lambda: compute_ticket_overlap(whole(), whole(), method="cosine"),
        EvaluationError,
        "method is 'jaccard', 'dice' or 'overlap', got 'cosine'",
    ),
    "a layer missing, strictly": (
        lambda: compute_ticket_overlap(whole(), whole(last=None), strict=True),
        MaskMismatchError,
        r"cannot be compared whole: .*last\.weight",
    ),
    "shapes differ, strictly": (
        lambda: compute_ticket_overlap(whole(), whole(last=torch.ones(4, 3)), strict=True),
        MaskMismatchError,
        r"last\.weight.*\(3, 4\).*\(4, 3\)",
    ),
    # Early birds
    "birds at sparsity 1": (lambda: birds(target_sparsity=1.0), SparsityError, r"target_sparsity is .* got 1\.0"),
    "birds at sparsity 0": (
        lambda: birds(target_sparsity=[0.5, 0]),
        SparsityError,
        "keeps everything never changes",
    ),
    "birds at no sparsity": (
        lambda: birds(target_sparsity=[]),
        SparsityError,
        r"several different ones, got \[\]",
    ),
    "one sparsity twice": (lambda: birds(target_sparsity=[0.5, 0.5]), SparsityError, "several different ones"),
    "no epochs": (lambda: birds(max_epochs=0), TrainingError, "max_epochs is a positive integer, got 0"),
    "no check": (
        lambda: birds(check_interval=2),
        TrainingError,
        "check_interval=2 is more than max_epochs=1.* Check more often or train longer",
    ),
    "checks by epochs and steps": (
        lambda: birds(max_epochs=9, check_interval=2, check_every_steps=5),
        TrainingError,
        "check_interval=2 counts epochs and check_every_steps=5 steps. Leave one of them out",
    ),
    "unknown criterion": (lambda: birds(criterion="mask"), DetectionError, "criterion is one of .*, got 'mask'"),
    "criterion and ranking": (
        lambda: birds(criterion="queue", use_magnitude_ranking=True),
        TrainingError,
        "use_magnitude_ranking=True asks for criterion='rank_correlation', and criterion says 'queue'",
    ),
    "threshold that chance meets": (
        lambda: birds(target_sparsity=0.9, convergence_threshold=0.3),
        DetectionError,
        r"threshold 0\.3 is met by chance",
    ),
    "window of nothing": (lambda: birds(stability_window=0), DetectionError, "integer of at least 1, got 0"),
    "unknown optimizer": (lambda: birds(optimizer="lion"), TrainingError, "optimizer is one of sgd.* got 'lion'"),
    "function that makes no optimizer": (
        lambda: birds(optimizer=lambda parameters: 3),
        TrainingError,
        "function from parameters to an optimizer of torch's; it returned int",
    ),
    "momentum of AdamW": (
        lambda: birds(use_sgd=False, momentum=0.9),
        TrainingError,
        r"momentum=0\.9 is for 'sgd'",
    ),
    "negative learning rate": (
        lambda: birds(learning_rate=-1.0),
        TrainingError,
        r"learning_rate is a finite number of at least 0, got -1\.0",
    ),
    "no micro-batch": (
        lambda: birds(max_batch_size=0),
        TrainingError,
        "max_batch_size is a positive integer, got 0",
    ),
    "unknown policy for losses": (
        lambda: birds(nonfinite="raise"),
        TrainingError,
        "nonfinite is 'stop' or 'skip', got 'raise'",
    ),
    "share to skip in percent": (
        lambda: birds(max_skipped=5),
        TrainingError,
        "max_skipped is a finite number from 0 to 1, got 5",
    ),
    "unknown precision of weights": (
        lambda: birds(precision="high"),
        TrainingError,
        "precision is one of stochastic, compensated, nearest; got 'high'",
    ),
    "unknown checkpointing": (
        lambda: birds(gradient_checkpointing="yes"),
        TrainingError,
        "gradient_checkpointing is 'auto', True or False; got 'yes'",
    ),
    "trainer_fn and an optimizer": (
        lambda: birds(trainer_fn=lambda *_: None, optimizer="adamw", max_batch_size=4),
        TrainingError,
        "trainer_fn trains by itself, and optimizer, max_batch_size would say how",
    ),
    "trainer_fn that is none": (
        lambda: birds(trainer_fn="sgd"),
        TrainingError,
        "trainer_fn is a function .* got 'sgd'",
    ),
    "trainer_fn by steps": (
        lambda: birds(trainer_fn=lambda *_: None, check_every_steps=5),
        TrainingError,
        "trainer_fn trains whole epochs, so check_every_steps=5 cannot be kept",
    ),
    "masks to nowhere": (lambda: birds(save_masks=True), TrainingError, "save_masks=True keeps .* Give run_dir"),
    "negative seed of a search": (lambda: birds(seed=-1), TrainingError, "seed is a non-negative integer, got -1"),
    "a run where a file is": (lambda: birds(run_dir=__file__), RunFolderError, "no folder can be made there"),
    "nothing to train on": (
        lambda: birds([]),
        TrainingError,
        "no batches in epoch 1.* give a DataLoader or a list",
    ),
    "training on text": (lambda: birds(["one two"]), BatchError, "A batch is a mapping, .* or a pair .* got"),
    "a dataloader that is none": (
        lambda: birds(3),
        BatchError,
        "Expected a batch or an iterable of batches, got int",
    ),
    "pattern of birds without a match": (
        lambda: birds(include="decoder.*"),
        ParameterSelectionError,
        r"include='decoder\.\*' matches no parameter",
    ),
    "NaN weight before training": (
        lambda: birds(model=net_with(float("nan"))),
        WeightsError,
        r"found in last\.weight \(1\)",
    ),
    "meta model to train": (lambda: birds(model=meta_net()), WeightsError, r"first\.weight is on the meta device"),
    "a path without two ends": (lambda: path(points=1), EvaluationError, "points=1: a path has two ends"),
    "a state of another network": (
        lambda: path(nn.Linear(4, 3).state_dict()),
        StateMismatchError,
        r"state_b is not a state of this Sequential: weight: the model has no such tensor; .* Give what",
    ),
    "a state that diverged": (
        lambda: path(net_with(float("nan")).state_dict()),
        WeightsError,
        r"state_b: last\.weight holds NaN .* Give a state of a training that did not diverge",
    ),
    "statistics of no BatchNorm": (
        lambda: path(recompute_batchnorm=True),
        EvaluationError,
        "recompute_batchnorm: Sequential has no BatchNorm layer .* Leave it out",
    ),
    "instability at no step": (
        lambda: instability(rewind_steps=[]),
        TrainingError,
        "rewind_steps is a sequence of at least one number",
    ),
    "instability in one order": (
        lambda: instability(rewind_steps=[0]),
        TrainingError,
        "the two siblings from step 0 are the same network.*a loader that does not shuffle",
    ),
    "rounds that remove nothing": (lambda: rounds(target_sparsity=0.0), SparsityError, "which removes nothing"),
    "no rounds": (lambda: rounds(num_iterations=0), TrainingError, "num_iterations is a positive integer, got 0"),
    "rewinding to nowhere": (
        lambda: rounds(rewind="start"),
        TrainingError,
        "rewind is 'weights' or .* got 'start'",
    ),
    "rewinding to two points": (
        lambda: rounds(rewind_epoch=1, rewind_step=1),
        TrainingError,
        "rewind_epoch=1 and rewind_step=1 name two points. Leave one out",
    ),
    "rewinding beyond the end": (
        lambda: rounds(rewind_step=2),
        TrainingError,
        r"rewind_step=2, but training has 2 steps .* earlier step or train longer",
    ),
    "fractions beyond the target": (
        lambda: rounds(target_sparsity=0.1, layer_fractions={"first.*": 0.9}),
        SparsityError,
        "layer_fractions and target_sparsity contradict each other: in round 1",
    ),
    "two fractions for a layer": (
        lambda: rounds(layer_fractions={"first.*": 0.1, "*.weight": 0.2}),
        SparsityError,
        r"'first\.\*' and '\*\.weight' both match first\.weight; one fraction a tensor",
    ),
    "test data without validation": (
        lambda: rounds(test_dataloader=[BATCH]),
        TrainingError,
        "there is no eval_dataloader. Give both",
    ),
    "a run that is none": (
        lambda: RunFolder.configuration("absent"),
        RunFolderError,
        r"absent/config\.json: cannot be read",
    ),
    "sparsity of text": (
        lambda: compute_sparsity("ticket"),
        MaskError,
        "takes a mask, a tensor or a model, got str",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS.keys())
def test_bad_input_is_told(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert error is ValueError or issubclass(type(caught.value), LotteryTicketError)


# --- Files ---


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, body: bytes | None = None, **metadata: str | None) -> None:
    header, old = header_of(path)
    changed = {**header["__metadata__"], **metadata}
    header["__metadata__"] = {key: value for key, value in changed.items() if value is not None}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + (old if body is None else body))


# Case -> what is done to a good file, the text of the error.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "truncated or damaged .* get the ticket again",
    ),
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "another kind of file": (lambda path: path.write_bytes(b"PK\x03\x04" * 9), "not a whole safetensors file"),
    "bits beyond the end": (
        lambda path: rewrite(path, b"\xff\xff"),
        "w: bits are set beyond the last of its 9 weights",
    ),
    "shapes that do not fit": (
        lambda path: rewrite(path, shapes='{"w":[17]}'),
        r"w: its shape takes 3 bytes of packed bits, the file holds U8 \[2\]",
    ),
    "unknown version": (
        lambda path: rewrite(path, format_version="99"),
        "format version '99' is unknown here, this library reads '1'; update lottery-tickets",
    ),
    "no metadata": (
        lambda path: save_file({"w": np.zeros(2, np.uint8)}, path),
        "no metadata, so this is not a ticket",
    ),
    "missing metadata": (lambda path: rewrite(path, digest=None), "missing metadata: digest"),
    "wrong digest": (lambda path: rewrite(path, b"\xfe\x01"), "wrong digest: .* it was changed or damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "a folder, not a ticket file"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES.keys())
def test_bad_files_are_told(tmp_path, damage, message):
    path = tmp_path / "ticket.safetensors"
    Mask.from_tensors({"w": torch.ones(9)}).save(path)
    damage(path)
    with pytest.raises(MaskFileError, match=message) as caught:
        Mask.load(path)
    assert str(caught.value).startswith(str(path))
