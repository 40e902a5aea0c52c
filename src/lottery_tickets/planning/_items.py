"""Bytes of each operation, item by item, at the moment at which it holds the most.

Every function here says what one operation of the library holds, in the order in which the library makes it; the
tests hold the figures against arithmetic by hand, the benchmark against measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from lottery_tickets.planning._bytes import Bytes
from lottery_tickets.planning._from_disk import masked_bytes, waiting_bytes
from lottery_tickets.planning._options import Options
from lottery_tickets.planning._shapes import Shapes
from lottery_tickets.planning._trace import Pass
from lottery_tickets.training import DecoderSizes, training_bytes

_SINGLE, _DOUBLE = 4, 8
# The loss looks at logits in float32, 16 MiB at a time. From a chunk comes another tensor of its size; of chunks
# that are done with the CPU's allocator has been seen to hold back three, an accelerator's holds one.
_LOSS_CHUNK, _HELD_BACK, _HELD_BACK_ELSEWHERE = 16 << 20, 3, 1
# One in so many bytes that are made when others are given back does not find their place on the CPU's heap, as
# seen in measured peaks.
_MISPLACED = 3
# Selection: blocks in flight, where weights are not read where they lie; above a size a sample, three times over,
# and what lies between two guesses, six standard deviations of the sample's rank to either side.
_BLOCKS, _SAMPLE_FROM, _SAMPLE_SHARE, _SAMPLE_MOST, _BETWEEN = 32 << 20, 1 << 22, 800, 1 << 20, 16 << 20
_SIGMAS = 6
_SORTING = 20  # bytes a weight where lines are drawn by sorting
# Ranks are counted in groups of 65,536 values: counts, their sums, and the shares they come to.
_RANKING = (128 << 16) * (4 + 3 * _DOUBLE)
# Weights that Wanda turns into scores at a time.
_SCORED = 1 << 22
# The probe of early-bird checks: positions and weights of a sample.
_PROBE, _PROBE_MOST = 16, 1 << 20
# What is copied from file to file at a time: so many of the widest numbers.
_COPIED = _DOUBLE << 20
_KEPT_MASKS = {"window": 1, "queue": 4, "rank_correlation": 1}


Operation = Callable[[Shapes, Options], Bytes]


def mask_bytes(shapes: Shapes, options: Options) -> Bytes:
    """A mask drawn by counting: packed bits, and scratch that does not grow with the model.

    Pages of a checkpoint's files are the system's, which takes them back when it likes.
    """
    found = Bytes() if options.from_disk else _model(shapes)
    found.add("mask", options.masks * shapes.mask, to_host=options.elsewhere)
    found.add("temporaries", _selecting(shapes, options))
    return found


def load_bytes(shapes: Shapes, _options: Options) -> Bytes:
    """A checkpoint's weights in memory of their own."""
    return _model(shapes)


def apply_bytes(shapes: Shapes, _options: Options) -> Bytes:
    """A pruned copy of a checkpoint: its mask, and a block that goes from one file to the other."""
    found = Bytes()
    found.add("mask", shapes.mask)
    found.add("temporaries", _COPIED)
    return found


def quality_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Forward passes of the dense model and of its tickets, each layer masked as it computes.

    From disk, all of a block are masked at once, and hidden states of all batches wait for their turn.
    """
    if options.from_disk:
        found = Bytes()
        found.add("mask", options.masks * shapes.mask)
        found.add("temporaries", masked_bytes(shapes))
        found.add("activations", waiting_bytes(shapes, options, options.masks + 1))
        _add_forward(found, shapes, options, loss=True)
        return found
    found = _model(shapes)
    found.add("mask", options.masks * shapes.mask, to_host=options.elsewhere)
    # A masked copy of the layer, and on an accelerator its bits unpacked and carried over.
    found.add("temporaries", shapes.largest + (shapes.most if options.elsewhere else 0))
    if options.elsewhere:
        found.add("temporaries", shapes.most, to_host=True)
    _add_forward(found, shapes, options, loss=True)
    return found


def robustness_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Tickets drawn from one count, and the quality of one after the other."""
    found = quality_bytes(shapes, options)
    found.add("temporaries", _selecting(shapes, options))
    return found


