import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModel, AutoModelForCausalLM

import lstm_twin
import seqba.modules.embedding_dropout
import seqba.modules.weight_dropout
from seqba import (
    CarriedState,
    TrainStep,
    audit_masks,
    copies_of_pass,
    count_targets,
    linear_cross_entropy,
    repeat_batch,
)
from seqba.modules import activation_regularisation, temporal_activation_regularisation
from seqba.modules.mask_scope import dropout_masks
from tasks.language_modelling import AwdLstmConfig, AwdLstmForCausalLM

VOCABULARY, B, T = 11, 2, 6
DROPOUTS = ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout")
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)
PLANS = [(1, 1), (3, 3), (3, 2), (3, 1), (4, 2)]  # (M, K)


def tiny(**settings):
    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 4, "hidden_size": 5, "initializer_range": 0.8}
    return AwdLstmForCausalLM(AwdLstmConfig(**{**sizes, **settings})).train()


def windows(number=3):
    """Consecutive windows of B streams, with the next tokens as labels."""
    text = torch.randint(VOCABULARY, (B, number * T + 1))
    return [{"input_ids": text[:, i : i + T], "labels": text[:, i + 1 : i + 1 + T]} for i in range(0, number * T, T)]


def regularised_loss(model, batch, state):
    """Summed nats, AR and TAR of a window's rows, and the state after it."""
    output = model.model(batch["input_ids"], state)
    targets = count_targets(batch["labels"])
    nll = linear_cross_entropy(output.last_hidden_state, model.lm_head.weight, batch["labels"], bias=model.lm_head.bias)
    penalty = 2 * activation_regularisation(output.last_hidden_state, targets)
    return nll + penalty + temporal_activation_regularisation(output.raw_hidden_state, targets), output.state


def train(model, data, num_copies, copies_per_pass, *, copy_seed=None, lr=0.5):
    """Updates over windows; returns the state dict at the end and what is carried."""
    carried = CarriedState(model.model.initial_state, dim=1)

    def loss_fn(model, rows):
        loss, state = regularised_loss(model, rows, carried.take(len(rows["input_ids"])))
        carried.keep(state)
        return loss

    step = TrainStep(
        Accelerator(cpu=True),
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        loss_fn=loss_fn,
        count_fn=lambda rows: count_targets(rows["labels"]),
        num_copies=num_copies,
        copies_per_pass=copies_per_pass,
        copy_seed=copy_seed,
        carried=[carried],
    )
    for update, window in enumerate(data, start=1):
        step([window], update=update)
    return {name: x.detach().clone() for name, x in model.state_dict().items()}, carried


