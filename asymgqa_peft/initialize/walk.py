"""The walk: one decoder layer at a time, from statistics to groups, shared heads and output refit."""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import get_ident

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter.checks import largest_group
from ..adapter.model import AsymGQAModel
from ..adapter.offload import device_of, in_place
from ..adapter.site import AttentionSite, base_layer
from ..adapter.slots import HeadMix
from ..groups import split_evenly
from ..heads import AttentionWeights, SharedHeads, SharedShape
from ..method.costs import group_costs, head_similarity, pair_costs
from ..method.frequencies import next_eigenvalues, widened_frequencies
from ..method.merge import merge_layer, merge_notes, rules_for
from ..method.norms import divisor_spread
from ..method.refit import OutputRefit
from ..method.search import SearchResult, search_partition
from ..method.statistics import LayerMoments, LayerStatistics, sum_over_ranks
from ..method.threads import use_threads
from .checks import check_finite
from .fit import fit_heads
from .report import InitializationReport
from .streams import Stop, Streams, attention_known, hooks_removed, recording

SEARCHES = 2
"""Layers whose groups are searched at a time beside a GPU: one alone leaves cores idle between its rounds."""

NEGLIGIBLE_SPREAD = 1e-3
"""Relative difference of divisors that needs no note."""

FEW_TOKENS = 32
"""For each number that enters o_proj: below it the refit fits noise. SmolLM2-135M, untrained, one head of 128, times
the base's perplexity: 1.503 at 14, 1.183 at 114, 1.165 at 420."""


@dataclass(frozen=True)
class Choice:
    """What a layer's statistics lead to: groups, how alike heads are before and after, (K, K) each, shared heads.

    Heads that need no statistics are given alone; moments are, on several ranks, until these agree on the rest.
    """

    heads: SharedHeads | None
    found: SearchResult | None = None
    similarity: tuple[Tensor, Tensor] | None = None
    moments: LayerMoments | None = None


@dataclass(frozen=True)
class Study:
    """A layer whose statistics are taken: its weights, and the choice that is being made."""

    weights: AttentionWeights
    choice: Future[Choice]

    @property
    def on_gpu(self) -> bool:
        """Whether the layer runs on a GPU, which leaves the CPU to the searches."""
        return self.weights.output.is_cuda


