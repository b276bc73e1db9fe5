"""Initialise an adapter from activations: one walk through the model, a decoder layer at a time, no gradient step."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import written_beside
from .groups import HeadGroups, Partition, default_max_group_size, split_evenly
from .layers import SharedQKV, mean_over_groups
from .merge import AttentionWeights, MergedLayer, group_costs, head_similarity, merge_layer, pair_costs
from .refit import OutputRefit
from .search import search_partition
from .sites import AttentionSite, attention_sites, evaluating
from .statistics import LayerMoments, LayerStatistics, recording, sum_over_ranks
from .streams import Stop, Streams, checked_batches, mask_of
from .tuner import AsymGQAModel

Matrix = list[list[float]]


@dataclass(frozen=True)
class InitializationReport:
    """What `initialize_asymgqa_weights` found and did.

    Attributes:
        head_groups: groups of base KV heads, per layer.
        grouping, criterion, merge: the adapter's choices.
        costs: summed cost of the groups, per layer, in the unit of `asymgqa_peft.merge.group_costs`.
        neighbour_costs: the same of contiguous groups.
        similarity_before: per layer (K, K), mean cosine of two heads' keys and values as they are.
        similarity_after: per layer (K, K), how alike two heads are in the best bases; 1 is lossless sharing.
        tokens: tokens read, on all ranks, padding excluded.
        seconds: wall time per stage. A search uses the CPU: on a GPU it runs beside the stages before it,
            "converted stream" and "targets", and "search" is what had to be waited for.
        search_seconds: what all searches took, waited for or not.
        peak_memory: bytes, the highest of a CUDA device, or of the process where none is used.
        notes: what could not be done, in sentences.
    """

    head_groups: list[list[list[int]]]
    grouping: str
    criterion: str
    merge: str
    costs: list[float]
    neighbour_costs: list[float]
    similarity_before: list[Matrix]
    similarity_after: list[Matrix]
    tokens: int
    seconds: dict[str, float]
    search_seconds: float
    peak_memory: int
    notes: list[str]

    def save(self, path: str | Path) -> None:
        """Write JSON, and the folder it goes to if need be; a reader never sees half a file."""
        with written_beside(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> InitializationReport:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is no InitializationReport ({error}): pass a file its save() wrote."
            ) from error


@torch.no_grad()
def initialize_asymgqa_weights(
    model: PeftModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    adapter_name: str | None = None,
    progress: bool = True,
) -> InitializationReport:
    """Choose groups, merge K and V, and refit the output projection, from calibration data.

    The model is walked as GPTQ walks it. Two streams of hidden states run through it, the original model's and the
    converted one's; at each layer, statistics of the original give groups and shared heads, and o_proj's LoRA starts
    from the change that best reproduces the original attention output on the converted stream. Both streams and one
    layer's targets (3 x tokens x hidden size) lie on the GPU where they take at most half of what is free there, in
    main memory otherwise; one batch and one layer's sums lie on the layer's device. Small eigenproblems run on the
    CPU, in as many threads as torch may use. All LoRA of the adapter starts anew: a second call initialises again.
    Under grouping="neighbour" or "random" the adapter's groups, given ones included, are kept; otherwise searched.

    With several ranks each passes its own batches; sums are reduced, so that all end with the same groups and weights.

    Args:
        model: from `get_peft_model` with an `AsymGQAConfig`.
        batches: dicts with input_ids (B, T) and optionally attention_mask, or LongTensors (B, T). A few ten thousand
            tokens of text like that of later use are plenty.
        adapter_name: which adapter; default the active one.
        progress: show a progress bar over layers.

    Raises:
        ValueError: for an unfit model or batches, too few tokens, or NaN and inf, with the layer. After any error or
            an interrupt the model is as it was before.
    """
    tuner, adapter_name = _checked_model(model, adapter_name)
    streams = Streams(checked_batches(batches))
    walk = _Walk(model, tuner, adapter_name, streams)
    walk.check_tokens()
    with evaluating(model), _all_or_nothing(model, tuner, adapter_name):
        model.set_adapter(adapter_name)
        return walk.run(progress)


# -------------------------------------------------------------------------------------------------- the walk


class _Walk:
    """The state of one initialisation."""

    def __init__(self, model: PeftModel, tuner: AsymGQAModel, adapter_name: str, streams: Streams):
        self.model, self.tuner, self.adapter, self.streams = model, tuner, adapter_name, streams
        self.config = tuner.peft_config[adapter_name]
        self.sites = attention_sites(model)
        self.shape = self.sites[0].shape
        self.cap = self.config.max_group_size or default_max_group_size(
            self.shape.num_attention_heads, self.shape.base_kv_heads, self.config.num_key_value_heads
        )
        self.layers = [tuner.model.get_submodule(site.name.rpartition(".")[0]) for site in self.sites]
        self.seconds: dict[str, float] = defaultdict(float)
        self.search_seconds = 0.0
        self.notes: dict[str, list[int]] = defaultdict(list)

    def check_tokens(self) -> None:
        """Raise ValueError, on all ranks alike, if a rank has no batch or the data cannot tell the heads apart."""
        tokens = sum(int(mask_of(batch).sum()) for batch in self.streams.batches)
        counts = torch.tensor([float(bool(self.streams.batches)), float(tokens)], dtype=torch.float64)
        sum_over_ranks([counts])
        ranks, self.tokens = int(counts[0]), int(counts[1])
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks < world:
            raise ValueError(
                f"batches is empty on {world - ranks} of {world} ranks: pass at least one batch of input_ids on each."
            )
        needed = self.cap * self.shape.head_dim
        if self.tokens < needed:
            raise ValueError(
                f"batches hold {self.tokens} tokens, at least {needed} are needed: a group of up to {self.cap} heads "
                f"has {needed} value dimensions, and fewer tokens make any group look free. Pass more text."
            )

    def run(self, progress: bool) -> InitializationReport:
        """Walk all layers; the model holds the result."""
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        with self._timed("capture"), self.model.disable_adapter():
            self.streams.capture(self.tuner.model, self.layers)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and self.adapter in layer.lora_B and _plain_start(self.config):
                _write_lora(layer, self.adapter, None)
        partitions, costs, neighbour_costs, similarities = [], [], [], []
        bar = tqdm(self.sites, desc="initialising layers", unit="layer", disable=not progress or _rank() != 0)
        for site in bar:
            partition, cost, neighbour_cost, similarity = self._layer(site)
            partitions.append(partition)
            costs.append(cost)
            neighbour_costs.append(neighbour_cost)
            similarities.append([matrix.tolist() for matrix in similarity])
            bar.set_postfix(cost=f"{cost:.4f}", neighbour=f"{neighbour_cost:.4f}")
        groups = HeadGroups(tuple(partitions), self.shape.base_kv_heads)
        self.config.head_groups = groups.to_lists()
        return InitializationReport(
            head_groups=groups.to_lists(),
            grouping=self.config.grouping,
            criterion=self.config.criterion,
            merge=self.config.merge,
            costs=costs,
            neighbour_costs=neighbour_costs,
            similarity_before=[before for before, _ in similarities],
            similarity_after=[after for _, after in similarities],
            tokens=self.tokens,
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            search_seconds=round(self.search_seconds, 3),
            peak_memory=_peak_memory(),
            notes=[f"layers {_ranges(layers)}: {note}" for note, layers in self.notes.items()],
        )

    def _layer(self, site: AttentionSite) -> tuple[Partition, float, float, tuple[Tensor, Tensor]]:
        index = site.layer
        try:
            weights = AttentionWeights(**site.weights())
            _check_finite(weights)
            with self._timed("statistics"):
                moments = self._moments(site, weights)
            found, targets = self._groups_and_targets(site, moments, on_gpu=weights.output.is_cuda)
            partition, cost, neighbour_cost, similarity = found
            with self._timed("merge"):
                merged = merge_layer(moments, weights, partition, site.shape, self.config.merge)
                self._write(site, partition, merged)
            del moments
            with self._timed("refit"):
                self._refit(site, weights.output, targets)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        return partition, cost, neighbour_cost, similarity

    def _groups_and_targets(
        self, site: AttentionSite, moments: LayerMoments, on_gpu: bool
    ) -> tuple[tuple, list[Tensor]]:
        """What `_search` finds, and the refit's targets; a GPU computes those and their streams in the meantime."""
        index = site.layer
        with ThreadPoolExecutor(1) as beside:
            searching = beside.submit(self._search, moments, index)
            if not on_gpu:  # the streams would need the same cores
                with self._timed("search"):
                    wait([searching])
            if index:
                with self._timed("converted stream"):
                    self._advance(index - 1)
            with self._timed("targets"):
                targets = self._targets(site)
            with self._timed("search"):
                return searching.result(), targets

    def _advance(self, index: int) -> None:
        """Advance the current stream by one converted layer, which nothing runs after."""
        streams = self.streams
        for batch, call in streams.through(self.layers[index], index, streams.current):
            streams.current[batch] = call().to(streams.home)
        del streams.calls[index]

    def _moments(self, site: AttentionSite, weights: AttentionWeights) -> LayerMoments:
        """The layer's statistics on the original stream, on the CPU; projections run, attention and MLP do not."""
        statistics = LayerStatistics(site.shape, weights.output.device)
        sources = _sources(site)
        with self.model.disable_adapter(), recording(sources) as record, _stopping_at_last(sources, record):
            for batch, call in self.streams.through(self.layers[site.layer], site.layer, self.streams.original):
                record.clear()
                with suppress(Stop):
                    call()
                if record.keys() != sources.keys():
                    break  # `recording` says which never ran
                statistics.update(*_heads(site, record), mask=self.streams.masks[batch])
        statistics.reduce()
        return statistics.moments(weights.output).to("cpu")

    def _targets(self, site: AttentionSite) -> list[Tensor]:
        """Advance the original stream by one layer; what the refit aims at, per batch."""
        streams, bias = self.streams, _base(site.output).bias
        targets = []
        with self.model.disable_adapter(), recording({"output": site.output}) as record:
            for batch, call in streams.through(self.layers[site.layer], site.layer, streams.original):
                entering, streams.original[batch] = streams.original[batch], call().to(streams.home)
                target = (record["output"] if bias is None else record["output"] - bias).to(streams.home)
                targets.append(target + self._drift(site, entering, streams.current[batch]))
        return targets

    def _drift(self, site: AttentionSite, original: Tensor, current: Tensor) -> Tensor | float:
        """What the converted stream has lost on the original one before this layer.

        o_proj's output is added to the stream, so the refit can make up for earlier layers too.
        """
        return original - current if site.family.plain_residual else 0.0

    def _search(self, moments: LayerMoments, index: int) -> tuple[Partition, float, float, tuple[Tensor, Tensor]]:
        """The layer's groups, their cost, that of neighbours, and how alike heads are; on the CPU, in threads."""
        start = time.perf_counter()
        quick = moments.for_search()
        principal = pair_costs(quick, self.shape, "residual", "principal")
        groups = self._group(quick if self.config.merge == "principal" else moments, principal, index)
        similarity = head_similarity(moments, principal)
        self.search_seconds += time.perf_counter() - start
        return *groups, similarity

    def _group(self, moments: LayerMoments, principal: Tensor, index: int) -> tuple[Partition, float, float]:
        """The layer's groups: kept if they need no data, searched otherwise. `principal`: principal pair costs."""
        config, shape = self.config, self.shape
        costs = partial(group_costs, moments, shape=shape, criterion=config.criterion, merge=config.merge)
        if config.grouping in ("symmetric", "asymmetric"):
            known = (config.criterion, config.merge) == ("residual", "principal")
            found = search_partition(
                costs,
                shape.base_kv_heads,
                config.num_key_value_heads,
                self.cap,
                symmetric=config.grouping == "symmetric",
                seed=config.seed,
                pair_costs=principal if known else pair_costs(moments, shape, config.criterion, config.merge),
            )
            return found.partition, found.cost, found.neighbour_cost
        partition = self.tuner.head_groups(self.adapter).layers[index]
        neighbour = split_evenly(range(shape.base_kv_heads), config.num_key_value_heads)
        return partition, costs(partition).sum().item(), costs(neighbour).sum().item()

    def _write(self, site: AttentionSite, partition: Partition, merged: MergedLayer) -> None:
        site.set_partition(self.adapter, partition)
        tensors = vars(merged).copy()
        for note in tensors.pop("notes"):
            self.notes[note].append(site.layer)
        site.set_shared(self.adapter, **tensors)
        if site.family.key_norm:  # its scale spans all heads
            norm = getattr(site.attention, site.family.key_norm)
            scale = norm.get_base_layer().weight.detach().unflatten(0, (-1, site.shape.head_dim))
            norm.lora_norm[self.adapter].weight.copy_(mean_over_groups(scale, partition))

    def _refit(self, site: AttentionSite, output_weight: Tensor, targets: list[Tensor | None]) -> None:
        """Start o_proj's LoRA from the least-squares fit of the targets on the converted stream; uses them up."""
        if reason := self._no_refit(site):
            self.notes[reason].append(site.layer)
            return
        refit = OutputRefit(output_weight)
        layer, streams = self.layers[site.layer], self.streams

        def collect(_module: nn.Module, args: tuple) -> None:
            refit.update(args[0], targets[batch], streams.masks[batch])
            targets[batch] = None  # its memory is needed to solve
            raise Stop

        handle = _base(site.output).register_forward_pre_hook(collect)
        try:
            for batch, call in streams.through(layer, site.layer, streams.current):  # noqa: B007 (read in the hook)
                try:
                    call()
                except Stop:
                    continue
                raise ValueError(f"{site.name} never ran its output projection while refitting.")
        finally:
            handle.remove()
        refit.reduce()
        lora = site.output
        rank, scaling = lora.r[self.adapter], lora.scaling[self.adapter]
        factors = refit.low_rank(rank, scaling)
        if self.adapter in site.value.lora_value_mix:
            mix = refit.head_mix(site.shape.num_attention_heads)
            mixed = refit.behind(mix)
            behind = mixed.low_rank(rank, scaling)
            if mixed.objective(_product(behind, scaling)) < refit.objective(_product(factors, scaling)):
                site.compose_value_mix(self.adapter, mix)
                factors = behind
        _write_lora(lora, self.adapter, factors)

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
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        self.seconds[stage] += time.perf_counter() - start


