"""Few-shot segmentation systems and the parts they share: priors, matcher, ensemble."""
