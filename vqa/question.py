"""The question encoder (section 2 of the paper), word embeddings into an LSTM or GRU; text encoders; the kinds of
questions.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD_ID = 0  # the word id after the end of a question, as in the tokenizer
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}
KIND_WORDS = 2  # the first words of a question that are its kind: "what color", "how many", "is there"
KINDS = 64  # the most common kinds have a class each; all other questions share one more


class QuestionEncoder(nn.Module):
    """The embedding e_q of a question: the last valid hidden state of an LSTM or GRU over its words.

    A word is a learned embedding, with its fixed GloVe vector appended if there are any. With the encoder
    `bag_of_words` e_q is the tanh of a linear layer over the mean of the words.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        *,
        encoder: str,
        layers: int,
        fixed_size: int = 0,
    ) -> None:
        """`fixed_size` is the length of the fixed vectors (0: none), which `set_fixed` sets; `layers` are recurrent.

        Raises ValueError for an unknown `encoder`.
        """
        super().__init__()
        if encoder not in (known := [*RECURRENT, "bag_of_words"]):
            raise ValueError(f"unknown {encoder!r}; there are {', '.join(known)}")
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=PAD_ID)
        self.fixed = nn.Embedding(vocabulary_size, fixed_size) if fixed_size else None
        if self.fixed:
            self.fixed.requires_grad_(False)
        self.recurrent = self.bag = None
        if encoder == "bag_of_words":
            self.bag = nn.Linear(embedding_size + fixed_size, hidden_size)
        else:
            self.recurrent = RECURRENT[encoder](embedding_size + fixed_size, hidden_size, layers, batch_first=True)
            self._initialise(hidden_size)

    @torch.no_grad()
    def _initialise(self, hidden_size: int) -> None:
        """Initialise gate by gate as TensorFlow does: input weights Glorot-uniform, recurrent ones orthogonal, biases
        zero, but 1 in the LSTM's forget gates so that the first words of a question are not lost.

        With PyTorch's small uniform weights the embeddings of different questions are nearly equal at the start, and
        the modulation takes several times as long to learn.
        """
        for name, parameter in self.recurrent.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
                continue
            for gate in parameter.split(hidden_size):
                (nn.init.xavier_uniform_ if name.startswith("weight_ih") else nn.init.orthogonal_)(gate)
        if isinstance(self.recurrent, nn.LSTM):
            for layer in range(self.recurrent.num_layers):
                forget = slice(hidden_size, 2 * hidden_size)
                getattr(self.recurrent, f"bias_ih_l{layer}")[forget] = 1.0

    def set_fixed(self, vectors: Tensor) -> None:
        """Set the fixed vectors [V, fixed_size]."""
        with torch.no_grad():
            self.fixed.weight.copy_(vectors)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Word ids [B, T] and lengths [B], each at least 1 → e_q [B, D], independent of the padding."""
        words = self.embedding(tokens)  # [B, T, E]
        if self.fixed:
            words = torch.cat([words, self.fixed(tokens)], dim=2)
        if self.bag:
            return torch.tanh(self.bag(_mean(words, lengths)))
        # in full precision: under autocast cuDNN would run the recurrent layers in float16, whose gradients underflow
        with torch.autocast(tokens.device.type, enabled=False):
            states, _ = self.recurrent(words)  # [B, T, D]; causal: padding after a question cannot reach its last state
        return _last(states, lengths)


def _valid(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Whether each of [B, T] (and more dimensions) is before the end of its question, [B, T]."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def _mean(states: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, D] → the mean of the states before the end, [B, D]."""
    return (states * _valid(states, lengths)[:, :, None]).sum(1) / lengths[:, None]


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, D] → the last state before the end, [B, D]."""
    return states[torch.arange(len(lengths), device=lengths.device), lengths - 1]


POOLINGS = {"last": _last, "mean": _mean}


class TextEncoder(nn.Module):
    """The embedding e_q of a question: the last valid state of a text encoder, or the mean of its valid states.

    A linear layer follows where these states have another size than e_q.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, *, pooling: Literal["last", "mean"], frozen: bool) -> None:
        """`encoder` takes `input_ids` and `attention_mask` [B, T] and returns a `last_hidden_state` of its
        `config.hidden_size` numbers for each token.

        With `frozen` it is not trained and always in evaluation mode, without dropout. Raises ValueError for an unknown
        `pooling`.
        """
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown {pooling!r}; there are {', '.join(POOLINGS)}")
        self.encoder, self.pooling, self.frozen = encoder, pooling, frozen
        states = encoder.config.hidden_size
        self.projection = nn.Linear(states, hidden_size) if states != hidden_size else nn.Identity()
        encoder.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Set the mode of training, as every module does, of all but a frozen encoder."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Token ids [B, T] and lengths [B], each at least 1 → e_q [B, D], independent of the padding."""
        states = self.encoder(input_ids=tokens, attention_mask=_valid(tokens, lengths).long()).last_hidden_state
        return self.projection(POOLINGS[self.pooling](states, lengths))


class QuestionKinds(nn.Module):
    """The kind of a question: which of the most common pairs of first words it starts with, or none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first_words", torch.full((KINDS, KIND_WORDS), PAD_ID))

    def set_from(self, tokens: Tensor) -> None:
        """Choose the most common pairs of first words of training questions, word ids [N, 2], padded with PAD_ID."""
        pairs, counts = tokens.unique(dim=0, return_counts=True)
        chosen = pairs[counts.argsort(descending=True, stable=True)[:KINDS]]
        self.first_words.fill_(PAD_ID)[: len(chosen)] = chosen

    def forward(self, tokens: Tensor) -> Tensor:
        """Word ids [B, T] → kinds int64 [B], 0 to KINDS; KINDS for all other first words."""
        first = F.pad(tokens[:, :KIND_WORDS], (0, max(KIND_WORDS - tokens.shape[1], 0)), value=PAD_ID)
        same = (first[:, None] == self.first_words).all(2)  # [B, KINDS]
        return torch.where(same.any(1), same.int().argmax(1), KINDS)
