"""attach and detach: nothing changes that should not, and every misfit is named."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaModel,
    StableLmConfig,
    StableLmForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rosakit.errors import InvalidInputError, InvalidTypeError, UnsupportedModelError
from rosakit.tuning import (
    RosaConfig,
    adapters_of,
    attach,
    config_of,
    detach,
    freeze_base,
    is_attached,
    record_matches,
    rosa_parameters,
)
from tests.tuning.tiny import FAMILIES, attached, build, tokens

EVERYTHING = {"window": 9, "token_route": True, "own_value": True, "global_layers": (0,)}


def snapshot(model):
    """Everything that attach could leave behind."""
    return {
        name: (
            type(module).__name__,
            sorted(module._modules),
            sorted(module._parameters),
            sorted(k for k in vars(module) if not k.startswith("_")),
            [len(getattr(module, t)) for t in vars(module) if t.endswith(("hooks", "kwargs"))],
            len(module._forward_hooks_always_called),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inject", ["post_attn", "pre_attn"])
@pytest.mark.parametrize("address", ["learned", "token"])
@torch.no_grad()
def test_adapters_start_without_any_effect(family, inject, address):
    model, ids = build(family), tokens(2, 30)
    full = model(ids, use_cache=False).logits
    options = {"inject": inject, "address": address, "own_value": True, "unmatched": "null"}
    attach(model, RosaConfig(window=None, **options))
    assert torch.equal(model(ids, use_cache=False).logits, full)
    assert torch.equal(model(ids, use_cache=True).logits, full)
    detach(model)
    attach(model, RosaConfig(window=64, **options))  # wider than the text
    assert torch.equal(model(ids, use_cache=False).logits, full)
    detach(model)
    attach(model, RosaConfig(window=7, adapters=False))
    windowed = model(ids, use_cache=False).logits
    detach(model)
    attach(model, RosaConfig(window=7, **options))
    assert torch.equal(model(ids, use_cache=False).logits, windowed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_detach_restores_the_model_exactly(family):
    model, ids = build(family), tokens(2, 30)
    before, logits = snapshot(model), model(ids).logits
    config = copy.deepcopy(model.config.to_dict())
    implementation = model.config._attn_implementation
    for options in (EVERYTHING, {**EVERYTHING, "inject": "pre_attn"}, {"window": None}):
        attach(model, RosaConfig(**options))
        assert is_attached(model)
        assert model.config.to_dict() == config
        model(ids)
        assert detach(model) is model
        assert not is_attached(model)
        assert snapshot(model) == before
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
def test_hooks_of_others_survive():
    model = build()
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(
        lambda *_: seen.append("attention")
    )
    attach(model, RosaConfig(**EVERYTHING))
    model(tokens(1, 5))
    detach(model)
    model(tokens(1, 5))
    assert seen == ["attention", "attention"]
    handle.remove()


@pytest.mark.parametrize("inject", ["post_attn", "pre_attn"])
@torch.no_grad()
def test_a_deepcopy_is_independent(inject):
    model, ids = attached(inject=inject, **EVERYTHING), tokens(2, 30)
    logits = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, logits)
    for parameter in rosa_parameters(twin).values():
        parameter.mul_(3)
    assert not torch.allclose(twin(ids).logits, logits)
    assert torch.equal(model(ids).logits, logits)
    detach(model)
    wanted = model(ids).logits
    detach(twin)
    assert torch.equal(twin(ids).logits, wanted)


@torch.no_grad()
def test_an_attached_model_can_be_pickled():
    model, ids = attached(**EVERYTHING), tokens(1, 20)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twin = torch.load(stream, weights_only=False)
    assert torch.equal(twin(ids).logits, model(ids).logits)


@torch.no_grad()
def test_pre_attn_is_the_formula():
    """``attn(norm((1 - s) h + s inj))``, recomputed from a layer's parts."""
    model, ids = attached(inject="pre_attn", window=None, layers=(1,)), tokens(1, 20)
    seen = {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    layer.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(u=kwargs["hidden_states"], kwargs=kwargs),
        with_kwargs=True,
    )
    model(ids, use_cache=False)
    h = seen["h"]
    adapter = adapters_of(model)[1]
    injected = adapter(layer.input_layernorm.forward(h), seen["kwargs"]["rosa_context"].rosa)
    share = torch.sigmoid(adapter.alpha)
    wanted = layer.input_layernorm.forward((1 - share) * h + share * injected)
    assert injected.abs().max() > 0.1
    torch.testing.assert_close(seen["u"], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_post_attn_is_the_formula():
    model, ids = attached(window=None, layers=(1,)), tokens(1, 20)
    layer = model.model.layers[1]
    seen = {}
    hook = layer.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(out=out[0], kwargs=kwargs), with_kwargs=True
    )
    model(ids, use_cache=False)
    hook.remove()
    kwargs = seen["kwargs"]
    injected = adapters_of(model)[1](kwargs["hidden_states"], kwargs["rosa_context"].rosa)
    own = layer.self_attn.forward(**kwargs)[0]
    assert injected.abs().max() > 0.1
    torch.testing.assert_close(seen["out"], own + injected)


