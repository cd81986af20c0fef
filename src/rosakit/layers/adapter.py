"""`RosaAdapter`: projections, the operator, and the output projection (semantics section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rosakit import symbols
from rosakit.errors import InvalidInputError, warn_once
from rosakit.layers.address_options import check_address_options
from rosakit.layers.context import RosaContext
from rosakit.layers.credit import credit_margin
from rosakit.layers.exact import ExactMatches
from rosakit.layers.hashing import code_channels
from rosakit.layers.learned_length import LengthSelection
from rosakit.layers.projection import Projection, Projections
from rosakit.layers.selection import Selection
from rosakit.layers.state import AdapterState
from rosakit.ops import ahead
from rosakit.ops.ahead import Ahead
from rosakit.ops.estimators import registry
from rosakit.ops.match import check_options as check_match_options
from rosakit.ops.retrieve import retrieve
from rosakit.ops.rosa import rosa
from rosakit.ops.value_heads import check_value_groups, share_values
from rosakit.types import NO_MATCH, Granularity, Match, Successor, Unmatched

Inject = Literal["post_attn", "pre_attn"]
Address = Literal["learned", "token", "hash"]
AdapterBackend = Literal["auto", "cpu", "cuda", "pipeline"]


class Begun(NamedTuple):
    """Queries and keys of one call, and the match that was begun for them."""

    q: Tensor
    k: Tensor
    ahead: Ahead


class RosaAdapter(nn.Module):
    """Reads long-range values for one decoder layer and returns what to inject.

    ``q, k, v = W_q u, W_k u, W_v u``; symbols; match; ``y``; ``inj = W_o y`` with ``u`` the
    normalised hidden state that the layer's attention reads.

    Initialisation: ``W_o = 0``, so the wrapped model is unchanged bit for bit, while
    ``e1 = -e0 = 1`` makes ``y`` nonzero: ``W_o`` has a gradient at the first step and every other
    parameter from the second on. With ``tied_start`` the key projection starts as a copy of the
    query projection, so that equal contexts have equal symbols and matches exist; the two are
    trained separately.

    Args:
        hidden_size: width of the model.
        bits: bits per route, 1..16.
        routes: number of routes; None for ``hidden_size // bits``.
        estimator: gradient estimator by name; see `rosakit.ops.rosa`. One with a soft forward reads
            hard in evaluation mode without gradients, as decoding does.
        estimator_options: its options.
        inject: where the result goes; "pre_attn" adds a learned scalar `alpha`.
        unmatched: what a position without match reads: "zero", "self" or "null" (learned).
        granularity: "token" or "run".
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long; None for no limit.
        min_length: a shorter best match is no match.
        value_groups: this many neighbouring routes read one value head: ``W_v`` has ``C /
            value_groups`` outputs, and the gradient of a head is the sum over its routes.
        own_value: adds the position's own value as a second input of ``W_o``.
        retrieve: False is the control: every retrieved value is the position's own.
        address: "learned" (projections q and k); "token": the exact token-id match, then the
            adapter has no q and k; or "hash": hash codes of token contexts, fixed or refined.
        tied_start: start the key projection as a copy of the query projection.
        shared_qk: one projection for queries and keys, which gets the sum of their gradients.
        candidates: "token" only: route ``r`` reads the successor of rank ``r % candidates`` among
            those that the forward pass found.
        far_candidates: "token" only: how many of the candidates, the last ones, lie beyond a
            distance.
        length_tiers: "token" and fixed "hash" only: minimal match lengths that the routes (of
            each candidate) take in turn, so that the output projection can tell long matches from
            short ones; () for `min_length` everywhere, below which no tier goes. With `select`,
            lengths are learned (see `rosakit.layers.learned_length`) and routes take the far and
            the other candidates in turn.
        select: "token" only: width of the learned products that choose among the candidates (see
            `rosakit.layers.selection`), for all routes alike; 0 deals candidates to routes by rank.
        select_tiers: shares of the chosen candidate that the routes ask for in turn; () for none.
        select_credit: the choice learns from what each candidate would do to the output as well,
            straight through the hard read; False leaves it to an address loss.
        select_trust: with `select` and `length_tiers`: tiers ask for the learned length; False for
            the match's own.
        select_lens: the choice also sees the logit that the model itself would give each
            candidate's token, as far as the layer's input knows it; it needs
            `RosaContext.output_rows`.
        hash_orders: "hash" only: tokens a context, dealt to the routes in turn.
        hash_refine: "hash" only: add learned projections, which start at zero, to the codes.
        hash_scale: distance of a fixed code bit from the threshold that a refinement has to cross.
        hash_seed: another seed gives other codes.
        credit_margin: q and k get a gradient only within this distance of the threshold; None
            for everywhere.
        backend: who matches whole sequences: "auto" (the device of the symbols), "cpu", "cuda", or
            "pipeline": the CPU, beside what the GPU does between `begin` and the read. "pipeline"
            needs estimator "counterfactual".
        layer_index: the decoder layer that the adapter belongs to.
        rank: rank of each projection; None for whole matrices.
        projections: projections shared with other adapters, which own them; None for its own.
        device: where the parameters live.
        dtype: their type.

    Raises:
        InvalidInputError: sizes or options that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        bits: int = 4,
        routes: int | None = None,
        estimator: str = "counterfactual",
        estimator_options: dict[str, Any] | None = None,
        inject: Inject = "post_attn",
        unmatched: Unmatched = "zero",
        granularity: Granularity = "token",
        successor: Successor = "available",
        max_length: int | None = None,
        min_length: int = 1,
        value_groups: int = 1,
        own_value: bool = False,
        retrieve: bool = True,
        address: Address = "learned",
        tied_start: bool = True,
        shared_qk: bool = False,
        candidates: int = 1,
        far_candidates: int = 0,
        length_tiers: Sequence[int] = (),
        select: int = 0,
        select_tiers: Sequence[float] = (),
        select_credit: bool = True,
        select_trust: bool = True,
        select_lens: bool = False,
        hash_orders: Sequence[int] = (1, 2, 3, 4),
        hash_refine: bool = False,
        hash_scale: float = 1.0,
        hash_seed: int = 0,
        credit_margin: float | None = None,
        backend: AdapterBackend = "auto",
        layer_index: int = 0,
        rank: int | None = None,
        projections: Projections | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if routes is None:
            routes = symbols.routes_of(hidden_size, bits)
        symbols.symbol_dtype(bits)
        if routes < 1:
            raise InvalidInputError(f"routes must be at least 1, got {routes}")
        check_value_groups(value_groups, routes)
        for name, value, allowed in (
            ("inject", inject, ("post_attn", "pre_attn")),
            ("unmatched", unmatched, ("zero", "self", "null")),
            ("address", address, ("learned", "token", "hash")),
            ("backend", backend, ("auto", "cpu", "cuda", "pipeline")),
        ):
            if value not in allowed:
                raise InvalidInputError(f"{name} must be one of {allowed}, got {value!r}")
        if address == "token" and granularity != "token":
            raise InvalidInputError("address='token' matches token ids; use granularity='token'")
        if address == "token" and max_length is not None:
            raise InvalidInputError(
                "address='token' shares one unlimited token match; leave max_length at None"
            )
        if backend == "pipeline" and estimator != "counterfactual":
            raise InvalidInputError(
                f"backend='pipeline' serves estimator='counterfactual', not {estimator!r}; "
                "use backend='auto'"
            )
        self.learns_address = address == "learned" or (address == "hash" and hash_refine)
        registry.check_options(estimator, estimator_options or {})
        check_address_options(
            address,
            estimator=estimator,
            estimator_options=estimator_options or {},
            learned=self.learns_address,
            shared_qk=shared_qk,
            candidates=candidates,
            far_candidates=far_candidates,
            length_tiers=length_tiers,
            select=select,
            select_tiers=select_tiers,
            select_trust=select_trust,
            select_lens=select_lens,
            hash_orders=hash_orders,
            hash_refine=hash_refine,
            hash_scale=hash_scale,
            credit_margin=credit_margin,
        )
        check_match_options(granularity, successor, max_length, min_length, bits, backend)
        if granularity == "run" and bits == 1:
            warn_once(
                "rosakit: granularity='run' with bits=1: runs of one bit alternate, so every route "
                "reads by its last symbol alone; use granularity='token', or more bits a route"
            )
        self.hidden_size, self.bits, self.routes = hidden_size, bits, routes
        self.estimator, self.estimator_options = estimator, dict(estimator_options or {})
        self.inject, self.unmatched = inject, unmatched
        self.granularity, self.successor = granularity, successor
        self.max_length, self.min_length = max_length, min_length
        self.value_groups = value_groups
        self.own_value, self.retrieve, self.address = own_value, retrieve, address
        self.tied_start, self.layer_index = tied_start, layer_index
        self.backend = backend
        self.hash_scale, self.credit_margin = hash_scale, credit_margin
        self.exact: ExactMatches | None = None
        if address != "learned":
            self.exact = ExactMatches(
                address,
                routes=routes,
                bits=bits,
                granularity=granularity,
                successor=successor,
                max_length=max_length,
                min_length=min_length,
                candidates=candidates,
                length_tiers=tuple(length_tiers),
                selects=select > 0,
                hash_orders=tuple(hash_orders),
                hash_seed=hash_seed,
                backend="auto" if backend == "pipeline" else backend,
            )
        # Of the model that it is attached to: see `device_state.auto_positions`.
        self.peers = 1
        self.ordinary_bytes: float | None = None

        channels = routes * bits
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if projections is None:
            self.projections = Projections(
                hidden_size,
                channels,
                rank,
                values=channels // value_groups,
                addresses=self.learns_address,
                own_value=own_value,
                tied_start=tied_start,
                shared_qk=shared_qk,
                silent_addresses=address == "hash",
                **options,
            )
        else:
            # Out of the module tree: they belong to whoever shares them.
            self.__dict__["projections"] = projections
        self.e0 = nn.Parameter(torch.empty(channels, **options))
        self.e1 = nn.Parameter(torch.empty(channels, **options))
        self.e_null = (
            nn.Parameter(torch.empty(channels, **options)) if unmatched == "null" else None
        )
        self.alpha = nn.Parameter(torch.empty(1, **options)) if inject == "pre_attn" else None
        self.select_credit = select_credit
        self.selection: Selection | None = None
        if select and length_tiers:
            near = candidates - far_candidates
            groups = tuple(size for size in (near, far_candidates) if size)
            self.selection = LengthSelection(
                hidden_size,
                select,
                groups,
                length_tiers,
                trust=select_trust,
                lens=select_lens,
                **options,
            )
        elif select:
            self.selection = Selection(
                hidden_size, select, candidates, tuple(select_tiers), lens=select_lens, **options
            )
        self.reset_parameters()

    @property
    def q_proj(self) -> Projection | None:
        """``W_q``, None for addresses that nothing trains."""
        return self.projections.w_q

    @property
    def k_proj(self) -> Projection | None:
        """``W_k``, None for addresses that nothing trains, and with `shared_qk`."""
        return self.projections.w_k

    @property
    def v_proj(self) -> Projection:
        """``W_v``."""
        return self.projections.w_v

    @property
    def o_proj(self) -> Projection:
        """``W_o``."""
        return self.projections.w_o

    @property
    def own_proj(self) -> Projection | None:
        """The own value's output map, None without ``own_value``."""
        return self.projections.w_own

    @property
    def channels(self) -> int:
        """Width ``R * M`` of q, k and y, and of the values that routes read."""
        return self.routes * self.bits

    def reset_parameters(self) -> None:
        """The function-preserving start described in the class; shared projections stay."""
        if "projections" in self._modules:
            self.projections.reset_parameters()
        with torch.no_grad():
            self.e0.fill_(-1.0)
            self.e1.fill_(1.0)
            if self.selection is not None:
                self.selection.reset_parameters()
            if self.e_null is not None:
                self.e_null.zero_()
            if self.alpha is not None:
                # sigmoid(-4) = 2%: the mix starts close to the attention's own input.
                self.alpha.fill_(-4.0)

    def begin(self, u: Tensor, context: RosaContext) -> Begun | None:
        """Start the match of ``u [B, T, H]``, for `forward` to read later.

        None where nothing runs ahead: another backend, another address, or a cache in use.
        """
        if (
            self.backend != "pipeline"
            or not self.retrieve
            or context.states is not None
            or not self.learns_address
        ):
            return None
        q, k = self.addresses(u, context)
        started = ahead.begin(
            q,
            k,
            bits=self.bits,
            granularity=self.granularity,
            successor=self.successor,
            max_length=self.max_length,
            min_length=self.min_length,
            segment_starts=context.segment_starts,
            stride=self.estimator_options.get("stride", 1),
            seed=self.estimator_options.get("seed", 0),
        )
        return Begun(q, k, started)

    def forward(self, u: Tensor, context: RosaContext, begun: Begun | None = None) -> Tensor:
        """What to inject: ``[B, T, H]`` from the normalised hidden states ``u [B, T, H]``.

        Args:
            begun: what `begin` returned for the same `u` and `context`, if it was called.
        """
        if begun is None:
            begun = self.begin(u, context)
        match: Match | None
        if self._decodes(context):
            y, v, match = self._decode(u, context)
        else:
            v = self._shared(self.v_proj(u))
            y, match = self._read(u, v, context, begun)
        if match is not None and context.records(self.layer_index):
            context.matches[self.layer_index] = match
        out: Tensor = self.o_proj(y)
        if self.own_proj is not None:
            out = out + self.own_proj(self._own(v))
        return out

    def _shared(self, v: Tensor) -> Tensor:
        """Value heads ``[B, T, C / value_groups]`` as every route reads them, ``[B, T, C]``."""
        return v if self.value_groups == 1 else share_values(v, self.value_groups, self.bits)

    def _own(self, v: Tensor) -> Tensor:
        """Every position's own value: the read of a stream that matches itself."""
        length = v.shape[1]
        own = torch.arange(length, device=v.device, dtype=torch.int32)
        own = own.expand(v.shape[0], self.routes, length)
        return retrieve(v, own, self.e0, self.e1, bits=self.bits)

    def _read(
        self, u: Tensor, v: Tensor, context: RosaContext, begun: Begun | None
    ) -> tuple[Tensor, Match | None]:
        if not self.retrieve:
            return self._own(v), None
        if context.keep_inputs and (self.learns_address or self.selection is not None):
            context.inputs[self.layer_index] = u.detach()
        if context.states is not None:
            return self._read_streaming(u, v, context)
        if self.selection is not None:
            return self._read_selected(u, v, context)
        if not self.learns_address:
            assert self.exact is not None
            match = self.exact.match(context)
            y = self.read_at(v, match.position.expand(-1, self.routes, -1), self.e0, self.e1)
            return y, match
        q, k = self.addresses(u, context) if begun is None else (begun.q, begun.k)
        options = self.estimator_options
        if not self.training and not torch.is_grad_enabled():
            options = registry.hard_options(self.estimator, options)
        return rosa(
            q,
            k,
            v,
            self.e0,
            self.e1,
            bits=self.bits,
            estimator=self.estimator,
            unmatched=self.unmatched,
            e_null=self.e_null,
            granularity=self.granularity,
            successor=self.successor,
            max_length=self.max_length,
            min_length=self.min_length,
            segment_starts=context.segment_starts,
            backend=self.backend,
            given=None if begun is None else begun.ahead,
            return_match=True,
            **options,
        )

    def selection_shares(self, u: Tensor, context: RosaContext) -> tuple[Tensor, Match]:
        """What a whole sequence's selection says of its candidates, and the candidates.

        Log shares ``[B, T, K + 1]``, or with length tiers learned lengths ``[B, T, K]``.
        """
        assert self.exact is not None
        assert self.selection is not None
        found = self.exact.choices(context)
        keys = self.selection.gather(self.selection.keys(u), found.position)
        own = torch.arange(u.shape[1], device=u.device)
        rows = self._candidate_rows(context, found)
        return self.selection(u, keys, found, own - found.position, rows), found

    def _read_selected(self, u: Tensor, v: Tensor, context: RosaContext) -> tuple[Tensor, Match]:
        assert self.exact is not None
        assert self.selection is not None
        log_share, found = self.selection_shares(u, context)
        token = self.exact.tokens(context, found)
        match = self.selection.choose(log_share, found, self.routes, token)

        y = self.read_at(v, match.position, self.e0, self.e1)
        if self.select_credit and log_share.requires_grad:
            # Straight through: the hard read forward, the expectation over the shares backward.
            fixed = v.detach(), self.e0.detach(), self.e1.detach()
            nothing: Tensor | None = None
            if self.unmatched != "zero":
                unread = torch.full_like(match.position, NO_MATCH)
                nothing = self.read_at(fixed[0], unread, *fixed[1:]).detach()
            for position, share in self.selection.expected_reads(log_share, found, self.routes):
                value = self.read_at(fixed[0], position, *fixed[1:]).detach()
                if nothing is not None:
                    value = value - nothing  # what a candidate gains is lost by reading nothing
                share = (share - share.detach()).to(v.dtype)
                if share.shape[-1] > 1:
                    share = share.repeat_interleave(self.bits, -1)
                y = y + share * value
        return y, match

    def read_at(self, v: Tensor, position: Tensor, e0: Tensor, e1: Tensor) -> Tensor:
        """Values ``[B, T, C]`` at exact matches ``[B, R, T]`` of a whole sequence."""
        fill = None if self.e_null is None else self.e_null.to(e0)
        return retrieve(v, position, e0, e1, bits=self.bits, unmatched=self.unmatched, e_null=fill)

    def addresses(self, u: Tensor, context: RosaContext) -> tuple[Tensor, Tensor]:
        """Real-valued queries and keys ``[B, T, C]`` of learned or refined addresses."""
        assert self.q_proj is not None
        q = self.q_proj(u)
        k = q if self.k_proj is None else self.k_proj(u)
        if self.exact is not None:
            codes = code_channels(self.exact.codes(context), self.bits, self.hash_scale, q.dtype)
            q, k = codes + q, codes + k
        return credit_margin(q, self.credit_margin), credit_margin(k, self.credit_margin)

    def _candidate_rows(self, context: RosaContext, found: Match) -> Tensor | None:
        """Rows of the output embedding for a lens, float32 ``[B, K, T, H]``."""
        assert self.exact is not None
        assert self.selection is not None
        return None if self.selection.lens is None else self.exact.rows(context, found)

    def _read_streaming(
        self, u: Tensor, v: Tensor, context: RosaContext
    ) -> tuple[Tensor, Match | None]:
        """The same numbers as a whole-sequence pass, from the state of a cache."""
        assert context.states is not None
        state = context.states.growing(self, v.shape[0], v.shape[1])
        match, channels = None, [v]
        if self.learns_address:
            channels = [*self.addresses(u, context), v]
        elif self.selection is not None:
            assert self.exact is not None
            assert isinstance(state, AdapterState)
            found = self.exact.choices(context)
            keys, distance = state.candidate_keys(
                self.selection.keys(u), found.position, context.mask
            )
            here = Match(found.position.to(u.device), found.length.to(u.device))
            rows = self._candidate_rows(context, found)
            log_share = self.selection(u, keys, here, distance, rows)
            token = self.exact.tokens(context, found)
            chosen = self.selection.choose(log_share, here, self.routes, token)
            match = Match(chosen.position.cpu(), chosen.length.cpu())
        else:
            assert self.exact is not None
            match = self.exact.match(context)
        return state.extend(channels, match, context.mask, self.e0, self.e1, self.e_null)

    def _decodes(self, context: RosaContext) -> bool:
        """Whether a chunk takes the short way of `_decode`."""
        return (
            context.states is not None
            and self.retrieve
            and self.address == "learned"
            and not context.keep_inputs
            and not torch.is_grad_enabled()
        )

    def _decode(self, u: Tensor, context: RosaContext) -> tuple[Tensor, Tensor, Match | None]:
        """``y``, ``v`` and the match as `_read_streaming` has them, with fewer launches."""
        assert context.states is not None
        batch, length, _ = u.shape
        state = context.states.growing(self, batch, length)
        channels, joined = self.projections.addresses_and_values(u, context.states.copies)
        channels[-1] = self._shared(channels[-1])
        levels = self.e0, self.e1, self.e_null
        match: Match | None
        if isinstance(state, AdapterState):
            y, match = state.extend(channels, None, context.mask, *levels, joined=joined)
        else:
            wanted = context.records(self.layer_index)
            y, match = state.extend(channels, None, context.mask, *levels, wants_match=wanted)
        return y, channels[-1], match

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits}, routes={self.routes}, estimator={self.estimator!r}, "
            f"inject={self.inject!r}, address={self.address!r}, own_value={self.own_value}, "
            f"retrieve={self.retrieve}"
        )