def connectivity_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Weights to come back to, and a forward pass at each point between the states, which are there already."""
    found = _model(shapes)
    found.add("rewind", shapes.weights)
    _add_forward(found, shapes, options, loss=True)
    return found


def gradient_score_bytes(shapes: Shapes, options: Options, *, weighed: bool = False) -> Bytes:
    """Gradients of single samples, one tensor's at a time, and sums over them in float32."""
    found = _model(shapes)
    found.add("gradients", _SINGLE * shapes.most)
    if shapes.held is not None:  # what a pass gives is added up whole before each rank takes its part
        found.add("gradients", _SINGLE * shapes.most)
    loaded = found.total
    _add_backward(found, shapes, options, tapped=True)
    at_the_loss = found.total - loaded
    # Sums are made as activations go, in whose place the CPU's allocator puts most of them.
    _add_sums(found, shapes, options)
    magnitudes = _magnitudes(found, shapes, options) if weighed else 0
    at_the_end = found.device["scores"] + magnitudes
    found.add("temporaries", max(0, magnitudes - found.device["temporaries"]))
    turns = found.total - loaded - max(at_the_loss, at_the_end)
    found.turns = turns if options.elsewhere else turns - turns // _MISPLACED
    return found


def magnitude_score_bytes(shapes: Shapes, options: Options) -> Bytes:
    """A float32 copy."""
    found = _model(shapes)
    found.add("scores", _SINGLE * shapes.count, to_host=options.elsewhere)
    if options.elsewhere:
        found.add("temporaries", _SINGLE * shapes.most)
    return found


def wanda_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Forward passes that sum squares of inputs, then scores made in float64, tensor by tensor."""
    found = Bytes() if options.from_disk else _model(shapes)
    _add_sums(found, shapes, options)
    if options.from_disk:
        found.add("activations", waiting_bytes(shapes, options, 1))
    finishing = (shapes.width + 2 * _DOUBLE + _SINGLE) * min(shapes.most, _SCORED)
    squares = 2 * _DOUBLE * options.tokens * _widest(shapes.decoder)
    found.add("temporaries", max(finishing, squares))
    _add_forward(found, shapes, options, loss=False)
    return found


def grasp_bytes(shapes: Shapes, options: Options) -> Bytes:
    """A gradient, a Hessian-vector product, and what that comes from: at least, for its graph is not known."""
    found = _model(shapes)
    found.add("weights", _SINGLE * shapes.narrow)
    found.add("scores", _SINGLE * shapes.count)
    found.add("scores", _SINGLE * shapes.count, to_host=options.elsewhere)
    found.add("gradients", 2 * _SINGLE * shapes.count)
    _add_backward(found, shapes, options, tapped=False)
    found.known = False
    return found


def synflow_bytes(shapes: Shapes, options: Options) -> Bytes:
    """The order of removal, the flow of this round and of the last, and what goes now; of one token."""
    found = _model(shapes)
    found.add("scores", 3 * _SINGLE * shapes.count, to_host=options.elsewhere)
    found.add("mask", 2 * shapes.count, to_host=options.elsewhere)
    found.add("temporaries", _RANKING, to_host=options.elsewhere)
    found.add("temporaries", 3 * _DOUBLE * shapes.most)
    found.known = False
    return found


def hybrid_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Sums of ranks, beside the scores of the criterion that takes the most, one from gradients."""
    found = gradient_score_bytes(shapes, options, weighed=True)
    found.add("scores", _SINGLE * shapes.count, to_host=options.elsewhere)
    found.add("temporaries", _RANKING, to_host=options.elsewhere)
    return found


def early_bird_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Training, and what is kept from check to check."""
    found = _training(shapes, options)
    found.add("mask", options.masks * _KEPT_MASKS[options.criterion] * shapes.mask, to_host=options.elsewhere)
    found.add("temporaries", _PROBE * min(shapes.count, _PROBE_MOST), to_host=options.elsewhere)
    if options.criterion == "rank_correlation":
        found.add("scores", shapes.count, to_host=options.elsewhere)
    return found


def verdict_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Training with a mask held."""
    found = _training(shapes, options)
    found.add("mask", shapes.mask, to_host=options.elsewhere)
    if options.elsewhere:
        found.add("mask", shapes.mask)  # carried over once, and unpacked for one tensor at a time
        found.add("temporaries", shapes.most)
    return found


def iterative_bytes(shapes: Shapes, options: Options) -> Bytes:
    """Training with its mask held, and the rewinding point in memory unless a run's folder has it."""
    found = verdict_bytes(shapes, options)
    # What was pruned ranks below all else, for which weights are copied block by block.
    found.add("temporaries", min(_BLOCKS, shapes.weights))
    if not options.on_disk:
        state = found.device["optimizer"] if options.rewind_later else 0
        found.add("rewind", shapes.weights + state)
    return found


