"""Segmentation learned from image-level labels: CLIP-ES (training-free) and WeCLIP."""
