"""Trials: how far the model's predictions move when some of its sites are sparse.

One dense model serves for every trial: pre-hooks hand the linears of a site a sparse input. A trial
on late layers starts there: what the layers before it computed is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.forward_passes import hooked
from nmexport.errors import ModelError
from nmexport.models.swap import swapped
from nmexport.sparsity.linear import InputSite
from nmexport.sparsity.targets import _decoder_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.store.allocation import Choice

    Trials = Mapping[Site, Mapping[Choice, "SparseInput | RoundedSite"]]
    """Trials of each site, by choice."""

# Log-probabilities of the dense model that are kept, all windows together.
_REFERENCE_BYTES = 768 << 20
_AS_THEY_ARE: Mapping[str, nn.Module] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Change that a trial made to the predictions, window by window."""

    kl: tuple[float, ...]
    """Mean KL(dense || sparse) over a window's scored tokens, in nats."""
    nll: tuple[float, ...]
    """Mean rise of the negative log-likelihood of the text's own tokens."""

    @property
    def kl_mean(self) -> float:
        """Over all windows, which are of equal length."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def nll_mean(self) -> float:
        """Over all windows: the logarithm of the perplexity ratio."""
        return math.fsum(self.nll) / len(self.nll)

    @property
    def kl_stderr(self) -> float:
        """Standard error of the mean over windows; 0 for one window."""
        count = len(self.kl)
        if count == 1:
            return 0.0
        squares = math.fsum((value - self.kl_mean) ** 2 for value in self.kl)
        return math.sqrt(squares / (count - 1) / count)


class SparseInput:
    """Makes `nu * kept + eta` of x, which the dense weight then multiplies: the method unfolded.

    Linears that share an input share this tensor too, so that trying a choice on a site changes no
    module: its linears are handed this in place of their input.
    """

    def __init__(self, behaviour: Behaviour, constants: Constants, channels: int) -> None:
        """Prepare the selection.

        Args:
            behaviour: Pattern, per-token corrections, phase.
            constants: Calibrated constants, the same for all linears of the site.
            channels: K.
        """
        self.behaviour, self.constants = behaviour, constants
        self._site = InputSite(behaviour, constants, channels)

    def __call__(self, x: torch.Tensor, *, prompt: int = 0) -> torch.Tensor:
        """Map `[B, S, K]` to the same, in the type of x.

        Args:
            x: Inputs of whole sequences.
            prompt: Tokens of each that count as prefill; the rest as decoded one by one. Where
                the phase is `all` it makes no difference.
        """
        pattern, phase = self.behaviour.pattern, self.behaviour.phase
        if pattern.n == pattern.m:
            return x
        if phase == "all":
            return self._sparsify(x)
        head, tail = x[:, :prompt], x[:, prompt:]
        if phase == "prefill":
            return torch.cat([self._sparsify(head), tail], dim=1)
        return torch.cat([head, self._sparsify(tail)], dim=1)

    def _sparsify(self, x: torch.Tensor) -> torch.Tensor:
        selected = self._site.to(x.device).select(x)
        kept = selected.tokens - selected.eta
        if selected.keep is not None:
            kept = kept * selected.keep
        nu = self.constants.nu if selected.nu is None else selected.nu
        if nu is not None:
            kept = nu * kept
        return (kept + selected.eta).reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, eq=False)
class RoundedSite:
    """The linears of one site with their weights in another form, in place of the model's own."""

    modules: Mapping[str, nn.Module]
    """By name."""


