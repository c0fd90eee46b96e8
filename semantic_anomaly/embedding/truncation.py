"""Take out of a network what no hidden state asked for depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

# (parent, name of the child, the child)
_Place = tuple[nn.Module, str, nn.Module]


def truncate(
    network: nn.Module, run: Callable[[], Sequence[torch.Tensor]], deepest: int
) -> Sequence[str]:
    """Take out the layers that start only after a hidden state is there, in place.

    Which they are is seen in one run, so that no architecture needs a rule of its own. Hidden
    states up to the deepest stay the same bit by bit; where they would not, nothing is taken out.

    Args:
        network: in evaluation mode.
        run: returns all hidden states of the network, of an image that is always the same.
        deepest: last hidden state needed, counted from the front.

    Returns:
        Names of what was taken out, each with all that it contains; empty: nothing.
    """
    expected, traces = _record(network, run)
    # A later layer may return the same memory: the first place that changes nothing is right.
    for end in traces.ends_of(expected[deepest]):
        later = traces.started_after(end)
        places = list(_places(network, later))
        names = {module: name for name, module in network.named_modules()}
        _take_out(places)
        try:
            states = run()
            same = len(states) > deepest and all(
                torch.equal(state, values)
                for state, values in zip(states[: deepest + 1], expected, strict=False)
            )
        # Code of any architecture meets layers that are missing.
        except Exception:
            same = False
        if same:
            return [names[child] for _, _, child in places]
        for parent, name, child in reversed(places):
            parent._modules[name] = child
    return []


class _Skipped(nn.Module):
    """In place of a layer: returns its first argument."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return args[0] if args else next(iter(options.values()))


class _Traces:
    """When each module first starts, and what it returns.

    Attributes:
        starts: number of the event of each module.
        ends: number of the event, and the tensors returned.
    """

    def __init__(self) -> None:
        self.starts: dict[nn.Module, int] = {}
        self.ends: list[tuple[int, list[torch.Tensor]]] = []
        self._count = 0

    def start(self, module: nn.Module, inputs: Any) -> None:
        self._count += 1
        self.starts.setdefault(module, self._count)

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._count += 1
        # Kept alive, so that no later tensor has the same memory.
        self.ends.append((self._count, list(_tensors(output))))

    def ends_of(self, state: torch.Tensor) -> list[int]:
        """Return the events in which a module returned a tensor, or a view of it."""
        memory = state.untyped_storage().data_ptr()
        return [
            event
            for event, tensors in self.ends
            if any(tensor.untyped_storage().data_ptr() == memory for tensor in tensors)
        ]

    def started_after(self, event: int) -> set[nn.Module]:
        """Return the modules with weights that start after an event; others cost next to nothing.

        Poolers without weights stay: the code after them relies on the shape that they return.
        """
        return {
            module
            for module, start in self.starts.items()
            if start > event and any(True for _ in module.parameters())
        }


def _record(
    network: nn.Module, run: Callable[[], Sequence[torch.Tensor]]
) -> tuple[Sequence[torch.Tensor], _Traces]:
    """Return the hidden states of a run, and when each module of the network took part."""
    traces = _Traces()
    hooks = []
    for module in network.modules():
        hooks += [
            module.register_forward_pre_hook(traces.start),
            module.register_forward_hook(traces.end),
        ]
    try:
        return run(), traces
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def _places(module: nn.Module, later: set[nn.Module]) -> Iterator[_Place]:
    """Yield the outermost of the modules to be taken out."""
    for name, child in module.named_children():
        if child in later:
            yield module, name, child
        else:
            yield from _places(child, later)


def _take_out(places: Sequence[_Place]) -> None:
    for parent, name, _ in places:
        if isinstance(parent, nn.ModuleList):
            del parent._modules[name]
        else:
            parent._modules[name] = _Skipped()
