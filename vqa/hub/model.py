"""`VQAModel` as a `PreTrainedModel`. The wrapper adds no computation.

`PreTrainedModel` reinitialises all modules. Its loader sets one attribute per weight, which the predicting MLPs,
saved by norm, do not have; it loses `requires_grad=False`, keeps whatever dtype a file has and leaves missing weights
uninitialised. So weights are loaded as those of `model/` are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vqa.build import build_model
from vqa.saved_model.files import download, load_weights
from vqa.settings.recipes import saved_settings
from vqa.settings.schema import Settings
from vqa.text.encoder import empty_encoder
from vqa.text.tokenizer import PAD_ID

_OF_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_OF_AUTO_CLASSES = ("adapter_kwargs", "code_revision", "trust_remote_code")  # what they pass on to every model


class ModernConfig(PreTrainedConfig):
    """The settings of a model, its number of words and, as `id2label`, its answers."""

    model_type = "modern_vqa"
    has_no_defaults_at_init = True

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        vocab_size: int = 2,
        question_encoder: dict[str, Any] | None = None,
        pad_token_id: int = PAD_ID,
        **others: Any,
    ) -> None:
        """`settings` is the result of `Settings.model_dump`, `question_encoder` the configuration of a text encoder, if
        any; `others` are the arguments of `PreTrainedConfig`.
        """
        super().__init__(**others)
        self.settings, self.vocab_size = settings, vocab_size
        self.question_encoder, self.pad_token_id = question_encoder, pad_token_id

    def to_settings(self) -> Settings:
        """The settings. Raises InputError if they are invalid."""
        return saved_settings(self.settings, Path("config.json"))


@dataclass
class ModernOutput(ModelOutput):
    """The output of `ModernForVisualQuestionAnswering`."""

    logits: Tensor | None = None  # [B, A], before the softmax
    attention: Tensor | None = None  # [B, G, H, W], each glimpse sums to 1
    gamma: Tensor | None = None  # deltas [B, sum of C]; None where nothing predicts them
    beta: Tensor | None = None


class ModernForVisualQuestionAnswering(PreTrainedModel):
    """MODERN, or the baseline; `.model` is the `VQAModel`. Made from a configuration alone, its backbone is random."""

    config_class = ModernConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ModernConfig) -> None:
        """Raises InputError if the settings name no model."""
        super().__init__(config)
        encoder = empty_encoder(config.question_encoder, "config.json") if config.question_encoder else None
        self.model = build_model(
            config.to_settings(), config.vocab_size, config.num_labels, pretrained=False, text_encoder=encoder
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `build_model` has initialised every module."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, config: ModernConfig | None = None, dtype: Any = None, **options: Any
    ) -> "ModernForVisualQuestionAnswering":
        """Load a folder, or a model of the Hub, on the CPU in evaluation mode; what is frozen in training is frozen.

        Args:
            name: the folder, or the model's name.
            config: by default that of the folder.
            dtype: float32, which the statistics of the norms need; autocast saves memory and time.
            options: `revision`, `subfolder`, `token`, `cache_dir`, … of a model of the Hub.

        Raises:
            ValueError: another dtype or an unknown option is asked for.
            InputError: the weights are damaged, missing, unknown or of another shape, or cannot be downloaded.
            OSError: there is no such folder or model.
        """
        if dtype not in (None, "auto", "float32", torch.float32):
            raise ValueError(f"dtype={dtype}: the weights and statistics are float32; use torch.autocast instead")
        found = {key: options.pop(key) for key in _OF_FILES if key in options}
        if unknown := [key for key in options if not (key.startswith("_") or key in _OF_AUTO_CLASSES)]:
            raise ValueError(f"{', '.join(unknown)}: not supported: weights are read whole, in float32, onto the CPU")
        config = config or ModernConfig.from_pretrained(name, **found)
        with torch.device("meta"):
            model = cls(config)
        inside = found.pop("subfolder", "")
        folder = Path(name) if Path(name).is_dir() else download(str(name), **found)
        load_weights(model.model, folder / inside)
        return model.eval()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        modulate: bool = True,
        return_dict: bool | None = None,
    ) -> ModernOutput | tuple[Tensor, ...]:
        """The result of `ModernProcessor` → logits with attention and modulation.

        Args:
            pixel_values: normalised images [B, 3, S, S].
            input_ids: word ids [B, T], padded on the right.
            attention_mask: [B, T], 1 for words; by default whatever is not padding.
            modulate: False leaves the ResNet as it was pretrained.
            return_dict: False returns a tuple.

        Raises:
            ValueError: a question holds no word, is padded on the left, or has a masked word between others.
        """
        mask = input_ids.ne(self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
        if not (mask.shape[1] and mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
            raise ValueError("each question must hold a word and be padded on the right, without a masked word between")
        output = self.model(pixel_values, input_ids, mask.sum(1), modulate=modulate)
        gamma, beta = output.modulation or (None, None)
        named = ModernOutput(output.logits, output.attention, gamma, beta)
        return named.to_tuple() if return_dict is False else named