class Walk:
    """The state of one initialisation."""

    def __init__(self, model: PeftModel, tuner: AsymGQAModel, adapter_name: str, streams: Streams):
        self.model, self.tuner, self.adapter, self.streams = model, tuner, adapter_name, streams
        self.config = tuner.peft_config[adapter_name]
        self.sites = tuner.sites
        self.shape = self.sites[0].shape
        self.shared_shape = self.sites[0].layout(adapter_name).shape
        self.cap = largest_group(self.config, self.shape)
        self.layers = tuner.decoder_layers
        self.ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.seconds: dict[str, float] = defaultdict(float)
        self.search_seconds = 0.0
        self.notes: dict[str, list[int]] = defaultdict(list)
        # Of queries and of keys, by layer; empty where there are no norms.
        self.divisor_spreads: list[tuple[float, float]] = []
        # By layer; empty where no statistics are taken.
        self.found: list[SearchResult] = []
        self.similarities: list[tuple[Tensor, Tensor]] = []
        self._plan()

    def _plan(self) -> None:
        """What the choices need: nothing else is run. Of each stream the last layer that it has to reach, or -1."""
        last, refitted = len(self.sites) - 1, [site.layer for site in self.sites if not self._no_refit(site)]
        is_searched = self.config.grouping in ("symmetric", "asymmetric")
        needs_data = any(rule.needs_data for rule in rules_for(self.config.merge, self.shape))
        self.takes_statistics = is_searched or needs_data or self._has_free_frequencies()
        self.compares_norms = self.shape.norm_span is not None and self.config.merge != "mean"
        self.refitted = refitted
        # Those that are brought near to the original attention output.
        self.aimed = list(range(len(self.sites))) if self.config.fit_steps else refitted
        self.original_end = last if self.takes_statistics else max(self.aimed, default=-1)
        self.converted_end = last if self.compares_norms else max(self.aimed, default=-1)

    @property
    def reads_data(self) -> bool:
        """Whether anything is chosen by what the batches say."""
        return self.original_end >= 0

    def check_tokens(self) -> None:
        """Raise ValueError, on all ranks alike, if a rank has no batch or the data cannot tell the heads apart."""
        tokens = self.tokens = 0
        if not self.reads_data:
            return
        for batch, mask in zip(self.streams.batches, self.streams.masks, strict=True):
            tokens += batch["input_ids"].numel() if mask is None else int(mask.bool().sum())
        counts = torch.tensor([float(bool(self.streams.batches)), float(tokens)], dtype=torch.float64)
        sum_over_ranks([counts])
        ranks, self.tokens = int(counts[0]), int(counts[1])
        if ranks < self.ranks:
            raise ValueError(
                f"batches is empty on {self.ranks - ranks} of {self.ranks} ranks: pass at least one batch of "
                "input_ids on each."
            )
        needed = self.cap * self.shape.head_dim
        if self.tokens < needed:
            raise ValueError(
                f"batches hold {self.tokens} tokens, at least {needed} are needed: a group of up to {self.cap} heads "
                f"has {needed} value dimensions, and fewer tokens make any group look free. Pass more text."
            )
        inputs = self.shape.num_attention_heads * self.shape.head_dim
        if self.refitted and self.tokens < FEW_TOKENS * inputs and _rank() == 0:
            warnings.warn(
                f"batches hold {self.tokens:,} tokens, under {FEW_TOKENS} for each of the {inputs:,} numbers that "
                "enter o_proj: its refit fits noise. Pass more text, or set refit_output=False.",
                stacklevel=3,
            )

    def run(self, progress: bool) -> InitializationReport:
        """Walk all layers; the model holds the result."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.reads_data:
            with self._timed("capture"), self.model.disable_adapter():
                self.streams.capture(self.tuner.model, self.layers, converts=self.converted_end >= 0)
        self._restart_lora()
        self._choose_frequencies()
        bar = tqdm(self.sites, desc="initialising layers", unit="layer", disable=not progress or _rank() != 0)
        with ThreadPoolExecutor(SEARCHES, initializer=use_threads, initargs=(torch.get_num_threads(),)) as beside:
            study = None
            for site in bar:
                # A layer that is offloaded is loaded for its whole turn, not for each batch.
                with in_place(self.layers[site.layer].modules()):
                    study = self._convert(site, study or self._study(site, beside), beside)
                if self.found:
                    found = self.found[-1]
                    bar.set_postfix(cost=f"{found.cost:.4f}", neighbour=f"{found.neighbour_cost:.4f}")
        self.tuner.record_head_groups(self.adapter)
        self.config.initialized = True
        return InitializationReport(
            head_groups=self.config.head_groups,
            grouping=self.config.grouping,
            criterion=self.config.criterion,
            merge=self.config.merge,
            costs=[found.cost for found in self.found],
            neighbour_costs=[found.neighbour_cost for found in self.found],
            similarity_before=[before.tolist() for before, _ in self.similarities],
            similarity_after=[after.tolist() for _, after in self.similarities],
            tokens=self.tokens,
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            search_seconds=round(self.search_seconds, 3),
            peak_memory=peak_memory(),
            notes=[f"layers {_ranges(layers)}: {note}" for note, layers in self.notes.items()] + self._other_notes(),
        )

    def _restart_lora(self) -> None:
        """All LoRA starts anew: what an earlier call or training left would be added to the refit.

        It changes nothing then, so only what is written runs in this walk: that of output projections, which are
        refitted, and of query projections where heads are fitted.
        """
        if not _plain_start(self.config):
            return
        written = [site.output for site in self.sites]
        if self.config.fit_steps:
            written += [site.query for site in self.sites]
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and self.adapter in layer.lora_B:
                _write_lora(layer, self.adapter, None)
                if layer not in written:
                    layer.set_adapter([])

    def _other_notes(self) -> list[str]:
        """What was not measured, or what the norms of shared heads do otherwise than the base's, in a sentence."""
        if not self.takes_statistics:
            return ["no costs and no similarities: groups and heads were chosen without statistics."]
        if not any(max(spreads) > NEGLIGIBLE_SPREAD for spreads in self.divisor_spreads):
            return []
        ranges = []
        for name, spreads in zip(("queries", "keys"), zip(*self.divisor_spreads, strict=True), strict=True):
            ranges.append(f"{name} {min(spreads):.1%} to {max(spreads):.1%}")
        return [
            "the norms of shared heads divide by other amounts than those of their heads (root mean square over "
            f"tokens: {', '.join(ranges)} by layer); training makes up for it."
        ]

    def _has_free_frequencies(self) -> bool:
        """Whether the width leaves open which frequencies some dimensions turn at."""
        return self.shared_shape.head_dim % self.shape.head_dim != 0 and bool(self.shared_shape.frequencies)

    def _choose_frequencies(self) -> None:
        """Give the dimensions of a width that is no multiple of the base's to the frequencies of most energy.

        All layers turn at the same frequencies, so a walk of its own along the original stream collects, at the
        largest multiple, what one more pair of each frequency would keep.
        """
        if not self._has_free_frequencies():
            return
        base, wanted = self.shape, self.shared_shape
        self.shared_shape = SharedShape.of_width(base, wanted.head_dim // base.head_dim * base.head_dim)
        streams = self.streams
        start, energies = list(streams.original), []
        with self._timed("frequencies"):
            for site in self.sites:
                with in_place(self.layers[site.layer].modules()):
                    moments = self._statistics(site).moments(site.weights().output).to("cpu")
                    found, _ = self._search(moments, site.layer)
                    energies.append(next_eigenvalues(moments, found.partition, self.shared_shape))
                    with _as_base(self.layers[site.layer]):
                        self._advance(site.layer, streams.original)
        streams.original = start
        frequencies = widened_frequencies(energies, self.shared_shape, len(wanted.frequencies))
        self.shared_shape = replace(wanted, frequencies=frequencies)

    def _study(self, site: AttentionSite, beside: Executor) -> Study:
        """Take a layer's statistics; what follows from them alone is found on the CPU, `beside` what a GPU does."""
        with _naming(site), in_place(self.layers[site.layer].modules()):
            weights = site.weights()
            check_finite(weights)
            statistics = None
            if self.takes_statistics:
                with self._timed("statistics"):
                    statistics = self._statistics(site)
            study = Study(weights, beside.submit(self._choose, site, statistics, weights))
            if not study.on_gpu:
                # The streams would need the same cores.
                with self._timed("search"):
                    wait([study.choice])
        return study

    def _choose(self, site: AttentionSite, statistics: LayerStatistics | None, weights: AttentionWeights) -> Choice:
        """Groups and shared heads of one layer; on a stream of its own, where waiting stops no other work."""
        shape, merge = self.shared_shape, self.config.merge
        stream = nullcontext()
        if weights.output.is_cuda:
            # A thread begins on the first GPU, where every rank would take up memory.
            torch.cuda.set_device(weights.output.device)
            stream = torch.cuda.stream(_stream_of(get_ident(), weights.output.device))
        with torch.no_grad(), stream:
            if statistics is None:
                choice = Choice(merge_layer(None, weights, site.layout(self.adapter).partition, shape, merge))
            else:
                moments = statistics.moments(weights.output).to("cpu")
                if self.ranks > 1:
                    # Ranks take turns at searching: see `_agreed`.
                    outcome = ()
                    if _rank() == site.layer % self.ranks:
                        outcome = self._search(moments, site.layer)
                    choice = Choice(None, *outcome, moments=moments)
                else:
                    found, similarity = self._search(moments, site.layer)
                    choice = Choice(merge_layer(moments, weights, found.partition, shape, merge), found, similarity)
            if weights.output.is_cuda:
                torch.cuda.current_stream().synchronize()
        return choice

    def _agreed(self, site: AttentionSite, study: Study) -> Choice:
        """What was chosen for a layer; on several ranks what the one whose turn it was has found, merged by each.

        An error of that rank is raised on all: none waits for a result that will not come.
        """
        if self.ranks == 1 or not self.takes_statistics:
            return study.choice.result()
        choice = error = None
        try:
            choice = study.choice.result()
        except Exception as raised:
            error = raised
        outcome = [error if choice is None else (choice.found, choice.similarity)]
        dist.broadcast_object_list(outcome, src=site.layer % self.ranks)
        if isinstance(error or outcome[0], Exception):
            raise error or outcome[0]
        found, similarity = outcome[0]
        heads = merge_layer(choice.moments, study.weights, found.partition, self.shared_shape, self.config.merge)
        return Choice(heads, found, similarity)

    def _convert(self, site: AttentionSite, study: Study, beside: Executor) -> Study | None:
        """Write and refit one layer's shared heads, and go on to the next; its study if that has begun.

        A GPU takes the next layer's statistics before it needs this layer's groups, and refits and advances both
        streams while the next layer's are searched.
        """
        index, streams = site.layer, self.streams
        following = targets = scales = attended = None
        with _naming(site):
            if index in self.aimed:
                with self._timed("targets"):
                    targets, scales = self._targets(site)
            elif index < self.original_end:
                with self._timed("original stream"), _as_base(self.layers[index]):
                    self._advance(index, streams.original)
            if study.on_gpu and site is not self.sites[-1]:
                following = self._study(self.sites[index + 1], beside)
            with self._timed("search"):
                choice = self._agreed(site, study)
            with self._timed("merge"):
                site.write(self.adapter, choice.heads)
                for note in merge_notes(site.shape, self.config.merge):
                    self.notes[note].append(index)
                if self.compares_norms:
                    self.divisor_spreads.append(self._divisor_spreads(site))
            if self.config.fit_steps:
                with self._timed("fit"):
                    self._fit(site, study.weights.output, targets, scales)
            if index in self.refitted:
                with self._timed("refit"):
                    attended = self._refit(site, study.weights.output, targets, scales)
            else:
                self.notes[self._no_refit(site)].append(index)
            if index < self.converted_end:
                with self._timed("converted stream"):
                    self._advance(index, streams.current, attended)
            streams.calls.pop(index, None)
        if choice.found is not None:
            self.found.append(choice.found)
            self.similarities.append(choice.similarity)
        return following

    def _advance(self, index: int, stream: list[Tensor], attended: Callable[[int], Tensor] | None = None) -> None:
        """Advance a stream by one layer; its attention does not run if it is known what enters o_proj, per batch."""
        layer, site = self.layers[index], self.sites[index]
        known = nullcontext()
        if attended is not None:
            # Past the hook that gathers slots: these are gathered.
            known = attention_known(site.attention, lambda: site.output.forward(attended(batch)))
        with in_place(layer.modules()), known:
            for batch, call in self.streams.run_layer(layer, index, stream):
                stream[batch] = self.streams.stored(call())

    def _statistics(self, site: AttentionSite) -> LayerStatistics:
        """The layer's statistics on the original stream; projections run, attention and MLP do not."""
        layer, device, sources = self.layers[site.layer], device_of(site.attention), site.sources()
        statistics = LayerStatistics(site.shape, device)
        with _as_base(layer), recording(sources, stops=True) as record:
            for batch, call in self.streams.run_layer(layer, site.layer, self.streams.original):
                record.clear()
                with suppress(Stop):
                    call()
                if record.keys() != sources.keys():
                    # `recording` says which never ran.
                    break
                statistics.update(**site.heads_of_outputs(record), mask=self.streams.masks[batch])
        statistics.reduce()
        if device.type == "cuda":
            # Another thread goes on with them.
            torch.cuda.current_stream(device).synchronize()
        return statistics

    def _divisor_spreads(self, site: AttentionSite) -> tuple[float, float]:
        """How much the divisors of fitted queries and shared keys differ from their heads' own, on the first batch."""
        rows, sources = [], site.sources()
        for adapter in (None, self.adapter):
            mode = _as_base(self.layers[site.layer]) if adapter is None else nullcontext()
            with mode, recording(sources, stops=True) as record:
                for _, call in self.streams.run_layer(self.layers[site.layer], site.layer, self.streams.current):
                    with suppress(Stop):
                        call()
                    break
            rows.append(site.norm_inputs(record, adapter))
        own, shared = rows
        group_of_key = site.layout(self.adapter).index
        if site.shape.norm_span == "layer":
            group_of_key = torch.zeros(1, dtype=torch.long)
        every_query = torch.arange(own["query_norm"].shape[-2])
        of_queries = divisor_spread(own["query_norm"], shared["query_norm"], every_query)
        of_keys = divisor_spread(own["key_norm"], shared["key_norm"], group_of_key)
        # The mean over ranks, so that all report the same.
        sums = torch.tensor([of_queries, of_keys, 1.0], dtype=torch.float64)
        sum_over_ranks([sums])
        return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()

    def _targets(self, site: AttentionSite) -> tuple[list[Tensor], list[Tensor]]:
        """Advance the original stream by one layer if that is read again; what the refit aims at, times the scale of
        each token's error, and that scale, per batch."""
        streams, bias, targets, scales = self.streams, base_layer(site.output).bias, [], []
        layer, is_end = self.layers[site.layer], site.layer == self.original_end
        with _as_base(layer), recording({"output": site.output}, stops=is_end) as record:
            for batch, call in streams.run_layer(layer, site.layer, streams.original):
                entering = streams.original[batch]
                with suppress(Stop):
                    streams.original[batch] = streams.stored(call())
                target = normed = record["output"]
                if bias is not None:
                    target = target - bias
                if site.family.plain_residual:
                    # o_proj's output is added to the stream, so the refit can make up for what earlier layers lost.
                    entering = entering.to(target.device)
                    normed = normed + entering
                    lost = entering - streams.current[batch].to(target.device)
                    target = target + no_larger(lost, normed)
                scales.append(error_scales(normed))
                targets.append(streams.stored(target * scales[-1].to(target)))
        return targets, scales

    def _search(self, moments: LayerMoments, index: int) -> tuple[SearchResult, tuple[Tensor, Tensor]]:
        """The layer's groups, kept if they need no data and searched otherwise, and how alike heads are.

        On the CPU, in threads.
        """
        start = time.perf_counter()
        config, kv_heads = self.config, self.shape.base_kv_heads
        quick = moments.for_search()
        principal = pairs = pair_costs(quick, "residual", "principal")
        similarity = head_similarity(moments, principal)
        if config.merge == "principal":
            # Only its costs are sums of eigenvalues, which float32 knows well enough.
            moments = quick
        choices = {"criterion": config.criterion, "merge": config.merge}
        costs = partial(group_costs, moments, shape=self.shared_shape, **choices)
        if config.grouping in ("symmetric", "asymmetric"):
            # The principal residual of all pairs is known already.
            if choices != {"criterion": "residual", "merge": "principal"}:
                pairs = pair_costs(moments, **choices)
            found = search_partition(
                costs,
                kv_heads,
                config.num_key_value_heads,
                self.cap,
                symmetric=config.grouping == "symmetric",
                seed=config.seed,
                pair_costs=pairs,
                exact_pairs=self.shared_shape.head_dim == self.shape.head_dim,
            )
        else:
            partition = self.sites[index].layout(self.adapter).partition
            neighbour = split_evenly(range(kv_heads), config.num_key_value_heads)
            cost, neighbour_cost = costs(partition).sum().item(), costs(neighbour).sum().item()
            found = SearchResult(partition, cost, neighbour_cost, evaluations=0)
        self.search_seconds += time.perf_counter() - start
        return found, similarity

    def _fit(self, site: AttentionSite, output_weight: Tensor, targets: list[Tensor], scales: list[Tensor]) -> None:
        """Fit the shared heads to the targets on the converted stream."""
        streams = self.streams
        calls = [call for _, call in streams.run_layer(self.layers[site.layer], site.layer, streams.current)]
        steps, seed = self.config.fit_steps, self.config.seed
        if not fit_heads(site, self.adapter, calls, targets, scales, streams.masks, output_weight, steps, seed):
            self.notes["the steps of fit_steps were taken back: the error did not fall."].append(site.layer)

    def _refit(
        self, site: AttentionSite, output_weight: Tensor, targets: list[Tensor | None], scales: list[Tensor]
    ) -> Callable[[int], Tensor]:
        """Start o_proj's LoRA from the least-squares fit of the targets on the converted stream; uses them up.

        Returns:
            What gives o_proj's inputs of a batch, once each.
        """
        refit = OutputRefit(output_weight)
        layer, streams = self.layers[site.layer], self.streams
        inputs, turn = targets, None

        def collect(_module: nn.Module, args: tuple) -> None:
            # The target is scaled already.
            refit.update(args[0] * scales[batch].to(args[0]), targets[batch], streams.masks[batch])
            # In the place of its target, which is done with.
            inputs[batch] = streams.stored(args[0])
            raise Stop

        output = base_layer(site.output)
        with hooks_removed([output]):
            output.register_forward_pre_hook(collect)
            for batch, call in streams.run_layer(layer, site.layer, streams.current):  # noqa: B007 (read in the hook)
                try:
                    call()
                except Stop:
                    continue
                raise ValueError(f"{site.name} never ran its output projection while refitting.")
        refit.reduce()
        lora = site.output
        rank, scaling = lora.r[self.adapter], lora.scaling[self.adapter]
        factors = refit.low_rank(rank, scaling)
        if self.adapter in site.value.lora_value_mix:
            unmixed = refit.objective(_product(factors, scaling))
            mix = refit.output_mix(site.shape.num_attention_heads)
            # In the place of the sums that are done with: their memory is needed to solve again.
            refit = refit.with_output_mix(mix)
            mixed_factors = refit.low_rank(rank, scaling)
            # Two ridges in a row may end worse than one: take what fits better.
            if refit.objective(_product(mixed_factors, scaling)) < unmixed:
                site.compose_value_mix(self.adapter, mix)
                turn = HeadMix(*mix.shape, device=mix.device, dtype=lora.lora_B[self.adapter].weight.dtype)
                turn.write(mix, site.layout(self.adapter))
                factors = mixed_factors
        _write_lora(lora, self.adapter, factors)

        def attended(batch: int) -> Tensor:
            heads, inputs[batch] = inputs[batch].to(output_weight.device, non_blocking=True), None
            if turn is None:
                return heads
            return turn(heads.unflatten(-1, (site.shape.num_attention_heads, -1))).flatten(-2)

        return attended

    def _no_refit(self, site: AttentionSite) -> str | None:
        if not self.config.refit_output:
            return "no output refit, refit_output is False."
        if not isinstance(site.output, LoraLayer) or self.adapter not in site.output.lora_A:
            return f"no output refit, {site.family.output} has no LoRA: add it to target_modules."
        if not _plain_start(self.config):
            return f"no output refit, init_lora_weights={self.config.init_lora_weights!r} starts LoRA another way."
        return None

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - start


@contextmanager
def _as_base(layer: nn.Module) -> Iterator[None]:
    """The layer computes what it does in the base; PEFT's `disable_adapter` would look through the whole model."""
    wrappers = [m for m in layer.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    try:
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        yield
    finally:
        for wrapper in wrappers:
            wrapper.enable_adapters(True)


@contextmanager
def _naming(site: AttentionSite) -> Iterator[None]:
    """Name the layer in a ValueError that does not name one."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("layer "):
            raise
        raise ValueError(f"layer {site.layer}: {error}") from error


def no_larger(lost: Tensor, state: Tensor) -> Tensor:
    """What a stream has lost (B, T, E), shortened to the length of the token's state (B, T, E) where it is longer.

    A converted model may give massive states to a token that has none in the base, which no attention makes up for: a
    fit that tries spoils all other tokens.
    """
    share = (_lengths(state) / _lengths(lost).clamp_min(1e-30)).clamp_max(1)
    return lost * share.to(lost.dtype)


def error_scales(normed: Tensor) -> Tensor:
    """(B, T, 1) to multiply a token's error by: one over the root mean square of what a norm divides next (B, T, E).

    Behind that norm errors are relative to the token's own state. Without it, the few tokens with states a hundred
    times as large as the rest (massive activations, Sun et al. 2024, arXiv 2402.17762) would decide every fit. A power
    of two, so that activations of 16 bits are scaled without rounding.
    """
    size = _lengths(normed) / normed.shape[-1] ** 0.5
    # 1 for tokens of zeros, which padding may be.
    size = torch.where(size > 0, size, 1.0)
    return torch.exp2(-size.log2().round()).to(normed.dtype)


def _lengths(vectors: Tensor) -> Tensor:
    """(B, T, E) -> (B, T, 1), in float32 at least: squares of large 16-bit states are too large for float16."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype)


@cache
def _stream_of(_thread: int, device: torch.device) -> torch.cuda.Stream:
    """A thread's own stream: always the same one, because only on it memory that was freed there is used again.

    Its small kernels go before those of the layers, many of which would pass between two of them.
    """
    return torch.cuda.Stream(device, priority=-1)


def peak_memory() -> int:
    """Bytes, the highest of a CUDA device, or of the process where none is used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    # Windows has no such module.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _plain_start(config) -> bool:
    """Whether LoRA starts as the identity; PiSSA, LoftQ and the like change the base weight with it."""
    return config.init_lora_weights in (True, False, "gaussian")


def _write_lora(layer: LoraLayer, adapter_name: str, factors: tuple[Tensor, Tensor] | None) -> None:
    """Set LoRA to the given factors A (k, in), B (out, k), k <= r; None is no change to the base."""
    lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    lora_b.zero_()
    if factors is not None:
        rank = len(factors[0])
        lora_a[:rank].copy_(factors[0])
        lora_b[:, :rank].copy_(factors[1])
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    if adapter_name in magnitude:
        # DoRA: its norm has to follow, or it rescales the refit.
        magnitude[adapter_name].update_layer(
            base_layer=layer.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=layer.scaling[adapter_name]
        )


def _product(factors: tuple[Tensor, Tensor], scaling: float) -> Tensor:
    lora_a, lora_b = factors
    return scaling * lora_b @ lora_a
