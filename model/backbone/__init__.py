"""Frozen image encoders and the base learner built on them."""

from model.backbone.base_learner import BaseLearner
from model.backbone.door import build_encoder, hub_state, origin
from model.backbone.encoder import Encoder, ImageEncoder
from model.backbone.patch import PatchEncoder

__all__ = ["BaseLearner", "Encoder", "ImageEncoder", "PatchEncoder", "build_encoder", "hub_state", "origin"]
