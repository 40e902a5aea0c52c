"""Is it a winning ticket? Its controls trained beside it, over seeds, and a verdict that statistics bear out.

A ticket that trains well is no finding by itself: the dense network may train better, and any other mask of that
sparsity, or any other initial weights under the same mask, as well. `compute_ticket_verdict` trains the ticket and
its controls by one recipe, on the same batches in the same order, over several seeds, and says which it is:

- "winning": not worse than the dense network by more than a margin, and better than the same mask on other initial
  weights and than random masks;
- "matching": not worse than the dense network by more than the margin, but not shown to be better than those;
- "not a ticket": not shown to keep up with the dense network.

    results = compute_ticket_verdict(
        make_model, make_dataloaders, tickets, margin=0.01, epochs=20, optimizer="adam", learning_rate=1.2e-3
    )
    print(results["verdict"], results["reason"])

What is claimed is shown at the confidence that was asked for; what is not shown is told apart in the reason, into
what was shown to be otherwise and what so few seeds cannot tell. For trainings of one's own there is the judgement
alone: `compute_verdict_from_scores`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, get_args

from lottery_tickets._batches import LossFunction
from lottery_tickets._verdict._controls import CONTROLS, Control
from lottery_tickets._verdict._experiment import Experiment, Initial, MakeDataloaders, MakeModel, Ticket
from lottery_tickets._verdict._judging import Judgement, Verdict, VerdictTest, check_standard, judge
from lottery_tickets._verdict._results import (
    Metric,
    Moment,
    PairedDifference,
    Summary,
    TicketTraining,
    TicketVerdict,
    differences,
    is_better_higher,
    numbers_of,
    score_name,
    summaries,
)
from lottery_tickets._verdict._trainings import Trainings
from lottery_tickets.errors import VerdictError
from lottery_tickets.runs import RunFolder, private_random_state
from lottery_tickets.training import Checkpointing, OptimizerFunction, Precision, Recipe, SchedulerFactory

__all__ = [
    "Control",
    "Judgement",
    "PairedDifference",
    "Summary",
    "TicketTraining",
    "TicketVerdict",
    "Verdict",
    "VerdictTest",
    "compute_ticket_verdict",
    "compute_verdict_from_scores",
]


def compute_ticket_verdict(
    make_model: MakeModel,
    make_dataloaders: MakeDataloaders,
    ticket: Ticket,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    controls: Sequence[Control] = CONTROLS,
    *,
    margin: float,
    epochs: int = 10,
    confidence: float = 0.95,
    metric: Metric | None = None,
    judged_at: Moment = "early_stopping",
    initial: Initial = None,
    optimizer: str | OptimizerFunction = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    scheduler: SchedulerFactory | None = None,
    loss_fn: LossFunction | None = None,
    max_batch_size: int | None = None,
    max_grad_norm: float | None = None,
    gradient_checkpointing: Checkpointing = "auto",
    precision: Precision = "stochastic",
    eval_every_steps: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    check_memory: bool = True,
) -> TicketVerdict:
    r"""Train a ticket and its controls over seeds, and judge it.

    With $d_i$ the ticket's score minus a control's at seed i, n seeds, and $s$ the standard deviation of the
    $d_i$, each claim is a one-sided paired t test: that the mean of d is above $\delta$ is shown where

    $$\frac{\bar d - \delta}{s/\sqrt n} \ge t_{n-1,\,c}$$

    at confidence c, with $\delta = -\mathrm{margin}$ against the dense network and 0 against the others. A ticket
    is "winning" if all of these are shown: that is an intersection-union test, whose error is at most 1 - c
    without any correction for the number of claims. "matching" rests on the first of them alone.

    The seed is the unit: all networks of a seed see the same batches in the same order, and all but
    "random_reinit" start from the same weights. Pruned weights are held at zero. The controls:

    - "dense": no mask.
    - "random_reinit": the ticket's mask on weights that `make_model` draws from a seed no other network has.
    - "random_mask": as many weights in all, uniformly at random over all tensors of the mask.
    - "layer_shuffled": the ticket's bits at random places of the same tensor.
    - "early_bird": the ticket that `compute_early_bird_tickets` draws at the same sparsity, in the same tensors,
      from the same weights and data in at most `epochs` epochs.

    "winning" needs "dense", "random_reinit" and "random_mask"; "layer_shuffled", a random mask too, counts where
    it is trained; "early_bird" is company, and decides nothing.

    Args:
        make_model: `make_model(seed)` gives a new network with the weights of that seed, the same at each call.
        make_dataloaders: `make_dataloaders(seed)` gives (train, validation) or (train, validation, test): batches
            of any usual form, training data in an order that `DataOrder` can seed, as a DataLoader's is. It is
            called once for each seed; most ignore the seed and give the same data.
        ticket: One for each seed (a list in the order of the seeds, or a function of the seed), meant for the
            weights of that seed; or one mask, meant for one set of weights. Then seeds vary the order of the data,
            the random masks and the new initial weights only, and intervals speak of those.
        seeds: Different non-negative integers, two at least.
        controls: Which of them to train, "dense" among them.
        margin: How much worse than dense is still not worse, in the unit of the score: 0.01 is one point of
            accuracy, or 0.01 of loss. Choose it before looking.
        epochs: Of each training.
        confidence: Of each test, between 0.5 and 1, and of the intervals.
        metric: "accuracy" or "loss"; None for the accuracy where the data has classes. Of the test data where
            there is any, else of the validation data.
        judged_at: "early_stopping", the step of the least validation loss, or "end".
        initial: The weights that the ticket is meant for, where they are not those of `make_model`: a dict of all
            parameters and buffers, a `state_dict`, or a safetensors file, such as an iterative pruning's
            `rewind_state`; with a ticket for each seed, one for each or a function of the seed. None with one
            mask: the weights of `make_model(seeds[0])`.
        optimizer: "sgd", "adam", "adamw", "adamw8bit", or a function from parameters to an optimizer of torch's,
            called with `lr` too if `learning_rate` is given.
        learning_rate: None for the optimizer's own default.
        momentum: Of SGD by name.
        weight_decay: Of an optimizer by name.
        scheduler: A function from the torch optimizer to a learning rate scheduler, stepped once a step.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss.
        max_batch_size: Samples in a forward pass at most; larger batches are split.
        max_grad_norm: Gradients are scaled down to this norm; None for no clipping.
        gradient_checkpointing: Compute activations again in the backward pass: "auto" where the model offers it.
        precision: How weights of two bytes take up small steps: "stochastic", "compensated" or "nearest".
        eval_every_steps: Batches between evaluations, which are where early stopping can be; None for epochs.
        run_dir: A folder for the run: every finished training is written down there, and not made again when a
            killed call is repeated. More seeds or controls may be asked of the same folder. Its trainings are not
            made again for another margin, confidence, metric or moment either; a function for `ticket` is not
            asked again for seeds that are finished.
        resume: If False, a folder that holds a run already is an error.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is trained if more memory is needed than is free; see `plan_memory`.

    Returns:
        A `TicketVerdict`.

    Raises:
        VerdictError: Too few seeds; controls, margins or dataloaders that cannot be; `make_model` giving weights
            that do not hang on the seed alone.
        TrainingError: A recipe that cannot be, or weights in `initial` that do not fit.
        NonfiniteLossError: A training that diverged; the message says which.
        MaskMismatchError: A ticket that does not fit the model.
        EvaluationError: Data with nothing to measure.
        BatchError: A batch of an unknown form.
        MemoryPlanError: More memory is needed than is free.
        RunFolderError: A folder in use, of another configuration or ticket, damaged or not writable.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_ticket_verdict, create_magnitude_mask
        >>> inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
        >>> labels = (inputs[:, 0] > 0).long()
        >>> def make_model(seed):
        ...     torch.manual_seed(seed)
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> def make_dataloaders(seed):
        ...     data = torch.utils.data.TensorDataset(inputs[:64], labels[:64])
        ...     return torch.utils.data.DataLoader(data, 16, shuffle=True), (inputs[64:], labels[64:])
        >>> results = compute_ticket_verdict(
        ...     make_model, make_dataloaders, lambda seed: create_magnitude_mask(make_model(seed), 0.5),
        ...     seeds=(0, 1, 2), controls=("dense", "random_mask"), margin=0.01, epochs=4, learning_rate=0.5)
        >>> results["verdict"]
        'not a ticket'
        >>> difference = results["differences"]["dense"]["early_stopping_accuracy"]
        >>> difference["mean"] < 0, len(difference["values"])
        (True, 3)

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, sections 1 and 2 (winning tickets, random
        re-initialisation, early stopping). Frankle et al., "Pruning Neural Networks at Initialization: Why Are We
        Missing the Mark?", ICLR 2021, section 5 (shuffling within layers). Ma et al., "Sanity Checks for Lottery
        Tickets: Does Your Winning Ticket Really Win the Jackpot?", NeurIPS 2021. Berger, "Multiparameter
        Hypothesis Testing and Acceptance Sampling", Technometrics 24, 1982 (intersection-union tests).
        Blackwelder, "'Proving the null hypothesis' in clinical trials", Controlled Clinical Trials 3, 1982
        (margins).
    """
    check_standard(margin, confidence)
    _check_choice("metric", metric, (None, *get_args(Metric)))
    _check_choice("judged_at", judged_at, get_args(Moment))
    experiment = Experiment(
        make_model=make_model,
        make_dataloaders=make_dataloaders,
        tickets=ticket,
        initial=initial,
        seeds=_listed("seeds", seeds),
        controls=_listed("controls", controls),
        epochs=epochs,
        eval_every_steps=eval_every_steps,
        recipe=Recipe(
            optimizer=optimizer,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            scheduler=scheduler,
            loss_fn=loss_fn,
            max_batch_size=max_batch_size,
            max_grad_norm=max_grad_norm,
            gradient_checkpointing=gradient_checkpointing,
            precision=precision,
        ),
    )
    trainings = _trained(experiment, run_dir, resume=resume, progress=progress, check_memory=check_memory)
    numbers = numbers_of(trainings)
    score = score_name(numbers, metric, judged_at)
    judgement = judge(
        {network: values[score] for network, values in numbers.items()},
        margin=margin,
        confidence=confidence,
        higher_is_better=is_better_higher(score),
    )
    return TicketVerdict(
        **judgement,
        score=score,
        population=experiment.population,
        measured_on="validation" if trainings[0]["evaluations"][-1]["test_loss"] is None else "test",
        networks=summaries(numbers, confidence),
        differences=differences(numbers, confidence),
        trainings=trainings,
    )


def compute_verdict_from_scores(
    scores: Mapping[str, Sequence[float]],
    *,
    margin: float,
    confidence: float = 0.95,
    higher_is_better: bool = True,
) -> Judgement:
    """Judge a ticket by scores that were measured elsewhere, one for each network and seed.

    The tests are those of `compute_ticket_verdict`. Where the differences of all seeds are equal there is no
    spread to go by, and the sign test's $2^{-n}$ takes the place of the p-value: five seeds at least for 95%.

    Args:
        scores: "ticket" and names of controls to scores, one for each seed in the same order. "dense" is needed;
            "random_reinit" and "random_mask" too for a "winning" ticket; "layer_shuffled" counts where it is
            there. Others are left alone.
        margin: How much worse than dense is still not worse, in the unit of the scores.
        confidence: Of each test, between 0.5 and 1.
        higher_is_better: False for losses.

    Returns:
        A `Judgement`.

    Raises:
        VerdictError: Fewer than two seeds, scores that are not paired or not finite, no "ticket" or "dense", or a
            margin or confidence that cannot be.

    Example:
        >>> from lottery_tickets.verdict import compute_verdict_from_scores
        >>> scores = {
        ...     "ticket": [0.912, 0.921, 0.915, 0.918],
        ...     "dense": [0.913, 0.919, 0.914, 0.917],
        ...     "random_reinit": [0.881, 0.894, 0.879, 0.890],
        ...     "random_mask": [0.860, 0.871, 0.869, 0.866],
        ... }
        >>> judgement = compute_verdict_from_scores(scores, margin=0.005)
        >>> judgement["verdict"]
        'winning'
        >>> print(judgement["reason"])
        Over 4 seeds: not worse than dense by more than 0.005 (gain +0.00075, at least -0.000731, p = 0.0014); ...

    References:
        Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling", Technometrics 24, 1982, theorem 1
        (intersection-union tests). Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    return judge(scores, margin=margin, confidence=confidence, higher_is_better=higher_is_better)


def _trained(
    experiment: Experiment,
    run_dir: str | os.PathLike[str] | None,
    *,
    resume: bool,
    progress: bool,
    check_memory: bool,
) -> list[TicketTraining]:
    """All trainings, in a folder where there is one."""
    with ExitStack() as stack:
        stack.enter_context(private_random_state())
        run = None
        if run_dir is not None:
            run = stack.enter_context(RunFolder.open(run_dir, experiment.configuration(), resume=resume))
        return Trainings(experiment, run, progress=progress, check_memory=check_memory).all()


def _listed(name: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise VerdictError(f"{name} is several of them, such as {(given,)!r}; got {given!r}.")
    return tuple(given)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise VerdictError(f"{name} is one of {', '.join(map(repr, choices))}; got {value!r}.")
