"""Entry points of torch.hub: `torch.hub.load(FOLDER, "few_shot", source="local")` from any folder.

    segmenter = torch.hub.load(FOLDER, "few_shot", source="local")           # model.predict.predictor.Predictor
    segmenter.set_support("a.jpg", "a.png")
    mask = segmenter.predict("b.jpg").mask

Paths of weights are looked up here and in the working folder. The packages of requirements.txt must be installed.
"""

from typing import Any

dependencies = ["torch", "timm", "open_clip", "cv2", "safetensors", "yaml"]


def few_shot(weights: str = "photos", **options: Any) -> Any:
    """Return a predictor that finds what examples show; arguments as `Predictor.from_checkpoint`."""
    from model.predict.predictor import Predictor

    return Predictor.from_checkpoint(weights, **options)


def dense(weights: str, **options: Any) -> Any:
    """Return a predictor that labels every pixel with its classes; arguments as `DensePredictor.from_checkpoint`."""
    from model.predict.dense_predictor import DensePredictor

    return DensePredictor.from_checkpoint(weights, **options)


def text(clip: str = "ViT-B-16-quickgelu/openai", **options: Any) -> Any:
    """Return a predictor that finds what a text names, with a CLIP and no training; arguments as `TextPredictor.from_clip`."""
    from model.predict.text_predictor import TextPredictor

    return TextPredictor.from_clip(clip, **options)


def encoder(name: str = "resnet50", **options: Any) -> Any:
    """Return an image encoder without weights: `timm:NAME` or one of ours; arguments as `model.backbone.build_encoder`."""
    from model.backbone import ImageEncoder, build_encoder

    return build_encoder(name, **{"kind": ImageEncoder, **options}).eval()