# ------------------------------------------------------------------------------------------- reading the model


def _sources(site: AttentionSite) -> dict[str, nn.Module]:
    """Modules whose outputs are queries, keys and values before RoPE."""
    if isinstance(site.key, SharedQKV):
        return {"qkv": site.key}
    key = getattr(site.attention, site.family.key_norm) if site.family.key_norm else site.key
    return {"query": site.query_source, "key": key, "value": site.value}


@contextmanager
def _stopping_at_last(sources: dict[str, nn.Module], record: dict[str, Tensor]) -> Iterator[None]:
    """Leave the forward once all sources are recorded, whatever their order."""

    def stop(*_) -> None:
        if record.keys() == sources.keys():
            raise Stop

    handles = [module.register_forward_hook(stop) for module in sources.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _heads(site: AttentionSite, record: dict[str, Tensor]) -> list[Tensor]:
    """Recorded queries (B, T, H D), keys and values (B, T, K D)."""
    parts = ("query", "key", "value")
    if "qkv" not in record:
        return [record[part] for part in parts]
    return [record["qkv"][..., site.key.base_rows(part, record["qkv"].device)] for part in parts]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_finite(weights: AttentionWeights) -> None:
    for name, tensor in vars(weights).items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"NaN or inf in the base's {name} projection: check the checkpoint.")


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ----------------------------------------------------------------------------------------- changing the model


