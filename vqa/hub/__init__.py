"""A trained model for `transformers`; importing this registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from vqa.hub.model import ModernConfig, ModernForVisualQuestionAnswering, ModernOutput
from vqa.hub.processor import ModernImageProcessor, ModernProcessor

__all__ = [
    "ModernConfig",
    "ModernForVisualQuestionAnswering",
    "ModernImageProcessor",
    "ModernOutput",
    "ModernProcessor",
]

AutoConfig.register(ModernConfig.model_type, ModernConfig)
AutoModel.register(ModernConfig, ModernForVisualQuestionAnswering)
AutoModelForVisualQuestionAnswering.register(ModernConfig, ModernForVisualQuestionAnswering)
AutoImageProcessor.register(ModernConfig, image_processor_classes={"torchvision": ModernImageProcessor})
AutoProcessor.register(ModernConfig, ModernProcessor)
