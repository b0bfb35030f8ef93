"""AWD-LSTM (Merity et al. 2018, "Regularizing and Optimizing LSTM Language Models") as a transformers model.

Importing this file registers it: `AutoModelForCausalLM.from_pretrained` then loads its folders.
"""

from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from seqba.modules import EmbeddingDropout, LockedDropout, MaskScope, WeightDropoutLSTM

State = tuple[tuple[Tensor, Tensor], ...]  # (h, c) of each layer, each (1, rows, width)


@strict
class AwdLstmConfig(PreTrainedConfig):
    """Sizes and dropouts of an AWD-LSTM; the defaults are the paper's model of Penn Treebank, 24,221,600 parameters.

    Args:
        vocab_size: V.
        embedding_size: width of the embeddings, and of the last layer, which the output layer reads.
        hidden_size: width of the other layers.
        num_hidden_layers: LSTM layers.
        input_dropout: of the embedded input; one mask a sequence, as the next two.
        hidden_dropout: between the layers.
        output_dropout: of the last layer's output.
        embedding_dropout: of whole words of the vocabulary.
        weight_dropout: of the recurrent matrices.
        mask_scope: of the last two: `per_copy`, each copy of a sample under its own mask, or `shared`.
        initializer_range: embeddings start from U(-r, r).
        tie_word_embeddings: whether the output layer's matrix is the embeddings.
        use_cache: whether `generate` carries the state, or reads the whole text for each token.
    """

    model_type = "awd-lstm"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012 (transformers' own way: it makes this class a dataclass)

    vocab_size: int = 10_000
    embedding_size: int = 400
    hidden_size: int = 1150
    num_hidden_layers: int = 3
    input_dropout: float = 0.4
    hidden_dropout: float = 0.25
    output_dropout: float = 0.4
    embedding_dropout: float = 0.1
    weight_dropout: float = 0.5
    mask_scope: MaskScope = "per_copy"
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass
class AwdLstmOutput(ModelOutput):
    """The output of the layers below the output layer.

    Attributes:
        last_hidden_state: (rows, T, embedding_size), dropped: the input of the output layer; AR is taken of it.
        raw_hidden_state: the same before its dropout; TAR is taken of it.
        state: after the last time step.
    """

    last_hidden_state: Tensor | None = None
    raw_hidden_state: Tensor | None = None
    state: State | None = None


@dataclass
class AwdLstmCausalOutput(ModelOutput):
    """The output of a language model.

    Attributes:
        loss: where labels were given: mean nats of the next token.
        logits: (rows, T, V).
        state: after the last time step.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class AwdLstmPreTrainedModel(PreTrainedModel):
    """The attributes that transformers needs on both classes below."""

    config_class = AwdLstmConfig
    base_model_prefix = "model"
    _is_stateful = True  # the state cannot go back by some tokens, as assisted decoding would want

    def _init_weights(self, module: nn.Module) -> None:
        scale = self.config.initializer_range
        if isinstance(module, (nn.Embedding, nn.Linear)):
            init.uniform_(module.weight, -scale, scale)
        if isinstance(module, nn.Linear):
            init.zeros_(module.bias)
        if isinstance(module, WeightDropoutLSTM):
            module.reset_parameters()  # transformers guards what it calls in torch.nn.init from loaded weights


class AwdLstmModel(AwdLstmPreTrainedModel):
    """Embeddings and LSTM layers, without the output layer."""

    def __init__(self, config: AwdLstmConfig) -> None:
        super().__init__(config)
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {config.num_hidden_layers}")
        scope = config.mask_scope
        widths = [config.hidden_size] * (config.num_hidden_layers - 1) + [config.embedding_size]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = EmbeddingDropout(config.embedding_dropout, scope)
        self.input_dropout = LockedDropout(config.input_dropout)
        self.layers = nn.ModuleList(
            WeightDropoutLSTM(input_size, width, config.weight_dropout, scope)
            for input_size, width in zip([config.embedding_size, *widths], widths, strict=False)
        )
        self.hidden_dropout = LockedDropout(config.hidden_dropout)
        self.output_dropout = LockedDropout(config.output_dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The layer that transformers resizes, ties and shares."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another in its place."""
        self.embedding = value

    def initial_state(self, num_rows: int) -> State:
        """Zeros: what `seqba.CarriedState` begins with."""
        return tuple(cast(WeightDropoutLSTM, layer).initial_state(num_rows) for layer in self.layers)

    @can_return_tuple
    def forward(self, input_ids: Tensor, state: State | None = None, **kwargs: Any) -> AwdLstmOutput:
        """Run over a window of text.

        Args:
            input_ids: (rows, T).
            state: before the first token, (h, c) for each layer, each (1, rows, width); zeros by default.
            kwargs: ignored; an attention mask too, see `AwdLstmForCausalLM.forward`.
        """
        hidden = self.embedding_dropout(self.embedding(input_ids), input_ids, self.embedding.num_embeddings)
        hidden = self.input_dropout(hidden)
        states = []
        for i, layer in enumerate(self.layers, start=1):
            raw, after = layer(hidden, None if state is None else state[i - 1])
            states.append(after)
            hidden = (self.hidden_dropout if i < len(self.layers) else self.output_dropout)(raw)
        return AwdLstmOutput(hidden, raw, tuple(states))


class AwdLstmForCausalLM(AwdLstmPreTrainedModel, GenerationMixin):
    """AWD-LSTM with its output layer.

    A training loop reads `model.model(input_ids, state)` and gives its `last_hidden_state`, with the weight and the
    bias of `lm_head`, to `seqba.linear_cross_entropy`, which keeps no logits.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: AwdLstmConfig) -> None:
        super().__init__(config)
        self.model = AwdLstmModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> AwdLstmCausalOutput:
        """Predict the next token at each position.

        Args:
            input_ids: (rows, T). Padding must be on the right, where it is not seen by the tokens before it; the
                state returned is then that after the padding.
            state: before the first token, as `AwdLstmModel.forward` takes it.
            labels: (rows, T), -100 where ignored; label t + 1 is the target of position t.
            logits_to_keep: for how many of the last positions (or which) logits are computed; 0 for all.
            kwargs: for the loss, such as `num_items_in_batch`.
        """
        output = self.model(input_ids, state)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.lm_head.out_features, **kwargs)
        return AwdLstmCausalOutput(loss, logits, output.state)

    # ---- generation

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # keys and values of attention: there are none

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` gives to a forward call: all tokens at first, then the last one and the carried state.

        Raises:
            ValueError: prompts with padding, which would enter the state.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "the attention mask hides tokens, but a recurrent network reads all of them; generate for prompts of "
                "one length at a time, or for each alone"
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        state = outputs["state"] if model_kwargs.get("use_cache", True) else model_kwargs.get("state")
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        updated.pop("state", None)  # transformers 5.17 puts the new state there without `use_cache` too
        return updated if state is None else {**updated, "state": state}

    @staticmethod
    def _reorder_cache(state: State, beam_idx: Tensor) -> State:
        return tuple((h.index_select(1, beam_idx), c.index_select(1, beam_idx)) for h, c in state)


AutoConfig.register(AwdLstmConfig.model_type, AwdLstmConfig, exist_ok=True)
AutoModel.register(AwdLstmConfig, AwdLstmModel, exist_ok=True)
AutoModelForCausalLM.register(AwdLstmConfig, AwdLstmForCausalLM, exist_ok=True)
