"""Several runs over one base forward: their adapters stacked, one view of the storage a run.

PEFT decides which modules a run adapts, their ranks and scales (on a skeleton); this room stacks
each module's tensors over the runs that train it, so that one kernel serves, and moves, all runs.

Letters: R runs in the pack, M of them that train a module, B examples of a batch, T tokens, N rows
of a run that carry a loss, K rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabench import adapters
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import probe
from lorabench.pack.allocation import allocate, stored_shape
from lorabench.pack.batch import Batch, Laid
from lorabench.pack.head import Owned, RowHead
from lorabench.pack.layers import (
    PackedBias,
    PackedDropout,
    PackedHead,
    PackedLinear,
    PackedNorm,
)
from lorabench.pack.norms import fuse_norms
from lorabench.pack.optimizer import StackedAdamW
from lorabench.pack.places import Place, places
from lorabench.pack.probe import body_of
from lorabench.pack.repeat import Repeat, is_repeatable
from lorabench.pack.rotary import fuse_rotary
from lorabench.pack.rows import Spans, on_device
from lorabench.pack.solo import (
    autocast,
    enable_checkpointing,
    make_head,
    without_generation_config,
)
from lorabench.pack.ways import few_calls


class StackedPack:
    """R runs over one base forward, each ending with the result it would have had alone.

    Args:
        base: the frozen base; its tensors are shared, never written.
        skeleton: the same on the meta device.
        modules: of each run, from `adapters.resolve_modules`.
        known: adapters that `adapters.attach_skeleton` has put on this skeleton before.
        compiled: whether training calls the body of the model as one compiled graph.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        skeleton: PreTrainedModel,
        configs: list[Config],
        modules: list[list[str]],
        device: str,
        known: dict[str, PeftModel] | None = None,
        compiled: bool = False,
    ):
        self.configs, self.device = configs, device
        known = {} if known is None else known
        self.wrapped = [
            adapters.attach_skeleton(skeleton, config, names, known)
            for config, names in zip(configs, modules, strict=True)
        ]
        distinct = {id(one): one for one in self.wrapped}
        found = {
            key: (places(one), list(adapters.adapter_state(one))) for key, one in distinct.items()
        }
        self.places = [found[id(one)][0] for one in self.wrapped]
        self.saved_names = [found[id(one)][1] for one in self.wrapped]
        self.clock = adapters.Clock([config.seeds.dropout for config in configs], device)
        self.alive = [True] * len(configs)
        self.tree = cast(Any, base_model.share(base))
        self.end_to_end = probe.suits(base)
        self.spans = Spans(len(configs))
        layers = [adapters.lora_layers(wrapped) for wrapped in self.wrapped]
        self.stacked, self.stores = allocate(self.places, layers, configs[0], device)
        self._fill(base)
        self._install(layers)
        fuse_norms(self.tree)
        fuse_rotary(self.tree)
        self.tree.train()  # base dropouts are zero; checkpointing asks for training mode
        if configs[0].trainer.gradient_checkpointing:
            enable_checkpointing(self.tree)
        self.head = make_head(self.tree, self.clock, configs[0], self.spans)
        if isinstance(self.head, RowHead):
            self.head.trained = self._trained_at_head()
            if compiled:
                self.head.compile()
        self.optimizer = StackedAdamW(
            self.stores,
            [config.trainer for config in configs],
            [config.lora.loraplus_lr_ratio for config in configs],
        )

    @property
    def size(self) -> int:
        return len(self.configs)

    # --- storage -------------------------------------------------------------------------

    def _trained_at_head(self) -> Callable[[], list[Owned]]:
        """What trains behind the body, and the runs whose it is."""
        inside = f"{body_of(self.tree)[0]}."
        found = [
            (one, on_device(one.members.runs, self.device))
            for (_, module), one in self.stacked.items()
            if not module.startswith(inside)
        ]
        return lambda: [(one.value, runs) for one, runs in found if one.active]

    def _view(self, run: int, place: Place, of: str = "value") -> Tensor:
        """A run's own part of a stacked tensor, in PEFT's shape."""
        stacked = self.stacked[place.kind, place.module]
        mine = getattr(stacked, of).detach()[stacked.members.runs.index(run)]
        mine = mine[tuple(slice(n) for n in stored_shape(place))]
        return mine.t() if place.kind == "lora_B" else mine

    @torch.no_grad()
    def _fill(self, base: PreTrainedModel) -> None:
        for run, (config, found) in enumerate(zip(self.configs, self.places, strict=True)):
            b_of = {place.module: place for place in found if place.kind == "lora_B"}
            for place in found:
                view = self._view(run, place)
                if place.kind == "lora_A":
                    (r, in_features), b = place.shape, b_of[place.module]
                    drawn_a, drawn_b = adapters.initial_ab(
                        config.seeds.init, place.module, r, in_features, b.shape[0],
                        config.lora.init,
                    )  # fmt: skip
                    view.copy_(drawn_a)
                    self._view(run, b).copy_(drawn_b)
                elif place.kind in ("copy", "copy_bias"):
                    part = "weight" if place.kind == "copy" else "bias"
                    view.copy_(adapters.initial_head(base, config, part))
                elif place.kind == "bias":
                    view.copy_(cast(Tensor, base.get_submodule(place.module).bias))

    # --- the module tree -----------------------------------------------------------------

    def _install(self, layers: list[dict[str, Any]]) -> None:
        biases = {module for kind, module in self.stacked if kind == "bias"}
        replaced: dict[str, nn.Module] = {}
        for kind, module in list(self.stacked):
            target = self.tree.get_submodule(module)
            bias = None
            if module in biases:
                bias = PackedBias(self.stacked["bias", module], target.bias, self.spans)
            if kind == "lora_A":
                lora_a, lora_b = self.stacked[kind, module], self.stacked["lora_B", module]
                members = lora_a.members
                mine = [layers[run][module] for run in members.runs]
                ranks = tuple(layer.r[adapters.ADAPTER] for layer in mine)
                if few_calls(self.device):  # columns of zeros cost less than calls
                    ranks = (max(ranks),) * len(ranks)
                drops = [layer.lora_dropout[adapters.ADAPTER] for layer in mine]
                ps = [drop.p if isinstance(drop, nn.Dropout) else 0.0 for drop in drops]
                dropout = PackedDropout(module, ps, members.runs, self.clock) if any(ps) else None
                replaced[module] = PackedLinear(
                    target, lora_a, lora_b, ranks, dropout, bias, self.spans
                )
            elif kind == "bias" and ("lora_A", module) not in self.stacked:
                replaced[module] = PackedNorm(target, cast(PackedBias, bias))
        for kind, module in self.stacked:
            if kind == "copy":
                inner = replaced.get(module, self.tree.get_submodule(module))
                own_bias = self.stacked.get(("copy_bias", module))
                replaced[module] = PackedHead(
                    inner, self.stacked[kind, module], own_bias, self.spans
                )
        for module, layer in replaced.items():
            self.tree.set_submodule(module, layer)
        self._layers = [one for one in replaced.values() if isinstance(one, PackedLinear)]
        self._share_below(set(replaced))

    def _share_below(self, modules: set[str]) -> None:
        """Find where a batch that runs share is repeated: before the first trained layer."""
        head = base_model.output_head(self.tree)
        assert head is not None
        below = sorted(modules - {head[0]})
        found = [re.match(r"(.+?)\.(\d+)\.", name) for name in below]
        self.repeat = Repeat()
        self.spread = "input" if below else "head"
        if below and all(found) and len({match[1] for match in found if match}) == 1:
            first = min(int(match[2]) for match in found if match)
            layers = self.tree.get_submodule(cast(Any, found[0])[1])
            if not all(map(is_repeatable, layers[first:])):
                return
            # Hidden states are repeated once, before the first; masks are handed to every layer.
            for layer in layers[first:]:
                layer.register_forward_pre_hook(self.repeat, with_kwargs=True)
            self.spread = "inside"

    # --- what trains ---------------------------------------------------------------------

    def trainable(self, run: int) -> set[str]:
        """What a step would move of a run now: stacked tensors, and the tree's own, if any."""
        stray = {name for name, p in self.tree.named_parameters() if p.requires_grad}
        return stray | {
            f"{module}.{kind}"
            for (kind, module), one in self.stacked.items()
            if one.active and one.lr_scale_of(run) is not None
        }

    def owners(self, run: int) -> dict[str, str]:
        """The module of everything a run trains, by the name of the stacked tensor."""
        return {f"{place.module}.{place.kind}": place.module for place in self.places[run]}

    def train_only(self, lr_scales: Sequence[dict[str, float]]) -> None:
        """Freeze what is not here of each run; the others train at this part of the run's rate."""
        self.optimizer.changed()
        for (_, module), one in self.stacked.items():
            one.train([lr_scales[run].get(module) for run in one.members.runs])

    def modules(self, run: int) -> list[str]:
        """Modules this run trains."""
        return list(dict.fromkeys(place.module for place in self.places[run]))

    # --- what the loop calls -------------------------------------------------------------

    @contextmanager
    def _through(self, laid: Laid) -> Iterator[None]:
        """While a batch is on its way through the model.

        A training step keeps this on until its backward pass is done: with gradient checkpointing
        some transformers (5.17) run a layer's hooks again when they recompute it.
        """
        inside = self.spread == "inside" and max(laid.sizes) > 1
        repeating = self.repeat.on(laid) if inside else nullcontext()
        self.clock.numbers_RN = laid.numbers_RN
        # Looked up once, outside of a compiled graph.
        self.clock.count_to(max(laid.rows.counts))
        for layer in self._layers:
            layer.members.parts(laid.rows, layer.ranks)
        rows = laid.rows if self.end_to_end else None
        with laid.attention(self.tree), repeating, self.spans.at(rows):
            yield

    def lay(self, batch: Batch) -> Laid:
        """A batch as this pack takes it, on the device: can be made while it computes another."""
        laid = Laid(batch, self.end_to_end, self.spread, self.device)
        assert sum(laid.sizes) == self.size, "a batch has a slab for every run"
        return laid

    def forward_backward(
        self, step: int, micro_step: int, batch: Batch | Laid, num_targets: list[int]
    ) -> Tensor:
        """Add this micro-batch's gradients; return each run's summed nll / num_targets, (R,)."""
        laid = batch if isinstance(batch, Laid) else self.lay(batch)
        self.clock.at(step, micro_step)
        self._refresh()
        self.clock.training = True
        try:
            with self._through(laid):
                with autocast(self.configs[0], self.device):
                    loss_R = self.head.loss(self.head.hidden(laid), laid, num_targets)
                loss_R.sum().backward()
        finally:
            self.clock.training = False
        return loss_R.detach()

    def update(self, lr: list[float]) -> Tensor:
        """Clip and move every run that is still alive; return norms before clipping, (R,)."""
        return self.optimizer.step(lr)

    def _refresh(self) -> None:
        for store in self.stores:
            store.refresh()

    def stop(self, run: int) -> None:
        """A run keeps its slot and its weights, and no longer moves."""
        self.alive[run] = False
        self.optimizer.stop(run)

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Teacher-forced nll and argmax of every row of a batch that all runs see, (R, N) each."""
        self._refresh()
        laid = self.lay(batch)
        with self._through(laid), autocast(self.configs[0], self.device):
            (nll,), (best,) = self.head.scored(self.head.hidden(laid), laid)
            return nll, best

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits of every row of a batch that all runs see, (R, N, V)."""
        self._refresh()
        laid = self.lay(batch)
        with self._through(laid), autocast(self.configs[0], self.device):
            (logits,) = self.head.logits(self.head.hidden(laid), laid)
            return logits

    @torch.no_grad()
    def generate(self, input_ids_BL: Tensor, mask_BL: Tensor, **settings: Any) -> Tensor:
        """Greedy continuations of the same prompts by every run, (R, B, L')."""
        self._refresh()
        self.tree.eval()
        try:
            with autocast(self.configs[0], self.device), without_generation_config(self.tree):
                written = self.tree.generate(
                    input_ids=input_ids_BL.repeat(self.size, 1),
                    attention_mask=mask_BL.repeat(self.size, 1), **settings,
                )  # fmt: skip
        finally:
            self.tree.train()
        return written.reshape(self.size, -1, written.shape[-1])

    # --- one run's part ------------------------------------------------------------------

    def adapter_state(self, run: int) -> dict[str, Tensor]:
        """What a saved adapter of this run holds, under PEFT's names."""
        mine = {place.state_name: self._view(run, place) for place in self.places[run]}
        assert set(self.saved_names[run]) == set(mine), "a packed run saves exactly what PEFT would"
        return {name: mine[name] for name in self.saved_names[run]}

    @torch.no_grad()
    def load_adapter(self, run: int, tensors: Mapping[str, Tensor]) -> None:
        """Put what `adapter_state` returned, or a saved file holds, in a run's slot."""
        mine = self.adapter_state(run)
        assert set(mine) == set(tensors), "a saved adapter holds what its run trains"
        for name, view in mine.items():
            view.copy_(tensors[name])

    def settings(self, run: int) -> Any:
        """PEFT's own config of this run."""
        return self.wrapped[run].peft_config[adapters.ADAPTER]

    def state(self, run: int) -> dict[str, Tensor]:
        """Trained parameters and optimizer moments of a run."""
        found = {}
        for place in self.places[run]:
            found[place.state_name] = self._view(run, place)
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{place.state_name}|{moment}"] = self._view(run, place, moment)
            steps = self.optimizer.counted(self.stacked[place.kind, place.module], run)
            found[f"{place.state_name}|step"] = torch.tensor(float(steps))
        return {name: tensor.detach() for name, tensor in found.items()}

    @torch.no_grad()
    def load_state(self, run: int, state: dict[str, Tensor]) -> None:
        """Continue a run from what `state` returned."""
        for name, tensor in self.state(run).items():
            if not name.endswith("|step"):
                tensor.copy_(state[name])
        self.optimizer.changed()
        for place in self.places[run]:
            steps = int(state[f"{place.state_name}|step"])
            self.stacked[place.kind, place.module].count(run, steps)

    def fingerprint(self, run: int) -> list[Any]:
        """Names and shapes of what this run trains."""
        return [[place.state_name, list(place.shape)] for place in self.places[run]]