def assert_equal_states(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


# ---- the model


def test_the_defaults_are_the_papers_model():
    model = AwdLstmForCausalLM(AwdLstmConfig())
    assert sum(p.numel() for p in model.parameters()) == 24_221_600
    embedding = model.get_input_embeddings().weight
    assert embedding is model.lm_head.weight
    assert 0.0999 < float(embedding.detach().abs().max()) <= 0.1
    assert not bool(model.lm_head.bias.any())
    sizes = [(layer.input_size, layer.width) for layer in model.model.layers]
    assert sizes == [(400, 1150), (1150, 1150), (1150, 400)]
    config = model.config
    assert [getattr(config, name) for name in DROPOUTS] == [0.4, 0.25, 0.4, 0.1, 0.5]


def test_outputs_states_and_gradients_follow_the_equations_under_given_masks(monkeypatch):
    model, num_copies = tiny().double(), 2
    words, weights, locked = [], [], []

    def given(collected, module):
        def spy(like, p, mask_scope):
            collected.append(dropout_masks(like, p, mask_scope))
            return collected[-1]

        monkeypatch.setattr(module, "dropout_masks", spy)

    def given_locked(module, args, output):
        rows, _, width = args[0].shape
        locked.append(torch.randint(2, (rows, 1, width)).double() / (1 - module.p))
        return args[0] * locked[-1]

    given(words, seqba.modules.embedding_dropout)
    given(weights, seqba.modules.weight_dropout)
    for name in ("input_dropout", "hidden_dropout", "output_dropout"):
        getattr(model.model, name).register_forward_hook(given_locked)
    batch = repeat_batch(windows(1)[0], num_copies)
    state = [(torch.randn_like(h), torch.randn_like(c)) for h, c in model.model.initial_state(num_copies * B)]
    with copies_of_pass(range(num_copies)):
        got, got_state = regularised_loss(model, batch, state)

    # Merity et al. 2018, copy by copy
    parts, dropped, raw, want_state = locked, [], [], []
    for m in range(num_copies):
        rows = slice(m * B, (m + 1) * B)
        embedding = model.model.embedding.weight * words[0][m].unsqueeze(1)
        hidden = embedding[batch["input_ids"][rows]] * parts[0][rows]
        for i, layer in enumerate(model.model.layers):
            size, units = layer.width, weights[i].shape[-1]
            mask = weights[i][m].view(4, units, units)[:, :size, :size].reshape(4 * size, size)
            w_ih, w_hh, b_ih, b_hh = layer.parameters()
            h, c = (part[0, rows] for part in state[i])
            output, h, c = lstm_twin.lstm(hidden, h, c, w_ih, w_hh * mask, b_ih, b_hh)
            hidden = output * parts[i + 1][rows]
            want_state.append((h, c))
        dropped.append(hidden)
        raw.append(output)
    hidden, output = torch.cat(dropped), torch.cat(raw)
    log_p = F.log_softmax(hidden @ model.model.embedding.weight.T + model.lm_head.bias, dim=-1)
    n = num_copies * B * T
    want = -log_p.gather(-1, batch["labels"].unsqueeze(-1)).sum()
    want = want + n * (2 * (hidden**2).mean() + ((output[:, 1:] - output[:, :-1]) ** 2).mean())

    torch.testing.assert_close(got, want)
    for i, (h, c) in enumerate(got_state):
        for m in range(num_copies):
            want_h, want_c = want_state[m * len(got_state) + i]
            torch.testing.assert_close(h[0, m * B : (m + 1) * B], want_h)
            torch.testing.assert_close(c[0, m * B : (m + 1) * B], want_c)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))


def test_the_loss_with_labels_is_the_mean_nats_of_the_next_token():
    model, ids = tiny().eval(), torch.randint(VOCABULARY, (B, T))
    output = model(ids, labels=ids)
    want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