def test_only_the_chosen_layers_get_adapters():
    model = attach(build(), RosaConfig(layers=(0, -1), bits=2, routes=3))
    assert sorted(adapters_of(model)) == [0, 2]
    assert {name.split(".")[1] for name in rosa_parameters(model)} == {"0", "2"}
    assert adapters_of(model)[0].q_proj.weight.shape == (6, 32)
    assert config_of(model).layers == (0, -1)
    assert not hasattr(model.model.layers[1], "rosa")


def test_freeze_base_leaves_rosakit_trainable():
    model = attach(build(), RosaConfig(token_route=True))
    freeze_base(model)
    own = {id(p) for p in rosa_parameters(model).values()}
    assert all(p.requires_grad == (id(p) in own) for p in model.parameters())
    assert len(own) == sum(1 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@torch.no_grad()
def test_adapter_dtype(base):
    model = build().to(getattr(torch, base))
    attach(model, RosaConfig(token_route=True, window=9))
    assert {p.dtype for p in rosa_parameters(model).values()} == {torch.float32}
    assert model(tokens(1, 20)).logits.dtype == getattr(torch, base)
    detach(model)
    attach(model, RosaConfig(adapter_dtype="auto"))
    assert {p.dtype for p in rosa_parameters(model).values()} == {getattr(torch, base)}
    model(tokens(1, 20))


@torch.no_grad()
def test_logits_to_keep_picks_the_same_positions():
    model, ids = attached(**EVERYTHING), tokens(2, 30)
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=4).logits, logits[:, -4:])
    picked = torch.tensor([3, 17])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, logits[:, picked])


@torch.no_grad()
def test_the_token_route_gives_log_probabilities_and_the_loss_sees_them():
    model, ids = attached(**EVERYTHING), tokens(2, 30)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(2, 30))
    wanted = -out.logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(out.loss, wanted)


