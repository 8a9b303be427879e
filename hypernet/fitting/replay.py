"""Steps without Python: a function of tensors that stay in place runs a few times as it is, then as a CUDA graph.

At batch 1 a step of Stable Diffusion is some 4,000 small kernels, and a fast card waits for Python to launch them; a
graph launches them all at once. Captured are addresses, so the function may read and write only tensors that live as
long as it does, draw nothing at random, and wait for nothing: all that changes from call to call is copied into the
tensors before.
"""

import warnings
from collections import deque
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from hypernet.devices import release_memory
from hypernet.errors import first_sentence, is_out_of_memory

WARM_UP = 3  # calls before the capture, in which libraries choose their kernels and the optimiser makes its state
_IN_FLIGHT = 2  # calls that may be queued; more would gain nothing, and progress would run ahead of the work


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all fits: torch keeps workspaces for every stream that was ever used."""
    return torch.cuda.Stream(device)


class Replay:
    """Calls one function again and again, captured where that can be done.

    Attributes:
        graph: once captured.
    """

    def __init__(self, device: torch.device, mode: str = "auto") -> None:
        """Take the device that the function works on.

        Args:
            mode: ``on``, ``off``, or ``auto``: on if ``device`` is CUDA, and off again, with a warning, if it fails.

        Raises:
            ValueError: ``on`` without CUDA.
        """
        if mode == "on" and device.type != "cuda":
            raise ValueError(f"a CUDA graph was asked for on {device}; choose auto or off, or a CUDA device")
        self.device, self.mode = device, mode
        self.graph: torch.cuda.CUDAGraph | None = None
        self._captures = device.type == "cuda" and mode != "off"
        self._result: Tensor | None = None
        self._calls = 0
        self._stream = _side_stream(device) if self._captures else None
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self, function: Callable[[], Tensor]) -> Tensor:
        """Call the function, the same every time, or replay it; its result is a copy, good after the next call too.

        The function is no attribute: what it belongs to would live in a cycle, and the graph's memory with it.
        """
        if self._captures and self.graph is None and self._calls == WARM_UP:
            self._capture(function)
        self._calls += 1
        result = self._run(function).clone()
        if self.device.type == "cuda":
            self._keep_pace()
        return result

    def _run(self, function: Callable[[], Tensor]) -> Tensor:
        if self.graph is not None:
            self.graph.replay()
            assert self._result is not None, "replayed before it was captured"
            return self._result
        if self._stream is None:
            return function()
        # Kernels and gradients remember their stream: the calls before the capture run where it will.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return result

    def _capture(self, function: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer block, for graph() stays on its stream if a capture cannot be ended.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                self._result = function()
        except RuntimeError as failure:
            error = failure.__context__ or failure  # what broke the capture, not that it could not be ended
            if self.mode == "on":
                if is_out_of_memory(error):
                    raise error from None
                raise ValueError(
                    f"the step cannot be captured in a CUDA graph ({first_sentence(error)}); choose auto or off"
                ) from error
            reason = first_sentence(error)
            del error  # it holds the frames of the step, and so its activations, and this frame would hold it
        else:
            self.graph = graph
            return
        del graph
        self._captures, self._result = False, None
        release_memory(self.device)
        warnings.warn(
            f"the step cannot be captured in a CUDA graph ({reason}); it runs kernel by kernel, which takes longer",
            stacklevel=4,
        )

    def _keep_pace(self) -> None:
        self._queued.append(torch.cuda.current_stream(self.device).record_event())
        if len(self._queued) > _IN_FLIGHT:
            self._queued.popleft().synchronize()