def test_evaluation_draws_nothing_and_the_state_joins_windows():
    model, ids = tiny().eval(), torch.randint(VOCABULARY, (B, 2 * T))
    before = torch.get_rng_state()
    with copies_of_pass((0, 1)):  # even inside a pass
        whole = model(ids)
    assert torch.equal(torch.get_rng_state(), before)
    first = model(ids[:, :T])
    second = model(ids[:, T:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    torch.testing.assert_close(second.state, whole.state)


# ---- copies


@pytest.mark.trap(8)
@pytest.mark.trap(10)
@pytest.mark.parametrize(("num_copies", "copies_per_pass"), PLANS)
def test_without_dropout_every_m_and_plan_trains_as_windows_without_copies_do(num_copies, copies_per_pass):
    model, data = tiny(**NO_DROPOUT).double(), windows()
    reference, state = copy.deepcopy(model), None
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    for window in data:
        loss, state = regularised_loss(reference, window, state)
        state = [(h.detach(), c.detach()) for h, c in state]
        optimizer.zero_grad()
        (loss / (B * T)).backward()
        optimizer.step()
    got, _ = train(model, data, num_copies, copies_per_pass)
    assert_equal_states(got, reference.state_dict())


@pytest.mark.trap(5)
@pytest.mark.parametrize("copies_per_pass", [3, 2, 1])
def test_without_dropout_the_states_of_copies_stay_equal_for_ever(copies_per_pass):
    _, carried = train(tiny(**NO_DROPOUT), windows(5), 3, copies_per_pass)
    states = carried.state_dict()
    assert len(states) == 3 * 6
    for i in range(6):
        assert bool(states[f"0.0.{i}"].any())
        for m in (1, 2):
            torch.testing.assert_close(states[f"0.{m}.{i}"], states[f"0.0.{i}"])


@pytest.mark.trap(5)
def test_permuting_the_copies_of_one_window_permutes_the_outputs_of_the_next():
    model, (first, second) = tiny(), windows(2)
    carried = CarriedState(model.model.initial_state)
    with copies_of_pass((0, 1, 2)):
        carried.keep(model.model(first["input_ids"].repeat(3, 1), carried.take(3 * B)).state)
    model.eval()

    def outputs(copies):
        with copies_of_pass(copies):
            return model(second["input_ids"].repeat(len(copies), 1), carried.take(len(copies) * B)).logits.split(B)

    straight, permuted = outputs((0, 1, 2)), outputs((2, 0, 1))
    for got, want in zip(permuted, (straight[2], straight[0], straight[1]), strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(straight[0], straight[1])


@pytest.mark.parametrize(
    "dropout",
    [
        pytest.param("weight_dropout", marks=pytest.mark.trap(1)),
        pytest.param("embedding_dropout", marks=pytest.mark.trap(2)),
    ],
)
def test_with_one_dropout_alone_copies_differ_under_per_copy_and_agree_under_shared(dropout):
    ids = windows(1)[0]["input_ids"].repeat(2, 1)
    for mask_scope in ("shared", "per_copy"):
        model = tiny(mask_scope=mask_scope, **{**NO_DROPOUT, dropout: 0.5})
        with copies_of_pass((0, 1)):
            first, second = model(ids).logits.split(B)
        assert torch.allclose(first, second) == (mask_scope == "shared")


@pytest.mark.trap(1)
@pytest.mark.trap(2)
@pytest.mark.trap(5)
@pytest.mark.trap(47)
@pytest.mark.parametrize("mask_scope", ["shared", "per_copy"])
@pytest.mark.parametrize("copies_per_pass", [2, 1])
def test_with_all_dropouts_and_streams_every_plan_trains_the_same_over_windows(mask_scope, copies_per_pass):
    model, data = tiny(mask_scope=mask_scope).double(), windows()  # T = M * B: axes cannot be told apart by size
    fused, fused_carried = train(copy.deepcopy(model), data, 3, 3, copy_seed=1)
    got, carried = train(copy.deepcopy(model), data, 3, copies_per_pass, copy_seed=1)
    assert_equal_states(got, fused)
    assert_equal_states(carried.state_dict(), fused_carried.state_dict())
    other, _ = train(model, data, 3, 3, copy_seed=2)
    assert not torch.allclose(other["lm_head.weight"], fused["lm_head.weight"])


def test_the_audit_says_which_masks_copies_share():
    for mask_scope, scope in (("shared", "shared"), ("per_copy", "per copy")):
        audit = audit_masks(tiny(mask_scope=mask_scope), {"input_ids": windows(1)[0]["input_ids"]}, 3)
        found = {(one.path, one.kind): (one.scope, one.probability) for one in audit.operations}
        assert found == {
            ("model.embedding_dropout", "embedding dropout"): (scope, (0.1, 0.1)),
            ("model.input_dropout", "dropout"): ("per copy", (0.4, 0.4)),
            ("model.layers.{0-2}", "weight dropout"): (scope, (0.5, 0.5)),
            ("model.hidden_dropout", "dropout"): ("per copy", (0.25, 0.25)),
            ("model.output_dropout", "dropout"): ("per copy", (0.4, 0.4)),
        }
    only = tiny(mask_scope="shared", **{**NO_DROPOUT, "weight_dropout": 0.5})
    assert not audit_masks(only, {"input_ids": windows(1)[0]["input_ids"]}).copies_differ
    silent = audit_masks(tiny(**NO_DROPOUT), {"input_ids": windows(1)[0]["input_ids"]})
    assert {one.reason for one in silent.operations} == {"p=0"}
    assert len(silent.operations) == 5


@pytest.mark.trap(37)
@pytest.mark.parametrize("mask_scope", ["shared", "per_copy"])
def test_an_update_of_learning_rate_0_leaves_every_weight_as_it_was(mask_scope):
    model = tiny(mask_scope=mask_scope)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    after, _ = train(model, windows(2), 3, 2, lr=0.0)
    for name, x in after.items():
        assert torch.equal(x, before[name]), name


def test_copies_that_do_not_divide_the_rows_are_refused():
    with copies_of_pass((0, 1)), pytest.raises(ValueError, match="3 is no positive multiple"):
        tiny()(torch.zeros(3, T, dtype=torch.int64))


# ---- transformers


@pytest.fixture
def folder(tmp_path):
    model = tiny(eos_token_id=3, pad_token_id=3, mask_scope="shared")
    model.save_pretrained(tmp_path)
    return tmp_path, model.eval()


@pytest.mark.trap(33)
def test_a_saved_folder_loads_with_the_auto_classes_bit_for_bit(folder):
    path, model = folder
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert type(loaded) is AwdLstmForCausalLM
    assert loaded.config.to_diff_dict() == {**model.config.to_diff_dict(), "architectures": ["AwdLstmForCausalLM"]}
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))
    assert loaded.lm_head.weight is loaded.model.embedding.weight
    ids = torch.randint(VOCABULARY, (B, T))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    bare = AutoModel.from_pretrained(path)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    loaded.train()(ids).logits.sum().backward()
    assert all(bool(p.grad.any()) for p in loaded.parameters())


def test_weights_missing_from_a_file_start_anew_and_leave_the_others(folder):
    _, model = folder
    state = model.state_dict()
    dropped = state.pop("model.layers.1.bias_hh_l0")
    loaded, info = AwdLstmForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True
    )
    assert info["missing_keys"] == {"model.layers.1.bias_hh_l0"}
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]) == (name != "model.layers.1.bias_hh_l0"), name
    assert float(loaded.model.layers[1].bias_hh_l0.detach().abs().max()) <= len(dropped) ** -0.5 * 2


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_with_carried_state_equals_reading_the_whole_text_for_each_token(how):
    model, prompt = tiny(initializer_range=3.0).eval(), torch.randint(VOCABULARY, (3, 4))
    lengths = []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(prompt, max_new_tokens=8, use_cache=use_cache, **how))
    assert torch.equal(*texts)
    assert lengths == [4, *[1] * 7, *range(4, 12)]
    assert len(texts[0].unique()) > 2


