"""Calibration batches and their hidden states, which walk through a model one decoder layer at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..adapter.offload import device_of, in_place
from ..estimates import free_memory, streams_kept, streams_on_gpu


class Stop(Exception):
    """Leaves a forward pass from a hook once it has done what it was run for."""


class Streams:
    """Calibration batches and their hidden states, in one place between layers.

    ``calls[layer][batch]`` holds the arguments besides hidden states that the model calls a layer with. They do not
    depend on the hidden states, and layers share them.
    """

    def __init__(self, batches: list[dict[str, Tensor]]):
        self.batches = batches
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.calls: dict[int, list[tuple[tuple, dict]]] = defaultdict(list)
        self.original: list[Tensor] = []
        self.current: list[Tensor] = []
        self.storage = torch.device("cpu")

    def add(self, batches: list[Tensor]) -> None:
        """More batches, of tokens (B, T) that all count."""
        for ids in batches:
            self.batches.append({"input_ids": ids})
            self.masks.append(None)

    def capture(self, model: nn.Module, layers: list[nn.Module], converts: bool) -> None:
        """Run every batch through the original model, up to its last layer: the first one in full, which tells what
        layers return, and the others past the layers, since only the arguments of the layers are wanted.

        The stream of the converted model begins as well if something ``converts``.
        """

        def keep(index: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self.calls[index].append((args[1:], rest))
            if index == 0:
                if not self.original:
                    tokens = sum(batch["input_ids"].numel() for batch in self.batches)
                    self.storage = _storage_of_streams(hidden, tokens * streams_kept(converts))
                self.original.append(self.stored(hidden))
            # The last layer's arguments are kept: nothing more is wanted of this forward.
            if index == len(layers) - 1:
                raise Stop

        embeddings = model.get_input_embeddings()
        device = device_of(embeddings)
        with in_place([embeddings]), hooks_removed(layers), _passing_by(layers):
            for index, layer in enumerate(layers):
                layer.register_forward_pre_hook(partial(keep, index), with_kwargs=True)
            for batch in self.batches:
                inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
                try:
                    model(**inputs, use_cache=False)
                except Stop:
                    continue
                raise ValueError("the model's forward does not run all of its attention layers: it is not supported.")
        if converts:
            self.current = list(self.original)

    def stored(self, hidden: Tensor) -> Tensor:
        """Hidden states where they lie between layers."""
        if hidden.is_cuda and self.storage.type == "cpu":
            # A GPU copies to and from pinned memory several times as fast.
            return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
        return hidden.to(self.storage)

    def run_layer(
        self, layer: nn.Module, index: int, stream: list[Tensor]
    ) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """For each batch, a call that runs the layer on the stream's hidden states."""
        device = device_of(layer)

        def call(batch: int) -> Tensor:
            args, kwargs = self.calls[index][batch]
            output = layer(stream[batch].to(device, non_blocking=True), *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        for batch in range(len(stream)):
            yield batch, partial(call, batch)


@contextmanager
def _passing_by(layers: list[nn.Module]) -> Iterator[None]:
    """Layers run once, which tells what they return beside hidden states; from then on those pass unchanged."""

    def passing(forward: Callable, seen: list, *args, **kwargs):
        if not seen:
            seen.append(forward(*args, **kwargs))
            return seen[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *seen[0][1:]) if isinstance(seen[0], tuple) else hidden

    with ExitStack() as restored:
        for layer in layers:
            _put_forward_back(restored, layer)
            layer.forward = partial(passing, layer.forward, [])
        yield


@contextmanager
def attention_known(attention: nn.Module, output: Callable[[], Tensor]) -> Iterator[None]:
    """The attention does not run: it returns what `output` gives, and None for the weights, which no layer reads."""
    with ExitStack() as restored:
        _put_forward_back(restored, attention)
        attention.forward = lambda *args, **kwargs: (output(), None)
        yield


def _put_forward_back(restored: ExitStack, module: nn.Module) -> None:
    """At the end a module's forward is what it is now."""
    own = vars(module).get("forward")  # accelerate's, on a model spread over devices
    if own is not None:
        restored.callback(setattr, module, "forward", own)
    restored.callback(vars(module).pop, "forward", None)


def _storage_of_streams(hidden: Tensor, tokens: int) -> torch.device:
    """Where hidden states of so many tokens lie between layers: on their GPU if they take half of what is free."""
    if not hidden.is_cuda:
        return torch.device("cpu")
    needed = tokens * hidden.shape[-1] * hidden.itemsize
    return hidden.device if streams_on_gpu(needed, free_memory(hidden.device)) else torch.device("cpu")


@contextmanager
def hooks_removed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever forward hooks modules get inside are gone at the end, also one whose registration is interrupted."""
    with ExitStack() as restored:
        for module in modules:
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                restored.callback(hooks.update, dict(hooks))
                restored.callback(hooks.clear)
        yield


@contextmanager
def recording(
    outputs: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module] | None = None, stops: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Hooks that keep each module's latest output (or first input) under its name; always removed at the end.

    Args:
        outputs: name -> module whose output to keep.
        inputs: name -> module whose first positional input to keep.
        stops: leave the forward, by `Stop`, once all are kept, whatever their order.

    Raises:
        ValueError: on a clean exit, if a module never ran: what was meant to be measured was not.
    """
    record: dict[str, Tensor] = {}
    inputs = inputs or {}
    names = {*outputs, *inputs}

    def keep(name: str, _module: nn.Module, args: tuple, *output: Tensor) -> None:
        record[name] = output[0] if output else args[0]
        if stops and record.keys() == names:
            raise Stop

    with hooks_removed([*outputs.values(), *inputs.values()]):
        for name, module in outputs.items():
            module.register_forward_hook(partial(keep, name))
        for name, module in inputs.items():
            module.register_forward_pre_hook(partial(keep, name))
        yield record
    if silent := sorted(names - record.keys()):
        raise ValueError(
            f"{', '.join(silent)} never ran while calibrating: the model's forward does not call it. "
            "Check that the batches reach this layer and that the adapter wraps the modules the model uses."
        )
