"""Frozen image encoders and the base learner built on them."""

from model.backbone.base_learner import BaseLearner
from model.backbone.encoder import Encoder, build_encoder, hub_state
from model.backbone.patch import PatchEncoder

__all__ = ["BaseLearner", "Encoder", "PatchEncoder", "build_encoder", "hub_state"]
