"""Tiny text encoders of `transformers` with random weights, each with a tokenizer of its kind, as folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

SIZE = 16  # of a state
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WORDS = [
    *("what", "color", "is", "the", "circle", "square", "triangle", "left", "of", "how", "many", "are"),
    *("there", "a", "in", "?", "re", "##d", "##s"),
]


def write_encoder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """Writes a text encoder: bert (word pieces), roberta, gpt2 (bytes, no padding token) or t5 (of two stacks)."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
        config = GPT2Config(
            vocab_size=len(words), n_embd=SIZE, n_layer=2, n_head=2, n_positions=40, bos_token_id=256, eos_token_id=256
        )
        model = GPT2Model(config)
        tokenizer = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        named = {"eos_token": words[-1]}
        tokenizer.add_special_tokens(words[-1:])
    else:
        words = [*SPECIAL.values(), *WORDS]
        layers = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        if kind == "bert":
            model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=40, **layers))
        elif kind == "roberta":
            config = RobertaConfig(vocab_size=len(words), max_position_embeddings=24, pad_token_id=1, **layers)
            model = RobertaModel(config)
        else:
            t5 = {"d_model": SIZE, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
            model = T5Model(T5Config(vocab_size=len(words) + 2, **t5))
        tokenizer = Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(words[:4])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        named = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