def _plain_start(config) -> bool:
    """Whether LoRA starts as the identity; PiSSA, LoftQ and the like change the base weight with it."""
    return config.init_lora_weights in (True, False, "gaussian")


def _write_lora(layer: LoraLayer, adapter_name: str, factors: tuple[Tensor, Tensor] | None) -> None:
    """Set LoRA to the given factors A (k, in), B (out, k), k <= r; None is no change to the base."""
    lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    lora_b.zero_()
    if factors is not None:
        lora_a[: len(factors[0])].copy_(factors[0])
        lora_b[:, : len(factors[0])].copy_(factors[1])
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    if adapter_name in magnitude:  # DoRA: its norm has to follow, or it rescales the refit
        magnitude[adapter_name].update_layer(
            base_layer=layer.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=layer.scaling[adapter_name]
        )


def _product(factors: tuple[Tensor, Tensor], scaling: float) -> Tensor:
    lora_a, lora_b = factors
    return scaling * lora_b @ lora_a


@contextmanager
def _all_or_nothing(model: PeftModel, tuner: AsymGQAModel, adapter_name: str) -> Iterator[None]:
    """On any error or interrupt, put the adapter's tensors and groups back; put back what was active in any case."""
    groups = tuner.head_groups(adapter_name)
    before = {name: tensor.detach().cpu().clone() for name, tensor in _adapter_tensors(model, adapter_name)}
    active, trainable = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        tuner.set_head_groups(adapter_name, groups)
        for name, tensor in _adapter_tensors(model, adapter_name):
            tensor.copy_(before[name])
        raise
    finally:
        tuner.enable_adapter_layers()
        model.set_adapter(active)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def _adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.data) for name, p in model.named_parameters() if adapter_name in name.split("."))


# --------------------------------------------------------------------------------------------------- checking


def _checked_model(model: PeftModel, adapter_name: str | None) -> tuple[AsymGQAModel, str]:
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, AsymGQAModel):
        raise ValueError(
            f"model is a {type(model).__name__}: pass what get_peft_model(base, AsymGQAConfig(...)) gave."
        )
    adapter_name = model.active_adapter if adapter_name is None else adapter_name
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is unknown, the model holds {list(tuner.peft_config)}.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the adapter is merged: call unmerge_adapter() first, initialising needs the original weights."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapter is disabled: leave disable_adapter() first.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("some weights are on the meta device (offloaded or not loaded): place them on real devices.")
    return tuner, adapter_name
