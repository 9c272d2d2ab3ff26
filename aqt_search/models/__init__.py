"""Model zoo: plain Flax models with no quantization code inside."""

from aqt_search.models.resnet import ResNet, resnet

__all__ = ["ResNet", "resnet"]
