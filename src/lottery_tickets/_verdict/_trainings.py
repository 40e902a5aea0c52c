"""All trainings of a verdict, each written down when it is finished, so that none is made twice."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from lottery_tickets._verdict._controls import MASKS
from lottery_tickets._verdict._early_bird import early_bird
from lottery_tickets._verdict._experiment import Dataloaders, Experiment
from lottery_tickets._verdict._judging import TICKET
from lottery_tickets._verdict._results import TicketTraining, training_of
from lottery_tickets._verdict._training import train
from lottery_tickets.errors import NonfiniteLossError, RunFolderError, VerdictError
from lottery_tickets.masks import Mask
from lottery_tickets.planning import refuse_training_if_too_large
from lottery_tickets.runs import RunFolder
from lottery_tickets.training import Judge, digest_of, tensors_of


class Trainings:
    """The trainings of an experiment, those that an earlier call has finished among them.

    Args:
        experiment: What is trained.
        run: Where each is written down; None for nowhere.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse if more memory is needed than is free when a network is there.
    """

    def __init__(
        self, experiment: Experiment, run: RunFolder | None, *, progress: bool, check_memory: bool
    ) -> None:
        self._experiment, self._run, self._progress = experiment, run, progress
        self._check_memory = check_memory
        self._wanted = [(network, seed) for seed in experiment.seeds for network in experiment.networks]
        found = [training_of(line) for line in (() if run is None else run.lines)]
        self._finished = {(one["network"], one["seed"]): one for one in found}
        self._weights: dict[int, str] = {one["weights_seed"]: one["weights"] for one in found}

    def all(self) -> list[TicketTraining]:
        """Seed by seed, the ticket first; what is not there yet is trained."""
        self._refuse_other_weights()
        experiment = self._experiment
        missing = sum(one not in self._finished for one in self._wanted)
        bar = tqdm(
            total=missing * experiment.epochs,
            desc=f"training {missing} networks",
            unit=" epochs",
            delay=2,
            disable=not self._progress,
        )
        with bar:
            for seed in experiment.seeds:
                self._train_seed(seed, bar)
        return [self._finished[one] for one in self._wanted]

    def _train_seed(self, seed: int, bar: Any) -> None:
        experiment = self._experiment
        pending = [network for network in experiment.networks if (network, seed) not in self._finished]
        if not pending and experiment.asks_for_tickets:
            return
        ticket = experiment.ticket(seed)
        self._refuse_another_ticket(ticket, seed)
        if not pending:
            return
        data = experiment.dataloaders(seed)
        for network in pending:
            self._keep(self._trained(network, seed, ticket, data, bar))

    def _trained(self, network: str, seed: int, ticket: Mask, data: Dataloaders, bar: Any) -> TicketTraining:
        experiment, recipe = self._experiment, self._experiment.recipe
        try:
            mask, settled = self._mask(network, seed, ticket, data)
            model = experiment.model(network, seed)
            refuse_training_if_too_large("verdict", model, data.train, recipe, check=self._check_memory)
            number, weights = experiment.weights_seed(network, seed), digest_of(tensors_of(model))
            self._check_weights(number, weights)
            done = train(
                *(model, mask, data.train, Judge(data.validation, data.test, loss_fn=recipe.loss_fn), recipe),
                epochs=experiment.epochs,
                eval_every_steps=experiment.eval_every_steps,
                seed=seed,
                after_epoch=bar.update,
            )
        except NonfiniteLossError as error:
            raise NonfiniteLossError(
                f"{network}, seed {seed}: {error} A network that diverges has no measures; lower the learning "
                "rate for all of them, or leave out the control."
            ) from error
        return TicketTraining(
            network=network,
            seed=seed,
            weights_seed=number,
            weights=weights,
            mask=None if mask is None else mask.digest(),
            sparsity=0.0 if mask is None else mask.sparsity,
            settled_epoch=settled,
            train_loss=done.train_loss,
            evaluations=done.evaluations,
            seconds=done.seconds,
        )

    def _mask(self, network: str, seed: int, ticket: Mask, data: Dataloaders) -> tuple[Mask | None, int | None]:
        """What a network keeps, and when that had settled."""
        if network != "early_bird":
            return MASKS[network](ticket, seed), None
        experiment = self._experiment
        model = experiment.model(network, seed)
        recipe, epochs = experiment.recipe, experiment.epochs
        knobs = {"progress": self._progress, "check_memory": self._check_memory}
        return early_bird(model, data.train, ticket, recipe, epochs=epochs, seed=seed, **knobs)

    def _keep(self, training: TicketTraining) -> None:
        self._finished[training["network"], training["seed"]] = training
        if self._run is not None:
            self._run.record(training)
            self._run.save({}, {})

    def _refuse_other_weights(self) -> None:
        """One ticket is meant for the weights of the first seed, so that has to stay the first."""
        for network, seed in self._wanted:
            before, now = self._finished.get((network, seed)), self._experiment.weights_seed(network, seed)
            if before is not None and before["weights_seed"] != now:
                raise RunFolderError(
                    f"run_dir holds {network} of seed {seed} on the weights of make_model("
                    f"{before['weights_seed']}), and is asked for those of make_model({now}). With one ticket the "
                    "first of the seeds is whose weights it is meant for: add seeds behind it, or give another "
                    "run_dir."
                )

    def _refuse_another_ticket(self, ticket: Mask, seed: int) -> None:
        before = self._finished.get((TICKET, seed))
        if before is not None and before["mask"] != ticket.digest():
            raise RunFolderError(
                f"run_dir holds trainings of another ticket for seed {seed}: {before['mask']} there, "
                f"{ticket.digest()} now. Give the ticket that it was begun with, or another run_dir."
            )

    def _check_weights(self, number: int, weights: str) -> None:
        """Weights are the same where they are to be, and only there."""
        known = self._weights.setdefault(number, weights)
        if known != weights:
            raise VerdictError(
                f"make_model({number}) gave other weights than it had given before, and networks are compared "
                "that start from the same. It has to draw them by its seed, and `initial` has to stay what it is."
            )
        same = [other for other, digest in self._weights.items() if digest == weights and other != number]
        if same:
            raise VerdictError(
                f"make_model({number}) and make_model({same[0]}) gave the same weights, and seeds are to differ "
                "in them. It has to draw them by its seed; weights that were not drawn (pretrained, rewound) are "
                "given as `initial`, with one ticket that is meant for them."
            )