def instability_bytes(shapes: Shapes, options: Options) -> Bytes:
    """The second of two trainings, or the path between their ends, whichever takes more.

    Either way the first one's weights are there, and those that both began with.
    """
    training, path = _training(shapes, options), connectivity_bytes(shapes, options)
    training.add("rewind", training.device["optimizer"])  # as it was where both began
    found = max(training, path, key=lambda one: one.total)
    found.add("rewind", 2 * shapes.weights)
    return found


_WEIGHED = ("taylor", "taylor-squared", "obd", "snip")
_CRITERIA = ("grad_norm", "fisher", "fisher-true", "fisher-batch", *_WEIGHED)
OPERATIONS: dict[str, Operation] = {
    "load": load_bytes,
    "mask": mask_bytes,
    "apply": apply_bytes,
    "quality": quality_bytes,
    "robustness": robustness_bytes,
    "connectivity": connectivity_bytes,
    "magnitude": magnitude_score_bytes,
    **dict.fromkeys(_CRITERIA, gradient_score_bytes),
    **dict.fromkeys(_WEIGHED, partial(gradient_score_bytes, weighed=True)),
    "wanda": wanda_bytes,
    "grasp": grasp_bytes,
    "synflow": synflow_bytes,
    "hybrid": hybrid_bytes,
    "early-bird": early_bird_bytes,
    "iterative": iterative_bytes,
    "verdict": verdict_bytes,
    "instability": instability_bytes,
}
TRAINING = ("early-bird", "iterative", "verdict", "instability")
FROM_GRADIENTS = (*_CRITERIA, "hybrid")


# --- Parts ---


def _model(shapes: Shapes) -> Bytes:
    found = Bytes()
    found.add("weights", shapes.weights)
    return found