class Probe:
    """The dense model on fixed windows, and trials of changed ones."""

    def __init__(self, model: Any, windows: torch.Tensor, *, prompt: int = 0) -> None:
        """Run the dense model.

        Args:
            model: A Hugging Face causal language model in evaluation mode; left as it is.
            windows: `[W, L]` int64 token ids, L at least 2.
            prompt: Tokens of a window that count as its prompt and are not scored.

        Raises:
            ModelError: if the dense model's predictions are not finite.
        """
        self._model = model
        self._windows = windows
        self._prompt = prompt
        self._device = next(model.parameters()).device
        stack, _ = _decoder_layers(model)
        self._layers: list[nn.Module] = list(model.get_submodule(stack))
        self._start = 0
        self._before: list[Any] = []
        self._resumes = True
        vocabulary = model.config.get_text_config().vocab_size
        self._scored = scored_positions(windows, prompt, vocabulary)
        self._reference = [self._log_probabilities(index) for index in range(len(windows))]
        if not all(bool(values.isfinite().all()) for values in self._reference):
            raise ModelError("The dense model's predictions are not finite.")

    @property
    def tokens(self) -> int:
        """Scored tokens of a trial."""
        return len(self._windows) * len(self._scored)

    def start_at(self, layer: int) -> None:
        """Let trials begin at a decoder layer; nothing before it may be sparse in them.

        Where the model's layers turn out to pass more than their output on, trials keep running
        whole.
        """
        if not self._resumes or layer == self._start:
            return
        before = [self._output_before(layer, index) for index in range(len(self._windows))]
        self._start, self._before = layer, before
        again = self._log_probabilities(0)
        if not torch.allclose(again, self._reference[0], rtol=1e-4, atol=1e-4):
            self._start, self._before, self._resumes = 0, [], False

    def measure(
        self, inputs: Mapping[Site, SparseInput], *, modules: Mapping[str, nn.Module] = _AS_THEY_ARE
    ) -> Movement:
        """Run the model with these sites sparse.

        Args:
            inputs: What their linears are handed.
            modules: In place of the model's own, by name; sites may be among them. With any, the
                whole model runs.

        Raises:
            ValueError: if a site lies before the layer that trials start at.
        """
        if modules:
            self.start_at(0)
        self._check_start(inputs)
        with swapped(self._model, modules), self._sparse(inputs):
            return self._measure_movement()

    def try_site(self, site: Site, trial: SparseInput | RoundedSite) -> Movement:
        """Run the model with one site changed.

        Raises:
            ValueError: if the site lies before the layer that trials start at.
        """
        if isinstance(trial, SparseInput):
            return self.measure({site: trial})
        self._check_start([site])
        with swapped(self._model, trial.modules):
            return self._measure_movement()

    def _check_start(self, sites: Iterable[Site]) -> None:
        if any(site.layer < self._start for site in sites):
            raise ValueError(f"trials start at layer {self._start}")

    def measure_modules(self, modules: Mapping[str, nn.Module]) -> Movement:
        """Run the whole model with these modules in place of its own, by name."""
        return self.measure({}, modules=modules)

    def _measure_movement(self) -> Movement:
        """Compare the model, as it is now, with the dense one on the windows."""
        kl, nll = [], []
        for index, reference in enumerate(self._reference):
            log_probabilities = self._log_probabilities(index)
            kl.append(mean_divergence(reference, log_probabilities))
            nll.append(self._rise(index, reference, log_probabilities))
        return Movement(kl=tuple(kl), nll=tuple(nll))

    def _rise(self, index: int, reference: torch.Tensor, log_probabilities: torch.Tensor) -> float:
        following = self._windows[index, self._scored + 1].to(log_probabilities.device).unsqueeze(1)
        return float(
            (reference.gather(1, following) - log_probabilities.gather(1, following))
            .double()
            .mean()
        )

    def _log_probabilities(self, index: int) -> torch.Tensor:
        """`[scored, V]` float32 of one window."""
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = self._scored.to(self._device)
        ids = self._windows[index : index + 1].to(self._device)
        with torch.inference_mode(), self._start_at(index):
            logits = self._model(input_ids=ids, **options).logits[0]
            if logits.shape[0] != len(self._scored):
                logits = logits[self._scored.to(self._device)]
            return torch.log_softmax(logits.float(), dim=-1)

    @contextlib.contextmanager
    def _sparse(self, inputs: Mapping[Site, SparseInput]) -> Iterator[None]:
        shared = {site: _Shared(windows, self._prompt) for site, windows in inputs.items()}
        with hooked(
            self._watch(name, held) for site, held in shared.items() for name in site.names
        ):
            yield

    def _watch(self, name: str, shared: _Shared) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            return (shared(arguments[0]), *arguments[1:])

        module: nn.Module = self._model.get_submodule(name)
        return module.register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def _start_at(self, index: int) -> Iterator[None]:
        """The layers before the start return what the last of them computed."""
        if not self._start:
            yield
            return
        held = self._before[index]
        with _replace_forward(self._layers[: self._start], lambda *_, **__: held):
            yield

    def _output_before(self, layer: int, index: int) -> Any:
        """Return the output of the previous decoder layer for one window."""
        if layer == 0:
            return None
        outputs: list[Any] = []

        def keep(module: nn.Module, arguments: object, output: Any) -> None:
            del module, arguments
            outputs.append(output)

        with hooked(hook for hook in (self._layers[layer - 1].register_forward_hook(keep),)):
            self._log_probabilities(index)
        return outputs[0]


