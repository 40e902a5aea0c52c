"""The mask: which weights a ticket keeps, one bit per weight."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from lottery_tickets.errors import MaskError, MaskMismatchError
from lottery_tickets.masks import _bits, _files, _hub, _random
from lottery_tickets.masks._bits import PackedBits
from lottery_tickets.masks._parameters import prunable_parameters
from lottery_tickets.masks._units import METADATA_KEY, Units, units_metadata


class Mask(Mapping[str, torch.Tensor]):
    """Which weights a ticket keeps: an immutable mapping from parameter names to bool tensors.

    True means kept. The bits live packed on the CPU, eight weights a byte; `mask[name]` unpacks one tensor
    for the caller and keeps no reference to it. Counting and set algebra work on the packed bytes.

    Two masks are equal when they speak of the same names and shapes and keep the same weights; the order of
    the names and the metadata are not part of a mask's identity.

    Attributes:
        names: Parameter names, in the order of the model.
        shapes: Name to `torch.Size`.
        metadata: What the ticket's file said of its origin; empty for a mask made in memory.

    Example:
        >>> import torch
        >>> from lottery_tickets import Mask
        >>> mask = Mask.from_tensors({"fc.weight": torch.tensor([[1, 0, 1], [0, 0, 1]])})
        >>> mask["fc.weight"]
        tensor([[ True, False,  True],
                [False, False,  True]])
        >>> mask.numel, mask.kept, mask.sparsity
        (6, 3, 0.5)
        >>> (mask & ~mask).kept
        0

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: the mask m of f(x; m * theta).
    """

    __slots__ = ("_digest", "_metadata", "_packed", "_shapes")

    _digest: str | None
    _metadata: dict[str, str]
    _packed: dict[str, PackedBits]
    _shapes: dict[str, torch.Size]

    def __init__(self) -> None:
        raise TypeError("Make a Mask with Mask.from_tensors, Mask.load or a create_... function.")

    # ---------------------------------------------------------------- making one

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Mask:
        """Pack tensors of decisions.

        Args:
            tensors: Parameter name to a tensor of the parameter's shape: bool, or numbers that are all 0 or 1,
                on any device.

        Returns:
            The mask; it shares no memory with the tensors.

        Raises:
            MaskError: A value other than 0 and 1, a name that is not a string, or a tensor without data.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> Mask.from_tensors({"w": torch.ones(2, 3)}).sparsity
            0.0
        """
        if not isinstance(tensors, Mapping):
            raise MaskError(
                f"Expected a Mask or a dict of tensors by parameter name, got {type(tensors).__name__}. "
                "A file is read by Mask.load(path)."
            )
        packed = {}
        shapes = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise MaskError(f"Mask names are strings; got {name!r} of type {type(name).__name__}.")
            decisions = _as_decisions(name, tensor)
            packed[name] = _bits.pack(decisions)
            shapes[name] = decisions.shape
        return cls.from_packed(packed, shapes)

    @classmethod
    def from_packed(
        cls,
        packed: Mapping[str, PackedBits],
        shapes: Mapping[str, torch.Size],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> Mask:
        """Take over packed bits: contiguous arrays are not copied, and become read-only.

        Args:
            packed: Name to `ceil(numel / 8)` bytes, the first weight in the lowest bit, bits beyond the last
                weight zero.
            shapes: Name to the parameter's shape, for the same names.
            metadata: Text to carry along, such as where the ticket came from.

        Raises:
            MaskError: Names, lengths or types that do not fit, or bits beyond the last weight.

        Example:
            >>> import numpy as np, torch
            >>> from lottery_tickets import Mask
            >>> Mask.from_packed({"w": np.array([5], np.uint8)}, {"w": torch.Size([3])})["w"]
            tensor([ True, False,  True])
        """
        if packed.keys() != shapes.keys():
            raise MaskError(
                f"Packed bits and shapes name different tensors: {sorted(packed.keys() ^ shapes.keys())}."
            )
        for name, shape in shapes.items():
            _check_packed(name, packed[name], torch.Size(shape))
        mask = object.__new__(cls)
        mask._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        mask._packed = {name: np.ascontiguousarray(packed[name]) for name in shapes}
        mask._metadata = dict(metadata or {})
        mask._digest = None
        for array in mask._packed.values():
            array.setflags(write=False)
        return mask

    @classmethod
    def ones_like(cls, model: nn.Module | Mapping[str, torch.Tensor]) -> Mask:
        """Mask that keeps everything.

        Args:
            model: A model, for its prunable parameters, or any mapping from names to tensors or a mask, for
                its names and shapes.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> Mask.ones_like(torch.nn.Linear(3, 2))
            Mask(1 tensors, 6 weights, 6 kept, sparsity 0.0000)
        """
        shapes = model._shapes if isinstance(model, Mask) else _shapes_of(model)
        packed = {}
        for name, shape in shapes.items():
            packed[name] = np.full(_bits.packed_size(shape.numel()), 0xFF, np.uint8)
            _bits.clear_bits_beyond(packed[name], shape.numel())
        return cls.from_packed(packed, shapes)

    @classmethod
    def random_like(cls, mask: Mapping[str, torch.Tensor], seed: int, per_layer: bool = True) -> Mask:
        """Uniformly random mask that keeps exactly as many weights: the control of a ticket.

        Of a mask of whole units (`units`) it is whole units again, as many of each layer, if `per_layer`.

        Every choice of that many weights is equally likely. The stream is Philox, keyed by the seed, so the
        same seed gives the same bits on every machine.

        Args:
            mask: The mask to imitate.
            seed: Non-negative integer.
            per_layer: Keep as many weights as the mask in each tensor ("shuffled within layers"); if False,
                only the total is imitated.

        Raises:
            ValueError: A negative seed.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> mask = Mask.from_tensors({"a": torch.ones(8), "b": torch.zeros(8)})
            >>> Mask.random_like(mask, seed=0).layer_sparsity()
            {'a': 0.0, 'b': 1.0}
            >>> Mask.random_like(mask, seed=0, per_layer=False).kept
            8

        References:
            Frankle et al., "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?",
            ICLR 2021, section 5: random shuffling within layers as an ablation.
        """
        model = as_mask(mask)
        if per_layer and model.units is not None:
            return model._random_units(model.units, seed)
        kept = model.layer_kept()
        # Sorted, because equal masks may list their names in different orders.
        streams = {name: stream for stream, name in enumerate(sorted(kept))}
        groups = [[name] for name in streams] if per_layer else [list(streams)]
        packed: dict[str, PackedBits] = {}
        for group in groups:
            bits = _random.random_bits(
                [model._shapes[name].numel() for name in group],
                sum(kept[name] for name in group),
                seed=seed,
                streams=[streams[name] for name in group],
            )
            packed.update(zip(group, bits, strict=True))
        return cls.from_packed(packed, model._shapes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a ticket file and check every byte of it.

        Args:
            path: A file written by `save`.

        Returns:
            The mask, with the file's metadata in `metadata`.

        Raises:
            MaskFileError: A file that is truncated, of another format or version, without metadata, with
                shapes or bits that do not fit, or with a wrong digest; the message says which.
            FileNotFoundError: No such file.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> mask = Mask.from_tensors({"w": torch.tensor([True, False])})
            >>> mask.save("ticket.safetensors", metadata={"criterion": "magnitude"})
            >>> Mask.load("ticket.safetensors") == mask
            True
            >>> Mask.load("ticket.safetensors").metadata["criterion"]
            'magnitude'
        """
        packed, shapes, metadata, digest = _files.read(path)
        mask = cls.from_packed(packed, shapes, metadata=metadata)
        _files.check_digest(path, expected=digest, found=mask.digest())
        return mask

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Mask:
        """Read the ticket of a repository on the Hugging Face hub, downloaded once, and check every byte of it.

        Args:
            name: "owner/name" of the repository, or a folder that holds a `ticket.safetensors`.
            revision: Branch, tag or commit; None for the main branch.
            token: Of the hub; None for the one that `hf auth login` has stored.
            cache_dir: Where downloads are kept; None for the hub's cache.
            local_files_only: Take it from the cache, and do not ask the hub.

        Raises:
            HubError: No such repository, revision or file, or no way to the hub.
            MaskFileError: As `load`.
            MissingExtraError: huggingface_hub is not installed.

        Example:
            >>> import torch
            >>> from pathlib import Path
            >>> from lottery_tickets import Mask
            >>> Path("my-ticket").mkdir()
            >>> Mask.ones_like(torch.nn.Linear(2, 2)).save("my-ticket/ticket.safetensors")
            >>> Mask.from_pretrained("my-ticket").kept
            4
        """
        path = _hub.fetch(
            name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls.load(path)

    def _random_units(self, units: Units, seed: int) -> Mask:
        chosen = {}
        for stream, (name, kept) in enumerate(units.kept_in(self).items()):
            bits = _random.random_bits([kept.size], int(kept.sum()), seed=seed, streams=[stream])
            chosen[name] = _bits.unpack(bits[0], torch.Size([kept.size])).numpy()
        return Mask.from_packed(units.packed(chosen, self._shapes), self._shapes, metadata=units_metadata(units))

    # ---------------------------------------------------------------- a mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return _bits.unpack(self._packed[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._shapes == other._shapes and all(
            np.array_equal(bits, other._packed[name]) for name, bits in self._packed.items()
        )

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)

    def __repr__(self) -> str:
        return f"Mask({len(self)} tensors, {self.numel} weights, {self.kept} kept, sparsity {self.sparsity:.4f})"

    def __reduce__(self) -> tuple[Callable[..., Mask], tuple[Any, ...]]:
        return _rebuild, (self._packed, self._shapes, self._metadata)

    # ---------------------------------------------------------------- looking at it

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the order of the model."""
        return tuple(self._shapes)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Name to shape."""
        return MappingProxyType(self._shapes)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file said of the ticket's origin."""
        return MappingProxyType(self._metadata)

    @property
    def units(self) -> Units | None:
        """The channels, heads or neurons that the mask removes or keeps whole; None if it is of single weights."""
        text = self._metadata.get(METADATA_KEY)
        return None if text is None else Units.from_json(text)

    @property
    def numel(self) -> int:
        """Number of weights the mask decides on."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(self.layer_kept().values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed; 0.0 for a mask over nothing."""
        return sparsity_of(self.kept, self.numel)

    def packed(self, name: str) -> PackedBits:
        """The bits of one tensor, as read-only bytes: `ceil(numel / 8)`, the first weight in the lowest bit."""
        return self._packed[name]

    def layer_numel(self) -> dict[str, int]:
        """Number of weights per tensor."""
        return {name: shape.numel() for name, shape in self._shapes.items()}

    def layer_kept(self) -> dict[str, int]:
        """Number of weights kept per tensor."""
        return {name: _bits.count(bits) for name, bits in self._packed.items()}

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction removed per tensor; 0.0 for an empty tensor.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> Mask.from_tensors({"a": torch.tensor([1, 0, 0, 0]), "b": torch.ones(2)}).layer_sparsity()
            {'a': 0.75, 'b': 0.0}
        """
        kept = self.layer_kept()
        return {name: sparsity_of(kept[name], numel) for name, numel in self.layer_numel().items()}

    def digest(self) -> str:
        """The ticket's identity: sha256 over names, shapes and bits, in the order of the sorted names.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> Mask.from_tensors({"w": torch.tensor([True, False])}).digest()[:16]
            'd52a1236404e4d2d'
        """
        if self._digest is None:
            self._digest = digest_of(
                (name, self._shapes[name], self._packed[name]) for name in sorted(self._shapes)
            )
        return self._digest

    # ---------------------------------------------------------------- algebra

    def __and__(self, other: Mapping[str, torch.Tensor]) -> Mask:
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: Mapping[str, torch.Tensor]) -> Mask:
        return self._combine(other, np.bitwise_or)

    def __invert__(self) -> Mask:
        packed = {name: ~bits for name, bits in self._packed.items()}
        for name, bits in packed.items():
            _bits.clear_bits_beyond(bits, self._shapes[name].numel())
        return Mask.from_packed(packed, self._shapes)

    def intersect_count(self, other: Mapping[str, torch.Tensor]) -> int:
        """Number of weights that both masks keep.

        Raises:
            MaskMismatchError: The masks do not speak of the same tensors.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> a = Mask.from_tensors({"w": torch.tensor([1, 1, 0])})
            >>> a.intersect_count({"w": torch.tensor([0, 1, 1])})
            1
        """
        peer = self._peer(other)
        return sum(_bits.count_common(bits, peer._packed[name]) for name, bits in self._packed.items())

    def _combine(self, other: Mapping[str, torch.Tensor], operation: np.ufunc) -> Mask:
        peer = self._peer(other)
        packed = {name: operation(bits, peer._packed[name]) for name, bits in self._packed.items()}
        return Mask.from_packed(packed, self._shapes)

    def _peer(self, other: Mapping[str, torch.Tensor]) -> Mask:
        peer = as_mask(other)
        if self._shapes == peer._shapes:
            return peer
        unshared = sorted(self._shapes.keys() ^ peer._shapes.keys())
        reshaped = sorted(
            f"{name} {tuple(shape)} against {tuple(peer._shapes[name])}"
            for name, shape in self._shapes.items()
            if name in peer and peer._shapes[name] != shape
        )
        raise MaskMismatchError(
            "Two masks are combined tensor by tensor, so both must name the same tensors with the same shapes; "
            f"only in one: {unshared or 'none'}; shapes differ: {reshaped or 'none'}. "
            "compute_ticket_overlap compares masks that agree only in part."
        )

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the ticket: one safetensors file, packed bits and metadata, no pickle.

        The file appears whole or not at all: it is written under a temporary name, synced and renamed.

        Args:
            path: Where to; an existing file is replaced.
            metadata: Text to add to what the mask carries, such as the criterion, the seed or the base
                model's name. Shapes, sparsity, digest, format and library version are always written.

        Raises:
            MaskFileError: A metadata key that the format uses itself, or a value that is not text.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> mask = Mask.ones_like(torch.nn.Linear(4, 4))
            >>> mask.save("dense.safetensors", metadata={"base_model": "my-model", "seed": "0"})
        """
        _files.write(
            path,
            self._packed,
            self._shapes,
            metadata={**self._metadata, **(metadata or {})},
            digest=self.digest(),
            kept=self.kept,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metadata: Mapping[str, str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "A lottery ticket",
        create_pr: bool = False,
    ) -> str:
        """Upload the ticket to a repository of the Hugging Face hub, made if it is not there.

        One commit takes `ticket.safetensors` and a card (README.md) made of the metadata: sparsity, origin, and
        how much each layer keeps. A card that was not made so, a model's own for instance, is left as it is.

        Args:
            repo_id: "owner/name".
            metadata: Text to add to what the mask carries; "base_model", a hub id, links to that model.
            private: Of a new repository; None for the owner's default.
            revision: Branch to commit to; None for the main one.
            token: Of the hub; None for the one that `hf auth login` has stored.
            commit_message: Of the commit.
            create_pr: Open a pull request with the commit instead.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            HubError: The hub refuses, or there is no way to it.
            MaskFileError: As `save`.
            MissingExtraError: huggingface_hub is not installed.

        Example:
            >>> import torch
            >>> from lottery_tickets import Mask
            >>> mask = Mask.ones_like(torch.nn.Linear(4, 4))
            >>> mask.push_to_hub("me/my-ticket", metadata={"base_model": "me/my-model"})  # doctest: +SKIP
            'https://huggingface.co/me/my-ticket/commit/...'
        """
        return _hub.push(
            self,
            repo_id,
            metadata=metadata,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def as_mask(mask: Mapping[str, torch.Tensor]) -> Mask:
    """A mask as it is, a plain dict of tensors packed.

    Raises:
        MaskError: Neither a mask nor a mapping from names to tensors of 0 and 1.

    Example:
        >>> import torch
        >>> from lottery_tickets.masks import as_mask
        >>> as_mask({"w": torch.tensor([True, False])}).kept
        1
    """
    if getattr(mask, "is_part", False):
        raise MaskError(
            "This is a rank's part of a sharded mask, and a whole one is needed: mask.gathered() makes it, on all "
            "ranks together."
        )
    return mask if isinstance(mask, Mask) else Mask.from_tensors(mask)


def digest_of(tensors: Iterable[tuple[str, torch.Size, PackedBits]]) -> str:
    """The digest of a mask, from its names in sorted order, shapes and bits."""
    state = hashlib.sha256()
    for name, shape, bits in tensors:
        # JSON frames name and shape unambiguously; the length of the bits follows from the shape.
        state.update(json.dumps([name, list(shape)]).encode())
        state.update(bits.data)
    return state.hexdigest()


def _rebuild(packed: dict[str, PackedBits], shapes: dict[str, torch.Size], metadata: dict[str, str]) -> Mask:
    return Mask.from_packed(packed, shapes, metadata=metadata)


def sparsity_of(kept: int, numel: int) -> float:
    """Fraction removed; 0.0 of nothing."""
    return (numel - kept) / numel if numel else 0.0


def _shapes_of(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    tensors = prunable_parameters(model) if isinstance(model, nn.Module) else model
    return {name: tensor.shape for name, tensor in tensors.items()}


def _as_decisions(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise MaskError(f"{name}: expected a tensor of 0 and 1, got {type(tensor).__name__}.")
    if tensor.is_meta:
        raise MaskError(f"{name}: a tensor on the meta device holds no decisions; give one with data.")
    if tensor.layout != torch.strided:
        raise MaskError(f"{name}: expected a dense tensor, got layout {tensor.layout}; pass tensor.to_dense().")
    tensor = tensor.detach()
    if tensor.dtype == torch.bool:
        return tensor.cpu()
    decisions = tensor != 0
    strange = decisions & (tensor != 1)
    if bool(strange.any()):
        value = tensor[strange].flatten()[0].item()
        raise MaskError(
            f"{name}: a mask holds only 0 and 1 (or bool), found {value}. "
            "Scores become a mask by selection; see create_magnitude_mask."
        )
    return decisions.cpu()


def _check_packed(name: str, packed: Any, shape: torch.Size) -> None:
    size = _bits.packed_size(math.prod(shape))
    if not isinstance(packed, np.ndarray) or packed.dtype != np.uint8 or packed.shape != (size,):
        found = f"{packed.dtype} {packed.shape}" if isinstance(packed, np.ndarray) else type(packed).__name__
        raise MaskError(f"{name}: shape {tuple(shape)} takes {size} bytes of packed bits, got {found}.")
    if _bits.has_bits_beyond(packed, shape.numel()):
        raise MaskError(f"{name}: bits are set beyond the last of its {shape.numel()} weights.")