def _selecting(shapes: Shapes, options: Options) -> int:
    if not options.use_histogram:
        return _SORTING * shapes.count
    blocks = min(_BLOCKS, shapes.weights) if options.elsewhere else 0
    if shapes.count < _SAMPLE_FROM or options.elsewhere:
        return blocks
    sample = min(shapes.count // _SAMPLE_SHARE, _SAMPLE_MOST)
    between = round(shapes.count * _SIGMAS / math.sqrt(sample))  # at the median, where it is the most
    return 3 * shapes.width * sample + min(_BETWEEN, shapes.width * between)


def _add_sums(found: Bytes, shapes: Shapes, options: Options) -> None:
    """One sum for each weight; in a file the pages of one tensor at a time."""
    if options.store == "device":
        found.add("scores", _SINGLE * shapes.count)
    else:
        held = shapes.most if options.store == "disk" else shapes.count
        found.add("scores", _SINGLE * held, to_host=options.elsewhere)
        if options.elsewhere:
            found.add("temporaries", _SINGLE * shapes.most, to_host=True)


def _magnitudes(found: Bytes, shapes: Shapes, options: Options) -> int:
    """What makes scores of a tensor's means: magnitudes of its weights, in their type and in that of sums."""
    as_the_sums = _SINGLE * shapes.most if shapes.width < _SINGLE else 0
    if options.elsewhere and options.store != "device":
        found.add("temporaries", _SINGLE * shapes.most, to_host=True)
        return shapes.largest
    return shapes.largest + as_the_sums


def _add_forward(found: Bytes, shapes: Shapes, options: Options, *, loss: bool) -> None:
    """A forward pass that keeps nothing: what one block holds, or the logits and chunks of their loss."""
    decoder, width, tokens = shapes.decoder, shapes.width, options.tokens
    if decoder is None:
        _add_traced(found, shapes, options, "forward", loss=loss)
        return
    inside = tokens * width * (2 * decoder.hidden + max(3 * decoder.feed_forward, 6 * decoder.queries))
    at_the_end = 2 * tokens * width * decoder.hidden
    logits = tokens * width * decoder.words
    chunks = _loss_chunks(decoder.words, options) if loss else 0
    if inside > at_the_end + logits + chunks:
        found.add("activations", inside)
        return
    found.add("activations", at_the_end)
    found.add("logits", logits)
    found.add("temporaries", chunks)


def _add_backward(found: Bytes, shapes: Shapes, options: Options, *, tapped: bool) -> None:
    """What is kept for the way back, at its start; activations made again in one block at a time if asked.

    Where gradients are made beside a layer, its input and the gradient of its output are widened to float32.
    """
    decoder, width, tokens = shapes.decoder, shapes.width, options.tokens
    if decoder is None:
        _add_traced(found, shapes, options, "scores", loss=True)
        return
    block = decoder.block(tokens, width)
    widening = _SINGLE * tokens if tapped and width < _SINGLE else 0
    has_head = shapes.most == decoder.words * decoder.hidden
    scratch = max(_loss_chunks(decoder.words, options), widening * (decoder.words + decoder.hidden) * has_head)
    logits = 2 * tokens * width * decoder.words
    at_the_loss = decoder.last_norm(tokens, width) + logits + scratch
    in_a_block = widening * (decoder.feed_forward + decoder.hidden)
    if options.gradient_checkpointing:
        kept, inside = decoder.layers * tokens * width * decoder.hidden, sum(block.values())
    else:
        kept, inside = decoder.layers * block["activations"], block["gradients of activations"]
    found.add("activations", kept)
    if inside + in_a_block > at_the_loss:
        found.add("activations", inside)
        found.add("temporaries", in_a_block)
        return
    found.add("activations", decoder.last_norm(tokens, width))
    found.add("logits", logits)
    found.add("temporaries", scratch)


def _training(shapes: Shapes, options: Options) -> Bytes:
    """The items of `training_bytes`, at the moment at which they are the most."""
    assert shapes.model is not None
    given = training_bytes(
        shapes.model,
        batch_size=options.rows,
        sequence_length=options.sequence_length,
        optimizer=options.optimizer,  # type: ignore[arg-type]
        momentum=options.momentum,
        precision=options.precision,  # type: ignore[arg-type]
        micro_batches=options.rows < options.batch_size,
        checkpointing=options.gradient_checkpointing is not False,
        device=options.device,
    )
    found = Bytes(known=given["activations_known"])
    moments = [dict(given["at_the_loss"]), dict(given["in_a_block"]), dict(given["at_the_embedding"])]
    chunks = 0 if shapes.decoder is None else _loss_chunks(shapes.decoder.words, options)
    if options.elsewhere:
        moments[0]["chunks of the loss"] = chunks
    else:  # small enough for the CPU's heap, which keeps their place for what comes
        found.add("temporaries", chunks)
        for name in ("activations", "gradients of activations"):
            found.add("activations", moments[1].pop(name, 0))
    highest = max(moments, key=lambda one: sum(one.values()))
    for name, count in [*given["throughout"].items(), *highest.items()]:
        found.add(_ITEM_OF[name], count)
    found.add("temporaries", given["update"])
    if shapes.decoder is None:
        _add_traced(found, shapes, options, "training", loss=True)
    return found


def _add_traced(found: Bytes, shapes: Shapes, options: Options, what: Pass, *, loss: bool) -> None:
    """Activations and logits of any architecture, if it can be run without numbers."""
    checkpointing = options.gradient_checkpointing
    if what == "training":
        checkpointing = checkpointing is not False
    peak = None
    if shapes.trace is not None:
        peak = shapes.trace.peak(options.rows, options.sequence_length, what, checkpointing=bool(checkpointing))
    found.known, found.traced = peak is not None, peak is not None
    if peak is None:
        return
    # At the worst moment a gradient is there that is counted already: what is not held until the step.
    gradients = 0 if what == "forward" else found.device["gradients"]
    if options.optimizer.startswith("torch") or options.rows < options.batch_size:
        gradients = min(gradients, shapes.largest)
    found.add("activations", max(0, peak.bytes - gradients))
    if loss:
        found.add("temporaries", _loss_chunks(peak.words, options))


_ITEM_OF = {
    "weights": "weights",
    "optimizer state": "optimizer",
    "compensation": "optimizer",
    "micro-batches": "gradients",
    "gradients": "gradients",
    "activations": "activations",
    "gradients of activations": "activations",
    "last norm": "activations",
    "logits": "logits",
    "gradient of logits": "logits",
    "chunks of the loss": "temporaries",
}


def _loss_chunks(words: int, options: Options) -> int:
    whole = _SINGLE * options.tokens * words
    done = min(-(-whole // _LOSS_CHUNK) - 1, _HELD_BACK_ELSEWHERE if options.elsewhere else _HELD_BACK)
    return (2 + done) * min(_LOSS_CHUNK, whole)


def _widest(decoder: DecoderSizes | None) -> int:
    return 0 if decoder is None else max(decoder.feed_forward, decoder.hidden, decoder.queries)