class _Shared:
    """One site's sparse input, computed once for the linears that are handed the same tensor."""

    def __init__(self, sparse: SparseInput, prompt: int) -> None:
        self._sparse, self._prompt = sparse, prompt
        self._given: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._made is None or x is not self._given:
            self._given, self._made = x, self._sparse(x, prompt=self._prompt)
        return self._made


@contextlib.contextmanager
def _replace_forward(layers: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    """Another `forward` for a while; one that somebody had set on the instance comes back."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = own


def scored_positions(windows: torch.Tensor, prompt: int, vocabulary: int) -> torch.Tensor:
    """Positions whose predictions are compared: all after the prompt, or every k-th of them.

    So many that the dense model's log-probabilities fit in memory.
    """
    count, length = windows.shape
    fitting = max(1, _REFERENCE_BYTES // (4 * vocabulary * count))
    stride = math.ceil((length - 1 - prompt) / fitting)
    return torch.arange(prompt, length - 1, stride)


def mean_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) of log-probabilities `[T, V]`, in nats."""
    total = torch.nn.functional.kl_div(other, reference, log_target=True, reduction="none")
    return max(float(total.sum(dim=-1).double().mean()), 0.0)


def spread_windows(samples: torch.Tensor, count: int, length: int, *, part: int) -> torch.Tensor:
    """Windows from samples spread evenly over all of them: `[count or fewer, length]`.

    Args:
        samples: `[N, L]` token ids; of several domains, one after the other perhaps.
        count: Windows wanted.
        length: Tokens of each; cut from the start of a sample.
        part: 0 or 1: two sets that have no sample in common, where there are two samples.
    """
    mine = samples[part::2] if len(samples) > 1 else samples
    places = torch.linspace(0, len(mine) - 1, min(count, len(mine))).round().long()
    return mine[places, : min(length, samples.shape[1])]


def measure_alone(
    probe: Probe,
    trials: Trials,
    *,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> dict[Site, dict[Choice, Movement]]:
    """Change one site at a time, trial after trial, resumably.

    Args:
        probe: The dense model on its windows.
        trials: What to try, by site, in model order.
        progress: Counts sites.
        checkpoint: Where to go on from and save to, a site at a time.
    """
    sites = sorted(trials, key=lambda site: site.layer)
    done = _restore(sites, trials, checkpoint)
    left = sites[len(done) :]
    for site in progress.track(left, label="fold: trials of sites", total=len(left)):
        probe.start_at(site.layer)
        done.append({choice: probe.try_site(site, one) for choice, one in trials[site].items()})
        if checkpoint is not None:
            checkpoint.save(_tensors(done), {"done": len(done)})
    probe.start_at(0)
    return dict(zip(sites, done, strict=True))


def _tensors(done: Sequence[Mapping[Choice, Movement]]) -> dict[str, torch.Tensor]:
    """Stack the movements of every site that was tried: `[choices, 2, windows]` float64."""
    return {
        str(place): torch.tensor([[m.kl, m.nll] for m in moved.values()], dtype=torch.float64)
        for place, moved in enumerate(done)
        if moved
    }


def _restore(
    sites: Sequence[Site],
    trials: Trials,
    checkpoint: Checkpoint | None,
) -> list[dict[Choice, Movement]]:
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        return []
    tensors, state = saved
    done: list[dict[Choice, Movement]] = []
    for place, site in enumerate(sites[: int(state["done"])]):
        rows = tensors[str(place)].tolist() if trials[site] else []
        done.append(
            {
                choice: Movement(kl=tuple(kl), nll=tuple(nll))
                for choice, (kl, nll) in zip(trials[site], rows, strict=True)
            }
        )
    return done
