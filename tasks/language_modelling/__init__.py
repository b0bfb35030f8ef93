"""Language modelling: AWD-LSTM as a transformers model. Importing this registers it with transformers' auto classes."""

from tasks.language_modelling.model import AwdLstmConfig as AwdLstmConfig
from tasks.language_modelling.model import AwdLstmForCausalLM as AwdLstmForCausalLM
