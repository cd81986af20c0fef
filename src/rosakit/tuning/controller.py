"""`RosaController`: the hooks of an attached model that see a whole forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rosakit.errors import InvalidInputError, UnsupportedModelError, warn_once
from rosakit.layers import RosaContext, TokenCandidates, TokenRoute
from rosakit.layers.projection import Projections
from rosakit.layers.supervision import AttentionTargets
from rosakit.layers.token_match import (
    SEARCHED,
    best_successors,
    distant_match,
    further_matches,
    gather_candidates,
)
from rosakit.ops import suffix_match
from rosakit.tuning import layout
from rosakit.tuning.cache import RosaCacheLayer, prepare_cache
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.context import CONTEXT, ForwardContext, Shared
from rosakit.tuning.inject import InjectedAdapter
from rosakit.tuning.modules import argument_names, takes_keywords
from rosakit.tuning.recall import Recall, span_places
from rosakit.tuning.window import AttentionPlan, positions
from rosakit.types import Match


class RosaController(nn.Module):
    """Prepares the context of each forward pass; sits at ``model.rosa``.

    Args:
        config: what was attached.
        windowed: for every layer whether its attention is windowed by rosakit.
        token_route: the token route, or None.
        shared: where layers find the current pass.
        decoder: the decoder stack (only its signature is read).
        top: the model that owns the output embedding (only its signature is read).
        injected: the adapters by layer index.
        projections: the projections that all of them share, or None.
        head: the output embedding, for selections with a lens, or None.

    Attributes:
        original_attention: the attention implementation to restore, None without a window.
        record_layers: the layers whose matches the recorder keeps; None for all.
        recorder: a list that collects the `rosakit.layers.RosaContext` of every forward
            pass, with the adapters' matches, or None.
        keep_inputs: recorded contexts also hold what learned addresses are computed from.
        teacher: while set, passes show full attention without adapters to it.
        silent: while set, passes are the windowed model's, without adapters and token route.
        packed: whether position ids restart inside a row, where the caller knows; None to look at
            them, which waits for the device and which a compiled model cannot do in one graph.
    """

    def __init__(
        self,
        config: RosaConfig,
        windowed: list[bool],
        token_route: TokenRoute | None,
        shared: Shared,
        *,
        decoder: nn.Module,
        top: nn.Module,
        injected: dict[int, InjectedAdapter],
        projections: Projections | None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # Out of the module tree: it belongs to the model.
        self.__dict__["head"] = head
        self.config, self.windowed, self.token_route = config, windowed, token_route
        self.projections = projections
        # A plain dict: the adapters belong to the decoder layers, where they are sharded and moved.
        self.injected = injected
        self.original_attention: str | None = None
        self.recorder: list[RosaContext] | None = None
        self.record_layers: frozenset[int] | None = None
        self.keep_inputs = False
        self.teacher: AttentionTargets | None = None
        self.silent = False
        self.packed: bool | None = None
        self.shared = shared
        self._candidates: TokenCandidates | None = None
        self._logits_to_keep: int | Tensor = 0
        self._decoder_names = argument_names(decoder.forward)
        self._decoder_keywords = takes_keywords(decoder.forward)
        self._top_names = argument_names(top.forward)

    # Hooks of the model that owns the output embedding.

    def before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook: remembers which positions get logits."""
        named = {**dict(zip(self._top_names, args, strict=False)), **kwargs}
        keep = named.get("logits_to_keep", 0)
        self._logits_to_keep = 0 if keep is None else keep
        self._candidates = None

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an error: forgets the pass."""
        self._candidates, self._logits_to_keep = None, 0
        self.shared.current = None

    def after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook on the output embedding: logits become mixed log probabilities."""
        if self._candidates is None or self.token_route is None:
            return None
        keep = self._logits_to_keep
        picked = slice(-keep, None) if isinstance(keep, int) and keep else keep
        found = self._candidates
        if not isinstance(picked, int):
            found = TokenCandidates(*(x[:, picked] for x in found))
        mixed: Tensor = self.token_route(args[0], output, found)
        return mixed

    # Hooks of the decoder stack.

    def before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: cache, positions, token matches; hands the context down."""
        named = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
        example = ids if ids is not None else embeds
        if example is None:
            return args, kwargs  # the decoder itself says what is missing
        batch, length = example.shape[:2]
        if ids is None and self._needs_ids:
            raise InvalidInputError(
                "the token route and address='token' or 'hash' match token ids, but the model was "
                "called with inputs_embeds only; pass input_ids instead"
            )
        documents = layout.documents_of(named, batch, length)
        mask, position_ids = named.get("attention_mask"), named.get("position_ids")
        layout.check_mask(mask, batch)
        packed = documents is not None or (
            layout.is_packed(mask, position_ids, length)
            if self.packed is None or position_ids is None
            else self.packed
        )
        carrier = self._cache(module, named, packed)
        if carrier is None:
            if mask is not None and mask.shape[1] != length:
                raise InvalidInputError(
                    f"attention_mask covers {mask.shape[1]} positions, the input has {length}; "
                    "without a cache they are the same"
                )
            context = self._whole(
                ids,
                layout.segments_of(mask, position_ids, documents, packed, batch, length),
                length,
                example.device,
            )
        else:
            if packed:
                raise InvalidInputError(
                    "packed documents (document_ids, cu_seqlens, or position_ids that restart) "
                    "cannot be read through a cache; call the model with use_cache=False"
                )
            context = self._chunk(ids, mask, carrier, batch, length, example.device)
        # Enabling it makes the embeddings require gradients, so every layer runs again.
        context.recomputed = _checkpoints(module) and torch.is_grad_enabled()
        context.teacher = self.teacher
        context.silent = self.silent or self.teacher is not None
        if self.recorder is not None and not context.silent:
            context.rosa.record = True
            context.rosa.record_layers = self.record_layers
            context.rosa.keep_inputs = self.keep_inputs
            self.recorder.append(context.rosa)
        self._candidates = None if self.silent else context.rosa.candidates
        self.shared.current = context
        if self._decoder_keywords:
            named[CONTEXT] = context
        return (), named

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an error: checks that the windows were used."""
        context, self.shared.current = self.shared.current, None
        if output is None or context is None or context.plan is None:
            return
        # While a graph is captured, FlexAttention's tracing undoes what it counted.
        if torch.compiler.is_compiling():
            return
        # In training some architectures drop layers at random, so one call is enough there.
        if context.attended < (1 if module.training else len(self.windowed)):
            raise UnsupportedModelError(
                f"the attention of {type(module).__name__} cannot be windowed: only "
                f"{context.attended} of {len(self.windowed)} layers called the attention function. "
                "Detach, and attach with window=None"
            )

    def _output_rows(self) -> Tensor | None:
        """The weight of the output embedding, without gradient, if a lens reads it."""
        head = self.__dict__["head"]
        if head is None:
            return None
        weight: Tensor = head.weight.detach()
        return weight

    @property
    def _needs_ids(self) -> bool:
        return self._matches_tokens or (bool(self.injected) and self.config.address == "hash")

    @property
    def _matches_tokens(self) -> bool:
        return (
            self.token_route is not None
            or bool(self._recalled)
            or (bool(self.injected) and self.config.address == "token")
        )

    @property
    def _recalled(self) -> int:
        """Spans that join the window; the control recalls none."""
        return self.config.recall if self.config.retrieve else 0

    @property
    def _candidate_count(self) -> int:
        """Distinct successors that token route and adapters need together."""
        own = self.config.address_candidates if self.injected else 1
        own = max(own, self._recalled)
        if self._reads_far and self.config.far_candidates > 1:
            own = max(own, SEARCHED, self.config.far_candidates)
        return own if self.token_route is None else max(own, self.token_route.candidates)

    @property
    def _reads_far(self) -> bool:
        """Whether adapters read the candidate beyond a distance."""
        return bool(self.injected) and self.config.far_distance is not None

    def _with_far(self, near: Match, far: Match, own: Tensor) -> Match:
        """The candidates of the adapters: the best ones, then the distant ones.

        Args:
            near: the best distinct successors ``[B, K, T]``.
            far: the best distant match ``[B, 1, T]``.
            own: the positions that read, ``[B or 1, T]``, beside the matches.
        """
        used, distance = self.config.address_candidates, self.config.far_distance
        assert distance is not None
        parts = [Match(near.position[:, :used], near.length[:, :used]), far]
        if self.config.far_candidates > 1:
            back = own[:, None].to(near.position.device) - near.position
            parts.append(further_matches(near, far, back, distance, self.config.far_candidates - 1))
        return Match(
            torch.cat([part.position for part in parts], dim=1),
            torch.cat([part.length for part in parts], dim=1),
        )

    def _cache(self, decoder: Any, named: dict[str, Any], packed: bool) -> RosaCacheLayer | None:
        """The carrier of this pass's cache, made or prepared where the call asks for one."""
        cache, use_cache = named.get("past_key_values"), named.get("use_cache")
        checkpointing = _checkpoints(decoder)
        if cache is not None and checkpointing:
            raise InvalidInputError(
                "gradient checkpointing drops the cache inside the layers; call the model with "
                "use_cache=False and no past_key_values, or in eval mode"
            )
        if cache is None:
            wanted = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
            learning = torch.is_grad_enabled() and any(
                p.requires_grad for p in self.own_parameters()
            )
            if wanted and (decoder.training and (learning or checkpointing)):
                if use_cache:
                    warn_once(
                        "rosakit: use_cache=True is ignored in training, where whole sequences "
                        "are computed with gradients"
                    )
                wanted = False
            if use_cache is None and (packed or learning):
                wanted = False
            if not wanted:
                named["use_cache"] = False
                return None
            cache = named["past_key_values"] = DynamicCache(config=decoder.config)
            named["use_cache"] = True
        return prepare_cache(cache, **self.cache_options)

    @property
    def cache_options(self) -> dict[str, Any]:
        """What the layers of this model's caches depend on."""
        return {
            "windowed": self.windowed,
            "window": self.config.window,
            "sinks": self.config.sink_tokens,
            "recall": bool(self._recalled),
            "offload": self.config.recall_offload,
        }

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that the attachment added."""
        yield from self.parameters()
        for injected in self.injected.values():
            yield from injected.parameters()

    def _whole(
        self, ids: Tensor | None, starts: Tensor | None, length: int, device: torch.device
    ) -> ForwardContext:
        """Context of whole sequences."""
        plan = None
        if self.config.window is not None:
            where = positions(length, starts, device)
            plan = AttentionPlan(
                where, lambda: where, lambda: where, plain=starts is None, whole=True
            )
        rosa = RosaContext(input_ids=ids, segment_starts=starts, output_rows=self._output_rows())
        if self._matches_tokens:
            assert ids is not None
            count = self._candidate_count
            if self.token_route is None and count == 1:
                stream = ids[:, None].contiguous()
                rosa.token_match = suffix_match(stream, stream, segment_starts=starts)
            else:
                found = best_successors(ids, count, segment_starts=starts)
                rosa.token_match = Match(
                    found.position.transpose(1, 2).contiguous(),
                    found.length.transpose(1, 2).contiguous(),
                )
                if self.token_route is not None:
                    rosa.candidates = self._competitors(ids, gather_candidates(ids, found))
            recalled = rosa.token_match
            if self._reads_far:
                distance = self.config.far_distance
                assert distance is not None
                far = distant_match(ids, distance, segment_starts=starts)
                own = torch.arange(length, device=device)[None]
                rosa.token_match = self._with_far(rosa.token_match, far, own)
        context = ForwardContext(rosa, plan)
        if self._recalled:
            assert plan is not None
            # Matches of whole sequences are places in the row, and so are the keys.
            own = torch.arange(length, device=device)[None]
            context.recall = Recall(plan, self._spans(recalled, own, starts), lambda: own)
        return context

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _chunk(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        carrier: RosaCacheLayer,
        batch: int,
        length: int,
        device: torch.device,
    ) -> ForwardContext:
        """Context of a chunk that continues (or starts) a cache."""
        index, states = carrier.index, carrier.states
        past = index.length
        real = layout.chunk_mask(mask, past, length)
        states.advance(batch, length, real)
        query, windowed, full, clear = index.advance(real, length, device)
        plan = None
        if self.config.window is not None:
            plan = AttentionPlan(
                query,
                windowed,
                full,
                plain=index.plain,
                whole=past == 0,
                clear=clear,
                contiguous=real is None or layout.contiguous(real),
            )
        rosa = RosaContext(input_ids=ids, mask=real, states=states, output_rows=self._output_rows())
        if self._matches_tokens:
            assert ids is not None
            tokens = states.tokens(batch, self._candidate_count, 1)
            rosa.token_match, found = tokens.extend(ids, real)
            if self.token_route is not None:
                rosa.candidates = self._competitors(ids, found)
            recalled = rosa.token_match
            if self._reads_far:
                distance = self.config.far_distance
                assert distance is not None
                far = states.far_tokens(batch, distance).extend(ids, real)
                rosa.token_match = self._with_far(rosa.token_match, far, query.rank)
        if self.injected and self.config.address == "hash":
            assert ids is not None
            reach = max(self.config.hash_orders)
            rosa.recent = states.recent_tokens(batch).extend(ids, real, reach)
        context = ForwardContext(rosa, plan)
        index.picked = None
        if self._recalled:
            assert plan is not None
            assert self.config.window is not None
            # States count real tokens of a row, and so do the ranks of the keys.
            spans = self._spans(recalled, query.rank.to(device), None)
            recall = Recall(plan, spans, lambda: full().rank)
            if length == 1:
                total = index.length
                index.picked = recall.pick(self.config.window, self.config.sink_tokens, total)
            context.recall = recall
        return context

    def _spans(self, match: Match, own: Tensor, first: Tensor | None) -> Tensor:
        config = self.config
        return span_places(
            match, config.recall, config.recall_before, config.recall_after, own, first
        )

    def _competitors(self, ids: Tensor, found: TokenCandidates) -> TokenCandidates:
        """Candidates that are long enough; the control's own tokens in their place."""
        assert self.token_route is not None
        if self.token_route.min_length > 1:
            # Candidates are ordered by length, so the K best of those long enough remain.
            short = found.length < self.token_route.min_length
            found = TokenCandidates(*(x.masked_fill(short, 0) for x in found))
        found = TokenCandidates(*(x[..., : self.token_route.candidates] for x in found))
        if not self.token_route.retrieve:
            found = self.token_route.own_value_candidates(ids, found)
        return found


def _checkpoints(decoder: nn.Module) -> bool:
    """Whether layers drop what they computed, to compute it again in the backward pass."""
    return decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))
