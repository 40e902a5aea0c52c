"""The memory of an operation, known before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lottery_tickets.errors import PlanError
from lottery_tickets.masks import Patterns
from lottery_tickets.planning._amounts import amount_of, shown
from lottery_tickets.planning._bytes import ITEMS, Bytes
from lottery_tickets.planning._items import OPERATIONS, TRAINING
from lottery_tickets.planning._knobs import Knob, knobs_of, largest_batch
from lottery_tickets.planning._models import DTYPES, dtype_of, in_dtype, shapes_of
from lottery_tickets.planning._options import Optimizer, Options, PlanCriterion, PlanPrecision, PlanStore
from lottery_tickets.planning._shapes import Shapes

_ALSO = {"early_bird": "early-bird", "imp": "iterative"}  # other names of operations
_BAR = 24  # characters of the longest bar in a table


class MemoryPlan(Mapping[str, int]):
    """Bytes of each item, and in `total` of all at the worst moment, where it computes; printed, a table.

    Attributes:
        operation: What is planned.
        model: What it is done to, in words.
        dtype: Of the weights.
        device: "cpu" or the type of an accelerator.
        turns: By how much the items exceed `total`: what comes when others are gone takes their place.
        host: Item to bytes in the machine's memory, where the operation computes on an accelerator.
        complete: Whether all is counted; where it is not, the architecture's activations are not known, and the
            operation takes at least `total`.
        traced: Whether activations, logits among them, were told by a run on the meta device, an estimate, and not
            by arithmetic for this architecture.
        limit: Bytes that there are, None if nobody said.
        largest_batch: Most samples that go through the model together within the limit, 0 for none; None without
            a limit, where memory does not depend on it, or where `complete` is False.
        knobs: Settings that would take less, each by itself: pairs of the setting and the bytes that it saves, the
            largest first.
    """

    def __init__(
        self,
        found: Bytes,
        *,
        operation: str,
        model: str,
        dtype: str,
        options: Options,
        limit: int | None,
        largest_batch: int | None,
        knobs: list[Knob],
    ) -> None:
        self._bytes = {name: found.device[name] for name in ITEMS} | {"total": found.total}
        self.operation, self.model, self.dtype, self.device = operation, model, dtype, options.device
        self.batch_size, self.sequence_length = options.rows, options.sequence_length
        self.host = {name: count for name, count in found.host.items() if count}
        self.turns, self.complete, self.limit = found.turns, found.known, limit
        self.traced = found.traced
        self.largest_batch, self.knobs = largest_batch, knobs

    def __getitem__(self, name: str) -> int:
        """Bytes of an item, or of all in "total"."""
        return self._bytes[name]

    def __iter__(self) -> Iterator[str]:
        """Items, "total" the last."""
        return iter(self._bytes)

    def __len__(self) -> int:
        """Number of items, with "total"."""
        return len(self._bytes)

    @property
    def fits(self) -> bool | None:
        """Whether it is within the limit; None without one, or where only a lower bound of it is known to be."""
        if self.limit is None or (self["total"] <= self.limit and not self.complete):
            return None
        return self["total"] <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's own types."""
        told = (
            "operation",
            "model",
            "dtype",
            "device",
            "batch_size",
            "sequence_length",
            "turns",
            "complete",
            "traced",
            "limit",
        )
        return {
            **{name: getattr(self, name) for name in told},
            "fits": self.fits,
            "bytes": dict(self),
            "host_bytes": dict(self.host),
            "largest_batch": self.largest_batch,
            "knobs": [{"setting": knob.setting, "saved": knob.saved} for knob in self.knobs],
        }

    def __str__(self) -> str:
        """Items, sum and limit, and what would take less."""
        return "\n".join([self._heading(), *self._rows(), *self._told()])

    def _heading(self) -> str:
        what = f"{self.operation} of {self.model} in {self.dtype} on {self.device}"
        return f"{what}, {self.batch_size} x {self.sequence_length} tokens at a time"

    def _rows(self) -> Iterator[str]:
        longest = max(len(name) for name in (*ITEMS, "at least"))
        for name in ITEMS:
            if self[name]:
                bar = "#" * round(_BAR * self[name] / self["total"])
                yield f"  {name:<{longest}}  {shown(self[name]):>8}  {bar}".rstrip()
        if self.turns:
            yield f"  {'in turns':<{longest}}  {'-' + shown(self.turns):>8}"
        yield f"  {'total' if self.complete else 'at least':<{longest}}  {shown(self['total']):>8}"
        if self.limit is not None:
            verdict = {True: "fits", False: "does not fit", None: "activations are not known"}[self.fits]
            yield f"  {'limit':<{longest}}  {shown(self.limit):>8}  {verdict}"

    def _told(self) -> Iterator[str]:
        if not self.complete:
            yield "Activations of this architecture are not known, and not all counted."
        if self.traced:
            yield "Activations, logits among them, are an estimate from a run on the meta device."
        if self.host:
            listed = ", ".join(f"{name} {shown(count)}" for name, count in self.host.items())
            yield f"In the machine's memory: {listed}."
        if self.largest_batch is not None:
            yield f"Largest batch that fits: {self.largest_batch}."
        if self.knobs:
            yield "What would take less, each by itself:"
        widest = max((len(knob.setting) for knob in self.knobs), default=0)
        for knob in self.knobs:
            left = self["total"] - knob.saved
            fits = "" if self.limit is None or self.fits or left > self.limit else ", which fits"
            yield f"  {knob.setting:<{widest}}  saves {shown(knob.saved)}, leaves {shown(left)}{fits}"