@torch.no_grad()
def test_nothing_of_a_pass_is_kept_even_after_an_error():
    model = attached(**EVERYTHING)
    model(tokens(1, 9))
    assert model.rosa._candidates is None
    assert model.rosa.shared.current is None
    with pytest.raises(ValueError, match="2-D"):
        model(tokens(1, 9), attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(IndexError):
        model(torch.full((1, 9), 10_000))
    assert model.rosa._candidates is None
    assert model.rosa.shared.current is None
    model(tokens(1, 9))


@torch.no_grad()
def test_recorded_matches():
    model = attached(layers=(0, 2), **{**EVERYTHING, "global_layers": ()})
    with record_matches(model) as seen:
        model(tokens(2, 20), use_cache=False)
        model(tokens(2, 5), use_cache=True)
    assert [sorted(context.matches) for context in seen] == [[0, 2], [0, 2]]
    assert seen[0].matches[2].position.shape == (2, 8, 20)
    assert seen[0].candidates.token.shape == (2, 20, 4)
    model(tokens(2, 20))
    assert len(seen) == 2


@torch.no_grad()
def test_a_bare_decoder_can_be_attached():
    torch.manual_seed(0)
    model = LlamaModel(build().config).eval()
    ids = tokens(1, 20)
    before = model(ids).last_hidden_state
    attach(model, RosaConfig(window=64))
    assert torch.equal(model(ids).last_hidden_state, before)
    detach(model)
    with pytest.raises(UnsupportedModelError, match=r"output embedding, but LlamaModel has none"):
        attach(model, RosaConfig(token_route=True))
    assert torch.equal(model(ids).last_hidden_state, before)


def tiny_config(kind, **changes):
    return kind(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **changes,
    )


def with_implementation(model, name):
    """As if the model had been loaded so (its package may be missing here)."""
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize(
    "make,options,kind,message",
    [
        (build, {"bits": 5}, InvalidInputError, r"hidden size 32 is not divisible by 5 bits.*1, 2"),
        (build, {"layers": (7,)}, InvalidInputError, r"names layers \[7\], but the model has 3"),
        (build, {"layers": (0, -3)}, InvalidInputError, "names a layer twice"),
        (build, {"global_layers": (3,)}, InvalidInputError, "global_layers names layers"),
        (build, {"estimator": "magic"}, InvalidInputError, "magic"),
        (lambda: nn.Linear(2, 2), {}, InvalidTypeError, "got Linear"),
        (
            lambda: with_implementation(build(), "flash_attention_2"),
            {},
            UnsupportedModelError,
            "attn_implementation='flash_attention_2', which computes no window",
        ),
        (
            lambda: Gemma2ForCausalLM(tiny_config(Gemma2Config, attn_logit_softcapping=None)),
            {"window": None, "token_route": True},
            UnsupportedModelError,
            "final_logit_softcapping=30",
        ),
        (
            lambda: GraniteForCausalLM(tiny_config(GraniteConfig, logits_scaling=8.0)),
            {"token_route": True},
            UnsupportedModelError,
            "logits_scaling=8.0",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
            ),
            {},
            UnsupportedModelError,
            "encoder-decoder",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_misfits_are_named_and_leave_the_model_alone(make, options, kind, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        attach(model, RosaConfig(**options))
    assert snapshot(model) == before


def test_attaching_twice_or_detaching_nothing():
    model = build()
    with pytest.raises(InvalidInputError, match="not attached"):
        detach(model)
    attach(model, RosaConfig())
    with pytest.raises(InvalidInputError, match="attached already"):
        attach(model, RosaConfig())
    with pytest.raises(InvalidInputError, match="attached already through another"):
        attach(model.model, RosaConfig())
    with pytest.raises(InvalidInputError, match="shares its config object"):
        attach(type(model)(model.config), RosaConfig())
    with pytest.raises(InvalidTypeError, match="RosaConfig"):
        attach(build(), {"window": 4})


def test_an_attention_that_bypasses_the_interface_is_noticed():
    model = attach(build(), RosaConfig(window=4, adapters=False))
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="only 2 of 3 layers"):
        model(tokens(1, 9))


@pytest.mark.parametrize("options", [{}, {"address": "token", "inject": "pre_attn"}], ids=str)
@torch.no_grad()
def test_whole_sequences_compile_into_one_graph(options):
    model, ids = attached(**{"window": 6, **options}), tokens(2, 40)
    wanted = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)


def stablelm():
    """An architecture that hands no keyword arguments down to its attention."""
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return StableLmForCausalLM(config)


def test_architectures_that_pass_no_keywords_down():
    model, ids = stablelm().eval(), tokens(2, 30)
    attach(model, RosaConfig(window=6, token_route=True))
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :11], use_cache=True)
        rest = model(ids[:, 11:], past_key_values=out.past_key_values)
    got = torch.cat([out.logits, rest.logits], 1)
    torch.testing.assert_close(got, whole, atol=3e-5, rtol=1e-4)
    model.train()
    model(ids, labels=ids).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    # The forward pass says so, not the backward pass after it.
    with pytest.raises(UnsupportedModelError, match=r"checkpointing cannot be used here.*_disable"):
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids)
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()


@torch.no_grad()
def test_beside_lora():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(build(), lora)
    base, ids = wrapped.get_base_model(), tokens(2, 30)
    before = base(ids).logits
    attach(base, RosaConfig(window=64))
    assert torch.equal(wrapped(input_ids=ids).logits, before)
    freeze_base(base)
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "lora" in n)
    detach(base)
    assert torch.equal(wrapped(input_ids=ids).logits, before)
    with pytest.raises(InvalidTypeError, match="unwrap peft"):
        attach(wrapped, RosaConfig())
