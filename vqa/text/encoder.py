"""Text encoders of `transformers` as question encoders: by name or folder for a new model, by configuration for a saved
one, whose weights are among those of the whole model.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vqa.io.errors import InputError, first_line
from vqa.io.files import is_hub_name

if TYPE_CHECKING:
    from torch import nn

LONGEST = 128  # tokens of a question, its special tokens included; later ones are cut off
CONFIGURATION = "question_encoder.json"  # in `model/`
_ONE_THREAD = threading.RLock()  # `transformers` has one verbosity for all threads


def read_pretrained(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the configuration of a text encoder.

    Args:
        name: a folder, or a model's name on the Hub, which is downloaded once.

    Raises:
        InputError: it is missing, or it has no tokenizer that `tokenizers` runs.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _quiet(_unreadable(name)):
        configuration = AutoConfig.from_pretrained(name, use_cache=False, trust_remote_code=False).to_dict()
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer: Tokenizer = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
        pad = theirs.pad_token or theirs.eos_token or theirs.unk_token
        tokenizer.enable_padding(pad_id=theirs.convert_tokens_to_ids(pad), pad_token=pad)
        tokenizer.enable_truncation(min(LONGEST, theirs.model_max_length))
    configuration.pop("_name_or_path", None)
    check_tokenizer(tokenizer, configuration, f"question.text_encoder: {name}")
    return tokenizer, configuration


def check_tokenizer(tokenizer: Tokenizer, configuration: Any, where: str) -> None:
    """Make the tokenizer truncate questions to what the encoder takes. Raises InputError if it is another encoder's."""
    known = _configuration_of(configuration, where)
    words, positions = (getattr(known, name, None) for name in ("vocab_size", "max_position_embeddings"))
    if not isinstance(words, int):
        raise InputError(f"{where}: no configuration of a text encoder: vocab_size is {words}")
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= words:
        raise InputError(f"{where}: its tokenizer has ids up to {last}, the encoder only {words} tokens")
    longest = tokenizer.truncation["max_length"]
    if isinstance(positions, int) and positions > 2:
        longest = min(longest, positions - 2)  # RoBERTa's begin at 2
    tokenizer.enable_truncation(min(longest, LONGEST))


def _configuration_of(configuration: Any, where: str) -> Any:
    from transformers import AutoConfig

    with _quiet(f"{where}: no configuration of a text encoder"):
        return AutoConfig.for_model(**configuration)


def load_encoder(name: str) -> "nn.Module":
    """The text encoder of a folder or name with its weights, in float32; `config.hidden_size` is the size of a state.

    Raises:
        InputError: it or its weights are missing, or it does not take token ids alone.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    with _quiet(_unreadable(name)):
        configuration = AutoConfig.from_pretrained(name, use_cache=False, trust_remote_code=False)
        model, found = AutoModel.from_pretrained(
            name, config=configuration, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        encoder, ids = _encoder_of(model), torch.ones(1, 2, dtype=torch.int64)
        if missing := sorted(key for key in found["missing_keys"] if "pooler." not in key):
            raise ValueError(f"{len(missing)} weights are missing: {missing[0]}")
        with torch.no_grad():
            states = encoder(input_ids=ids, attention_mask=ids).last_hidden_state
        if states.shape != (1, 2, encoder.config.hidden_size):
            raise ValueError(f"its output must be one state per token, not {tuple(states.shape)}")
    return encoder


def empty_encoder(configuration: Mapping[str, Any], where: str) -> "nn.Module":
    """The encoder of a configuration, with random weights. Raises InputError, which names `where`, if it is invalid."""
    import torch
    from transformers import AutoModel

    known = _configuration_of(configuration, where)
    with _quiet(f"{where}: no configuration of a text encoder"):
        return _encoder_of(AutoModel.from_config(known, dtype=torch.float32, trust_remote_code=False))


def _encoder_of(model: "nn.Module") -> "nn.Module":
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # not used: its parameters would have no gradient
    for module in encoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer)  # saved with the weights: a model is built without memory, then loaded
    return encoder


def _unreadable(name: str) -> str:
    """The error where `transformers` cannot read this name or folder. Raises InputError if it can only be a folder."""
    where, is_folder = f"question.text_encoder: {name}", Path(name).is_dir()
    if "/" in name and not (is_folder or is_hub_name(name)):
        raise InputError(f"{where}: no such folder")
    why = "" if is_folder else "no such folder, and as a name on the Hub "
    return f"{where}: {why}cannot be read as a text encoder"


@contextmanager
def _quiet(failure: str) -> Iterator[None]:
    """Keep `transformers` from printing bars and warnings, and turn whatever it raises into one line, `failure`."""
    from transformers.utils import logging

    with _ONE_THREAD:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        except Exception as error:  # of the network, the access, the files, the kind of model: of several libraries
            raise InputError(f"{failure} ({first_line(error):.150})") from None
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