def plan_memory(
    model_or_config: Any,
    operation: str,
    *,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: Optimizer = "sgd",
    device_memory: int | str | None = None,
    device: str | None = None,
    gradient_checkpointing: bool | None = None,
    max_batch_size: int | None = None,
    momentum: float = 0.0,
    precision: PlanPrecision = "stochastic",
    criterion: PlanCriterion = "window",
    store: PlanStore = "cpu",
    masks: int = 1,
    use_histogram: bool = True,
    from_disk: bool = False,
    batches: int = 1,
    run_dir: bool = False,
    rewind_later: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> MemoryPlan:
    r"""Peak memory of an operation from shapes alone, item by item: nothing is loaded, and no weight is read.

    With N prunable weights, n of them in the largest tensor, $P_t$ elements of b bytes in parameter t and masks of
    $\lceil N / 8 \rceil$ bytes:

    - "mask": weights, masks, and scratch for counting that does not grow with the model;
    - "quality": weights, masks, a masked copy of one layer, the activations of one block, logits, and chunks of
      the loss;
    - "magnitude": weights and 4 N bytes of scores;
    - "grad_norm", "taylor", "fisher", "obd", "snip", "taylor-squared", "fisher-true", "fisher-batch": weights, 4 N
      of sums that become scores (in memory, or in a file), one gradient of 4 n, activations kept for the way back,
      logits and their gradient;
    - "wanda": weights, 4 N of scores, a forward pass;
    - "grasp", "synflow": at least what is listed; "hybrid": the most that a criterion takes, and 4 N of ranks;
    - "early-bird": a training step (`training_bytes`), the masks of the checks before (one, or four in a queue),
      a sample of weights, and N bytes of ranks under "rank_correlation";
    - "iterative", also "imp": a training step, the mask, and the rewinding point, unless a run's folder has it.

    Scores' sums come as activations go: the larger of both counts, and `turns` is the other. The code of torch and
    its libraries is not counted, some hundred megabytes. Activations are known of the decoders that
    `training_bytes` knows; those of other transformers models that take words or images are told by a run on the
    meta device (`traced`), and of anything else none are counted (`complete` is False). On an accelerator, masks
    and sums lie in the machine's memory, listed under `host`.

    Args:
        model_or_config: A module on any device, "meta" too; a transformers config; a path to config.json or to
            the folder it is in; or the name of a configuration that is shipped, such as "Qwen2.5-14B".
        operation: See above.
        dtype: Of the weights; None for the model's or the config's own.
        batch_size: Samples in a batch.
        sequence_length: Tokens in a sample.
        optimizer: For training: "sgd", "adam", "adamw" or "adamw8bit" inside the backward pass; "torch sgd" and
            "torch adamw" after it, with all gradients held.
        device_memory: Bytes that there are, or text such as "80GB" or "24GiB".
        device: Type of the device that computes, "cpu" or another; None for the module's own, and of a meta module
            or a config an accelerator if `device_memory` is given, else the CPU.
        gradient_checkpointing: Activations are made again on the way back; None for the operation's default,
            which is yes for training and no for scores.
        max_batch_size: Of training: larger batches go through the model in pieces, and gradients are held.
        momentum: Of SGD.
        precision: Of training weights of two bytes.
        criterion: Of early-bird checks.
        store: Of scores from gradients: where sums lie.
        masks: How many are drawn or judged at once.
        use_histogram: Of masks; False sorts.
        from_disk: Of masks, quality and Wanda: from a checkpoint's folder, whose weights are read where they lie,
            for the latter two block by block, in the type that they are stored in.
        batches: Of quality and Wanda from disk: how many there are, whose hidden states wait in memory for the
            next block; 0 if they wait on disk.
        run_dir: Of "iterative": whether the rewinding point lies in the run's folder.
        rewind_later: Of "iterative": whether it has an optimizer's state too, not being the initialisation.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.

    Returns:
        A `MemoryPlan`: item to bytes, and "total".

    Raises:
        PlanError: An operation, model, optimizer, data type or amount that is not known.
        ParameterSelectionError: See `prunable_parameters`.
        MissingExtraError: A config without transformers installed.

    Example:
        >>> import torch
        >>> from lottery_tickets.large_models import plan_memory
        >>> model = torch.nn.Linear(1000, 100, bias=False, device="meta")
        >>> plan = plan_memory(model, "fisher", dtype="float32")
        >>> plan["weights"], plan["scores"], plan["gradients"]
        (400000, 400000, 400000)
        >>> plan["total"] + plan.turns == sum(count for name, count in plan.items() if name != "total")
        True

    References:
        Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", ACL 2024, arXiv
        2306.09782, section 3.1: what is in memory where the step is taken inside the backward pass.
    """
    operation = _ALSO.get(operation, operation)
    if operation not in OPERATIONS:
        raise PlanError(f"operation is one of {', '.join(OPERATIONS)}; got {operation!r}.")
    module = shapes_of(model_or_config, dtype_of(dtype))
    limit = None if device_memory is None else amount_of(device_memory)
    options = Options(
        batch_size=batch_size,
        sequence_length=sequence_length,
        optimizer=optimizer,
        device=device or _device_of(module, limited=limit is not None),
        gradient_checkpointing=gradient_checkpointing,
        max_batch_size=max_batch_size if operation in TRAINING else None,
        momentum=momentum,
        precision=precision,
        criterion=criterion,
        store=store,
        masks=masks,
        use_histogram=use_histogram,
        from_disk=from_disk,
        batches=batches,
        on_disk=run_dir,
        rewind_later=rewind_later,
    )
    shapes = Shapes.of_model(module, include, exclude, traced=True)
    name = model_or_config if isinstance(model_or_config, str) else type(module).__name__
    return plan_of(shapes, operation, options, limit=limit, name=name, patterns=(include, exclude))


def plan_of(
    shapes: Shapes,
    operation: str,
    options: Options,
    *,
    limit: int | None,
    name: str,
    patterns: tuple[Patterns, Patterns] = (None, None),
) -> MemoryPlan:
    """The plan of an operation whose shapes and options are known."""
    kinds = {one.dtype for one in shapes.model.parameters() if one.is_floating_point()} if shapes.model else set()
    narrow = None
    if shapes.model is not None and kinds & {torch.float32, torch.float64}:
        narrow = Shapes.of_model(
            in_dtype(shapes.model, torch.bfloat16), *patterns, traced=shapes.trace is not None
        )
    names = {dtype: text for text, dtype in DTYPES.items()}
    return MemoryPlan(
        OPERATIONS[operation](shapes, options),
        operation=operation,
        model=name,
        dtype=" and ".join(sorted(names.get(kind, str(kind)) for kind in kinds)) or "its own type",
        options=options,
        limit=limit,
        largest_batch=None if limit is None else largest_batch(operation, shapes, options, limit),
        knobs=knobs_of(operation, shapes, options, narrow),
    )


def _device_of(module: torch.nn.Module, *, limited: bool) -> str:
    kind = next((one.device.type for one in module.parameters()), "cpu")
    if kind != "meta":
        return kind
    return "cuda" if limited else "cpu"
