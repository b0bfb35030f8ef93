"""The presets of a language modelling run: options by name, and the data they are for. Any option overrides them."""

from __future__ import annotations

from typing import Any

# AWD-LSTM of Merity et al. 2018, sizes and options of its published runs; a validation an epoch of some 681 updates for
# PTB and 382 for WikiText-2. Not measured yet.
_AWD_LSTM: dict[str, Any] = {
    "embedding_size": 400, "hidden_size": 1_150, "num_layers": 3, "learning_rate": 30.0,
    "input_dropout": 0.4, "hidden_dropout": 0.25, "output_dropout": 0.4, "embedding_dropout": 0.1,
    "weight_dropout": 0.5, "batch_size": 20, "bptt": 70, "max_norm": 0.25,
    "max_updates": 340_500, "log_every": 100, "eval_every": 681, "save_every": 681,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "generated": {
        "bptt": 35, "max_norm": 0.25, "max_updates": 600, "log_every": 25, "eval_every": 100, "save_every": 100,
    },
    "awd-lstm-ptb": _AWD_LSTM,
    "awd-lstm-wt2": _AWD_LSTM | {
        "input_dropout": 0.65, "hidden_dropout": 0.2, "batch_size": 80,
        "max_updates": 286_500, "eval_every": 382, "save_every": 382,
    },
    "awd-lstm-small": _AWD_LSTM | {
        "embedding_size": 200, "hidden_size": 400, "num_layers": 2,
        "max_updates": 2_043, "log_every": 50, "eval_every": 227, "save_every": 227,
    },
}  # fmt: skip

# The folder below $SEQBA_DATA that is taken where --data is not given.
DATA = {"awd-lstm-ptb": "ptb", "awd-lstm-wt2": "wikitext2", "awd-lstm-small": "ptb"}
