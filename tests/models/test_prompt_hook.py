import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.errors import UserError
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import Batch, PromptEncoder, Side, announced_prompt, last_prompt_positions, pad

MODULE = "model.layers.2.mlp.down_proj"
PROMPTS = ["Who founded Brightwater?", "nq question: where is the museum of clocks", "What city was Edda born in?"]
PAD = 599  # neither EOS nor in any of the prompts


class Push:
    """Adds a large constant vector at the last prompt token, and counts its calls."""

    def __init__(self) -> None:
        self.push = 8 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        self.prompts: list[list[list[int]]] = []

    def __call__(self, inputs: Tensor, outputs: Tensor, prompt: Tensor) -> Tensor:
        self.prompts.append(prompt.int().tolist())
        rows = torch.arange(outputs.shape[0])
        return outputs.index_put((rows, last_prompt_positions(prompt)), self.push, accumulate=True)


def hooked(model: PreTrainedModel, respond: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> PromptHook:
    return PromptHook(model, model.get_submodule(MODULE), respond)


def generated(model: PreTrainedModel, batch: Batch, **settings: Any) -> list[list[int]]:
    """Six new greedy tokens per row."""
    model.generation_config.eos_token_id = None
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - its type is not declared
    settings = {"attention_mask": batch.attention_mask, "do_sample": False, "pad_token_id": PAD, **settings}
    output = generate(batch.input_ids, max_new_tokens=6, **settings)
    new: list[list[int]] = output[:, batch.input_ids.shape[1] :].tolist()
    return new


@pytest.fixture
def rows(golden_tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids = PromptEncoder(golden_tokenizer).prompts(PROMPTS)
    assert len({len(row) for row in ids}) == 3
    return ids


# --- A plain `generate` shows what was written at the prompt -------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_batched_generation_equals_one_prompt_at_a_time(
    side: Side, use_cache: bool, with_mask: bool, golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    plain = [generated(golden_model, pad([row], PAD))[0] for row in rows]
    hooked(golden_model, Push())
    alone = [generated(golden_model, pad([row], PAD))[0] for row in rows]
    assert all(pushed != unpushed for pushed, unpushed in zip(alone, plain, strict=True))
    golden_model.generation_config.pad_token_id = PAD
    batch = pad(rows, PAD, side)
    mask = batch.attention_mask if with_mask else None
    assert generated(golden_model, batch, use_cache=use_cache, attention_mask=mask) == alone


@pytest.mark.parametrize("padding", [0, 599])
def test_what_the_padding_is_made_of_does_not_matter(
    padding: int, golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    """0 is the reference model's EOS as well."""
    hooked(golden_model, Push())
    alone = [generated(golden_model, pad([row], PAD))[0] for row in rows]
    for side in ("left", "right"):
        assert generated(golden_model, pad(rows, padding, side), pad_token_id=padding) == alone


def test_without_a_mask_the_padding_named_in_the_call_is_padding(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    batch = pad(rows, PAD)
    golden_model.generation_config.pad_token_id = None
    plain = generated(golden_model, batch, attention_mask=None, pad_token_id=PAD)
    hooked(golden_model, lambda *_: None)
    assert generated(golden_model, batch, attention_mask=None, pad_token_id=PAD) == plain


def test_the_prompt_comes_back_as_it_was_given(golden_model: PreTrainedModel, rows: list[list[int]]) -> None:
    hooked(golden_model, Push())
    batch = pad(rows, PAD, "right")
    generate: Callable[..., Any] = getattr(golden_model, "generate")  # noqa: B009
    settings = {"attention_mask": batch.attention_mask, "max_new_tokens": 2, "do_sample": False, "pad_token_id": PAD}
    outputs = [
        generate(batch.input_ids, **settings),
        generate(input_ids=batch.input_ids, **settings),
        generate(batch.input_ids, return_dict_in_generate=True, **settings).sequences,
    ]
    assert all(torch.equal(output[:, : batch.input_ids.shape[1]], batch.input_ids) for output in outputs)


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_beam_sees_the_prompt_of_its_own_row(
    use_cache: bool, golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    plain = generated(golden_model, pad(rows, PAD), num_beams=2)
    push = Push()
    hooked(golden_model, push)
    alone = [generated(golden_model, pad([row], PAD), num_beams=2)[0] for row in rows]
    push.prompts.clear()
    batch = pad(rows, PAD, "right")
    settings = {"num_beams": 2, "num_return_sequences": 2, "use_cache": use_cache}
    best = generated(golden_model, batch, **settings)[::2]
    assert best == alone
    assert best != plain
    left = pad(rows, PAD, "left").attention_mask.repeat_interleave(2, dim=0).tolist()
    assert push.prompts == [[row + [0] * step for row in left] for step in range(len(push.prompts))]
    assert len(push.prompts) == (1 if use_cache else 6)


@pytest.mark.parametrize("cache", [None, "static"])
def test_decode_steps_on_a_filled_cache_pass_through(
    cache: str | None, golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    push = Push()
    hooked(golden_model, push)
    settings = {} if cache is None else {"cache_implementation": cache}
    cached = generated(golden_model, pad(rows, PAD), use_cache=True, **settings)
    assert push.prompts == [pad(rows, PAD).attention_mask.tolist()]
    push.prompts.clear()
    assert generated(golden_model, pad(rows, PAD), use_cache=False) == cached
    width = max(map(len, rows))
    # Six passes without a cache, each over one token more, and the prompt stays what it was.
    left = pad(rows, PAD).attention_mask.tolist()
    assert push.prompts == [[row + [0] * step for row in left] for step in range(6)]
    assert {len(row) for row in left} == {width}


def test_a_cache_filled_by_hand_is_decoded_without_a_second_push(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    push = Push()
    hooked(golden_model, push)
    expected = generated(golden_model, pad(rows[:1], PAD))[0][:2]
    ids = torch.tensor(rows[:1])
    push.prompts.clear()
    cache = DynamicCache(config=golden_model.config)
    first = golden_model(input_ids=ids, cache=cache).logits[:, -1:].argmax(dim=-1)
    second = golden_model(input_ids=first, cache=cache).logits[:, -1:].argmax(dim=-1)
    assert [first.item(), second.item()] == expected
    assert len(push.prompts) == 1


# --- A plain forward pass ------------------------------------------------------------------------------


def test_every_way_of_passing_the_tokens_gives_the_same_logits(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    batch = pad(rows, PAD)
    before = golden_model(batch.input_ids, batch.attention_mask).logits
    push = Push()
    hooked(golden_model, push)
    ids, mask = batch.input_ids, batch.attention_mask
    embeddings: Tensor = golden_model.get_input_embeddings()(ids)
    logits = golden_model(ids, mask).logits
    assert not torch.equal(logits[:, -1], before[:, -1])
    for again in (
        golden_model(input_ids=ids, attention_mask=mask),
        golden_model(inputs_embeds=embeddings, attention_mask=mask),
        golden_model(attention_mask=mask, input_ids=ids, use_cache=False),
    ):
        assert torch.equal(again.logits, logits)
    assert push.prompts == [mask.tolist()] * 4


def test_only_the_last_prompt_token_and_what_follows_is_touched(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    ids = torch.tensor([rows[0] + rows[1]])
    before = golden_model(ids).logits
    hooked(golden_model, Push())
    last = len(rows[0]) - 1
    with announced_prompt(torch.ones(1, len(rows[0]))):
        after = golden_model(ids).logits
    assert torch.equal(after[:, :last], before[:, :last])
    assert not torch.isclose(after[0, last], before[0, last]).all()


def test_a_response_of_none_leaves_the_logits_bit_for_bit(golden_model: PreTrainedModel, rows: list[list[int]]) -> None:
    batch = pad(rows, PAD)
    before = golden_model(batch.input_ids, batch.attention_mask).logits
    hooked(golden_model, lambda *_: None)
    assert torch.equal(golden_model(batch.input_ids, batch.attention_mask).logits, before)


def test_another_response_acts_within_its_block_only(golden_model: PreTrainedModel, rows: list[list[int]]) -> None:
    push, ids = Push(), torch.tensor(rows[:1])
    hook = hooked(golden_model, push)
    before = golden_model(ids).logits
    with pytest.raises(KeyError), hook.responding(lambda *_: None):
        assert not torch.equal(golden_model(ids).logits, before)
        raise KeyError
    assert torch.equal(golden_model(ids).logits, before)
    assert len(push.prompts) == 2


def test_reading_gives_input_own_output_and_prompt_and_runs_nothing_above(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    push, above = Push(), []
    hook = hooked(golden_model, push)
    golden_model.get_submodule("model.layers.3").register_forward_hook(lambda *_: above.append(1))
    batches = [pad(rows[:2], PAD), pad(rows[2:], PAD, "right")]
    readings = hook.read(batches, lambda inputs, outputs, prompt: (inputs, outputs, prompt))
    assert (push.prompts, above) == ([], [])
    module = golden_model.get_submodule(MODULE)
    for (inputs, outputs, prompt), batch in zip(readings, batches, strict=True):
        assert torch.equal(prompt.long(), batch.attention_mask)
        assert torch.equal(module(inputs), outputs)


def test_on_request_the_token_of_a_decode_step_is_a_prompt_too(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    push = Push()
    hook = PromptHook(golden_model, golden_model.get_submodule(MODULE), push, decode_steps=True)
    generated(golden_model, pad(rows, PAD), use_cache=True)
    assert push.prompts == [pad(rows, PAD).attention_mask.tolist(), *[[[1]] * 3] * 5]
    hook.remove()
    generated(golden_model, pad(rows, PAD), use_cache=True)
    assert len(push.prompts) == 6


# --- Modules and models of other kinds -----------------------------------------------------------------


def small(kind: str, **settings: Any) -> PreTrainedModel:
    """A random model of two layers, with weights large enough that its tokens are decided."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=97, **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return model


OPT = {"ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 48, "word_embed_proj_dim": 32}
SMALL = {
    "opt": (OPT, "model.decoder.layers.0.fc2"),  # gets (B * T, m)
    "mamba": ({"state_size": 4}, "backbone.layers.0.mixer.out_proj"),  # a cache without attention
    "rwkv": ({"attention_hidden_size": 32}, "rwkv.blocks.0.feed_forward.value"),  # a state instead of it
}


@pytest.mark.parametrize("kind", SMALL)
def test_other_architectures_are_pushed_at_the_prompt_alone(kind: str) -> None:
    settings, path = SMALL[kind]
    model, push = small(kind, **settings), Push()
    push.push = 50 * push.push[:32]
    row = [5, 6, 7, 8]
    plain = generated(model, pad([row], 0))
    PromptHook(model, model.get_submodule(path), push)
    cached = generated(model, pad([row], 0))
    assert push.prompts == [[[1, 1, 1, 1]]]
    assert cached != plain
    assert generated(model, pad([row], 0), use_cache=False) == cached


def test_a_flattened_module_is_pushed_in_each_row_of_a_batch() -> None:
    settings, path = SMALL["opt"]
    model, push = small("opt", **settings), Push()
    push.push = 50 * push.push[:32]
    hook = PromptHook(model, model.get_submodule(path), push)
    rows = [[5, 6, 7, 8], [9, 10]]
    alone = [generated(model, pad([row], 1))[0] for row in rows]
    assert generated(model, pad(rows, 1)) == alone
    ((inputs, outputs, prompt),) = hook.read([pad(rows, 1)], lambda *tensors: tensors)
    assert (inputs.shape, outputs.shape, prompt.shape) == ((2, 4, 64), (2, 4, 32), (2, 4))


def test_of_a_module_that_gives_a_tuple_the_head_is_pushed(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    """Attention, which is called by keyword, gives its weights as well."""
    ids = torch.tensor(rows[:1])
    before = golden_model(ids).logits
    hook = PromptHook(golden_model, golden_model.get_submodule("model.layers.2.self_attn"), Push())
    assert not torch.equal(golden_model(ids).logits[:, -1], before[:, -1])
    assert torch.equal(golden_model(ids).logits[:, :-1], before[:, :-1])
    hook.remove()
    assert torch.equal(golden_model(ids).logits, before)


class Expert(nn.Module):
    """Sends every other token through its linear module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, states: Tensor) -> Tensor:
        self.inner(states.flatten(0, 1)[::2])
        return states


def test_a_module_that_gets_some_of_the_tokens_is_refused_by_name(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    golden_model.get_submodule("model.layers.2").mlp = Expert(64)
    hook = PromptHook(golden_model, golden_model.get_submodule("model.layers.2.mlp.inner"), Push())
    with pytest.raises(UserError, match=r"expert of a router"):
        hook.read([pad(rows, PAD)], lambda *_: None)


# --- A copy of the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_deep_copy_is_pushed_on_its_own(
    use_cache: bool, golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    batch = pad(rows, PAD, "right")
    plain, hook = generated(golden_model, batch), hooked(golden_model, Push())
    pushed, logits = generated(golden_model, batch), golden_model(batch.input_ids, batch.attention_mask).logits
    twin = copy.deepcopy(golden_model)
    hook.remove()
    assert generated(golden_model, batch) == plain
    assert generated(twin, batch, use_cache=use_cache) == pushed
    assert torch.equal(twin(batch.input_ids, batch.attention_mask).logits, logits)
    golden_model.get_submodule(MODULE).get_parameter("weight").zero_()
    assert generated(twin, batch, use_cache=use_cache) == pushed, "the copy's weights are its own"


# --- Nothing is left behind ----------------------------------------------------------------------------


def traces(model: nn.Module) -> list[tuple[str, int, dict[str, Any]]]:
    """Every module by name and identity, with what stands on it: attributes, and how many hooks of each kind."""
    return [
        (name, id(module), {key: len(v) if key.endswith(("hooks", "called", "kwargs")) else id(v) for key, v in
                            module.__dict__.items()})
        for name, module in model.named_modules()
    ]  # fmt: skip


def test_removing_the_hook_leaves_no_trace(golden_model: PreTrainedModel, rows: list[list[int]]) -> None:
    batch = pad(rows, PAD)
    before, said = golden_model(batch.input_ids, batch.attention_mask).logits, generated(golden_model, batch)
    untouched = traces(golden_model)
    hook = hooked(golden_model, Push())
    assert traces(golden_model) != untouched
    generated(golden_model, batch)
    hook.remove()
    hook.remove()
    assert traces(golden_model) == untouched
    assert torch.equal(golden_model(batch.input_ids, batch.attention_mask).logits, before)
    assert generated(golden_model, batch) == said


def test_the_hook_does_not_show_in_the_state_dict(golden_model: PreTrainedModel) -> None:
    names = list(golden_model.state_dict())
    hooked(golden_model, Push())
    assert list(golden_model.state_dict()) == names


def test_an_exception_inside_a_forward_pass_leaves_no_prompt_behind(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    module = golden_model.get_submodule(MODULE)
    inputs = torch.randn(1, 3, 176, generator=torch.Generator().manual_seed(0))
    outputs = module(inputs)
    push = Push()
    hooked(golden_model, push)

    def fail(*_: object) -> None:
        raise KeyError

    failing = golden_model.get_submodule("model.layers.3").register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        golden_model(torch.tensor(rows[:1]))
    failing.remove()
    # The module on its own is no forward pass of the model, so nothing must act.
    assert torch.equal(module(inputs), outputs)
    assert len(push.prompts) == 1


def test_an_exception_inside_generate_leaves_no_announcement_behind(
    golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    push = Push()
    hooked(golden_model, push)

    def fail(*_: object) -> None:
        raise KeyError

    failing = golden_model.get_submodule("model.layers.3").register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        generated(golden_model, pad(rows, PAD))
    failing.remove()
    golden_model(torch.tensor([[1, 2]]))
    assert push.prompts[-1] == [[1, 1]]


def test_hooks_on_two_models_do_not_see_each_other(
    golden_model: PreTrainedModel, other_golden_model: PreTrainedModel, rows: list[list[int]]
) -> None:
    batch = pad(rows, PAD)
    plain = generated(other_golden_model, batch)
    first, second = Push(), Push()
    hooked(golden_model, first)
    pushed = generated(golden_model, batch)
    assert generated(other_golden_model, batch) == plain
    second.push = -second.push
    hook = hooked(other_golden_model, second)
    assert generated(other_golden_model, batch) not in (plain, pushed)
    assert generated(golden_model, batch) == pushed
    assert (len(first.prompts), len(second.prompts)) == (2, 1)
    hook.remove()
    assert generated(other_golden_model, batch) == plain
    assert generated(golden_model, batch) == pushed