def test_generation_goes_on_from_a_given_state():
    model, text = tiny().eval(), torch.randint(VOCABULARY, (3, 6))
    want = model.generate(text, max_new_tokens=5)
    got = model.generate(text[:, 2:], state=model(text[:, :2]).state, max_new_tokens=5)
    assert torch.equal(got, want[:, 2:])


def test_prompts_with_padding_are_refused():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="prompts of one length"):
        tiny().generate(torch.ones(2, 3, dtype=torch.int64), attention_mask=mask, max_new_tokens=2)


def test_a_resized_vocabulary_keeps_the_tie_and_the_dropouts():
    model = tiny(**{**NO_DROPOUT, "embedding_dropout": 0.5})
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    assert model.lm_head.weight is model.model.embedding.weight
    assert model.lm_head.bias.shape == (VOCABULARY + 2,)
    ids = torch.full((1, 1), VOCABULARY + 1)
    assert len({float(model(ids).logits.detach().sum()) for _ in range(20)}) == 2


def test_a_model_without_layers_and_an_unknown_scope_are_refused():
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1, got 0"):
        tiny(num_hidden_layers=0)
    with pytest.raises(Exception, match="mask_scope"):
        tiny(mask_scope="each")


def test_an_untied_model_has_an_output_matrix_of_its_own():
    model = tiny(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embedding.weight
    assert 0.5 < float(model.lm_head.weight.detach().abs().max()) <= 0.8
